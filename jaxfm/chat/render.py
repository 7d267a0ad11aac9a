"""Chats: from messages to ids, and which of them the assistant must produce.

The mask comes from rendering prefixes: what the template writes for the messages before a turn, and
a generation prompt, is what sampling will start from; what it writes beyond that, up to the mark
that ends the turn, is the assistant's. Text is cut there before it is encoded, so the ids of a
prompt are the first ids of the chat, whatever the assistant answers.

What messages contain is text: a user who writes '<|im_end|>' ends no turn.
"""

import difflib
import functools
import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from jaxfm.chat.messages import (
    CALL_FORMS,
    PROBE_NAME,
    PROBE_VALUE,
    CallForm,
    View,
    check_calls,
    check_complete,
    ends_with_assistant,
    is_assistant,
    mapped,
    prepared,
    probe_calls,
    strings_of,
    wrapped,
)
from jaxfm.chat.template import TEMPLATES, find_variables, render_template
from jaxfm.errors import DataError

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')

# Letters of a script that nobody writes any more; the first that a chat has not is its filler.
_FILLERS = range(0x14400, 0x14600)
_QUESTION = {'role': 'user', 'content': 'first-question'}
_SECOND_QUESTION = {'role': 'user', 'content': 'second-question'}
_ANSWERS = [{'role': 'assistant', 'content': text} for text in ('An-answer', 'Zero-answers')]


