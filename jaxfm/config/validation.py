"""Validates plain values against the schema of a group and explains every problem in a sentence.

Values are validated as JSON, so configs from a file, from the command line and from a run's
config.json are treated alike. Pydantic finds the errors; this file adds their path in the config, a
readable sentence and the closest valid name.
"""

import copy
import difflib
import json
import types
import typing

import pydantic

from jaxfm.registry import OneOf
from jaxfm.schema import ConflictError, Group, Problem


def validate(schema: type[Group], values: dict) -> tuple[Group | None, list[Problem]]:
    """Returns the validated group and [], or None and every problem.

    Pydantic skips the checks between the values of a group as soon as one of its keys is wrong.
    Therefore this removes unknown keys and validates a second time, then runs the schema's
    `find_conflicts` on the groups that are valid.
    """
    group, problems = _parse(schema, values)
    unknown = [p.place for p in problems if p.is_unknown_key]
    if unknown:
        values = _remove_keys(values, unknown)
        problems += _parse(schema, values)[1]
    if problems and isinstance(values, dict):
        sound = _find_sound_parts(schema, values, {p.place[0] for p in problems if p.place})
        problems += schema.find_conflicts(sound)
    return group, list(dict.fromkeys(problems))


def suggest(name: str, names, owner: str = 'available:') -> str:
    """'; did you mean X?' if one of the names is close, else '; OWNER X, Y, Z'."""
    names = [str(n) for n in names]
    close = difflib.get_close_matches(str(name), names, 1)
    if close:
        return f'; did you mean {close[0]}?'
    return f'; {owner} {", ".join(names)}' if names else ''


def find_kinds(annotation, metadata=()) -> list:
    """The plain types an annotation allows: unions are expanded, metadata is dropped.

    For a group that is selected by its name: the registered schemas, then the OneOf itself, which
    can find the schemas of classes outside jaxfm.
    """
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        annotation, *metadata = typing.get_args(annotation)
        return find_kinds(annotation, metadata)
    for choice in metadata:
        if isinstance(choice, OneOf):
            return [*(entry.schema for entry in choice.registry.values()), choice]
    if origin in (typing.Union, types.UnionType):
        return [kind for arg in typing.get_args(annotation) for kind in find_kinds(arg)]
    return [annotation]


def select_kinds(kinds: list, part: str | int) -> list | None:
    """The types of the value that a key or index selects from any of `kinds`.

    Returns [] for an unknown key of a group, and None if no kind has such keys or indices.
    """
    found, is_container = [], False
    for kind in kinds:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if is_group(kind) and isinstance(part, str):
            is_container = True
            if part in kind.model_fields:
                field = kind.model_fields[part]
                found += find_kinds(field.annotation, field.metadata)
        elif (origin is dict) if isinstance(part, str) else (origin in (list, tuple)):
            is_container = True
            found += find_kinds(args[1] if origin is dict else args[0])
    return found if is_container else None


def is_group(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, Group)


def list_names(kind: type[Group]) -> tuple[str, ...]:
    """The values that a group's `name` key may have."""
    field = kind.model_fields.get('name')
    return typing.get_args(field.annotation) if field else ()


def list_keys(group: type[Group]) -> list[str]:
    """The keys of a group that a user may set: all except those that the run records."""
    fields = group.model_fields.items()
    return [key for key, field in fields if not (field.json_schema_extra or {}).get('recorded')]


def format_path(path) -> str:
    """('phases', 0, 'steps') -> 'phases[0].steps'."""
    parts = (f'[{part}]' if isinstance(part, int) else f'.{part}' for part in path)
    return ''.join(parts).removeprefix('.')


def format_value(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + '...'


def _parse(schema, values) -> tuple[Group | None, list[Problem]]:
    try:
        return schema.model_validate_json(json.dumps(values)), []
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)
        return None, [problem for fault in found for problem in _explain(schema, fault)]


def _remove_keys(values: dict, paths) -> dict:
    values = copy.deepcopy(values)
    for *parents, key in paths:
        container = values
        for part in parents:
            container = container[part]
        container.pop(key)
    return values


