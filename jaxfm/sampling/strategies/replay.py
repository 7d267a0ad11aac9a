"""Choices from the records of samples: the strategies' own selectors, to run again offline.

The records are those of an evaluator's file, through `by_problem`. `score` is what the task says of
a sample, so choosing by it is an oracle; `value`, in a strategy's file, is what its scorer said.
Valid for independent samples (best-of-n, votes), not where later samples depend on earlier ones.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

Key = str | Callable[[Mapping], float | None]  # of a record, or what computes it


def best(scores: Sequence[float | None]) -> int | None:
    """The index of the highest score, the first of equals; None if there is no score."""
    known = [i for i, score in enumerate(scores) if score is not None]
    return max(known, key=lambda i: scores[i], default=None)


def tally(
    answers: Sequence[str | None], weights: Sequence[float | None] | None = None
) -> dict[str, float]:
    """{answer: the weight of its votes}, in order of appearance.

    No answer (None) is no vote, and neither is one whose weight is None.
    """
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, [1] * len(answers) if weights is None else weights):
        if answer is not None and weight is not None:
            votes[answer] = votes.get(answer, 0) + weight
    return votes


def winner(
    answers: Sequence[str | None], weights: Sequence[float | None] | None = None
) -> int | None:
    """The index of the first sample with the answer that has most votes; of equals, the first."""
    votes = tally(answers, weights)
    return answers.index(max(votes, key=votes.get)) if votes else None


def by_problem(records: Iterable[Mapping]) -> dict[str, list[Mapping]]:
    """{problem id: its records, by sample index}. Raises ValueError if one is there twice.

    A problem that a strategy solved is one record with `samples`, which become records with the
    problem's id and, from `scores`, the `value` of the strategy's scorer or weight of its vote.
    """
    problems: dict[str, dict[int, Mapping]] = {}
    for record in itertools.chain.from_iterable(map(_samples, records)):
        samples = problems.setdefault(record['id'], {})
        if record['sample_index'] in samples:
            raise ValueError(f'{record["id"]}: two records of sample {record["sample_index"]}')
        samples[record['sample_index']] = record
    return {id: [samples[i] for i in sorted(samples)] for id, samples in problems.items()}


def _samples(record: Mapping) -> list[Mapping]:
    if 'samples' not in record:
        return [record]
    samples = record['samples']
    values = record['scores'] or [None] * len(samples)
    return [{**s, 'id': record['id'], 'value': v} for s, v in zip(samples, values)]


def mean_logprob(record: Mapping) -> float:
    """The key of the scorer `logprob`."""
    return record['logprob'] / record['num_tokens']


def probability(record: Mapping) -> float:
    """The key of a vote with the weights `logprob`."""
    return math.exp(mean_logprob(record))


def _values(records: Sequence[Mapping], key: Key) -> list[float | None]:
    """None for a sample that the engine failed or that is empty: nothing scores these."""
    find = key if callable(key) else operator.itemgetter(key)
    return [find(record) if _is_sound(record) else None for record in records]


def _is_sound(record: Mapping) -> bool:
    return record.get('finish_reason') != 'error' and record.get('num_tokens') != 0


def best_of_n(records: Sequence[Mapping], n: int, key: Key = 'score') -> int | None:
    """What `best_of_n` chooses of the first n samples of a problem.

    key: of its scorer: `score` for reward, `mean_logprob` (the function) for logprob, `logprob` for
      logprob with mean=False, `value` for any, in the file of a strategy.
    """
    return best(_values(records[:n], key))


def vote(records: Sequence[Mapping], n: int, key: Key | None = None) -> int | None:
    """What `vote` chooses of the first n samples of a problem.

    key: of the weights, as in `best_of_n`, but `probability` (the function) for logprob; None: all
      count 1.
    """
    weights = None if key is None else _values(records[:n], key)
    return winner([record['answer'] for record in records[:n]], weights)


def adaptive_vote(
    records: Sequence[Mapping], rounds: Sequence[int], is_settled: Callable, key: Key | None = None
) -> tuple[int, int | None]:
    """What an adaptive `vote` does -> (how many samples it takes, what it chooses).

    rounds, is_settled: of `stopping.Rule`.
    """
    for n in rounds:
        answers = [record['answer'] for record in records[:n]]
        weights = None if key is None else _values(records[:n], key)
        if is_settled(answers, weights):
            break
    return n, vote(records, n, key)
