"""Coordination between the processes of a run: barriers, shared values, common decisions."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src.distributed import global_state  # the only access to barriers without devices

from jaxfm import errors
from jaxfm.errors import UnavailableError

# At its own time-out JAX aborts the whole process, so our time-outs must always be shorter.
NEVER = 7 * 24 * 3600  # seconds
_decisions = itertools.count()  # numbers the unnamed calls, in the same order on every process


def is_primary() -> bool:
    """Whether this is the process that writes what must be written only once."""
    return jax.process_index() == 0


def barrier(name: str, timeout_seconds: float = NEVER) -> None:
    """Waits until all processes have reached the barrier of this name; a name is used only once.

    It uses the coordinator's network: a barrier of the devices times out after 30 s on CPU, but a
    process may have hours of work before it gets here.
    """
    client = global_state.client
    if client is not None:
        client.wait_at_barrier(f'jaxfm/{name}', int(timeout_seconds * 1000))


def exchange(name: str, value: str) -> dict[int, str]:
    """Publishes a value under a name -> {process: its value}. A name is used only once.

    The primary process gets all values; every other process gets the primary's and its own. So if a
    value differs from the primary's, both processes see it.
    """
    client = global_state.client
    if client is None:
        return {0: value}
    client.key_value_set(f'jaxfm/{name}/{jax.process_index()}', value)
    wanted = range(jax.process_count()) if is_primary() else (0, jax.process_index())
    return {
        index: client.blocking_key_value_get(f'jaxfm/{name}/{index}', NEVER * 1000)
        for index in wanted
    }


def find_difference(name: str, value: str) -> tuple[int, str, str] | None:
    """A process whose value differs from the primary's: (its index, the primary's, its own).

    None if this process sees none: the primary sees all values, another only its own. A name is
    used only once.
    """
    every = exchange(name, value)
    return next(((i, every[0], other) for i, other in every.items() if other != every[0]), None)


def publish(name: str, value: str) -> None:
    """Publishes a value to the other processes, from any thread. A name is used only once."""
    if global_state.client is not None:
        global_state.client.key_value_set(f'jaxfm/{name}', value)


def wait_for(name: str, timeout_seconds: float = NEVER) -> str:
    """Waits for a value that any process publishes. Raises UnavailableError at the time-out."""
    try:
        return global_state.client.blocking_key_value_get(
            f'jaxfm/{name}', max(int(timeout_seconds * 1000), 1)
        )
    except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
            raise
        raise UnavailableError(
            f'no process of this run published {name} within {timeout_seconds:.0f} s; '
            'one of them may have died'
        ) from error


def from_primary(compute: Callable[[], Any], name: str = '', timeout_seconds: float = NEVER) -> Any:
    """Runs `compute` on the primary process only -> its value, or its RunError, on all processes.

    The value must be JSON. A name is used only once. Calls without a name are matched by their
    order, so each process must make them from a single thread.

    Raises:
      UnavailableError: the primary process did not answer in time.
    """
    if global_state.client is None:
        return compute()
    name = name or f'decision/{next(_decisions)}'
    if not is_primary():
        answer = json.loads(wait_for(name, timeout_seconds))
        if 'error' in answer:
            raise getattr(errors, answer['error'])(answer['message'])
        return answer['value']
    try:
        value = compute()
    except errors.RunError as error:
        publish(name, json.dumps({'error': _name_kind(error), 'message': str(error)}))
        raise
    publish(name, json.dumps({'value': value}))
    return value


def _name_kind(error: errors.RunError) -> str:
    """The name of the nearest base class that is in `jaxfm.errors`, so every process knows it."""
    return next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))


def first_error(
    error: errors.RunError | None, name: str = '', timeout_seconds: float = NEVER
) -> None:
    """Raises on all processes the error of the first process that passes one, if any does.

    name and timeout_seconds are those of `from_primary`.
    """
    if global_state.client is None:
        if error is not None:
            raise error
        return

    def look(met: list):
        for kind, message in filter(None, met):
            raise getattr(errors, kind)(message)

    _from_all(error and [_name_kind(error), str(error)], look, name, timeout_seconds)


def common(values: list[str]) -> list[str]:
    """The values that every process has, in the primary process's order."""
    if global_state.client is None:
        return values
    return _from_all(values, lambda all_: [v for v in all_[0] if all(v in one for one in all_)])


def sums(values: list[int], name: str = '', timeout_seconds: float = NEVER) -> list[int]:
    """The sums of every process's values, on all processes.

    name and timeout_seconds are those of `from_primary`.
    """
    if global_state.client is None:
        return values
    return _from_all(
        values, lambda all_: [sum(each) for each in zip(*all_, strict=True)], name, timeout_seconds
    )


def _from_all(mine: Any, combine: Callable, name: str = '', timeout_seconds=NEVER) -> Any:
    """Gathers every process's value, combines them on the primary -> the result, on all."""
    name = name or f'decision/{next(_decisions)}'
    publish(f'{name}/{jax.process_index()}', json.dumps(mine))

    def gather():
        names = [f'{name}/{index}' for index in range(jax.process_count())]
        return combine([json.loads(wait_for(one, timeout_seconds)) for one in names])

    return from_primary(gather, f'{name}/all', timeout_seconds + 10)
