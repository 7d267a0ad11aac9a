"""Command-line overrides (`--config.a.b[0].c=value`): parsing them and applying them.

The schema decides how a value is parsed: a text key takes the text as it is, any other key takes a
Python literal. If the config file leaves a group at its default, the default is filled in first, so
that an override can change a single key of it.
"""

import ast
import contextlib
import dataclasses
import math
import re
import types
import typing

import pydantic
import pydantic_core

from jaxfm.config.validation import format_path, format_value, is_group, list_names, select_kinds
from jaxfm.errors import ConfigError
from jaxfm.registry import OneOf
from jaxfm.schema import Group, KeyPath, Problem

_PART = re.compile(r"""\.([A-Za-z_][\w-]*) | \[(\d+)\] | \[(['"])(.+?)\3\]""", re.VERBOSE)
_WORDS = {'true': True, 'false': False, 'none': None, 'null': None}


@dataclasses.dataclass(frozen=True)
class Override:
    """One value for one key; `given` is the override as the user typed it."""

    path: KeyPath
    text: str
    given: str


def parse_override(given: str) -> Override:
    """'a.b[0].c=3' -> path and text.

    Raises:
        ConfigError: the path is malformed.
    """
    place, _, text = given.partition('=')
    path, position, rest = [], 0, '.' + place
    while match := _PART.match(rest, position):
        name, index, _, key = match.groups()
        path.append(int(index) if index else name or key)
        position = match.end()
    if position < len(rest):
        raise ConfigError(f"config.{place}: malformed path; write a.b, a[0].b or a['b.c']")
    return Override(tuple(path), text, given)


def apply_override(values: dict, override: Override, schema: type[Group]) -> None:
    """Sets the override's value in `values`, which need not satisfy the schema yet.

    Raises:
        ConfigError: the path leads nowhere: an index past the end, a key of something without keys.
    """
    container, kinds = values, [schema]
    for position, part in enumerate(override.path):
        kinds = _choose(kinds, container)
        _check_holds(container, part, override.path[:position])
        inner = select_kinds(kinds, part) or []
        if position == len(override.path) - 1:
            container[part] = read_value(override.text, inner)
            return
        if isinstance(part, str) and container.get(part) is None:
            container[part] = _find_default(kinds, part)
        container, kinds = container[part], inner


def find_sources(problem: Problem, overrides: list[Override]) -> list[Override]:
    """The overrides that set the values behind a problem, in the order they were given."""
    sources = {id(one) for path in problem.paths for one in _find_touching(path, overrides)}
    return [override for override in overrides if id(override) in sources]


def _find_touching(path: KeyPath, overrides: list[Override]) -> list[Override]:
    sources = []
    for override in overrides:
        if override.path == path[: len(override.path)]:
            sources = [override]  # it replaces all that earlier overrides set there
        elif _touches(override.path, path):
            sources.append(override)
    return sources


def _touches(inner: KeyPath, path: KeyPath) -> bool:
    """Whether `inner` lies inside `path`. An entry of the list at `path` does not count."""
    return inner[: len(path)] == path and not isinstance(inner[len(path)], int)


def read_value(text: str, kinds: list):
    """Parses a text as one of the types `kinds`."""
    wanted = [kind for kind in kinds if kind is not types.NoneType]
    if wanted and all(_is_text(kind) for kind in wanted):
        return None if text == 'None' and len(wanted) < len(kinds) else text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text  # validation reports the expected type


def make_plain(value, path: tuple, problems: list[Problem]):
    """Converts ConfigDicts, tuples and so on to JSON values; appends what it cannot convert."""
    if hasattr(value, 'items'):
        items = {str(key): inner for key, inner in value.items()}
        return {key: make_plain(inner, (*path, key), problems) for key, inner in items.items()}
    if isinstance(value, (list, tuple)):
        return [make_plain(inner, (*path, i), problems) for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(Problem.at(path, f'must be a finite number, got {value}'))
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    problems.append(
        Problem.at(
            path,
            f'must be a number, text, true or false, a list or a group, '
            f'got {format_value(value)} ({type(value).__name__})',
        )
    )
    return None


def _is_text(kind) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(kind))
    return kind is str


def _choose(kinds: list, container) -> list:
    """The schema that the container's `name` selects; all of `kinds` if it selects none."""
    name = container.get('name') if isinstance(container, dict) else None
    for choice in kinds:
        if isinstance(choice, OneOf) and choice.registry.takes(name):
            with contextlib.suppress(ConfigError):  # validation of the whole config reports it
                return [choice.registry.find(name).schema]
    return kinds


def _check_holds(container, part, path) -> None:
    place = format_path(('config', *path))
    if isinstance(container, dict) and isinstance(part, str):
        return
    if isinstance(container, list) and isinstance(part, int):
        if part < len(container):
            return
        held = f'entries 0 to {len(container) - 1}' if container else 'no entries'
        raise ConfigError(f'{place}[{part}]: the list has {held}')
    if isinstance(container, list):
        raise ConfigError(f'{place} is a list of {len(container)} entries; write {place}[0].{part}')
    if isinstance(container, dict):
        raise ConfigError(f'{place} is a group of keys, not a list; there is no [{part}]')
    raise ConfigError(f'{place} is {format_value(container)}, which has no keys')


def _find_default(kinds: list, part: str):
    """The default value of `part`, so that an override can change a single key of it."""
    for kind in kinds:
        if is_group(kind) and part in kind.model_fields:
            default = kind.model_fields[part].get_default(call_default_factory=True)
            if default is not None and default is not pydantic_core.PydanticUndefined:
                return _dump_default(default)
    return {}


def _dump_default(default):
    """A default as JSON values.

    Of a group, only its name and the values that differ from the defaults of its class, so that
    another override may still select another name.
    """
    if not isinstance(default, pydantic.BaseModel):
        return pydantic_core.to_jsonable_python(default)
    name = {'name': default.name} if list_names(type(default)) else {}
    return name | default.model_dump(mode='json', exclude_defaults=True)
