import gzip
import json
import logging
import re

import pytest

from jaxfm.errors import ConfigError, DataError, MissingInputError
from jaxfm.tasks.math_problems import Gsm8k
from tests.tasks.rows import GSM8K, make_task, write_rows


def ids(task):
    return [prompt.id for prompt in task.prompts()]


def test_a_file_is_read_plain_compressed_and_as_a_list(tmp_path):
    expected = make_task('gsm8k', path=str(write_rows(tmp_path / 'test.jsonl', GSM8K))).prompts()
    lines = '\n'.join(map(json.dumps, GSM8K)).encode()
    (tmp_path / 'b').mkdir()
    for name, content in [
        ('a/test.jsonl.gz', gzip.compress(lines)),
        ('b/test.json', json.dumps(GSM8K).encode()),
        ('c/test.json', json.dumps({'about': 'pens', 'examples': GSM8K}).encode()),
        ('d/test.json', lines),  # lines under the wrong name
    ]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        assert make_task('gsm8k', path=str(path)).prompts() == expected
        assert make_task('gsm8k', path=str(path.parent)).prompts() == expected
    assert [prompt.id for prompt in expected] == [f'test:{i}' for i in range(1, 6)]


def test_a_bad_line_is_told_with_its_place_and_the_others_go_on(tmp_path, caplog):
    caplog.set_level(logging.WARNING, 'jaxfm')
    bad = ['{"question": ', {'question': 'No number?', 'answer': 'No.'}, [1], '']
    path = write_rows(tmp_path / 'test.jsonl', [GSM8K[0], *bad, *GSM8K[1:]])
    assert ids(make_task('gsm8k', path=str(path))) == [
        'test:1',
        *(f'test:{i}' for i in range(6, 10)),
    ]
    (record,) = caplog.records
    told = record.getMessage()
    assert 'task gsm8k: 3 of 8 records are bad and left out' in told
    assert f'{path}:2: not JSON' in told
    assert f"{path}:3: answer must end with '#### NUMBER'" in told
    assert f'{path}:4: the record is no object, but [1]' in told


OPTIONS = {'text': ['a', 'b'], 'label': 0}
RESPONSE = {'key': 1, 'prompt': 'x', 'instruction_id_list': [['y']], 'kwargs': [{}]}
PROGRAM = {'task_id': 11, 'text': 'x', 'code': 'y', 'test_list': ['z']}


@pytest.mark.parametrize(
    'task, row, told',
    [
        ('truthfulqa', {'question': '?', 'mc1_targets': {'choices': ['a']}}, "KeyError: 'labels'"),
        ('arc', {'question': '?', 'choices': OPTIONS, 'answerKey': 'A'}, "TypeError: 'int'"),
        ('ifeval', RESPONSE, 'TypeError: '),
        ('mbpp', PROGRAM | {'test_setup_code': [1]}, 'TypeError: sequence item 0'),
        ('mbpp', PROGRAM | {'test_setup_code': 1}, 'setup must be a text or a list of texts'),
    ],
)
def test_a_value_of_a_wrong_type_is_told_with_its_place(tmp_path, task, row, told):
    path = write_rows(tmp_path / 'rows.jsonl', [row])
    told = f'none of 1 records can be used: {path}:1: {told}'
    with pytest.raises(DataError, match=re.escape(told)):
        make_task(task, path=str(path))


def test_another_split_of_mbpp_is_told(tmp_path):
    path = write_rows(tmp_path / 'train.jsonl', [PROGRAM | {'task_id': id} for id in (974, 601)])
    told = f'{path} has task_id 601 to 974, but the test split is 11 to 510'
    with pytest.raises(DataError, match=re.escape(told)):
        make_task('mbpp', path=str(path))


def test_an_error_of_the_run_is_not_one_of_a_record(tmp_path, monkeypatch):
    def parse(self, row):
        raise MissingInputError('this needs a package')

    monkeypatch.setattr(Gsm8k, 'parse', parse)
    with pytest.raises(MissingInputError, match='this needs a package'):
        make_task('gsm8k', path=str(write_rows(tmp_path / 'test.jsonl', GSM8K)))


def test_bad_rows_of_a_csv_are_told(tmp_path, caplog):
    path = tmp_path / 'virology_test.csv'
    path.write_text('x?,w,x,y,z,C\n\nshort,w,x,C\ny?,w,x,y,z,E\n', encoding='utf-8')
    assert ids(make_task('mmlu', path=str(path))) == ['virology_test:1']
    assert 'task mmlu: 2 of 3 records are bad' in caplog.text
    assert f'{path}:3: want 6 columns (question, A, B, C, D, answer), got 4' in caplog.text
    assert f"{path}:4: answer 'E' is none of A, B, C, D" in caplog.text
    path = path.rename(tmp_path / 'questions.csv')
    with pytest.raises(DataError, match='no field subject, and questions is not named as'):
        make_task('mmlu', path=str(path))
    path.write_bytes(b'caf\xe9?,w,x,y,z,C\n')
    with pytest.raises(DataError, match=r'questions.csv: not UTF-8'):
        make_task('mmlu', path=str(path))


