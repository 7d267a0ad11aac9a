"""The chat templates of real models, on random chats."""

import functools
import random
import re

import pytest

from jaxfm.chat.render import Chat
from jaxfm.errors import DataError
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import SPECIAL_TOKENS, Bytes

TEMPLATES = 55

# Special tokens in a template's text; placeholders such as <name> are not among them.
SPECIAL = re.compile(
    r"<[|｜][^\s'\"<>{}]+[|｜]>|<(?:start|end)_of_turn>|<_\w+>|<turn\|>|<\|turn>|\[/?[A-Z_]{3,}\]"
    r'|</?think>|</?tool_call>'
)

# End-of-turn tokens: if a template has one, every answer ends with it.
ENDS = re.compile(r'<\|im_end\|>|<end_of_turn>|<\|eot_id\|>|<\|eot\|>|<\|end\|>|<turn\|>')
# Templates that write bos before every question, as in the training of their models.
MANY_BEGINNINGS = {'ct_llama-2-chat', 'ct_saiga'}
# The assistant itself writes the rest of the header, because it names the recipient.
RECIPIENT = {'vllm_tool_chat_template_muse_glimmer': 'to=user<|message|>'}
# Expects the model to write a thought, even an empty one, before its last answer.
EMPTY_THOUGHT = {'vllmrust_qwen3': '<think>\n\n</think>\n\n'}
# Templates that do not support a system message, or drop it once the question is answered.
NO_SYSTEM = {
    'vllm_template_chatglm',
    'vllm_template_chatglm2',
    'vllm_template_falcon',
    'vllm_tool_chat_template_glm4',
    'vllm_tool_chat_template_granite_20b_fc',
    'vllm_tool_chat_template_mistral',
    'vllm_tool_chat_template_mistral_parallel',
}
# Earlier answers lose the empty thought that the generation prompt ends with.
NO_PROMPT_OF_EARLIER_TURNS = {'vllmrust_qwen35'}
# The white space before a call differs from that before an answer, so no prompt leads to both.
NO_PROMPT_OF_CALLS = {
    'vllm_tool_chat_template_deepseekv31',
    'vllm_tool_chat_template_granite_20b_fc',
    'vllm_tool_chat_template_llama4_json',
    'vllm_tool_chat_template_mistral_parallel',
}
# Tools are listed in the system message only.
TOOLS_BY_SYSTEM = {'vllm_tool_chat_template_functiongemma'}
WITH_TOOLS = {
    'apertus', 'deepseekr1', 'deepseekv3', 'deepseekv31', 'functiongemma', 'gemma3_pythonic',
    'gemma4', 'granite', 'granite_20b_fc', 'hermes', 'internlm2_tool', 'llama3.1_json',
    'llama3.2_json', 'llama3.2_pythonic', 'llama4_json', 'llama4_pythonic', 'mistral', 'mistral3',
    'mistral_parallel', 'muse_glimmer', 'phi4_mini', 'qwen3coder', 'toolace', 'xlam_llama',
    'xlam_qwen',
}  # fmt: skip
WITH_TOOLS = {f'vllm_tool_chat_template_{name}' for name in WITH_TOOLS} | {
    'ct_qwen2.5-instruct',
    'vllmrust_qwen3',
    'vllmrust_qwen35',
}

TOOLS = [
    {
        'type': 'function',
        'function': {
            'name': 'get_weather',
            'description': 'The weather of a city.',
            'parameters': {
                'type': 'object',
                'properties': {'city': {'type': 'string', 'description': 'Its name.'}},
                'required': ['city'],
            },
        },
    }
]


@functools.cache
def encoder(path, with_special: bool = True):
    """A byte tokenizer with the template's special tokens, and its Chat."""
    special = set(SPECIAL.findall(path.read_text('utf-8'))) - set(SPECIAL_TOKENS)
    config = BytesConfig(
        special_tokens=sorted(special) if with_special else [], chat_template=str(path)
    )
    coder = Bytes(config, [])
    return coder, Chat(coder)


@pytest.fixture(scope='module')
def paths(shared_data):
    found = {path.stem: path for path in sorted(shared_data.glob('chat_templates/*.jinja'))}
    assert len(found) == TEMPLATES
    return found


