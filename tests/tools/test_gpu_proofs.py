"""What the GPU benchmark accepts as correct, as proven and as fast enough."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._tables import source_digest
from tools.bench.gpu import kernels, numerics, speed
from tools.bench.gpu.record import Record, bar


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


def test_arrays_of_the_grid_are_no_constants_of_what_is_compiled(quick_compilation):
    for case in numerics.SMOKE_GRID:
        kernel, _, _ = case.outputs(interpret=True)
        traced = jax.make_jaxpr(kernel.func)(*kernel.args)
        assert sum(constant.size for constant in traced.consts) < 64, case


def test_with_one_key_rounding_is_no_failure_and_a_wrong_gradient_is_one():
    [case] = [case for case in numerics.GRID if getattr(case, 'layout', '') == 'single']
    zeros = {name: jnp.zeros(8) for name in ('dq', 'dk')}
    for error, held in ((3e-6, True), (0.3, False)):
        got = {'dq': jnp.full(8, error), 'dk': jnp.zeros(8)}
        row = numerics.compare(lambda got=got: got, zeros, zeros, least=case.least)
        assert row['held'] == held
    assert not numerics.Attention(1, 128, 2, 1, 64).least


def record_of(tmp_path, *ops: str) -> Record:
    """A made-up record of a GPU on which these ops passed everything."""
    record = Record(tmp_path, 'kernels', smoke=False)
    record.set(device='NVIDIA H200', platform='gpu', tests={})
    for op in ops:
        source = {'source': source_digest(op)}
        for name in numerics.names(op):
            row = {'stage': 'numerics', 'name': name, 'held': True, 'error': 0.1, 'of_xla': 0.1}
            record.values['rows'].append(row | source)
        passed = {'exit_code': 0, 'counts': {'PASSED': 3}, 'said': '', 'failed_tests': []}
        for file in kernels.test_files(op):
            record.values['tests'][file] = passed | source
        for name in calls(op):
            for implementation, microseconds in (('mosaic', 10.0), ('xla', 15.0)):
                row = {'stage': 'speed', 'name': f'{name} / {implementation}'}
                record.values['rows'].append(row | source | {'microseconds': microseconds})
    return record


def calls(op: str) -> list[str]:
    shapes = [shape for shape in speed.SHAPES if shape.op == op]
    return [f'{shape.name} {part}' for shape in shapes for part in shape.parts]


@pytest.mark.parametrize('op', numerics.OPS)
def test_what_passed_is_proven_and_says_of_which_source_and_how_fast(op, tmp_path):
    path = tmp_path / 'proven.json'
    path.write_text('[]')
    record = record_of(tmp_path, op)
    [entry] = kernels.record_proven(record, path)
    assert json.loads(path.read_text()) == [entry]
    about = {name: entry[name] for name in ('op', 'device', 'source', 'speed_over_xla')}
    source = source_digest(op)
    assert about == {'op': op, 'device': 'H200', 'source': source, 'speed_over_xla': 1.5}
    assert entry['date'] and entry['versions']['jax']


def without_a_case(record):
    name = numerics.names('attention')[7]
    record.values['rows'] = [row for row in record.rows if row['name'] != name]


def with_a_case_cut_off(record):
    name = numerics.names('attention')[7]
    record.add({'stage': 'numerics', 'name': name, 'not_run': 'out of time'})


def with_a_case_wrong(record):
    row = {'name': numerics.names('attention')[7], 'held': False, 'error': 1, 'of_xla': 0}
    record.add({'stage': 'numerics', 'source': source_digest('attention')} | row)


def with_a_case_of_another_source(record):
    name = numerics.names('attention')[7]
    [row] = [row for row in record.rows if row['name'] == name]
    row['source'] = 'other'


def change_tests(record, **changes):
    file = kernels.test_files('attention')[1]
    record.values['tests'][file] |= changes


LACKING = {
    'a case is missing': (without_a_case, True),
    'a case was cut off': (with_a_case_cut_off, True),
    'a case is wrong': (with_a_case_wrong, False),
    'a case is of another source': (with_a_case_of_another_source, True),
    'a test failed': (
        functools.partial(change_tests, exit_code=1, counts={'PASSED': 2, 'FAILED': 1}),
        False,
    ),
    'a test was skipped': (functools.partial(change_tests, counts={'SKIPPED': 3}), False),
    'tests were not done': (functools.partial(change_tests, exit_code=None), False),
    'tests were of another source': (functools.partial(change_tests, source='other'), True),
    'tests did not run': (lambda record: record.values['tests'].clear(), True),
}


@pytest.mark.parametrize('name', LACKING)
def test_less_than_all_is_no_proof_and_what_failed_is_struck_off(name, tmp_path):
    change, stays = LACKING[name]
    record, path = record_of(tmp_path, 'attention', 'rms_norm'), tmp_path / 'proven.json'
    earlier = [{'op': 'attention', 'device': device} for device in ('H100', 'H200')]
    path.write_text(json.dumps(earlier))
    change(record)
    assert 'attention' not in kernels.list_proven(record)
    found = kernels.record_proven(record, path)
    kept = [entry for entry in found if entry['op'] == 'attention']
    assert kept == earlier[: 2 if stays else 1]


def test_speed_over_xla_is_that_of_the_worst_shape_and_of_all_shapes(tmp_path):
    record = record_of(tmp_path, 'attention')
    *_, call, last = calls('attention')

    def speed_after(**changes):
        [row] = [row for row in record.rows if row['name'] == f'{call} / xla']
        row |= changes
        return kernels.speed_over_xla(record, 'attention')

    assert speed_after(microseconds=8.0) == pytest.approx(0.8)
    record.add({'stage': 'speed', 'name': f'{last} / xla', 'failed': 'out of memory'})
    assert speed_after(microseconds=20.0) == pytest.approx(1.5)
    record.add({'stage': 'speed', 'name': f'{last} / mosaic', 'not_run': 'out of time'})
    assert speed_after() is None


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
