"""Messages of a chat in the form that a chat template takes, and whether it wrote all of them."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence

from jaxfm.errors import DataError


@dataclasses.dataclass(frozen=True)
class View:
    """Messages and tools as the template gets them."""

    messages: list[dict]
    tools: list[dict] = dataclasses.field(default_factory=list)
    filler: str = ''

    def first(self, number: int) -> 'View':
        return dataclasses.replace(self, messages=self.messages[:number])

    def plus(self, *messages: dict) -> 'View':
        return dataclasses.replace(self, messages=[*self.messages, *messages])


@dataclasses.dataclass(frozen=True)
class CallForm:
    """How a template wants the arguments of a call, and the content of a message of calls alone."""

    arguments_as_text: bool
    empty_content: str | None


CALL_FORMS = tuple(CallForm(text, empty) for text in (False, True) for empty in ('', None))
PROBE_NAME, PROBE_VALUE = 'probe_of_a_name', 'probe-of-a-value'


def probe_calls(number: int) -> dict:
    function = {'name': PROBE_NAME, 'arguments': {'key': PROBE_VALUE}}
    return {'role': 'assistant', 'content': '', 'tool_calls': [{'function': function}] * number}


def is_assistant(message: Mapping) -> bool:
    return message['role'].startswith('assistant')


def ends_with_assistant(view: View) -> bool:
    return bool(view.messages) and is_assistant(view.messages[-1])


def prepared(messages: Sequence[Mapping], form: CallForm) -> list[dict]:
    """Messages with complete tool calls; answers of tools carry the id and name of their call."""
    complete, calls, number = [], [], 0
    for message in messages:
        # Tables have None where a message has nothing, which templates do not expect.
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
            raise DataError(f'the arguments of {function["name"]} are no JSON: {error}') from error
    elif not isinstance(arguments, str) and form.arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {'name': function['name'], 'arguments': arguments}
    # Some templates ask for nine digits.
    return {'id': call.get('id') or f'{number:09d}', 'type': 'function', 'function': function}


def wrapped(tool: Mapping) -> dict:
    function = tool.get('function', tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get('name'), str):
        raise DataError(f'a tool has no name: {str(tool)[:80]}')
    return dict(tool) if 'function' in tool else {'type': 'function', 'function': dict(tool)}


def strings_of(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from strings_of(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from strings_of(inner)


def mapped(value, change):
    """The value with every string inside it changed, keys of mappings as well."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [mapped(inner, change) for inner in value]
    return value


def check_complete(view: View, text: str) -> None:
    """No message or tool of the chat may be missing from its text; thoughts of the past may."""
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
    """Whether the first line of a content is in a text, as it is or as JSON."""
    line = next((line.strip() for line in content.splitlines() if line.strip()), '')
    return content in text or line in text or json.dumps(line, ensure_ascii=False)[1:-1] in text


def check_calls(message: Mapping, turn: str) -> None:
    calls, content = message.get('tool_calls') or (), message.get('content') or ''
    for call in calls:
        name = call['function']['name']
        if name not in turn.replace(content.strip(), '', 1):
            beside = ' beside a content' if content else ''
            raise DataError(f'the chat template leaves out the call of {name}{beside}')