def text(draw: random.Random, words: str, special) -> str:
    """Random words, sometimes with a special token spelled among them."""
    chosen = draw.choices(words.split(), k=draw.randrange(1, 9))
    if special and draw.random() < 0.4:
        chosen.insert(draw.randrange(len(chosen) + 1), draw.choice(sorted(special)))
    return draw.choice([' ', '\n', ', ']).join(chosen)


QUESTIONS = 'ΑΒΓ ΔΕ ΖΗΘ? ΙΚ ΛΜΝ! "ΞΟ" ΠΡ.'
ANSWERS = 'An Zero qué wörd "quoted" it\'s 4,2 (so) <b> {x} 漢字 \U0001f600'


def random_chat(draw, special, turns: int, system: bool = False) -> list[dict]:
    messages = [{'role': 'system', 'content': text(draw, 'ΣΣ ΤΥ ΦΧ', special)}] * system
    for _ in range(turns):
        messages.append({'role': 'user', 'content': text(draw, QUESTIONS, special)})
        messages.append({'role': 'assistant', 'content': text(draw, ANSWERS, special)})
    return messages


def spans(coder, ids, mask) -> list[list[int]]:
    """The runs of supervised ids."""
    found = [[]]
    for i, is_assistant in zip(ids.tolist(), mask.tolist()):
        if is_assistant:
            found[-1].append(i)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def produced_by(coder, name, run) -> str:
    """The text of a run, without what some templates write before every answer."""
    said = coder.decode(run, skip_special_tokens=False).strip()
    return said.removeprefix(RECIPIENT.get(name, '')).removeprefix(EMPTY_THOUGHT.get(name, ''))


def check_answers(coder, name, messages, ids, mask):
    """Asserts that the supervised runs are exactly the answers with their end-of-turn tokens."""
    answers = [m['content'] for m in messages if m['role'] == 'assistant']
    runs = spans(coder, ids, mask)
    assert len(runs) == len(answers)
    allowed = (name in RECIPIENT) + 2 * (name in EMPTY_THOUGHT)
    for run, answer in zip(runs, answers):
        produced = produced_by(coder, name, run)
        assert produced.startswith(answer)
        rest = produced.removeprefix(answer).strip()
        assert rest in {'', *coder.special_tokens}
        assert rest in ENDS.findall(coder.chat_template) or not ENDS.search(coder.chat_template)
        # A special token that is spelled in a text is encoded as characters.
        assert sum(i in coder.special_tokens.values() for i in run) <= 1 + allowed
    assert runs[-1][-1] in Chat(coder).stop_ids
    others = coder.decode(ids[~mask], skip_special_tokens=False)
    for message in messages:
        if message['role'] != 'assistant':
            assert all(word in others for word in message['content'].split())


def check_prompts(encode, messages, ids, mask, tools=(), turns=None):
    """Asserts that the prompt before an answer is the chat's prefix up to the answer."""
    answers = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
    for i in answers[-turns:] if turns else answers:
        prompt = encode.prompt(messages[:i], tools)
        assert ids[: len(prompt)].tolist() == prompt
        assert mask[len(prompt)]


def test_supervised_text_is_exactly_the_answers_of_random_chats(paths):
    draw = random.Random(0)
    for name, path in paths.items():
        coder, encode = encoder(path)
        special = coder.special_tokens.keys()
        for turns in (1, 1, 2, 3):
            messages = random_chat(draw, special, turns)
            ids, mask = encode.encode(messages)
            if name == 'ct_falcon-instruct':  # which joins paragraphs
                assert '\n\n' not in ''.join(m['content'] for m in messages)
            check_answers(coder, name, messages, ids, mask)
            last = 1 if name in NO_PROMPT_OF_EARLIER_TURNS else None
            check_prompts(encode, messages, ids, mask, turns=last)
            beginnings = (ids == coder.bos_id).sum()
            assert beginnings == 1 or name in MANY_BEGINNINGS


