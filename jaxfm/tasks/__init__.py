"""Tasks: prompts and a judge of completions, used for evaluation and as a reward. No jax inside.

A task is built as `Task(group, documents)` from held-out documents and has `prompts()`,
`evaluate(prompt, completion)`, `reward(prompt, completion)` and `stop(prompt, completion_so_far)`.
"""

from typing import ClassVar, Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group


class PythonFunctionsConfig(Group):
    """Complete real Python function headers taken from held-out files."""

    reads_documents: ClassVar[bool] = True

    name: Literal['python_functions'] = 'python_functions'
    # How many headers to use, chosen by a hash; fewer if the documents do not contain that many.
    num_prompts: int = Field(default=64, ge=1)
    # Lines of the file before the header to include, so that the prompt looks like part of a file.
    context_lines: int = Field(default=0, ge=0)


class ExactAnswerConfig(Group):
    """Answer the questions of held-out chats; the answer must match word for word."""

    reads_documents: ClassVar[bool] = True

    name: Literal['exact_answer'] = 'exact_answer'
    # How many chats to use, chosen by a hash and spread evenly over the groups.
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
