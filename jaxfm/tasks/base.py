"""What every task offers: prompts, a judge, a reward, and when a completion is long enough."""

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question: a text to continue, or a chat whose next turn is the assistant's.

    The id is stable: records of different runs are joined by it.
    """

    id: str
    text: str  # of a chat: what a person reads of it
    messages: tuple[dict, ...] = ()  # of a chat
    tools: tuple[dict, ...] = ()  # that the assistant may call
    group: str = ''  # a label; scores are also given by group


class Task(Protocol):
    """Judges text, not tokens; holds no state that a completion could change."""

    def prompts(self) -> list[Prompt]:
        """The same prompts in the same order every time."""

    def evaluate(self, prompt: Prompt, completion: str) -> float:
        """The score of one completion, in [0, 1]."""

    def reward(self, prompt: Prompt, completion: str) -> float:
        """What training on this task maximises."""

    def stop(self, prompt: Prompt, completion: str) -> bool:
        """Whether more text cannot change the score any more; once true, true for longer text."""
