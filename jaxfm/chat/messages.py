"""Prepares messages for a chat template, and checks that the template wrote all of them.

The content of a message is plain text: a user who writes '<|im_end|>' does not end a turn.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence

from jaxfm.chat.template import find_variables
from jaxfm.errors import DataError

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')

# Characters of a dead script; the first one that does not occur in a chat is its filler.
FILLERS = range(0x14400, 0x14600)


@dataclasses.dataclass(frozen=True)
class View:
    """Messages and tools as they are passed to the template."""

    messages: list[dict]
    tools: list[dict] = dataclasses.field(default_factory=list)
    filler: str = ''

    def first(self, number: int) -> 'View':
        return dataclasses.replace(self, messages=self.messages[:number])

    def plus(self, *messages: dict) -> 'View':
        return dataclasses.replace(self, messages=[*self.messages, *messages])


@dataclasses.dataclass(frozen=True)
class CallForm:
    """How a template expects a call's arguments, and the content of a message with only calls."""

    arguments_as_text: bool
    empty_content: str | None


CALL_FORMS = tuple(CallForm(text, empty) for text in (False, True) for empty in ('', None))
PROBE_NAME, PROBE_VALUE = 'probe_of_a_name', 'probe-of-a-value'

_REMEDY = "set config.tokenizer.chat_template to one that does, such as 'plain'"


def probe_calls(number: int) -> dict:
    function = {'name': PROBE_NAME, 'arguments': {'key': PROBE_VALUE}}
    return {'role': 'assistant', 'content': '', 'tool_calls': [{'function': function}] * number}


def is_assistant(message: Mapping) -> bool:
    return message['role'].startswith('assistant')


def ends_with_assistant(view: View) -> bool:
    return bool(view.messages) and is_assistant(view.messages[-1])


def make_view(
    messages: Sequence[Mapping],
    tools: Sequence[Mapping],
    template: str,
    call_form: CallForm | None,
    tokenizer,
) -> View:
    """Checks messages and tools and brings them into the form that the template expects.

    `call_form` is None if the template does not support tool calls.

    Raises:
        DataError: a role is unknown, a message has no text, or the template does not support the
            chat's tools or tool calls.
    """
    for i, message in enumerate(messages):
        _check_message(i, message, template)
    form = CALL_FORMS[0]
    if any(message.get('tool_calls') for message in messages):
        if call_form is None:
            raise DataError(f'the chat template does not support tool calls; {_REMEDY}')
        form = call_form
    if tools and 'tools' not in find_variables(template):
        raise DataError(f'the chat template does not support tools; {_REMEDY}')
    view = View(prepare_messages(messages, form), [wrap_tool(tool) for tool in tools])
    strings = '\0'.join(find_strings([view.messages, view.tools]))
    if not tokenizer.special_pattern.search(strings):
        return view
    filler = next(chr(code) for code in FILLERS if chr(code) not in strings)
    return _guard(view, filler, tokenizer)


def _guard(view: View, filler: str, tokenizer) -> View:
    """Inserts the filler into every special token that a message or a tool spells.

    Tags such as <think> stay whole in assistant messages: the model writes them as tokens.
    """
    guard = tokenizer.guard
    messages = [
        map_strings(m, lambda text: guard(text, filler, tokenizer.tags))
        if is_assistant(m)
        else map_strings(m, lambda text: guard(text, filler))
        for m in view.messages
    ]
    for message, original in zip(messages, view.messages):
        message['role'] = original['role']
    return View(messages, map_strings(view.tools, lambda text: guard(text, filler)), filler)


def _check_message(i: int, message: Mapping, template: str) -> None:
    """Raises DataError unless message i has a known role and either text or tool calls."""
    if not isinstance(message, Mapping):
        raise DataError(f'message {i + 1} is a {type(message).__name__}, not an object')
    role = message.get('role')
    if not isinstance(role, str) or not _knows(template, role):
        near = difflib.get_close_matches(str(role), ROLES, 1)
        hint = f'do you mean {near[0]}?' if near else f'known roles: {", ".join(ROLES)}'
        raise DataError(f'message {i + 1} has unknown role {role!r}; {hint}')
    content = message.get('content')
    has_calls = is_assistant(message) and message.get('tool_calls')
    if not isinstance(content, str) and not (content is None and has_calls):
        kind = 'no content' if content is None else f'content of type {type(content).__name__}'
        raise DataError(f'message {i + 1} ({role}) has {kind}; content must be a string')


