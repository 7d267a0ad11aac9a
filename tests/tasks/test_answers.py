"""GSM8K, MATH, BBH and the generated sums: prompts, answers and scores."""

import sys
import threading
from typing import get_args

import pytest

from jaxfm.config.load import load_config
from jaxfm.errors import ConfigError, MissingInputError
from jaxfm.tasks import TASKS, math_problems
from jaxfm.tasks.base import has_answers
from tests.tasks.rows import GSM8K, MATH, make_task, write_rows


@pytest.fixture
def gsm8k(tmp_path):
    task = make_task('gsm8k', path=str(write_rows(tmp_path / 'test.jsonl', GSM8K)))
    return task, task.prompts()[0]  # 2 * 3


@pytest.mark.parametrize(
    'completion, score',
    [
        (' Ann has 2 * 3 = 6 pens.', 1.0),
        (' 2 * 3 = <<2*3=6>>6\n#### 6', 1.0),
        (' 6 boxes, so 7', 0.0),
        ('', 0.0),
        (' none', 0.0),
        # What the model writes after its answer is not graded.
        (' 6\n\nQuestion: What is 1 + 1?\nAnswer: 2', 1.0),
        (' 2\n\nQuestion: What is 3 + 3?\nAnswer: 6', 0.0),
    ],
)
def test_gsm8k_grades_the_last_number_of_its_answer(gsm8k, completion, score):
    task, prompt = gsm8k
    assert task.evaluate(prompt, completion) == task.reward(prompt, completion) == score


def test_a_completion_stops_at_the_next_question(gsm8k):
    task, prompt = gsm8k
    assert not task.stop(prompt, ' 6\n\nQuest') and task.stop(prompt, ' 6\n\nQuestion: ')


def test_in_a_chat_nothing_is_cut(tmp_path):
    path = str(write_rows(tmp_path / 'test.jsonl', GSM8K))
    task = make_task('gsm8k', path=path, chat=True)
    prompt = task.prompts()[0]
    assert not task.stop(prompt, 'Question: how many?')
    assert task.evaluate(prompt, 'Question: how many? 6') == 1.0


def test_equal_numbers_are_one_answer(gsm8k):
    task, prompt = gsm8k
    written = ['So 6.', '#### 6', r'\boxed{6.0}', '$6', 'none']
    assert [task.answer(prompt, text) for text in written] == ['6', '6', '6', '6', None]


@pytest.fixture
def math(tmp_path):
    pytest.importorskip('math_verify', reason="needs the extra 'math'")
    return make_task('math', path=str(write_rows(tmp_path / 'test.jsonl', MATH)))


def test_math_compares_values_not_texts(math):
    quarters, two, interval, square, root = math.prompts()
    assert quarters.text == 'Problem:\nWhat is $1/2+1/4$?\n\nSolution:'
    assert (quarters.group, two.group) == ('Prealgebra', 'Algebra')
    for prompt, right, wrong in [
        (quarters, r'Thus $\boxed{0.75}$', r'\boxed{\frac{4}{3}}'),
        (quarters, 'The final answer is $3/4$. I hope it is correct.', 'The answer is 3.'),
        (two, r'Either \boxed{-2} or \boxed{2}', r'\boxed{4}'),
        (interval, r'\boxed{[0,1)}', r'\boxed{(0,1)}'),
        (square, r'\boxed{1+2x+x^2}', r'\boxed{x^2+1}'),
        (root, r'\boxed{\sqrt{8}}', r'\boxed{\sqrt{2}}'),
    ]:
        assert math.evaluate(prompt, right) == 1.0, right
        assert math.evaluate(prompt, wrong) == 0.0, wrong
        assert math.evaluate(prompt, '') == 0.0
    assert math.answer(quarters, r'\boxed{\frac{6}{8}}') == math.answer(quarters, '$3/4$') == '3/4'
    assert math.answer(quarters, '') is None


def test_math_survives_answers_that_keep_a_parser_busy(math, monkeypatch):
    monkeypatch.setattr(math_problems, 'SECONDS', 1)
    prompt = math.prompts()[1]
    for text in ['9^{9^{9^{9}}}', '{' * 5000, '7^{' * 300, '1+' * 20000 + '1', r'\frac{1}{0}']:
        assert math.evaluate(prompt, rf'\boxed{{{text}}}') == 0.0


