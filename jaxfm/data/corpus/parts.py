"""Building a corpus: shards become parts, in several processes, and the parts one cache.

A part is a directory that is renamed when it is whole, and so is the cache; what a killed build has
finished is there for the next one. Which records are left out, and which error stops a build, does
not depend on the number of processes.
"""

import contextlib
import fcntl
import functools
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from jaxfm.chat.render import Chat
from jaxfm.data import SOURCES
from jaxfm.data.corpus import token_cache
from jaxfm.data.documents import Document
from jaxfm.data.sources.files import TooManyBadRecords, check_bad_records
from jaxfm.errors import DataError, PermissionDeniedError, RunError, StorageError
from jaxfm.tokenizer.build import Tokenizer, load_tokenizer

log = logging.getLogger('jaxfm')

# Bytes of text that are encoded at a time; the encoder needs a hundred times as much memory.
CHUNK_BYTES = 1 << 21
# Characters of a huge document that are encoded as one text.
PIECE_CHARACTERS = 1 << 22
# Less input than this is tokenised by threads of this process: others take a second to start.
PARALLEL_BYTES = 64 << 20
# Seconds between two lines of progress in the log.
LOG_SECONDS = 10

Progress = Callable[[int, int], None]  # bytes and tokens that were added


def build(directory: Path, config, tokenizer: Tokenizer, finish: Callable) -> None:
    """Makes the cache `directory` of a source's config, if it is not there yet.

    `finish(directory, statistics)` writes what else belongs into it, before it is published.
    """
    partial = directory.with_name(f'{directory.name}.partial')
    with storage_errors(directory):
        while not directory.exists():
            partial.mkdir(parents=True, exist_ok=True)
            try:
                with _lock(partial / 'lock'):
                    if not directory.exists():
                        _build(directory, partial, config, tokenizer, finish)
            except DataError:
                # The data must change, and with it the recipe: nobody will need these parts.
                shutil.rmtree(partial, ignore_errors=True)
                raise
            except FileNotFoundError:
                # Another process has finished, and removes the partial directory.
                if partial.exists() and not directory.exists():
                    raise


def _build(directory: Path, partial: Path, config, tokenizer: Tokenizer, finish) -> None:
    started = time.perf_counter()
    source = SOURCES[config.name].load()(config)
    shards = source.shards()
    parts = [partial / 'parts' / f'{i:06d}' for i in range(len(shards))]
    parts[0].parent.mkdir(exist_ok=True)
    allowed = getattr(config, 'max_bad_records', math.inf)
    ledger = Ledger(source, shards, parts, allowed)
    missing = [i for i, part in enumerate(parts) if not part.exists()]
    if 0 < len(missing) < len(parts):
        log.info('tokenising: %d of %d parts have to be made', len(missing), len(parts))
    todo = [(i, shards[i], parts[i]) for i in missing]
    workers = _num_workers(todo)
    if workers > 1:
        # Read from disk by all at the same time; to send it would start one after the other.
        saved = partial / f'tokenizer-{uuid.uuid4().hex[:8]}'
        tokenizer.save(saved)
        _in_processes(workers, todo, config, saved, ledger)
    else:
        _in_process(todo, config, tokenizer, ledger)
    ledger.close()
    _join(directory, partial, parts, ledger, tokenizer, finish)
    shutil.rmtree(partial, ignore_errors=True)
    seconds = time.perf_counter() - started
    log.info('tokenised %d documents in %.1f s', ledger.num_documents, seconds)


def _join(directory: Path, partial: Path, parts, ledger, tokenizer: Tokenizer, finish) -> None:
    joined = partial / f'joined-{uuid.uuid4().hex[:8]}'
    try:
        joined.mkdir()
        statistics = token_cache.join(parts, joined, tokenizer.vocab_size)
        statistics |= {'bad_records': ledger.num_bad, 'vocab_size': tokenizer.vocab_size}
        ledger.num_documents = statistics['train_documents'] + statistics['heldout_documents']
        _check_sides(statistics)
        tokenizer.save(joined / 'tokenizer')
        finish(joined, statistics)
        publish(joined, directory)
    finally:
        shutil.rmtree(joined, ignore_errors=True)


def publish(whole: Path, directory: Path) -> None:
    try:
        whole.rename(directory)
    except OSError:
        # Another process has made the same meanwhile; its files are as good as ours.
        if not directory.exists():
            raise


def _check_sides(statistics: dict) -> None:
    total = statistics['train_documents'] + statistics['heldout_documents']
    if not statistics['train_documents']:
        raise DataError(f'config.data: of {total} documents none is left to train on')
    if not statistics['heldout_documents']:
        raise DataError(
            f'config.data: of {total} documents none is held out; raise heldout_fraction, '
            'or name other files in heldout_path'
        )


