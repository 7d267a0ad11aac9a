"""Each strategy does what it promises, and its ledger is the sampler's counters (see conftest)."""

import dataclasses
import random

import numpy as np
import pytest

from jaxfm.config.validation import validate
from jaxfm.errors import ConfigError
from jaxfm.sampling.strategies import (
    BeamSearchConfig,
    BudgetForcingConfig,
    ScorerConfig,
    StrategyConfig,
    VoteConfig,
)
from jaxfm.sampling.strategies.base import (
    Cancel,
    Extend,
    Fork,
    Outcome,
    OverBudget,
    Sample,
    Score,
    Wait,
)
from jaxfm.schema import Group
from tests.sampling.strategies.conftest import config_of, problems

HERE = __name__


class Judge:
    """Texts with many letters early in the alphabet are good."""

    def answer(self, prompt, text):
        return text[:1].lower() if text[:1].isalpha() else None

    def reward(self, prompt, text):
        return sum(letter in 'abcdeABCDE' for letter in text) / max(len(text), 1)


class Steps:
    """Scores a completion by its last letter; remembers what it has seen."""

    Config = ScorerConfig
    seen: list = []

    def __init__(self, config, judge):
        pass

    def __call__(self, prompt, completion):
        Steps.seen.append((completion.sample_index, completion.text))
        return completion.tokens[-1] / 60


class Ends:
    """Remembers the ids after each step, and what ended it; prefers an 'a' at the end."""

    Config = ScorerConfig
    ends: list = []

    def __init__(self, config, judge):
        pass

    def __call__(self, prompt, completion):
        Ends.ends.append((list(completion.tokens), completion.stop))
        return 1 - completion.tokens[-1] / 60


class Tool:
    """A checker that computes something from each turn, like a tool; satisfied after `enough`."""

    class Config(Group):
        name: str = ''
        enough: int = 100
        words: int = 3

    def __init__(self, config, judge):
        self._config, self.turns = config, []

    def __call__(self, prompt, completion):
        self.turns.append(completion)
        number = sum(completion.tokens)
        if completion.sample_index + 1 >= self._config.enough:
            return None
        return ''.join('abcdefghij'[(number + i) % 10] for i in range(self._config.words))


class Restless:
    """Uses every action: copies, extends and cancels while samples run, and scores."""

    Config = StrategyConfig

    def __init__(self, config, context):
        pass

    def run(self, problem):
        branches = yield Sample(3)
        yield Wait(branches, 'news')
        copies = yield Fork(branches[0], 2, tokens=[7, 8])
        yield Extend(branches[1], [9], {'max_tokens': 5})
        yield Cancel(branches[2])
        yield Wait([*branches, *copies], 'any')
        try:
            yield Score([3, 4, 5])
        except OverBudget:
            yield Cancel(branches[0])
        yield Cancel(copies[0])
        yield Extend(branches[2], [1, 2], {'max_tokens': 4})
        yield Wait([*branches, *copies])
        return Outcome([*branches, *copies])


class Chance:
    """Takes random actions, on samples that run, wait or have ended."""

    Config = StrategyConfig

    def __init__(self, config, context):
        pass

    def run(self, problem):
        draw = random.Random(problem.id)
        branches = list((yield Sample(draw.randint(1, 4))))
        for _ in range(12):
            branch, ids = draw.choice(branches), draw.choices(range(59), k=draw.randint(0, 3))
            room, keep = {'max_tokens': draw.randint(1, 6)}, draw.randint(0, len(branch.tokens))
            actions = [
                Sample(draw.randint(1, 2), tokens=ids, options=room),
                Fork(branch, draw.randint(1, 2), ids, room),
                Extend(branch, ids, room, draw.choice([None, keep])),
                Cancel(branch),
                Score(draw.choices(range(59), k=3), draw.randint(0, 2)),
                *(Wait(branches, until) for until in ('all', 'any', 'news', 'news')),
            ]
            action = draw.choice(actions)
            try:
                result = yield action
            except OverBudget:
                continue
            if isinstance(action, Sample | Fork):
                branches += result
        yield Wait(branches)
        return Outcome(branches)


