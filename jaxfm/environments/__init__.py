"""Environments: what answers a model between its turns, such as a calculator or a Python process.

Each is built as `Environment(group)` and has what `jaxfm.environments.base.Environment` has. Which
questions are asked, and how the last turn is judged, is the task's; `docs/environments.md` has all.
"""

from typing import Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group, Problem


class EnvironmentConfig(Group):
    """The field that every environment has."""

    name: str
    max_turns: int = Field(4, ge=1)  # of the model; an episode that wants more ends there


class ToolConfig(EnvironmentConfig):
    """A tool that the model calls by writing `start`, what it asks, and `end`."""

    start: str = Field('<tool_call>', min_length=1)
    end: str = Field('</tool_call>', min_length=1)
    # What follows a call; {result} is what the tool says.
    result: str = '{result}'
    # The result comes in a turn of this role, which the chat template writes. None: it follows the
    # call at once, inside the model's turn.
    role: Literal['tool', 'user'] | None = None

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        """Marks that cannot be told apart, and results that would not be shown."""
        found, start, end = [], parts.get('start', ''), parts.get('end', '-')
        if end in start:
            sentence = f'end {end!r} must not be in start {start!r}: it would end a call there'
            found.append(Problem((('start',), ('end',)), sentence))
        if '{result}' not in parts.get('result', '{result}'):
            found.append(Problem.at(('result',), 'result must contain {result}'))
        return found


class CalculatorConfig(ToolConfig):
    """Computes numbers with + - * / and parentheses, exactly."""

    name: Literal['calculator'] = 'calculator'


class PythonConfig(ToolConfig):
    """Runs a Python program and shows what it prints. The limits are no security boundary."""

    name: Literal['python'] = 'python'
    seconds: float = Field(5.0, gt=0, allow_inf_nan=False)  # of wall clock, and of CPU time
    memory_mb: int = Field(1024, ge=64)  # MiB of address space
    max_characters: int = Field(1000, ge=1)  # that are shown


ENVIRONMENTS = Registry(
    {
        'calculator': Entry('jaxfm.environments.calculator:Calculator', CalculatorConfig),
        'python': Entry('jaxfm.environments.python:Python', PythonConfig),
    },
    base=EnvironmentConfig,
)
