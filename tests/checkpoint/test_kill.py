"""SIGKILL during saves by two processes: the newest committed step is undamaged."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.reader import Reader

SAVE_FOR_EVER = """
import itertools, sys
import jax, numpy as np
jax.config.update('jax_num_cpu_devices', 1)
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
directory, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f'localhost:{port}', 2, rank, heartbeat_timeout_seconds=10)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer

mesh = jax.make_mesh((2,), ('fsdp',), axis_types=(AxisType.Explicit,))
sharding = NamedSharding(mesh, P('fsdp'))
checkpointer = Checkpointer(CheckpointConfig(keep=2), directory)
for step in itertools.count((checkpointer.latest_step() or 0) + 1):
    values = np.random.default_rng(step).standard_normal((4, 300, 500), dtype=np.float32)
    state = {
        f'w{i}': jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        for i, value in enumerate(values)
    }
    checkpointer.save(step, state, {'next_row': step * 8})
    print('step', step, flush=True)
"""


@contextlib.contextmanager
def two_processes(directory):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
    with open(f'{directory}.stderr', 'a') as errors:
        processes = [
            subprocess.Popen(
                [sys.executable, '-c', SAVE_FOR_EVER, str(directory), port, str(rank)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for rank in (0, 1)
        ]
    # Nothing reads the second process's output, and its pipe must not fill up.
    drain = threading.Thread(target=processes[1].stdout.read, daemon=True)
    drain.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
        drain.join()
        for process in processes:
            process.stdout.close()


def next_step(process) -> int:
    """The step whose save has just begun; those before it are committed or lost by then."""
    for line in process.stdout:
        if line.startswith('step '):
            return int(line.split()[1])
    raise AssertionError('the process has ended')


def assert_newest_step_is_whole(reader, at_least):
    step = reader.latest_step()
    assert step is not None and step >= at_least
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((300, 500), np.float32, sharding=whole)
    state, extra = reader.restore(step, {f'w{i}': leaf for i in range(4)})
    expected = np.random.default_rng(step).standard_normal((4, 300, 500), dtype=np.float32)
    for i in range(4):
        np.testing.assert_array_equal(state[f'w{i}'], expected[i])
    assert extra == {'next_row': step * 8}
    return step


def kill_and_restore(directory, times):
    seed = int.from_bytes(os.urandom(4))
    print(f'seed {seed}')
    moment = random.Random(seed)
    committed = 0
    for _ in range(times):
        with two_processes(directory) as processes:
            for _ in range(3):
                started = next_step(processes[0])
            time.sleep(moment.uniform(0, 0.1))
            victims = moment.choice([processes, processes[:1], processes[1:]])
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
                victim.wait()
        # A save starts only when the one before it is committed.
        reader = Reader(CheckpointConfig(), directory)
        committed = assert_newest_step_is_whole(reader, max(committed, started - 1))
    return committed


def test_the_newest_committed_step_survives_kills_during_saves(tmp_path):
    directory = tmp_path / 'checkpoints'
    committed = kill_and_restore(directory, times=3)
    checkpointer = Checkpointer(CheckpointConfig(keep=2), directory)
    checkpointer.save(committed + 2, {'w': jax.numpy.zeros(3)}, {}, must=True)
    checkpointer.close()
    left = {path.name for path in directory.iterdir()}
    assert left == {str(committed), str(committed + 2), 'lease'}
    for step in (committed, committed + 2):
        assert len(list(Path(directory, str(step)).iterdir())) == 2  # one attempt, one commit


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_no_committed_step(tmp_path):
    kill_and_restore(tmp_path / 'checkpoints', times=20)
