"""Working ahead: order, state, errors and the end of the thread."""

import threading
import time

import jax
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.data.loader import PackedBatches
from jaxfm.data.packing.rows import Concat
from jaxfm.data.pipeline import AHEAD
from tests.data.makers import Made
from tests.data.streams import stream
from tests.data.test_streaming import batches as on_the_fly
from tests.runs import PATIENCE
from tests.test_sharding import make_batch, make_mesh


class Counting:
    """Makes batches 0, 1, 2, ...; the state is the number of the next one."""

    def __init__(self, fail_at=None, error=OSError):
        self.position, self.fail_at, self.error, self.made = 0, fail_at, error, []

    def make(self):
        number, self.position = self.position, self.position + 1
        if number == self.fail_at:
            raise self.error(f'batch {number} is gone')
        self.made.append(number)
        return make_batch(rows=2, first=number)

    def get_state(self):
        return {'next': self.position}

    def set_state(self, state):
        self.position = state['next']


def put(batch):
    return sharding.put(batch, make_mesh(fsdp=2), len(batch['tokens']))


@pytest.fixture
def ahead():
    """Makes sources that work ahead, and sees that none leaves a thread behind."""
    before, made = threading.enumerate(), []

    def make(maker):
        made.append(Made(maker, put))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert threading.enumerate() == before


def threads():
    return [thread for thread in threading.enumerate() if 'prefetch' in thread.name.lower()]


def numbers(source, count):
    return [int(np.asarray(source.next(None, step)['tokens'])[0, 0]) for step in range(count)]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_batches_come_in_order_on_the_devices(ahead):
    source = ahead(Counting())
    batch = source.next(None, 0)
    assert isinstance(batch['tokens'], jax.Array) and len(batch['tokens'].devices()) == 2
    np.testing.assert_array_equal(batch['tokens'], make_batch(rows=2, first=0)['tokens'])
    assert numbers(source, 20) == list(range(1, 21))


def test_the_state_is_the_position_after_the_batch_delivered_last(ahead):
    maker = Counting()
    source = ahead(maker)
    assert source.get_state() == {'next': 0}
    for step in range(3):
        source.next(None, step)
        wait_until(lambda step=step: len(maker.made) > step + 2)  # it works ahead
        assert source.get_state() == {'next': step + 1}
        assert source.delivered() == {'batches': step + 1}


def test_nothing_is_made_further_ahead_than_the_depth(ahead):
    maker = Counting()
    ahead(maker).next(None, 0)
    wait_until(lambda: len(maker.made) >= 3)
    time.sleep(0.3)
    # One delivered, those in the queue, one in hand.
    assert AHEAD == 2 and len(maker.made) <= 1 + AHEAD + 1


def test_a_source_goes_on_from_a_state_it_is_given(ahead):
    source = ahead(Counting())
    assert numbers(source, 3) == [0, 1, 2]
    source.set_state({'next': 7})
    assert source.get_state() == {'next': 7}
    assert numbers(source, 2) == [7, 8]
    assert source.get_state() == {'next': 9}


def test_closing_ends_the_thread_and_loses_no_batch(ahead):
    source = ahead(Counting())
    assert not threads()  # nothing is made before it is asked for
    assert numbers(source, 2) == [0, 1]
    assert len(threads()) == 1
    source.close()
    assert not threads()
    source.close()
    assert numbers(source, 2) == [2, 3]


def test_without_devices_there_is_no_thread():
    source = Made(Counting())
    assert numbers(source, 3) == [0, 1, 2] and not threads()


def test_an_error_of_the_source_surfaces_at_its_batch_and_again(ahead):
    source = ahead(Counting(fail_at=2))
    assert numbers(source, 2) == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match='batch 2 is gone'):
            source.next(None, 2)
        assert source.get_state() == {'next': 2} and not threads()


@pytest.mark.parametrize('error', [SystemExit, KeyboardInterrupt])
def test_what_would_end_the_thread_without_a_word_is_an_error_of_the_loop(ahead, error):
    source = ahead(Counting(fail_at=1, error=error))
    assert numbers(source, 1) == [0]
    with pytest.raises(RuntimeError, match=f'{error.__name__}: batch 1 is gone'):
        source.next(None, 1)


@pytest.mark.parametrize('where', ['rows', 'put', 'on_the_fly'])
def test_nothing_ends_the_thread_without_a_word(where, tmp_path, monkeypatch):
    """Nor does the loop wait for ever."""

    def end(*_):
        raise SystemExit('of a library')

    put_batch, packing = put, Concat(stream([40] * 50, tmp_path), 32)
    if where == 'put':
        put_batch = end
    elif where == 'rows':
        monkeypatch.setattr(packing, 'rows', end)
    if where == 'on_the_fly':
        source = on_the_fly(put=end)
    else:
        source = PackedBatches({'texts': packing}, {'texts': 1}, 6, seed=3, put=put_batch)
    found = []

    def ask():
        try:
            source.next(None, 0)
        except RuntimeError as error:
            found.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout=PATIENCE / 10)
    assert found and 'SystemExit: of a library' in found[0]
    assert not threads()


def test_ctrl_c_without_a_thread_stays_what_it_is():
    with pytest.raises(KeyboardInterrupt):
        numbers(Made(Counting(fail_at=0, error=KeyboardInterrupt)), 1)


def test_a_source_that_recovers_goes_on_where_it_failed(ahead):
    maker = Counting(fail_at=2)
    source = ahead(maker)
    numbers(source, 2)
    with pytest.raises(OSError):
        source.next(None, 2)
    maker.fail_at = None
    assert numbers(source, 2) == [2, 3]


def test_closing_does_not_wait_for_an_error_nobody_takes(ahead):
    maker = Counting(fail_at=3)
    source = ahead(maker)
    source.next(None, 0)
    wait_until(lambda: maker.position == 4)
    time.sleep(0.2)  # the queue is full, the error stands behind it
    closing = threading.Thread(target=source.close, daemon=True)
    closing.start()
    closing.join(timeout=PATIENCE / 10)
    is_stuck = closing.is_alive()
    if is_stuck:
        source.next(None, 1)  # makes room, so that the thread can end
    assert not is_stuck
    assert source.get_state() == {'next': 1}


def test_ctrl_c_while_the_loop_waits_for_a_batch_ends_the_thread(ahead, monkeypatch):
    source = ahead(Counting())
    numbers(source, 1)

    def interrupted(*args, **kwargs):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr('queue.Queue.get', interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.next(None, 1)
    assert not threads() and source.get_state() == {'next': 1}
    assert numbers(source, 1) == [1]


@pytest.mark.parametrize('name', ['packed', 'on_the_fly'])
def test_working_ahead_changes_no_batch_and_no_state(name, tmp_path):
    packing = Concat(stream([40] * 50, tmp_path), 32)

    def make(put=None):
        if name == 'packed':
            return PackedBatches({'texts': packing}, {'texts': 1}, 6, seed=3, put=put)
        return on_the_fly(put=put)

    plain, placed = make(), make(put)
    for step in range(6):
        batch, other = plain.next(None, step), placed.next(None, step)
        for key, array in batch.items():
            np.testing.assert_array_equal(array, other[key])
        assert plain.get_state() == placed.get_state()
        assert plain.delivered() == placed.delivered()
        if step == 3:
            placed.close()
    placed.close()
    assert not threads()
