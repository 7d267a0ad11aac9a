"""Traits of a chat template: how it behaves, found by rendering a few short chats."""

import dataclasses
import functools
import os
from collections.abc import Callable

from jaxfm.chat.messages import (
    CALL_FORMS,
    PROBE_NAME,
    PROBE_VALUE,
    CallForm,
    View,
    prepare_messages,
    probe_calls,
)
from jaxfm.chat.template import render_template
from jaxfm.errors import DataError

QUESTION = {'role': 'user', 'content': 'first-question'}
ANSWERS = [{'role': 'assistant', 'content': text} for text in ('An-answer', 'Zero-answers')]
THOUGHT = {'role': 'assistant', 'content': '<think>\na-thought\n</think>\n\nAn-answer'}
_SECOND_QUESTION = {'role': 'user', 'content': 'second-question'}


@dataclasses.dataclass(frozen=True)
class TemplateTraits:
    """What must be known about a template before a chat is rendered."""

    # Whether `tools` is passed as None if there are none; otherwise it is not passed at all.
    gives_none: bool
    # Whether the template ends the last turn only when a generation prompt is requested.
    asks_late: bool
    # The text after the last answer, and the part of it that ends the turn: through its first
    # special token, if it has one.
    suffix: str
    mark: str
    # Whether answers follow the generation prompt.
    has_prompt: bool
    # How tool calls must be passed for the template to write them; None: it does not support them.
    call_form: CallForm | None


def render_view(
    template: str, tokenizer, gives_none: bool, view: View, add_generation_prompt: bool
) -> str:
    """Renders a chat with a template and the tokenizer's special tokens."""
    tools = {'tools': list(view.tools) or None} if view.tools or gives_none else {}
    return render_template(
        template,
        messages=view.messages,
        add_generation_prompt=add_generation_prompt,
        **tools,
        **tokenizer.template_variables,
    )


def probe(template: str, tokenizer) -> TemplateTraits:
    """Finds a template's traits. Raises DataError unless it renders a question and its answer."""
    gives_none = _takes_none(template, tokenizer)
    render = functools.partial(render_view, template, tokenizer, gives_none)
    question, prompt = (render(View([QUESTION]), ask) for ask in (False, True))
    turn, asked = (render(View([QUESTION, ANSWERS[0]]), ask) for ask in (False, True))
    # Asked for a generation prompt, some templates only end the last turn and write no prompt.
    header = prompt.removeprefix(question).strip()
    extra = asked.removeprefix(turn) if asked.startswith(turn) else ''
    asks_late = bool(header and extra and header not in extra)
    _, found, suffix = (asked if asks_late else turn).rpartition(ANSWERS[0]['content'])
    if not found:
        raise DataError("the chat template leaves out the assistant's answer")
    mark = _find_mark(render, suffix, tokenizer.special_pattern)
    answers = [render(View([QUESTION, answer]), asks_late) for answer in ANSWERS]
    header = os.path.commonprefix(answers).removeprefix(prompt)
    has_prompt = prompt != question or not header.strip()
    call_form = _find_call_form(render, asks_late)
    return TemplateTraits(gives_none, asks_late, suffix, mark, has_prompt, call_form)


def _takes_none(template: str, tokenizer) -> bool:
    """Whether the template accepts None for `tools` if there are none."""
    try:
        render_view(template, tokenizer, True, View([QUESTION]), True)
    except DataError:
        return False
    return True


def _find_mark(render: Callable[[View, bool], str], suffix: str, special_pattern) -> str:
    """The part of the suffix that ends a turn."""
    if special := special_pattern.search(suffix):
        return suffix[: special.end()]
    messages = [QUESTION, ANSWERS[0], _SECOND_QUESTION]
    try:
        after = render(View(messages), False).partition(ANSWERS[0]['content'])[2]
    except DataError:
        return suffix.rstrip()
    # Some templates write a generation prompt after every chat; it does not end a turn.
    return suffix.rstrip() if after.startswith(suffix.rstrip()) else ''


def _find_call_form(render: Callable[[View, bool], str], asks_late: bool) -> CallForm | None:
    """The form in which the template writes tool calls best."""
    seen = {}
    for form in CALL_FORMS:
        messages = prepare_messages([QUESTION, probe_calls(1)], form)
        try:
            text = render(View(messages), asks_late)
        except DataError:
            continue
        if PROBE_NAME in text and PROBE_VALUE in text:
            # True marks a worse form: the repr of a Python dict, or JSON inside JSON.
            seen[form] = f"'{PROBE_VALUE}'" in text or f'\\"{PROBE_VALUE}' in text
    return min(seen, key=seen.get, default=None)
