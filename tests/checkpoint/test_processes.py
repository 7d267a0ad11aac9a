"""Two processes, each owning half of every array, write a checkpoint that one process reads."""

import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.reader import Reader
from tests.runs import PATIENCE

ONE_OF_TWO = """
import sys
import jax, numpy as np
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
directory, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f'localhost:{port}', 2, rank)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer

mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Explicit,))
sharding = NamedSharding(mesh, P('fsdp'))
values = np.arange(80, dtype=np.float32).reshape(8, 10)
state = {'w': jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])}
abstract = {'w': jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)}

checkpointer = Checkpointer(CheckpointConfig(), directory)
assert checkpointer.latest_step() is None
checkpointer.save(3, state, {'next_row': 24})
checkpointer.save(3, state, {'next_row': 24})
checkpointer.save(4, state, {'next_row': 32})
checkpointer.wait()
assert checkpointer.latest_step() == 4
restored, extra = checkpointer.restore(4, abstract)
for shard in restored['w'].addressable_shards:
    np.testing.assert_array_equal(shard.data, values[shard.index])
assert extra == {'next_row': 32}
checkpointer.close()
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return str(listener.getsockname()[1])


def test_two_processes_write_one_checkpoint(tmp_path):
    command = [sys.executable, '-c', ONE_OF_TWO, str(tmp_path), free_port()]
    processes = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], '\n'.join(errors)

    reader = Reader(CheckpointConfig(), tmp_path)
    assert reader.steps() == [3, 4]
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, _ = reader.restore(4, {'w': jax.ShapeDtypeStruct((8, 10), np.float32, sharding=whole)})
    np.testing.assert_array_equal(state['w'], np.arange(80).reshape(8, 10))
    (attempt,) = (path.parent for path in tmp_path.glob('4/*/manifest.json'))
    stock = ocp.StandardCheckpointer().restore(attempt / 'state')
    np.testing.assert_array_equal(stock['w'], np.arange(80).reshape(8, 10))
