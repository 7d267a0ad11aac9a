"""Helpers for tests of real runs: start several processes, wait for records, compare runs."""

import os
import re
import socket
import time

import numpy as np

from jaxfm.metrics.writers import read_records

STEPS = 40
# Seconds that a test waits for something before it fails. Tests need less; a busy machine may need
# more.
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
    """Polls until condition() is true and returns its value; fails if the process ends first."""
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
    """Waits for a process to end and checks its exit code."""
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
    """Checks that two runs have the same records and final state, optimizer and counters included.

    place: where the checkpoints are, if not in workdir. first_step: compares records from here on.
    """
    expected = {key: value for key, value in measured(reference).items() if key[0] >= first_step}
    assert measured(workdir) == expected
    assert list(measured(workdir)) == list(expected)
    saved = tiny.saved_state(workdir, STEPS, place), tiny.saved_state(reference, STEPS)
    assert_same_state(*saved)
