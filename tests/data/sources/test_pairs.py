"""Records of chats that are compared: the layouts in which people keep them."""

import json

import pytest

from jaxfm.data import FieldsConfig
from jaxfm.data.sources.records import BadRecord, place_of_document, to_document

HUMAN = {'role': 'user', 'content': 'Which?'}
GOOD, BAD = ({'role': 'assistant', 'content': text} for text in ('This.', 'That.'))
BEFORE = [{'role': 'user', 'content': 'Hi!'}, {'role': 'assistant', 'content': 'Hello.'}]
HH = '\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Which?\n\nAssistant: '


def document(record, **fields):
    return to_document(record, FieldsConfig(**fields), 'name')


@pytest.mark.parametrize(
    'record, fields, given',
    [
        ({'prompt': 'Which?', 'chosen': 'This.', 'rejected': 'That.'}, {}, [HUMAN]),
        ({'prompt': [HUMAN], 'chosen': [GOOD], 'rejected': [BAD]}, {}, [HUMAN]),
        ({'prompt': [HUMAN], 'chosen': 'This.', 'rejected': 'That.'}, {}, [HUMAN]),
        ({'chosen': [HUMAN, GOOD], 'rejected': [HUMAN, BAD]}, {}, [HUMAN]),
        ({'chosen': json.dumps([HUMAN, GOOD]), 'rejected': [HUMAN, BAD]}, {}, [HUMAN]),
        ({'chosen': [*BEFORE, HUMAN, GOOD], 'rejected': [*BEFORE, HUMAN, BAD]}, {}, None),
        ({'prompt': [*BEFORE, HUMAN], 'chosen': [GOOD], 'rejected': [BAD]}, {}, None),
        # UltraFeedback: the prompt is repeated, and `messages` are there too.
        (
            {
                'prompt': 'Which?',
                'chosen': [HUMAN, GOOD],
                'rejected': [HUMAN, BAD],
                'messages': [HUMAN, GOOD],
            },
            {'chosen': 'chosen'},
            [HUMAN],
        ),
        ({'chosen': HH + 'This.', 'rejected': HH + 'That.'}, {}, None),  # HH-RLHF
        ({'prompt': HH, 'chosen': 'This.', 'rejected': 'That.'}, {}, None),
        (
            {'q': 'Which?', 'a': {'best': 'This.', 'worst': 'That.'}},
            {'prompt': 'q', 'chosen': 'a.best', 'rejected': 'a.worst'},
            [HUMAN],
        ),
        (
            {
                'prompt': [{'from': 'human', 'value': 'Which?'}],
                'chosen': [{'from': 'gpt', 'value': 'This.'}],
                'rejected': [{'from': 'gpt', 'value': 'That.'}],
            },
            {},
            [HUMAN],
        ),
        # Keys and roles of one's own; keys without a value, as in Parquet files.
        (
            {
                'prompt': [{'who': 'asker', 'says': 'Which?'}],
                'chosen': [{'who': 'asker', 'says': 'Which?'}, {'who': 'bot', 'says': 'This.'}],
                'rejected': [{'who': 'bot', 'says': 'That.'}],
            },
            {'role': 'who', 'content': 'says', 'roles': {'asker': 'user'}},
            [HUMAN],
        ),
        (
            {
                'prompt': [HUMAN],
                'chosen': [HUMAN | {'tool_calls': None}, GOOD],
                'rejected': [BAD | {'tool_calls': None}],
            },
            {},
            [HUMAN],
        ),
        ({'prompt': ' Which?\n', 'chosen': [HUMAN, GOOD], 'rejected': [HUMAN, BAD]}, {}, [HUMAN]),
        (
            {
                'prompt': json.dumps([HUMAN]),
                'chosen': json.dumps([GOOD]),
                'rejected': json.dumps([BAD]),
            },
            {},
            [HUMAN],
        ),
        (
            {'conversations': [HUMAN], 'chosen': GOOD, 'rejected': BAD},  # one turn, not a list
            {'prompt': 'conversations', 'chosen': 'chosen'},
            [HUMAN],
        ),
        (
            {'prompt': HH, 'chosen': HH + 'This.', 'rejected': HH.replace('\n', '\r\n') + 'That.'},
            {},
            None,
        ),
    ],
)
def test_pairs_of_all_layouts_become_the_same(record, fields, given):
    given = [*BEFORE, HUMAN] if given is None else given
    found = document(record, **fields)
    assert found.kind == 'pair' and found.num_given == len(given)
    assert list(found.messages) == [*given, GOOD] and list(found.rejected) == [*given, BAD]


def test_one_side_alone_is_a_chat():
    found = document({'chosen': HH + 'This.', 'rejected': HH + 'That.'}, messages='chosen')
    assert found.kind == 'chat' and list(found.messages) == [*BEFORE, HUMAN, GOOD]


