"""Turns a record of a file into a document: finds its fields and normalises its turns.

Chats come in the formats of OpenAI ({'role', 'content', 'tool_calls'}), ShareGPT ({'from',
'value'}) and TRL ({'prompt', 'completion'}). All become turns of {'role', 'content', ...}, with
tool calls as chat templates expect: {'type': 'function', 'function': {'name', 'arguments': {...}}}.
"""

import json
from typing import Any

from jaxfm.data import FieldsConfig
from jaxfm.data.documents import Document
from jaxfm.data.sources import place_of

ROLES = {
    'system': 'system',
    'developer': 'system',
    'user': 'user',
    'human': 'user',
    'prompter': 'user',
    'assistant': 'assistant',
    'gpt': 'assistant',
    'model': 'assistant',
    'bot': 'assistant',
    'function_call': 'assistant',  # its content is the call
    'tool': 'tool',
    'function': 'tool',
    'observation': 'tool',
}
# Keys that a turn keeps in addition to role, content and tool calls.
KEPT = ('name', 'tool_call_id', 'reasoning_content')

_ABSENT = object()


class BadRecord(ValueError):
    """Why a record is not a document; the caller knows where the record is."""


def to_document(record: Any, fields: FieldsConfig, name: str) -> Document:
    """The document of a record. Raises BadRecord if something is wrong with it."""
    if not isinstance(record, dict):
        raise BadRecord(f'the record is {_kind(record)}, not an object')
    group = _optional_text(record, fields.group)
    messages = _messages(record, fields)
    if messages is None:
        _check_text(record, fields)
        return Document(name, text=_text(record, fields.text or 'text', 'text'), group=group)
    tools = tuple(_tools(_find(record, fields.tools)))
    return Document(name, messages=tuple(messages), tools=tools, group=group)


def place_of_document(document: Document) -> float:
    """A document's place by its content, so equal records are on the same side."""
    key = document.text
    if document.messages:
        key = [document.messages, document.tools]
        key = json.dumps(key, sort_keys=True, ensure_ascii=False)
    try:
        return place_of(key.encode())
    except UnicodeEncodeError as error:
        raise BadRecord('not valid Unicode: it has a lone surrogate') from error


def _check_text(record: dict, fields: FieldsConfig) -> None:
    """Raises BadRecord, listing the record's keys, unless there is a text where it should be."""
    if not fields.text and _find(record, 'text') is _ABSENT:
        raise BadRecord(
            'no text, no messages, no conversations, no prompt with completion; it has: '
            f'{", ".join(map(str, record)) or "nothing"}; set config.data.fields.text or .messages'
        )


def _messages(record: dict, fields: FieldsConfig) -> list[dict] | None:
    """The turns of a chat; None if the record is a text."""
    if fields.text:
        return None
    turns = _turns(record, fields)
    if turns is None:
        return None
    system = _optional_text(record, fields.system)
    messages = [{'role': 'system', 'content': system}] if system else []
    messages += [_turn(turn, fields) for turn in turns]
    if not turns:
        raise BadRecord('the chat has no turns')
    return messages


def _turns(record: dict, fields: FieldsConfig) -> list | None:
    if fields.messages:
        return _list(_require(record, fields.messages, 'messages'), fields.messages)
    if fields.prompt or fields.completion:
        return _prompt_and_completion(record, fields)
    for key in ('messages', 'conversations'):
        if record.get(key) is not None:
            return _list(record[key], key)
    if 'prompt' in record and 'completion' in record:
        return _prompt_and_completion(record, fields)
    return None


def _prompt_and_completion(record: dict, fields: FieldsConfig) -> list:
    turns = []
    for role, key, option in (
        ('user', fields.prompt or 'prompt', 'prompt'),
        ('assistant', fields.completion or 'completion', 'completion'),
    ):
        value = _require(record, key, option)
        is_text = isinstance(value, str)
        turns += [{'role': role, 'content': value}] if is_text else _list(value, key)
    return turns


def _turn(turn: Any, fields: FieldsConfig) -> dict:
    if not isinstance(turn, dict):
        raise BadRecord(f'a turn is {_kind(turn)}, not an object')
    written = _first(turn, fields.role, ('role', 'from'), 'role')
    content = _first(turn, fields.content, ('content', 'value'), 'content', default=None)
    role = _role(written, fields)
    if written == 'function_call' and isinstance(content, str):
        return {'role': role, 'content': '', 'tool_calls': _tool_calls(content)}
    calls = turn.get('tool_calls') or turn.get('function_call') or []
    text, parts = _content(content, has_calls=bool(calls))
    made = {'role': role, 'content': text}
    made |= {key: turn[key] for key in KEPT if isinstance(turn.get(key), str)}
    made |= parts
    if calls:
        made['tool_calls'] = _tool_calls(calls)
    return made


