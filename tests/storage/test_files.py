"""Errors of the system and of JSON become one sentence with the right exit code."""

import errno

import pytest

from jaxfm.errors import DataError, MissingInputError, PermissionDeniedError, StorageError
from jaxfm.storage.files import check_object, explain_damage, explain_errors

FULL = OSError(errno.ENOSPC, 'No space left on device')
DENIED = PermissionError(errno.EACCES, 'Permission denied')
ABSENT = FileNotFoundError(errno.ENOENT, 'No such file or directory')


@pytest.mark.parametrize(
    'error, options, kind, message',
    [
        (FULL, {}, StorageError, 'x cannot be written: No space left on device'),
        (DENIED, {}, PermissionDeniedError, 'x cannot be written: Permission denied'),
        (DENIED, {'denied': 'x is closed'}, PermissionDeniedError, 'x is closed'),
        (FULL, {'denied': 'x is closed', 'kind': MissingInputError}, MissingInputError, None),
        (ABSENT, {}, StorageError, 'x cannot be written: No such file or directory'),
        (ABSENT, {'missing': 'x is missing'}, MissingInputError, 'x is missing'),
        (OSError('without a number'), {}, StorageError, 'x cannot be written: without a number'),
    ],
)
def test_a_system_error_gets_a_kind_and_a_sentence(error, options, kind, message):
    with pytest.raises(kind) as raised, explain_errors('x cannot be written', **options):
        raise error
    assert type(raised.value) is kind
    assert str(raised.value) == (message or 'x cannot be written: No space left on device')
    assert raised.value.__cause__ is error


@pytest.mark.parametrize('error', [ZeroDivisionError(), DataError('bad'), ValueError('bad')])
def test_other_errors_are_unchanged(error):
    with pytest.raises(type(error)) as raised, explain_errors('x cannot be written'):
        raise error
    assert raised.value is error


@pytest.mark.parametrize('error', [ValueError('no JSON'), RecursionError('no JSON')])
def test_undecodable_content_is_bad_data(error):
    with pytest.raises(DataError, match='^x is damaged: no JSON$'), explain_damage('x is damaged'):
        raise error


def test_json_that_is_not_an_object_is_rejected():
    assert check_object({'a': 1}, 'x') == {'a': 1}
    with pytest.raises(DataError, match='^x: want a JSON object, got a list$'):
        check_object([], 'x')
