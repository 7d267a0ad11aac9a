"""How a name in a config finds its class: an entry of a room's registry, or a dotted path.

`name='adamw'` is an entry. `name='my_lab:Focal'` is the class Focal of the module my_lab, which is
beside the config file or installed (`code.py` finds it). Such a class has an attribute `Config`,
the pydantic group of its values: `config.objective = dict(name='my_lab:Focal', gamma=2.0)` is
checked like any other group. Each room's `__init__.py` declares its registry, so that a config is
checked without jax; only the module of a dotted path is imported for the check.
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
    """One choice of a registry: where its class is ("module:Class"), and the group it takes."""

    target: str
    schema: type[Group]

    def load(self):
        """Imports and returns the class; only now are jax or other heavy modules imported."""
        return load_target(self.target)


class Registry(dict[str, Entry]):
    """{name: Entry} of the choices that come with jaxfm; `find` knows all others, too.

    Args:
      base: a group that the `Config` of every class from outside must be a kind of; None: the
        registry takes no others.
      beside: a group whose keys stand beside those of a class from outside.
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        base: type[Group] | None = None,
        beside: type[Group] | None = None,
    ):
        super().__init__(entries)
        self.base, self.beside = base, beside

    def takes(self, name) -> bool:
        """Whether it is the name of an entry, or the path of a class where the registry is open."""
        return isinstance(name, str) and (name in self or self._is_outside(name))

    def _is_outside(self, name: str) -> bool:
        return self.base is not None and is_path(name)

    def find(self, name: str) -> Entry:
        """The entry of a name, or of a dotted path.

        Raises:
          KeyError: a name that is neither.
          ConfigError: a dotted path that cannot be imported, or is of no class with a `Config`.
        """
        if not self._is_outside(name):
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
        if self.registry.takes(name):
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


class _FromOutside(Group):
    """A group made of the `Config` of a class from outside: another process makes it anew."""

    origin: ClassVar[tuple] = ()

    def __reduce__(self):
        return _unpickle, (*self.origin, searched(), self.model_dump_json())


def _unpickle(name, base, beside, searched, content) -> Group:
    search_as(searched)
    return _make_schema(name, base, beside).model_validate_json(content)


def _make_schema(name: str, base: type[Group], beside: type[Group] | None) -> type[Group]:
    """The schema of a dotted path: the class's own `Config`, with this path for a name."""
    module = import_module(name)
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
    # Group itself, of a class without values of its own, is below all others already.
    own = [] if group is Group else [group]
    bases = (_FromOutside, *own, *([beside] if beside else []))
    made = pydantic.create_model(group.__name__, __base__=bases, name=(Literal[name], name))
    made.origin = (name, base, beside)
    return made
