"""SIGKILL in the middle of saves: the newest committed step is whole, the torn one is swept."""

import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.reader import Reader

SAVE_FOR_EVER = """
import itertools, sys
import jax, numpy as np
from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer

checkpointer = Checkpointer(CheckpointConfig(keep=2), sys.argv[1])
for step in itertools.count((checkpointer.latest_step() or 0) + 1):
    values = np.random.default_rng(step).standard_normal((4, 300, 500), dtype=np.float32)
    state = {f'w{i}': jax.device_put(value) for i, value in enumerate(values)}
    checkpointer.save(step, state, {'next_row': step * 8})
    print(step, flush=True)
"""


def start_saving(directory):
    return subprocess.Popen(
        [sys.executable, '-c', SAVE_FOR_EVER, str(directory)], stdout=subprocess.PIPE, text=True
    )


def assert_newest_step_is_whole(checkpointer, at_least):
    step = checkpointer.latest_step()
    assert step is not None and step >= at_least
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((300, 500), np.float32, sharding=whole)
    state, extra = checkpointer.restore(step, {f'w{i}': leaf for i in range(4)})
    expected = np.random.default_rng(step).standard_normal((4, 300, 500), dtype=np.float32)
    for i in range(4):
        np.testing.assert_array_equal(state[f'w{i}'], expected[i])
    assert extra == {'next_row': step * 8}
    return step


def test_the_newest_committed_step_survives_kills_during_saves(tmp_path):
    moment = random.Random(2)
    committed = 0
    for _ in range(3):
        with start_saving(tmp_path) as process:
            for _ in range(3):
                started = int(process.stdout.readline())
            time.sleep(moment.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        # A save starts only when the one before it is committed.
        reader = Reader(CheckpointConfig(), tmp_path)
        committed = assert_newest_step_is_whole(reader, max(committed, started - 1))

    checkpointer = Checkpointer(CheckpointConfig(keep=2), tmp_path)
    checkpointer.save(committed + 2, {'w': jax.numpy.zeros(3)}, {})
    checkpointer.close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {str(committed), str(committed + 2), 'lease'}