@pytest.mark.parametrize('prompt', ['Write a dialogue.', [HUMAN], HH])
@pytest.mark.parametrize('answer', ['Human: Hi!\n\nAssistant: Hello.', '[1, 2]', '[Aside] No.'])
def test_an_answer_that_looks_like_turns_is_an_answer(prompt, answer):
    found = document({'prompt': prompt, 'chosen': answer, 'rejected': 'That.'})
    assert found.messages[-1] == {'role': 'assistant', 'content': answer}
    assert found.messages[:-1] == found.rejected[:-1] and found.num_given == len(found.messages) - 1


def test_a_system_turn_belongs_to_both():
    record = {'system': 'Be brief.', 'prompt': 'Which?', 'chosen': 'This.', 'rejected': 'That.'}
    found = document(record, system='system')
    assert found.messages[0] == found.rejected[0] == {'role': 'system', 'content': 'Be brief.'}
    assert found.num_given == 2


def test_a_chat_may_go_on_after_the_other_has_ended():
    more = [HUMAN, {'role': 'assistant', 'content': 'Again.'}]
    found = document({'prompt': [HUMAN], 'chosen': [GOOD, *more], 'rejected': [BAD]})
    assert found.num_given == 1 and len(found.messages) == 4


@pytest.mark.parametrize(
    'record, fields, wanted',
    [
        ({'prompt': 'Which?', 'completion': 'This.', 'label': True}, {}, True),
        ({'prompt': [HUMAN], 'completion': [GOOD], 'label': False}, {}, False),
        ({'messages': [HUMAN, GOOD], 'good': 0}, {'messages': 'messages', 'label': 'good'}, False),
        # Named fields say what a record is: here, a chat.
        (
            {'prompt': 'Which?', 'completion': 'This.', 'label': True},
            {'prompt': 'prompt', 'completion': 'completion'},
            None,
        ),
        ({'prompt': 'Which?', 'completion': 'This.', 'label': 'travel'}, {}, None),
    ],
)
def test_labels_of_chats(record, fields, wanted):
    found = document(record, **fields)
    assert found.is_wanted is wanted and found.messages == (HUMAN, GOOD)
    assert found.num_given == (wanted is not None)
    assert found.kind == ('chat' if wanted is None else 'labelled')


@pytest.mark.parametrize(
    'record, fields, said',
    [
        ({'prompt': 'Which?', 'chosen': 'This.', 'rejected': 'This.'}, {}, 'are equal'),
        ({'prompt': 'Which?', 'chosen': '', 'rejected': 'This.'}, {}, 'chosen does not go on with'),
        ({'prompt': 'Which?', 'chosen': 'This.', 'rejected': ' '}, {}, 'rejected does not go on'),
        ({'chosen': 'This.', 'rejected': 'That.'}, {}, 'chosen is a text without a prompt'),
        ({'chosen': [HUMAN, GOOD], 'rejected': [HUMAN, *BEFORE]}, {}, 'rejected does not go on'),
        ({'chosen': [], 'rejected': [HUMAN, BAD]}, {}, 'the chat has no turns'),
        ({'chosen': 3, 'rejected': [HUMAN, BAD]}, {}, 'field chosen is 3, not a list of turns'),
        (
            {'prompt': 'Who?', 'chosen': [HUMAN, GOOD], 'rejected': [HUMAN, BAD]},
            {},
            'the prompt is not among the turns of chosen',
        ),
        (
            {'prompt': BEFORE, 'chosen': [HUMAN, GOOD], 'rejected': [HUMAN, BAD]},
            {},
            'chosen does not begin with the turns of the prompt',
        ),
        ({'prompt': 'Which?', 'chosen': 'This.'}, {'chosen': 'chosen'}, 'no field rejected'),
        (
            {'prompt': 'Which?', 'chosen': [{'role': ['user'], 'content': ''}], 'rejected': 'a'},
            {},
            r"unknown role \['user'\]",
        ),
        ({'prompt': 'Which?', 'completion': ' ', 'label': True}, {}, 'the answer .* is empty'),
        ({'chosen': 'a', 'rejected': 'b'}, {'prompt': 'q', 'chosen': 'chosen'}, 'no field q'),
        (
            {'messages': [HUMAN, GOOD], 'good': 'yes'},
            {'messages': 'messages', 'label': 'good'},
            'field good is a text, not true or false',
        ),
        (
            {'messages': [HUMAN], 'good': True},
            {'messages': 'messages', 'label': 'good'},
            'must end with an answer of the assistant',
        ),
    ],
)
def test_the_error_says_what_is_wrong_with_a_pair(record, fields, said):
    with pytest.raises(BadRecord, match=said):
        document(record, **fields)


def test_a_prompt_is_on_one_side_whatever_its_answers():
    pairs = [
        {'prompt': 'Which?', 'chosen': 'This.', 'rejected': 'a'},
        {'prompt': 'Which?', 'chosen': 'That.', 'rejected': 'b'},
        {'prompt': 'Which?', 'completion': 'c', 'label': True},
        {'prompt': 'Which?', 'completion': 'd', 'label': False},
    ]
    other = {'prompt': 'Who?', 'chosen': 'This.', 'rejected': 'a'}
    assert len({place_of_document(document(record)) for record in pairs}) == 1
    assert place_of_document(document(other)) != place_of_document(document(pairs[0]))
