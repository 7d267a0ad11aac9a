"""The benchmark for GPUs runs from end to end without one, and names what is wrong."""

import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._compat import interpreted_races
from tests.conftest import ROOT
from tools.bench.gpu import determinism, documents, kernels, numerics, peers, stages
from tools.bench.gpu.__main__ import main
from tools.bench.gpu.record import Record, bar, outcome
from tools.bench.gpu.stages import Runner
from tools.bench.gpu.timing import floor_microseconds

# Of tools/bench/peers/llama_torch.py with torch 2.13 on a CPU, from the weights that this jax
# draws: --part train --smoke --peer_python PYTHON.
TORCH_LOSSES = [6.664012, 6.371418, 6.107687]


def run(part: str, directory: Path, *more: str) -> Record:
    main(['--part', part, '--out', str(directory), '--smoke', *more])
    [path] = directory.glob('*.json')
    record = Record(directory, part, smoke=True, resume=True)
    assert record.path == path
    return record


@pytest.fixture(scope='module')
def kernels_record(tmp_path_factory) -> Record:
    with interpreted_races() as found:
        record = run('kernels', tmp_path_factory.mktemp('kernels'))
        assert not found()
    return record


def test_smoke_of_kernels(kernels_record, capsys):
    failed = [row for row in kernels_record.rows if 'failed' in row]
    assert not failed
    for op in numerics.OPS:
        rows = [row for row in kernels_record.rows if row['name'].startswith(op)]
        assert rows and all(row['held'] for row in rows), op
    refused = {outcome(row) for row in kernels_record.rows if 'refused' in row}
    said = ('not installed', 'no public way')
    assert all(any(words in reason for words in said) for reason in refused), refused
    values = json.loads(kernels_record.path.read_text())
    assert {'device', 'date', 'versions', 'tests', 'bars', 'seconds'} <= values.keys()
    assert values['versions']['jax'] == jax.__version__
    kernels.show(kernels_record)
    shown = capsys.readouterr().out
    assert 'bar: at least 600' in shown and 'of floor' in shown


def test_smoke_of_train_loses_as_torch_does(tmp_path, quick_compilation):
    record = run('train', tmp_path)
    [row] = record.stage('train').values()
    assert row['tokens_per_second'] > 0
    assert row['losses'] == pytest.approx(TORCH_LOSSES, rel=1e-5)
    assert all('count' in row for row in record.stage('train_ops').values())
    assert len(record.stage('train_ops')) == 12
    assert 'torch is not installed' in outcome([r for r in record.rows if r['stage'] == 'peer'][0])


def test_smoke_of_decode(tmp_path, quick_compilation):
    rows = run('decode', tmp_path).stage('decode')
    assert [row['slots'] for row in rows.values()] == [1, 2]
    assert all(row['bytes'] > 0 for row in rows.values())


def test_smoke_of_determinism(tmp_path, quick_compilation):
    rows = run('determinism', tmp_path).stage('determinism')
    assert len(rows) == 2 and all(row['equal'] for row in rows.values())


def test_an_array_that_differs_is_named():
    first = determinism._digests({'loss': jnp.ones(3), 'moment': jnp.zeros(2)})
    assert determinism._different([first, dict(first), dict(first)]) == []
    other = determinism._digests({'loss': jnp.ones(3), 'moment': -jnp.zeros(2)})
    assert determinism._different([first, first, other]) == ['moment']


def test_rows_of_an_earlier_run_stay_when_part_is_measured_again(tmp_path):
    run('kernels', tmp_path, '--only', 'launch')
    record = run('kernels', tmp_path, '--only', 'copy')
    assert [row['name'] for row in record.rows] == ['launch', 'copy']


STAGE = """
import json, os, sys, time
first, path = int(sys.argv[sys.argv.index('--first') + 1]), sys.argv[-1]
names = ['good', 'crash', 'hang', 'last']
with open(path, 'a') as file:
    def write(line):
        file.write(json.dumps(line) + chr(10))
        file.flush()
    write({'about': {'device': 'none'}, 'names': names})
    for name in names[first:]:
        if name == 'crash':
            os.abort()
        if name == 'hang':
            time.sleep(60)
        write({'name': name, 'value': 1})
"""


