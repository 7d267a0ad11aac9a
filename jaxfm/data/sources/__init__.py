"""Sources: where documents come from, and which of them are held out; one module a kind.

A source is built from its config group and has

- `files()`: MissingInputError when the inputs are not there; contents are not read;
- `fingerprint()`: changes when the inputs change, or what is read from them;
- `shards()`: pieces of work in a fixed order, each small enough to be one step of progress;
- `read(shard)`: (is_heldout, document) one after the other, always the same;
- `bad_records`, where a source may leave out records: what `read` has left out so far.

Which side a document is on depends on its own content or path, never on order or on others.
"""

import hashlib


def is_heldout(key: str | bytes, fraction: float) -> bool:
    """Whether the document that `key` identifies is held out."""
    return place_of(key) < fraction


def place_of(key: str | bytes) -> float:
    """Where in [0, 1) a hash puts a document; the lowest are held out."""
    key = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) / 2**64
