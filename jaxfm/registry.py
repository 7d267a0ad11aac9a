"""Finds the class behind a name in a config: an entry of a registry, or a path `module:Class`.

`name='adamw'` is an entry. `name='my_lab:Focal'` is the class Focal in the module my_lab, which
is next to the config file or is installed (`code.py` finds it). Such a class needs an attribute
`Config`, the pydantic group of its values; `objective = dict(name='my_lab:Focal', gamma=2.0)` is
checked like any other group. Each package declares its registry in its `__init__.py`, so that a
config can be checked without importing jax; only modules outside jaxfm are imported.

A registry may have an adapter: a class of ours that takes the place of an outside class without a
`Config`, so that a class written for another library can be used as it is.
"""

import dataclasses
import difflib
import functools
import importlib
import json
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic_core import PydanticCustomError, PydanticKnownError, core_schema

from jaxfm.code import import_module, is_path, search_as, searched
from jaxfm.errors import ConfigError
from jaxfm.schema import Group


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of a registry: the path of its class ("module:Class") and its config group."""

    target: str
    schema: type[Group]

    def load(self):
        """Imports and returns the class. This may import jax and other heavy modules."""
        return load_target(self.target)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Takes the place of an outside class that has no `Config` but these methods."""

    methods: tuple[str, ...]
    what: str  # a class with these methods, for messages
    entry: Entry


class Registry(dict[str, Entry]):
    """{name: Entry} of the classes in jaxfm. `find` also accepts the path of a class outside it.

    Args:
      base: the `Config` of a class outside jaxfm must be a subclass of this group. None: the
        registry accepts no such classes.
      beside: a group whose keys are added to those of the outside class.
      adapter: accepts outside classes without a `Config`, too.
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        base: type[Group] | None = None,
        beside: type[Group] | None = None,
        adapter: Adapter | None = None,
    ):
        super().__init__(entries)
        self.base, self.beside, self.adapter = base, beside, adapter

    def takes(self, name) -> bool:
        """Whether `name` is an entry, or a class path and the registry accepts outside classes."""
        return isinstance(name, str) and (name in self or self._is_outside(name))

    def _is_outside(self, name: str) -> bool:
        return self.base is not None and is_path(name)

    def find(self, name: str) -> Entry:
        """The entry for a name or a class path.

        Raises:
          KeyError: the name is neither.
          ConfigError: the path cannot be imported, or its class has no suitable `Config`.
        """
        if not self._is_outside(name):
            return self[name]
        schema = _make_schema(name, self.base, self.beside, self.adapter)
        adapted = self.adapter and not hasattr(find_class(name), 'Config')
        return Entry(self.adapter.entry.target if adapted else name, schema)

    def load(self, name: str):
        """Imports and returns the class of a name or a class path."""
        return self.find(name).load()


def load_target(target: str):
    """Imports the module of "module:name" and returns the object `name` in it."""
    module, name = target.split(':')
    return getattr(importlib.import_module(module), name)


def one_of(registry: Registry):
    """The type annotation of a group whose `name` key selects its schema."""
    return Annotated[Group, OneOf(registry)]


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """Pydantic annotation: validates a group against the schema that its `name` selects."""

    registry: Registry

    def __get_pydantic_core_schema__(self, source, handler):
        return core_schema.with_info_plain_validator_function(self._validate)

    def find_schema(self, name) -> type[Group] | None:
        """The schema that a name selects. For an unknown name: the single entry's, or None."""
        if self.registry.takes(name):
            return self.registry.find(name).schema
        # With a single entry, its own validation reports a wrong name along with other mistakes.
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
            if info.mode == 'json':  # accepts lists as tuples and 1 as 1.0, unlike Python mode
                return schema.model_validate_json(json.dumps(values))
            return schema.model_validate(values)
        except pydantic.ValidationError as error:
            faults = error.errors(include_url=False)
            inner = {'schema': schema, 'faults': faults}
            raise PydanticCustomError('in_group', 'faults in a group', inner) from error


class _FromOutside(Group):
    """Base of the groups of outside classes: created at run time, rebuilt when unpickled."""

    origin: ClassVar[tuple] = ()

    def __reduce__(self):
        return _unpickle, (*self.origin, searched(), self.model_dump_json())


def _unpickle(name, base, beside, adapter, searched, content) -> Group:
    search_as(searched)
    return _make_schema(name, base, beside, adapter).model_validate_json(content)


def find_class(name: str):
    """Imports the module of a class path and returns the class.

    Raises:
      ConfigError: the module cannot be imported or has no such name.
    """
    module = import_module(name)
    class_name = name.split(':')[1]
    found = getattr(module, class_name, None)
    if found is None:
        names = [each for each, value in vars(module).items() if hasattr(value, 'Config')]
        close = difflib.get_close_matches(class_name, names, 1)
        hint = f'; did you mean {close[0]}?' if close else ''
        raise ConfigError(f'{module.__file__} has no {class_name}{hint}')
    return found


def _make_schema(
    name: str, base: type[Group], beside: type[Group] | None, adapter: Adapter | None
) -> type[Group]:
    """The schema for a class path: the class's own `Config`, with the path as its `name`."""
    found, wanted = find_class(name), f'a subclass of {base.__module__}.{base.__name__}'
    if adapter and isinstance(found, type) and not hasattr(found, 'Config'):
        missing = [each for each in adapter.methods if not hasattr(found, each)]
        if missing:
            raise ConfigError(
                f'{name} is not {adapter.what}: it has no {" and no ".join(missing)} '
                f'(nor an attribute Config, {wanted})'
            )
        return _join(name, adapter.entry.schema, base, beside, adapter)
    if not isinstance(found, type):
        raise ConfigError(f'{name} is no class, but a {type(found).__name__}')
    group = getattr(found, 'Config', None)
    if not (isinstance(group, type) and issubclass(group, base)):
        raise ConfigError(f'{name} needs an attribute Config, {wanted}')
    taken = sorted(group.model_fields.keys() & beside.model_fields.keys()) if beside else []
    if taken:
        raise ConfigError(f'{name}: rename keys of its Config that jaxfm uses: {", ".join(taken)}')
    return _join(name, group, base, beside, adapter)


@functools.cache
def _join(name: str, group: type[Group], base, beside: type[Group] | None, adapter):
    # A class without values of its own may use Group itself, which is already a base of the others.
    own = [] if group is Group else [group]
    bases = (_FromOutside, *own, *([beside] if beside else []))
    made = pydantic.create_model(group.__name__, __base__=bases, name=(Literal[name], name))
    made.origin = (name, base, beside, adapter)
    return made
