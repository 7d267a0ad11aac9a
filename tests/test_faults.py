"""Real processes, real signals: whatever stops a run, the same command resumes it exactly.

Metrics (train and eval records, without their time) and final parameters are compared bit for bit
with an uninterrupted run. A process under `jax.distributed` survives SIGTERM, so processes that are
left at the end are killed with SIGKILL.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxfm.metrics import goodput
from jaxfm.metrics.writers import JsonlWriter, Recorder, read_records
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


def perf(workdir) -> list[dict]:
    return [r for r in read_records(workdir / 'metrics.jsonl') if r['kind'] == 'perf']


def work_on(workdir, seconds):
    """Appends a record as if the killed process had continued for this many seconds."""
    last = perf(workdir)[-1]
    recorder = Recorder(JsonlWriter(workdir / 'metrics.jsonl'))
    elapsed = last['perf/elapsed_seconds'] + seconds
    recorder.write(last['step'] + 1, 'perf', {'perf/elapsed_seconds': elapsed})
    recorder.close()


def seconds_after_checkpoint(workdir) -> float:
    """Seconds from the newest checkpoint to the last record, or slightly less."""
    saved = max(int(path.name) for path in workdir.glob('checkpoints/*') if path.name.isdigit())
    records = perf(workdir)
    first = next(record for record in records if record['step'] >= saved)
    return records[-1]['perf/elapsed_seconds'] - first['perf/elapsed_seconds']


def assert_times_add_up(workdir):
    """Checks that in every record the buckets add up to the time of the run."""
    for record in perf(workdir):
        account = sum(record[goodput.name_of(bucket)] for bucket in goodput.BUCKETS)
        assert account == pytest.approx(record['perf/elapsed_seconds'])


def test_a_run_killed_at_a_random_step_resumes_bit_for_bit(tiny, start, straight, tmp_path):
    seed = int.from_bytes(os.urandom(4))
    step = random.Random(seed).randrange(8, 28)
    print(f'seed {seed}: SIGKILL at step {step}')
    workdir = tmp_path / 'run'
    process = start(workdir)
    wait_for_step(workdir, step, process)
    # Steps are quick: the save at step 5 may not be committed yet.
    wait_until(lambda: tiny.committed(workdir), process)
    process.kill()
    finish(process, -signal.SIGKILL)
    finish(start(workdir))
    assert 'resumed at step' in stderr_of(workdir)
    assert_same_run(tiny, workdir, straight)


def incomplete_steps(workdir) -> list[str]:
    steps = (workdir / 'checkpoints').glob('[0-9]*')
    return [step.name for step in steps if not (step / 'commit.json').exists()]


def test_a_run_killed_during_a_save_resumes_bit_for_bit(tiny, start, straight, tmp_path):
    workdir = tmp_path / 'run'
    process = start(workdir)
    wait_for_step(workdir, 12, process)
    # The directory of a step exists before its commit.
    incomplete = wait_until(lambda: incomplete_steps(workdir), process)
    process.kill()
    finish(process, -signal.SIGKILL)
    print(f'killed while {incomplete} was written')
    work_on(workdir, seconds=100)
    lost = seconds_after_checkpoint(workdir)
    finish(start(workdir))
    assert_same_run(tiny, workdir, straight)
    assert_times_add_up(workdir)
    wasteful = [record for record in perf(workdir) if record['goodput/wasted_seconds']]
    assert lost <= wasteful[-1]['goodput/wasted_seconds'] < lost + PATIENCE
    assert 'perf/step_seconds' not in wasteful[0]  # recorded before the next step
    told = re.findall(r'warning: (\d+) s of work after step \d+ are repeated', stderr_of(workdir))
    assert len(told) == 1 and int(told[0]) >= 99
    assert tiny.committed(workdir) == [STEPS - 5, STEPS]
    assert not incomplete_steps(workdir)


def test_a_run_saved_on_a_signal_resumes_bit_for_bit(tiny, start, straight, tmp_path):
    workdir = tmp_path / 'run'
    process = start(workdir)
    # The config is checked and nothing is compiled yet: long before the loop.
    wait_until(lambda: (workdir / 'checkpoints').exists(), process)
    process.send_signal(signal.SIGINT)
    finish(process, 75)
    assert 'SIGINT: saving' in stderr_of(workdir)
    assert 'saved at step 0;' in stderr_of(workdir)
    assert list(measured(workdir)) == [(0, 'eval')]
    assert tiny.committed(workdir) == [0]

    process = start(workdir)
    wait_for_step(workdir, 13, process)
    process.send_signal(signal.SIGTERM)
    finish(process, 75)
    assert 'SIGTERM: saving' in stderr_of(workdir)
    stops = [int(step) for step in re.findall(r'saved at step (\d+);', stderr_of(workdir))]
    assert stops[0] == 0 and 13 <= stops[1] < STEPS
    assert (workdir / 'checkpoints' / str(stops[1])).is_dir()

    finish(start(workdir))
    assert_same_run(tiny, workdir, straight)
    assert 'Traceback' not in stderr_of(workdir)


def test_a_second_interrupt_exits_at_once(tiny, start, tmp_path):
    process = start(tmp_path / 'run')
    wait_until(lambda: (tmp_path / 'run' / 'checkpoints').exists(), process)
    # While the main thread compiles, Python may merge two signals into one. The next one arrives
    # long before the save for the first one has finished.
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    finish(process, 130)
    assert not tiny.committed(tmp_path / 'run')


def test_a_signal_before_the_run_has_begun_leaves_no_work_directory(tiny, tmp_path):
    command = [sys.executable, '-m', 'jaxfm.main', *tiny.arguments(tmp_path / 'run')]
    process = subprocess.Popen(command, env=tiny.environment_of(devices=1))
    time.sleep(0.3)  # while the imports are running
    process.terminate()
    finish(process, -signal.SIGTERM)
    assert not (tmp_path / 'run').exists()


def test_a_run_resumes_with_the_same_numbers_on_another_mesh(start, straight, tiny, tmp_path):
    workdir = tmp_path / 'run'
    process = start(workdir)
    wait_for_step(workdir, 10, process)
    process.terminate()
    finish(process, 75)
    finish(start(workdir, '--config.mesh.fsdp=2', devices=2))
    log = stderr_of(workdir)
    assert 'config.mesh.fsdp: -1 -> 2' in log and 'fsdp 2' in log
    expected = measured(straight)
    assert list(measured(workdir)) == list(expected)
    np.testing.assert_allclose(losses(workdir), losses(straight), rtol=2e-6)


def test_two_processes_train_as_one_and_stop_and_resume_together(start, straight, tmp_path):
    workdir = tmp_path / 'run'
    ranks = start_ranks(start, workdir)
    wait_for_step(workdir, 10, ranks[0])
    ranks[1].terminate()
    for rank in ranks:
        finish(rank, 75)
    stops = re.findall(r'saved at step (\d+)', stderr_of(workdir))
    assert len(stops) == 2 and stops[0] == stops[1] and 10 <= int(stops[0]) < STEPS
    for rank in start_ranks(start, workdir):
        finish(rank)
    assert list(measured(workdir)) == list(measured(straight))
    np.testing.assert_allclose(losses(workdir), losses(straight), rtol=2e-6)
    assert 'Traceback' not in stderr_of(workdir)


@pytest.mark.slow
def test_two_processes_stop_among_skipped_steps_and_go_back_together(start, straight, tmp_path):
    """The update of step 41 ruins the weights; there are 20 skipped steps to stop in."""
    workdir = tmp_path / 'run'
    shutil.copytree(straight, workdir)
    ruin = ['--config.optimizer.learning_rate=1e37', '--config.optimizer.schedule=constant']
    slow = ['--config.evals.heldout.every=1', '--config.metrics.log_every=1']
    allow = '--allow_change=steps,optimizer,evals'
    ranks = start_ranks(start, workdir, '--config.steps=80', *ruin, *slow, allow)
    wait_for_step(workdir, STEPS + 2, ranks[0])
    ranks[1].terminate()
    for rank in ranks:
        finish(rank, 75)
    told = re.findall(
        r'signal at step (\d+) and not saved, because no update could be applied from step 41 to '
        r'(\d+); run it again to resume at step 40',
        stderr_of(workdir),
    )
    assert len(told) == 2 and len({step for both in told for step in both}) == 1

    for rank in start_ranks(start, workdir, '--resume_step=35', allow):
        finish(rank)
    assert 'back at step 35; checkpoints set aside: 40' in stderr_of(workdir)
    assert list(measured(workdir)) == list(measured(straight))
    np.testing.assert_allclose(losses(workdir), losses(straight), rtol=2e-6)
    assert len(list((workdir / 'checkpoints' / '40').glob('set_aside.*.json'))) == 1
    assert 'Traceback' not in stderr_of(workdir)


def test_a_mistake_that_one_process_sees_ends_all_of_them_at_once(start, tmp_path):
    (tmp_path / 'empty.txt').write_text('')
    source = f'--config.data.path={tmp_path}/empty.txt'
    ranks = start_ranks(start, tmp_path / 'run', source)
    finish(ranks[0], 65)  # it reads the data; the other one waits for it
    assert ranks[1].wait(PATIENCE) != 0  # JAX would have waited for five minutes
    assert 'empty.txt is empty' in stderr_of(tmp_path / 'run')


@pytest.mark.parametrize('tokenize', ['cached', 'on_the_fly'])
def test_a_shard_that_is_missing_on_one_host_ends_the_run(start, tmp_path, tokenize):
    homes = tmp_path / 'a', tmp_path / 'b'
    for home in homes:
        home.mkdir()
        for number in range(4):
            (home / f'shard-{number}.txt').write_text(f'text of shard {number}\n' * 200)
    (homes[1] / 'shard-2.txt').unlink()
    options = ['--config.data.path=~/shard-*.txt', f'--config.data.tokenize={tokenize}']
    ranks = start_ranks(start, tmp_path / 'run', *options, homes=homes)
    for rank in ranks:
        finish(rank, 66)
    said = 'shard-2.txt is missing on the host of process 1'
    assert stderr_of(tmp_path / 'run').count(said) == 2
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_a_shard_that_differs_on_one_host_ends_the_run(start, tmp_path):
    homes = tmp_path / 'a', tmp_path / 'b'
    for home in homes:
        home.mkdir()
        (home / 'text.txt').write_text(f'text of host {home.name}\n' * 200)
    options = ['--config.data.path=~/text.txt']
    ranks = start_ranks(start, tmp_path / 'run', *options, homes=homes)
    for rank in ranks:
        finish(rank, 65)
    assert stderr_of(tmp_path / 'run').count('have different tokens') == 2


def test_a_mistake_that_all_processes_see_is_reported_by_each(start, tmp_path):
    ranks = start_ranks(start, tmp_path / 'run', '--config.mesh.fsdp=4')
    for rank in ranks:
        finish(rank, 78)
    said = 'fsdp 4 = 4, which must equal the number of devices, 2'
    assert stderr_of(tmp_path / 'run').count(said) == 2
