"""HTTP/1.1 as bytes on a socket: reads heads and bodies so that they can be sent on unchanged."""

import contextlib
import select
import socket
import struct
from collections.abc import Iterator

BLOCK_BYTES = 256 << 10


class Head:
    """The first line and headers of a request or a reply, raw and parsed."""

    def __init__(self, raw: bytes):
        self.raw = raw
        first, *lines = raw.decode('latin-1').split('\n')
        self._words = first.split()
        pairs = (line.partition(':') for line in lines)
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}

    @property
    def method(self) -> str:
        return self._words[0]

    @property
    def path(self) -> str:
        return self._words[1]

    @property
    def status(self) -> int:
        return int(self._words[1])

    @property
    def is_interim(self) -> bool:
        return self.status < 200

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for 100 Continue; some ask without a body and get no answer."""
        has_body = self.headers.get('content-length') != '0'
        return has_body and self.headers.get('expect', '').lower() == '100-continue'

    @property
    def keeps_alive(self) -> bool:
        connection = self.headers.get('connection', '').lower()
        return connection != 'close' and ('HTTP/1.1' in self._words or connection == 'keep-alive')


class Stream:
    """A socket, with a buffer of bytes that were read but not used yet."""

    def __init__(self, connected: socket.socket):
        self.socket = connected
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b''

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes, at least one; b'' at the end of the stream."""
        if not self.buffer:
            return self.socket.recv(min(limit, BLOCK_BYTES))
        data, self.buffer = self.buffer[:limit], self.buffer[limit:]
        return data

    def line(self) -> bytes:
        while b'\n' not in self.buffer:
            if not (data := self.socket.recv(BLOCK_BYTES)):
                raise ConnectionError('closed within a line')
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b'\n')
        return line + b'\n'

    def exactly(self, count: int) -> Iterator[bytes]:
        while count:
            if not (data := self.read(count)):
                raise ConnectionError('closed within a body')
            count -= len(data)
            yield data

    def head(self) -> Head | None:
        """Reads the head of a message; None at the end of the stream."""
        if not self.buffer:
            self.buffer = self.socket.recv(BLOCK_BYTES)
        return Head(b''.join(self._lines())) if self.buffer else None

    def reply(self) -> Head:
        if head := self.head():
            return head
        raise ConnectionError('closed without a reply')

    def _lines(self) -> Iterator[bytes]:
        """Yields lines up to and including an empty one."""
        while True:
            line = self.line()
            yield line
            if not line.strip():
                return

    def body(self, head: Head, reply_to: str = '') -> Iterator[bytes]:
        """Yields the body as it is on the wire, chunk sizes included."""
        if reply_to and (reply_to == 'HEAD' or head.status in (204, 304)):
            return
        if 'chunked' in head.headers.get('transfer-encoding', '').lower():
            while size := int((mark := self.line()).partition(b';')[0], 16):
                yield mark
                yield from self.exactly(size + len(b'\r\n'))
            yield mark
            yield from self._lines()
        elif 'content-length' in head.headers:
            yield from self.exactly(int(head.headers['content-length']))
        elif reply_to:
            yield from iter(lambda: self.read(BLOCK_BYTES), b'')
            head.headers['connection'] = (
                'close'  # the end of the connection was the end of the body
            )

    def is_readable(self) -> bool:
        return bool(self.buffer or self._poll(select.POLLIN))

    def is_gone(self) -> bool:
        """Whether the other side has closed the connection, even if there is more to read."""
        return self._poll(select.POLLRDHUP)

    def _poll(self, event: int) -> bool:
        poll = select.poll()
        poll.register(self.socket, event)
        return bool(poll.poll(0))

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Closes the connection in order: unread data from the other side would reset it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(1)
            while self.socket.recv(BLOCK_BYTES):
                pass
        self.socket.close()

    def abort(self) -> None:
        """Closes the connection with a reset."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.socket.close()


def first_readable(*streams: Stream) -> Stream:
    """Waits for the first stream with data to read, or that has been closed."""
    poll = select.poll()
    for stream in streams:
        poll.register(stream.socket, select.POLLIN)
    ready = {number for number, _ in poll.poll()}
    return next(stream for stream in reversed(streams) if stream.socket.fileno() in ready)
