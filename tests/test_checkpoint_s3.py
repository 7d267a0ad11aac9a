"""Real runs whose checkpoints are on S3: killed, resumed, refused, replaced, read."""

import os
import random
import re
import signal
import time
import uuid

import numpy as np
import pytest

from jaxfm.checkpoint.store import Store
from jaxfm.storage import open_storage
from tests.runs import (
    PATIENCE,
    STEPS,
    assert_same_run,
    finish,
    losses,
    measured,
    start_ranks,
    stderr_of,
    wait_for_step,
    wait_until,
)

FOR_EVER = '--config.steps=1000000'


@pytest.fixture
def place(s3_environment) -> str:
    """A prefix of the bucket that nobody has used."""
    return f's3://bucket/{uuid.uuid4().hex}'


def at(place) -> str:
    return f'--config.checkpoint.directory={place}'


def committed(place) -> list[int]:
    return list(Store(open_storage(place)).commits())


def name_of(process) -> str:
    return f'process {process.pid} on {os.uname().nodename}'


def test_killed_twice_a_run_resumes_from_s3_bit_for_bit_even_in_a_new_work_directory(
    tiny, start, straight, place, tmp_path
):
    seed = int.from_bytes(os.urandom(4))
    draw = random.Random(seed)
    steps = draw.randrange(8, 16), draw.randrange(17, 25)
    print(f'seed {seed}: SIGKILL at steps {steps}')
    first, second = tmp_path / 'first', tmp_path / 'second'
    for workdir, step in zip((first, second), steps):
        process = start(workdir, at(place))
        wait_for_step(workdir, step, process)
        # A look at S3 takes longer than the rest of a quick run, which has to stand still for it.
        process.send_signal(signal.SIGSTOP)
        while not committed(place):
            process.send_signal(signal.SIGCONT)
            time.sleep(0.02)
            process.send_signal(signal.SIGSTOP)
        process.kill()
        finish(process, -signal.SIGKILL)
        assert committed(place)[-1] < STEPS, 'killed too late'
    finish(start(second, at(place)))
    resumed = [int(step) for step in re.findall(r'resumed at step (\d+)', stderr_of(second))]
    assert len(resumed) == 2 and 0 < resumed[0] <= resumed[1]
    assert (second / 'config.json').exists() and (second / 'tokenizer').exists()
    # Only what the first work directory holds of the metrics is not in the second one.
    assert_same_run(tiny, second, straight, place, first_step=resumed[0] + 1)
    before = {key: value for key, value in measured(first).items() if key[0] <= resumed[0]}
    assert before == {k: v for k, v in measured(straight).items() if k[0] <= resumed[0]}
    assert committed(place) == [STEPS - 5, STEPS]
    assert not (second / 'checkpoints').exists()

    for mode, more in (('eval', ()), ('sample', ('--max_tokens=4', '--prompt=1f'))):
        process = start(second, at(place), f'--mode={mode}', *more)
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and out.startswith('1f' if mode == 'sample' else '')
    process = start(tmp_path / 'third', at(place), '--config.model.num_layers=3')
    finish(process, 78)
    said = stderr_of(tmp_path / 'third')
    assert f'{place} holds a run with another config' in said
    assert 'config.model.num_layers: 2 -> 3' in said
    assert not (tmp_path / 'third').exists()


def test_two_processes_save_to_s3_stop_and_resume_together(start, straight, place, tmp_path):
    workdir = tmp_path / 'run'
    ranks = start_ranks(start, workdir, at(place))
    wait_for_step(workdir, 10, ranks[0])
    ranks[1].terminate()
    for rank in ranks:
        finish(rank, 75)
    stops = re.findall(r'saved at step (\d+)', stderr_of(workdir))
    assert len(stops) == 2 and stops[0] == stops[1] and int(stops[0]) == committed(place)[-1]
    for rank in start_ranks(start, workdir, at(place)):
        finish(rank)
    assert list(measured(workdir)) == list(measured(straight))
    np.testing.assert_allclose(losses(workdir), losses(straight), rtol=2e-6)
    assert 'Traceback' not in stderr_of(workdir)