EVERY = [
    dict(name='best_of_n', n=5, scorer={'name': 'reward'}),
    dict(name='vote', n=8, adaptive='doubling', delta=0.3),
    dict(name='vote', n=4, weights={'name': 'logprob'}),
    dict(name='budget_forcing', min_think=6, max_think=9, answer_tokens=4, end='e', wait='WW'),
    dict(name='beam_search', width=2, expansions=2, step_tokens=3, scorer={'name': 'reward'}),
    dict(name='beam_search', width=2, expansions=2, step_tokens=4, subtrees=2, delimiter='a'),
    dict(name='refinement', max_turns=3, checker={'name': f'{HERE}:Tool'}, before='x', after='y'),
    dict(
        name='compute_optimal',
        first=2,
        levels=[
            dict(at_least=0.6, strategy=dict(name='vote', n=4)),
            dict(strategy=dict(name='beam_search', width=2, expansions=2, step_tokens=3)),
        ],
    ),
    dict(name=f'{HERE}:Restless'),
]


@pytest.mark.parametrize(
    'values, budget',
    [*((values, 0) for values in EVERY), *((values, 25) for values in EVERY[1::3])],
    ids=lambda value: value['name'].split(':')[-1] if isinstance(value, dict) else str(value),
)
def test_the_ledger_is_the_counters_with_few_pages(run_tight, values, budget):
    """The Runner compares them. The problems give way to each other, and a budget cuts them."""
    config = config_of(**values, budget={'tokens': budget})
    before = run_tight.sampler.counters
    outcomes = run_tight(config, problems(4, max_tokens=14), Judge())
    after = run_tight.sampler.counters
    assert all(outcome.error is None for outcome in outcomes.values())
    assert all(outcome.entry.decoded_tokens <= (budget or 999) for outcome in outcomes.values())
    if not budget:
        assert after.preemptions > before.preemptions


@pytest.mark.parametrize('values', EVERY[:-1], ids=lambda values: values['name'])
def test_outcomes_do_not_depend_on_pages_or_other_problems(run, run_tight, values):
    config = config_of(**values)
    together = run_tight(config, problems(3, max_tokens=8), Judge())
    for problem in problems(2, max_tokens=8):
        alone = run.one(config, [problem], Judge())
        found = together[problem.id]
        assert [s.tokens for s in found.samples] == [s.tokens for s in alone.samples]
        assert (found.chosen, found.answer) == (alone.chosen, alone.answer)


@pytest.mark.parametrize('budget', [0, 40])
def test_any_actions_give_samples_that_the_model_confirms(run_tight, score, budget):
    config = config_of(f'{HERE}:Chance', budget={'tokens': budget})
    outcomes = run_tight(config, problems(12, max_tokens=9))
    assert [outcome.error for outcome in outcomes.values()] == [None] * 12
    reasons = set()
    for problem, outcome in zip(problems(12), outcomes.values()):
        assert outcome.entry.decoded_tokens + outcome.entry.score_tokens <= (budget or 9999)
        for sample in outcome.samples:
            reasons.add(sample.finish_reason)
            assert len(sample.tokens) == len(sample.logprobs) and not sample.is_running
            if not sample.tokens:
                continue
            expected = np.array(score(problem.tokens, sample.tokens)[0])
            for start, end in sample.forced:
                assert sample.logprobs[start:end] == [0.0] * (end - start)
                expected[start:end] = 0.0
            np.testing.assert_allclose(sample.logprobs, expected, rtol=0, atol=1e-4)
    assert {'length', 'cancelled'} <= reasons and ('budget' in reasons) == bool(budget)


# Best of n and votes: see test_replay.py for what they choose.