def test_what_crashes_or_hangs_costs_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, 'PATIENCE', 1.0)
    record = Record(tmp_path, 'kernels', smoke=True)
    Runner(record, 60).run_command('stage', [sys.executable, '-c', STAGE])
    found = {row['name']: outcome(row) for row in record.rows}
    assert list(found) == ['good', 'crash', 'hang', 'last']
    assert found['good'] == found['last'] == ''
    assert 'FAILED: the process ended with -6' in found['crash']
    assert found['hang'] == 'FAILED: no result within 1 s'
    assert json.loads(record.path.read_text())['rows'] == record.rows


def test_when_the_time_is_out_the_rest_is_named(tmp_path):
    record = Record(tmp_path, 'kernels', smoke=True)
    hanging = STAGE.replace("names = ['good', 'crash', ", "names = ['good', ")
    Runner(record, 2).run_command('stage', [sys.executable, '-c', hanging])
    assert [outcome(row) for row in record.rows] == ['', *['not run: the time is out'] * 2]


def test_a_stage_runs_in_a_process_of_its_own(tmp_path):
    record = Record(tmp_path, 'kernels', smoke=True)
    Runner(record, 60, smoke=True, only=('launch',)).run('timing')
    [row] = record.rows
    assert row['name'] == 'launch' and row['microseconds'] > 0
    assert record.values['platform'] == 'cpu'


def outputs(**changes):
    exact = {'out': jnp.array([1.0, -2.0, 3.0]), 'lse': jnp.array([0.5, -jnp.inf])}
    return exact | changes


@pytest.mark.parametrize(
    'changes',
    [
        {'out': jnp.array([1.0, -2.0, 3.1])},
        {'out': jnp.array([1.0, -2.0, jnp.nan])},
        {'out': jnp.zeros(3)},
        {'lse': jnp.array([0.5, -1e30])},
        {'lse': jnp.array([-jnp.inf, -jnp.inf])},
    ],
)
def test_numerics_see_what_is_wrong(changes):
    right = functools.partial(outputs, out=jnp.array([1.0, -2.0, 3.0001]))
    assert numerics.compare(right, outputs(), outputs())['held']
    assert not numerics.compare(lambda: outputs(**changes), outputs(), outputs())['held']


def test_numerics_allow_twice_the_error_of_xla():
    of_xla = outputs(out=jnp.array([1.0, -2.0, 3.01]))
    for error, held in ((0.019, True), (0.022, False)):
        got = outputs(out=jnp.array([1.0, -2.0, 3.0 + error]))
        assert numerics.compare(lambda got=got: got, of_xla, outputs())['held'] == held


def test_numerics_want_the_same_bits_each_time():
    draws = iter([0.0, 0.0, 1e-6])
    row = numerics.compare(
        lambda: outputs(out=jnp.array([1.0, -2.0, 3.0 + next(draws)])), outputs(), outputs()
    )
    assert not row['repeatable'] and not row['held']


def record_of(tmp_path, **verdicts) -> Record:
    """Numerics of a GPU, made up."""
    record = Record(tmp_path, 'kernels', smoke=False)
    record.set(device='NVIDIA H200', platform='gpu')
    for op, held in verdicts.items():
        for index, each in enumerate(held):
            row = {'held': each} if each is not None else {'not_run': 'the time is out'}
            record.add(
                {'stage': 'numerics', 'name': f'{op} M{index}', 'error': 1, 'of_xla': 1} | row
            )
    return record


