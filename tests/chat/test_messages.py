import pytest

from jaxfm.chat.messages import CallForm, make_view, prepare_messages, wrap_tool
from jaxfm.chat.template import TEMPLATES
from jaxfm.errors import DataError

CALLS = [{'function': {'name': name, 'arguments': '{"a": "ü"}'}} for name in ('add', 'sum')]
CHAT = [
    {'role': 'user', 'content': 'x', 'name': None, 'tool_calls': None, 'tool_call_id': None},
    {'role': 'assistant', 'content': '', 'tool_calls': CALLS},
    {'role': 'tool', 'content': '1', 'tool_calls': []},
    {'role': 'tool', 'content': '2', 'tool_call_id': 'mine'},
]


def test_absent_fields_of_a_table_are_dropped():
    user, _, tool, _ = prepare_messages(CHAT, CallForm(False, ''))
    assert user == {'role': 'user', 'content': 'x'}
    assert 'tool_calls' not in tool


def test_tool_answers_carry_the_id_and_name_of_their_call():
    _, message, first, second = prepare_messages(CHAT, CallForm(False, ''))
    assert [call['id'] for call in message['tool_calls']] == ['000000000', '000000001']
    assert (first['tool_call_id'], first['name']) == ('000000000', 'add')
    assert (second['tool_call_id'], second['name']) == ('mine', 'sum')


@pytest.mark.parametrize('given', ['{"a": "ü"}', {'a': 'ü'}])
def test_arguments_take_the_requested_form(given):
    message = CHAT[1] | {'tool_calls': [{'name': 'add', 'arguments': given}]}
    as_object, as_text = CallForm(False, None), CallForm(True, '')
    for form, arguments in ((as_object, {'a': 'ü'}), (as_text, '{"a": "ü"}')):
        [complete] = prepare_messages([message], form)
        assert complete['tool_calls'][0]['function'] == {'name': 'add', 'arguments': arguments}
        assert complete['content'] == form.empty_content


def test_the_given_messages_are_not_modified():
    before = repr(CHAT)
    prepare_messages(CHAT, CallForm(True, None))
    assert repr(CHAT) == before


@pytest.mark.parametrize(
    'content, words',
    [(None, 'no content'), (7, 'content of type int'), ([], 'content of type list')],
)
def test_a_message_without_a_text_is_named_with_what_it_has(content, words):
    message = {'role': 'user', 'content': content}
    sentence = rf'^message 1 \(user\) has {words}; content must be a string$'
    with pytest.raises(DataError, match=sentence):
        make_view([message], (), TEMPLATES['plain'], None, None)


@pytest.mark.parametrize('tool', ['add', {}, {'function': 'add'}, {'name': 1}])
def test_a_tool_has_a_name(tool):
    with pytest.raises(DataError, match='a tool has no name'):
        wrap_tool(tool)
