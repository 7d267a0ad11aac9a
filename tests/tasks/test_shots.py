"""Examples before a question, in raw text and in chats."""

import pytest
from pydantic import ValidationError

from jaxfm.errors import ConfigError, DataError
from tests.tasks.rows import GSM8K, make_task, write_rows

OTHERS = [
    {'question': f'What is {i} and {i}?', 'answer': f'It is {2 * i}.\n#### {2 * i}'}
    for i in range(4)
]


@pytest.fixture
def directory(tmp_path):
    write_rows(tmp_path / 'test.jsonl', GSM8K)
    write_rows(tmp_path / 'train.jsonl', OTHERS)
    return tmp_path


def test_without_examples_the_prompt_is_the_question(directory):
    task = make_task('gsm8k', path=str(directory))
    assert task.prompts()[0].text == f'Question: {GSM8K[0]["question"]}\nAnswer:'


@pytest.mark.parametrize('name', ['', 'test.jsonl'])
def test_examples_are_the_first_of_the_other_split(directory, name):
    task = make_task('gsm8k', path=str(directory / name), shots=2)
    expected = (
        'Question: What is 0 and 0?\nAnswer: It is 0.\n#### 0\n\n'
        'Question: What is 1 and 1?\nAnswer: It is 2.\n#### 2\n\n'
    )
    for prompt, row in zip(task.prompts(), GSM8K):
        assert prompt.text == f'{expected}Question: {row["question"]}\nAnswer:'


def test_in_a_chat_examples_are_turns(directory):
    prompt = make_task('gsm8k', path=str(directory), shots=1, chat=True).prompts()[0]
    assert [turn['role'] for turn in prompt.messages] == ['user', 'assistant', 'user']
    assert prompt.messages[0]['content'] == 'Question: What is 0 and 0?\nAnswer:'
    assert prompt.messages[1]['content'] == 'It is 0.\n#### 0'
    assert prompt.messages[2]['content'] == f'Question: {GSM8K[0]["question"]}\nAnswer:'


def test_no_question_is_among_its_own_examples(directory):
    path = str(directory / 'test.jsonl')
    task = make_task('gsm8k', path=path, shots_path=path, shots=4)
    for prompt, row in zip(task.prompts(), GSM8K):
        assert prompt.text.count(row['question']) == 1
        assert prompt.text.count('####') == 4
    for prompt in make_task('gsm8k', path=path, shots_path=path, shots=4, chat=True).prompts():
        asked = [turn['content'] for turn in prompt.messages if turn['role'] == 'user']
        assert len(set(asked)) == 5


def test_too_few_examples_are_an_error(directory):
    with pytest.raises(
        DataError, match='shots=5, but there are only 4 examples for question test:1'
    ):
        make_task('gsm8k', path=str(directory), shots=5)


def test_examples_without_a_file_are_an_error(tmp_path):
    path = write_rows(tmp_path / 'test.jsonl', GSM8K)
    with pytest.raises(ConfigError, match=r'shots=1 needs shots_path.*no train.jsonl beside path'):
        make_task('gsm8k', path=str(path), shots=1)


def test_settings_of_examples_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ValidationError, match='shots_path needs shots, which is 0'):
        make_task('gsm8k', path=str(tmp_path), shots_path='train.jsonl')
    with pytest.raises(ConfigError, match='task ifeval: its records have no answers.*not 2'):
        make_task('ifeval', path=str(tmp_path), shots=2)


MMLU = (
    'What is 2 + 3?,4,5,6,7,B\n'
    '"Which is red, mostly?",grass,sky,blood,snow,C\n'
    '"He said ""no"".\nDid he?",yes,no,maybe,never,A\n'
    'How much is none?,None,0,one,NA,B\n'
    'Which is last?,w,x,y,z,D\n'
)


@pytest.mark.parametrize('path', ['', 'test', 'test/*_test.csv', 'test/virology_test.csv'])
def test_mmlu_reads_the_published_files(tmp_path, path):
    for split in ('dev', 'test'):
        (tmp_path / split).mkdir()
        for subject in ('anatomy', 'virology'):
            text = MMLU if split == 'test' else f'{subject} of dev?,w,x,y,z,C\n'
            (tmp_path / split / f'{subject}_{split}.csv').write_text(text, encoding='utf-8')
    prompts = make_task('mmlu', path=str(tmp_path / path), shots=1).prompts()
    assert len(prompts) == (5 if 'virology' in path else 10)
    first, second, third, fourth, fifth = prompts[-5:]
    assert (first.id, first.group) == ('virology_test:1', 'virology')
    assert first.text == (
        'The following are multiple choice questions (with answers) about virology.\n\n'
        'virology of dev?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n'
        'What is 2 + 3?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:'
    )
    assert 'Which is red, mostly?\nA. grass\n' in second.text
    assert 'He said "no".\nDid he?\nA. yes\n' in third.text
    assert 'A. None\nB. 0\n' in fourth.text
    assert [one.right for one in prompts[-5:]] == [(1,), (2,), (0,), (1,), (3,)]


def test_mmlu_has_examples_and_an_introduction_of_its_own_subject(tmp_path):
    def row(subject, i):
        question = f'{subject} {i}?'
        return {
            'subject': subject,
            'question': question,
            'choices': ['w', 'x', 'y', 'z'],
            'answer': 2,
        }

    subjects = ('high_school_physics', 'virology')
    write_rows(tmp_path / 'test.jsonl', [row(subject, 9) for subject in subjects])
    write_rows(tmp_path / 'dev.jsonl', [row(subject, i) for i in range(3) for subject in subjects])
    physics, virology = make_task('mmlu', path=str(tmp_path), shots=2).prompts()
    assert (physics.group, virology.group) == subjects
    assert physics.text == (
        'The following are multiple choice questions (with answers) about high school physics.\n\n'
        'high_school_physics 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n'
        'high_school_physics 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n'
        'high_school_physics 9?\nA. w\nB. x\nC. y\nD. z\nAnswer:'
    )
    assert 'physics' not in virology.text
    chat = make_task('mmlu', path=str(tmp_path), shots=1, chat=True).prompts()[0]
    assert [turn['role'] for turn in chat.messages] == ['system', 'user', 'assistant', 'user']
    assert chat.messages[2]['content'] == 'C' and chat.pairs[2][1] == 'C'
