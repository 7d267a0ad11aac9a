"""Checks that the state a run wants matches the state a checkpoint holds.

Names, shapes and dtypes are compared with the manifest before any array is read, because the same
bits read as another dtype or shape would be different weights.
"""

import difflib
from collections.abc import Iterable

import jax

from jaxfm.errors import ConfigError

_SHOWN = 6


def check_fit(wanted, stored, where: str, partial: bool = False) -> None:
    """Raises ConfigError, naming the leaves that differ; leaves have a shape and a dtype.

    partial: allow leaves that only the checkpoint has.
    """
    wanted, stored = _leaves(wanted), _leaves(stored)
    problems = list(_problems(wanted, stored, partial))
    if problems:
        more = len(problems) - _SHOWN
        lines = problems[:_SHOWN] + ([f'and {more} more'] if more > 0 else [])
        raise ConfigError(f'{where} does not fit this run:\n  ' + '\n  '.join(lines))


def _problems(wanted: dict, stored: dict, partial: bool) -> Iterable[str]:
    for name in sorted(wanted.keys() & stored.keys()):
        if _describe(wanted[name]) != _describe(stored[name]):
            yield (
                f'{name}: {_describe(stored[name])} in the checkpoint, '
                f'{_describe(wanted[name])} in the run'
            )
    unused = sorted(stored.keys() - wanted.keys())
    for name in sorted(wanted.keys() - stored.keys()):
        near = difflib.get_close_matches(name, unused, n=1)
        yield f'{name}: not in the checkpoint' + (f' (nearest: {near[0]})' if near else '')
    if not partial:
        for name in unused:
            yield f'{name}: only in the checkpoint'


def _describe(leaf) -> str:
    return f'{jax.numpy.dtype(leaf.dtype).name} [{", ".join(map(str, leaf.shape))}]'


def _leaves(tree) -> dict:
    """{dotted name: leaf}. A named tuple and a dict with the same names are equal here, because a
    checkpoint's metadata does not distinguish them.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {'.'.join(map(_part, path)): leaf for path, leaf in flat}


def _part(key) -> str:
    return jax.tree_util.keystr((key,), simple=True)
