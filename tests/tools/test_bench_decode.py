"""The benchmark of decoding measures everything it promises, ours and its peers' work alike."""

import json
import sys

import jax
import numpy as np
import pytest

from jaxfm.sampling.engine import Sampler
from tests.models import goldens
from tools.bench.decode import __main__ as bench
from tools.bench.decode import bandwidth, contexts, evaluation, models, prefixes, requests, steps
from tools.bench.decode.peer import Peer
from tools.bench.decode.timing import alternate, ratios

# Answers each job after a while, as the scripts of tools/bench/peers do.
FAKE = """
import json, sys, time
flags = dict(flag.split('=') for flag in sys.argv[1:])
print(json.dumps({'step': 0, 'flags': flags}), flush=True)
for line in sys.stdin:
    time.sleep(float(flags.get('delay', 0)))
    job = json.loads(line)
    told = {'values': {'prompts': 3, 'pass@1': 0.5}}
    if job:
        told = {'tokens': [request['max_tokens'] for request in job]}
    print(json.dumps(told | {'seconds': float(flags['seconds']), 'cpu_seconds': 1}), flush=True)
"""


TINY = {'vocab_size': 256, 'embed_dim': 16, 'num_layers': 1}


@pytest.fixture(scope='module')
def model():
    return models.make_small(**TINY)


@pytest.fixture
def fake(tmp_path):
    """(flags) -> a peer that says how long it took."""
    script = tmp_path / 'fake.py'
    script.write_text(FAKE, 'utf-8')
    return lambda **flags: Peer(sys.executable, script, *(f'{k}={v}' for k, v in flags.items()))


@pytest.fixture(autouse=True)
def _compile_quickly(quick_compilation, monkeypatch):
    """Compiling takes nearly all of the time here."""
    monkeypatch.setattr(Sampler, 'warm_up', lambda self: None)


def test_a_model_is_loaded_in_float32():
    loaded = models.load(goldens.Golden('llama').path)
    assert {str(value.dtype) for value in loaded.params.values()} == {'float32'}


@pytest.mark.parametrize('temperature', steps.SAMPLINGS.values())
def test_the_bare_step_samples_what_the_engine_samples(model, temperature):
    with jax.set_mesh(model.mesh):
        engine = steps.Engine(model, 2, temperature, prompt=20, length=120)
        bare = steps.Bare(model, engine, steps.sample_tokens)
        _copy_pages(engine.sampler, bare)
        bare.step()
        engine.step()
    assert bare._state['last'].tolist() == list(engine.last.values())
    assert bare._state['positions'].tolist() == [n - 1 for n in engine.lengths.values()]


def _copy_pages(sampler, bare):
    """The bare step has pages of its own, which are empty."""
    table = np.asarray(bare._rows['page_table'])

    def copy(pool, theirs):
        filled, theirs = np.array(pool), np.asarray(theirs)
        for row, sequence in enumerate(sampler._scheduler.running[0]):
            filled[:, table[row, : len(sequence.pages)]] = theirs[:, sequence.pages]
        return jax.device_put(filled, pool.sharding)

    bare._cache = jax.tree.map(copy, bare._cache, sampler._cache)


def test_steps_of_the_engine_and_bare_ones_are_measured(model, capsys):
    figures = steps.measure(model, 2, batches=(2,), prompt=20)
    greedy, sampled = figures['rows']
    assert greedy['results'].keys() == {'engine', 'bare', 'argmax'}
    assert sampled['results'].keys() == {'engine', 'bare'}
    assert len(greedy['engine_vs_bare']) == 2 and greedy['engine_vs_bare'][0] > 0
    # 20 tokens of prompt, 3 calls before the repeats, then half of these.
    context = 20 + steps.STEPS * 4
    assert greedy['bytes_per_step'] == pytest.approx(
        model.weight_bytes + 2 * context * model.token_bytes, rel=0.1
    )
    copies = bandwidth.measure(1, 2, figures, size=1 << 20)
    assert copies['copy'] > 0
    assert [row['batch'] for row in copies['mbu']] == [2, 2]
    steps.show(figures)
    bandwidth.show(copies)
    shown = capsys.readouterr().out
    assert shown.count('tokens/s: engine') == 2 and shown.count('of copy') == 2
    assert [one['limit'] for one in steps.bars(figures)] == [0.95, 0.95]


def test_requests_are_completed_by_all_and_the_fastest_setting_is_used(model, fake, capsys):
    settings = {'slow': lambda: fake(seconds=8), 'fast': lambda: fake(seconds=4)}
    library = requests.Library('llama.cpp', settings)
    figures = requests.measure(model, [library], repeats=2, count=3, slots=(2,))
    assert figures['results']['llama.cpp']['seconds'] == [4, 4]
    ours = figures['results']['ours, 2 slots']['seconds']
    assert figures['vs']['llama.cpp'] == [4 / seconds for seconds in ours]
    requests.show(figures)
    assert 'llama.cpp, slow: 8.0 s' in capsys.readouterr().out
    assert [one['limit'] for one in requests.bars(figures)] == [0, 1.0]


