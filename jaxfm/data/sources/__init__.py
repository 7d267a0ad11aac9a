"""Sources: where documents come from, and which of them are held out; one module per kind.

A source is built from its config group and has

- `files()`: raises MissingInputError if the inputs are missing; does not read their contents;
- `fingerprint()`: changes when the inputs change, or what is read from them;
- `contents()`, if the names and sizes of `files()` do not show it: changes as far as possible with
  the documents alone, so hosts that have the same ones agree, wherever theirs are;
- `shards()`: pieces of work in a fixed order, each small enough to be one step of progress;
- `read(shard)`: yields (is_heldout, document), always the same ones in the same order;
- `bad_records`, if the source may leave out records: those that `read` has left out so far.

Which side a document is on depends on its own content or path, not on order or on other documents
(for the exceptions see `FilesConfig.heldout_fraction`).
"""

import hashlib
import logging
import math
from collections.abc import Sequence

log = logging.getLogger('jaxfm')


def is_heldout(key: str | bytes, fraction: float) -> bool:
    """Whether the document identified by `key` is held out."""
    return place_of(key) < fraction


def place_of(key: str | bytes) -> float:
    """The hash of a document's key, as a number in [0, 1); the lowest are held out."""
    key = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) / 2**64


def raise_fraction(fraction: float, places: Sequence[float]) -> float:
    """The fraction to hold out of few documents: raised so far that it picks one of them."""
    if len(places) < 2 or min(places) < fraction:
        return fraction
    log.info('held-out: a fraction of %.3g picks no record, so one is held out', fraction)
    return math.nextafter(min(places), 1)
