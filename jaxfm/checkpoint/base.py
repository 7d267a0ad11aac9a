"""The frozen weights that adapters belong to: a checkpoint names them instead of holding them.

The manifest has their origin and their fingerprints. A restore loads them from there again, and
refuses others.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxfm.checkpoint.fingerprint import fingerprints
from jaxfm.errors import DataError, MissingInputError, RunError, listed

Arrays = dict[str, jax.Array]
# manifest -> {path: array} of the weights that its step left out
LoadBase = Callable[[dict[str, Any]], Arrays]


@dataclasses.dataclass
class Base:
    """What a run leaves out of its checkpoints: arrays of the state, and where they come from.

    names: of the arrays; empty if the checkpoints hold everything.
    origin: JSON for manifests, known once the weights have been loaded. It has at least
      `init_from`, a run's work directory or another model, and `step`, of the run or None.
    """

    names: frozenset[str]
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)


def arrays_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """{name: description} of the arrays that a step left out; {} for most steps."""
    return manifest.get('base', {}).get('arrays', {})


def restore_base(
    manifest: dict[str, Any], names: list[str], load: LoadBase | None, where: str
) -> Arrays:
    """Loads those of the arrays `names` that the step left out, and compares their fingerprints.

    where: names the checkpoint, in messages.

    Raises:
      DataError: the origin has other weights now.
      RunError: of the kind that `load` raises; the message adds what is missing.
    """
    described = arrays_of(manifest)
    names = [name for name in names if name in described]
    if not names:
        return {}
    only = f'{where} holds only adapters, not the weights of {_name(manifest["base"]["origin"])}'
    if load is None:
        raise MissingInputError(only)
    try:
        params = load(manifest)
    except RunError as error:
        moved = '; if they have moved, name the new place with --config.init_from=PLACE and '
        moved += '--allow_change=init_from,tokenizer'
        is_gone = isinstance(error, MissingInputError)
        raise type(error)(f'{only}: {error}{moved if is_gone else ""}') from error
    arrays = {name: params[name.partition('/')[2]] for name in names}
    prints = fingerprints(arrays)
    differ = [name for name in names if prints[name] != described[name]['fingerprint']]
    if differ:
        raise DataError(f'{only}; these are others now: {listed(differ)}; put back what was there')
    return arrays


def _name(origin: dict[str, Any]) -> str:
    at = '' if origin['step'] is None else f' at step {origin["step"]}'
    return f'{origin["init_from"]}{at} that they belong to'
