"""What a config group is: typed, frozen and complete; how a name in a config finds its class.

Each room's `__init__.py` declares its groups and a plain dict of name -> Entry, so that a config is
checked without importing jax. `jaxfm.config` reads these; a room hands the checked group on whole.
"""

import dataclasses
import importlib
from typing import Annotated, Union

import pydantic


class Group(pydantic.BaseModel):
    """A config group: unknown keys and wrong types are errors, values cannot change afterwards."""

    model_config = pydantic.ConfigDict(
        extra='forbid', frozen=True, strict=True, protected_namespaces=(), validate_default=True
    )


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
