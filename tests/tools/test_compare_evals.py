"""Two evaluations on the same questions: what is joined, told, and refused."""

import json
import re

import numpy as np
import pytest

from jaxfm.errors import DataError
from jaxfm.evals.samples import Samples
from tools import compare_evals

HEADER = {
    'evaluator': 'generate',
    'task': {'name': 'gsm8k', 'shots': 0},
    'weights': {'name': 'a', 'step': 0},
    'options': {'temperature': 0.0},
    'seed': 0,
    'subject': 'x',
}


def write(path, scores, samples=1, groups=None, **header):
    """A file with `samples` equal samples of each question; scores: {id: score}."""
    with Samples(path, HEADER | header) as file:
        for id, score in scores.items():
            for index in range(samples):
                group = groups[id] if groups else ''
                file.add({'id': id, 'sample_index': index, 'score': float(score), 'group': group})
    return path


@pytest.fixture
def solved():
    """Questions of which a model solves half, and those of a better and an equal one."""
    random = np.random.default_rng(0)
    base = {f'q{i}': float(random.random() < 0.5) for i in range(200)}
    better = {id: max(score, float(random.random() < 0.2)) for id, score in base.items()}
    equal = {id: 1 - score if random.random() < 0.1 else score for id, score in base.items()}
    return base, better, equal


def test_a_better_model_is_found_and_an_equal_one_is_tied(tmp_path, solved, capsys):
    base, better, equal = solved
    a = write(tmp_path / 'a.jsonl', base)
    b = write(tmp_path / 'b.jsonl', better, weights={'name': 'b', 'step': 7})
    found = compare_evals.compare('gsm8k', b, a)
    assert found.verdict == 'A better' and found.p_value < 1e-4
    assert compare_evals.compare('gsm8k', a, b).verdict == 'B better'
    assert found.difference.value == pytest.approx(found.first.value - found.second.value)
    assert found.only_second == 0
    tied = compare_evals.compare('gsm8k', a, write(tmp_path / 'c.jsonl', equal))
    assert tied.verdict == 'tied' and tied.difference.low < 0 < tied.difference.high
    assert compare_evals.main([str(b), str(a), '--output', str(tmp_path / 'out.jsonl')]) == 0
    out = capsys.readouterr().out
    for words in ('b: 200 questions\n', 'verdict     A better', 'p = ', "weights.name: 'b', 'a'"):
        assert words in out
    assert json.loads((tmp_path / 'out.jsonl').read_text('utf-8'))['verdict'] == 'A better'


def test_questions_are_joined_by_id_and_count_once(tmp_path, solved):
    base, *_ = solved
    a = write(tmp_path / 'a.jsonl', base, samples=3)
    b = write(tmp_path / 'b.jsonl', dict(reversed(list(base.items())[50:])))
    found = compare_evals.compare('gsm8k', a, b)
    assert (found.num_questions, found.left_out) == (150, 50)
    assert found.difference.value == 0 and found.verdict == 'tied'


def test_few_questions_do_not_decide(tmp_path):
    """All three go to A; with equal models that happens in one of four evaluations."""
    a = write(tmp_path / 'a.jsonl', dict.fromkeys('xyz', 1))
    b = write(tmp_path / 'b.jsonl', dict.fromkeys('xyz', 0))
    found = compare_evals.compare('quiz', a, b)
    assert found.difference.low > 0 and found.p_value == 0.25
    assert found.verdict == 'tied'


def write_losses(path, nats, tokens, num_bytes=100, **header):
    """A file of losses; nats: {document: those of its windows}; tokens of each window."""
    with Samples(path, HEADER | {'evaluator': 'perplexity'} | header) as file:
        for group, each in nats.items():
            for index, value in enumerate(each):
                file.add(
                    {
                        'id': f'{group}[{1 + index * tokens}]',
                        'sample_index': 0,
                        'group': group,
                        'nats': value,
                        'score': None if value is None else -value / tokens,
                        'num_tokens': tokens,
                        'document_bytes': num_bytes,
                        'document_tokens': tokens * len(each),
                        'error': 'NaN' if value is None else '',
                    }
                )
    return path


def test_losses_are_compared_per_byte_and_document(tmp_path):
    """B has half as many tokens, so it is worse per token, though it is better per byte."""
    random = np.random.default_rng(1)
    ours = {f'doc{i}': list(20 + random.random(8)) for i in range(20)}
    theirs = {id: [sum(nats) / 4 - 0.5] * 4 for id, nats in ours.items()}
    a = write_losses(tmp_path / 'a.jsonl', ours | {'only': [3.0]}, 10)
    b = write_losses(tmp_path / 'b.jsonl', theirs, 10, subject='y')
    found = compare_evals.compare('text', a, b)
    assert (found.unit, found.num_questions, found.left_out) == ('documents', 20, 1)
    assert found.verdict == 'B better'
    assert found.difference.value == pytest.approx(-2 / 100 / np.log(2))
    assert found.first.value == pytest.approx(-sum(map(sum, ours.values())) / 2000 / np.log(2))
    assert 'McNemar' not in '\n'.join(found.lines())


