"""How a name in a config finds its class: an entry of a room's registry, or a dotted path.

`name='adamw'` is an entry. `name='my_lab:Focal'` is the class Focal of the module my_lab, which is
beside the config file or installed. Such a class has an attribute `Config`, the pydantic group of
its values: `config.objective = dict(name='my_lab:Focal', gamma=2.0)` is checked like any other
group. Each room's `__init__.py` declares its registry, so that a config is checked without jax;
only the module of a dotted path is imported for the check.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import json
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic_core import PydanticCustomError, PydanticKnownError, core_schema

from jaxfm.errors import ConfigError
from jaxfm.schema import Group


@dataclasses.dataclass(frozen=True)
class Entry:
    """One choice of a registry: where its class is ("module:Class"), and the group it takes."""

    target: str
    schema: type[Group]

    def load(self):
        """Imports and returns the class; only now are jax or other heavy modules imported."""
        return load_target(self.target)


class Registry(dict[str, Entry]):
    """{name: Entry} of the choices that come with jaxfm; `find` knows all others, too.

    Args:
      base: a group that the `Config` of every class from outside must be a kind of.
      beside: a group whose keys stand beside those of a class from outside.
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        base: type[Group] = Group,
        beside: type[Group] | None = None,
    ):
        super().__init__(entries)
        self.base, self.beside = base, beside

    def find(self, name: str) -> Entry:
        """The entry of a name, or of a dotted path.

        Raises:
          KeyError: a name that is neither.
          ConfigError: a dotted path that cannot be imported, or is of no class with a `Config`.
        """
        if ':' not in name:
            return self[name]
        return Entry(name, _make_schema(name, self.base, self.beside))

    def load(self, name: str):
        """The class of a name, imported."""
        return self.find(name).load()


def load_target(target: str):
    """What "module:name" names; its module is imported only now."""
    module, name = target.split(':')
    return getattr(importlib.import_module(module), name)


def one_of(registry: Registry):
    """The type of a group that its `name` key selects."""
    return Annotated[Group, OneOf(registry)]


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """Validates a group as the schema that its `name` selects, from a registry or by its path."""

    registry: Registry

    def __get_pydantic_core_schema__(self, source, handler):
        return core_schema.with_info_plain_validator_function(self._validate)

    def find_schema(self, name) -> type[Group] | None:
        """The schema that a name selects; None when it selects none, or there is a choice."""
        if isinstance(name, str) and (name in self.registry or ':' in name):
            return self.registry.find(name).schema
        # The only one there is says itself what is wrong with its name, and with all else.
        return next(iter(self.registry.values())).schema if len(self.registry) == 1 else None

    def _validate(self, value: Any, info: pydantic.ValidationInfo) -> Group:
        values = dict(value) if isinstance(value, Group) else value
        if not isinstance(values, dict):
            raise PydanticKnownError('model_attributes_type')
        name = values.get('name')
        try:
            schema = self.find_schema(name)
        except ConfigError as error:
            sentence = {'sentence': str(error)}
            raise PydanticCustomError('no_such_class', '{sentence}', sentence) from error
        if schema is None and name is None:
            raise PydanticKnownError('union_tag_not_found', {'discriminator': 'name'})
        if schema is None:
            names = ', '.join(self.registry)
            tags = {'discriminator': 'name', 'tag': str(name), 'expected_tags': names}
            raise PydanticKnownError('union_tag_invalid', tags)
        if isinstance(value, Group):
            if not isinstance(value, schema):
                raise PydanticKnownError('model_attributes_type')
            return value
        try:
            if info.mode == 'json':  # which has no tuples, and whole numbers for floats
                return schema.model_validate_json(json.dumps(values))
            return schema.model_validate(values)
        except pydantic.ValidationError as error:
            faults = error.errors(include_url=False)
            inner = {'schema': schema, 'faults': faults}
            raise PydanticCustomError('in_group', 'faults in a group', inner) from error


# Directories whose modules a dotted path may name, the nearest first.
_SEARCHED: list[Path] = []
# {file of a module that was imported: its sha256 then}.
_DIGESTS: dict[str, str] = {}


def search_beside(directory: Path, first: bool = True) -> None:
    """Looks for the modules of dotted paths in this directory, too, before what is installed.

    first: before other such directories; else behind them.
    """
    directory = directory.resolve()
    if directory in _SEARCHED:
        if not first:
            return
        _SEARCHED.remove(directory)
    _SEARCHED.insert(0 if first else len(_SEARCHED), directory)


def find_code(values) -> dict[str, dict[str, str]]:
    """{dotted path: its file and the sha256 of that} of all classes that values of a config name.

    Paths that cannot be imported are left out: the check of the config tells of them.
    """
    code = {}
    for name in sorted(_dotted_names(values)):
        with contextlib.suppress(ConfigError):
            path = _import(name).__file__
            code[name] = {'path': path, 'sha256': _DIGESTS[path]}
    return code


