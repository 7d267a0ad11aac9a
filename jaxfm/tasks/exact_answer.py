"""Questions with one right answer, made from held-out chats by removing the answer.

The prompt is a chat up to its last assistant turn, or to its first. A completion scores 1 if it
equals the content of the last one, ignoring leading and trailing white space.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable

from jaxfm.errors import DataError
from jaxfm.tasks import ExactAnswerConfig
from jaxfm.tasks.base import Prompt, Task

# Decoding gives this character for an incomplete UTF-8 sequence at the end of the text.
REPLACEMENT = '\ufffd'


@dataclasses.dataclass(frozen=True)
class Question(Prompt):
    """A chat without its end; `answer` is the stripped content of its last assistant turn."""

    answer: str = dataclasses.field(kw_only=True)


class ExactAnswer(Task):
    """The task over chats, which have `.name`, `.messages`, `.tools` and `.group`.

    Raises:
      DataError: no chat has an assistant turn with content.
    """

    def __init__(self, config: ExactAnswerConfig, documents: Iterable):
        groups = {}
        questions = (_question(document, config.before) for document in documents)
        for question in filter(None, questions):
            # Keep duplicates of a question only once; the hash decides which one.
            asked = groups.setdefault(question.group, {})
            key = json.dumps([question.messages, question.tools])
            asked[key] = min(asked.get(key, question), question, key=_rank)
        if not groups:
            raise DataError(
                'task exact_answer: no document is a chat with an answer by the assistant'
            )
        ranked = [sorted(groups[group].values(), key=_rank) for group in sorted(groups)]
        # Round-robin over the groups, so that each contributes equally until it is exhausted.
        turns = itertools.zip_longest(*ranked)
        questions = [question for turn in turns for question in turn if question]
        self._prompts = questions[: config.num_prompts]

    def prompts(self) -> list[Question]:
        """The questions, spread evenly over the groups; a hash of document names orders them."""
        return list(self._prompts)

    def evaluate(self, prompt: Question, completion: str) -> float:
        """1.0 if the completion equals the answer, ignoring surrounding white space; else 0.0."""
        return float(completion.strip() == prompt.answer)

    def stop(self, prompt: Question, completion: str) -> bool:
        """Whether the completion already differs from the answer, so that it can only score 0."""
        begun = completion.lstrip().rstrip(REPLACEMENT)
        rest = begun.removeprefix(prompt.answer)
        complete = len(rest) < len(begun) and not rest.strip()
        return not complete and not prompt.answer.startswith(begun)

    def answer(self, prompt: Question, completion: str) -> str | None:
        """The completion without surrounding white space; None if nothing is left."""
        return completion.strip() or None


def _question(document, before: str) -> Question | None:
    turns = [i for i, message in enumerate(document.messages) if message['role'] == 'assistant']
    answer = (document.messages[turns[-1]].get('content') or '').strip() if turns else ''
    if not answer:  # a turn with only tool calls has no content to compare
        return None
    messages = document.messages[: turns[0 if before == 'first' else -1]]
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
