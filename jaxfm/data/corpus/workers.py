"""Makes the parts of a build, in several processes unless the input is small.

Which records are left out, and which error stops a build, does not depend on the number of
processes.
"""

import contextlib
import functools
import logging
import multiprocessing
import os
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from jaxfm.data.corpus.ledger import Ledger
from jaxfm.data.corpus.parts import Progress, TooManyInShard, make_part
from jaxfm.errors import RunError, StorageError
from jaxfm.process import interrupts_blocked, num_cores
from jaxfm.tokenizer.build import Tokenizer, load_tokenizer

log = logging.getLogger('jaxfm')

# Less input than this is tokenised by threads of this process, since others take a second to start.
PARALLEL_BYTES = 64 << 20


def make_parts(todo, config, tokenizer: Tokenizer, partial: Path, ledger: Ledger) -> None:
    """Makes the parts in `todo`, a list of (index, shard, directory); reports each to `ledger`."""
    workers = _num_workers(todo)
    if workers > 1:
        # All workers read it from disk at the same time; sending it would start them one by one.
        saved = partial / f'tokenizer-{uuid.uuid4().hex[:8]}'
        tokenizer.save(saved)
        _work_in_processes(workers, todo, config, saved, ledger)
    else:
        _work_here(todo, config, tokenizer, ledger)


def _work_here(todo, config, tokenizer: Tokenizer, ledger: Ledger) -> None:
    for index, shard, part in todo:
        ledger.add(index, _try_part(config, shard, tokenizer, part, ledger.progress))


def _work_in_processes(count: int, todo, config, saved: Path, ledger: Ledger) -> None:
    """Hands out shards to worker processes. Raises StorageError if one of them dies."""
    log.info('tokenising in %d processes', count)
    context = multiprocessing.get_context('spawn')
    todo, busy, processes = list(reversed(todo)), {}, []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, config, saved), daemon=True)
            with interrupts_blocked():
                process.start()
            theirs.close()
            processes.append(process)
            _hand_out(ours, todo, busy, ledger)
        while busy:
            for pipe in wait(list(busy)):
                if (message := _speak(pipe.recv))[0] == 'progress':
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
        _speak(pipe.send, (shard, part))
        busy[pipe] = index


def _speak(speak: Callable, *words):
    """Sends to a worker, or receives from it. Raises StorageError if it is dead."""
    try:
        return speak(*words)
    except (EOFError, ConnectionError) as error:
        raise StorageError(
            'a tokenising process died (killed, or out of memory?); '
            'run the same command again to resume'
        ) from error


def _work(pipe: Connection, config, saved: Path) -> None:
    """A worker process: makes one part after another until the pipe is closed."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # there is one process per core
    tokenizer = load_tokenizer(saved)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            shard, part = pipe.recv()
            report = functools.partial(_report, pipe)
            pipe.send(('done', _try_part(config, shard, tokenizer, part, report)))


def _report(pipe: Connection, num_bytes: int, num_tokens: int) -> None:
    pipe.send(('progress', num_bytes, num_tokens))


def _try_part(config, shard, tokenizer, part: Path, progress: Progress) -> dict | Exception:
    """Makes the part of a shard; returns its summary, or the error."""
    try:
        return make_part(config, shard, tokenizer, part, progress)
    except ConnectionError:
        raise
    except (RunError, OSError, TooManyInShard) as error:
        return error
    except Exception:
        # The error's own class may not survive pickling.
        return RuntimeError(traceback.format_exc())


def _num_workers(todo: list[tuple[int, Any, Path]]) -> int:
    size = sum(getattr(shard, 'num_bytes', 0) for _, shard, _ in todo)
    if size < PARALLEL_BYTES:
        return 1
    return min(num_cores(), len(todo))