def test_a_system_message_is_a_part_of_the_prompt_or_refused(paths):
    draw = random.Random(1)
    for name, path in paths.items():
        coder, encode = encoder(path)
        for turns in (1, 2):
            messages = random_chat(draw, coder.special_tokens.keys(), turns, system=True)
            if name in NO_SYSTEM:
                with pytest.raises(DataError, match='leaves out message 1|refuses this chat'):
                    encode.encode(messages)
                continue
            ids, mask = encode.encode(messages)
            check_answers(coder, name, messages, ids, mask)
            last = 1 if name in NO_PROMPT_OF_EARLIER_TURNS else None
            check_prompts(encode, messages, ids, mask, turns=last)


def test_without_its_special_tokens_a_template_is_text_and_a_chat_ends_with_eos(paths):
    draw = random.Random(2)
    for name, path in paths.items():
        coder, encode = encoder(path, with_special=False)
        messages = random_chat(draw, (), 2)
        ids, mask = encode.encode(messages)
        assert ids[-1] == coder.eos_id and mask[-1]
        marks = set()
        for run, message in zip(spans(coder, ids, mask), messages[1::2]):
            produced = produced_by(coder, name, run).removesuffix('<|eos|>')
            assert produced.startswith(message['content'])
            marks.add(produced.removeprefix(message['content']).strip())
        assert len(marks) == 1
        assert not re.search('user|assistant|model', marks.pop(), re.IGNORECASE)


def tool_chat(draw) -> list[dict]:
    city = draw.choice(['Rome', 'Zürich', 'New York'])
    call = {'name': 'get_weather', 'arguments': f'{{"city": "{city}"}}'}
    return [
        {'role': 'user', 'content': text(draw, QUESTIONS, ())},
        {'role': 'assistant', 'content': '', 'tool_calls': [{'function': call}]},
        {'role': 'tool', 'content': '{"ΩΨ": 20}'},
        {'role': 'assistant', 'content': text(draw, ANSWERS, ())},
    ]


def test_tool_calls_are_supervised_and_tool_answers_are_not(paths):
    draw = random.Random(3)
    for name in sorted(WITH_TOOLS):
        coder, encode = encoder(paths[name])
        messages = tool_chat(draw)
        if name in TOOLS_BY_SYSTEM:
            with pytest.raises(DataError, match='leaves out the tool get_weather'):
                encode.encode(messages, TOOLS)
            messages = [{'role': 'system', 'content': 'ΣΣ'}, *messages]
        ids, mask = encode.encode(messages, TOOLS)
        call, answer = (produced_by(coder, name, run) for run in spans(coder, ids, mask))
        city = messages[-3]['tool_calls'][0]['function']['arguments'].split('"')[3]
        assert 'get_weather' in call and city in call
        assert 'ΩΨ' not in call + answer
        assert answer.startswith(messages[-1]['content'])
        others = coder.decode(ids[~mask])
        assert 'ΩΨ' in others and 'The weather of a city.' in others
        last = 1 if name in NO_PROMPT_OF_CALLS | NO_PROMPT_OF_EARLIER_TURNS else None
        check_prompts(encode, messages, ids, mask, TOOLS, turns=last)


def test_a_template_without_tools_refuses_them(paths):
    for name in sorted(paths.keys() - WITH_TOOLS):
        with pytest.raises(DataError, match='tool'):
            encoder(paths[name])[1].encode(tool_chat(random.Random(4)), TOOLS)


def test_thoughts_are_supervised_where_they_are_written(paths):
    coder, encode = encoder(paths['vllmrust_qwen3'])
    messages = [
        {'role': 'user', 'content': 'ΑΒ'},
        {'role': 'assistant', 'content': 'one', 'reasoning_content': 'first thought'},
        {'role': 'user', 'content': 'ΓΔ'},
        {'role': 'assistant', 'content': 'two', 'reasoning_content': 'second thought'},
    ]
    ids, mask = encode.encode(messages)
    assert [coder.decode(run, False) for run in spans(coder, ids, mask)] == [
        'one<|im_end|>',
        '<think>\nsecond thought\n</think>\n\ntwo<|im_end|>',
    ]
    check_prompts(encode, messages, ids, mask)
