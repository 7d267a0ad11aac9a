"""Turns a record of a file into a document: finds its fields and normalises its turns.

Chats come in the formats of OpenAI ({'role', 'content', 'tool_calls'}), ShareGPT ({'from',
'value'}) and TRL ({'prompt', 'completion'}). All become turns of {'role', 'content', ...}, with
tool calls as chat templates expect: {'type': 'function', 'function': {'name', 'arguments': {...}}}.

Pairs of a better and a worse chat come in the layouts of TRL ({'prompt', 'chosen', 'rejected'}, or
without 'prompt'), UltraFeedback ('prompt' is a text that the chats begin with) and HH-RLHF (texts
with the turns '\n\nHuman:' and '\n\nAssistant:').
"""

import json
import re
from collections.abc import Sequence
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
    tools = tuple(_tools(_find(record, fields.tools)))
    if _is_pair(record, fields):
        chosen, rejected, num_given = _pair(record, fields)
        return Document(
            name, messages=chosen, tools=tools, group=group, rejected=rejected, num_given=num_given
        )
    messages = _messages(record, fields)
    if messages is None:
        _check_text(record, fields)
        return Document(name, text=_text(record, fields.text or 'text', 'text'), group=group)
    messages, label = tuple(messages), _label(record, fields)
    if label is None:
        return Document(name, messages=messages, tools=tools, group=group)
    num_given = len(messages) - _num_last(messages)
    return Document(
        name, messages=messages, tools=tools, group=group, is_wanted=label, num_given=num_given
    )


def place_of_document(document: Document) -> float:
    """A document's place by its content, so equal records are on the same side.

    Chats that are compared go by what is given: no prompt is both trained on and held out.
    """
    key = document.text
    if document.messages:
        key = [document.messages[: document.num_given or None], document.tools]
        key = json.dumps(key, sort_keys=True, ensure_ascii=False)
    try:
        return place_of(key.encode())
    except UnicodeEncodeError as error:
        raise BadRecord('not valid Unicode: it has a lone surrogate') from error


def _check_text(record: dict, fields: FieldsConfig) -> None:
    """Raises BadRecord, listing the record's keys, unless there is a text where it should be."""
    if not fields.text and _find(record, 'text') is _ABSENT:
        raise BadRecord(
            'no text, no messages, no conversations, no prompt with completion, no chosen with '
            f'rejected; it has: {", ".join(map(str, record)) or "nothing"}; '
            'set config.data.fields.text, .messages or .chosen'
        )


def _messages(record: dict, fields: FieldsConfig) -> list[dict] | None:
    """The turns of a chat; None if the record is a text."""
    if fields.text:
        return None
    turns = _turns(record, fields)
    return None if turns is None else _complete(record, turns, fields)


def _complete(record: dict, turns: list, fields: FieldsConfig) -> list[dict]:
    """The turns, normalised, after the system turn of the record if it has one."""
    if not turns:
        raise BadRecord('the chat has no turns')
    return _system(record, fields) + [_turn(turn, fields) for turn in turns]


def _system(record: dict, fields: FieldsConfig) -> list[dict]:
    """The system turn of the record, if it has one of its own."""
    system = _optional_text(record, fields.system)
    return [{'role': 'system', 'content': system}] if system else []


def _names_nothing(fields: FieldsConfig) -> bool:
    """Whether the record is recognised by its own keys."""
    return not any((fields.text, fields.messages, fields.prompt, fields.completion, fields.chosen))


def _is_pair(record: dict, fields: FieldsConfig) -> bool:
    if fields.chosen or fields.rejected:
        return True
    others = {'messages', 'conversations', 'text', 'completion'}
    is_plain = _names_nothing(fields) and all(record.get(key) is None for key in others)
    return is_plain and 'chosen' in record and 'rejected' in record


def _pair(record: dict, fields: FieldsConfig) -> tuple[tuple[dict, ...], tuple[dict, ...], int]:
    """-> the better chat, the worse one, and with how many equal turns they begin."""
    key = fields.prompt or 'prompt'
    prompt = _find(record, key)
    if prompt is _ABSENT:
        if fields.prompt:
            _require(record, key, 'prompt')
        prompt = None
    sides = []
    for name, key in (
        ('chosen', fields.chosen or 'chosen'),
        ('rejected', fields.rejected or 'rejected'),
    ):
        turns = _side(_require(record, key, name), prompt, fields, key)
        if not turns:
            raise BadRecord('the chat has no turns')
        sides.append((*_system(record, fields), *turns))
    chosen, rejected = sides
    if chosen == rejected:
        raise BadRecord('chosen and rejected are equal')
    num_given = 0
    # The last turns differ, or one chat goes on after the other ends.
    most = min(len(chosen), len(rejected)) - 1
    while num_given < most and chosen[num_given] == rejected[num_given]:
        num_given += 1
    for key, side in (('chosen', chosen), ('rejected', rejected)):
        _check_answer(side[num_given:], key)
    return chosen, rejected, num_given


