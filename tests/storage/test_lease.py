"""Who may write: one at a time, on disk and on S3, and whoever was replaced commits no more."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import jax
import pytest

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.store import Commit, Store
from jaxfm.errors import LockedError, StorageError, UnavailableError
from jaxfm.storage import holder, open_storage
from jaxfm.storage.lease import Holder, Lease, Record, read_lease
from tests.runs import PATIENCE

LONG = 60  # seconds that no test waits for
SHORT = 0.9
ELSEWHERE = Holder('elsewhere', 17, '1', 'its boot')
THIRD = Holder('third', 18, '1', 'its boot')
STEP = Commit(3, 'first', 1, 'digest')
# A process that holds the lease and then does what it reads, a line each.
HOLD = """
import sys
from jaxfm.storage.lease import Lease
from jaxfm.storage import open_storage
from jaxfm.checkpoint.store import Commit, Store
from jaxfm.errors import LockedError

store = Store(open_storage(sys.argv[1]))
lease = Lease(store.storage, float(sys.argv[2]))
todo = {
    'acquire': lambda: lease.acquire(dict),
    'confirm': lease.confirm,
    'commit': lambda: store.commit(Commit(3, 'late', 1, 'digest')),
    'release': lease.release,
}
print('ready', flush=True)
for line in sys.stdin:
    try:
        todo[line.strip()]()
        print('done', flush=True)
    except LockedError as error:
        print(error, flush=True)
"""


@pytest.fixture(params=['disk', 's3'])
def storage(request, tmp_path):
    if request.param == 'disk':
        return open_storage(tmp_path / 'run')
    request.getfixturevalue('s3_environment')
    return open_storage(f's3://bucket/{uuid.uuid4().hex}')


@pytest.fixture
def disk(tmp_path):
    return open_storage(tmp_path / 'run')


@pytest.fixture
def take(monkeypatch):
    """Acquires a lease as some holder; each of them is released in the end."""
    with contextlib.ExitStack() as stack:

        def acquire(storage, seconds=LONG, holder=None, commits=()):
            lease = Lease(storage, seconds)
            with monkeypatch.context() as patch:
                if holder is not None:
                    patch.setattr(Holder, 'here', lambda: holder)
                lease.acquire(lambda: dict.fromkeys(commits() if callable(commits) else commits, 0))
            stack.callback(lease.release)
            return lease

        yield acquire


def fall_asleep(lease):
    """It renews no more, and says nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, '_give_back', lambda: None)
        lease._stopped.set()
        lease._thread.join()


