"""The batches of every packing are those of the golden, which an earlier data path has written.

`python -m tests.data.test_batch_goldens` writes tests/goldens/batches.json: digests of the first
batches and of two far ones, for one process and for every process of two and three.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from jaxfm.data.loader import PackedBatches
from jaxfm.data.packing.rows import BestFit, Concat, OneEach
from tests.data.streams import stream
from tests.data.test_streaming import batches as on_the_fly

GOLDEN = Path(__file__).parent.parent / 'goldens' / 'batches.json'
T, BATCH_SIZE, STEPS, SEED = 32, 6, 4, 3
# Where to go after the first steps: a batch's start, and inside a batch, as after another size.
FAR = (6 * 10**8, 10**9 + 1)
PROCESSES = (1, 2, 3)
# Two more than FEW_ROWS of jaxfm/data/order.py, so that Grain shuffles them.
MANY = [32] * 4098


def draw(longest: int, count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(2, longest, count)


def texts(place):
    return stream(draw(90, 60), place)


def chats(place):
    return stream(draw(33, 70), place, seed=1, is_chat=True)


CASES = {
    'concat': lambda place: {'texts': Concat(texts(place), T)},
    'concat many': lambda place: {'texts': Concat(stream(MANY, place, seed=2), T)},
    'best_fit': lambda place: {'texts': BestFit(texts(place), T)},
    'best_fit chats': lambda place: {'chats': BestFit(chats(place), T)},
    'none': lambda place: {'texts': OneEach(texts(place), T)},
    'none chats': lambda place: {'chats': OneEach(chats(place), T)},
    'none many': lambda place: {'texts': OneEach(stream(MANY, place, seed=2), T)},
    'mixture': lambda place: {
        'texts': Concat(texts(place), T),
        'chats': BestFit(chats(place), T),
        'few': OneEach(stream([30, 31, 32], place, seed=3), T),
        'many': Concat(stream(MANY, place, seed=2), T),
    },
}
WEIGHTS = {'texts': 0.55, 'chats': 0.2, 'few': 0.05, 'many': 0.2}


def digest(batch: dict[str, np.ndarray]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        hashed.update(f'{name} {array.dtype.str} {array.shape}'.encode() + array.tobytes())
    return hashed.hexdigest()[:32]


def digests(source, far) -> list[str]:
    """Digests of the first batches, and of two from every far row on."""
    found = [digest(source.next(None, step)) for step in range(STEPS)]
    for row in far:
        source.set_state(source.get_state() | {'next_row': row})
        found += [digest(source.next(None, step)) for step in range(2)]
    return found


def shares(make, far) -> dict[str, list[str]]:
    """{'process/processes': digests of its batches}."""
    return {
        f'{index}/{count}': digests(make(rows), far)
        for count in PROCESSES
        for index, rows in enumerate(np.split(np.arange(BATCH_SIZE), count))
    }


def collect_packed(case: str, place) -> dict[str, list[str]]:
    packings = CASES[case](place)
    return shares(lambda rows: PackedBatches(packings, WEIGHTS, BATCH_SIZE, SEED, rows), FAR)


def collect_streamed() -> dict[str, list[str]]:
    return shares(on_the_fly, ())


@pytest.mark.parametrize('case', CASES)
def test_batches_are_those_of_the_golden(case, tmp_path):
    assert collect_packed(case, tmp_path) == json.loads(GOLDEN.read_text())[case]


def test_batches_made_on_the_fly_are_those_of_the_golden():
    assert collect_streamed() == json.loads(GOLDEN.read_text())['on_the_fly']


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as directory:
        golden = {case: collect_packed(case, directory) for case in CASES}
    golden['on_the_fly'] = collect_streamed()
    GOLDEN.write_text(json.dumps(golden, indent=1) + '\n')
