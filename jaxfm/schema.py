"""What a config group is: typed, frozen and complete; what is said of one that is wrong.

Each room's `__init__.py` declares its groups, so that a config is checked without importing jax.
`jaxfm.config` reads these; a room hands the checked group on whole.
"""

import dataclasses

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

    @pydantic.model_validator(mode='after')
    def _check_conflicts(self):
        if problems := self.find_conflicts(dict(self)):
            raise ConflictError(*problems)
        return self

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        """What is wrong between values of the group; `parts` has those that are sound."""
        return []
