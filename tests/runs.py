"""What tests do with real runs: start some as one, wait for what they write, compare them."""

import os
import re
import socket
import time

import numpy as np

from jaxfm.metrics.writers import read_records

STEPS = 40
# Seconds until something that must happen counts as missing. Tests need less; a busy machine may
# need more.
PATIENCE = 120 * float(os.environ.get('JAXFM_TEST_PATIENCE', '1'))


def start_ranks(start, workdir, *more, count=2, homes=None):
    with socket.create_server(('127.0.0.1', 0)) as server:
        address = f'127.0.0.1:{server.getsockname()[1]}'
    return [
        start(
            workdir,
            *more,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(rank),
            **({'HOME': str(homes[rank])} if homes else {}),
        )
        for rank in range(count)
    ]


def wait_until(condition, process):
    """Polls until the condition gives something, and gives that; the process must live so long."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if process.poll() is not None:
            raise AssertionError(f'the process ended with {process.returncode} before that')
        time.sleep(0.001)
    raise AssertionError('that never happened')


def wait_for_step(workdir, step, process):
    """Returns once a train record of at least this step is in metrics.jsonl."""

    def newest():
        path = workdir / 'metrics.jsonl'
        steps = (
            re.findall(r'"step": (\d+).*"kind": "train"', path.read_text()) if path.exists() else []
        )
        return steps and int(steps[-1]) >= step

    wait_until(newest, process)


def finish(process, code=0):
    """Waits for the end of a process; it must exit with this code."""
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output


def stderr_of(workdir) -> str:
    return workdir.with_name(workdir.name + '.stderr').read_text()


def measured(workdir) -> dict:
    """{(step, kind): values} of all train and eval records."""
    found = {}
    for record in read_records(workdir / 'metrics.jsonl'):
        if record['kind'] in ('train', 'eval'):
            key = record['step'], record['kind']
            assert key not in found, f'{key} is there twice'
            found[key] = {k: v for k, v in record.items() if k not in ('time', 'phase')}
    return found


def losses(workdir) -> np.ndarray:
    return np.array([v['train/loss'] for (_, k), v in measured(workdir).items() if k == 'train'])


def assert_same_state(one, other):
    assert one.keys() == other.keys() and len(one) > 20
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)


def assert_same_run(tiny, workdir, reference, place='', first_step=0):
    """The same records, the same final state with optimizer and counters.

    place: of the checkpoints, if it is not in workdir. first_step: of the records that are there.
    """
    expected = {key: value for key, value in measured(reference).items() if key[0] >= first_step}
    assert measured(workdir) == expected
    assert list(measured(workdir)) == list(expected)
    saved = tiny.saved_state(workdir, STEPS, place), tiny.saved_state(reference, STEPS)
    assert_same_state(*saved)
