"""Two processes with one device each make the same schedule and the same samples."""

import dataclasses
import json

import jax
import numpy as np

from jaxfm import sharding
from jaxfm.sampling.request import Request
from tests.distributed.processes import ranks, read_until, start
from tests.sampling.conftest import new_sampler, random_params, stored

PROGRAM = """
    import jax
    from jaxfm.distributed import join
    join.initialize(timeout_seconds=60)
    from tests.sampling.test_processes import play
    print('played', play(), flush=True)
"""


def play() -> str:
    """A schedule with more requests than slots, pages that run out, a fork, a cancellation."""
    sizes = {axis: 1 for axis in sharding.MESH_AXES} | {'fsdp': 2}
    mesh = sharding.make_mesh(sizes, jax.devices()[:2])
    requests = [
        Request(f'r{i}', list(range(i + 1, 2 * i + 4)), 12 + i, seed=i, top_logprobs=2)
        for i in range(6)
    ]
    events = []
    params = random_params()  # of each process, before they share a mesh
    with jax.set_mesh(mesh):
        sampler = new_sampler(stored(params), mesh, slots=6, pages=20)
        for request in requests:
            sampler.add(request)
        sampler.add(Request('scored', list(range(20)), 4, n=3, prompt_logprobs=True))
        for step in range(1000):
            events += [dataclasses.asdict(event) for event in sampler.step()]
            if step == 1:
                sampler.fork('r0', 'fork', sample_index=9)
                sampler.cancel('r1')
            if not sampler.has_work:
                break
        counters = dataclasses.asdict(sampler.counters)
    return json.dumps([events, counters])


def test_two_processes_equal_one():
    expected, counters = json.loads(play())
    assert counters['preemptions'] > 0
    with start(PROGRAM, ranks(2)) as processes:
        lines = [read_until(process, 'played') for process in processes]
    assert lines[0] == lines[1]
    events, of_ranks = json.loads(lines[0].partition(' ')[2])
    assert of_ranks == counters
    assert len(events) == len(expected)
    for event, other in zip(events, expected):
        for name in ('id', 'sample_index', 'tokens', 'finish_reason', 'versions'):
            assert event[name] == other[name]
        for name in ('logprobs', 'sampling_logprobs'):
            np.testing.assert_allclose(event[name], other[name], rtol=0, atol=1e-4)
