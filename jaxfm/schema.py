"""The base class of config groups, and the problems that their validation reports.

Each package declares its groups in its `__init__.py`, so that a config can be checked without
importing jax. `jaxfm.config` validates them; the package then passes the group on whole.
"""

import dataclasses

import pydantic

# Keys and list indices on the way from a group to a value inside it: ('phases', 1, 'name').
KeyPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mistake in a group, and the values that cause it."""

    paths: tuple[KeyPath, ...]  # the paths of those values
    sentence: str
    place: KeyPath = ()  # the path that the sentence is about; () is the group itself
    is_unknown_key: bool = False

    @classmethod
    def at(cls, path: KeyPath, sentence: str, is_unknown_key: bool = False) -> 'Problem':
        """A problem with a single value, independent of all others."""
        return cls((path,), sentence, path, is_unknown_key)

    def under(self, prefix: KeyPath) -> 'Problem':
        """The same problem, with paths from an outer group that has this one at `prefix`."""
        paths = tuple((*prefix, *path) for path in self.paths)
        return dataclasses.replace(self, paths=paths, place=(*prefix, *self.place))


class ConflictError(ValueError):
    """Values of a group contradict each other. The group's validator raises this."""

    def __init__(self, *problems: Problem):
        super().__init__('\n'.join(problem.sentence for problem in problems))
        self.problems = problems


class Group(pydantic.BaseModel):
    """A config group. Unknown keys and wrong types are errors; instances are immutable."""

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
        """Problems that involve several values. `parts` holds only the values that are valid."""
        return []