def test_windows_of_a_document_are_not_independent(tmp_path):
    """Two documents of 50 windows each, of which one is better and one is worse."""
    base = {'x': [20.0] * 50, 'y': [20.0] * 50}
    a = write_losses(tmp_path / 'a.jsonl', base, 10)
    b = write_losses(tmp_path / 'b.jsonl', {'x': [21.0] * 50, 'y': [19.5] * 50}, 10)
    assert compare_evals.compare('text', a, b).verdict == 'tied'
    # A window that failed leaves out its document, as in the evaluation.
    base['y'][0] = None
    write_losses(tmp_path / 'a.jsonl', base, 10)
    found = compare_evals.compare('text', a, b)
    assert (found.unit, found.num_questions, found.left_out) == ('windows', 50, 1)
    assert found.verdict == 'A better'


@pytest.mark.parametrize(
    'given, told',
    [
        ({'subject': 'y'}, 'one document in common, with other tokens'),
        ({'num_bytes': 99}, 'document x has 100 bytes .* but 99'),
    ],
)
def test_losses_on_other_text_are_refused(tmp_path, given, told):
    a = write_losses(tmp_path / 'a.jsonl', {'x': [20.0] * 5}, 10)
    b = write_losses(tmp_path / 'b.jsonl', {'x': [21.0] * 5}, 10, **given)
    with pytest.raises(DataError, match=told):
        compare_evals.compare('text', a, b)
    with pytest.raises(DataError, match="in bits per byte: leave out 'nats'"):
        compare_evals.compare('text', a, b, 'nats')
    old = write(tmp_path / 'old.jsonl', {'x[1]': -2.0}, evaluator='perplexity')
    with pytest.raises(DataError, match='old.jsonl: sample .* has no document_bytes'):
        compare_evals.compare('text', old, old)


def test_questions_of_a_group_are_one_cluster_if_asked_for(tmp_path):
    groups = {f'{group}{i}': group for group in 'abcdefgh' for i in range(20)}
    a, b = (
        write(tmp_path / f'{name}.jsonl', {id: id[0] in name for id in groups}, 1, groups)
        for name in ('abcdef', 'gh')
    )
    assert compare_evals.compare('gsm8k', a, b).verdict == 'A better'
    assert compare_evals.compare('gsm8k', a, b, by_group=True).verdict == 'tied'


def test_directories_are_compared_file_by_file(tmp_path, solved, capsys):
    base, better, _ = solved
    for name, scores in {'one': base, 'two': better}.items():
        write(tmp_path / name / f'gsm8k-00000{len(name)}.jsonl', scores)
        write(tmp_path / name / 'math-000040.jsonl', scores, task={'name': 'math'})
    write(tmp_path / 'one' / 'mmlu-000040.jsonl', base, task={'name': 'mmlu'})
    assert compare_evals.main([str(tmp_path / 'one'), str(tmp_path / 'two')]) == 0
    out, error = capsys.readouterr()
    assert out.count('verdict     B better') == 2 and 'mmlu: only in' in error
    write(tmp_path / 'one' / 'math-000080.jsonl', base)
    assert compare_evals.main([str(tmp_path / 'one'), str(tmp_path / 'two')]) == 65
    assert 'two evaluations of math' in capsys.readouterr().err


@pytest.mark.parametrize(
    'header, scores, metric, told',
    [
        ({'task': {'name': 'mmlu'}}, {'q0': 1}, 'score', 'samples of gsm8k, but .* of mmlu'),
        ({'evaluator': 'likelihood'}, {'q0': 1}, 'score', 'of generate, but .* of likelihood'),
        ({}, {'other': 1}, 'score', 'no question in common'),
        ({}, {'q0': 1}, 'scor', 'sample q0 has no number scor; numbers: score'),
    ],
    ids=['task', 'kind', 'questions', 'metric'],
)
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, header, scores, metric, told):
    a = write(tmp_path / 'a.jsonl', {'q0': 0})
    b = write(tmp_path / 'b.jsonl', scores, **header)
    assert compare_evals.main([str(a), str(b), '--metric', metric]) == 65
    error = capsys.readouterr().err
    assert re.search(told, error), error
    assert compare_evals.main([str(a), str(tmp_path / 'none.jsonl')]) == 66
