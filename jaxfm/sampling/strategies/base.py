"""What a strategy yields, what it gets for that, and what it returns.

`run(problem)` is a generator. Each `yield action` gives the action's result:

    branches = yield Sample(8)            # 8 samples that begin
    ended = yield Wait(branches, 'any')   # those of them that have ended
    [score] = yield Call(scorer, ((problem.prompt, ended[0]),))
    return Outcome(branches, chosen=0)

Only `Wait`, `Score` and `Call` take time, in which the batch goes on; so do a problem's branches.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, Protocol

from jaxfm.sampling.request import Completion
from jaxfm.sampling.strategies.ledger import Entry


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt in ids, and what judges its completions."""

    id: str
    tokens: Sequence[int]
    options: Mapping[str, Any]  # arguments of `Request`: max_tokens, temperature, seed, ...
    prompt: Any = None  # the task's prompt, for judge, scorers and checkers
    # What an interrupted run of the same problem noted: a strategy of turns goes on from there.
    record: Sequence[Mapping[str, Any]] = ()


class Judge(Protocol):
    """Judges text; a task is one. A strategy needs only some of the methods.

    The text is `judged_text` of a completion.
    """

    def answer(self, prompt, completion: str) -> str | None:
        """The answer in a normal form, None if there is none."""

    def reward(self, prompt, completion: str) -> float:
        """The reward of a completion."""

    def stop(self, prompt, completion: str) -> bool:
        """Whether more text can no longer change the answer."""


def judged_text(judge: Judge, completion: Completion) -> str:
    """The text of a completion that a judge is to be given.

    It has the special tokens that the judge looks for, such as marks of thoughts, if the judge puts
    them there with a method `marked_text(completion)`.
    """
    mark = getattr(judge, 'marked_text', None)
    return mark(completion) if mark else completion.text


class Scorer(Protocol):
    """Built as `Scorer(config, judge)`. It runs in a thread of its own, with a time limit."""

    def __call__(self, prompt, completion: Completion) -> float:
        """The score of a completion, or of the beginning of one."""


class Checker(Protocol):
    """Built as `Checker(config, judge)`. It runs in a thread of its own, with a time limit."""

    def __call__(self, prompt, completion: Completion) -> str | None:
        """What to do better, or None if the turn is good."""


_BY_TOKEN = ('tokens', 'logprobs', 'sampling_logprobs', 'top_logprobs', 'versions')


@dataclasses.dataclass(eq=False)
class Branch(Completion):
    """A sample of a problem, under way or ended: everything behind the problem's prompt.

    `tokens` may contain ids that were given, not sampled: their log-probs are 0, their versions -1.
    The finish reason may also be 'budget' or 'cancelled'.
    """

    forced: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # [start, end) of them
    is_running: bool = False

    __eq__, __hash__ = object.__eq__, object.__hash__

    @property
    def num_sampled(self) -> int:
        """Tokens that were sampled."""
        return len(self.tokens) - sum(end - start for start, end in self.forced)

    def give(self, tokens: Sequence[int], *, has_top: bool) -> None:
        """Appends ids that were not sampled; has_top: sampled ones have `top_logprobs`."""
        start, count = len(self.tokens), len(tokens)
        if count:
            self.forced.append((start, start + count))
        self.tokens += map(int, tokens)
        self.logprobs += [0.0] * count
        self.sampling_logprobs += [0.0] * count
        self.versions += [-1] * count
        self.top_logprobs += [[]] * (count if has_top else 0)

    def cut(self, keep: int) -> None:
        """Removes all tokens but the first ones."""
        for name in _BY_TOKEN:
            setattr(self, name, getattr(self, name)[:keep])
        self.forced = [(a, min(b, keep)) for a, b in self.forced if a < keep]

    def copy_from(self, source: 'Branch') -> None:
        """Takes over the tokens of another branch."""
        for name in (*_BY_TOKEN, 'forced'):
            setattr(self, name, list(getattr(source, name)))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Begins n samples of the problem, each with noise of its own -> their Branches."""

    n: int = 1
    tokens: Sequence[int] = ()  # ids to put between the prompt and what is sampled
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # other than the problem's
    is_judged: bool = False  # end a sample when the judge's `stop` is True


@dataclasses.dataclass(frozen=True)
class Fork:
    """Begins n copies of a branch, running or ended, with noise of their own -> their Branches.

    A copy goes on from the tokens that the branch has now, and shares their pages.
    """

    branch: Branch
    n: int = 1
    tokens: Sequence[int] = ()  # ids to append
    # Other than the branch's; by default it may sample as many tokens as the branch still may.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Extend:
    """Appends ids to a branch, running or ended, which samples what follows them -> None."""

    branch: Branch
    tokens: Sequence[int]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as in Fork
    keep: int | None = None  # only so many of its tokens stay; None: all


@dataclasses.dataclass(frozen=True)
class Cancel:
    """Ends a branch -> None. What it has generated counts."""

    branch: Branch


@dataclasses.dataclass(frozen=True)
class Score:
    """Computes log-probs of given ids behind the problem's prompt -> a list, from `start` on."""

    tokens: Sequence[int]
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Wait:
    """Waits until all branches have ended, until any has, or for news -> those that have ended.

    It does not wait where none of them is running.
    """

    branches: Sequence[Branch]
    until: Literal['all', 'any', 'news'] = 'all'