class Ledger:
    """Which shards are done, and what stops the build: always what comes first in their order."""

    def __init__(self, source, shards: list, parts: list[Path], allowed: float):
        self._source, self._shards, self._parts = source, shards, parts
        self._allowed = allowed  # bad records
        self._results: dict[int, list | Exception] = {}
        self._next = 0  # all shards before this one are done
        self._failed = math.inf  # the first shard that could not be made
        self._bad = []
        self._kinds: dict[bool, str] = {}
        self._done = self._bytes = self._tokens = 0
        self._started = self._logged = time.perf_counter()
        self.num_documents = 0
        for i, part in enumerate(parts):
            if part.exists():
                self._results[i] = json.loads((part / 'part.json').read_text())
        self._advance()

    @property
    def num_bad(self) -> int:
        return len(self._bad)

    def progress(self, num_bytes: int, num_tokens: int) -> None:
        """Counts, and says in the log from time to time how far it is."""
        self._bytes += num_bytes
        self._tokens += num_tokens
        now = time.perf_counter()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            log.info(
                'tokenising: %d of %d parts, %.0f MB of text, %.1fM tokens, %.2fM tokens/s',
                *(len(self._results), len(self._shards), self._bytes / 1e6, self._tokens / 1e6),
                self._tokens / (now - self._started) / 1e6,
            )

    def add(self, index: int, result: dict | Exception) -> None:
        """What became of a shard; raises the error that comes first, once it is known."""
        self._results[index] = result
        if isinstance(result, Exception):
            self._failed = min(self._failed, index)
        self._advance()

    def may_start(self, index: int) -> bool:
        """Whether a shard is still needed: it is not when one before it has failed."""
        return index < self._failed

    def close(self) -> None:
        """Checks that everything is done."""
        if self._next < len(self._shards):
            raise StorageError(f'{self._parts[self._next]} was not made')

    def _advance(self) -> None:
        while self._next in self._results:
            result, shard = self._results[self._next], self._shards[self._next]
            if isinstance(result, Exception) and not isinstance(result, _TooManyInShard):
                raise result
            summary = result.summary if isinstance(result, _TooManyInShard) else result
            self._bad += [self._unpacked(shard, bad) for bad in summary['bad']]
            if len(self._bad) > self._allowed:
                check_bad_records(self._bad, self._allowed)
            self._check_kind(summary)
            self._next += 1

    def _unpacked(self, shard, bad):
        return bad if isinstance(bad, str) else self._source.unpacked(shard, bad)

    def _check_kind(self, summary: dict) -> None:
        for is_chat in (False, True):
            if name := summary['chats' if is_chat else 'texts']:
                self._kinds.setdefault(is_chat, name)
        if len(self._kinds) == 2:
            raise DataError(
                f'{self._kinds[True]} is a chat, {self._kinds[False]} is a text: a source has one '
                'kind; make two of it and mix them'
            )


class _TooManyInShard(Exception):
    """One shard alone has more bad records than may be."""

    def __init__(self, summary: dict):
        super().__init__(summary)
        self.summary = summary


def _in_process(todo, config, tokenizer: Tokenizer, ledger: Ledger) -> None:
    for index, shard, part in todo:
        ledger.add(index, _result(config, shard, tokenizer, part, ledger.progress))


def _in_processes(count: int, todo, config, saved: Path, ledger: Ledger) -> None:
    """Hands shard after shard to processes of their own; a dead one is an error."""
    log.info('tokenising in %d processes', count)
    context = multiprocessing.get_context('spawn')
    todo, busy, processes = list(reversed(todo)), {}, []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, config, saved), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            _hand_out(ours, todo, busy, ledger)
        while busy:
            for pipe in wait(list(busy)):
                if (message := _spoken(pipe.recv))[0] == 'progress':
                    ledger.progress(*message[1:])
                    continue
                ledger.add(busy.pop(pipe), message[1])
                _hand_out(pipe, todo, busy, ledger)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _hand_out(pipe: Connection, todo: list, busy: dict, ledger: Ledger) -> None:
    if todo and ledger.may_start(todo[-1][0]):
        index, shard, part = todo.pop()
        _spoken(pipe.send, (shard, part))
        busy[pipe] = index


def _spoken(speak: Callable, *words):
    """What a worker is told, or tells; StorageError when it is dead."""
    try:
        return speak(*words)
    except (EOFError, ConnectionError) as error:
        raise StorageError(
            'a process that tokenises has died (killed? out of memory?); '
            'the same command goes on where it was'
        ) from error