def test_math_grades_in_a_thread(math):
    found = []
    prompt = math.prompts()[1]
    thread = threading.Thread(target=lambda: found.append(math.evaluate(prompt, r'\boxed{2}')))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_math_without_math_verify_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'math_verify', None)
    path = str(write_rows(tmp_path / 'test.jsonl', MATH))
    with pytest.raises(MissingInputError, match=r"math_verify: pip install 'jaxfm\[math\]'"):
        make_task('math', path=path)
    # Whole numbers need no package.
    assert make_task('gsm8k', path=str(write_rows(tmp_path / 'test.jsonl', GSM8K))).prompts()


BBH = [
    {'task': 'boolean_expressions', 'input': 'not ( True ) is', 'target': 'False'},
    {'task': 'date_understanding', 'input': 'Today is May 1. Tomorrow?\n(A) x', 'target': '(A)'},
]
COT = [
    {
        'task': row['task'],
        'prompt': f'canary\n-----\nDo {row["task"]}.\n\n'
        + '\n\n'.join(
            f"Q: q{i}\nA: Let's think step by step.\nS{i}. So the answer is {i}." for i in range(3)
        ),
    }
    for row in BBH
]


def test_bbh_has_the_published_examples_of_each_group(tmp_path):
    write_rows(tmp_path / 'bbh.jsonl', BBH)
    write_rows(tmp_path / 'cot_prompts.jsonl', COT)
    first, second = make_task('bbh', path=str(tmp_path), shots=2).prompts()
    assert first.text == (
        'Do boolean_expressions.\n\n'
        "Q: q0\nA: Let's think step by step.\nS0. So the answer is 0.\n\n"
        "Q: q1\nA: Let's think step by step.\nS1. So the answer is 1.\n\n"
        "Q: not ( True ) is\nA: Let's think step by step.\n"
    )
    assert second.text.startswith('Do date_understanding.') and second.group == 'date_understanding'
    bare = make_task('bbh', path=str(tmp_path)).prompts()[0]
    assert bare.text == "Q: not ( True ) is\nA: Let's think step by step.\n"


@pytest.mark.parametrize(
    'path, given',
    [
        ('', {}),
        ('bbh/*.json', {}),
        ('bbh/*.json', {'shots_path': 'cot-prompts'}),
        ('bbh/*.json', {'shots_path': 'cot-prompts/*.txt'}),
    ],
)
def test_bbh_reads_the_published_repository(tmp_path, path, given):
    """bbh/<group>.json, and cot-prompts/<group>.txt with a notice before a line of dashes."""
    write_rows(tmp_path / 'bbh.jsonl', BBH)
    write_rows(tmp_path / 'cot_prompts.jsonl', COT)
    expected = [prompt.text for prompt in make_task('bbh', path=str(tmp_path), shots=3).prompts()]
    root = tmp_path / 'published'
    for row, examples in zip(BBH, COT):
        rows = {'canary': 'x', 'examples': [{key: row[key] for key in ('input', 'target')}]}
        write_rows(root / 'bbh' / f'{row["task"]}.json', [rows])
        write_rows(root / 'cot-prompts' / f'{row["task"]}.txt', [examples['prompt']])
    given = {key: str(root / value) for key, value in given.items()}
    task = make_task('bbh', path=str(root / path), shots=3, **given)
    assert [prompt.text for prompt in task.prompts()] == expected


def test_bbh_compares_what_follows_the_answer_is(tmp_path):
    task = make_task('bbh', path=str(write_rows(tmp_path / 'bbh.jsonl', BBH)))
    truth, date = task.prompts()
    assert task.evaluate(truth, 'not True is False. So the answer is False.') == 1.0
    assert task.evaluate(truth, 'So the answer is False.\n\nQ: x\nA: So the answer is True.') == 1.0
    assert task.evaluate(truth, 'False') == 0.0 and task.answer(truth, 'False') is None
    assert task.evaluate(date, 'The answer is (A)') == 1.0


def test_bbh_as_published_has_a_file_for_each_group(tmp_path):
    rows = [{'input': row['input'], 'target': row['target']} for row in BBH]
    for name in ('navigate', 'snarks'):
        write_rows(tmp_path / f'{name}.json', rows)
    prompts = make_task('bbh', path=str(tmp_path / '*.json')).prompts()
    assert [prompt.group for prompt in prompts] == ['navigate'] * 2 + ['snarks'] * 2


