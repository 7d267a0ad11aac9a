"""Working ahead: order, state, errors and the end of the thread."""

import threading
import time

import jax
import numpy as np
import pytest

from jaxfm.prefetch import Prefetch
from tests.runs import PATIENCE
from tests.test_sharding import make_batch, make_mesh


class Counting:
    """A source of batches 0, 1, 2, ...; the state is the number of the next one."""

    def __init__(self, fail_at=None):
        self.position, self.fail_at, self.made = 0, fail_at, []

    def next(self, params, step):
        number, self.position = self.position, self.position + 1
        if number == self.fail_at:
            raise OSError(f'batch {number} is gone')
        self.made.append(number)
        return make_batch(rows=2, first=number)

    def get_state(self):
        return {'next': self.position}

    def set_state(self, state):
        self.position = state['next']


@pytest.fixture
def prefetch():
    """Makes Prefetch objects, and sees that none leaves its thread behind."""
    made = []

    def make(source, depth=2):
        made.append(Prefetch(source, make_mesh(fsdp=2), batch_size=2, depth=depth))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not prefetch_threads()


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == 'prefetch']


def numbers(source, count):
    return [int(np.asarray(source.next(None, step)['tokens'])[0, 0]) for step in range(count)]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_prefetch_delivers_in_order_on_the_devices(prefetch):
    source = prefetch(Counting())
    batch = source.next(None, 0)
    assert isinstance(batch['tokens'], jax.Array) and len(batch['tokens'].devices()) == 2
    np.testing.assert_array_equal(batch['tokens'], make_batch(rows=2, first=0)['tokens'])
    assert numbers(source, 20) == list(range(1, 21))


def test_the_state_is_the_position_after_the_batch_delivered_last(prefetch):
    inner = Counting()
    source = prefetch(inner)
    assert source.get_state() == {'next': 0}
    for step in range(3):
        source.next(None, step)
        wait_until(lambda step=step: len(inner.made) > step + 2)  # it works ahead
        assert source.get_state() == {'next': step + 1}


def test_prefetch_works_no_further_ahead_than_its_depth(prefetch):
    inner = Counting()
    source = prefetch(inner, depth=2)
    source.next(None, 0)
    wait_until(lambda: len(inner.made) >= 3)
    time.sleep(0.3)
    # One delivered, those in the queue, one in hand.
    assert len(inner.made) <= 1 + 2 + 1


def test_prefetch_goes_on_from_a_state_it_is_given(prefetch):
    source = prefetch(Counting())
    assert numbers(source, 3) == [0, 1, 2]
    source.set_state({'next': 7})
    assert source.get_state() == {'next': 7}
    assert numbers(source, 2) == [7, 8]
    assert source.get_state() == {'next': 9}


def test_closing_ends_the_thread_and_loses_no_batch(prefetch):
    source = prefetch(Counting())
    assert not prefetch_threads()  # nothing is made before it is asked for
    assert numbers(source, 2) == [0, 1]
    assert len(prefetch_threads()) == 1
    source.close()
    assert not prefetch_threads()
    source.close()
    assert numbers(source, 2) == [2, 3]


def test_an_error_of_the_source_surfaces_at_its_batch_and_again(prefetch):
    source = prefetch(Counting(fail_at=2))
    assert numbers(source, 2) == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match='batch 2 is gone'):
            source.next(None, 2)
        assert source.get_state() == {'next': 2}


def test_a_source_that_recovers_goes_on_where_it_failed(prefetch):
    inner = Counting(fail_at=2)
    source = prefetch(inner)
    numbers(source, 2)
    with pytest.raises(OSError):
        source.next(None, 2)
    inner.fail_at = None
    assert numbers(source, 2) == [2, 3]


def test_closing_does_not_wait_for_an_error_nobody_takes(prefetch):
    inner = Counting(fail_at=2)
    source = prefetch(inner, depth=1)
    source.next(None, 0)
    wait_until(lambda: inner.position == 3)
    time.sleep(0.2)  # the queue is full, the error stands behind it
    closing = threading.Thread(target=source.close, daemon=True)
    closing.start()
    closing.join(timeout=PATIENCE / 10)
    is_stuck = closing.is_alive()
    if is_stuck:
        source.next(None, 1)  # makes room, so that the thread can end
    assert not is_stuck
    assert source.get_state() == {'next': 1}
