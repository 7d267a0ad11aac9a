"""A proxy in front of an HTTP server that injects the faults of networks and object stores.

It passes requests and replies on byte for byte, so that signatures stay valid, unless a fault hits:

    with FaultProxy(server.endpoint) as proxy:
        fault = proxy.add(Fault(Status(503), when=is_write, probability=0.3, times=5))
        ...  # use a client of proxy.endpoint
        assert fault.hits and proxy.counts['PUT', 503] == fault.hits
        proxy.clear()
        proxy.down()  # breaks all connections and refuses new ones, until proxy.up()
"""

import collections
import random
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urlsplit

from tests.http_wire import Head, Stream, first_readable

POLL_SECONDS = 0.02
S3_CODES = {
    400: 'ExpiredToken',
    403: 'AccessDenied',
    404: 'NoSuchKey',
    409: 'ConditionalRequestConflict',
    412: 'PreconditionFailed',
    500: 'InternalError',
    503: 'SlowDown',
}


@dataclass(frozen=True)
class Status:
    """The proxy answers with an error in S3's format; the server never sees the request."""

    status: int
    code: str = ''  # default: from S3_CODES


@dataclass(frozen=True)
class Reset:
    """Resets the connection: before the server sees the request, or in the middle of its reply."""

    after_bytes: int | None = None  # of the reply's body; None: before the request is passed on


@dataclass(frozen=True)
class Stall:
    """Neither reads nor answers; passes the request on when released, or after `seconds`."""

    seconds: float = float('inf')


@dataclass(frozen=True)
class LoseReply:
    """The server executes the request; then the connection is reset instead of its reply."""


Action = Status | Reset | Stall | LoseReply


def is_write(method: str, path: str) -> bool:
    return method in ('PUT', 'POST', 'DELETE')


def is_read(method: str, path: str) -> bool:
    return method in ('GET', 'HEAD')


@dataclass(eq=False)
class Fault:
    """An action and which requests it hits; if several faults match, the first one added acts."""

    action: Action
    # Called with the method and the path as sent, query included: '/bucket/key?uploads='.
    when: Callable[[str, str], bool] = lambda method, path: True
    skip: int = 0  # how many matching requests pass first
    times: int | None = None  # how many requests it hits at most; None: no limit
    seconds: float = float('inf')  # how long it is active after it was added
    probability: float = 1.0
    seed: int = 0
    hits: int = field(default=0, init=False)
    happened: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self):
        self._released = threading.Event()
        self._random = random.Random(self.seed)
        self._skipped = 0
        self._end = float('inf')

    def release(self) -> None:
        """Lets stalled requests pass, and all later ones too."""
        self._released.set()

    def _hits(self, method: str, path: str) -> bool:
        is_over = self.hits == self.times or time.monotonic() > self._end
        if is_over or not self.when(method, path):
            return False
        if self._skipped < self.skip:
            self._skipped += 1
            return False
        if self._random.random() >= self.probability:
            return False
        self.hits += 1
        self.happened.set()
        return True


class FaultProxy:
    """Listens on a free port of the loopback interface; all methods are thread-safe."""

    def __init__(self, upstream: str):
        self.upstream = (urlsplit(upstream).hostname, urlsplit(upstream).port)
        # Bound but not listening: while the proxy is down, the port stays ours and refuses.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(('127.0.0.1', 0))
        self.address = self._reserved.getsockname()
        self.endpoint = 'http://{}:{}'.format(*self.address)
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._log: list[tuple[str, str, int | str]] = []
        self._connections: dict[_Connection, threading.Thread] = {}
        self._listener: _Listener | None = None
        self.up()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    @property
    def log(self) -> list[tuple[str, str, int | str]]:
        """(method, path, status) of each request so far.

        Without a reply, the status is 'reset', 'stalled' or 'lost', or 'unanswered' if client or
        server closed the connection. A request that stalled and then passed appears twice.
        """
        with self._lock:
            return list(self._log)

    @property
    def counts(self) -> collections.Counter:
        """{(method, status): number of requests}."""
        return collections.Counter((method, status) for method, _, status in self.log)

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            fault._end = time.monotonic() + fault.seconds
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Removes all faults; stalled requests pass."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.release()

    def up(self) -> None:
        if self._listener is None:
            self._listener = _Listener(self)

    def down(self) -> None:
        """Breaks all connections and refuses new ones."""
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            connection.interrupt()
        for thread in connections.values():
            thread.join(timeout=5)

    def close(self) -> None:
        self.down()
        self._reserved.close()

    def _serve(self, client: socket.socket) -> None:
        """Serves a client connection in its own thread."""
        connection = _Connection(self, client)
        thread = threading.Thread(target=self._run, args=[connection], daemon=True)
        with self._lock:
            self._connections[connection] = thread
        thread.start()

    def _run(self, connection: '_Connection') -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                del self._connections[connection]

    def _fault_for(self, request: Head) -> Fault | None:
        with self._lock:
            return next((f for f in self._faults if f._hits(request.method, request.path)), None)

    def _note(self, request: Head, status: int | str) -> None:
        """Logs a request, before the client gets its reply, so that the client can find it."""
        with self._lock:
            self._log.append((request.method, request.path, status))


