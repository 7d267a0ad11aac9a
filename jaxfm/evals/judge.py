"""Judging completions with a task: only what follows the thoughts, and a judge may fail.

A judge that raises or hangs, or whose score is not a number in [0, 1], must not end an evaluation
that has run for hours: that sample scores 0, with the reason, and the others go on.
"""

import dataclasses
import logging
import math
import numbers
import reprlib
from collections.abc import Callable
from typing import Any

from jaxfm.errors import ConfigError
from jaxfm.evals import ThinkingConfig, time_limit
from jaxfm.evals.summary import FAILED
from jaxfm.sampling.request import Completion
from jaxfm.tasks.base import Prompt
from jaxfm.tasks.thinking import visible

log = logging.getLogger('jaxfm')

MAX_REWARD = 1e6  # far larger ones would overflow in the gradient, and take all samples with them


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a task says about a completion. `error`: why the judge failed; '' if it did not."""

    score: float
    answer: str | None  # for votes; None if no parser takes it
    is_unclosed: bool = False  # the thoughts do not end
    error: str = ''


class Judge:
    """Judges the completions of a task's prompts.

    Args:
      thinking: marks of thoughts, which are not judged. If they do not end, the empty text is. None
        judges everything.
      seconds: for one call of the task.
      tokenizer: has marks that are special tokens, which the text of a sample lacks.

    Raises:
      ConfigError: a mark has a special token in it, and more, so that no text shows it.
    """

    def __init__(self, task, thinking: ThinkingConfig | None, seconds: float, tokenizer):
        self._task, self._thinking, self._seconds = task, thinking, seconds
        self._tokenizer, self._mark_ids = tokenizer, _ids_without_text(thinking, tokenizer)
        self._has_warned = False
        self._hanging: set[str] = set()  # prompts for which `stop` took too long

    def visible(self, text: str) -> str | None:
        """The text after the thoughts; None if they do not end."""
        marks = self._thinking
        return text if marks is None else visible(text, marks.start, marks.end, marks.begun)

    def marked_text(self, sample: Completion) -> str:
        """The text of a sample with the marks of its thoughts, also those that have no text."""
        text, ids = sample.text, sample.tokens
        # Of each mark, the last one says what is visible.
        places = [(_last(ids, id), mark) for mark, id in self._mark_ids.items() if id in ids]
        for index, mark in sorted(places, reverse=True):
            before = len(self._tokenizer.decode(ids[:index]))
            text = text[:before] + mark + text[before:]
        return text

    def stops(self, prompt: Prompt, text: str) -> bool:
        """Whether more text can no longer change the score. Thoughts never stop a completion."""
        shown = self.visible(text)
        if shown is None or prompt.id in self._hanging:
            return False
        is_stopped, error = self._try(self._task.stop, prompt, shown)
        if error.startswith(TimeoutError.__name__):
            self._hanging.add(prompt.id)  # it is asked after each token
        if error and not self._has_warned:
            self._has_warned = True
            log.warning('a sample (%s) that may stop early runs to its end: %s', prompt.id, error)
        return bool(is_stopped)

    def judge(self, prompt: Prompt, sample: Completion) -> Verdict:
        """The verdict on a sample that has ended. One that has failed scores 0, unjudged."""
        if sample.finish_reason in FAILED:
            return Verdict(0.0, None)
        return self._judge(prompt, self._shown(sample))

    def reward(self, prompt: Prompt, sample: Completion) -> tuple[float, str]:
        """-> the reward of a sample that has ended, and ''; or NaN and why there is none.

        Thoughts that do not end get the reward of an empty text.
        """
        if sample.finish_reason in FAILED:
            return math.nan, sample.error
        shown = self._shown(sample)
        reward, error = self._try(self._task.reward, prompt, shown or '')
        if not error and not (isinstance(reward, numbers.Real) and abs(reward) <= MAX_REWARD):
            error = f'the reward is {reprlib.repr(reward)}, but must be a number from -1e6 to 1e6'
        return (math.nan, error) if error else (float(reward), '')

    def _shown(self, sample: Completion) -> str | None:
        """What the task sees: what follows the thoughts; of several parts, only in the last."""
        texts = [self.marked_text(part) for part in sample.parts]
        shown = self.visible(''.join(texts))
        return shown if shown is None or len(shown) < len(texts[-1]) else texts[-1]

    def _judge(self, prompt: Prompt, shown: str | None) -> Verdict:
        score, error = self._try(self._task.evaluate, prompt, shown or '')
        if not error and not _is_score(score):
            error = f'the score is {score!r}, but must be a number from 0 to 1'
        # Thoughts that do not end come to no answer, whatever the task finds in an empty text.
        find = _none if shown is None else getattr(self._task, 'answer', _none)
        answer, fault = self._try(find, prompt, shown or '')
        if fault or not isinstance(answer, str | None):
            error = error or fault or f'the answer is {answer!r}, but must be text or None'
            answer = None
        return Verdict(0.0 if error else float(score), answer, shown is None, error)

    def _try(self, method: Callable, prompt: Prompt, text: str) -> tuple[Any, str]:
        """-> the method's result and ''; or None and why it failed."""
        try:
            return time_limit.call(method, (prompt, text), self._seconds), ''
        except Exception as error:
            return None, f'{type(error).__name__}: {error}'


def _ids_without_text(thinking: ThinkingConfig | None, tokenizer) -> dict[str, int]:
    """{mark: its id} of the marks that decoding leaves out."""
    found = {}
    for name in ('start', 'end') if thinking is not None else ():
        mark = getattr(thinking, name)
        hidden = [
            token
            for token, id in tokenizer.special_tokens.items()
            if token in mark and not tokenizer.decode([id])
        ]
        if mark in hidden:
            found[mark] = tokenizer.special_tokens[mark]
        elif hidden:
            raise ConfigError(
                f'thinking.{name} {mark!r} is more than the special token {hidden[0]!r} of the '
                f'tokenizer, which has no text: set thinking.{name}={hidden[0]!r}'
            )
    return found


def _last(ids: list[int], id: int) -> int:
    return len(ids) - 1 - ids[::-1].index(id)


def _none(prompt: Prompt, text: str) -> None:
    """The answer that a task without `answer` gives."""


def _is_score(value) -> bool:
    return isinstance(value, numbers.Real) and 0 <= value <= 1  # False for NaN
