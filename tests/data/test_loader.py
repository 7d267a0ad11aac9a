import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxfm.data import loader
from jaxfm.data.order import shuffle
from jaxfm.data.packing.rows import BestFit, Concat
from jaxfm.errors import ConfigError, DataError
from tests.data.streams import BOS, stream
from tests.runs import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
T = 32
DRAW = np.random.default_rng(5)
TEXTS = DRAW.integers(2, 90, 60)
CHATS = DRAW.integers(2, 33, 70)
WEIGHTS = {'texts': 0.7, 'chats': 0.25, 'few': 0.05}


@pytest.fixture
def packings(tmp_path):
    """Three sources: texts, chats, and one with three rows."""
    return {
        'texts': Concat(stream(TEXTS, tmp_path), T),
        'chats': BestFit(stream(CHATS, tmp_path, seed=1, is_chat=True), T),
        'few': Concat(stream([30, 31, 32], tmp_path, seed=2), T),
    }


@pytest.fixture
def batches(packings):
    """Makes a source of batches with 6 rows of 32 tokens, from texts only or from all three."""

    def make(names=('texts',), rows=None, seed=3, batch_size=6, weights=WEIGHTS):
        chosen = {name: packings[name] for name in names}
        return loader.PackedBatches(chosen, weights, batch_size, seed, rows)

    return make


MIXED = ('texts', 'chats', 'few')
BOTH = pytest.mark.parametrize('names', [('texts',), MIXED], ids=['one', 'mixture'])


def take(source, count):
    return [source.next(None, step) for step in range(count)]


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])


