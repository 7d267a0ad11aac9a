import random

import pytest

from jaxfm.data.documents import Document
from jaxfm.errors import DataError
from jaxfm.tasks import TASKS, ExactAnswerConfig
from jaxfm.tasks.exact_answer import ExactAnswer


def turn(role, content, **rest):
    return {'role': role, 'content': content, **rest}


def chat(name, question='How much?', answer='Ten', group=''):
    messages = (turn('user', question), turn('assistant', answer))
    return Document(name=name, messages=messages, group=group)


def task(documents, **options):
    return ExactAnswer(ExactAnswerConfig(**options), documents)


def judge(answer='Ten apples'):
    one = task([chat('a', answer=answer)])
    return one, one.prompts()[0]


def many(**sizes):
    return [
        chat(f'{group}:{i}', f'{group} {i}?', str(i), group)
        for group, size in sizes.items()
        for i in range(size)
    ]


def test_the_registry_has_the_task():
    entry = TASKS['exact_answer']
    assert entry.load() is ExactAnswer and entry.schema is ExactAnswerConfig


def test_a_prompt_is_the_chat_before_its_last_assistant_turn():
    before = (turn('system', 'Be brief.'), turn('user', 'a'), turn('assistant', 'b'))
    tools = ({'name': 'look'},)
    document = Document(
        name='talk:1',
        messages=(*before, turn('user', 'c'), turn('assistant', ' d\n'), turn('user', 'thanks')),
        tools=tools,
        group='talk',
    )
    (prompt,) = task([document]).prompts()
    assert prompt.messages == (*before, turn('user', 'c')) and prompt.tools == tools
    assert (prompt.id, prompt.group, prompt.answer) == ('talk:1', 'talk', 'd')
    assert prompt.text == 'system: Be brief.\nuser: a\nassistant: b\nuser: c'


def test_no_prompt_shows_its_answer():
    for prompt in task(many(a=30), num_prompts=30).prompts():
        assert all(message['role'] != 'assistant' for message in prompt.messages)


def test_prompts_are_spread_evenly_over_the_groups():
    prompts = task(many(large=50, medium=20, small=3), num_prompts=33).prompts()
    counts = [sum(one.group == group for one in prompts) for group in ('large', 'medium', 'small')]
    assert counts == [15, 15, 3]
    assert len({one.id for one in prompts}) == 33


def test_prompts_do_not_depend_on_the_order_or_number_of_documents():
    documents = many(a=40, b=40)
    prompts = task(documents, num_prompts=50).prompts()
    assert task(random.Random(0).sample(documents, 80), num_prompts=50).prompts() == prompts
    assert task(documents, num_prompts=10).prompts() == prompts[:10]
    assert len(task(documents, num_prompts=1000).prompts()) == 80


def test_a_question_asked_twice_counts_once():
    documents = [chat('a:1'), chat('a:2'), chat('a:3', 'And now?')]
    assert len(task(documents).prompts()) == 2
    assert task(documents[::-1]).prompts() == task(documents).prompts()


def test_chats_without_an_answer_give_no_prompt():
    calls = [{'function': {'name': 'look', 'arguments': {}}}]
    silent = Document(
        name='b', messages=(turn('user', 'x'), turn('assistant', '', tool_calls=calls))
    )
    unanswered = Document(name='c', messages=(turn('user', 'x'),))
    prompts = task([chat('a'), silent, unanswered, Document(name='d', text='x')]).prompts()
    assert [prompt.id for prompt in prompts] == ['a']
    with pytest.raises(DataError, match='no document is a chat'):
        task([silent, unanswered])


@pytest.mark.parametrize(
    'completion, score',
    [
        ('Ten apples', 1.0),
        (' Ten apples\n', 1.0),
        ('Ten  apples', 0.0),
        ('ten apples', 0.0),
        ('Ten apples.', 0.0),
        ('Ten', 0.0),
        ('', 0.0),
        ('I say: Ten apples', 0.0),
    ],
)
def test_only_the_exact_answer_scores(completion, score):
    one, prompt = judge()
    assert one.evaluate(prompt, completion) == score == one.reward(prompt, completion)


@pytest.mark.parametrize(
    'completion, stops',
    [
        ('', False),
        (' \n', False),
        ('Ten', False),
        (' Ten app', False),
        ('Ten apples', False),
        ('Ten apples \n', False),
        ('Ten apples.', True),
        ('Ten apples\nor', True),
        ('Ten apples\n\nTen apples', True),
        ('Eleven', True),
        ('Ten  ', True),
    ],
)
def test_stop_waits_until_the_completion_differs_from_the_answer(completion, stops):
    one, prompt = judge()
    assert one.stop(prompt, completion) == stops


def test_an_incomplete_utf8_character_does_not_stop():
    one, prompt = judge('caf\u00e9 \U0001f600')
    for cut in range(len(prompt.answer.encode()) + 1):
        begun = prompt.answer.encode()[:cut].decode(errors='replace')
        assert not one.stop(prompt, begun), cut
    # U+3000 is white space, three bytes in UTF-8.
    assert not one.stop(prompt, prompt.answer + '\ufffd')
    assert one.stop(prompt, '\ufffdcaf')


def test_stop_once_true_stays_true_and_never_hides_a_right_answer():
    one, prompt = judge('ab')
    rng = random.Random(0)
    for _ in range(2000):
        text = ''.join(rng.choices('ab \n.', k=rng.randint(1, 6)))
        stops = [one.stop(prompt, text[:i]) for i in range(len(text) + 1)]
        assert stops == sorted(stops), text
        assert not (stops[-1] and one.evaluate(prompt, text)), text