def test_nothing_is_known_of_earlier_rounds(model):
    made, _ = requests.make_requests(2, model.config.vocab_size)
    with jax.set_mesh(model.mesh):
        ours = requests.Ours(model, 2)
        for _ in range(2):
            ours.complete([request | {'tokens': request['tokens'] * 4} for request in made])
    assert ours._sampler.counters.shared_tokens == 0


def test_a_peer_that_produces_fewer_tokens_is_an_error():
    results = {'ours': {'tokens': [[2, 3]]}, 'theirs': {'tokens': [[2, 3], [2, 2]]}}
    with pytest.raises(RuntimeError, match='theirs produced'):
        requests._check(results, [{'max_tokens': 2}, {'max_tokens': 3}])


def test_requests_are_the_same_every_time_and_within_limits():
    made, _ = requests.make_requests(128, 1000)
    assert made == requests.make_requests(128, 1000)[0]
    lengths = [len(request['tokens']) for request in made]
    answers = [request['max_tokens'] for request in made]
    assert min(lengths + answers) >= 1
    assert max(lengths) <= 256 and max(answers) <= 128
    assert len(set(lengths)) > 40 and len(set(answers)) > 40
    assert len({request['tokens'][0] for request in made}) == 128


def test_a_common_prompt_is_computed_once(model, capsys):
    figures = prefixes.measure(model, 2, chats=4, prompt=100)
    results = figures['results']
    [shared, again], [separate, _] = (results[name]['computed'] for name in ('shared', 'separate'))
    assert again == shared  # nothing is known of the first round
    total = figures['prompt_tokens']
    assert separate == total - 4  # all but the last token of each prompt
    assert separate - 3 * 100 <= shared <= separate - 3 * 96  # whole pages at least
    assert figures['computed_share'] == [shared / total] * 2
    prefixes.show(figures)
    assert f'{shared:6} computed' in capsys.readouterr().out
    [bar] = prefixes.bars(figures)
    assert not bar['held'] and bar['limit'] == 0.1


def test_memory_and_speed_are_measured_at_every_context(capsys, monkeypatch):
    monkeypatch.setattr(models, 'SMALL', models.SMALL | TINY)
    rows = contexts.measure_once(80, [2], 1)
    length = 80 + contexts.STEPS * 5
    pages = -(-length // contexts.PAGE)
    token_bytes = 2 * 2 * 64 * 4
    [row] = rows
    assert row['page_bytes'] == (2 * pages + 1) * contexts.PAGE * token_bytes
    assert row['tokens_per_second'][0] > 0 and row['peak_rss'] >= row['rss_before']
    contexts.show({'model': '', 'steps': contexts.STEPS, 'rows': rows})
    assert 'context     80 batch 2' in capsys.readouterr().out


def test_evaluations_of_two_versions_are_compared(fake, tmp_path, monkeypatch, capsys):
    seconds = iter([1.0, 4.0])
    monkeypatch.setattr(evaluation, 'start', lambda *_: fake(seconds=next(seconds)))
    figures = evaluation.measure(tmp_path, None, repeats=2)
    assert figures['share'] == [0.25, 0.25]
    evaluation.show(figures)
    assert '3 prompts' in capsys.readouterr().out
    [bar] = evaluation.bars(figures)
    assert bar['held']


def test_works_alternate_and_the_first_round_does_not_count():
    order = []

    def work(name, seconds):
        order.append(name)
        return {'seconds': seconds}

    results = alternate({'a': lambda: work('a', 2), 'b': lambda: work('b', 6)}, repeats=2)
    assert order == ['b', 'a', 'a', 'b', 'b', 'a']
    assert results['a']['seconds'] == [2, 2]
    assert ratios(results, 'a', 'b') == [3, 3]


def test_a_case_joins_the_results_of_the_same_day(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'use_cores', lambda count: None)
    monkeypatch.setattr(bench, 'keep_compiled_programs', lambda *_, **__: None)
    monkeypatch.setitem(bench.MEASURE, 'context', (contexts, lambda *_: _ROWS))
    for _ in range(2):
        bench.main(['--out', str(tmp_path), '--case', 'bandwidth', '--smoke', '--repeats=1'])
        bench.main(['--out', str(tmp_path), '--case', 'context'])
    [path] = tmp_path.iterdir()
    record = json.loads(path.read_text('utf-8'))
    assert record['cases'].keys() == {'bandwidth', 'context'}
    assert record['versions']['jax'] and record['cases']['context']['repeats'] == 3
    assert 'run case `step`' in capsys.readouterr().out
    path.write_text(json.dumps(record | {'cpu': 'Z80'}), 'utf-8')
    with pytest.raises(SystemExit, match='figures with cpu Z80, not .*: give another --out'):
        bench.main(['--out', str(tmp_path), '--case', 'context'])


_ROWS = {'model': '', 'steps': 1, 'rows': []}


def test_evaluating_needs_an_earlier_version(capsys):
    assert 'evaluate' not in bench.parse(['--out', '.']).case
    with pytest.raises(SystemExit):
        bench.parse(['--out', '.', '--case', 'evaluate'])
    assert '--before' in capsys.readouterr().err


def test_a_peer_that_ends_says_why(tmp_path):
    script = tmp_path / 'broken.py'
    script.write_text("raise ValueError('no such model')", 'utf-8')
    with pytest.raises(SystemExit, match='no such model'):
        Peer(sys.executable, script)