@dataclasses.dataclass(frozen=True)
class Call:
    """Calls a function for each tuple of arguments, in threads -> its values.

    Raises what the function raises, TimeoutError where it takes too long, and ValueError where
    `check` does.
    """

    function: Callable
    arguments: Sequence[tuple]
    check: Callable[[Any], None] | None = None  # raises ValueError if it does not like a value


@dataclasses.dataclass(frozen=True)
class Note:
    """Keeps a JSON value in the outcome's record, and tells it at once -> None."""

    value: Mapping[str, Any]


Action = Sample | Fork | Extend | Cancel | Score | Wait | Call | Note


class OverBudget(Exception):
    """What was asked for may not be begun: it would exceed the problem's budget."""


@dataclasses.dataclass
class Outcome:
    """What a strategy has found. Lists are by sample."""

    samples: Sequence[Completion]
    scores: Sequence[float | None] = ()  # or weights; empty if the strategy has none
    answers: Sequence[str | None] = ()
    chosen: int | None = None  # index in `samples`
    answer: str | None = None
    # The driver adds these.
    entry: Entry = dataclasses.field(default_factory=Entry)
    record: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    error: str | None = None  # why the problem failed; `samples` are those begun until then


Actions = Generator[Action, Any, Outcome]


class Strategy(Protocol):
    """Built as `Strategy(config, context)`; `config` is its group.

    One whose samples may be longer than max_tokens, or never are that long, also has a method
    `needs(max_tokens)`: see the function.
    """

    def run(self, problem: Problem) -> Actions:
        """Solves one problem. Runs of different problems share nothing."""


def needs(strategy: Strategy, max_tokens: int) -> dict[str, int]:
    """{key: most tokens}: their sum is for how long a sample there must be room."""
    own = getattr(strategy, 'needs', None)
    return own(max_tokens) if own else {'max_tokens': max_tokens}


@dataclasses.dataclass(frozen=True)
class Context:
    """What all strategies work with."""

    judge: Judge | None = None
    tokenizer: Any = None

    def encode(self, text: str, *, with_special: bool = False) -> list[int]:
        """Ids of a text. with_special: special tokens that it spells are meant.

        Raises ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f'a tokenizer is needed to encode {text!r}')
        if with_special:
            return self.tokenizer.encode_parts([text])[0]
        return self.tokenizer.encode(text)

    def text(self, tokens: Sequence[int], stop: int | str | None = None) -> str:
        """The text of ids, without the stop that ended them; '' without a tokenizer."""
        if self.tokenizer is None:
            return ''
        if isinstance(stop, str):
            whole = self.tokenizer.decode(tokens)
            return whole[: whole.rfind(stop)] if stop in whole else whole
        return self.tokenizer.decode(tokens[:-1] if stop is not None else tokens)
