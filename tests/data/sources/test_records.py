import gzip
import json

import pytest

from jaxfm.data import FieldsConfig
from jaxfm.data.sources.records import BadRecord, to_document


def document(record, **fields):
    return to_document(record, FieldsConfig(**fields), 'name')


def turns(record, **fields):
    return [(turn['role'], turn['content']) for turn in document(record, **fields).messages]


CHAT = [('user', 'hi'), ('assistant', 'hello')]
OPENAI = [{'role': role, 'content': content} for role, content in CHAT]


@pytest.mark.parametrize(
    'record, fields',
    [
        ({'messages': OPENAI}, {}),
        ({'messages': OPENAI, 'text': 'not this'}, {}),
        ({'messages': json.dumps(OPENAI)}, {}),
        (
            {
                'conversations': [
                    {'from': 'human', 'value': 'hi'},
                    {'from': 'gpt', 'value': 'hello'},
                ]
            },
            {},
        ),
        ({'prompt': 'hi', 'completion': 'hello'}, {}),
        ({'prompt': OPENAI[:1], 'completion': OPENAI[1:]}, {}),
        ({'q': 'hi', 'a': [{'b': 'no'}, {'b': 'hello'}]}, {'prompt': 'q', 'completion': 'a.1.b'}),
        ({'a': {'chat': OPENAI}}, {'messages': 'a.chat'}),
        ({'a.chat': OPENAI}, {'messages': 'a.chat'}),
        (
            {'messages': [{'who': 'me', 'said': 'hi'}, {'who': 'bot', 'said': 'hello'}]},
            {'role': 'who', 'content': 'said', 'roles': {'me': 'user'}},
        ),
    ],
)
def test_chats_of_all_formats_become_the_same_turns(record, fields):
    assert turns(record, **fields) == CHAT


def test_a_text_is_found_by_its_path():
    assert document({'text': 'abc', 'prompt': 'x'}).text == 'abc'
    assert document({'a': [{'b': 'abc'}]}, text='a.0.b').text == 'abc'
    assert document({'text': 'abc', 'kind': 'k'}, group='kind').group == 'k'
    assert document({'text': 'abc', 'messages': OPENAI}, text='text').messages == ()


def test_a_system_text_comes_first_if_there_is_one():
    record = {'messages': OPENAI, 'instruction': 'be kind'}
    assert turns(record, system='instruction') == [('system', 'be kind'), *CHAT]
    assert turns({'messages': OPENAI}, system='instruction') == CHAT