def test_best_of_n_chooses_the_highest_reward_and_counts_its_calls(run):
    outcome = run.one(config_of('best_of_n', n=6, scorer={'name': 'reward'}), problems(), Judge())
    rewards = [Judge().reward('', sample.text) for sample in outcome.samples]
    assert outcome.scores == rewards and rewards[outcome.chosen] == max(rewards)
    assert outcome.answer == Judge().answer('', outcome.samples[outcome.chosen].text)
    assert outcome.entry.calls == 6 + 6  # rewards and answers


def test_a_logprob_is_no_call(run):
    outcome = run.one(config_of('best_of_n', n=3), problems())
    means = [sum(sample.logprobs) / 12 for sample in outcome.samples]
    assert outcome.scores == means and outcome.entry.calls == 0


class Wild:
    """Returns what its config says, whatever its range."""

    class Config(ScorerConfig):
        value: float | str = 0.5

    def __init__(self, config, judge):
        self._value = float(config.value)

    def __call__(self, prompt, completion):
        return self._value if prompt == 'q1' else 0.5


@pytest.mark.parametrize('value', [1.5, -0.1, 'nan', 'inf'])
def test_a_score_out_of_range_fails_its_problem(run, value):
    config = config_of('best_of_n', n=2, scorer={'name': f'{HERE}:Wild', 'value': value})
    outcomes = run(config, problems(3))
    assert 'from 0 to 1 (least and most of the scorer)' in outcomes['p1'].error
    assert outcomes['p0'].error is None and outcomes['p2'].chosen == 0


def test_a_range_can_be_wider(run):
    scorer = {'name': f'{HERE}:Wild', 'value': 1.5, 'most': 2.0}
    assert run(config_of('best_of_n', n=2, scorer=scorer), problems(2))['p1'].scores == [1.5, 1.5]
    with pytest.raises(ConfigError, match='weights are from 0 to 1, but .* from 0 to 2'):
        run(config_of('vote', n=2, weights=scorer), problems(1), Judge())


def test_a_vote_needs_answers(run):
    with pytest.raises(ConfigError, match='vote: the task has no answers'):
        run(config_of('vote', n=2), problems(1))


@dataclasses.dataclass
class Fixed:
    """Gives the same answer, but none for samples whose text begins with a capital letter."""

    value: str | None = 'x'

    def answer(self, prompt, text):
        return None if text[:1].isupper() else self.value


def test_an_adaptive_vote_stops_when_all_agree_and_goes_on_without_answers(run):
    config = config_of('vote', n=16, adaptive='doubling', delta=0.1)
    outcome = run.one(config, problems(allowed_ids=range(26)), Fixed())
    assert (len(outcome.samples), outcome.answer, outcome.chosen) == (4, 'x', 0)
    none = run.one(config, problems(allowed_ids=range(26, 52)), Fixed())
    assert (len(none.samples), none.answer, none.chosen) == (16, None, None)


# Budget forcing.


@pytest.mark.parametrize('end', ['e', 'ab', '</think>'])
@pytest.mark.parametrize('least, most', [(0, 4), (3, 8), (8, 8), (10, 14)])
def test_the_length_of_thinking_is_always_between_its_limits(run, least, most, end):
    """With few letters, the model often ends its thinking, or its text, by itself."""
    config = config_of(
        *('budget_forcing',),
        min_think=least,
        max_think=most,
        answer_tokens=5,
        end=end,
        wait='WWW',
        closing='Z',
    )
    ids = [0, 1, 4, 5] + [59] * (end == '</think>')
    tasks = problems(6, allowed_ids=ids, stop_ids=frozenset({5}))
    outcomes, closed = run(config, tasks, Judge()), set()
    for outcome in outcomes.values():
        assert outcome.error is None
        [sample], [note] = outcome.samples, outcome.record
        thought, is_forced = note['thought'], note['is_forced']
        closed.add(is_forced)
        assert least <= thought <= most
        ending = [25 + 26] if is_forced else run.sampler.tokenizer.encode_parts([end])[0]
        assert sample.tokens[thought : thought + len(ending)] == ending
        assert 1 <= len(sample.tokens) - thought - len(ending) <= 5
        assert end not in sample.text[:thought]
    if least < 8 and end != 'ab':  # both happen
        assert closed == {True, False}


