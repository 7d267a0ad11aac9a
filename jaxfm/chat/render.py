"""Renders chats to ids, and masks the tokens that the assistant must produce.

The mask comes from rendering prefixes of the chat. The messages before a turn, rendered with a
generation prompt, are the text from which sampling starts. Whatever the template writes after that,
through the end-of-turn token, is the assistant's. The text is cut at these borders before it
is encoded, so a prompt's ids are always a prefix of the chat's, whatever the assistant answers.
"""

import functools
import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from jaxfm.chat.messages import (
    PROBE_NAME,
    View,
    check_calls,
    check_complete,
    ends_with_assistant,
    is_assistant,
    make_view,
    probe_calls,
)
from jaxfm.chat.template import TEMPLATES
from jaxfm.chat.traits import ANSWERS, QUESTION, THOUGHT, probe, render_view
from jaxfm.errors import DataError


class Chat:
    """Encodes chats with the tokenizer's template, or with `plain` if it has none.

    The constructor renders a few probe chats to learn how the template ends a turn.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.template: str = tokenizer.chat_template or TEMPLATES['plain']  # Jinja
        self._traits = probe(self.template, tokenizer)

    def encode(
        self, messages: Sequence[Mapping], tools: Sequence[Mapping] = (), num_given: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a chat up to the end of its last assistant turn.

        Returns ids, int32 [n], and a mask, bool [n]: True where the assistant must produce the
        token, but for what it says in the first `num_given` messages.

        Raises:
            DataError: the chat has no assistant turn or an unknown role, or the template refuses
                it, leaves out a message, or rewrites earlier turns so that no prompt leads to them.
        """
        view = self._view(messages, tools)
        last = max((i for i, m in enumerate(view.messages) if is_assistant(m)), default=None)
        if last is None:
            raise DataError('the chat has no assistant turn, so there is nothing to learn from it')
        view = view.first(last + 1)
        text = self._render(view)
        check_complete(view, text)
        spans = self._spans(view, text)
        # Not the length of the prompt: it may end with more than what all answers begin with, such
        # as the empty thought of a model that may think.
        skipped = sum(map(is_assistant, messages[:num_given]))
        ids, mask = [], []
        for number, part in enumerate(self._encode(text, spans, view.filler)):
            ids += part
            mask += [number % 2 == 1 and number // 2 >= skipped] * len(part)
        if ids[-1] not in self.stop_ids:
            ids.append(self._tokenizer.eos_id)
            mask.append(True)
        return np.array(ids, np.int32), np.array(mask, bool)

    def prompt(self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()) -> list[int]:
        """Ids up to and including the generation prompt. Raises DataError as `encode` does."""
        view = self._view(messages, tools)
        text = self._prompt_text(view)
        check_complete(view, text)
        spans = self._spans(view, text, is_prompt=True)
        parts = self._encode(text, spans, view.filler, end=len(text))
        return list(itertools.chain(*parts))

    def prompt_text(self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()) -> str:
        """The text whose ids `prompt` gives; in it, a message may spell special tokens."""
        view = self._view(messages, tools)
        text = self._prompt_text(view)
        return text.replace(view.filler, '') if view.filler else text

    def turn_ids(self, role: str, content: str, tools: Sequence[Mapping] = ()) -> list[int]:
        """Ids that follow an answer, from behind its end to where the next answer begins.

        In between is a turn of the role, such as what a tool says. Raises DataError as `encode`
        does.
        """
        answer = self._probe_answers(role)[-1]
        view = self._view([QUESTION, answer, {'role': role, 'content': content}], tools)
        [(_, between)] = self._turns(view)
        _, ids = self._tokenizer.encode_parts([self._traits.mark, between], view.filler)
        return ids

    def check_turns(self, role: str, tools: Sequence[Mapping] = ()) -> None:
        """Raises DataError unless `turn_ids` says what the template would say in any chat.

        That is so if the template leaves a chat as it is when more follows, thoughts included, and
        writes the same around every turn of the role.
        """
        if not self._find_special(self._traits.mark):
            raise DataError(
                'the chat template ends turns without a special token, so where an answer ends in '
                'the middle of a chat is not clear; set config.tokenizer.chat_template to one such '
                "as 'plain'"
            )
        said = {'role': role, 'content': 'said-by-this'}
        for answer in self._probe_answers(role):
            view = self._view([QUESTION, answer, said, answer, said], tools)
            turns = self._turns(view)
            if any(PROBE_NAME in between for _, between in turns):
                raise DataError(
                    'the chat template writes the name of the function that was called into the '
                    'turn of its result, which is not known here; set config.tokenizer.'
                    "chat_template to one that does not, such as 'plain'"
                )
            if len({between for _, between in turns}) > 1 or not all(kept for kept, _ in turns):
                raise DataError(
                    'the chat template writes earlier turns, or their thoughts, in another form '
                    f'when a turn of the role {role} follows, so that what was sampled would not '
                    'stay as it is; set config.tokenizer.chat_template to one that keeps them, '
                    "such as 'plain'"
                )

    def _probe_answers(self, role: str) -> list[dict]:
        """Answers that a turn of the role may follow; the last one is the plainest."""
        if role == 'tool' and self._traits.call_form is not None:
            return [probe_calls(1)]
        return [THOUGHT, ANSWERS[0]]

    def _turns(self, view: View) -> list[tuple[bool, str]]:
        """Of each answer: whether it and all before it stay as they are, and what follows it."""
        found = []
        for i in range(1, len(view.messages), 2):
            prompt, turn = self._prompt_text(view.first(i)), self._render(view.first(i + 1))
            stop = self._end_of_turn(turn, len(prompt))
            text = self._prompt_text(whole := view.first(i + 2))
            check_complete(whole, text)
            answer = view.messages[i]['content'] or ''
            is_kept = turn.startswith(prompt) and text.startswith(turn[:stop])
            found.append((is_kept and answer in turn, text[stop:]))
        return found

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: eos, and special tokens that end a turn or its tool calls."""
        special = self._tokenizer.special_tokens
        ends = [self._find_special(self._traits.mark), self._find_tool_mark()]
        return frozenset([self._tokenizer.eos_id, *(special[end] for end in ends if end)])

    def _encode(self, text: str, spans, filler: str, end: int = 0) -> list[list[int]]:
        """Ids of the parts of a text: before a turn, the turn, before the next turn, and so on."""
        borders = [0, *itertools.chain(*spans), *([end] if end else [])]
        parts = [text[start:stop] for start, stop in itertools.pairwise(borders)]
        encoded = self._tokenizer.encode_parts(parts, filler)
        bos = self._tokenizer.bos_id
        if bos is not None and bos not in encoded[0]:
            encoded[0].insert(0, bos)
        return encoded

    def _view(self, messages: Sequence[Mapping], tools: Sequence[Mapping]) -> View:
        form = self._traits.call_form
        return make_view(messages, tools, self.template, form, self._tokenizer)

    def _render(self, view: View) -> str:
        """Renders a chat up to the end of its last turn."""
        return self._render_view(view, self._traits.asks_late)

    def _render_prompt(self, view: View) -> str:
        """Renders a chat followed by the generation prompt."""
        return self._render_view(view, True)

    def _render_view(self, view: View, add_generation_prompt: bool) -> str:
        none = self._traits.gives_none
        return render_view(self.template, self._tokenizer, none, view, add_generation_prompt)

    # Below: which characters of a rendered chat are the assistant's.

    def _spans(self, view: View, text: str, is_prompt: bool = False) -> list[tuple[int, int]]:
        """[start, stop) in `text` of every assistant turn."""
        spans, end = [], 0
        for i, message in enumerate(view.messages):
            if not is_assistant(message):
                continue
            turn = text
            if i + 1 < len(view.messages) or is_prompt:
                turn = self._render(view.first(i + 1))
            start = self._start(view, i, turn, text)
            stop = self._stop(turn, text, start)
            if start is None or stop is None or not end <= start < stop:
                raise DataError(
                    f'the chat template renders the chat up to turn {i + 1} differently when more '
                    'messages follow, so what the assistant must produce there is unknown; '
                    'set config.tokenizer.chat_template to another one'
                )
            check_calls(message, text[start:stop])
            spans.append((start, stop))
            end = stop
        return spans

    def _start(self, view: View, i: int, turn: str, text: str) -> int | None:
        """Where turn i starts in `text`; `turn` is the chat rendered up to the end of that turn."""
        before = view.first(i)
        if self._traits.has_prompt and not ends_with_assistant(before):
            prompt = self._render_prompt(before)
            if text.startswith(prompt):
                return len(prompt)
        # Text that is the same for every answer is not part of the answer.
        answers = [self._render(before.plus(answer)) for answer in ANSWERS]
        common = os.path.commonprefix([turn, *answers])
        if text.startswith(common):
            return len(common)
        # Some templates render past turns differently: an empty thought before the last answer only
        message = view.messages[i]
        others = [before.plus(message | {'content': answer['content']}) for answer in ANSWERS]
        others = [self._render(o.plus(*view.messages[i + 1 :])) for o in others]
        return len(os.path.commonprefix([text, *others])) if others[0] != others[1] else None

    def _prompt_text(self, view: View) -> str:
        """The text before an answer: the generation prompt, if answers follow it."""
        answers = [self._render(view.plus(answer)) for answer in ANSWERS]
        prompt = self._render_prompt(view)
        # Some templates write no prompt, or none between two consecutive answers.
        is_prompt = self._traits.has_prompt and not ends_with_assistant(view)
        if is_prompt and answers[0].startswith(prompt):
            return prompt
        return os.path.commonprefix(answers)

    def _stop(self, turn: str, text: str, start: int | None) -> int | None:
        """End of a turn in `text`, with its end-of-turn token. `turn`: the chat up to there."""
        if start is None or not turn.startswith(text[:start]):
            return None
        stop = self._end_of_turn(turn, start)
        if text.startswith(turn[start:stop], start):
            return stop
        # Some templates drop the thoughts at the head of a turn once another turn follows.
        for head in range(start + 1, stop - len(self._traits.mark) + 1):
            if self._traits.mark and text.startswith(turn[head:stop], start):
                return start + stop - head
        return None

    def _end_of_turn(self, turn: str, start: int) -> int:
        if self._traits.suffix and turn.endswith(self._traits.suffix):
            return len(turn) - len(self._traits.suffix) + len(self._traits.mark)
        stop = len(turn.rstrip()) if self._traits.suffix else len(turn)
        ends = [match.end() for match in self._tokenizer.special_pattern.finditer(turn, start)]
        return ends[-1] if ends and not turn[ends[-1] :].strip() else max(start, stop)

    def _find_special(self, text: str) -> str:
        found = self._tokenizer.special_pattern.search(text)
        return found.group() if found else ''

    def _find_tool_mark(self) -> str:
        """The special token that ends a turn's tool calls; '' if each call ends with one."""
        if self._traits.call_form is None:
            return ''
        for number in (2, 1):
            view = self._view([QUESTION, probe_calls(number)], ())
            try:
                turn = self._render(view)
                start = self._start(view, 1, turn, turn)
            except DataError:
                continue
            if start is None:
                continue
            turn = turn[start : self._end_of_turn(turn, start)]
            marks = self._tokenizer.special_pattern.findall(turn)
            return marks[-1] if marks and marks.count(marks[-1]) == 1 else ''
        return ''
