"""Questions with one right answer: the chats of a held-out set, asked again without their answer.

The prompt is a chat up to its last assistant turn. A completion scores 1 when it is that turn's
content, white space around it aside.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable

from jaxfm.errors import DataError
from jaxfm.tasks import ExactAnswerConfig
from jaxfm.tasks.base import Prompt

# What decoding makes of the first bytes of a character whose other bytes are yet to come.
REPLACEMENT = '\ufffd'


@dataclasses.dataclass(frozen=True)
class Question(Prompt):
    """A chat that waits for its answer."""

    answer: str = dataclasses.field(kw_only=True)


class ExactAnswer:
    """The task over chats (`.name .messages .tools .group`); DataError when none has an answer."""

    def __init__(self, config: ExactAnswerConfig, documents: Iterable):
        groups = {}
        for question in filter(None, map(_question, documents)):
            # A question that is asked twice counts once; the hash says which.
            asked = groups.setdefault(question.group, {})
            key = json.dumps([question.messages, question.tools])
            asked[key] = min(asked.get(key, question), question, key=_rank)
        if not groups:
            raise DataError(
                'task exact_answer: no held-out document is a chat that the assistant answers'
            )
        ranked = [sorted(groups[group].values(), key=_rank) for group in sorted(groups)]
        # One of every group in turn: as many of each, as far as they go.
        turns = itertools.zip_longest(*ranked)
        questions = [question for turn in turns for question in turn if question]
        self._prompts = questions[: config.num_prompts]

    def prompts(self) -> list[Question]:
        """As many of every group, chosen and ordered by a hash of the documents' names."""
        return list(self._prompts)

    def evaluate(self, prompt: Question, completion: str) -> float:
        """1.0 when the completion is the answer and nothing else."""
        return float(completion.strip() == prompt.answer)

    def reward(self, prompt: Question, completion: str) -> float:
        """What is measured is what is trained."""
        return self.evaluate(prompt, completion)

    def stop(self, prompt: Question, completion: str) -> bool:
        """Whether the completion has left the answer: nothing that follows brings it back."""
        begun = completion.lstrip().rstrip(REPLACEMENT)
        rest = begun.removeprefix(prompt.answer)
        complete = len(rest) < len(begun) and not rest.strip()
        return not complete and not prompt.answer.startswith(begun)


def _question(document) -> Question | None:
    turns = [i for i, message in enumerate(document.messages) if message['role'] == 'assistant']
    answer = (document.messages[turns[-1]].get('content') or '').strip() if turns else ''
    if not answer:  # a turn of tool calls alone has nothing to compare
        return None
    messages = document.messages[: turns[-1]]
    shown = [f'{message["role"]}: {message.get("content") or ""}' for message in messages]
    return Question(
        id=document.name,
        text='\n'.join(shown),
        messages=messages,
        tools=document.tools,
        group=document.group,
        answer=answer,
    )


def _rank(prompt: Question) -> bytes:
    return hashlib.sha256(prompt.id.encode()).digest()
