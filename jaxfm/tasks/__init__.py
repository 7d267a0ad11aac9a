"""Tasks: prompts with a judge; what is measured is what is trained. No jax inside.

A task is built as `Task(group, documents)` from held-out documents and has `prompts()`,
`evaluate(prompt, completion)`, `reward(prompt, completion)` and `stop(prompt, completion_so_far)`.
"""

from typing import Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group


class PythonFunctionsConfig(Group):
    """Complete real Python function headers taken from held-out files."""

    name: Literal['python_functions'] = 'python_functions'
    # Headers, chosen by a hash; fewer when the documents do not have that many.
    num_prompts: int = Field(default=64, ge=1)
    # Lines of the same file before the header, so that the prompt looks like a piece of a file.
    context_lines: int = Field(default=0, ge=0)


class ExactAnswerConfig(Group):
    """Answer the questions of held-out chats, word for word."""

    name: Literal['exact_answer'] = 'exact_answer'
    # Chats, as many of every group as there are, chosen by a hash.
    num_prompts: int = Field(default=256, ge=1)


TASKS = Registry(
    {
        'exact_answer': Entry('jaxfm.tasks.exact_answer:ExactAnswer', ExactAnswerConfig),
        'python_functions': Entry(
            'jaxfm.tasks.python_functions:PythonFunctions', PythonFunctionsConfig
        ),
    },
    base=Group,
)
