"""Reads checkpoints that other JAX projects saved with stock Orbax, v0 or v1, on disk or S3.

`directory.py` finds the saved tree, `tensors.py` reads parts of its arrays, `table.py` maps them to
our parameters, and `load.py` puts them on the devices. This file parses the entries of the table in
`config.init_names`. Orbax itself is not used: it does not read s3://, and it restores an array only
whole and in its stored shape, whereas a table may stack layers and reorder axes.
"""

import dataclasses
import re
from typing import Annotated

import pydantic

LAYER = '{layer}'
_ENTRY = re.compile(r'(?P<name>[^\[\]\s]+)\s*(\[(?P<axes>[^\[\]]*)\])?')


@dataclasses.dataclass(frozen=True)
class Entry:
    """The value of an entry of the table.

    name: of the stored array; may contain {layer}, the number of a layer, counted from 0.
    axes: our logical axes in the order in which they are stored; () means our order.
    """

    name: str
    axes: tuple[str, ...] = ()


def parse_entry(text: str) -> Entry:
    """'decoder/layers_{layer}/kernel [heads, head_dim, embed]' -> Entry. Raises ValueError."""
    match = _ENTRY.fullmatch(text.strip())
    if not match or set(match['name'].replace(LAYER, '')) & {'{', '}'}:
        raise ValueError(
            f"want 'their/name' or 'their/name [axis, axis]', with {LAYER} for the number of a "
            f'layer, got {text!r}'
        )
    axes = tuple(axis.strip() for axis in match['axes'].split(',')) if match['axes'] else ()
    if len(set(axes)) < len(axes) or '' in axes:
        raise ValueError(f'want axes [axis, axis], each of them once, got {text!r}')
    return Entry(match['name'], axes)


def _check_entry(text: str) -> str:
    parse_entry(text)
    return text


StoredName = Annotated[str, pydantic.AfterValidator(_check_entry)]