def test_only_an_op_whose_whole_grid_is_held_is_written_down_as_proven(tmp_path):
    path = tmp_path / 'proven.json'
    earlier = [{'op': 'decode_attention', 'device': device} for device in ('H200', 'H100')]
    path.write_text(json.dumps(earlier))
    grids = dict(rms_norm=[True, True], flash_attention=[True, None], decode_attention=[False])
    entries = kernels.record_proven(record_of(tmp_path, **grids), path)
    found = {(entry['op'], entry['device']) for entry in entries}
    assert found == {('rms_norm', 'H200'), ('decode_attention', 'H100')}
    assert json.loads(path.read_text()) == entries
    assert entries[1]['date'] and entries[1]['versions']['jax']


def test_nothing_is_proven_without_a_gpu(kernels_record, tmp_path):
    with pytest.raises(SystemExit, match='without a GPU'):
        kernels.record_proven(kernels_record, tmp_path / 'proven.json')


def test_goals_are_held_or_missed(tmp_path):
    record = record_of(tmp_path)
    causal = 'attention causal B4 S4096 H32/32 D128'
    for name, tflops in ((f'{causal} forward', 650.0), (f'{causal} backward', 300.0)):
        for implementation, slower in (('mosaic', 1), ('xla', 2)):
            row = {
                'stage': 'speed',
                'name': f'{name} / {implementation}',
                'tflops': tflops / slower,
            }
            record.add(row | {'microseconds': 1e6 * slower / tflops})
    verdicts = {each['name']: each['held'] for each in kernels.bars(record)}
    assert verdicts['flash attention forward, TFLOP/s'] is True
    assert verdicts['flash attention backward, TFLOP/s'] is False
    assert verdicts['slowest shape, times XLA'] is True
    assert verdicts['cross-entropy, ms'] is None
    assert bar('ms', 106.0, 105.0, at_least=False)['held'] is False


def test_the_floor_is_the_larger_of_matmul_and_copy():
    ceilings = {'matmul': {'tflops': 500.0}, 'copy': {'gigabytes_per_second': 4000.0}}
    row = {'flops': 1e12, 'bytes': 4e9}
    assert floor_microseconds(row, ceilings) == pytest.approx(2000)
    assert floor_microseconds(row | {'bytes': 16e9}, ceilings) == pytest.approx(4000)


@pytest.mark.parametrize('name', ['causal', 'packed', 'single', 'masked', 'permuted', 'continued'])
def test_layouts_are_what_they_are_called(name):
    T, S = (32, 64) if name == 'continued' else (64, 64)
    q_positions, q_segments, positions, segments = documents.layout(name, 2, T, S)
    mask = peers.references.visible(q_positions, q_segments, positions, segments, 0)
    seen = mask.sum(-1)
    assert mask.shape == (2, T, S)
    if name in ('causal', 'continued'):
        assert seen[0].tolist() == list(range(S - T + 1, S + 1))
    elif name == 'single':
        assert set(seen.flatten().tolist()) == {0, 1}
    elif name == 'masked':
        assert seen[1].max() == 0 and seen[0].max() == S
    else:
        assert 1 < seen.max() < S / 2 and seen.min() == 0


def test_rows_of_documents_are_full_and_their_pairs_counted():
    rows = documents.lengths(4, 4096)
    assert all(sum(row) == 4096 for row in rows) and len(rows[0]) > 2
    told = peers.Rows(rows)
    assert told.starts[-1] == 4 * 4096
    pairs = documents.visible_pairs(rows)
    exact = sum(length * (length + 1) / 2 for row in rows for length in row)
    assert math.isclose(pairs, exact, rel_tol=1e-2)
    [window] = [documents.visible_pairs([[1000]], window=10)]
    assert math.isclose(window, 10 * 1000, rel_tol=1e-2)


def test_the_readme_says_of_every_kernel_where_it_is_proven():
    entries = json.loads((ROOT / 'pallas_kernels' / 'proven.json').read_text())
    lines = (ROOT / 'README.md').read_text().splitlines()
    for op in numerics.OPS:
        [line] = [line for line in lines if line.startswith(f'| `{op}` |')]
        proofs = [f'proven on {e["device"]}, {e["date"]}' for e in entries if e['op'] == op]
        assert line.endswith(f'| {"; ".join(proofs) or "unproven on hardware"} |'), line