def test_real_problems_are_read_whole_and_their_solutions_score(shared_data, caplog):
    task = make_task('gsm8k', path=str(shared_data / 'rl_gsm8k'), shots=5)
    assert len(task.prompts()) == 1319 and not caplog.records
    assert task.prompts()[0].gold == '18'
    bbh = make_task('bbh', path=str(shared_data / 'eval_bbh'), shots=3)
    assert len(bbh.prompts()) == 6511 and not caplog.records
    assert all(prompt.text.count("\nA: Let's think") == 4 for prompt in bbh.prompts())
    for prompt in bbh.prompts():
        assert bbh.evaluate(prompt, f'So the answer is {prompt.gold}.') == 1.0, prompt


# Generated sums


def test_sums_are_right_and_grouped_by_difficulty():
    task = make_task('arithmetic', terms=[2, 3], digits=[1, 2], num_prompts=20)
    prompts = task.prompts()
    assert [prompt.group for prompt in prompts[:4]] == ['2x1', '3x1', '2x2', '3x2']
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 20
    for prompt in prompts:
        problem = prompt.id.removeprefix('arithmetic:')
        assert prompt.text == f'Question: What is {problem}?\nAnswer:'
        assert prompt.gold == str(eval(problem))
        assert task.evaluate(prompt, f' {problem} = {prompt.gold}') == 1.0
        assert task.evaluate(prompt, f' {prompt.gold}0') == 0.0
        terms, digits = map(int, prompt.group.split('x'))
        assert [len(number) for number in problem.split(' + ')] == [digits] * terms


def test_sums_depend_on_the_seed_alone_and_splits_share_none():
    def texts(digits, **values):
        task = make_task('arithmetic', digits=[digits], num_prompts=200, **values)
        return [prompt.text for prompt in task.prompts()]

    assert texts(2) == texts(2) != texts(2, seed=1)
    # With so few problems, a split has all of its own, in the order of the seed.
    test, train = texts(1), texts(1, split='train')
    assert set(test) == set(texts(1, seed=1)) and test != texts(1, seed=1)
    assert len({*test, *train}) == len(test) + len(train) == 100 and 15 < len(test) < 35


def test_sums_have_examples_and_words_of_their_own():
    task = make_task('arithmetic', digits=[2], shots=2, question='{sum}', separator='=')
    for prompt in task.prompts():
        *shots, last = prompt.text.split('\n\n')
        assert len(shots) == 2 and '=' not in last
        for shot in shots:
            problem, total = shot.split('=')
            assert eval(problem) == int(total) and problem != last


def refusal(tmp_path, task):
    """What a config with this task is refused for."""
    config = tmp_path / 'c.py'
    config.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n    config = ConfigDict()\n'
        f"    config.evals = dict(a=dict(name='generate', task={task!r}))\n    return config\n"
    )
    with pytest.raises(ConfigError) as raised:
        load_config(str(config))
    return str(raised.value)


def test_a_wrong_difficulty_is_named(tmp_path):
    told = refusal(tmp_path, dict(name='arithmetic', terms=[1], digits=[0], question='What?'))
    for wrong in ('terms must be at least 2', 'digits must be at least 1', 'must contain {sum}'):
        assert wrong in told


def test_a_wrong_key_or_name_of_a_benchmark_is_told_without_the_names_of_others(tmp_path):
    told = refusal(tmp_path, dict(name='mmlu', path='x', few=5))
    assert 'task.few: unknown key; available: shots, chat, path, fields, num_prompts' in told
    assert 'gsm8k' not in told
    told = refusal(tmp_path, dict(name='gsm8', path='x'))
    assert told.count("'gsm8k'") == 1 and 'did you mean gsm8k?' in told


def test_every_task_of_the_registry_is_what_its_group_names():
    for name, entry in TASKS.items():
        assert name in get_args(entry.schema.model_fields['name'].annotation)
        assert getattr(entry.load(), 'name', name) == name


def test_tasks_without_answers_say_so_so_that_votes_on_them_are_refused():
    tasks = {name: object.__new__(TASKS.load(name)) for name in TASKS}
    without = {name for name, task in tasks.items() if not has_answers(task)}
    assert without == {'humaneval', 'mbpp', 'ifeval', 'python_functions'}
    for name in without:
        assert tasks[name].answer('a prompt', 'a completion') is None