def _role(written: Any, fields: FieldsConfig) -> str:
    known = ROLES | fields.roles
    if not isinstance(written, str) or written not in known:
        raise BadRecord(
            f'unknown role {written!r}; known roles: {", ".join(known)}; '
            "map others like config.data.fields.roles={'narrator': 'user'}"
        )
    return known[written]


def _content(content: Any, has_calls: bool) -> tuple[str, dict]:
    """The text of a turn, and the other keys of a turn whose content is a list of parts."""
    if isinstance(content, str):
        return content, {}
    if content is None and has_calls:
        return '', {}
    if not isinstance(content, list):
        raise BadRecord(f'the content of a turn is {_kind(content)}, not a text or a list of parts')
    texts, reasoning, calls = [], [], []
    for part in content:
        kind, value = _part(part)
        {'text': texts, 'reasoning': reasoning, 'tool_call': calls}[kind].append(value)
    more = {}
    if reasoning:
        more['reasoning_content'] = ''.join(reasoning)
    if calls:
        more['tool_calls'] = [call for value in calls for call in _tool_calls(value)]
    return ''.join(texts), more


def _part(part: Any) -> tuple[str, str]:
    if isinstance(part, str):
        return 'text', part
    kind = part.get('type') if isinstance(part, dict) else None
    if kind not in ('text', 'reasoning', 'tool_call'):
        raise BadRecord(f'a part of a turn must be text, reasoning or tool_call, not {kind!r}')
    value = part.get(kind, part.get('text', part.get('value')))
    if not isinstance(value, str):
        raise BadRecord(f'a part of type {kind} has no text')
    return kind, value


def _tool_calls(calls: Any) -> list[dict]:
    """Normalises one call or a list, as JSON text or parsed; arguments in JSON become objects."""
    calls = _parse_json(calls, 'a tool call')
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get('function', call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get('name'), str):
            raise BadRecord(f'a tool call needs a name and arguments, but this is {call!r:.80}')
        arguments = function.get('arguments', {})
        if isinstance(arguments, str):
            arguments = _parse_json(arguments or '{}', 'the arguments of a tool call')
        more = {'id': call['id']} if isinstance(call.get('id'), str) else {}
        function = {'name': function['name'], 'arguments': arguments}
        made.append({**more, 'type': 'function', 'function': function})
    return made


def _tools(tools: Any) -> list[dict]:
    if tools is _ABSENT or not tools:
        return []
    tools = _parse_json(tools, 'tools')
    made = []
    for tool in tools if isinstance(tools, list) else [tools]:
        if not isinstance(tool, dict):
            raise BadRecord(f'a tool is {_kind(tool)}, not an object')
        made.append(tool if 'function' in tool else {'type': 'function', 'function': tool})
    return made


def _parse_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f'{what}: not JSON: {error}') from error


def _find(record: Any, path: str) -> Any:
    """The value at a dotted path; `_ABSENT` if there is none."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for key in path.split('.'):
        if isinstance(record, list) and key.isdigit() and int(key) < len(record):
            record = record[int(key)]
        elif isinstance(record, dict) and key in record:
            record = record[key]
        else:
            return _ABSENT
    return record


def _require(record: dict, path: str, option: str) -> Any:
    value = _find(record, path)
    if value is _ABSENT:
        raise BadRecord(
            f'no field {path}; it has: {", ".join(map(str, record)) or "nothing"}; '
            f'set config.data.fields.{option}'
        )
    return value


def _text(record: dict, path: str, option: str) -> str:
    value = _require(record, path, option)
    if not isinstance(value, str):
        raise BadRecord(f'field {path} is {_kind(value)}, not a text')
    if not value.strip():
        raise BadRecord(f'field {path} is empty')
    return value


def _optional_text(record: dict, path: str) -> str:
    value = _find(record, path) if path else None
    return '' if value is _ABSENT or value is None else str(value)


def _first(turn: dict, given: str, usual: tuple[str, ...], option: str, default: Any = _ABSENT):
    for key in (given,) if given else usual:
        if key in turn:
            return turn[key]
    if default is not _ABSENT and not given:
        return default
    raise BadRecord(
        f'a turn has no {given or " or ".join(usual)}; it has: {", ".join(map(str, turn))}; '
        f'set config.data.fields.{option}'
    )


def _list(value: Any, path: str) -> list:
    value = _parse_json(value, f'field {path}')
    if not isinstance(value, list):
        raise BadRecord(f'field {path} is {_kind(value)}, not a list of turns')
    return value


def _kind(value: Any) -> str:
    names = {dict: 'an object', list: 'a list', str: 'a text', type(None): 'null'}
    return names.get(type(value), f'{value!r:.40}')
