"""The interface of an environment: what it offers, and how it answers a turn of the model."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from jaxfm.tasks.base import Prompt


@dataclasses.dataclass(frozen=True)
class Observation:
    """What an environment answers to a turn.

    `text` is encoded once; `ids` are appended as they are. If the episode is done, there is no
    further turn, and both must be empty.
    """

    text: str = ''
    ids: Sequence[int] = ()  # in place of the text
    done: bool = False
    reward: float = 0.0  # is added to the task's


class Environment(Protocol):
    """Answers the turns of many episodes, whose states it does not mix.

    A class that inherits from this one needs only `step`; the rest has defaults. It is built as
    `Environment(group)`, where `group` is its `Config`, a subclass of `EnvironmentConfig`.

    Attributes:
      tools: descriptions that a chat template shows to the model: JSON schemas of functions.
      stop: strings that end a turn. The end of a text or of a chat's turn always does.
      role: of the chat turn in which an observation comes. None: it follows the turn at once.
    """

    tools: Sequence[dict] = ()
    stop: Sequence[str] = ()
    role: str | None = None

    def reset(self, prompt: Prompt) -> Any:
        """The state of a new episode, which `step` is given and may change."""
        return None

    def step(self, state: Any, text: str, ids: Sequence[int]) -> Observation:
        """Answers a turn that has ended.

        Args:
          text: what the model wrote in this turn, with the stop string that ended it.
          ids: the same as it was sampled, with the id that ended it.
        """
