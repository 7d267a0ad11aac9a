"""The errors that can stop a run, their exit codes, and helpers to format their messages.

Any module may raise these; only `main` turns them into one line on stderr and an exit status.
Exit codes follow sysexits.h where it has a matching one.
"""


class RunError(Exception):
    """A reason to stop that the user must read. The message says what was wrong and what to do."""

    exit_code = 1


class UsageError(RunError):
    """The command line is invalid."""

    exit_code = 64


class DataError(RunError):
    """An input exists but is bad: not UTF-8, empty, damaged, or with the wrong vocabulary."""

    exit_code = 65


class DamagedError(DataError):
    """A committed checkpoint no longer has the contents that were saved."""


class MissingInputError(RunError):
    """An input, such as the config file, does not exist."""

    exit_code = 66


class UnavailableError(RunError):
    """A host or the network does not respond."""

    exit_code = 69


class NumericsError(RunError):
    """The loss or gradient stays NaN or infinite, or the device is out of memory."""

    exit_code = 70


class LockedError(RunError):
    """Another process is writing to this run."""

    exit_code = 73


class StorageError(RunError):
    """The run cannot be saved: no space at the start, or saves that keep failing."""

    exit_code = 74


class Preempted(RunError):
    """A signal stopped the run, which can be resumed by the same command."""

    exit_code = 75


class PermissionDeniedError(RunError):
    """The run lacks permission to read or write a file that it names."""

    exit_code = 77


class ConfigError(RunError):
    """The config is invalid, or changes something that a resumed run may not change."""

    exit_code = 78


def listed(names: list[str], most: int = 6) -> str:
    """Joins names for a message: the first `most`, then how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more


def human_bytes(count: float, base: int = 1024, digits: int = 4, unit: str = '') -> str:
    """1536 -> '1.5 KiB', with base 1000 '1.536 kB'. `unit` forces a unit such as 'GB'."""
    units = {1024: ('B', 'KiB', 'MiB', 'GiB', 'TiB'), 1000: ('B', 'kB', 'MB', 'GB', 'TB')}[base]
    fitting = (power for power in range(len(units) - 1) if count < base ** (power + 1))
    power = units.index(unit) if unit else next(fitting, len(units) - 1)
    return f'{count / base**power:.{digits}g} {units[power]}'
