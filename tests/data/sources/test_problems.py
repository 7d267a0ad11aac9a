import collections
import hashlib
import importlib.util
import itertools
import pickle
import random
from pathlib import Path
from typing import get_args

import pytest

from jaxfm.chat.render import Chat
from jaxfm.config.validation import validate
from jaxfm.data import CALCULATED, SOURCES, ProblemKind, ProblemsConfig
from jaxfm.data.sources import problems
from jaxfm.data.sources.problems import KINDS, Problem, Problems
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import Bytes

EXAMPLES = {
    'addition': (('999999', '7'), '1000006'),
    'subtraction': (('100000', '9'), '99991'),
    'multiplication': (('999', '100'), '99900'),
    'reverse': (('abcde',), 'edcba'),
    'rotate': (('abcde',), 'bcdea'),
    'last_letters': (('ab cde fghi jk',), 'beik'),
}

EASY = [name for name, kind in KINDS.items() if kind.is_easy]


def source(**options):
    return Problems(ProblemsConfig(**options))


def read(source, is_heldout=None):
    pairs = [pair for shard in source.shards() for pair in source.read(shard)]
    return [document for side, document in pairs if is_heldout in (None, side)]


def drawn(monkeypatch, options):
    """All problems of a source, by side."""
    sides, original = {True: [], False: []}, problems.draw

    def draw(name, rng, heldout):
        problem = original(name, rng, heldout)
        sides[heldout].append((problem.kind, problem.operands))
        return problem

    with monkeypatch.context() as patch:
        patch.setattr(problems, 'draw', draw)
        read(source(**options))
    return sides


