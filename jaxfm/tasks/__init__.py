"""Tasks: prompts and a judge of completions, used for evaluation and as a reward. No jax inside.

A task is built as `Task(group, documents)`, from held-out documents or from files of its own, and
has the methods of `jaxfm.tasks.base.Task`.
"""

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group, Problem


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
    # Which turn of the assistant the prompt ends before. The answer is always its last one; with
    # an environment, the turns between are the model's own.
    before: Literal['last', 'first'] = 'last'


class ShotsConfig(Group):
    """The form of a benchmark's prompts."""

    # There are many benchmarks, and a run names few: the others need not be built.
    model_config = ConfigDict(defer_build=True)

    shots: int = Field(default=0, ge=0)  # examples before each question
    # Whether prompts are messages for the chat template, not raw text. Examples are then turns.
    chat: bool = False


class FileTaskConfig(ShotsConfig):
    """A benchmark read from files: .jsonl, .json or a published .csv, also with .gz."""

    # A file, a glob, or a directory that has the file under its published name.
    path: str = Field(min_length=1)
    # {name in the benchmark: key of the record}, where the keys are not the published ones.
    fields: dict[str, str] = {}
    # How many questions to use, chosen by a hash of their ids; 0: all.
    num_prompts: int = Field(default=0, ge=0)
    # Where the examples come from; '': the published file beside `path`.
    shots_path: str = ''

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        """A file of examples of which none is used."""
        if parts.get('shots_path') and parts.get('shots') == 0:
            return [Problem((('shots_path',), ('shots',)), 'shots_path needs shots, which is 0')]
        return []


class BenchmarkConfig(FileTaskConfig):
    """The benchmarks without keys of their own; docs/tasks.md describes each."""

    name: Literal[
        *('gsm8k', 'math', 'bbh'),
        *('mmlu', 'arc', 'hellaswag', 'winogrande', 'piqa', 'boolq', 'commonsenseqa', 'openbookqa'),
        'lambada',
    ]


class ProgramsConfig(FileTaskConfig):
    """Programs that are run with their tests. The limits are no security boundary."""

    name: Literal['humaneval', 'mbpp']
    seconds: float = Field(default=10.0, gt=0)  # of wall clock, and of CPU time, for one program
    memory_mb: int = Field(default=1024, ge=64)  # MiB of address space


class TruthfulQAConfig(FileTaskConfig):
    """TruthfulQA: questions that people answer wrongly, as multiple choice."""

    name: Literal['truthfulqa'] = 'truthfulqa'
    # mc1: the best answer against the wrong ones; mc2: the probability of all right answers.
    form: Literal['mc1', 'mc2'] = 'mc1'
    # A text before each question, such as the six examples that published scores have.
    introduction: str = ''


class IfEvalConfig(FileTaskConfig):
    """IFEval: instructions that a program can check (extra `ifeval`)."""

    name: Literal['ifeval'] = 'ifeval'
    # loose: a response also counts without its first line, its last line, and stars.
    form: Literal['strict', 'loose'] = 'strict'


class ArithmeticConfig(ShotsConfig):
    """Generated sums of whole numbers; one group per difficulty, '<terms>x<digits>'."""

    name: Literal['arithmetic'] = 'arithmetic'
    # How many problems, in equal numbers per difficulty.
    num_prompts: int = Field(default=100, ge=1)
    terms: list[int] = Field(default=[2], min_length=1)  # how many numbers to add
    digits: list[int] = Field(default=[1, 2, 3, 4], min_length=1)  # of each number
    # A problem is in one split only, whatever the seed: train on one, evaluate on the other.
    split: Literal['train', 'test'] = 'test'
    seed: int = 0
    question: str = 'Question: What is {sum}?\nAnswer:'
    separator: str = ' '  # between question and answer in the examples

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        """Numbers of terms and digits below one, and a question without its sum."""
        problems = []
        for key, lowest in (('terms', 2), ('digits', 1)):
            if any(number < lowest for number in parts.get(key, ())):
                problems.append(Problem.at((key,), f'{key} must be at least {lowest}'))
        if '{sum}' not in parts.get('question', '{sum}'):
            problems.append(Problem.at(('question',), 'question must contain {sum}'))
        return problems


TASKS = Registry(
    {
        'arc': Entry('jaxfm.tasks.choices:Arc', BenchmarkConfig),
        'arithmetic': Entry('jaxfm.tasks.arithmetic:Arithmetic', ArithmeticConfig),
        'bbh': Entry('jaxfm.tasks.bbh:Bbh', BenchmarkConfig),
        'boolq': Entry('jaxfm.tasks.choices:BoolQ', BenchmarkConfig),
        'commonsenseqa': Entry('jaxfm.tasks.choices:CommonsenseQA', BenchmarkConfig),
        'exact_answer': Entry('jaxfm.tasks.exact_answer:ExactAnswer', ExactAnswerConfig),
        'gsm8k': Entry('jaxfm.tasks.math_problems:Gsm8k', BenchmarkConfig),
        'hellaswag': Entry('jaxfm.tasks.choices:HellaSwag', BenchmarkConfig),
        'humaneval': Entry('jaxfm.tasks.programs:HumanEval', ProgramsConfig),
        'ifeval': Entry('jaxfm.tasks.ifeval:IfEval', IfEvalConfig),
        'lambada': Entry('jaxfm.tasks.choices:Lambada', BenchmarkConfig),
        'math': Entry('jaxfm.tasks.math_problems:Math', BenchmarkConfig),
        'mbpp': Entry('jaxfm.tasks.programs:Mbpp', ProgramsConfig),
        'mmlu': Entry('jaxfm.tasks.choices:Mmlu', BenchmarkConfig),
        'openbookqa': Entry('jaxfm.tasks.choices:OpenBookQA', BenchmarkConfig),
        'piqa': Entry('jaxfm.tasks.choices:Piqa', BenchmarkConfig),
        'python_functions': Entry(
            'jaxfm.tasks.python_functions:PythonFunctions', PythonFunctionsConfig
        ),
        'truthfulqa': Entry('jaxfm.tasks.choices:TruthfulQA', TruthfulQAConfig),
        'winogrande': Entry('jaxfm.tasks.choices:WinoGrande', BenchmarkConfig),
    },
    base=Group,
)