def test_an_answer_after_forced_words_is_that_after_the_same_prompt(run):
    config = config_of(
        'budget_forcing', min_think=0, max_think=6, answer_tokens=7, end='~', closing='END'
    )
    [problem] = problems(temperature=0.0)
    # '~' is no letter: the model never says it.
    [sample] = run.one(config, [problem], Judge()).samples
    assert sample.tokens[6:9] == run.sampler.tokenizer.encode('END') and len(sample.tokens) == 16
    assert sample.forced == [(6, 9)]
    longer = dataclasses.replace(problem, tokens=[*problem.tokens, *sample.tokens[:9]])
    plain = run.one(config_of('best_of_n', n=1), [longer]).samples[0]
    assert plain.tokens[:7] == sample.tokens[9:]


# Beam search.


def test_beam_search_keeps_the_best_steps_and_expands_them(run):
    Steps.seen.clear()
    config = config_of(
        *('beam_search',),
        width=2,
        expansions=3,
        step_tokens=4,
        delimiter='',
        scorer={'name': f'{HERE}:Steps'},
    )
    outcome = run.one(config, problems(allowed_ids=range(52)))
    texts = [text for _, text in sorted(Steps.seen)]  # calls run in threads
    assert [len(text) for text in texts] == [4] * 6 + [8] * 6 + [12] * 6
    letters = run.sampler.tokenizer.alphabet
    for begun, step in ((texts[:6], 8), (texts[6:12], 12)):
        kept = sorted(begun, key=lambda text: letters.index(text[-1]), reverse=True)[:2]
        children = [text[: step - 4] for text in texts if len(text) == step]
        assert sorted(children) == sorted(kept * 3)
    assert len({text for text in texts if len(text) == 12}) == 6  # the copies differ
    assert outcome.samples[outcome.chosen].text == max(
        (text for text in texts if len(text) == 12), key=lambda text: letters.index(text[-1])
    )
    # The beginnings are shared: only what is behind whole pages is computed again.
    assert outcome.entry.prefill_tokens <= 7 + 18 * 3 and outcome.entry.calls == 18


def test_subtrees_keep_their_own_beams(run):
    Steps.seen.clear()
    values = dict(width=2, expansions=3, step_tokens=6, delimiter='', max_steps=2)
    config = config_of('beam_search', **values, subtrees=2, scorer={'name': f'{HERE}:Steps'})
    run.one(config, problems(allowed_ids=range(52)))
    texts = [text for _, text in sorted(Steps.seen)]  # calls run in threads
    letters = run.sampler.tokenizer.alphabet
    best = [max(texts[i : i + 3], key=lambda text: letters.index(text[-1])) for i in (0, 3)]
    assert [text[:6] for text in texts[6:]] == [best[0]] * 3 + [best[1]] * 3


def test_a_step_ends_at_its_delimiter_and_a_completion_at_its_stop(run):
    words = dict(width=3, expansions=2, step_tokens=9, delimiter='a')
    config = config_of('beam_search', scorer={'name': f'{HERE}:Ends'}, **words)
    Ends.ends.clear()
    tasks = problems(3, allowed_ids=range(6), stop=['f'], max_tokens=20)
    for outcome in run(config, tasks, Judge()).values():
        assert outcome.error is None
        for sample in outcome.samples:
            assert 'f' not in sample.text
            assert len(sample.tokens) <= 20 and sample.logprobs.count(0.0) == 0
        chosen = outcome.samples[outcome.chosen]
        assert chosen.stop == 'f' or len(chosen.tokens) == 20
    reasons = set()
    for tokens, stop in Ends.ends:
        # It began behind the longest beginning that was scored.
        before = (len(x) for x, _ in Ends.ends if len(x) < len(tokens) and x == tokens[: len(x)])
        step = tokens[max(before, default=0) :]
        last = run.sampler.tokenizer.decode(step[-1:])
        assert not {'a', 'f'} & set(run.sampler.tokenizer.decode(step[:-1]))
        assert stop == (last if last in 'af' else None)
        assert len(step) <= 9 and (stop or len(step) == 9 or len(tokens) == 20)
        reasons.add(stop or len(step))
    assert {'a', 'f', 9} <= reasons