def _check_answer(turns: tuple[dict, ...], key: str) -> None:
    """Raises BadRecord unless what is compared has something that the assistant says."""
    if not turns or turns[0]['role'] != 'assistant' or not _says_something(turns):
        raise BadRecord(
            f'{key} does not go on with an answer of the assistant after the turns that both sides '
            'have'
        )


def _says_something(turns: Sequence[dict]) -> bool:
    answers = [turn for turn in turns if turn['role'] == 'assistant']
    return any(turn['content'].strip() or turn.get('tool_calls') for turn in answers)


def _side(value: Any, prompt: Any, fields: FieldsConfig, key: str) -> list[dict]:
    """The turns of one side of a pair, with those of the prompt, normalised."""
    given = None if prompt is None else _read_turns(prompt, fields, 'prompt')
    if isinstance(prompt, str) and given is None:
        given = [{'role': 'user', 'content': prompt}]
    turns = _read_turns(value, fields, key)
    if given is None and turns is None:
        raise BadRecord(f'field {key} is a text without a prompt; set config.data.fields.prompt')
    if given is None:
        return turns
    if turns is not None and (turns[: len(given)] == given or _repeats(turns, prompt)):
        return turns  # a chat that repeats its prompt, as in UltraFeedback
    if isinstance(value, str) and (turns is None or _HUMAN.match(value)):
        # An answer may be a dialogue itself, with the same words before each turn.
        return given + [{'role': 'assistant', 'content': value}]
    if not turns or turns[0]['role'] == 'assistant':
        return given + turns if turns else []
    if isinstance(prompt, str):
        raise BadRecord(f'the prompt is not among the turns of {key}')
    raise BadRecord(f'{key} does not begin with the turns of the prompt')


def _repeats(turns: list[dict], prompt: Any) -> bool:
    """Whether one of the turns is the prompt, if that is a text."""
    says = [turn['content'].strip() for turn in turns]
    return isinstance(prompt, str) and prompt.strip() in says


def _read_turns(value: Any, fields: FieldsConfig, key: str) -> list[dict] | None:
    """The turns of a chat, normalised; None if it is a text without turns."""
    if isinstance(value, str) and _HUMAN.match(value):
        return _split_turns(value)
    if isinstance(value, str):
        value = _turns_as_json(value, fields)
        if value is None:
            return None
    turns = [value] if isinstance(value, dict) else _list(value, key)
    return [_turn(turn, fields) for turn in turns]


def _turns_as_json(text: str, fields: FieldsConfig) -> list | None:
    """The turns that a text spells, if it is a list of turns in JSON."""
    try:
        value = json.loads(text) if text.lstrip()[:1] == '[' else None
    except (ValueError, RecursionError):
        return None
    roles = {fields.role} if fields.role else {'role', 'from'}
    is_chat = isinstance(value, list) and all(
        isinstance(turn, dict) and roles & turn.keys() for turn in value
    )
    return value if value and is_chat else None


_HUMAN = re.compile(r'\s*Human: ?')
_SPEAKER = re.compile(r'(?:\r?\n){2}(Human|Assistant): ?')


def _split_turns(text: str) -> list[dict]:
    """The turns of a text as in HH-RLHF: '\n\nHuman: Hi!\n\nAssistant: Hello.'."""
    parts = _SPEAKER.split('\n\n' + text.lstrip())
    roles = {'Human': 'user', 'Assistant': 'assistant'}
    turns = [
        {'role': roles[name], 'content': content.strip()}
        for name, content in zip(parts[1::2], parts[2::2])
    ]
    if turns[-1]['role'] == 'assistant' and not turns[-1]['content']:
        del turns[-1]  # a prompt that ends with 'Assistant:'
    return turns


def _label(record: dict, fields: FieldsConfig) -> bool | None:
    """Whether the record's completion is wanted; None if it does not say."""
    key = fields.label
    if not key:
        is_plain = _names_nothing(fields) and 'completion' in record
        return record['label'] if is_plain and isinstance(record.get('label'), bool) else None
    value = _require(record, key, 'label')
    if value not in (True, False):  # 0 and 1 are equal to these
        raise BadRecord(f'field {key} is {_kind(value)}, not true or false')
    return bool(value)


def _num_last(messages: tuple[dict, ...]) -> int:
    """How many turns at the end are the assistant's, or answers of its tools."""
    count = 0
    for message in reversed(messages):
        if message['role'] not in ('assistant', 'tool'):
            break
        count += 1
    if not count or messages[-count]['role'] != 'assistant':
        raise BadRecord('a chat with a label must end with an answer of the assistant')
    if not _says_something(messages[-count:]):
        raise BadRecord('the answer of a chat with a label is empty')
    return count


def _turns(record: dict, fields: FieldsConfig) -> list | None:
    if fields.messages:
        value = _require(record, fields.messages, 'messages')
        if isinstance(value, str) and _HUMAN.match(value):
            return _split_turns(value)
        return _list(value, fields.messages)
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
