"""The source of preference learning: which rows have log-probs under which reference."""

import numpy as np
import pytest

from jaxfm.data import ProblemsData
from jaxfm.data.dataset import open_dataset
from jaxfm.errors import ConfigError, DataError
from jaxfm.objectives import DPOConfig, KTOConfig
from jaxfm.preferences.source import Preferences
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import build_tokenizer

FIRST, MOVED = 3.0, 5.0  # what the weights are called
ORIGIN = {'init_from': 'a run', 'step': 7}


@pytest.fixture(scope='module')
def open_pairs(tmp_path_factory):
    directory = tmp_path_factory.mktemp('pairs')

    def build(sequence_length):
        config = ProblemsData(
            form='pairs',
            num_problems=160,
            num_heldout=4,
            sequence_length=sequence_length,
            batch_size=2,
        )
        return open_dataset(config, build_tokenizer(BytesConfig(), ()), directory)

    return build


@pytest.fixture(scope='module')
def dataset(open_pairs):
    return open_pairs(512)


@pytest.fixture
def make(dataset, tmp_path):
    """Makes sources of the same phase, and collects from where they load a reference."""

    def build(batch_size=2, steps=4, objective=None, seed=0, has_skips=False, dataset=dataset):
        def load(origin):
            build.loaded.append(origin)
            return FIRST if origin == ORIGIN else MOVED, origin

        return Preferences(
            dataset.packings,
            dataset.weights,
            objective or DPOConfig(),
            batch_size=batch_size,
            seed=seed,
            steps=steps,
            last=steps,
            has_skips=has_skips,
            rows=np.arange(batch_size),
            put=lambda batch: batch,
            score=lambda params, batch: params * batch['tokens'].astype(np.float32),
            divergence=lambda params, batch: batch['reference_logprobs'],
            reference=load,
            origin=lambda: ORIGIN,
            path=tmp_path / 'reference' / 'dpo.npz',
        )

    build.loaded, build.path = [], tmp_path / 'reference' / 'dpo.npz'
    return build


def begin(make, steps, **options):
    """The state of a source after some steps, as a checkpoint holds it."""
    source = make(**options)
    source.prepare(FIRST)
    check(source, range(steps))
    source.close()
    return source.get_state()


def check(source, steps):
    """Takes batches, and asserts that all have the reference of the first weights."""
    for step in steps:
        batch = source.next(MOVED, step)
        np.testing.assert_array_equal(batch['reference_logprobs'], FIRST * batch['tokens'])
        assert (batch['reference_logprobs'] != 0).any(axis=1).all()
    source.close()


def test_what_is_kept_is_read_again(make):
    state = begin(make, 2)
    source = make()
    source.set_state(state)
    source.prepare(None)
    check(source, range(2, 4))
    assert not make.loaded


@pytest.mark.parametrize('changed', [{'batch_size': 7}, {'batch_size': 1}, {'steps': 9}])
def test_rows_that_were_not_foreseen_get_their_reference(make, changed):
    state = begin(make, 2)
    source = make(**changed)
    source.set_state(state)
    source.prepare(None)
    check(source, range(2, changed.get('steps', 4)))
    assert make.loaded == ([ORIGIN] if changed != {'batch_size': 1} else [])
    # And they are kept, too.
    again = make(**changed)
    again.set_state(state)
    again.prepare(None)
    check(again, range(2, changed.get('steps', 4)))
    assert len(make.loaded) <= 1


@pytest.mark.parametrize('has_skips', [False, True])
def test_a_run_that_leaves_out_rows_has_a_reference_for_those_after_them(make, has_skips):
    source = make(has_skips=has_skips)
    source.prepare(FIRST)
    check(source, range(4))
    source.set_state(source.get_state())  # after a spike in the last step
    check(source, range(1, 4))
    assert make.loaded == ([] if has_skips else [ORIGIN])


@pytest.mark.parametrize('damage', ['gone', 'empty', 'cut', 'of another beginning'])
def test_without_its_file_the_reference_is_that_of_the_first_weights(make, damage):
    """Although what they are from has gone on."""
    state = begin(make, 2)
    content = make.path.read_bytes()
    if damage == 'of another beginning':
        begin(make, 0)
    elif damage == 'gone':
        make.path.unlink()
    else:
        make.path.write_bytes(b'' if damage == 'empty' else content[: len(content) // 2])
    source = make()
    source.set_state(state)
    source.prepare(None)
    check(source, range(2, 4))
    assert make.loaded == [ORIGIN]


def test_other_data_get_their_log_probs_under_the_same_reference(make):
    state = begin(make, 2)
    source = make(seed=1)
    with pytest.raises(ConfigError, match='the data changed'):
        source.set_state(state)
    source.prepare(None)
    check(source, range(2, 4))
    assert make.loaded == [ORIGIN]


def test_a_phase_that_begins_again_forgets_its_first_reference(make):
    source = make()
    source.prepare(MOVED)
    source.prepare(FIRST)
    check(source, range(4))


def test_mismatched_answers_have_a_reference_of_their_own(make):
    source = make(objective=KTOConfig())
    source.prepare(FIRST)
    for step in range(4):
        batch = source.next(MOVED, step)
        np.testing.assert_array_equal(batch['reference_logprobs'], FIRST * batch['tokens'])
        assert (batch['kl'] > 0).any() and (batch['kl'] != batch['reference_logprobs']).any()
        assert not any('mismatched' in name for name in batch)
    source.close()


def test_rows_without_mismatched_answers_are_told(make, open_pairs, caplog):
    """KTO would compare with a divergence that is 0, whatever the policy does."""
    source = make(objective=KTOConfig(), dataset=open_pairs(150), steps=9)
    with pytest.raises(
        DataError, match='^18 of 18 rows hold one document.* raise config.data.sequence_'
    ):
        source.prepare(FIRST)
    source = make(objective=KTOConfig(), dataset=open_pairs(200), steps=9)
    with caplog.at_level('WARNING'):
        source.prepare(FIRST)
    (record,) = caplog.records
    assert 'of 18 rows hold one document' in record.getMessage()
    caplog.clear()
    make(dataset=open_pairs(200)).prepare(FIRST)
    assert not caplog.records
