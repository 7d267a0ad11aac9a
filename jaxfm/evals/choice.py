"""Log-likelihoods of a question's choices -> its scores; the scores of all questions -> metrics."""

import math
from collections.abc import Sequence

from jaxfm.evals import statistics
from jaxfm.evals.statistics import Clusters

# {metric: key of a question's record}
ACCURACIES = {
    'accuracy': 'score',
    'accuracy_per_byte': 'score_per_byte',
    'accuracy_unconditional': 'score_unconditional',
}


def score_choices(
    logprobs: Sequence[float],
    unconditional: Sequence[float],
    num_bytes: Sequence[int],
    right: Sequence[int],
) -> dict[str, float]:
    """The scores of a question with several choices.

    Of choices with equal likelihood the first counts, as in lm-eval.

    Args:
      logprobs: log p(continuation | context) of each choice, in nats.
      unconditional: the same after a context without the question (Brown et al. 2020, section 2.4).
      num_bytes: UTF-8 bytes of each continuation, without white space around it.
      right: the indices of the right choices.
    """
    values = {
        'score': logprobs,
        'score_per_byte': [x / max(1, count) for x, count in zip(logprobs, num_bytes)],
        'score_unconditional': [x - alone for x, alone in zip(logprobs, unconditional)],
    }
    scores = {name: float(each.index(max(each)) in right) for name, each in values.items()}
    largest = max(logprobs)
    weights = [math.exp(x - largest) for x in logprobs]
    scores['probability'] = sum(weights[i] for i in right) / sum(weights)
    return scores


def summarize(records: Sequence[dict], by_group: bool) -> dict[str, float]:
    """{metric: value} of all questions, with intervals.

    by_group: questions of a group are one cluster, for the intervals.
    """
    compared = [record for record in records if len(record['bytes']) > 1]
    single = [record for record in records if len(record['bytes']) == 1]
    values = {'prompts': float(len(records))}
    if compared:
        values |= _summarize_compared(compared, _clusters(compared) if by_group else None)
    if single:
        values |= _summarize_single(single, _clusters(single) if by_group else None)
    values['samples/failed'] = sum(bool(record['error']) for record in records) / len(records)
    return values


def _clusters(records: Sequence[dict]) -> Clusters:
    return statistics.clusters_of((one['id'], one['group']) for one in records)


def _summarize_compared(records: Sequence[dict], clusters: Clusters) -> dict[str, float]:
    values = {}
    for name, key in (ACCURACIES | {'probability': 'probability'}).items():
        values |= statistics.share([one[key] for one in records], clusters).values(name)
    chances = [len(one['right']) / len(one['bytes']) for one in records]
    values['chance'] = sum(chances) / len(chances)
    for group in sorted({one['group'] for one in records} - {''}):
        inside = [one for one in records if one['group'] == group]
        for name, key in ACCURACIES.items():
            values |= statistics.share([one[key] for one in inside]).values(f'{name}/{group}')
    return values


def _summarize_single(records: Sequence[dict], clusters: Clusters) -> dict[str, float]:
    """Whether greedy decoding gives the continuation; the perplexity of continuations (LAMBADA)."""
    values = statistics.share([one['score'] for one in records], clusters).values('greedy_accuracy')
    rest = [i for i, one in enumerate(records) if not one['error']]
    if rest:
        inside = [clusters[i] for i in rest] if clusters else None
        nats = statistics.mean([-records[i]['logprobs'][0] for i in rest], inside)
        values |= {name: statistics.exp(value) for name, value in nats.values('perplexity').items()}
    return values
