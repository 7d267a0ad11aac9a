"""What the processes of a run tell each other: barriers, values, one decision for all."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src.distributed import global_state  # the only way to a barrier without devices

from jaxfm import errors
from jaxfm.errors import UnavailableError

# JAX aborts the whole process at its own time-out; ours must always come first.
NEVER = 7 * 24 * 3600  # seconds
_decisions = itertools.count()  # that the processes have taken together


def is_primary() -> bool:
    """Whether this is the one process that writes what must be written once."""
    return jax.process_index() == 0


def barrier(name: str, timeout_seconds: float = NEVER) -> None:
    """Waits until all processes have come to the barrier of this name, which is used once.

    On the network of the coordinator: a barrier of the devices gives up after 30 s on CPU, and one
    process may have hours of work to do before it.
    """
    client = global_state.client
    if client is not None:
        client.wait_at_barrier(f'jaxfm/{name}', int(timeout_seconds * 1000))


def exchange(name: str, value: str) -> dict[int, str]:
    """Publishes a value under a name, which is used once -> {process: its value}.

    The primary process gets the values of all, the others their own and the primary's. So any
    mismatch is visible to both processes involved.
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


def publish(name: str, value: str) -> None:
    """Tells the other processes a value under a name, which is used once. Any thread may."""
    if global_state.client is not None:
        global_state.client.key_value_set(f'jaxfm/{name}', value)


def wait_for(name: str, timeout_seconds: float = NEVER) -> str:
    """What some process publishes under a name. Raises UnavailableError when nobody does."""
    try:
        return global_state.client.blocking_key_value_get(
            f'jaxfm/{name}', max(int(timeout_seconds * 1000), 1)
        )
    except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
            raise
        raise UnavailableError(
            f'no process said {name} within {timeout_seconds:.0f} s; they may have died'
        ) from error


def from_primary(compute: Callable[[], Any], name: str = '', timeout_seconds: float = NEVER) -> Any:
    """What `compute` gives on the primary process, alone, or its RunError: the same on all.

    The value is JSON. A name is used once; calls without one meet in the order in which each
    process makes them, which must be that of a single thread.

    Raises:
      UnavailableError: the primary process does not say anything.
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
    """The name of the nearest kind of error that every process knows."""
    return next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))


def first_error(
    error: errors.RunError | None, name: str = '', timeout_seconds: float = NEVER
) -> None:
    """Raises, on all processes, the RunError that the first of them has met, if one has.

    As `from_primary` for the rest.
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
    """Those of the values that every process has, in the order of the primary one."""
    if global_state.client is None:
        return values
    return _from_all(values, lambda all_: [v for v in all_[0] if all(v in one for one in all_)])


def _from_all(mine: Any, combine: Callable, name: str = '', timeout_seconds=NEVER) -> Any:
    """What `combine` makes, on the primary process, of what every process brings: on all."""
    name = name or f'decision/{next(_decisions)}'
    publish(f'{name}/{jax.process_index()}', json.dumps(mine))

    def gather():
        names = [f'{name}/{index}' for index in range(jax.process_count())]
        return combine([json.loads(wait_for(one, timeout_seconds)) for one in names])

    return from_primary(gather, f'{name}/all', timeout_seconds + 10)
