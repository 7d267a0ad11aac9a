"""The interface of a task: prompts, a score, a reward, and when to stop a completion."""

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


class Task(Protocol):
    """Judges text, not tokens. It is stateless: judging one completion does not affect another."""

    def prompts(self) -> list[Prompt]:
        """The prompts, the same ones in the same order on every call."""

    def evaluate(self, prompt: Prompt, completion: str) -> float:
        """The score of one completion, in [0, 1]."""

    def reward(self, prompt: Prompt, completion: str) -> float:
        """The reward that training on this task maximises."""

    def stop(self, prompt: Prompt, completion: str) -> bool:
        """Whether more text can no longer change the score; once True, it stays True."""
