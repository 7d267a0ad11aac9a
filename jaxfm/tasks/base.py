"""The interface of a task: prompts, a score, a reward, an answer, and when to stop a completion."""

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue, or a chat whose next turn is the assistant's.

    The id is stable across runs, so that their records can be joined on it.
    """

    id: str
    text: str  # for a chat: a readable form of it, not what is tokenized
    messages: tuple[dict, ...] = ()  # empty unless it is a chat
    tools: tuple[dict, ...] = ()  # that the assistant may call
    group: str = ''  # a label; scores are also reported per group


@dataclasses.dataclass(frozen=True)
class Choice(Prompt):
    """A question answered by comparing the log-likelihoods of given continuations.

    The tokens of a continuation are those of context + continuation after the context's own; white
    space at the end of a context belongs to its continuation. In a chat (`messages`), the rendered
    chat replaces the contexts. With a single pair there is nothing to compare: it is right if
    greedy decoding gives the continuation, and its perplexity counts (LAMBADA).
    """

    # (context, continuation) of each choice. The contexts differ if the option is inside them.
    pairs: tuple[tuple[str, str], ...] = dataclasses.field(kw_only=True)
    right: tuple[int, ...] = dataclasses.field(kw_only=True)  # indices of the right choices
    # The context without the question: log p(continuation | context) is divided by the likelihood
    # after this one (Brown et al. 2020, section 2.4).
    unconditional: str = dataclasses.field(default='Answer:', kw_only=True)


class Task(Protocol):
    """Judges text, not tokens. It is stateless: judging one completion does not affect another.

    A task is built as `Task(group, documents)`. A class that inherits from this one needs only
    `prompts` and `evaluate`; the other methods have defaults.
    """

    def prompts(self) -> list[Prompt]:
        """The prompts, the same ones in the same order on every call."""

    def evaluate(self, prompt: Prompt, completion: str) -> float:
        """The score of one completion, in [0, 1]."""

    def reward(self, prompt: Prompt, completion: str) -> float:
        """The reward that training on this task maximises; by default the score."""
        return self.evaluate(prompt, completion)

    def stop(self, prompt: Prompt, completion: str) -> bool:
        """Whether more text can no longer change the score; once True, it stays True."""
        return False

    def answer(self, prompt: Prompt, completion: str) -> str | None:
        """The answer in a normal form, so that votes count equal answers as one; None if none.

        A task whose completions have no answer to vote on leaves it out, or says
        `answer = Task.answer` if a class that it inherits from has one.
        """
        return None


def has_answers(task: Task) -> bool:
    """Whether a task finds answers in completions, so that they can be voted on."""
    return getattr(type(task), 'answer', Task.answer) is not Task.answer
