"""The GPU benchmark runs from end to end on a CPU, and reports what is wrong."""

import gc
import json
import math
import os
import sys
import weakref
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._compat import interpreted_races
from tests.conftest import ROOT
from tools.bench.gpu import __main__ as gpu
from tools.bench.gpu import (
    determinism,
    documents,
    kernels,
    numerics,
    peers,
    stages,
    train,
)
from tools.bench.gpu.record import Record, outcome
from tools.bench.gpu.stages import Runner, quick
from tools.bench.gpu.timing import floor_microseconds

# Losses of tools/bench/peers/llama_torch.py with torch 2.13 on a CPU, from the initial weights that
# this jax draws: --part train --smoke --peer_python PYTHON.
TORCH_LOSSES = [6.664012, 6.371418, 6.107687]


def main(argv: list[str]) -> int:
    """The command, without the variables that it sets for a process of its own."""
    with mock.patch.dict(os.environ):
        return gpu.main(argv)


def run(part: str, directory: Path, *more: str) -> Record:
    assert main(['--part', part, '--out', str(directory), '--smoke', *more]) == 0
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
        rows = kernels_record.stage('numerics').items()
        own = [row for name, row in rows if name.split()[0] == op]
        assert own and all(row['held'] for row in own), op
    refused = {outcome(row) for row in kernels_record.rows if 'refused' in row}
    said = ('not installed', 'no public API')
    assert all(any(words in reason for words in said) for reason in refused), refused
    values = json.loads(kernels_record.path.read_text())
    assert {'device', 'date', 'versions', 'collected', 'bars', 'seconds'} <= values.keys()
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


def test_a_hang_leaves_time_for_the_rows_behind_it(tmp_path):
    record = Record(tmp_path, 'kernels', smoke=True)
    hanging = STAGE.replace("names = ['good', 'crash', ", "names = ['good', ")
    Runner(record, 60).run_command(
        'stage', [sys.executable, '-c', hanging], limit=6, patience=quick(6)
    )
    assert [outcome(row) for row in record.rows] == ['', 'FAILED: no result within 2 s', '']


