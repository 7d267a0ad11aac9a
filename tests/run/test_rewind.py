"""Runs that go back to before a spike: what they leave out, repeat, and tell."""

import math

import pytest

from jaxfm import main
from jaxfm.metrics import goodput
from jaxfm.metrics.writers import JsonlWriter, Recorder, read_records
from jaxfm.optim.spikes import Spike, Spikes
from jaxfm.run import workdir as workdirs
from tests.runs import assert_same_state, measured

pytestmark = pytest.mark.usefixtures('compilation_cache_as_before')

CONFIG = """
    own = {key: config[key] for key in ('data', 'optimizer')}
    for key in ('data', 'optimizer', 'steps', 'evals'):
        del config[key]
    own['optimizer']['spikes'] = dict(policy='rewind', max_rewinds=2)
    config.phases = [dict(name=name, steps=9, **own) for name in ('first', 'second')]
    config.checkpoint = dict(every=4)
    config.sampling.num_samples = 0
    config.metrics.log_every = 2
"""
# {phase: {rewinds so far: the step that is a spike}}. Before the first there is no checkpoint, and
# before the third none of its phase.
SPIKES = {'first': {0: 3, 1: 7}, 'second': {0: 11}}
STEPS, TOKENS = 18, 8 * 32


class Killed(BaseException):
    """What ends a run without giving it a chance to save."""


@pytest.fixture(scope='module')
def train(tiny):
    """Trains in this process -> (exit code; None if it was killed, steps that were begun)."""
    config = tiny.derive('rewind', CONFIG)

    def run(workdir, spikes=SPIKES, killed_at=None):
        """killed_at: how many steps are begun before."""
        begun = []

        def limit(self, step):
            phase = 'first' if step <= 9 else 'second'
            return 0.0 if step == spikes[phase].get(self.rewinds) else 1e9

        def begin(self, step, position):
            if len(begun) == killed_at:
                raise Killed
            begun.append(step)
            return original(self, step, position)

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('XDG_CACHE_HOME', tiny.environment['XDG_CACHE_HOME'])
            original = Spikes.begin
            patch.setattr(Spikes, 'limit', limit)
            patch.setattr(Spikes, 'begin', begin)
            patch.setattr(workdirs, 'write_report', lambda path: path)
            try:
                code = main.main(['--config', str(config), '--workdir', str(workdir)])
            except Killed:
                code = None
        return code, begun

    return run


@pytest.fixture(scope='module')
def straight(train, tmp_path_factory):
    """A run that is never killed: (work directory, steps that were begun)."""
    directory = tmp_path_factory.mktemp('rewind') / 'run'
    code, begun = train(directory)
    assert code == 0
    return directory, begun


def rows(workdir):
    """{step: how many batches of its phase were read up to there}."""
    records = read_records(workdir / 'metrics.jsonl')
    found = [r for r in records if r['kind'] == 'perf' and 'perf/step_seconds' in r]
    return {r['step']: r['data/rows'] / 8 for r in found}


def rewinds(workdir):
    records = read_records(workdir / 'metrics.jsonl')
    names = ('step', 'phase', 'spike/step', 'spike/rewinds', 'spike/loss')
    return [tuple(r[name] for name in names) for r in records if 'spike/rewinds' in r]


def test_the_data_goes_on_after_the_spike(straight):
    """From the newest checkpoint before it; at the beginning of a run or phase there is none."""
    workdir, begun = straight
    # The host sees a loss when the next step has begun, unless its own step is logged.
    assert begun == [*range(1, 5), *range(1, 9), *range(5, 10), *range(10, 13), *range(10, 19)]
    assert rows(workdir) == {
        **{step: 3 + step for step in (1, 2, 4)},  # batches 1 to 3 are left out,
        **{step: 6 + step for step in (6, 8, 9)},  # and those of steps 5 to 7
        **{step: 2 + step - 9 for step in range(10, 19, 2)},  # and those of steps 10 and 11
    }
    assert [found[:-1] for found in rewinds(workdir)] == [
        (0, 'first', 3, 1),
        (4, 'first', 7, 2),
        (9, 'second', 11, 1),
    ]
    assert list(measured(workdir)) == [
        (step, 'train') for step in (1, 2, 4, 6, 8, 9, *range(10, 19, 2))
    ]