def test_a_second_run_in_a_work_directory_is_refused_and_the_first_goes_on(start, tmp_path):
    options = tmp_path / 'run', FOR_EVER, '--config.checkpoint.lease_seconds=3'
    first = start(*options)
    wait_for_step(tmp_path / 'run', 2, first)
    finish(start(*options), 73)
    assert f'is written by {name_of(first)}; end that run first' in stderr_of(tmp_path / 'run')
    first.terminate()
    finish(first, 75)
    steps = list(measured(tmp_path / 'run'))
    assert steps == sorted(steps, key=lambda key: key[0])


def test_a_run_that_slept_through_its_lease_is_replaced_and_ends(start, place, tmp_path):
    def start_in(workdir):
        return start(workdir, FOR_EVER, at(place), '--config.checkpoint.lease_seconds=3')

    sleeper, refused, successor = (tmp_path / name for name in ('sleeper', 'refused', 'successor'))
    asleep = start_in(sleeper)
    wait_until(lambda: committed(place), asleep)
    finish(start_in(refused), 73)
    assert f'{place} is written by {name_of(asleep)}; end that run' in stderr_of(refused)
    assert not refused.exists()
    asleep.send_signal(signal.SIGSTOP)
    awake = start_in(successor)
    wait_for_step(successor, 1, awake)
    asleep.send_signal(signal.SIGCONT)
    finish(asleep, 73)
    assert f'{place} was taken over by {name_of(awake)}' in stderr_of(sleeper)
    awake.terminate()
    finish(awake, 75)
    (stopped,) = re.findall(r'saved at step (\d+)', stderr_of(successor))
    assert committed(place)[-1] == int(stopped)
    assert 'Traceback' not in stderr_of(sleeper) + stderr_of(successor)


def test_whatever_is_wrong_with_the_place_ends_a_run_before_training(start, place, tmp_path):
    """At once, but for a server that does not answer, and for a key that may only read."""
    nowhere = 'http://127.0.0.1:9'
    cases = {
        'wrong secret': (place, {'AWS_SECRET_ACCESS_KEY': 'wrong'}, 77, 'no permission to use'),
        'unknown key': (place, {'AWS_ACCESS_KEY_ID': 'wrong'}, 77, 'no permission to use'),
        'no bucket': ('s3://absent/run', {}, 66, 'there is no bucket absent'),
        'no server': (place, {'AWS_ENDPOINT_URL': nowhere}, 69, f'at {nowhere} cannot be reached'),
        'reader': (place, {'AWS_ACCESS_KEY_ID': 'reader'}, 77, 'no permission to use'),
    }
    processes = {
        name: start(tmp_path / name, at(where), **environment)
        for name, (where, environment, _, _) in cases.items()
    }
    for name, (_, _, code, words) in cases.items():
        finish(processes[name], code)
        said = stderr_of(tmp_path / name)
        [message] = said.split('error: ')[1:]
        assert words in message and len(message.splitlines()) == 1, said
        assert 'Traceback' not in said
        assert not (tmp_path / name).exists()
    assert committed(place) == []


def test_a_run_on_s3_does_not_go_on_with_other_data(tiny, start, place, tmp_path):
    (tmp_path / 'text.txt').write_text('what it learned from. ' * 2000)
    options = at(place), f'--config.data.path={tmp_path}/text.txt'
    finish(start(tmp_path / 'run', *options, '--config.steps=6'))
    (tmp_path / 'text.txt').write_text('something different. ' * 2000)
    more = '--config.steps=12', '--allow_change=steps'
    finish(start(tmp_path / 'new', *options, *more), 78)
    assert 'the data changed since the checkpoint' in stderr_of(tmp_path / 'new')
    assert not (tmp_path / 'new').exists() and committed(place) == [5, 6]
