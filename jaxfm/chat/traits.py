"""Traits of a chat template: what it does, seen by rendering a few short chats."""

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
_SECOND_QUESTION = {'role': 'user', 'content': 'second-question'}


@dataclasses.dataclass(frozen=True)
class TemplateTraits:
    """What there is to know of a template before a chat is rendered."""

    # `tools` is given as None where there are none; otherwise it is not given at all.
    gives_none: bool
    # The end of the last turn is there only when a generation prompt is asked for.
    asks_late: bool
    # What stands behind the last answer, and the part of it that ends the turn: to its first
    # special token, if it has one.
    suffix: str
    mark: str
    # Answers follow on the generation prompt.
    has_prompt: bool
    # How tool calls must be given for the template to write them; None: it has no form for them.
    call_form: CallForm | None


def render_view(
    template: str, tokenizer, gives_none: bool, view: View, add_generation_prompt: bool
) -> str:
    """The text of a chat by a template, with the tokenizer's special tokens."""
    tools = {'tools': list(view.tools) or None} if view.tools or gives_none else {}
    return render_template(
        template,
        messages=view.messages,
        add_generation_prompt=add_generation_prompt,
        **tools,
        **tokenizer.template_variables,
    )


def probe(template: str, tokenizer) -> TemplateTraits:
    """Sees what a template does; DataError when it writes no chat of a question and an answer."""
    gives_none = _takes_none(template, tokenizer)
    render = functools.partial(render_view, template, tokenizer, gives_none)
    question, prompt = (render(View([QUESTION]), ask) for ask in (False, True))
    turn, asked = (render(View([QUESTION, ANSWERS[0]]), ask) for ask in (False, True))
    # Some end the last turn only when asked for a generation prompt, which then is not there.
    header = prompt.removeprefix(question).strip()
    extra = asked.removeprefix(turn) if asked.startswith(turn) else ''
    asks_late = bool(header and extra and header not in extra)
    _, found, suffix = (asked if asks_late else turn).rpartition(ANSWERS[0]['content'])
    if not found:
        raise DataError('the chat template leaves out what the assistant says')
    mark = _find_mark(render, suffix, tokenizer.special_pattern)
    answers = [render(View([QUESTION, answer]), asks_late) for answer in ANSWERS]
    header = os.path.commonprefix(answers).removeprefix(prompt)
    has_prompt = prompt != question or not header.strip()
    call_form = _find_call_form(render, asks_late)
    return TemplateTraits(gives_none, asks_late, suffix, mark, has_prompt, call_form)


def _takes_none(template: str, tokenizer) -> bool:
    """Whether the template takes None for `tools` where there are none."""
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
    # Some write a generation prompt behind every chat; that ends nothing.
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
            # As JSON, not as Python writes a dict, nor as JSON inside JSON.
            seen[form] = f"'{PROBE_VALUE}'" in text or f'\\"{PROBE_VALUE}' in text
    return min(seen, key=seen.get, default=None)