def search_recorded(values) -> None:
    """Looks, last, where the code was that the values of an earlier config have recorded."""
    code = values.get('code') if isinstance(values, dict) else None
    for name, found in code.items() if isinstance(code, dict) else ():
        path = found.get('path') if isinstance(found, dict) else None
        if isinstance(path, str) and ':' in name:
            depth = name.split(':')[0].count('.') + (Path(path).name == '__init__.py')
            search_beside(Path(path).parents[depth], first=False)


def locate_error(error: Exception, path: Path) -> str:
    """'configs/a.py:12: NameError: ...': the last line of the file itself that the error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, message = [error.lineno], error.msg
    else:
        message = ' '.join(str(error).split())
    place = f'{path}:{lines[-1]}' if lines else str(path)
    return f'{place}: {type(error).__name__}: {message}'


class _FromOutside(Group):
    """A group made of the `Config` of a class from outside: another process makes it anew."""

    origin: ClassVar[tuple] = ()

    def __reduce__(self):
        return _unpickle, (*self.origin, list(_SEARCHED), self.model_dump_json())


def _unpickle(name, base, beside, searched, content) -> Group:
    for directory in searched:
        search_beside(directory, first=False)
    return _make_schema(name, base, beside).model_validate_json(content)


def _make_schema(name: str, base: type[Group], beside: type[Group] | None) -> type[Group]:
    """The schema of a dotted path: the class's own `Config`, with this path for a name."""
    module = _import(name)
    class_name = name.split(':')[1]
    found = getattr(module, class_name, None)
    if found is None:
        names = [each for each, value in vars(module).items() if hasattr(value, 'Config')]
        close = difflib.get_close_matches(class_name, names, 1)
        hint = f'; did you mean {close[0]}?' if close else ''
        raise ConfigError(f'{module.__file__} has no {class_name}{hint}')
    group = getattr(found, 'Config', None)
    if not (isinstance(group, type) and issubclass(group, base)):
        wanted = f'{base.__module__}.{base.__name__}'
        raise ConfigError(f'{name} needs an attribute Config, a group that is a kind of {wanted}')
    taken = sorted(group.model_fields.keys() & beside.model_fields.keys()) if beside else []
    if taken:
        raise ConfigError(f'{name}: its Config has keys that are taken: {", ".join(taken)}')
    return _join(name, group, base, beside)


@functools.cache
def _join(name: str, group: type[Group], base: type[Group], beside: type[Group] | None):
    bases = (group, *([beside] if beside else []), _FromOutside)
    made = pydantic.create_model(group.__name__, __base__=bases, name=(Literal[name], name))
    made.origin = (name, base, beside)
    return made


def _import(name: str):
    """The module of a dotted path. Raises ConfigError when it is not there, or fails."""
    if not re.fullmatch(r'[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*', name):
        raise ConfigError(f'{name!r} is no path of a class: want module:Class')
    module_name = name.split(':')[0]
    parts = module_name.split('.')
    directory = next((each for each in _SEARCHED if _has(each.joinpath(*parts))), None)
    if directory is not None and str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f'{module_name}.'.startswith(f'{error.name}.'):
            raise ConfigError(f'{name}: {error}') from error
        raise ConfigError(f'there is no module {module_name}{_hint(module_name)}') from None
    except Exception as error:
        path = directory.joinpath(*parts).with_suffix('.py') if directory else Path(module_name)
        raise ConfigError(locate_error(error, path)) from error
    if getattr(module, '__file__', None) is None:
        raise ConfigError(f'{module_name} is no file of Python')
    if directory is not None and not Path(module.__file__).resolve().is_relative_to(directory):
        raise ConfigError(
            f'{module_name} beside the config is hidden by {module.__file__}: rename it'
        )
    _check_unchanged(module.__file__)
    return module


def _check_unchanged(path: str) -> None:
    """Raises ConfigError unless a module that was imported is still what its file says."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if _DIGESTS.setdefault(path, digest) != digest:
        raise ConfigError(f'{path} has changed since this process imported it: start a new one')


def _has(module: Path) -> bool:
    return module.with_suffix('.py').is_file() or (module / '__init__.py').is_file()


def _hint(module_name: str) -> str:
    """Where it was looked for, and the nearest name there."""
    if not _SEARCHED:
        return ''
    names = sorted(path.stem for path in _SEARCHED[0].glob('*.py'))
    close = difflib.get_close_matches(module_name, names, 1)
    hint = f'; did you mean {close[0]}?' if close else ''
    return f' in {_SEARCHED[0]}, and none is installed{hint}'


def _dotted_names(values) -> set[str]:
    if isinstance(values, list):
        return set().union(*map(_dotted_names, values))
    if not isinstance(values, dict):
        return set()
    name = values.get('name')
    found = {name} if isinstance(name, str) and ':' in name else set()
    return found.union(*map(_dotted_names, values.values()))
