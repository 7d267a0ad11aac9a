"""The choice of an implementation: a name runs or is an error, None takes what is proven."""

import logging

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxfm import ops
from jaxfm.ops import choice
from jaxfm.ops.choice import Device, choose, decide, target
from pallas_kernels import _tables

KINDS = ('mosaic', 'cudnn', 'fa3', 'xla', 'interpret')


@pytest.fixture(autouse=True)
def an_op_with_everything(monkeypatch):
    monkeypatch.setitem(ops.IMPLEMENTATIONS, 'op', KINDS)
    monkeypatch.setattr(choice, '_told', set())


@pytest.fixture
def proven(monkeypatch):
    """Marks the op as proven on an H200, with measurements that a test may change."""
    entry = {'op': 'op', 'device': 'H200', 'date': '2026-11-27', 'speed_over_xla': 1.2}
    entry['source'] = _tables.source_digest('op')
    monkeypatch.setattr(_tables, '_read', lambda path: [entry])
    return entry


def on(kind: str, platform: str = 'gpu'):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def test_the_target_is_the_device_of_the_mesh():
    assert target() == Device('cpu', 'cpu')
    with on('NVIDIA H200'):
        assert target() == Device('gpu', 'NVIDIA H200')
    with jax.set_mesh(jax.make_mesh((1,), ('x',))):
        assert target() == Device('cpu', 'cpu')


@pytest.mark.parametrize(
    'kind',
    ['NVIDIA H100 80GB HBM3', 'NVIDIA H200', 'NVIDIA H800', 'NVIDIA H20', 'NVIDIA GH200 480GB'],
)
def test_kernels_run_on_hopper(kind):
    with on(kind):
        assert all(choose('op', name) == name for name in KINDS)


@pytest.mark.parametrize(
    'kind, platform, name, words',
    [
        ('cpu', 'cpu', 'mosaic', ['needs a Hopper GPU', 'the device is cpu', "'interpret' to sim"]),
        ('cpu', 'cpu', 'fa3', ['needs a Hopper GPU', 'the device is cpu', "use 'xla'"]),
        ('cpu', 'cpu', 'cudnn', ['needs an NVIDIA GPU', 'the device is cpu', "use 'xla'"]),
        ('NVIDIA A100-SXM4-40GB', 'gpu', 'mosaic', ['needs a Hopper GPU', 'A100-SXM4-40GB (gpu)']),
        ('NVIDIA B200', 'gpu', 'mosaic', ['needs a Hopper GPU', 'NVIDIA B200 (gpu)']),
    ],
)
def test_a_name_that_the_device_cannot_run_is_an_error(kind, platform, name, words):
    with on(kind, platform), pytest.raises(ValueError, match=f"op cannot run as '{name}'") as told:
        choose('op', name)
    assert all(word in str(told.value) for word in words)


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(ValueError, match="'triton'; it has mosaic, cudnn, fa3, xla, interpret"):
        choose('op', 'triton')


@pytest.mark.parametrize('name', ['mosaic', 'interpret'])
def test_a_name_that_cannot_run_the_call_is_an_error(name):
    with on('NVIDIA H200'), pytest.raises(ValueError, match=f"'{name}': head_dim 80"):
        choose('op', name, {'mosaic': 'head_dim 80 is none of 64, 128, 256'})


def test_simulating_a_kernel_needs_no_gpu():
    assert choose('op', 'interpret') == 'interpret'


@pytest.mark.parametrize(
    'kind, why',
    [('cpu', 'needs a Hopper GPU, this is cpu'), ('NVIDIA H200', 'not proven on NVIDIA H200')],
)
def test_an_unproven_kernel_is_not_chosen(kind, why):
    with on(kind):
        chosen = decide('op', None)
    assert chosen.name == 'xla'
    assert why in chosen.reason


def test_a_proven_kernel_is_chosen_if_it_supports_the_call(proven):
    with on('NVIDIA H200'):
        assert decide('op', None) == choice.Choice('mosaic', 'proven on NVIDIA H200 on 2026-11-27')
        assert decide('op', None, {'mosaic': 'too wide'}) == choice.Choice('xla', 'too wide')
    for other in ('NVIDIA H100 80GB HBM3', 'cpu'):
        with on(other):
            assert decide('op', None).name == 'xla'


@pytest.mark.parametrize(
    'change, why',
    [
        ({'speed_over_xla': 0.9}, "runs at 0.90 of XLA's speed"),
        ({'speed_over_xla': None}, 'never timed'),
        ({'source': 'of another kernel'}, 'not proven on NVIDIA H200'),
    ],
)
def test_a_kernel_that_is_slower_or_has_changed_since_is_not_chosen(proven, change, why):
    proven |= change
    with on('NVIDIA H200'):
        chosen = decide('op', None)
    assert chosen.name == 'xla' and why in chosen.reason


def test_the_choice_for_none_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, 'jaxfm'):
        for _ in range(3):
            choose('op', None)
            choose('op', 'xla')
    [record] = caplog.records
    assert record.message == 'op runs as xla: the kernel needs a Hopper GPU, this is cpu'


@pytest.mark.parametrize('op', sorted(ops.IMPLEMENTATIONS))
def test_every_op_runs_as_xla(op):
    assert choose(op, 'xla') == 'xla'