class _Listener(socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy):
        self.proxy = proxy
        super().__init__(proxy.address, socketserver.BaseRequestHandler)
        self.thread = threading.Thread(target=self.serve_forever, args=[POLL_SECONDS], daemon=True)
        self.thread.start()

    def process_request(self, request, client_address):
        self.proxy._serve(request)

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Connection:
    """A connection of a client, and the matching connection to the server."""

    def __init__(self, proxy: FaultProxy, client: socket.socket):
        self.proxy = proxy
        self.client = Stream(client)
        self.server: Stream | None = None
        self.is_interrupted = False

    def run(self) -> None:
        """Passes on requests until either side, or a fault, closes the connection."""
        try:
            while (request := self.client.head()) and self._exchange(request):
                pass
            self.client.finish()
        except OSError:
            pass
        finally:
            self.client.abort()
            if self.server:
                self.server.abort()

    def interrupt(self) -> None:
        """Wakes the thread, which closes its own sockets: their numbers may be reused by now."""
        self.is_interrupted = True
        for stream in (self.client, self.server):
            if stream:
                stream.wake()

    def _exchange(self, request: Head) -> bool:
        """Handles one request and its reply; returns whether another may follow."""
        fault = self.proxy._fault_for(request)
        match fault and fault.action:
            case Status() as action:
                return self._refuse(request, action)
            case Reset(after_bytes=None):
                self.proxy._note(request, 'reset')
                raise ConnectionResetError
            case Stall(seconds):
                self.proxy._note(request, 'stalled')
                self._stall(fault, seconds)
                return self._pass(request)
            case action:
                return self._pass(request, action)

    def _refuse(self, request: Head, action: Status) -> bool:
        """Reads the body before answering, or a client that is still sending may miss it."""
        if not request.expects_continue:
            for _ in self.client.body(request):
                pass
        code = action.code or S3_CODES.get(action.status, 'InternalError')
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
        body += f'<Message>By the fault proxy</Message><RequestId>{id(self)}</RequestId></Error>'
        head = f'HTTP/1.1 {action.status} {HTTPStatus(action.status).phrase}\r\n'
        head += f'Content-Type: application/xml\r\nContent-Length: {len(body)}\r\n'
        if request.expects_continue:
            head += 'Connection: close\r\n'
        self.proxy._note(request, action.status)
        self.client.send(f'{head}\r\n{"" if request.method == "HEAD" else body}'.encode())
        return request.keeps_alive and not request.expects_continue

    def _stall(self, fault: Fault, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not fault._released.wait(POLL_SECONDS):
            if self.client.is_gone():
                raise ConnectionAbortedError

    def _pass(self, request: Head, action: Reset | LoseReply | None = None) -> bool:
        try:
            is_sent, reply = self._ask(request)
        except OSError:
            self.proxy._note(request, 'unanswered')
            raise
        body = self.server.body(reply, reply_to=request.method)
        if isinstance(action, LoseReply):
            for _ in body:
                pass
            self.proxy._note(request, 'lost')
            raise ConnectionResetError
        self.proxy._note(request, reply.status if action is None else 'reset')
        self.client.send(reply.raw)
        for block in body if action is None else _first(action.after_bytes, body):
            self.client.send(block)
        if action is not None:
            raise ConnectionResetError
        return is_sent and request.keeps_alive and reply.keeps_alive

    def _ask(self, request: Head) -> tuple[bool, Head]:
        """Sends a request -> (whether all of it was sent, head of the reply)."""
        if self.server is None or self.server.is_readable():  # the server has closed it
            self._connect()
        self.server.send(request.raw)
        if request.expects_continue and self._hears_first_from_server():
            reply = self.server.reply()
            if not reply.is_interim:
                return False, reply
            self.client.send(reply.raw)
        is_sent = True
        for block in self.client.body(request):
            try:
                self.server.send(block)
            except OSError:  # the server refused in mid-request; its reply may be readable
                is_sent = False
                break
        while (reply := self.server.reply()).is_interim:
            pass
        return is_sent, reply

    def _connect(self) -> None:
        if self.server:
            self.server.abort()
        self.server = Stream(socket.create_connection(self.proxy.upstream))
        if self.is_interrupted:
            raise ConnectionAbortedError

    def _hears_first_from_server(self) -> bool:
        """Whether the server answers first: some clients send the body without waiting for 100."""
        if self.client.buffer:
            return False
        return first_readable(self.client, self.server) is self.server


def _first(count: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return
