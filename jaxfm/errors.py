"""What can stop a run, the exit code each reason has, and words for its messages.

Any room may raise these; `main` alone turns them into one line on stderr and an exit status.
The numbers follow sysexits.h where it has a fitting one.
"""


class RunError(Exception):
    """A reason to stop that a person must read: it says what was given and what would be right."""

    exit_code = 1


class UsageError(RunError):
    """The command line cannot be understood."""

    exit_code = 64


class DataError(RunError):
    """An input was found but is bad: not UTF-8, empty, of another vocabulary, damaged."""

    exit_code = 65


class DamagedError(DataError):
    """A checkpoint that was committed and is not what was saved."""


class MissingInputError(RunError):
    """An input (a config file included) is not there."""

    exit_code = 66


class UnavailableError(RunError):
    """A host or the network does not answer."""

    exit_code = 69


class NumericsError(RunError):
    """The numbers gave up (NaN that stays), or the device is out of memory."""

    exit_code = 70


class LockedError(RunError):
    """Somebody else is writing this run."""

    exit_code = 73


class StorageError(RunError):
    """The run cannot be stored: no room at start, or saves that keep failing."""

    exit_code = 74


class Preempted(RunError):
    """A signal asked the run to stop; it is saved and the same command resumes it."""

    exit_code = 75


class PermissionDeniedError(RunError):
    """The run may not read or write what it names."""

    exit_code = 77


class ConfigError(RunError):
    """The config, or a change of it on resume, cannot be run."""

    exit_code = 78


def listed(names: list[str], most: int = 6) -> str:
    """Names for a message; of many, the first and how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more


def human_bytes(count: float, base: int = 1024, digits: int = 4, unit: str = '') -> str:
    """1536 -> '1.5 KiB'; base 1000: '1.54 kB'. `unit`: in this one, however many that are."""
    units = {1024: ('B', 'KiB', 'MiB', 'GiB', 'TiB'), 1000: ('B', 'kB', 'MB', 'GB', 'TB')}[base]
    fitting = (power for power in range(len(units) - 1) if count < base ** (power + 1))
    power = units.index(unit) if unit else next(fitting, len(units) - 1)
    return f'{count / base**power:.{digits}g} {units[power]}'
