"""Which config values a resumed run may change, and which ones have changed.

There are three kinds of values. Those in FREE_ON_RESUME affect where a run works and what it
reports, not what it learns: they may change. The model may not change, because the saved weights
belong to the old one. Everything else changes what is learned, including `steps`, which the
schedule depends on; such a change must be allowed by name.
"""

from collections.abc import Iterable

from jaxfm.code import is_path
from jaxfm.config.validation import format_path, format_value, suggest
from jaxfm.errors import ConfigError, UsageError
from jaxfm.schema import Group

FREE_ON_RESUME = (
    'mesh',
    'evals',
    'sampling',
    'metrics',
    'export',
    'checkpoint.every',
    'checkpoint.keep',
    'checkpoint.timeout_seconds',
    'checkpoint.max_failures',
    'checkpoint.lease_seconds',
    'checkpoint.local',
    'checkpoint.include_frozen',
    'model.remat',  # recomputation: memory and time only
    'model.implementations',  # the same results up to rounding
    'model.batch_invariant',
)
FIXED = 'model'
ABSENT = '(absent)'

# (path, old value, new value)
Change = tuple[str, object, object]


def find_changes(old: Group, new: Group) -> list[Change]:
    """Every value that differs; ABSENT marks a key that one of the two configs lacks."""
    old, new = _list_leaves(old.model_dump(), ()), _list_leaves(new.model_dump(), ())
    paths = [path for path in {**old, **new} if path != ('code',)]  # an empty `code` group
    pairs = [(path, old.get(path, ABSENT), new.get(path, ABSENT)) for path in paths]
    return [(format_path(path), before, after) for path, before, after in pairs if before != after]


def check_resume(
    old: Group,
    new: Group,
    allow: Iterable[str] = (),
    place: str = 'this work directory',
    elsewhere: str = '--workdir',
) -> list[Change]:
    """Checks that a run of config `old` may resume with config `new`; returns the differences.

    Args:
        allow: top-level names of the config that may change (`--allow_change=optimizer,data`).
        place: where the run of `old` is stored, for the message.
        elsewhere: the flag that selects another place for a new run, for the message.

    Raises:
        UsageError: `allow` contains `model`, or a name that is not in the config.
        ConfigError: values differ that may not; the message lists them and says what to do.
    """
    allow = set(allow)
    for name in sorted(allow):
        _check_allowable(name, type(new))
    changes = find_changes(old, new)
    code = _find_bound_code(old) | _find_bound_code(new)
    bound = [change for change in changes if not _is_free(change[0], code)]
    refused = [change for change in bound if _find_group(change[0]) not in allow]
    if not refused:
        return changes
    lines = [f'  config.{path}: {format_value(a)} -> {format_value(b)}' for path, a, b in refused]
    raise ConfigError(
        '\n'.join([f'{place} holds a run with another config:', *lines, _advise(bound, elsewhere)])
    )


def _advise(changes: list[Change], elsewhere: str) -> str:
    groups = sorted({_find_group(path) for path, *_ in changes})
    if FIXED in groups:
        return f'the {FIXED} of a run cannot change; to start a new run give another {elsewhere}'
    return (
        f'to resume with these changes give --allow_change={",".join(groups)}; '
        f'to start a new run give another {elsewhere}'
    )


def _check_allowable(name: str, schema: type[Group]) -> None:
    if name == FIXED:
        raise UsageError(f'--allow_change={name}: the {name} of a run cannot change')
    names = [field for field in schema.model_fields if field != FIXED]
    if name not in names:
        raise UsageError(f'--allow_change={name}: no such group{suggest(name, names)}')


def _find_group(path: str) -> str:
    return path.partition('.')[0].partition('[')[0]


def _find_bound_code(config: Group) -> set[str]:
    """The `module:Class` names in the keys that a resumed run may not change."""
    leaves = _list_leaves(config.model_dump(), ()).items()
    named = {path: value for path, value in leaves if path[-1] == 'name' and is_path(value)}
    return {value for path, value in named.items() if not _is_free(format_path(path))}


def _is_free(path: str, bound_code: Iterable[str] = ()) -> bool:
    # A module may have moved. Its contents may change only if a key in FREE_ON_RESUME names it.
    if path.startswith('code.'):
        name, _, key = path.removeprefix('code.').rpartition('.')
        return key == 'path' or name not in bound_code
    return any(path == free or path.startswith(free + '.') for free in FREE_ON_RESUME)


def _list_leaves(value, path) -> dict:
    if isinstance(value, dict) and value:
        children = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        children = enumerate(value)
    else:
        return {path: value}
    leaves = {}
    for key, child in children:
        leaves |= _list_leaves(child, (*path, key))
    return leaves