def test_what_is_cut_off_is_kept_and_its_time_is_wasted(straight):
    workdir, _ = straight
    for step, logged in ((3, [1, 2]), (7, [6]), (11, [10])):
        records = list(read_records(workdir / f'metrics.before_spike_{step}.jsonl'))
        assert [r['spike/step'] for r in records if r['step'] == step and 'spike/step' in r] == [
            step
        ]
        assert [r['step'] for r in records if r['kind'] == 'train'] == logged
    last = [r for r in read_records(workdir / 'metrics.jsonl') if r['kind'] == 'perf'][-1]
    account = [last[goodput.name_of(bucket)] for bucket in goodput.BUCKETS]
    assert sum(account) == pytest.approx(last['perf/elapsed_seconds']) and min(account) >= 0
    assert last['goodput/wasted_seconds'] > 0
    assert last['perf/total_tokens'] == STEPS * TOKENS
    log = (workdir / 'log.txt').read_text()
    assert 'is a spike, above 0: the run goes back' in log
    assert 'back at step 4; the data goes on after the spike of step 7' in log
    assert log.count('compiled the step in ') == 2  # once a phase


def test_a_run_killed_after_a_rewind_comes_to_the_same_spike_again(train, straight, tiny, tmp_path):
    wanted, _ = straight
    workdir = tmp_path / 'run'
    code, begun = train(workdir, killed_at=13)
    assert code is None and begun == [*range(1, 5), *range(1, 9), 5]
    code, begun = train(workdir)
    assert code == 0 and begun[:5] == [5, 6, 7, 8, 5]
    assert measured(workdir) == measured(wanted)
    assert rewinds(workdir) == rewinds(wanted)
    assert rows(workdir) == rows(wanted)
    assert_same_state(tiny.saved_state(workdir, STEPS), tiny.saved_state(wanted, STEPS))


def test_too_many_rewinds_end_the_run_with_70(train, tmp_path, capsys):
    workdir = tmp_path / 'run'
    code, _ = train(workdir, {'first': {0: 5, 1: 5, 2: 6}, 'second': {}})
    error = capsys.readouterr().err
    assert code == 70
    assert 'error: the loss of step 6, ' in error
    assert 'has gone back 2 times (spikes.max_rewinds of its optimizer)' in error
    assert error.rstrip().endswith('run it again to resume at step 4')
    # Going back to the same step twice removes no trace of the first time.
    assert [found[:-1] for found in rewinds(workdir)] == [(4, 'first', 5, 1), (4, 'first', 5, 2)]
    for name in ('metrics.before_spike_5.jsonl', 'metrics.before_spike_5_2.jsonl'):
        steps = [r['step'] for r in read_records(workdir / name) if 'spike/step' in r]
        assert steps[-1] == 5, name


def test_a_rewind_further_back_keeps_the_earlier_ones_in_the_order_of_steps(tmp_path):
    """Or a run that resumes between the two would cut off all that follows."""
    recorder = Recorder(JsonlWriter(tmp_path / 'metrics.jsonl'))
    position = {}
    for step in range(1, 9):
        recorder.write(step, 'train', {'train/loss': 1.0})
        position[step] = recorder.jsonl.position()
    workdirs.undo_records(recorder, position[6], 6, Spike(8, 9.0, 1.0, None))
    workdirs.undo_records(recorder, position[4], 4, Spike(7, math.nan, 1.0, None, rewinds=1))
    recorder.write(5, 'train', {'train/loss': 1.0})
    recorder.close()
    assert [found[:-1] for found in rewinds(tmp_path)] == [(4, '', 8, 1), (4, '', 7, 2)]
    assert [r['step'] for r in read_records(tmp_path / 'metrics.jsonl')] == [0, 1, 2, 3, 4, 4, 4, 5]
