"""Small JSON files that tell by themselves when they have been damaged.

No other file vouches for a commit and a lease, and they decide which checkpoints count: one flipped
digit of an epoch would hide a good checkpoint, and the next sweep would delete it.
"""

import hashlib
import json
from typing import Any


def seal(fields: dict[str, Any]) -> bytes:
    """The content of a file with these fields and their digest."""
    return json.dumps(fields | {'sha256': _digest(fields)}).encode()


def unseal(content: bytes) -> dict[str, Any]:
    """The fields of a file. Raises ValueError unless they are the ones that were sealed."""
    fields = json.loads(content)
    if not isinstance(fields, dict):
        raise ValueError('no fields')
    digest = fields.pop('sha256', None)
    if digest != _digest(fields):
        raise ValueError('digest mismatch')
    return fields


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()