def test_a_csv_with_a_header_has_its_names_as_keys(tmp_path):
    (tmp_path / 'TruthfulQA.csv').write_text(
        'Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n'
        'A,Law,"Is it, then?",No.,No.; Never.,Yes.; Always.,x\n',
        encoding='utf-8',
    )
    [prompt] = make_task('truthfulqa', path=str(tmp_path)).prompts()
    assert (prompt.text, prompt.group) == ('Q: Is it, then?\nA:', 'Law')
    assert [text for _, text in prompt.pairs] == [' No.', ' Yes.', ' Always.']


def test_a_missing_field_lists_the_keys_and_the_nearest_one(tmp_path):
    rows = [{'Question': row['question'], 'reply': row['answer']} for row in GSM8K]
    path = write_rows(tmp_path / 'test.jsonl', rows)
    with pytest.raises(DataError) as raised:
        make_task('gsm8k', path=str(path))
    assert str(raised.value) == (
        f'task gsm8k: none of 5 records can be used: {path}:1: no field question; '
        "did you mean Question? (it has: Question, reply); set fields={'question': '...'}"
    )
    fields = {'question': 'Question', 'answer': 'reply'}
    assert len(make_task('gsm8k', path=str(path), fields=fields).prompts()) == 5


def test_a_field_may_lie_inside_others(tmp_path):
    rows = [{'task': {'q': row['question']}, 'answer': row['answer']} for row in GSM8K]
    path = write_rows(tmp_path / 'test.jsonl', rows)
    assert len(make_task('gsm8k', path=str(path), fields={'question': 'task.q'}).prompts()) == 5


def test_a_field_that_the_benchmark_does_not_read_is_refused(tmp_path):
    path = write_rows(tmp_path / 'test.jsonl', GSM8K)
    with pytest.raises(ConfigError, match="fields has 'anwser'.*did you mean answer?"):
        make_task('gsm8k', path=str(path), fields={'anwser': 'reply'})


def test_a_directory_without_the_file_tells_what_it_has(tmp_path):
    write_rows(tmp_path / 'notes.jsonl', GSM8K)
    with pytest.raises(MissingInputError, match=r'has no test.jsonl .* it has: notes.jsonl; name'):
        make_task('gsm8k', path=str(tmp_path))
    with pytest.raises(MissingInputError, match='task gsm8k: path: no file matches'):
        make_task('gsm8k', path=str(tmp_path / 'tset.jsonl'))


def test_an_empty_file_and_a_cut_off_one_are_errors(tmp_path):
    path = write_rows(tmp_path / 'test.jsonl', [])
    with pytest.raises(DataError, match=f'none of 0 records can be used: {path} is empty'):
        make_task('gsm8k', path=str(path))
    cut = tmp_path / 'test.jsonl.gz'
    cut.write_bytes(gzip.compress(json.dumps(GSM8K[0]).encode())[:-9])
    with pytest.raises(DataError, match='damaged or cut off'):
        make_task('gsm8k', path=str(cut))


def test_an_id_that_occurs_twice_is_a_bad_record(tmp_path, caplog):
    rows = [
        {'key': 1, 'prompt': 'Hi', 'instruction_id_list': ['punctuation:no_comma'], 'kwargs': [{}]}
    ]
    path = write_rows(tmp_path / 'input_data.jsonl', rows * 2)
    assert ids(make_task('ifeval', path=str(path))) == ['1']
    assert f"{path}:2: its id '1' is taken by a record before it" in caplog.text


def test_prompts_are_chosen_by_a_hash_and_keep_their_order(tmp_path):
    path = write_rows(tmp_path / 'test.jsonl', GSM8K)
    chosen = ids(make_task('gsm8k', path=str(path), num_prompts=3))
    assert len(chosen) == 3 and chosen == sorted(chosen)
    assert set(ids(make_task('gsm8k', path=str(path), num_prompts=2))) < set(chosen)
    assert len(make_task('gsm8k', path=str(path), num_prompts=9).prompts()) == 5


def test_several_files_are_one_task(tmp_path):
    for half in (0, 1):
        write_rows(tmp_path / f'part{half}.jsonl', GSM8K[half::2])
    task = make_task('gsm8k', path=str(tmp_path / 'part*.jsonl'))
    assert ids(task) == ['part0:1', 'part0:2', 'part0:3', 'part1:1', 'part1:2']