CALL = {'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}
FUNCTION = {'name': 'add', 'arguments': {'a': 1}}


@pytest.mark.parametrize(
    'turn',
    [
        {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
        {'role': 'assistant', 'tool_calls': [FUNCTION]},
        {'role': 'assistant', 'content': '', 'function_call': FUNCTION},
        {'from': 'function_call', 'value': json.dumps(FUNCTION)},
        {'from': 'function_call', 'value': json.dumps([FUNCTION])},
        {
            'role': 'assistant',
            'content': '',
            'tool_calls': [
                {'type': 'function', 'function': {'name': 'add', 'arguments': '{"a": 1}'}}
            ],
        },
        {'role': 'assistant', 'content': [{'type': 'tool_call', 'value': json.dumps(FUNCTION)}]},
    ],
)
def test_tool_calls_of_all_formats_become_what_templates_expect(turn):
    (made,) = document({'messages': [turn]}).messages
    assert made == {'role': 'assistant', 'content': '', 'tool_calls': [CALL]}


def test_parts_of_a_turn_are_joined_and_reasoning_is_kept_apart():
    parts = [{'type': 'reasoning', 'value': 'hm'}, {'type': 'text', 'text': 'a'}, 'b']
    (made,) = document({'messages': [{'role': 'assistant', 'content': parts}]}).messages
    assert made == {'role': 'assistant', 'content': 'ab', 'reasoning_content': 'hm'}


def test_a_turn_of_a_tool_keeps_its_call_id():
    turn = {'role': 'tool', 'content': '3', 'tool_call_id': 'c1', 'name': 'add', 'weight': 0}
    (made,) = document({'messages': [turn]}).messages
    assert made == {'role': 'tool', 'content': '3', 'tool_call_id': 'c1', 'name': 'add'}
    assert turns({'messages': [{'from': 'observation', 'value': '3'}]}) == [('tool', '3')]


def test_tools_are_a_list_or_its_json_and_may_be_absent():
    bare = {'name': 'add', 'parameters': {}}
    whole = {'type': 'function', 'function': bare}
    for tools in ([bare], [whole], json.dumps([bare]), json.dumps(bare)):
        assert document({'messages': OPENAI, 'tools': tools}).tools == (whole,)
    for tools in (None, '', '[]', []):
        assert document({'messages': OPENAI, 'tools': tools}).tools == ()
    assert document({'messages': OPENAI}).tools == ()


@pytest.mark.parametrize(
    'record, fields, said',
    [
        ([1], {}, 'the record is a list, not an object'),
        (
            {'body': 'x', 'id': 1},
            {},
            'no text, no messages, no conversations, no prompt with completion, no chosen with '
            'rejected; it has: body, id; set config.data.fields.text, .messages or .chosen',
        ),
        ({'text': 'x'}, {'text': 'a.0.b'}, 'no field a.0.b; it has: text'),
        ({'text': 3}, {}, 'field text is 3, not a text'),
        ({'text': ' \n'}, {}, 'field text is empty'),
        ({'text': None}, {}, 'field text is null'),
        ({'messages': []}, {}, 'the chat has no turns'),
        ({'messages': 'hi'}, {}, 'field messages: not JSON'),
        ({'messages': {'role': 'user'}}, {}, 'field messages is an object, not a list of turns'),
        ({'prompt': 'x'}, {'prompt': 'prompt'}, 'no field completion'),
        (
            {'messages': [{'role': 'wizard', 'content': 'x'}]},
            {},
            "unknown role 'wizard'; known roles:",
        ),
        ({'messages': [{'role': 'wizard', 'content': 'x'}]}, {}, 'human.*config.data.fields.roles'),
        (
            {'messages': [{'who': 'user', 'content': 'x'}]},
            {},
            'a turn has no role or from; it has:',
        ),
        ({'messages': [{'role': 'user', 'content': None}]}, {}, 'content of a turn is null, not'),
        ({'messages': ['hi']}, {}, 'a turn is a text, not an object'),
        ({'messages': [{'role': 'user', 'content': [{'type': 'image'}]}]}, {}, "not 'image'"),
        ({'messages': [{'from': 'function_call', 'value': 'add(1)'}]}, {}, 'a tool call: not JSON'),
        ({'messages': [{'from': 'function_call', 'value': '[3]'}]}, {}, 'a name and arguments'),
        ({'messages': OPENAI, 'tools': '[{'}, {}, 'tools: not JSON'),
        ({'messages': OPENAI, 'tools': [3]}, {}, 'a tool is 3, not an object'),
    ],
)
def test_the_error_says_what_is_wrong_with_a_record(record, fields, said):
    with pytest.raises(BadRecord, match=said):
        document(record, **fields)


@pytest.mark.parametrize(
    'path, fields, count',
    [
        ('sft_oasst_sample/chat_best_path', {}, 100),
        ('sft_toolcall_chat/glaive_toolcall', {}, 300),
        ('sft_toolcall_chat/reason_tool_use', {}, 50),
        (
            'sft_self_instruct/seed_tasks',
            {'prompt': 'instruction', 'completion': 'instances.0.output'},
            175,
        ),
    ],
)
def test_real_chats_are_read(shared_data, path, fields, count):
    with gzip.open(shared_data / f'{path}.jsonl.gz', 'rt', encoding='utf-8') as file:
        documents = [document(json.loads(line), **fields) for line in file]
    assert len(documents) == count
    for one in documents:
        assert one.messages[-1]['role'] == 'assistant'
        assert all(isinstance(turn['content'], str) for turn in one.messages)
    if 'toolcall' in path:
        calls = [
            call
            for one in documents
            for turn in one.messages
            for call in turn.get('tool_calls', ())
        ]
        assert all(isinstance(call['function']['arguments'], dict) for call in calls)
        assert len(calls) > 40 and sum(len(one.tools) for one in documents) > 90
