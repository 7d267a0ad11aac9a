"""The loss on files: every token once, whatever the windows; bytes, words, and bad lines."""

import gzip
import json
import math

import pytest

from jaxfm.errors import ConfigError, DataError, MissingInputError
from jaxfm.evals import PerplexityConfig
from jaxfm.evals.perplexity import Perplexity
from jaxfm.evals.samples import read_samples
from tests.evals.scoring import Engine, Tokenizer, context_of, total

TEXT = 'one two three four five six seven eight nine ten, é'
IDS = Tokenizer().encode


def evaluator(engine, path, *args, tokenizer=None, goes_on=False, **changes):
    config = PerplexityConfig(path=str(path), **changes)
    return Perplexity(config, context_of(engine, *args, goes_on=goes_on, tokenizer=tokenizer))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_text(TEXT, encoding='utf-8')
    return path


@pytest.mark.parametrize(
    'cut', [{}, {'window': 9}, {'window': 9, 'stride': 3}, {'window': 2, 'stride': 1}], ids=str
)
def test_every_token_counts_once_however_it_is_cut(file, cut):
    """The engine's log-probs depend only on the token before."""
    values = evaluator(Engine(), file, **cut).run('weights', 3)
    nats = -total(IDS(TEXT), 1)
    assert values['tokens'] == len(IDS(TEXT)) - 1
    assert values['loss'] == pytest.approx(nats / (len(IDS(TEXT)) - 1))
    assert values['perplexity'] == pytest.approx(math.exp(values['loss']))
    assert values['nats_per_word'] == pytest.approx(nats / 11)
    assert values['bits_per_byte'] == pytest.approx(nats / math.log(2) / len(TEXT.encode()))


def test_a_document_begins_with_bos_and_a_stride_leaves_context(file):
    tokenizer = Tokenizer()
    tokenizer.bos_id = 7
    engine = Engine()
    values = evaluator(engine, file, tokenizer=tokenizer, window=10, stride=4).run('weights', 3)
    assert values['tokens'] == len(IDS(TEXT))
    assert values['loss'] == pytest.approx(-total([7, *IDS(TEXT)], 1) / len(IDS(TEXT)))
    first, *others = engine.added
    assert list(first.tokens) == [7, *IDS(TEXT)][:10] and first.prompt_logprobs_from == 1
    assert all(request.prompt_logprobs_from >= 6 for request in others)
    assert all(len(request.tokens) == 10 for request in engine.added)


def test_documents_of_several_files_have_an_interval(tmp_path, caplog):
    texts = ['abc def', 'the second text', 'and a third']
    (tmp_path / 'a.txt').write_text(texts[0], encoding='utf-8')
    with gzip.open(tmp_path / 'b.txt.gz', 'wb') as stream:
        stream.write(texts[1].encode())
    lines = [json.dumps({'body': texts[2]}), 'no json', json.dumps({'other': 1, 'more': 2})]
    (tmp_path / 'c.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    (tmp_path / 'd.txt').write_bytes(b'\xff\xfe')
    (tmp_path / 'e.txt').write_bytes(b' \n')
    values = evaluator(Engine(), tmp_path / '*', fields={'text': 'body'}).run('weights', 3)
    nats = [-total(IDS(text), 1) for text in texts]
    assert values['documents'] == 3
    assert values['loss'] == pytest.approx(sum(nats) / sum(len(IDS(text)) - 1 for text in texts))
    assert values['loss_low'] < values['loss'] < values['loss_high']
    for told in ('d.txt: not UTF-8', 'e.txt: is empty', 'c.jsonl:2: not JSON', 'other, more'):
        assert told in caplog.text
    one = evaluator(Engine(), tmp_path / '*', fields={'text': 'body'}, max_documents=1)
    assert one.run('weights', 3)['documents'] == 1


def test_files_of_one_name_in_two_directories_are_both_measured(tmp_path):
    texts = {'a': 'abc def', 'b': 'the second text'}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'train.jsonl').write_text(json.dumps({'text': text}), encoding='utf-8')
    values = evaluator(Engine(), tmp_path / '*' / 'train.jsonl').run('weights', 3)
    assert values['documents'] == 2
    assert values['tokens'] == sum(len(IDS(text)) - 1 for text in texts.values())


def test_windows_that_fail_are_left_out_with_their_document(tmp_path, caplog):
    for name, text in {'a': 'abc def', 'b': 'abz def', 'c': 'abc'}.items():
        (tmp_path / f'{name}.txt').write_text(text, encoding='utf-8')
    values = evaluator(Engine(fails=[ord('z')]), tmp_path / '*.txt').run('weights', 3)
    assert values['documents'] == 2 and values['samples/failed'] == pytest.approx(1 / 3)
    assert '1 of 3 windows failed' in caplog.text


def test_a_window_says_how_large_its_document_is(file, tmp_path):
    evaluator(Engine(), file, tmp_path / 'evals', window=9).run('weights', 3)
    _, records = read_samples(next((tmp_path / 'evals').iterdir()))
    assert {one['document_bytes'] for one in records} == {len(TEXT.encode())}
    assert {one['document_tokens'] for one in records} == {len(IDS(TEXT)) - 1}
    assert sum(one['num_tokens'] for one in records) == len(IDS(TEXT)) - 1


def test_an_interrupted_evaluation_goes_on(file, tmp_path):
    given = dict(window=9, goes_on=True)
    first = Engine()
    values = evaluator(first, file, tmp_path / 'evals', **given).run('weights', 3)
    [path] = (tmp_path / 'evals').iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join(lines[:4]))
    again = Engine()
    assert evaluator(again, file, tmp_path / 'evals', **given).run('weights', 3) == values
    assert len(again.added) == len(first.added) - 3


def test_a_document_of_one_token_needs_bos(tmp_path, caplog):
    """Without BOS nothing predicts it; that is told before the weights are read."""
    (tmp_path / 'a.txt').write_text('x', encoding='utf-8')
    with pytest.raises(DataError, match='no document can be used: a.txt has a single token'):
        evaluator(Engine(), tmp_path / '*.txt')
    tokenizer = Tokenizer()
    tokenizer.bos_id = 7
    values = evaluator(Engine(), tmp_path / '*.txt', tokenizer=tokenizer).run('weights', 3)
    assert values['documents'] == values['tokens'] == 1
    (tmp_path / 'b.txt').write_text('xy', encoding='utf-8')
    assert evaluator(Engine(), tmp_path / '*.txt').run('weights', 3)['documents'] == 1
    assert 'config.evals.quiz: left out: a.txt has a single token' in caplog.text


def test_what_cannot_be_measured_is_refused(tmp_path, file):
    with pytest.raises(ConfigError, match='quiz.stride 9 must be less than the window 9'):
        evaluator(Engine(), file, window=9, stride=9)
    with pytest.raises(MissingInputError, match='config.evals.quiz.path'):
        evaluator(Engine(), tmp_path / 'none.txt')
    with pytest.raises(ConfigError, match="fields has 'txet'.*did you mean text?"):
        evaluator(Engine(), file, fields={'txet': 'body'})
    with pytest.raises(ConfigError, match=r'quiz.fields is for records \(.jsonl.*, such as .*text'):
        evaluator(Engine(), file, fields={'text': 'body'})
    file.write_text(' ', encoding='utf-8')
    with pytest.raises(DataError, match='no document can be used: .*text.txt: is empty'):
        evaluator(Engine(), file)
