"""Exit codes, and words for messages."""

import os

import pytest

from jaxfm import errors
from jaxfm.errors import human_bytes


@pytest.mark.parametrize(
    'kind, code',
    [
        (errors.UsageError, os.EX_USAGE),
        (errors.DataError, os.EX_DATAERR),
        (errors.DamagedError, os.EX_DATAERR),
        (errors.MissingInputError, os.EX_NOINPUT),
        (errors.UnavailableError, os.EX_UNAVAILABLE),
        (errors.NumericsError, os.EX_SOFTWARE),
        (errors.LockedError, os.EX_CANTCREAT),
        (errors.StorageError, os.EX_IOERR),
        (errors.Preempted, os.EX_TEMPFAIL),
        (errors.PermissionDeniedError, os.EX_NOPERM),
        (errors.ConfigError, os.EX_CONFIG),
    ],
)
def test_exit_codes_are_those_of_sysexits(kind, code):
    """Schedulers and scripts decide by them whether to start a run again."""
    assert kind.exit_code == code


@pytest.mark.parametrize(
    'count, text',
    [(0, '0 B'), (1023, '1023 B'), (1536, '1.5 KiB'), (2**40, '1 TiB'), (3 * 2**50, '3072 TiB')],
)
def test_bytes_read_like_a_person_writes_them(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    'count, text',
    [
        (999, '999 B'),
        (1000, '1 kB'),
        (1_234_567, '1.23 MB'),
        (10**12, '1 TB'),
        (10**16, '1e+04 TB'),
    ],
)
def test_bytes_in_powers_of_a_thousand(count, text):
    assert human_bytes(count, 1000, 3) == text


def test_bytes_of_one_unit_stay_in_it():
    assert human_bytes(3 << 40, digits=3, unit='GiB') == '3.07e+03 GiB'
    assert human_bytes(1 << 20, digits=3, unit='GiB') == '0.000977 GiB'
    assert human_bytes(1_234_567, 1000, 3, 'GB') == '0.00123 GB'
