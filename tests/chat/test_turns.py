"""Turns that follow a sampled answer: ids as the template would have written them, or a refusal."""

import pytest

from jaxfm.chat.render import Chat
from jaxfm.errors import DataError
from tests.chat.test_render import ANSWER, CHATML, QUESTION, bytes_with
from tests.chat.test_render import of_text as of_text
from tests.chat.test_templates import encoder
from tests.chat.test_templates import paths as paths

FUNCTION = {'name': 'calculator', 'arguments': {'expression': '2+2'}}
CALL = {'role': 'assistant', 'content': '', 'tool_calls': [{'function': FUNCTION}]}
SAID = ['46', 'two\nlines', '<|im_end|> is text', 'é "quoted" {brackets}']


def check_same_as_rendered(chat: Chat, role: str, tools=(), answer=ANSWER):
    """Sampled ids and the ids of turns together are those of the whole chat."""
    messages = [QUESTION]
    ids = chat.prompt(messages, tools)
    for content in SAID:
        messages += [answer]
        whole, mask = chat.encode(messages, tools)
        assert whole[: len(ids)].tolist() == ids
        assert mask[len(ids) :].all()
        ids = [*whole.tolist(), *chat.turn_ids(role, content, tools)]
        messages += [{'role': role, 'content': content}]
        assert chat.prompt(messages, tools) == ids


@pytest.mark.parametrize('template, role', [('plain', 'tool'), ('plain', 'user'), ('qa', 'user')])
def test_ids_of_our_templates_are_those_of_the_whole_chat(template, role):
    chat = Chat(bytes_with(template))
    chat.check_turns(role)
    check_same_as_rendered(chat, role)


@pytest.mark.parametrize('role', ['tool', 'user'])
def test_a_tool_may_spell_special_tokens(role):
    chat = Chat(bytes_with('chatml', *CHATML))
    tools = [{'name': 'calculator', 'description': 'Computes.'}]
    chat.check_turns(role, tools)
    check_same_as_rendered(chat, role, tools)


def test_a_template_without_the_role_is_refused():
    with pytest.raises(DataError, match='qa has no role tool'):
        Chat(bytes_with('qa')).check_turns('tool')


DROPS_THOUGHTS = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
COUNTS = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + ' ' + loop.index|string + '\\n' }}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{{ messages|length + 1 }}{{ '\\n' }}
{%- endif %}"""
NO_MARK = """\
{%- for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


@pytest.mark.parametrize(
    'template, told',
    [
        (DROPS_THOUGHTS, 'writes earlier turns, or their thoughts, in another form'),
        (COUNTS, 'writes earlier turns, or their thoughts, in another form'),
        (NO_MARK, 'ends turns without a special token'),
    ],
)
def test_a_template_that_does_not_keep_what_was_sampled_is_refused(of_text, template, told):
    with pytest.raises(DataError, match=told):
        of_text(template, *CHATML).check_turns('user')


def test_real_templates_agree_with_the_whole_chat_or_are_refused(paths):
    """Of 55, most are accepted in one role at least, and none whose ids would differ."""
    accepted = {}
    for name, path in paths.items():
        _, chat = encoder(path)
        for role in ('tool', 'user'):
            try:
                chat.check_turns(role)
            except DataError:
                continue
            has_calls = role == 'tool' and chat._traits.call_form is not None
            check_same_as_rendered(chat, role, answer=CALL if has_calls else ANSWER)
            accepted.setdefault(role, []).append(name)
    assert {role: len(names) for role, names in accepted.items()} == {'tool': 19, 'user': 40}
