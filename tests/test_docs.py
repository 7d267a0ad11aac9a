"""The examples in docs/ work: the complete one trains, and pieces of a config pass the checks."""

import json
import math
import re
from collections import Counter

import jax
import pytest

from jaxfm import code, sharding
from jaxfm.config.load import load_config
from jaxfm.errors import ConfigError
from jaxfm.metrics.writers import read_records
from jaxfm.sampling.strategies import STRATEGIES, driver
from jaxfm.sampling.strategies.base import Problem
from jaxfm.tasks import TASKS
from jaxfm.tasks.base import Prompt
from tests import doc_examples
from tests.runs import wait_for_step
from tests.sampling.conftest import new_sampler, random_params
from tests.sampling.strategies.conftest import Letters

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
    page, source = 'sampling.md', dict(doc_examples.programs())['sampling.md']
    for shown, here in {'configs/quickstart.py': tiny.config, 'runs/quickstart': straight}.items():
        assert repr(shown) in source
        source = source.replace(repr(shown), repr(str(here)))
    exec(compile(source, page, 'exec'), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # The first step is not printed, and sample 1 of the first request is cancelled after it.
    assert {tuple(line[:2]) for line in lines} == {('a', '0'), ('b', '2')}
    assert Counter(line[-1] for line in lines)['length'] == 2


class Questions:
    """A task for the strategies' page: the answer is the first letter, without capitals."""

    def prompts(self):
        return [Prompt(f'q{i}', text) for i, text in enumerate(['abc', 'abcd', 'b'])]

    def answer(self, prompt, completion):
        return completion[:1].lower() if completion[:1].isalpha() else None


@pytest.fixture
def letters(quick_compilation):
    """A tiny sampler that speaks in letters, and its weights."""
    mesh = sharding.make_mesh({axis: 1 for axis in sharding.MESH_AXES}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = random_params()
        yield new_sampler(params, mesh, Letters()), params


def test_the_program_that_votes_runs(letters, capsys):
    sampler, params = letters
    names = dict(sampler=sampler, params=params, step=0, task=Questions(), tokenizer=Letters())
    _run_program('strategies.md', 'driver.run', names)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ['q0', 'q1', 'q2']
    assert sum(int(line[-1]) for line in lines) == sampler.counters.decoded_tokens > 0


def test_the_program_that_allocates_prints_what_it_says(capsys):
    _run_program('strategies.md', 'allocate', {})
    assert capsys.readouterr().out == '[0, 1]\n'


def _run_program(page, word, names):
    [source] = [text for name, text in doc_examples.programs() if name == page and word in text]
    exec(compile(source, page, 'exec'), names)


@pytest.mark.parametrize(
    'name, values',
    [
        ('particles:Particles', dict(particles=4, step_tokens=5)),
        ('confidence:Confident', dict(n=6, window=3, least=-4.0)),
    ],
)
def test_the_strategies_of_your_own_run(letters, tmp_path, name, values):
    sampler, params = letters
    options = {'max_tokens': 12, 'seed': 1}
    tasks = [Problem(p.id, Letters().encode(p.text), options, p) for p in Questions().prompts()]
    with doc_examples.written(tmp_path):
        code.search_beside(tmp_path / 'mine')
        config = STRATEGIES.find(name).schema(**values)
        outcomes = driver.run(sampler, config, tasks, params, 0, Questions()).values()
    assert [outcome.error for outcome in outcomes] == [None] * 3
    spent = sum(outcome.entry.decoded_tokens for outcome in outcomes)
    assert spent == sampler.counters.decoded_tokens
    reasons = {sample.finish_reason for outcome in outcomes for sample in outcome.samples}
    if name == 'particles:Particles':  # three steps, and those that die cost, too
        assert all(len(s.tokens) == 12 for outcome in outcomes for s in outcome.samples)
    else:
        assert reasons == {'length', 'cancelled'}
