"""Small JSON files that contain their own digest, so that damage is detected.

Commits and leases are sealed, because no other file holds their digest, and they decide which
checkpoints count: one flipped digit in an epoch would hide a good checkpoint, and the next sweep
would delete it.
"""

import hashlib
import json
from typing import Any


def seal(fields: dict[str, Any]) -> bytes:
    """The content of a JSON file with these fields and their SHA-256."""
    return json.dumps(fields | {'sha256': _digest(fields)}).encode()


def unseal(content: bytes) -> dict[str, Any]:
    """The fields of a sealed file. Raises ValueError if the file is damaged."""
    fields = json.loads(content)
    if not isinstance(fields, dict):
        raise ValueError('not a JSON object')
    digest = fields.pop('sha256', None)
    if digest != _digest(fields):
        raise ValueError('digest mismatch')
    return fields


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()