def phases(argument):
    path = Path(__file__).parents[3] / 'configs' / 'lifecycle.py'
    spec = importlib.util.spec_from_file_location('lifecycle', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keys = ProblemsConfig.model_fields.keys()
    for phase in module.get_config(argument).phases:
        yield {key: value for key, value in phase['data'].items() if key in keys}


def test_the_registry_has_the_source():
    entry = SOURCES['problems']
    assert entry.load() is Problems and entry.schema is ProblemsConfig


@pytest.mark.parametrize('name', KINDS)
def test_answers_are_right(name):
    operands, answer = EXAMPLES[name]
    assert KINDS[name].solve(*operands) == answer


def test_every_kind_has_very_many_problems_and_draws_from_all_of_them():
    for name, kind in KINDS.items():
        assert kind.num_problems >= 800_000
        rng = random.Random(0)
        draws = [kind.draw(rng) for _ in range(5000)]
        # The birthday paradox: n draws from N give about n * n / 2N pairs.
        assert len(draws) - len(set(draws)) <= 3 * 5000**2 / 2 / kind.num_problems + 1, name
        asked = [Problem(name, each, kind.solve(*each)) for each in draws]
        shown = sum(problem.answer in problem.question for problem in asked)
        assert shown <= 0.01 * len(draws), name  # few problems show their answer; they are left out


def test_num_problems_counts_the_operands():
    assert problems.NUM_NUMBERS == len(range(100_000, 1_000_000)) * len(range(1, 10))
    rng = random.Random(1)
    numbers = [KINDS['addition'].draw(rng) for _ in range(20_000)]
    assert {len(number) for number, _ in numbers} == {6}
    assert {digit for _, digit in numbers} == {*'123456789'}
    words = [KINDS['reverse'].draw(rng)[0] for _ in range(20_000)]
    assert {len(word) for word in words} == {5, 6} and len({*''.join(words)}) == 26
    four = [KINDS['last_letters'].draw(rng)[0].split() for _ in range(20_000)]
    assert {tuple(map(len, words)) for words in four} == {*itertools.product((2, 3, 4), repeat=4)}


def test_no_question_shows_its_answer():
    for document in read(source(form='chat', num_problems=3000, num_heldout=1000)):
        question, answer = (message['content'] for message in document.messages)
        assert answer.lower() not in question.lower()


@pytest.mark.parametrize('operands', [('abcba',), ('aaaaa',)])
def test_a_problem_that_shows_its_answer_is_drawn_again(monkeypatch, operands):
    kind = KINDS['reverse']
    draws = iter([operands, *[kind.draw(random.Random(i)) for i in range(1000)]])
    monkeypatch.setitem(
        KINDS, 'reverse', problems.dataclasses.replace(kind, draw=lambda rng: next(draws))
    )
    assert problems.draw('reverse', random.Random(0), heldout=False).operands != operands


def test_chats_are_only_a_question_and_its_answer():
    for document in read(source(form='chat', num_problems=100, num_heldout=12)):
        user, assistant = document.messages
        assert (user['role'], assistant['role']) == ('user', 'assistant')
        assert document.group in KINDS and not document.text
    assert source(form='chat', num_problems=100).shards()


def test_texts_and_chats_have_the_same_tasks_in_different_forms():
    problem = Problem('addition', ('123456', '7'), '123463')
    assert problem.text == 'sum 123456+7 -->123463\n'
    assert problem.question == 'Please sum 123456+7'


def test_answers_follow_at_the_same_distance_in_texts_and_short_chats():
    problem = Problem('rotate', ('zebra',), 'ebraz')
    chat = Chat(Bytes(BytesConfig(chat_template='qa'), ()))
    prompt = chat.prompt([{'role': 'user', 'content': problem.question}])
    in_text = problem.text.index(problem.answer) - problem.text.index('zebra')
    in_chat = len(prompt) - bytes(id - 2 for id in prompt[1:]).index(b'zebra') - 1
    assert in_text == in_chat
    assert problem.text[problem.text.index(problem.answer) - 1] != chr(prompt[-1] - 2)


def test_no_two_kinds_have_the_same_words():
    assert len({kind.task for kind in KINDS.values()}) == len(KINDS)


def test_text_documents_hold_many_problems():
    texts = read(source(num_problems=100, num_heldout=40), is_heldout=False)
    assert [len(text.text.splitlines()) for text in texts] == [32, 32, 32, 4]
    heldout = read(source(num_problems=100, num_heldout=40), is_heldout=True)
    assert sum(len(text.text.splitlines()) for text in heldout) == 40
    assert all(text.text.endswith('\n') and not text.messages for text in texts + heldout)


def test_heldout_problems_are_distinct_and_equally_many_of_each_kind():
    heldout = read(source(form='chat', num_problems=1, num_heldout=241), is_heldout=True)
    counts = [sum(one.group == kind for one in heldout) for kind in EASY]
    assert sum(counts) == 241 and max(counts) - min(counts) <= 1
    assert len({one.messages[0]['content'] for one in heldout}) == 241


def test_train_problems_are_of_every_kind_equally_often():
    train = read(source(form='chat', num_problems=6000, num_heldout=1), is_heldout=False)
    counts = [sum(one.group == kind for one in train) for kind in EASY]
    assert min(counts) > 1080 and max(counts) < 1320


def test_what_small_models_do_not_learn_is_there_only_if_it_is_named():
    assert set(KINDS) - set(EASY) == {'multiplication'}
    documents = read(source(form='chat', kinds=['multiplication'], num_problems=5, num_heldout=5))
    assert {document.group for document in documents} == {'multiplication'}


def test_calls_ask_a_calculator_for_what_chats_ask_the_model():
    same = dict(seed=3, kinds=['multiplication', 'addition'], num_problems=200, num_heldout=50)
    chats, calls = (read(source(form=form, **same)) for form in ('chat', 'calls'))
    for chat, call in zip(chats, calls, strict=True):
        question, answer = chat.messages
        asked, expression, result, repeated = call.messages
        assert (asked, repeated) == (question, answer)
        assert expression['role'] == 'assistant' and result['role'] == 'user'
        assert result['content'] == answer['content']
        assert eval(expression['content']) == [int(answer['content'])]


def test_calls_are_of_kinds_that_a_calculator_solves():
    assert {one.group for one in read(source(form='calls', num_problems=99))} == set(CALCULATED)
    _, [problem] = validate(ProblemsConfig, {'form': 'calls', 'kinds': ['reverse', 'addition']})
    assert str(problem.sentence) == (
        'form calls has no reverse: a calculator solves addition, subtraction, multiplication'
    )


def test_a_kind_listed_twice_is_trained_on_twice_as_often_but_held_out_once():
    one = source(form='chat', kinds=['rotate', 'reverse', 'rotate'], num_problems=3000)
    train, heldout = (
        collections.Counter(document.group for document in read(one, side))
        for side in (False, True)
    )
    assert 1800 < train['rotate'] < 2200 and sum(train.values()) == 3000
    assert heldout == {'rotate': 120, 'reverse': 120}


def test_only_the_requested_kinds_are_drawn():
    assert set(get_args(ProblemKind)) == set(KINDS)
    documents = read(source(form='chat', kinds=['rotate'], num_problems=50, num_heldout=50))
    assert {document.group for document in documents} == {'rotate'}


def test_the_side_of_a_problem_does_not_depend_on_seed_form_or_number(monkeypatch):
    """No train problem of any of these is a held-out problem of any other."""
    train, heldout = set(), set()
    for form, seed, count in itertools.product(('text', 'chat'), (0, 1), (2000, 3000)):
        options = dict(form=form, seed=seed, num_problems=count, num_heldout=count // 10)
        sides = drawn(monkeypatch, options)
        assert len(sides[False]) == count and len(sides[True]) >= count // 10
        train.update(sides[False])
        heldout.update(sides[True])
    assert len(heldout) > 500 and not train & heldout


@pytest.mark.parametrize('argument', ['', 'smoke'])
def test_the_phases_of_the_lifecycle_never_train_on_a_heldout_problem(monkeypatch, argument):
    train, heldout = set(), []
    for options in phases(argument):
        sides = drawn(monkeypatch, options)
        train.update(sides[False])
        heldout.append(sides[True])
    assert not train & set(itertools.chain(*heldout))
    counts = collections.Counter(kind for kind, _ in heldout[-1])
    assert len(heldout[-1]) >= 200 and len(counts) >= 4 and len(set(counts.values())) == 1


def test_about_one_problem_in_sixteen_is_held_out():
    rng = random.Random(0)
    count = sum(Problem('rotate', KINDS['rotate'].draw(rng), '').is_heldout for _ in range(16_000))
    assert 850 < count < 1150


def test_shards_are_pickled_and_read_in_any_order_to_the_same_documents(monkeypatch):
    monkeypatch.setattr(problems, 'PROBLEMS_PER_SHARD', 128)
    for form, count in (('text', 16), ('chat', 500)):
        one = source(form=form, num_problems=500, num_heldout=40)
        shards = one.shards()
        again = [
            list(
                source(form=form, num_problems=500, num_heldout=40).read(
                    pickle.loads(pickle.dumps(shard))
                )
            )
            for shard in reversed(shards)
        ]
        assert [pair for pairs in reversed(again) for pair in pairs] == [
            pair for shard in shards for pair in one.read(shard)
        ]
        names = [document.name for document in read(one)]
        assert len(names) == len(set(names)) and len(read(one, is_heldout=False)) == count


def test_fewer_problems_are_a_prefix_of_more():
    few = read(source(form='chat', num_problems=50), is_heldout=False)
    assert read(source(form='chat', num_problems=80), is_heldout=False)[:50] == few


def test_the_fingerprint_depends_on_the_config_and_the_version(monkeypatch):
    options = [{}, {'form': 'chat'}, {'seed': 1}, {'num_problems': 9}, {'kinds': ['rotate']}]
    prints = [source(**each).fingerprint() for each in options]
    assert len(set(prints)) == len(prints) and source().fingerprint() == prints[0]
    monkeypatch.setattr(problems, 'VERSION', problems.VERSION + 1)
    assert source().fingerprint() not in prints


def test_other_documents_need_another_version():
    """Caches are found by fingerprint: whoever changes a wording or a draw must raise VERSION."""
    digest = hashlib.sha256()
    for form in ('text', 'chat', 'pairs'):
        for document in read(source(form=form, num_problems=200, num_heldout=20)):
            found = (document.name, document.text, document.messages, document.rejected)
            digest.update(repr(found).encode())
    assert (problems.VERSION, digest.hexdigest()[:16]) == (2, '31c5b448819c9221')
