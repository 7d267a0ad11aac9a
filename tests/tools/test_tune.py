"""The tuner: what it tries, what it chooses, and that kernels find its choice."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from pallas_kernels import _tables
from tools import tune
from tools.bench.gpu.speed import Call


@dataclasses.dataclass(frozen=True)
class Tiles:
    size: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Computes x + 1; something else with size 4; raises with size 8."""

    name: str = 'shape'

    def kernel(self, part, tiles):
        if tiles.size == 8:
            raise ValueError('does not fit')
        return Call(lambda x: x + (1 if tiles.size != 4 else 2), (jnp.ones(8),))


@dataclasses.dataclass(frozen=True)
class Problem:
    shape: Shape
    part: str
    key: dict = dataclasses.field(default_factory=lambda: dict(dtype='bfloat16', head_dim=64))
    candidates: tuple = (Tiles(1), Tiles(2), Tiles(4), Tiles(8))
    name: str = 'problem'


def times(**by_size):
    """A `measure` that returns these times; wrong outputs still raise."""

    def measure(problem, tiles, expected):
        _, outputs = tune.measure_on_gpu(problem, tiles, expected)
        return by_size[f'of_{tiles.size}'], outputs

    return measure


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, 'microseconds', lambda *_: {'microseconds': 0.0})
    _tables._read.cache_clear()
    yield tmp_path / 'tiles.json'
    _tables._read.cache_clear()


def test_the_quickest_right_candidate_is_what_the_kernel_finds(table, capsys):
    problem = Problem(Shape(), 'forward')
    tune.tune('op', table, [problem], times(of_1=30.0, of_2=20.0, of_4=10.0, of_8=5.0))
    assert _tables.find(table.parent, 'cpu', **problem.key) == {'size': 2}
    [entry] = json.loads(table.read_text())
    assert entry['measured'] == {'date': entry['measured']['date'], 'microseconds': 20.0}
    said = capsys.readouterr().out
    assert 'differs by' in said and 'ValueError: does not fit' in said


def test_shapes_of_one_key_are_taken_together_and_an_older_entry_goes(table):
    problems = [Problem(Shape(name), 'forward') for name in ('short', 'long')]
    other = Problem(Shape(), 'forward', key=dict(dtype='bfloat16', head_dim=128))
    right = (Tiles(1), Tiles(2))
    problems = [dataclasses.replace(problem, candidates=right) for problem in (*problems, other)]
    taken = {('short', 1): 10.0, ('short', 2): 11.0, ('long', 1): 100.0, ('long', 2): 50.0}

    def measure(problem, tiles, expected):
        return taken.get((problem.shape.name, tiles.size), tiles.size), None

    for _ in range(2):
        tune.tune('op', table, problems, measure)
    found = [(entry['head_dim'], entry['tiles']) for entry in json.loads(table.read_text())]
    assert found == [(128, {'size': 1}), (64, {'size': 2})]


def test_a_candidate_that_does_not_compile_is_told(capsys):
    assert not tune.compile_all([Problem(Shape(), 'forward', candidates=(Tiles(8),))])
    assert 'does not fit' in capsys.readouterr().out


@pytest.mark.parametrize('op', tune.OPS)
def test_every_kernel_has_candidates_for_the_shapes_of_the_benchmark(op):
    problems = tune.problems(op)
    assert problems
    for problem in problems:
        assert problem.candidates and json.dumps(problem.key)
        assert all(dataclasses.asdict(tiles) for tiles in problem.candidates)


def test_without_a_gpu_nothing_is_measured(tmp_path):
    with pytest.raises(SystemExit, match='no GPU here'):
        tune.main(['--op', 'rms_norm', '--out', str(tmp_path)])