def test_an_epoch_has_every_row_once_and_the_next_one_in_another_order(batches, packings):
    rows = packings['texts'].num_rows
    source = batches(batch_size=1)
    epochs = [[batch['tokens'].tobytes() for batch in take(source, rows)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    in_order = packings['texts'].rows(np.arange(rows))['tokens']
    assert sorted(epochs[0]) == sorted(row.tobytes() for row in in_order)


def test_every_epoch_of_every_source_has_a_new_order(batches, packings):
    source = batches(MIXED, batch_size=100)
    rows = np.concatenate([batch['tokens'] for batch in take(source, 10)])
    few = packings['few'].rows(np.arange(3))['tokens']
    number = {row.tobytes(): index for index, row in enumerate(few)}
    seen = [number[row.tobytes()] for row in rows if row.tobytes() in number]
    assert len(seen) == 50
    epochs = [tuple(seen[start : start + 3]) for start in range(0, 48, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs) and len(set(epochs)) > 3


def test_sources_of_one_length_do_not_share_an_order(tmp_path):
    packings = {name: Concat(stream(TEXTS, tmp_path), T) for name in 'ab'}
    source = loader.PackedBatches(packings, {'a': 1, 'b': 1}, 40, seed=0)
    rows = [row.tobytes() for row in source.next(None, 0)['tokens']]
    located = [source.mixture.locate(row)[0] for row in range(40)]
    a, b = ([row for row, at in zip(rows, located) if at == which] for which in (0, 1))
    assert a != b


@BOTH
def test_the_seed_decides_the_order(batches, names):
    assert_equal(take(batches(names, seed=3), 4), take(batches(names, seed=3), 4))
    first, other = (take(batches(names, seed=seed), 1)[0] for seed in (3, 4))
    assert (first['tokens'] != other['tokens']).any()


@pytest.mark.parametrize('name', ['texts', 'another name'])
def test_a_single_source_is_read_in_the_order_of_the_seed_whatever_its_name(packings, name):
    """A run that goes on from a checkpoint must find the rows that it had."""
    packing = packings['texts']
    order = shuffle(range(packing.num_rows), seed=3)
    expected = packing.rows(np.array([order[n] for n in range(6)]))
    assert_equal(take(loader.PackedBatches({name: packing}, {name: 1}, 6, seed=3), 1), [expected])


@pytest.mark.parametrize('seed', [-1, 2**32, 2**63])
@BOTH
def test_any_integer_is_a_seed(batches, names, seed):
    assert_equal(take(batches(names, seed=seed), 1), take(batches(names, seed=seed), 1))


@BOTH
def test_resumed_equals_straight_over_epoch_ends(batches, names):
    straight = take(batches(names), 40)
    for stop in (0, 1, 20, 37):
        source = batches(names)
        take(source, stop)
        resumed = batches(names)
        resumed.set_state(json.loads(json.dumps(source.get_state())))
        assert_equal(take(resumed, 40 - stop), straight[stop:])


@BOTH
def test_a_row_does_not_depend_on_the_batch_it_is_in(batches, names):
    wide, narrow = take(batches(names, batch_size=12), 3), take(batches(names, batch_size=4), 9)
    for name in wide[0]:
        parts = [np.concatenate([batch[name] for batch in some]) for some in (wide, narrow)]
        np.testing.assert_array_equal(*parts)


PROCESS = """
import json, sys
import numpy as np
from tests.data.test_loader import of_process

directory, state, rows, steps, output = json.loads(sys.argv[1])
source = of_process(directory, np.array(rows))
if state:
    source.set_state(state)
batches = [source.next(None, step) for step in range(steps)]
np.savez(output, **{name: np.stack([batch[name] for batch in batches]) for name in batches[0]})
print(json.dumps(source.get_state()))
"""


def of_process(directory, rows=None):
    """The source that every process opens: 8 rows per batch, of texts and chats."""
    packings = {
        'texts': Concat(stream(TEXTS, directory), T),
        'chats': BestFit(stream(CHATS, directory, seed=1, is_chat=True), T),
    }
    weights = {'texts': 0.7, 'chats': 0.3}
    return loader.PackedBatches(packings, weights, 8, seed=3, rows=rows)


def run_processes(count, directory, state, steps):
    """Runs processes that each make their rows; returns (global batches, their common state)."""
    processes = []
    for index, rows in enumerate(np.split(np.arange(8), count)):
        arguments = [str(directory), state, rows.tolist(), steps, f'{directory}/{index}.npz']
        command = [sys.executable, '-c', PROCESS, json.dumps(arguments)]
        environment = os.environ | {'PYTHONPATH': str(ROOT)}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    states = [json.loads(process.communicate(timeout=PATIENCE)[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert all(state == states[0] for state in states)
    parts = [dict(np.load(f'{directory}/{index}.npz')) for index in range(count)]
    return {name: np.concatenate([p[name] for p in parts], 1) for name in parts[0]}, states[0]


def test_1_2_and_4_processes_make_the_same_global_batches_also_after_resuming(tmp_path):
    straight = take(of_process(tmp_path), 9)
    state, done = None, 0
    for count, steps in ((4, 2), (1, 3), (2, 4)):
        batches, state = run_processes(count, tmp_path, state, steps)
        for name, array in batches.items():
            expected = np.stack([batch[name] for batch in straight[done : done + steps]])
            np.testing.assert_array_equal(array, expected)
        done += steps


def test_rows_and_epochs_are_counted_by_source(batches, packings):
    source = batches(MIXED, batch_size=20)
    assert not any(source.delivered().values())
    take(source, 5)
    progress = source.delivered()
    assert [progress[f'{name}/rows'] for name in MIXED] == [70, 25, 5]
    assert progress['few/epochs'] == pytest.approx(5 / 3)
    assert progress['chats/epochs'] == 25 / packings['chats'].num_rows
    assert batches(batch_size=5).delivered() == {'rows': 0, 'epochs': 0}


def test_a_state_of_other_rows_is_refused(batches, tmp_path, packings):
    state = batches(MIXED).get_state()
    with pytest.raises(ConfigError, match='seed is 4, was 3'):
        batches(MIXED, seed=4).set_state(state)
    with pytest.raises(ConfigError, match='few/weight is 0.06, was 0.05'):
        batches(MIXED, weights=WEIGHTS | {'few': 0.06}).set_state(state)
    with pytest.raises(ConfigError, match='few/fingerprint is None, was'):
        batches(MIXED[:2]).set_state(state)
    for other, named in (
        (Concat(packings['texts'].cache, 16), 'sequence_length is 16, was 32'),
        (Concat(stream(TEXTS, tmp_path, seed=9), T), 'fingerprint'),
        (BestFit(packings['texts'].cache, T), 'packing is best_fit, was concat'),
    ):
        source = loader.PackedBatches({'texts': other}, WEIGHTS, 6, 3)
        with pytest.raises(ConfigError, match=f'data changed .*{named}'):
            source.set_state(batches().get_state())


def test_the_batch_size_may_change_on_resume(batches):
    source = batches(batch_size=6)
    take(source, 2)
    resumed = batches(batch_size=4)
    resumed.set_state(source.get_state())
    rows = np.concatenate([batch['tokens'] for batch in take(batches(batch_size=4), 6)])
    np.testing.assert_array_equal(take(resumed, 1)[0]['tokens'], rows[12:16])


@BOTH
def test_the_rows_go_on_where_another_batch_size_stopped(batches, names):
    straight = np.concatenate([batch['tokens'] for batch in take(batches(names), 6)])
    source, done = batches(names), 0
    for size in (6, 4, 5, 7, 6):
        resumed = batches(names, batch_size=size)
        resumed.set_state(source.get_state() | resumed.get_state() | {'next_row': done})
        np.testing.assert_array_equal(take(resumed, 1)[0]['tokens'], straight[done : done + size])
        source, done = resumed, done + size
        assert source.get_state()['next_row'] == done


def test_a_checkpoint_written_before_grain_goes_on(batches):
    """The manifests of earlier runs hold this state; the loader that wrote them had a counter."""
    state = batches().get_state()
    assert state == {
        'next_row': 0,
        'sequence_length': T,
        'seed': 3,
        'fingerprint': stream(TEXTS, '').fingerprint,
        'packing': 'concat',
    }
    source = batches()
    source.set_state(json.loads(json.dumps(state | {'next_row': 18})))
    assert_equal(take(source, 2), take(batches(), 5)[3:])
    assert source.get_state() == state | {'next_row': 30}


@BOTH
def test_a_far_row_is_reached_at_once(batches, names):
    source = batches(names, batch_size=4)
    take(source, 1)  # imports Grain
    began = time.process_time()
    source.set_state(source.get_state() | {'next_row': 10**9})
    take(source, 1)
    assert time.process_time() - began < 0.05
    assert source.get_state()['next_row'] == 10**9 + 4


def test_a_mixture_has_its_exact_shares_at_any_row(packings):
    """Hundredths of the smallest weight would be 233 and 100, and 699,700 rows of a million."""
    source = loader.PackedBatches(packings, {'texts': 0.7, 'chats': 0.29999, 'few': 1e-5}, 100, 3)
    for row in (10**6, 10**9, 10**12):
        source.set_state(source.get_state() | {'next_row': row})
        counts = source.delivered()
        shares = [counts[f'{name}/rows'] for name in MIXED]
        np.testing.assert_allclose(shares, [0.7 * row, 0.29999 * row, 1e-5 * row], rtol=0, atol=1.5)
        own = {name: packings[name].rows(np.arange(packings[name].num_rows)) for name in MIXED}
        rows = {name: {r.tobytes() for r in batch['tokens']} for name, batch in own.items()}
        batch = source.next(None, 0)['tokens']
        found = [sum(r.tobytes() in rows[name] for r in batch) for name in MIXED]
        after = source.delivered()
        assert found == [after[f'{n}/rows'] - counts[f'{n}/rows'] for n in MIXED]


def test_a_source_without_a_row_is_an_error(tmp_path):
    nothing = BestFit(stream([40, 50], tmp_path, is_chat=True), T, 'drop')
    with pytest.raises(DataError, match='no row of chats'):
        loader.PackedBatches({'chats': nothing}, {'chats': 1}, 4, seed=0)


@pytest.mark.parametrize('stride', [None, 32, 31, 16, 7, 1])
def test_every_heldout_target_of_texts_counts_once(tmp_path, stride):
    cache = stream(TEXTS, tmp_path)
    counted = []
    for batch in loader.evaluation_batches(cache, T, 4, stride):
        assert all(array.shape == (4, T) for array in batch.values())
        counted.append(batch['targets'][batch['loss_mask'] == 1])
    # In order: rows follow the stream, and only the last targets of a later row are new.
    np.testing.assert_array_equal(np.concatenate(counted), cache.tokens[cache.tokens != BOS])


@pytest.mark.parametrize('longest', [33, 100])
def test_every_supervised_heldout_target_counts_once(tmp_path, longest):
    lengths = np.random.default_rng(2).integers(2, longest, 50)
    cache = stream(lengths, tmp_path, is_chat=True)
    counted = []
    for batch in loader.evaluation_batches(cache, T, 4):
        assert all(array.shape == (4, T) for array in batch.values())
        counted.append(batch['targets'][batch['loss_mask'] == 1])
    counted = np.sort(np.concatenate(counted))
    np.testing.assert_array_equal(counted, np.sort(cache.tokens[cache.mask == 1]))


def test_with_a_stride_counted_targets_have_all_available_context(tmp_path):
    stride = 8
    batches = list(loader.evaluation_batches(stream(TEXTS, tmp_path), T, 4, stride))
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    _, column = np.nonzero(rows['loss_mask'][1:])
    position = rows['positions'][1:][rows['loss_mask'][1:] == 1]
    segment = rows['segment_ids'][1:][rows['loss_mask'][1:] == 1]
    in_first = segment == 1
    assert in_first.any() and (position[in_first] == column[in_first]).all()
    assert (column >= T - stride).all()


def test_a_cache_shorter_than_a_row_is_one_padded_batch(tmp_path):
    cache = stream([5, 9], tmp_path)
    (batch,) = loader.evaluation_batches(cache, 20, 3)
    assert batch['loss_mask'].sum() == 12
    assert not batch['segment_ids'][1:].any() and not batch['segment_ids'][0, -6:].any()


@pytest.mark.parametrize('stride', [-1, 33])
def test_a_stride_that_would_skip_targets_is_refused(tmp_path, stride):
    with pytest.raises(ConfigError, match='stride'):
        next(loader.evaluation_batches(stream(TEXTS, tmp_path), T, 4, stride))