# Refinement.


def refinement(**values):
    checker = {'name': f'{HERE}:Tool', **values.pop('checker', {})}
    return config_of('refinement', checker=checker, before='x', after='y', **values)


def test_turns_are_appended_as_they_were_sampled(run):
    [problem] = problems(max_tokens=4)
    outcome = run.one(refinement(max_turns=3), [problem], Judge())
    x, y = run.sampler.tokenizer.encode('xy')
    ids = []
    for index, (turn, note) in enumerate(zip(outcome.samples, outcome.record)):
        assert note['tokens'] == turn.tokens and len(turn.tokens) == 4
        sampled = run.one(
            config_of('best_of_n', n=1),
            [dataclasses.replace(problem, tokens=[*problem.tokens, *ids])],
        )
        assert sampled.samples[0].tokens == turn.tokens
        said = run.sampler.tokenizer.encode(note['feedback'])
        assert note['appended'] == ([x, *said, y] if index < 2 else [])
        ids += [*turn.tokens, *note['appended']]
    assert outcome.chosen == 2 and outcome.answer == outcome.answers[2]
    assert outcome.entry.decoded_tokens == 12


def test_a_satisfied_checker_ends_the_turns(run):
    outcome = run.one(refinement(max_turns=9, checker={'enough': 2}), problems(max_tokens=4))
    assert len(outcome.samples) == 2 and outcome.record[1]['feedback'] is None
    assert outcome.entry.calls == 2


def test_turns_end_where_the_sampler_has_no_room(run):
    outcome = run.one(refinement(max_turns=9), problems(max_tokens=6))
    assert 8 + sum(len(n['tokens']) + len(n['appended']) for n in outcome.record) >= 40 - 5
    assert all(len(turn.tokens) > 0 for turn in outcome.samples)


def test_a_turn_is_told_when_it_ends(run):
    told = []
    outcome = run.one(
        refinement(max_turns=3), problems(max_tokens=4), on_record=lambda *x: told.append(x)
    )
    assert told == [('p0', note) for note in outcome.record]


# Configs.


@pytest.mark.parametrize(
    'group, values, sentence',
    [
        (BudgetForcingConfig, dict(min_think=9, max_think=8), 'min_think 9 is more than max_think'),
        (BeamSearchConfig, dict(width=3, subtrees=2), 'width 3 is not a multiple of subtrees 2'),
        (
            VoteConfig,
            dict(n=65, adaptive='one'),
            "n 65 is too many to stop early: with adaptive='o",
        ),
        (VoteConfig, dict(delta=1.0), 'must be less than 1'),
        (VoteConfig, dict(delta=0.1), "delta 0.1 would do nothing: adaptive is 'off'"),
        (
            VoteConfig,
            dict(delta=0.0, adaptive='one', weights=dict(name='logprob')),
            'delta 0 would do nothing: a weighted vote stops only',
        ),
        (VoteConfig, dict(weights=dict(name='logprob', meen=True)), 'did you mean mean?'),
        (VoteConfig, dict(budget=dict(tokens=-1)), 'must be at least 0'),
        (ScorerConfig, dict(name='x', least=2.0), 'least 2.0 is more than most 1.0'),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(group, values, sentence):
    found = validate(group, values)[1]
    assert any(sentence in problem.sentence for problem in found), found