def _find_sound_parts(schema, values, broken: set) -> dict:
    """The top-level values of a group that are valid, if all except the `broken` ones are."""
    fields = {key: f for key, f in schema.model_fields.items() if key not in broken}
    wanted = {key: (field.annotation, field) for key, field in fields.items()}
    part = pydantic.create_model('Sound', __base__=Group, **wanted)
    sound, problems = _parse(part, {k: v for k, v in values.items() if k in fields})
    return {} if problems else dict(sound)


def _locate(schema, loc) -> tuple[tuple, list, list]:
    """Pydantic's location -> the path without union labels, the types there, the types around."""
    path, kinds, around, parts = [], [schema], [], list(loc)
    while parts:
        part = parts.pop(0)
        selected = select_kinds(kinds, part)
        if selected is None:  # pydantic's label of a member of a union of plain types
            break
        path.append(part)
        around, kinds = kinds, selected
    return tuple(path), kinds, around


def _explain(schema, fault: dict) -> list[Problem]:
    path, kinds, around = _locate(schema, fault['loc'])
    kind, given, context = fault['type'], fault['input'], fault.get('ctx', {})
    if kind in ('value_error', 'assertion_error'):
        error = context['error']
        found = error.problems if isinstance(error, ConflictError) else [Problem.at((), str(error))]
        return [problem.under(path) for problem in found]
    if kind == 'in_group':
        inner = [found for each in context['faults'] for found in _explain(context['schema'], each)]
        return [problem.under(path) for problem in inner]
    if kind == 'no_such_class':
        return [Problem.at((*path, 'name'), context['sentence'])]
    if kind in ('union_tag_invalid', 'union_tag_not_found'):
        groups = dict.fromkeys(filter(is_group, kinds))  # several names may share one
        names = [name for group in groups for name in list_names(group)]
        return [Problem.at((*path, 'name'), _explain_choice(given.get('name'), names))]
    if kind == 'literal_error':
        names = [name for literal in kinds for name in typing.get_args(literal)]
        return [Problem.at(path, _explain_choice(given, names))]
    if kind == 'extra_forbidden':
        (group,) = filter(is_group, around)
        owner = f'{list_names(group)[0]} has' if len(list_names(group)) == 1 else 'available:'
        hint = suggest(path[-1], list_keys(group), owner)
        return [Problem.at(path, f'unknown key{hint}', is_unknown_key=True)]
    if kind == 'missing':
        return [Problem.at(path, 'is required and not given')]
    sentence = _SENTENCES.get(kind, fault['msg'][0].lower() + fault['msg'][1:])
    limits = {key: _shorten(value) for key, value in context.items()}
    return [Problem.at(path, f'{sentence.format(**limits)}, got {format_value(given)}')]


def _shorten(limit):
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def _explain_choice(given, names) -> str:
    if not names:
        found = 'is required and not given' if given is None else f'got {format_value(given)}'
        return f'{found}; give the path of a class as module:Class'
    listed = ', '.join(format_value(name) for name in names)
    if given is None:
        return f'is required and not given; choose one of {listed}'
    close = difflib.get_close_matches(str(given), [str(name) for name in names], 1)
    hint = f'; did you mean {close[0]}?' if close else ''
    return f'must be one of {listed}, got {format_value(given)}{hint}'


_GROUP = 'must be a group of keys'
_SENTENCES = {
    'int_type': 'must be a whole number',
    'int_from_float': 'must be a whole number',
    'int_parsing': 'must be a whole number',
    'float_type': 'must be a number',
    'finite_number': 'must be a finite number',
    'bool_type': 'must be true or false',
    'string_type': 'must be text',
    'none_required': 'must be None',
    'list_type': 'must be a list',
    'tuple_type': 'must be a list',
    'dict_type': _GROUP,
    'model_type': _GROUP,
    'model_attributes_type': _GROUP,
    'greater_than': 'must be more than {gt}',
    'greater_than_equal': 'must be at least {ge}',
    'less_than': 'must be less than {lt}',
    'less_than_equal': 'must be at most {le}',
    'multiple_of': 'must be a multiple of {multiple_of}',
    'too_short': 'must have at least {min_length} entries',
    'too_long': 'must have at most {max_length} entries',
    'string_too_short': 'must have at least {min_length} characters',
    'string_too_long': 'must have at most {max_length} characters',
    'string_pattern_mismatch': 'must match {pattern}',
}