class Other:
    """Another process of this host."""

    def __init__(self, storage, seconds=LONG):
        self.process = subprocess.Popen(
            [sys.executable, '-c', HOLD, storage.root, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = f'process {self.process.pid} on {os.uname().nodename}'

    def tell(self, what):
        self.process.stdin.write(f'{what}\n')
        self.process.stdin.flush()

    def hear(self):
        return self.process.stdout.readline().strip()

    def do(self, what):
        self.tell(what)
        return self.hear()

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def other():
    """Starts other processes, which are gone in the end."""
    with contextlib.ExitStack() as stack:

        def start(storage, seconds=LONG):
            one = Other(storage, seconds)
            stack.callback(one.kill)
            return one

        yield start


def test_of_processes_that_start_at_the_same_time_one_wins_and_the_others_name_it(storage, other):
    racers = [other(storage, 3) for _ in range(4)]
    assert {racer.hear() for racer in racers} == {'ready'}
    for racer in racers:
        racer.tell('acquire')
    heard = {racer.name: racer.hear() for racer in racers}
    (winner,) = [name for name, said in heard.items() if said == 'done']
    for name, said in heard.items():
        assert name == winner or said.startswith(f'{storage.root} is written by {winner}; '), said


def test_whoever_is_a_moment_late_is_refused_at_once(storage, take):
    winners = []

    def be_overtaken():
        winners.append(take(storage, holder=ELSEWHERE))
        return []

    with pytest.raises(LockedError, match='is written by process 17 on elsewhere; end that run'):
        take(storage, commits=be_overtaken)
    winners[0].confirm()


def test_a_holder_that_renews_is_not_outwaited(storage, take):
    take(storage, SHORT, ELSEWHERE)
    started = time.monotonic()
    with pytest.raises(LockedError, match='is written by process 17 on elsewhere; end that run'):
        take(storage, SHORT)
    assert time.monotonic() - started < SHORT, 'refused later than at its first sign of life'


def test_a_holder_that_stands_still_is_replaced_after_the_time_of_a_lease(storage, take):
    first = take(storage, SHORT, ELSEWHERE)
    fall_asleep(first)
    started = time.monotonic()
    second = take(storage, SHORT)
    assert SHORT <= time.monotonic() - started < 3 * SHORT
    assert (first.epoch, second.epoch) == (1, 2)
    with pytest.raises(LockedError, match=f'was taken over by process {os.getpid()} on'):
        first.confirm()
    second.confirm()


def test_how_long_a_holder_may_be_silent_is_for_the_holder_to_say(disk, take):
    """The next run may have been given a shorter lease; this one renews as often as it promised."""
    take(disk, 3 * SHORT, ELSEWHERE)
    with pytest.raises(LockedError, match='on elsewhere'):
        take(disk, SHORT / 3)


def test_a_killed_process_of_this_host_is_replaced_at_once(storage, take, other, caplog):
    killed = other(storage)
    assert [killed.hear(), killed.do('acquire')] == ['ready', 'done']
    killed.process.send_signal(signal.SIGKILL)  # and nobody reaps it: it stays as a zombie
    os.waitid(os.P_PID, killed.process.pid, os.WEXITED | os.WNOWAIT)
    assert take(storage).epoch == 2
    assert 'waiting' not in caplog.text


def test_a_process_that_only_has_the_number_of_the_holder_is_not_it(disk, take, caplog):
    here = Holder.here()
    before = Holder(here.host, here.pid, 'at another time', *list(vars(here).values())[3:])
    fall_asleep(take(disk, holder=before))
    assert take(disk).epoch == 2
    assert 'waiting' not in caplog.text


@pytest.mark.parametrize('field', ['host', list(vars(ELSEWHERE))[-1]])
def test_of_another_host_nobody_knows_whether_the_process_is_gone(disk, take, field):
    take(disk, SHORT, Holder(**vars(Holder.here()) | {'pid': 2**22 + 1, field: 'another'}))
    with pytest.raises(LockedError, match='is written by process 4194305'):
        take(disk, SHORT)


@pytest.fixture
def no_proc(monkeypatch, tmp_path):
    """This process sees no /proc, as on macOS."""
    monkeypatch.setattr(holder, '_PROC', tmp_path / 'no' / 'proc')


def test_without_proc_a_live_holder_is_never_judged_dead(disk, take, no_proc, monkeypatch, caplog):
    mine = Holder.here()
    assert mine == Holder.here() and not mine.is_gone()
    # Processes of two containers may have the same host name and pid.
    with monkeypatch.context() as patch:
        patch.setattr(holder, '_TOKEN', 'of the other process')
        other = Holder.here()
    take(disk, SHORT, other)
    with pytest.raises(LockedError, match='is written by process'):
        take(disk, SHORT)
    assert 'to see whether it is alive' in caplog.text


def test_without_proc_a_dead_holder_is_replaced_when_its_lease_has_run_out(disk, take, no_proc):
    dead = Holder(Holder.here().host, 2**22 + 1, 'of its own', '')
    fall_asleep(take(disk, SHORT, dead))
    started = time.monotonic()
    assert take(disk, SHORT).epoch == 2
    assert time.monotonic() - started >= SHORT


def test_who_has_proc_does_not_judge_a_holder_that_has_none(monkeypatch, no_proc):
    without = Holder.here()
    monkeypatch.undo()
    assert not without.is_gone()


@pytest.mark.parametrize(
    'answer, is_gone',
    [(None, False), (PermissionError, False), (ProcessLookupError, True)],
    ids=['of this user', "another user's, hidden", 'ended'],
)
def test_a_process_that_cannot_be_read_is_not_a_dead_one(monkeypatch, answer, is_gone):
    """/proc may hide the processes of others, and this process may be out of descriptors."""

    def kill(pid, number):
        assert (pid, number) == (17, 0)
        if answer is not None:
            raise answer

    here = Holder.here()
    monkeypatch.setattr(holder, '_start_of', lambda pid: None)
    monkeypatch.setattr(os, 'kill', kill)
    assert here.space, 'this host has a /proc'
    assert Holder(here.host, 17, '1', here.space).is_gone() == is_gone


def test_a_released_lease_is_free_at_once_and_its_commits_count(storage, take, caplog):
    first = take(storage, holder=ELSEWHERE)
    Store(storage).commit(STEP)
    first.release()
    second = take(storage, holder=THIRD, commits=[STEP.directory])
    assert second.epoch == 2
    assert 'waiting' not in caplog.text
    assert Store(storage).commits() == {3: STEP}
    assert list(storage.list('lease')) == ['lease/00000002.json']


def test_where_nothing_was_ever_committed_a_release_leaves_nothing(storage, take):
    take(storage).release(is_empty=True)
    assert storage.list() == {}


def test_a_process_that_slept_through_its_lease_learns_of_it_before_a_commit(storage, take, other):
    sleeper = other(storage, SHORT)
    assert sleeper.hear() == 'ready'
    assert sleeper.do('acquire') == sleeper.do('confirm') == 'done'
    sleeper.process.send_signal(signal.SIGSTOP)
    mine = take(storage, SHORT)
    sleeper.process.send_signal(signal.SIGCONT)
    assert f'was taken over by process {os.getpid()} on' in sleeper.do('confirm')
    # It had looked just before it fell asleep, and goes on.
    assert sleeper.do('commit') == 'done'
    assert '3/commit.json' in storage.list()
    assert Store(storage).commits() == {}
    assert sleeper.do('release') == 'done'
    assert list(storage.list('lease')) == ['lease/00000002.json']
    mine.confirm()


def test_whoever_was_replaced_does_not_replace_what_was_committed_since(storage, take):
    fall_asleep(take(storage, SHORT, ELSEWHERE))
    store, mine = Store(storage), take(storage, SHORT)
    commit = Commit(3, 'mine', mine.epoch, 'digest')
    store.commit(commit)
    with pytest.raises(LockedError, match='step 3 .* was committed by a run that took over'):
        store.commit(Commit(3, 'late', 1, 'digest'))
    assert store.commits() == {3: commit}
    # The other way round the new one wins, whatever lies there.
    storage.write('5/commit.json', b'{"torn')
    for epoch in (1, mine.epoch):
        store.commit(Commit(5, 'mine', epoch, 'digest'))
    assert store.commits()[5].epoch == mine.epoch


def test_whoever_was_replaced_deletes_nothing(disk, take, monkeypatch):
    replaced = Checkpointer(CheckpointConfig(), disk.root)
    mine = take(disk)
    for step in (3, 4):
        Store(disk).commit(Commit(step, 'mine', mine.epoch, 'digest'))
    monkeypatch.setattr(Lease, 'check', lambda lease: None)
    replaced.save(5, {'w': jax.numpy.zeros(3)}, {})
    replaced.close()
    assert list(Store(disk).commits()) == [3, 4]


def test_a_torn_lease_is_waited_for(storage, take):
    storage.write('lease/00000004.json', b'{"epoch": 4, "hol')
    Store(storage).commit(STEP)
    assert Store(storage).commits() == {3: STEP}, 'it says nothing against what is there'
    started = time.monotonic()
    assert take(storage, SHORT, commits=[STEP.directory]).epoch == 5
    assert time.monotonic() - started >= SHORT
    assert Store(storage).commits() == {3: STEP}


def test_a_torn_lease_that_changes_has_a_holder(disk, take):
    take(disk, SHORT, ELSEWHERE)
    disk.write('lease/00000001.json', b'')  # until it renews
    with pytest.raises(LockedError, match='on elsewhere'):
        take(disk, SHORT)


@pytest.mark.parametrize('clock', [0, 2**32])
def test_no_clock_but_the_monotonic_one_is_looked_at(disk, take, monkeypatch, clock):
    monkeypatch.setattr(time, 'time', lambda: float(clock))
    path, done = Path(disk.root, 'lease', '00000001.json'), threading.Event()

    def set_modification_time():
        while not done.wait(0.01):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, (clock, clock))

    thread = threading.Thread(target=set_modification_time)
    thread.start()
    try:
        first = take(disk, SHORT, ELSEWHERE)
        with pytest.raises(LockedError, match='on elsewhere'):
            take(disk, SHORT)
        fall_asleep(first)
        started = time.monotonic()
        assert take(disk, SHORT).epoch == 2
        assert time.monotonic() - started >= SHORT
    finally:
        done.set()
        thread.join()


def test_a_holder_that_cannot_renew_for_a_while_stays_the_holder(disk, take, monkeypatch):
    lease = take(disk, 0.1, ELSEWHERE)
    write, tried = disk.write, threading.Event()

    def refuse(*arguments, **options):
        tried.set()
        raise UnavailableError('an outage')

    monkeypatch.setattr(disk, 'write', refuse)
    assert tried.wait(PATIENCE)
    lease.confirm()
    before = json.loads(disk.read('lease/00000001.json'))['renewals']
    monkeypatch.setattr(disk, 'write', write)
    deadline = time.monotonic() + PATIENCE
    while read_lease(disk, disk.list('lease')).renewals <= before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize('error', [UnavailableError('an outage'), None])
def test_a_release_that_fails_or_hangs_is_no_error(disk, take, monkeypatch, error):
    lease, over = take(disk), threading.Event()
    monkeypatch.setattr('jaxfm.storage.lease.PATIENCE_SECONDS', 0.1)

    def fail(*arguments, **options):
        if error is not None:
            raise error
        over.wait()

    monkeypatch.setattr(disk, 'write', fail)
    thread = lease._thread
    lease.release()
    over.set()
    thread.join()


def test_a_holder_whose_file_was_lost_learns_of_another_one_in_the_same_epoch(disk, take):
    first = take(disk)
    disk.remove('lease')
    first.confirm()  # nobody else is there
    second = take(disk, holder=ELSEWHERE)
    assert second.epoch == first.epoch
    with pytest.raises(LockedError, match='process 17 on elsewhere'):
        first.confirm()
    second.confirm()


def test_a_lease_that_vanishes_while_it_is_waited_for_is_free(disk, take):
    waited_for = Lease(disk, SHORT)
    disk.write('lease/00000001.json', Record(1, ELSEWHERE, seconds=LONG).to_json())
    threading.Timer(0.3, disk.remove, ('lease',)).start()
    started = time.monotonic()
    waited_for.acquire(dict)
    assert time.monotonic() - started < LONG / 2
    waited_for.release()


def test_a_server_that_ignores_conditions_can_hold_no_lease(s3_environment, monkeypatch):
    storage = open_storage(f's3://bucket/{uuid.uuid4().hex}')
    call = storage._call

    def without_conditions(operation, IfNoneMatch=None, **arguments):
        return call(operation, **arguments)

    monkeypatch.setattr(storage, '_call', without_conditions)
    with pytest.raises(StorageError, match='ignores conditional writes'):
        storage.prepare()
    assert storage.list() == {}