def _knows(template: str, role: str) -> bool:
    """Whether a role is known; templates may define their own, such as Llama 3's `ipython`."""
    return role in ROLES or any(f'{q}{role}{q}' in template for q in '\'"')


def prepare_messages(messages: Sequence[Mapping], form: CallForm) -> list[dict]:
    """Completes tool calls, and gives each tool's answer the id and name of its call."""
    complete, calls, number = [], [], 0
    for message in messages:
        # Records from tables have None for absent fields, which templates do not expect.
        message = {k: v for k, v in message.items() if v is not None or k == 'content'}
        if not message.get('tool_calls'):
            message.pop('tool_calls', None)
        else:
            message['tool_calls'] = [
                _complete_call(call, number + i, form)
                for i, call in enumerate(message['tool_calls'])
            ]
            calls = list(message['tool_calls'])
            number += len(calls)
            message['content'] = message.get('content') or form.empty_content
        if message['role'] == 'tool' and calls:
            call = calls.pop(0)
            message.setdefault('tool_call_id', call['id'])
            message.setdefault('name', call['function']['name'])
        complete.append(message)
    return complete


def _complete_call(call: Mapping, number: int, form: CallForm) -> dict:
    function = call.get('function', call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get('name'), str):
        raise DataError(f'a tool call has no name: {str(call)[:80]}')
    arguments = function.get('arguments', {})
    if isinstance(arguments, str) and not form.arguments_as_text:
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f'the arguments of {function["name"]} are not JSON: {error}') from error
    elif not isinstance(arguments, str) and form.arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {'name': function['name'], 'arguments': arguments}
    # Some templates require ids of nine digits.
    return {'id': call.get('id') or f'{number:09d}', 'type': 'function', 'function': function}


def wrap_tool(tool: Mapping) -> dict:
    function = tool.get('function', tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get('name'), str):
        raise DataError(f'a tool has no name: {str(tool)[:80]}')
    return dict(tool) if 'function' in tool else {'type': 'function', 'function': dict(tool)}


def find_strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from find_strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from find_strings(inner)


def map_strings(value, change):
    """Applies `change` to every string inside a value, including the keys of mappings."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): map_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [map_strings(inner, change) for inner in value]
    return value


def check_complete(view: View, text: str) -> None:
    """Raises DataError unless the text has all tools and all messages except the assistant's.

    Templates may drop the assistant's earlier thoughts, so its messages are not checked here.
    """
    for i, message in enumerate(view.messages):
        content = message['content']
        if not is_assistant(message) and content and not _appears(content, text):
            raise DataError(
                f'the chat template leaves out message {i + 1} ({message["role"]}): '
                f'{content.strip()[:60]!r}'
            )
    for tool in view.tools:
        name, description = (tool['function'].get(key) for key in ('name', 'description'))
        if not _appears(str(description or name), text):
            raise DataError(f'the chat template leaves out the tool {name} in this chat')


def _appears(content: str, text: str) -> bool:
    """Whether a text contains a message's content, or its first line as is or JSON-escaped."""
    line = next((line.strip() for line in content.splitlines() if line.strip()), '')
    return content in text or line in text or json.dumps(line, ensure_ascii=False)[1:-1] in text


def check_calls(message: Mapping, turn: str) -> None:
    """Raises DataError unless the rendered turn has every tool call of its message."""
    calls, content = message.get('tool_calls') or (), message.get('content') or ''
    for call in calls:
        name = call['function']['name']
        if name not in turn.replace(content.strip(), '', 1):
            when = ' when its message also has content' if content else ''
            raise DataError(f'the chat template leaves out the call of {name}{when}')
