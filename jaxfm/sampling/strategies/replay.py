"""Choices from the records of samples: the strategies' own selectors, to run again offline.

A record has `id`, `sample_index`, `answer`, `score` and `logprob`, as the evaluators store them.
Valid for independent samples (best-of-n, votes), not where later samples depend on earlier ones.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

Choice = tuple[int, str | None]  # (index of the chosen sample, its answer)


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
    """{problem id: its records, by sample index}. Raises ValueError if one is there twice."""
    problems: dict[str, dict[int, Mapping]] = {}
    for record in records:
        samples = problems.setdefault(record['id'], {})
        if record['sample_index'] in samples:
            raise ValueError(f'{record["id"]}: two records of sample {record["sample_index"]}')
        samples[record['sample_index']] = record
    return {id: [samples[i] for i in sorted(samples)] for id, samples in problems.items()}


def best_of_n(records: Sequence[Mapping], n: int, key: str = 'score') -> int | None:
    """What `best_of_n` chooses of the first n samples of a problem.

    key: `score`, or `logprob` for its scorer logprob with mean=False.
    """
    return best([record[key] for record in records[:n]])


def vote(records: Sequence[Mapping], n: int, key: str | None = None) -> int | None:
    """What `vote` chooses of the first n samples of a problem.

    key: of the weights, such as `score`; None: all count 1.
    """
    weights = None if key is None else [record[key] for record in records[:n]]
    return winner([record['answer'] for record in records[:n]], weights)


def adaptive_vote(
    records: Sequence[Mapping], rounds: Sequence[int], is_settled: Callable, key: str | None = None
) -> tuple[int, int | None]:
    """What an adaptive `vote` does -> (how many samples it takes, what it chooses).

    rounds, is_settled: of `stopping.Rule`.
    """
    for n in rounds:
        answers = [record['answer'] for record in records[:n]]
        weights = None if key is None else [record[key] for record in records[:n]]
        if is_settled(answers, weights):
            break
    return n, vote(records, n, key)
