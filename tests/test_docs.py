"""The examples in docs/ work: the complete one trains, and pieces of a config pass the checks."""

import json
import math
import re
from collections import Counter

import pytest

from jaxfm.config.load import load_config
from jaxfm.errors import ConfigError
from jaxfm.metrics.writers import read_records
from jaxfm.tasks import TASKS
from tests import doc_examples
from tests.runs import wait_for_step

# The config into which a piece is inserted; with phases it needs no steps, data and optimizer.
WHOLE = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.tokenizer = dict(name='bytes')
    config.model = dict(
        name='transformer', vocab_size=258, embed_dim=64, num_layers=2,
        block=dict(num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=128),
    )
    config.steps = 10
    config.data = dict(name='python_stdlib', sequence_length=64, batch_size=8)
    config.optimizer = dict(name='adamw', learning_rate=1e-3)
    PIECE
    if 'phases' in config:
        del config.steps, config.data, config.optimizer
    return config
"""

RUN = 'mine/run.py'


def check_piece(source: str, directory):
    """The config around a piece, which is beside the files of docs/."""
    with doc_examples.written(directory):
        path = directory / 'mine' / 'piece.py'
        path.write_text(WHOLE.replace('PIECE', source.replace('\n', '\n    ')))
        return load_config(str(path))


@pytest.mark.parametrize('page, source', doc_examples.pieces())
def test_a_piece_of_config_passes_the_check(page, source, tmp_path):
    check_piece(source, tmp_path)


def test_a_wrong_piece_fails(tmp_path):
    with pytest.raises(ConfigError, match='weigths'):
        check_piece("config.data = dict(name='mixture', weigths=dict(web=1.0))", tmp_path)


def test_the_example_with_your_own_class_trains(start, tmp_path):
    """As on the page, but with fewer steps and another gamma; in a process, on one device."""
    given = ['--config.objective.gamma=1', '--config.steps=10', '--config.metrics.log_every=1']
    workdir = tmp_path / 'run'
    with doc_examples.written(tmp_path):
        process = start(workdir, *given, '--config.checkpoint.every=0', config=tmp_path / RUN)
        wait_for_step(workdir, 10, process)  # do not wait for its report and samples
    assert list(json.loads((workdir / 'config.json').read_text())['code']) == ['focal:Focal']
    records = list(read_records(workdir / 'metrics.jsonl'))
    losses = [record['train/loss'] for record in records if record['kind'] == 'train']
    # Fresh weights give each of 258 tokens about the same probability.
    assert losses[0] == pytest.approx(math.log(258), rel=0.1)
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.2


def test_the_example_with_your_own_task_scores(tmp_path, monkeypatch):
    [(_, source)] = [piece for piece in doc_examples.pieces() if 'riddles:Riddles' in piece[1]]
    page = (doc_examples.ROOT / 'docs' / 'tasks.md').read_text(encoding='utf-8')
    (rows,) = re.findall(r'^```json\n(.*?)^```$', page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'riddles.jsonl').write_text(rows, encoding='utf-8')
    (tmp_path / 'solved.jsonl').write_text(rows, encoding='utf-8')
    with doc_examples.written(tmp_path):
        path = tmp_path / 'mine' / 'piece.py'
        path.write_text(WHOLE.replace('PIECE', source.replace('\n', '\n    ')))
        group = load_config(str(path), ['evals.riddles.task.shots=1']).evals['riddles'].task
        task = TASKS.load(group.name)(group, ())
    first, second = task.prompts()
    assert (
        first.text
        == f'{second.text.split(chr(10) * 2)[1]} towel\n\n{first.text.split(chr(10) * 2)[1]}'
    )
    assert task.evaluate(first, ' It is a Clock.\n\nRiddle: a towel') == 1.0
    assert task.evaluate(first, ' a towel') == task.evaluate(first, '') == 0.0


@pytest.mark.usefixtures('compilation_cache_as_before', 'quick_programs')
def test_the_program_that_samples_runs(tiny, straight, monkeypatch, capsys):
    """With the tiny run in place of the quickstart."""
    monkeypatch.setenv('XDG_CACHE_HOME', tiny.environment['XDG_CACHE_HOME'])
    [(page, source)] = doc_examples.programs()
    assert page == 'sampling.md'
    for shown, here in {'configs/quickstart.py': tiny.config, 'runs/quickstart': straight}.items():
        assert repr(shown) in source
        source = source.replace(repr(shown), repr(str(here)))
    exec(compile(source, page, 'exec'), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # The first step is not printed, and sample 1 of the first request is cancelled after it.
    assert {tuple(line[:2]) for line in lines} == {('a', '0'), ('b', '2')}
    assert Counter(line[-1] for line in lines)['length'] == 2