class Plan(Runner):
    """Records what would run; every stage takes `pace` times its limit."""

    pace = 1.0

    def run(self, stage, limit=float('inf'), environment=None, patience=None, **options):
        limit = min(limit, self.left)
        self.stages = [*getattr(self, 'stages', []), (stage, limit, patience, options)]
        self._end -= self.pace * limit


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A function: patterns of --only -> (planned stages, {test file: seconds}, record)."""

    def run(*only, pace=1.0):
        files = {}

        def run_tests(paths, seconds):
            files[paths[0]] = seconds
            return {'exit_code': 0, 'counts': {'PASSED': 3}, 'said': ''}

        monkeypatch.setattr(kernels, 'run_tests', run_tests)
        record = Record(tmp_path, 'kernels', smoke=False)
        runner = Plan(record, 510, only=only)
        runner.pace = pace
        kernels.run(record, runner)
        return getattr(runner, 'stages', []), files, record

    return run


def test_no_stage_of_kernels_waits_for_a_hang_until_its_time_is_out(plan):
    stages, _, _ = plan()
    assert {stage for stage, *_ in stages} == {'timing', 'numerics', 'speed'}
    assert all(patience <= min(30, limit / 3) for _, limit, patience, _ in stages)


def test_the_op_with_most_cases_has_most_of_the_time_and_ours_come_before_others(plan):
    stages, _, _ = plan(pace=0.4)
    limits = {options['op']: limit for stage, limit, _, options in stages if stage == 'numerics'}
    assert list(limits)[-1] == 'attention' and limits['attention'] > 180
    groups = [options['implementations'] for stage, *_, options in stages if stage == 'speed']
    assert groups[0] == ['mosaic'] and 'mosaic' not in sum(groups[1:], [])


def test_a_stage_can_be_asked_for_alone(plan):
    stages, files, _ = plan('numerics')
    assert {stage for stage, *_ in stages} == {'timing', 'numerics'} and not files
    limits = {options['op']: limit for _, limit, _, options in stages[1:]}
    assert limits['attention'] > 200


def test_gpu_tests_run_file_by_file_and_those_left_out_are_named(plan, monkeypatch):
    stages, files, record = plan('tests', pace=0.2)
    assert len(stages) == 1 and list(files) == kernels.test_files()
    assert {kernels._op(file) for file in files} == set(numerics.OPS)
    assert all(seconds >= kernels.LEAST_SECONDS for seconds in files.values())
    _, files, record = plan()
    assert not files
    assert {found['not_run'] for found in record.values['tests'].values()} == {'out of time'}


def test_of_another_device_nothing_stays(tmp_path):
    record = Record(tmp_path, 'kernels', smoke=False)
    record.set_device({'device': 'NVIDIA H100'})
    record.add({'stage': 'numerics', 'name': 'rms_norm', 'held': True})
    record.set(tests={'file': {'exit_code': 0}})
    record.set_device({'device': 'NVIDIA H100'})
    assert record.rows and record.values['tests']
    record.set_device({'device': 'NVIDIA H200'})
    assert not record.rows and not record.values['tests']


def test_a_stage_that_had_no_time_to_start_is_no_failure(tmp_path):
    record = Record(tmp_path, 'kernels', smoke=True)
    for limit, patience, said in ((0.2, 60, 'not run: '), (60, 0.5, 'FAILED: no result within')):
        command = [sys.executable, '-c', 'import time; time.sleep(60)']
        Runner(record, 60).run_command('stage', command, limit=limit, patience=patience)
        assert outcome(record.rows[0]).startswith(said)
    assert not Record(tmp_path, 'kernels', smoke=True, resume=True).rows


def test_of_training_only_what_is_asked_for_has_a_process(tmp_path):
    runner = Plan(Record(tmp_path, 'train', smoke=False), 510, only=('mosaic unrolled',))
    runner.pace = 0.0
    train.run(runner.record, runner)
    names = [options['names'] for stage, *_, options in runner.stages if stage == 'train']
    assert names == [['mosaic unrolled']] and not runner.record.rows


def test_compiled_programs_of_all_processes_are_kept(monkeypatch, tmp_path):
    seen = tmp_path / 'seen'
    stage = "import os, sys; open(sys.argv[1], 'w').write(os.environ['{}'])"
    name = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
    monkeypatch.delenv(name, raising=False)
    command = [sys.executable, '-c', stage.format(name), str(seen)]
    stages._watch(command, math.inf, 60, None, print)
    assert seen.read_text() == '0'


def test_a_row_of_two_runs_may_be_silent_until_both_are_done(tmp_path):
    runner = Plan(Record(tmp_path, 'determinism', smoke=False), 510)
    determinism.run(runner.record, runner)
    [(_, _, patience, _)] = runner.stages
    assert patience > 2 * determinism.RUN_SECONDS


def test_what_did_not_fit_is_freed_before_less_is_tried(monkeypatch):
    held = []

    class Arrays:
        pass

    def train_step(smoke, weights, rows, remat, **variant):
        assert not [each for each in held if each() is not None]
        arrays = Arrays()
        arrays.itself = arrays  # a cycle: only the garbage collector frees it
        held.append(weakref.ref(arrays))
        if rows > 2:
            raise RuntimeError('RESOURCE_EXHAUSTED: as said')
        return {'rows': rows}

    monkeypatch.setattr(train, '_train', train_step)
    gc.disable()
    try:
        row = train._first_that_fits(False, '')
    finally:
        gc.enable()
    assert row == {'rows': 2, 'out_of_memory_at_rows': [8, 4]}


def test_every_goal_of_training_is_measured_before_the_other_variants():
    assert set(list(train.VARIANTS)[:3]) == {
        'cudnn scanned',
        'mosaic scanned',
        'cudnn scanned, fp8',
    }


def test_proofs_are_of_kernels_on_a_gpu_and_that_is_said_at_once(tmp_path, capsys):
    for wrong in (['--part', 'train'], ['--part', 'kernels', '--smoke']):
        with pytest.raises(SystemExit) as error:
            main([*wrong, '--out', str(tmp_path), '--record_proven'])
        assert error.value.code == 2
        assert '--record_proven is for --part kernels' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_row_that_failed_is_seen_in_the_exit_code(tmp_path, monkeypatch):
    for row, code in (
        ({'refused': 'not installed'}, 0),
        ({'failed': 'no result within 30 s'}, 1),
        ({'held': False, 'error': 1.0, 'of_xla': 0.1}, 1),
    ):
        row |= {'stage': 'numerics', 'name': 'rms_norm'}
        monkeypatch.setattr(kernels, 'run', lambda record, runner, row=row: record.add(row))
        assert main(['--part', 'kernels', '--out', str(tmp_path), '--smoke']) == code


def test_when_the_time_is_out_the_rest_is_named(tmp_path):
    record = Record(tmp_path, 'kernels', smoke=True)
    hanging = STAGE.replace("names = ['good', 'crash', ", "names = ['good', ")
    Runner(record, 2).run_command('stage', [sys.executable, '-c', hanging])
    assert [outcome(row) for row in record.rows] == ['', *['not run: out of time'] * 2]


def test_a_stage_runs_in_a_process_of_its_own(tmp_path):
    record = Record(tmp_path, 'kernels', smoke=True)
    Runner(record, 60, smoke=True, only=('launch',)).run('timing')
    [row] = record.rows
    assert row['name'] == 'launch' and row['microseconds'] > 0
    assert record.values['platform'] == 'cpu'


def test_nothing_is_proven_without_a_gpu(kernels_record, tmp_path):
    with pytest.raises(SystemExit, match='without a GPU'):
        kernels.record_proven(kernels_record, tmp_path / 'proven.json')


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


def test_the_page_on_kernels_says_where_each_is_proven():
    entries = json.loads((ROOT / 'pallas_kernels' / 'proven.json').read_text())
    lines = (ROOT / 'docs' / 'kernels.md').read_text().splitlines()
    for op in numerics.OPS:
        [line] = [line for line in lines if line.startswith(f'| `{op}` |')]
        proofs = [f'proven on {e["device"]}, {e["date"]}' for e in entries if e['op'] == op]
        assert line.endswith(f'| {"; ".join(proofs) or "unproven on hardware"} |'), line
