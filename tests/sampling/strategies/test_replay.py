"""Selectors: votes and best-of-n over records, which give offline what the strategies chose."""

import json

import pytest

from jaxfm.sampling.strategies import replay
from jaxfm.sampling.strategies.stopping import Rule, rounds_of
from tests.sampling.strategies.conftest import config_of, problems


class Judge:
    """Letters up to m are answers, in three classes; a reward of its own for each text."""

    def answer(self, prompt, text):
        return None if text[0].lower() > 'm' else str(ord(text[0]) % 3)

    def reward(self, prompt, text):
        return sum(map(ord, text)) % 97 / 97


def records_of(id, outcome):
    """With the strategy's scores as `score`. tests/evals/test_solve.py has files of evaluators."""
    samples = zip(outcome.samples, outcome.answers, outcome.scores or [None] * 99)
    records = [
        {
            'id': id,
            'sample_index': sample.sample_index,
            'answer': answer,
            'score': score,
            'logprob': sum(sample.logprobs),
        }
        for sample, answer, score in samples
    ]
    return json.loads(json.dumps(records[::-1]))


def test_empty_answers_do_not_vote():
    answers = [None, None, None, 'b', None, 'a', 'a']
    assert replay.tally(answers) == {'b': 1, 'a': 2}
    assert replay.winner(answers) == 5
    assert replay.winner([None, None]) is None
    assert replay.winner(['', 'x', 'x']) == 1  # an empty text is an answer like others


def test_of_equal_votes_the_first_answer_wins():
    assert replay.winner(['b', 'a', 'a', 'b']) == 0
    assert replay.winner(['a', 'b'], [0.5, 0.5]) == 0
    assert replay.winner(['a', 'b', 'b'], [0.9, 0.5, None]) == 0
    assert replay.winner(['a', 'b', 'b'], [0.9, 0.5, 0.5]) == 1


def test_the_best_score_is_chosen_and_none_is_no_score():
    assert replay.best([None, -3.0, -1.0, -1.0]) == 2
    assert replay.best([None, None]) is None and replay.best([]) is None


def test_a_sample_twice_is_refused():
    record = {'id': 'a', 'sample_index': 3}
    with pytest.raises(ValueError, match='a: two records of sample 3'):
        replay.by_problem([record, {'id': 'b', 'sample_index': 3}, record])


@pytest.mark.parametrize('missing', [{'finish_reason': 'error'}, {'num_tokens': 0}])
@pytest.mark.parametrize('key', ['score', 'logprob', replay.mean_logprob, replay.probability])
def test_a_sample_that_the_engine_failed_has_no_value(missing, key):
    """Its log-prob would be the highest, 0."""
    sound = {'score': 0.0, 'logprob': -3.0, 'num_tokens': 2, 'answer': 'a', 'finish_reason': 'stop'}
    failed = {'score': 0.0, 'logprob': 0.0, 'num_tokens': 2, 'answer': 'b', 'finish_reason': 'stop'}
    assert replay.best_of_n([failed | missing, sound], 2, key) == 1
    assert replay.vote([failed | missing, sound], 2, key) == 1


@pytest.mark.parametrize('scorer', ['reward', 'logprob'])
def test_best_of_n_offline_chooses_as_online_for_any_n(run, scorer):
    options = {'mean': False} if scorer == 'logprob' else {}
    whole = run(
        config_of('best_of_n', n=6, scorer={'name': scorer, **options}), problems(3), Judge()
    )
    stored = [record for id, outcome in whole.items() for record in records_of(id, outcome)]
    chosen = set()
    for n in (1, 2, 4, 6):
        config = config_of('best_of_n', n=n, scorer={'name': scorer, **options})
        online = run(config, problems(3), Judge())
        for id, records in replay.by_problem(stored).items():
            assert replay.best_of_n(records, n) == online[id].chosen
            if scorer == 'logprob':
                assert replay.best_of_n(records, n, 'logprob') == online[id].chosen
            chosen.add(online[id].chosen)
    assert len(chosen) > 2


@pytest.mark.parametrize('weights', [None, {'name': 'reward'}, {'name': 'logprob'}])
def test_votes_offline_choose_as_online_for_any_n(run, weights):
    whole = run(config_of('vote', n=8, weights=weights), problems(3), Judge())
    stored = [record for id, outcome in whole.items() for record in records_of(id, outcome)]
    assert any(record['answer'] is None for record in stored)
    key = None if weights is None else 'score'
    for n in (1, 3, 4, 8):
        online = run(config_of('vote', n=n, weights=weights), problems(3), Judge())
        for id, records in replay.by_problem(stored).items():
            assert replay.vote(records, n, key) == online[id].chosen
            answers = [record['answer'] for record in records]
            assert online[id].answer == (answers[online[id].chosen] if any(answers[:n]) else None)


@pytest.mark.parametrize('adaptive', ['doubling', 'one'])
def test_an_adaptive_vote_offline_stops_and_chooses_as_online(run, adaptive):
    rule = Rule(rounds_of(8, adaptive), 0.3)
    whole = run(config_of('vote', n=8), problems(4), Judge())
    online = run(config_of('vote', n=8, adaptive=adaptive, delta=0.3), problems(4), Judge())
    counts = set()
    for id, outcome in whole.items():
        [records] = replay.by_problem(records_of(id, outcome)).values()
        n, chosen = replay.adaptive_vote(records, rule.rounds, rule.is_settled)
        assert (n, chosen) == (len(online[id].samples), online[id].chosen)
        assert online[id].entry.decoded_tokens == 12 * n
        counts.add(n)
    assert len(counts) > 1  # some stopped early