def _work(pipe: Connection, config, saved: Path) -> None:
    """A worker process: one shard after the other, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # one process a core
    tokenizer = load_tokenizer(saved)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            shard, part = pipe.recv()
            report = functools.partial(_report, pipe)
            pipe.send(('done', _result(config, shard, tokenizer, part, report)))


def _report(pipe: Connection, num_bytes: int, num_tokens: int) -> None:
    pipe.send(('progress', num_bytes, num_tokens))


def _result(config, shard, tokenizer, part: Path, progress: Progress) -> dict | Exception:
    """What became of a shard: the summary of its part, or what went wrong."""
    try:
        return make_part(config, shard, tokenizer, part, progress)
    except ConnectionError:
        raise
    except (RunError, OSError, _TooManyInShard) as error:
        return error
    except Exception:
        # Its own class may not survive the way to another process.
        return RuntimeError(traceback.format_exc())


def make_part(config, shard, tokenizer: Tokenizer, part: Path, progress: Progress) -> dict:
    """Writes the part of one shard; returns its summary."""
    temporary = part.with_name(f'{part.name}.{uuid.uuid4().hex[:8]}')
    temporary.mkdir()
    try:
        summary = _write_part(config, shard, tokenizer, temporary, progress)
        with open(temporary / 'part.json', 'w') as file:
            json.dump(summary, file)
            token_cache.to_disk(file)
        publish(temporary, part)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _write_part(config, shard, tokenizer: Tokenizer, directory: Path, progress: Progress) -> dict:
    source = SOURCES[config.name].load()(config)
    summary = {'texts': '', 'chats': '', 'bad': []}
    has_digest = getattr(shard, 'has_whole_files', False)
    refuse = functools.partial(_refuse, source, shard)
    try:
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(token_cache.Writer(directory, side, tokenizer.vocab_size))
                for side in token_cache.SIDES
            ]
            for chunk in token_cache.chunks(source.read(shard), CHUNK_BYTES):
                num_tokens = 0
                for heldout, document, ids, mask in encode(chunk, tokenizer, refuse):
                    writers[heldout].add(document, ids, mask, has_digest)
                    kind = 'texts' if mask is None else 'chats'
                    summary[kind] = summary[kind] or document.name
                    num_tokens += len(ids)
                progress(sum(document.num_bytes for _, document in chunk), num_tokens)
    except TooManyBadRecords as error:
        raise _TooManyInShard(summary | {'bad': _packed(source)}) from error
    return summary | {'bad': _packed(source)}


def _packed(source) -> list:
    bad = getattr(source, 'bad_records', {}).values()
    return [one if isinstance(one, str) else one.packed() for one in bad]


def _refuse(source, shard, document: Document, error: DataError) -> None:
    if not hasattr(source, 'leave_out'):
        raise DataError(f'{document.name}: {error}') from error
    source.leave_out(shard, document, str(error))


def encode(
    chunk: list[tuple[bool, Document]],
    tokenizer: Tokenizer,
    refuse: Callable[[Document, DataError], None],
) -> Iterator[tuple[bool, Document, np.ndarray, np.ndarray | None]]:
    """(is_heldout, document, ids [n], mask [n] of a chat) of documents, in their order.

    A chat that its template refuses is left out after `refuse(document, error)`.
    """
    texts = [document.text for _, document in chunk if not document.messages]
    pieces = [_pieces(text) for text in texts]
    encoded = iter(tokenizer.encode_batch([piece for parts in pieces for piece in parts]))
    pieces = iter(pieces)
    for heldout, document in chunk:
        if document.messages:
            try:
                ids, mask = _chat(tokenizer).encode(document.messages, document.tools)
            except DataError as error:
                refuse(document, error)
                continue
            yield heldout, document, ids, mask
        else:
            parts = [next(encoded) for _ in next(pieces)]
            yield heldout, document, _with_ends(parts, tokenizer), None


def _with_ends(parts: list[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.concatenate([np.array(bos, np.int32), *parts, np.array([tokenizer.eos_id], np.int32)])


@functools.lru_cache(maxsize=4)
def _chat(tokenizer: Tokenizer) -> Chat:
    return Chat(tokenizer)


def _pieces(text: str) -> list[str]:
    """A huge document in parts of whole lines: the encoder needs 100 bytes a character."""
    pieces, start = [], 0
    while start < len(text):
        stop = start + PIECE_CHARACTERS
        if stop < len(text):
            stop = text.rfind('\n', start, stop) + 1 or stop
        pieces.append(text[start:stop])
        start = stop
    return pieces


def _num_workers(todo: list[tuple[int, Any, Path]]) -> int:
    size = sum(getattr(shard, 'num_bytes', 0) for _, shard, _ in todo)
    if size < PARALLEL_BYTES:
        return 1
    return min(len(os.sched_getaffinity(0)), len(todo))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits for another process that builds the same; where files cannot be locked both build."""
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info('tokenising: another process does it already; waiting')
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.warning('%s cannot be locked; going on without', path)
        yield


@contextlib.contextmanager
def storage_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise PermissionDeniedError(
            f'{directory.parent} cannot be written: permission denied'
        ) from error
    except OSError as error:
        raise StorageError(
            f'the token cache in {directory.parent}: {error.strerror or error}'
        ) from error