class Chat:
    """Encodes chats by the tokenizer's template, `plain` where it has none.

    Building one renders a few probes, to see how the template ends a turn.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template or TEMPLATES['plain']
        self._without_tools = self._probe_without_tools()
        self._probe_turn()

    def encode(
        self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [n] up to the end of the last assistant turn, and bool [n]: the assistant's.

        Raises:
            DataError: there is no assistant turn, a role is unknown, the template refuses the chat,
                leaves a message out, or rewrites earlier turns so that no prompt leads to them.
        """
        view = self._view(messages, tools)
        last = max((i for i, m in enumerate(view.messages) if is_assistant(m)), default=None)
        if last is None:
            raise DataError('a chat without an assistant turn has nothing to learn from')
        view = view.first(last + 1)
        text = self._render(view, self._asks_late)
        check_complete(view, text)
        spans = self._spans(view, text)
        ids, mask = [], []
        for number, part in enumerate(self._encode(text, spans, view.filler)):
            ids += part
            mask += [number % 2 == 1] * len(part)
        if ids[-1] not in self.stop_ids:
            ids.append(self._tokenizer.eos_id)
            mask.append(True)
        return np.array(ids, np.int32), np.array(mask, bool)

    def prompt(self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()) -> list[int]:
        """Ids up to and including the generation prompt; DataError as `encode`."""
        view = self._view(messages, tools)
        text = self._prompt_text(view)
        check_complete(view, text)
        spans = self._spans(view, text, is_prompt=True)
        parts = self._encode(text, spans, view.filler, end=len(text))
        return list(itertools.chain(*parts))

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: eos, and the special token that ends a turn, if there is one."""
        special = self._tokenizer.special_tokens
        ends = [self._first_special(self._mark), self._tool_mark()]
        return frozenset([self._tokenizer.eos_id, *(special[end] for end in ends if end)])

    def _encode(self, text: str, spans, filler: str, end: int = 0) -> list[list[int]]:
        """Ids of the parts of a text: before a turn, a turn, before the next one, and so on."""
        borders = [0, *itertools.chain(*spans), *([end] if end else [])]
        parts = [text[start:stop] for start, stop in itertools.pairwise(borders)]
        encoded = self._tokenizer.encode_parts(parts, filler)
        bos = self._tokenizer.bos_id
        if bos is not None and bos not in encoded[0]:
            encoded[0].insert(0, bos)
        return encoded

    def _render(self, view: View, add_generation_prompt: bool) -> str:
        tools = {'tools': list(view.tools)} if view.tools else self._without_tools
        return render_template(
            self._template,
            messages=view.messages,
            add_generation_prompt=add_generation_prompt,
            **tools,
            **self._tokenizer.template_variables,
        )

    # Which characters of a rendered chat are the assistant's.

    def _spans(self, view: View, text: str, is_prompt: bool = False) -> list[tuple[int, int]]:
        """[start, stop) in `text` of every assistant turn."""
        spans, end = [], 0
        for i, message in enumerate(view.messages):
            if not is_assistant(message):
                continue
            turn = text
            if i + 1 < len(view.messages) or is_prompt:
                turn = self._render(view.first(i + 1), self._asks_late)
            start = self._start(view, i, turn, text)
            stop = self._stop(turn, text, start)
            if start is None or stop is None or not end <= start < stop:
                raise DataError(
                    f'the chat template writes the chat up to turn {i + 1} in another way when '
                    'more follows, so what the assistant must produce there is not to be told'
                )
            check_calls(message, text[start:stop])
            spans.append((start, stop))
            end = stop
        return spans

    def _start(self, view: View, i: int, turn: str, text: str) -> int | None:
        """Where turn i starts in `text`; `turn` is the chat up to its end."""
        before = view.first(i)
        if self._has_prompt and not ends_with_assistant(before):
            prompt = self._render(before, True)
            if text.startswith(prompt):
                return len(prompt)
        # What stands there whatever the answer is no part of it.
        answers = [self._render(before.plus(answer), self._asks_late) for answer in _ANSWERS]
        common = os.path.commonprefix([turn, *answers])
        if text.startswith(common):
            return len(common)
        # Some write what is over in another way: an empty thought before the last answer only.
        message = view.messages[i]
        others = [before.plus(message | {'content': answer['content']}) for answer in _ANSWERS]
        others = [self._render(o.plus(*view.messages[i + 1 :]), self._asks_late) for o in others]
        return len(os.path.commonprefix([text, *others])) if others[0] != others[1] else None

    def _prompt_text(self, view: View) -> str:
        """What stands before an answer: the generation prompt, if answers do follow on it."""
        answers = [self._render(view.plus(answer), self._asks_late) for answer in _ANSWERS]
        prompt = self._render(view, True)
        # Some write none, or none between two answers.
        is_prompt = self._has_prompt and not ends_with_assistant(view)
        if is_prompt and answers[0].startswith(prompt):
            return prompt
        return os.path.commonprefix(answers)

    def _stop(self, turn: str, text: str, start: int | None) -> int | None:
        """Where a turn ends in `text`, behind its mark; `turn` is the chat up to there."""
        if start is None or not turn.startswith(text[:start]):
            return None
        stop = self._end_of_turn(turn, start)
        if text.startswith(turn[start:stop], start):
            return stop
        # Some drop the thoughts at the head of a turn once another one follows.
        for head in range(start + 1, stop - len(self._mark) + 1):
            if self._mark and text.startswith(turn[head:stop], start):
                return start + stop - head
        return None

    def _end_of_turn(self, turn: str, start: int) -> int:
        if self._suffix and turn.endswith(self._suffix):
            return len(turn) - len(self._suffix) + len(self._mark)
        stop = len(turn.rstrip()) if self._suffix else len(turn)
        ends = [match.end() for match in self._tokenizer.special_pattern.finditer(turn, start)]
        return ends[-1] if ends and not turn[ends[-1] :].strip() else max(start, stop)

    # What the template does, seen by probes.

    def _probe_without_tools(self) -> dict:
        """How `tools` is given where there are none: as None, or not at all."""
        self._asks_late, self._without_tools = False, {'tools': None}
        try:
            self._render(View([_QUESTION]), True)
        except DataError:
            return {}
        return {'tools': None}

    def _probe_turn(self) -> None:
        """How a turn ends, and whether the end must be asked for."""
        question, prompt = (self._render(View([_QUESTION]), ask) for ask in (False, True))
        turn, asked = (self._render(View([_QUESTION, _ANSWERS[0]]), ask) for ask in (False, True))
        # Some end the last turn only when asked for a generation prompt, which then is not there.
        header = prompt.removeprefix(question).strip()
        extra = asked.removeprefix(turn) if asked.startswith(turn) else ''
        self._asks_late = bool(header and extra and header not in extra)
        turn = asked if self._asks_late else turn
        _, found, self._suffix = turn.rpartition(_ANSWERS[0]['content'])
        if not found:
            raise DataError('the chat template leaves out what the assistant says')
        self._mark = self._probe_mark()
        answers = [self._render(View([_QUESTION, answer]), self._asks_late) for answer in _ANSWERS]
        header = os.path.commonprefix(answers).removeprefix(prompt)
        self._has_prompt = prompt != question or not header.strip()

    def _probe_mark(self) -> str:
        """The part of the suffix that ends a turn: to its first special token, if it has one."""
        if special := self._tokenizer.special_pattern.search(self._suffix):
            return self._suffix[: special.end()]
        messages = [_QUESTION, _ANSWERS[0], _SECOND_QUESTION]
        try:
            after = self._render(View(messages), False).partition(_ANSWERS[0]['content'])[2]
        except DataError:
            return self._suffix.rstrip()
        # Some write a generation prompt behind every chat; that ends nothing.
        return self._suffix.rstrip() if after.startswith(self._suffix.rstrip()) else ''

    def _first_special(self, text: str) -> str:
        found = self._tokenizer.special_pattern.search(text)
        return found.group() if found else ''

    def _tool_mark(self) -> str:
        """The special token behind tool calls, unless it stands behind every one of several."""
        if self._call_form is None:
            return ''
        for number in (2, 1):
            view = self._view([_QUESTION, probe_calls(number)], ())
            try:
                turn = self._render(view, self._asks_late)
                start = self._start(view, 1, turn, turn)
            except DataError:
                continue
            if start is None:
                continue
            turn = turn[start : self._end_of_turn(turn, start)]
            marks = self._tokenizer.special_pattern.findall(turn)
            return marks[-1] if marks and marks.count(marks[-1]) == 1 else ''
        return ''

    # What messages are to the template.

    @functools.cached_property
    def _call_form(self) -> CallForm | None:
        """How tool calls must be given for the template to write them; None: it has none."""
        seen = {}
        for form in CALL_FORMS:
            messages = prepared([_QUESTION, probe_calls(1)], form)
            try:
                text = self._render(View(messages), self._asks_late)
            except DataError:
                continue
            if PROBE_NAME in text and PROBE_VALUE in text:
                # As JSON, not as Python writes a dict, nor as JSON inside JSON.
                seen[form] = f"'{PROBE_VALUE}'" in text or f'\\"{PROBE_VALUE}' in text
        return min(seen, key=seen.get, default=None)

    def _view(self, messages: Sequence[Mapping], tools: Sequence[Mapping]) -> View:
        """Checked messages in the form that the template takes."""
        for i, message in enumerate(messages):
            self._check_role(i, message)
        form = CALL_FORMS[0]
        if any(message.get('tool_calls') for message in messages):
            if self._call_form is None:
                raise DataError('the chat template has no form for tool calls')
            form = self._call_form
        if tools and 'tools' not in find_variables(self._template):
            raise DataError('the chat template has no place for tools')
        view = View(prepared(messages, form), [wrapped(tool) for tool in tools])
        strings = '\0'.join(strings_of([view.messages, view.tools]))
        if not self._tokenizer.special_pattern.search(strings):
            return view
        filler = next(chr(code) for code in _FILLERS if chr(code) not in strings)
        return self._guarded(view, filler)

    def _guarded(self, view: View, filler: str) -> View:
        """The view with the filler in every special token that a message or a tool spells.

        An assistant may write tags such as <think>: the model does so by the token of that name.
        """
        guard = self._tokenizer.guard
        messages = [
            mapped(m, lambda text: guard(text, filler, self._tokenizer.tags))
            if is_assistant(m)
            else mapped(m, lambda text: guard(text, filler))
            for m in view.messages
        ]
        for message, original in zip(messages, view.messages):
            message['role'] = original['role']
        return View(messages, mapped(view.tools, lambda text: guard(text, filler)), filler)

    def _check_role(self, i: int, message: Mapping) -> None:
        if not isinstance(message, Mapping):
            raise DataError(f'message {i + 1} is no object but a {type(message).__name__}')
        role = message.get('role')
        if not isinstance(role, str) or not self._knows(role):
            near = difflib.get_close_matches(str(role), ROLES, 1)
            hint = f'do you mean {near[0]}?' if near else f'there are {", ".join(ROLES)}'
            raise DataError(f'message {i + 1} has the role {role!r}; {hint}')
        content = message.get('content')
        has_calls = is_assistant(message) and message.get('tool_calls')
        if not isinstance(content, str) and not (content is None and has_calls):
            kind = 'no content' if content is None else f'content of type {type(content).__name__}'
            raise DataError(f'message {i + 1} ({role}) has {kind}; a text is expected')

    def _knows(self, role: str) -> bool:
        """Templates may have roles of their own, such as the `ipython` of Llama 3."""
        return role in ROLES or any(f'{q}{role}{q}' in self._template for q in '\'"')
