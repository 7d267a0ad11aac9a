"""What probing finds out about templates: the built-in ones, and small ones with one oddity."""

import dataclasses

import pytest

from jaxfm.chat.messages import CallForm
from jaxfm.chat.template import TEMPLATES
from jaxfm.chat.traits import TemplateTraits, probe
from jaxfm.errors import DataError
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import Bytes

TOKENIZER = Bytes(BytesConfig(special_tokens=['<|im_start|>', '<|im_end|>']), texts=[])
# Traits of a template that writes only a header before each message and an end-of-turn token after.
USUAL = TemplateTraits(
    gives_none=True,
    asks_late=False,
    suffix='|\n',
    mark='|',
    has_prompt=True,
    call_form=None,
)
EACH = """{%- for message in messages %}{{ message.role + ': ' + message.content + '|\\n' }}"""
PROMPT = """{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def changed(**values):
    return dataclasses.replace(USUAL, **values)


@pytest.mark.parametrize(
    'name, wanted',
    [
        ('plain', changed(suffix='<|eos|>\n\n', mark='<|eos|>', call_form=CallForm(False, ''))),
        (
            'chatml',
            changed(suffix='<|im_end|>\n', mark='<|im_end|>', call_form=CallForm(False, '')),
        ),
        ('qa', changed(suffix='<|eos|>\n', mark='<|eos|>')),
    ],
)
def test_traits_of_the_built_in_templates(name, wanted):
    assert probe(TEMPLATES[name], TOKENIZER) == wanted


@pytest.mark.parametrize(
    'template, wanted',
    [
        (EACH + PROMPT, USUAL),
        (EACH + '{% endfor %}', changed(has_prompt=False)),
        # None has no length.
        (EACH + PROMPT + '{% if tools is defined and tools | length %}{% endif %}', 'no none'),
        # The end of a turn belongs to the header of the next one.
        (
            """{%- for message in messages %}{{ message.role + ': ' + message.content }}
            {%- if not loop.last or add_generation_prompt %}{{ '|\\n' }}{% endif %}{% endfor %}
            {%- if add_generation_prompt and messages[-1].role == 'user' %}
            {{- 'assistant: ' }}{% endif %}""",
            changed(asks_late=True),
        ),
        # Nothing ends a turn: the text after the last turn does not follow the earlier ones.
        (EACH.replace('|', '') + PROMPT + '.', changed(suffix='\n.', mark='')),
        # Calls as text.
        (
            EACH + "{% for call in message.tool_calls or [] %}{{ call.function.name + ' ' + "
            'call.function.arguments }}{% endfor %}' + PROMPT,
            changed(call_form=CallForm(True, '')),
        ),
        # A dict would be written as its Python repr.
        (
            EACH + '{% for call in message.tool_calls or [] %}{{ call.function.name }}'
            '{{ call.function.arguments }}{% endfor %}' + PROMPT,
            changed(call_form=CallForm(True, '')),
        ),
    ],
    ids=['usual', 'no prompt', 'no none', 'late', 'no mark', 'calls as text', 'calls as JSON'],
)
def test_each_oddity_of_a_template_is_found(template, wanted):
    wanted = changed(gives_none=False) if wanted == 'no none' else wanted
    assert probe(template, TOKENIZER) == wanted


def test_a_template_without_answers_is_an_error():
    with pytest.raises(DataError, match="the chat template leaves out the assistant's answer"):
        probe('{{ messages[0].content }}', TOKENIZER)


def test_traits_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        probe(TEMPLATES['plain'], TOKENIZER).mark = ''
