"""What a config group is: typed, frozen and complete; how a name in a config finds its class.

Each room's `__init__.py` declares its groups and a plain dict of name -> Entry, so that a config is
checked without importing jax. `jaxfm.config` reads these; a room hands the checked group on whole.
"""

import dataclasses
import importlib
from typing import Annotated, Union

import pydantic

# Keys and list indices on the way from a group to a value inside it: ('phases', 1, 'name').
KeyPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong with a group, and the values that it comes from."""

    paths: tuple[KeyPath, ...]  # of those values
    sentence: str
    place: KeyPath = ()  # what the sentence is about; () is the group itself
    is_unknown_key: bool = False

    @classmethod
    def at(cls, path: KeyPath, sentence: str, is_unknown_key: bool = False) -> 'Problem':
        """A problem of one value, whatever the others are."""
        return cls((path,), sentence, path, is_unknown_key)

    def under(self, prefix: KeyPath) -> 'Problem':
        """The same problem, seen from a group that has this one at `prefix`."""
        paths = tuple((*prefix, *path) for path in self.paths)
        return dataclasses.replace(self, paths=paths, place=(*prefix, *self.place))


class ConflictError(ValueError):
    """Values of a group that do not fit together; its validator raises this."""

    def __init__(self, *problems: Problem):
        super().__init__('\n'.join(problem.sentence for problem in problems))
        self.problems = problems


class Group(pydantic.BaseModel):
    """A config group: unknown keys and wrong types are errors, values cannot change afterwards."""

    model_config = pydantic.ConfigDict(
        extra='forbid', frozen=True, strict=True, protected_namespaces=(), validate_default=True
    )

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        """What is wrong between values of the group; `parts` has those that are sound."""
        return []


@dataclasses.dataclass(frozen=True)
class Entry:
    """One choice of a registry: where its class is ("module:Class"), and the group it takes."""

    target: str
    schema: type[Group]

    def load(self):
        """Imports and returns the class; only now are jax or other heavy modules imported."""
        return load_target(self.target)


def load_target(target: str):
    """What "module:name" names; its module is imported only now."""
    module, name = target.split(':')
    return getattr(importlib.import_module(module), name)


def one_of(registry: dict[str, Entry]):
    """The type of a group that its `name` key selects from a registry."""
    schemas = tuple(dict.fromkeys(entry.schema for entry in registry.values()))
    if len(schemas) == 1:
        return schemas[0]
    return Annotated[Union[schemas], pydantic.Field(discriminator='name')]
