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


@dataclasses.dataclass(frozen=True)
class Base:
    """What a run leaves out of its checkpoints: arrays of the state, and where they come from."""

    origin: str  # what `init_from` names
    names: frozenset[str]


def arrays_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """{name: description} of the arrays that a step left out; {} for most steps."""
    return manifest.get('base', {}).get('arrays', {})


def restore_base(
    manifest: dict[str, Any], names: list[str], load: Callable[[], Arrays] | None, where: str
) -> Arrays:
    """Loads those of the arrays `names` that the step left out, and compares their fingerprints.

    load: gives {path: array} of the origin's parameters. where: names the checkpoint, in messages.

    Raises:
      DataError: the origin has other weights now.
      RunError: of the kind that `load` raises; the message adds what is missing.
    """
    described = arrays_of(manifest)
    names = [name for name in names if name in described]
    if not names:
        return {}
    origin = manifest['base']['origin']
    only = f'{where} holds only adapters, not the weights of {origin} that they belong to'
    if load is None:
        raise MissingInputError(only)
    try:
        params = load()
    except RunError as error:
        raise type(error)(f'{only}: {error}') from error
    arrays = {name: params[name.partition('/')[2]] for name in names}
    prints = fingerprints(arrays)
    differ = [name for name in names if prints[name] != described[name]['fingerprint']]
    if differ:
        raise DataError(
            f'{only}; these have changed since: {listed(differ)}; put back what was there '
            '(--config.checkpoint.include_frozen=True makes a new run independent of its origin)'
        )
    return arrays
