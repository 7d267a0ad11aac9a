"""A sealed file returns its fields, or detects that it was changed."""

import json

import pytest

from jaxfm.storage.seal import seal, unseal

FIELDS = {'step': 7, 'inherited': ('7/a', '8/b'), 'holder': {'pid': 1}, 'seconds': 0.1, 'name': 'ü'}


def test_the_fields_come_back():
    assert unseal(seal(FIELDS)) == FIELDS | {'inherited': ['7/a', '8/b']}


def test_any_truncation_is_detected():
    content = seal(FIELDS)
    for size in range(len(content)):
        with pytest.raises(ValueError):
            unseal(content[:size])


@pytest.mark.parametrize('content', [b'', b'[]', b'{}', b'null', b'"sha256"', b'\xff', b'{"a": 1}'])
def test_content_that_was_never_sealed_is_rejected(content):
    with pytest.raises(ValueError):
        unseal(content)


def test_a_changed_added_or_removed_field_is_detected():
    sealed = json.loads(seal(FIELDS))
    for changed in (
        sealed | {'step': 8},
        sealed | {'another': 1},
        {name: value for name, value in sealed.items() if name != 'seconds'},
        {name: value for name, value in sealed.items() if name != 'sha256'},
    ):
        with pytest.raises(ValueError):
            unseal(json.dumps(changed).encode())
