"""The curriculum: which prompts are asked more often, and that this can be resumed."""

import collections
import json
import math

import numpy as np
import pytest

from jaxfm.rollout import CurriculumConfig
from jaxfm.rollout.curriculum import Curriculum
from tests.rollout.scripted import SCRIPTS, Engine, Stepwise

CONFIG = CurriculumConfig(low=0.2, high=0.8, floor=0.25)
KINDS = {'unasked': range(0, 10), 'hard': range(10, 20), 'medium': range(20, 30)}
KINDS['easy'] = range(30, 40)
REWARDS = {'hard': [0, 0, 0, 0], 'medium': [1, 0, 1, math.nan], 'easy': [1, 1, 2, 1]}


@pytest.fixture
def mixed():
    """Ten prompts of each band."""
    curriculum = Curriculum(CONFIG, 40, seed=5)
    for kind, rewards in REWARDS.items():
        for place in KINDS[kind]:
            curriculum.update(place, rewards)
    return curriculum


def test_prompts_in_the_band_and_new_ones_come_most_and_the_others_by_the_floor(mixed):
    counts = collections.Counter()
    for number in range(4000):
        counts.update(mixed.draw(number, 1, set()))
    total = {kind: sum(counts[place] for place in places) for kind, places in KINDS.items()}
    # 10 of weight 1, 10 of 1, 10 of 1/4 and 10 of 1/4; five sigma of 4000 draws are 4 %.
    for kind, share in dict(unasked=0.4, medium=0.4, hard=0.1, easy=0.1).items():
        assert total[kind] / 4000 == pytest.approx(share, abs=0.04)
    assert min(counts[place] for place in range(40)) > 20  # of 100 or 40: none is forgotten


def test_a_draw_repeats_nothing_and_leaves_out_what_is_under_way(mixed):
    for first in range(50):
        drawn = mixed.draw(first, 12, {*range(20)})
        assert len({*drawn}) == 12 and min(drawn) >= 20
    # If there is not enough else: first what is not under way.
    drawn = mixed.draw(0, 40, {*range(20)})
    assert {*drawn[:20]} == {*range(20, 40)} and {*drawn[20:]} == {*range(20)}
    assert collections.Counter(mixed.draw(0, 80, set())) == dict.fromkeys(range(40), 2)


def test_draws_depend_on_the_seed_the_number_and_the_rates(mixed):
    drawn = mixed.draw(7, 12, set())
    again = Curriculum(CONFIG, 40, seed=5)
    again.set_state(json.loads(json.dumps(mixed.get_state())))
    assert again.draw(7, 12, set()) == drawn
    assert again.shares() == mixed.shares() == dict.fromkeys(KINDS, 0.25)
    assert mixed.draw(8, 12, set()) != drawn
    assert Curriculum(CONFIG, 40, seed=5).draw(7, 12, set()) != drawn
    again.update(20, [0, 0, 0])
    assert again.get_state() != mixed.get_state()


def test_a_pass_rate_follows_the_newest_samples():
    curriculum = Curriculum(CONFIG, 1, seed=0)
    for rewards, band in [
        ([0.4, 0.4], 'hard'),  # below `passing`
        ([0.5, 0.0], 'medium'),  # 0.25
        ([1.0, 1.0], 'medium'),  # 0.625
        ([1.0, 1.0], 'easy'),  # 0.8125
        ([math.nan] * 2, 'medium'),  # nothing could be judged: 0.40625
    ]:
        curriculum.update(0, rewards)
        assert curriculum.shares()[band] == 1, band


def test_the_state_of_many_prompts_is_small():
    curriculum = Curriculum(CONFIG, 100_000, seed=0)
    random = np.random.default_rng(0)
    for place in range(20_000):
        curriculum.update(place, (random.random(8) < 0.5).tolist())
    assert len(curriculum.get_state()) < 20_000


def asked_by(source):
    return [''.join(map(chr, request.tokens)) for request in source.engine.asked]


def test_prompts_that_teach_are_asked_more(make):
    source = make(prompts=2, curriculum=dict(floor=0.05))
    for step in range(40):
        source.next(None, step)
    counts = collections.Counter(asked_by(source))
    assert {*counts} == {*SCRIPTS}
    assert max(counts[text] for text in ('bb', 'd')) < 8  # 0000 and 1111
    assert min(counts[text] for text in ('a', 'ccc', 'e', 'f')) > 12
    values = source.progress()
    assert values['rollout/hard_prompts'] == values['rollout/easy_prompts'] == 1 / 6
    assert values['rollout/medium_prompts'] == 4 / 6 and values['rollout/unasked_prompts'] == 0
    assert values['rollout/prompts'] == 80


@pytest.mark.parametrize('filter', ['none', 'zero_variance'])
def test_a_resumed_run_asks_the_same(make, filter):
    options = dict(prompts=2, curriculum={}, filter=filter)
    whole = make(**options)
    for step in range(6):
        whole.next(None, step)
    state = json.loads(json.dumps(whole.get_state()))
    expected = [whole.next(None, step) for step in range(6, 10)]
    again = make(**options)
    again.set_state(state)
    for step, batch in zip(range(6, 10), expected):
        for name, array in again.next(None, step).items():
            np.testing.assert_array_equal(array, batch[name])
    assert again.get_state() == whole.get_state() != state


def test_a_failed_step_changes_no_pass_rate(make):
    source = make(Engine(dict.fromkeys(SCRIPTS, 'nnnn')), curriculum={})
    before = source.get_state()
    with pytest.raises(Exception, match='no sample of step 0 could be judged'):
        source.next(None, 0)
    assert source.get_state() == before


def test_a_step_asks_no_prompt_twice_with_refills_and_ahead(make):
    options = dict(prompts=2, filter='zero_variance', curriculum={}, write_every=1)
    for more in ({}, dict(engine=Stepwise(0.001), max_staleness=1)):
        source = make(**options, **more)
        for step in range(12):
            source.next({}, step)
        for path in source._context.samples_directory.glob('*.jsonl'):
            lines = path.read_text().splitlines()[1:]
            ids = [json.loads(line)['id'] for line in lines if '"sample_index": 0' in line]
            assert len(ids) == len({*ids}) == 2


def test_turned_on_later_it_begins_with_unknown_prompts(make):
    plain = make()
    plain.next(None, 0)
    state = plain.get_state()
    assert 'pass_rates' not in state
    source = make(curriculum={})
    source.set_state(state)
    source.next(None, 1)
    assert source.progress()['rollout/unasked_prompts'] == 0.5
