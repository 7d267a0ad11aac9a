"""Samples of a `generate` evaluation -> its metrics. It needs only the records of the samples.

So a file of samples replays to the same numbers, without a model. Whether the task has answers at
all is told, because records in which it found none look the same.
"""

from collections.abc import Callable, Iterable, Mapping

from jaxfm.evals import statistics
from jaxfm.evals.statistics import Clusters

# Reasons for which a sample ends without anything to judge: the engine or the environment failed.
FAILED = 'error', 'environment'

Records = Mapping[str, list[dict]]  # {id of a prompt: its n records, by sample index}


def by_prompt(records: Iterable[dict], ids: Iterable[str], n: int) -> Records:
    """The first n samples of each of these prompts, in their order."""
    found: dict[str, list[dict]] = {id: [] for id in ids}
    for record in records:
        if record['id'] in found and record['sample_index'] < n:
            found[record['id']].append(record)
    for samples in found.values():
        samples.sort(key=lambda record: record['sample_index'])
    return found


def has_failed(record: dict) -> bool:
    """Whether engine or environment failed this sample, or the strategy this problem."""
    return record['finish_reason'] in FAILED


def is_unjudged(record: dict) -> bool:
    """Whether the task failed to judge it."""
    return bool(record['error']) and not has_failed(record)


def samples_of(records: Iterable[dict]) -> list[dict]:
    """All samples with the ids of their prompts; a problem that a strategy solved has several."""
    nested = ((r, r['samples'] if 'ledger' in r else [r]) for r in records)
    return [{**sample, 'id': record['id']} for record, each in nested for sample in each]


def summarize(
    records: Records,
    n: int,
    by_group: bool,
    flops: Callable[[int], float],
    has_answers: bool,
) -> dict[str, float]:
    """{metric: value}.

    Args:
      n: samples of each prompt.
      by_group: prompts of a group are one cluster, for the intervals.
      flops: tokens of a document -> model FLOPs of its forward pass.
      has_answers: the task finds answers, in some completions.
    """
    groups = [samples[0]['group'] for samples in records.values()]
    clusters = statistics.clusters_of(zip(records, groups)) if by_group else None
    scores = {id: [record['score'] for record in samples] for id, samples in records.items()}
    means = [sum(each) / len(each) for each in scores.values()]
    values = statistics.share(means, clusters).values('pass@1') | {'prompts': float(len(records))}
    for name in sorted(set(groups) - {''}):
        inside = [value for value, group in zip(means, groups) if group == name]
        values |= statistics.share(inside).values(f'pass@1/{name}')
    if n > 1:
        values |= statistics.share(means, clusters).values(f'avg@{n}')
        values |= _curves(records, n, clusters, has_answers)
    values |= _counts(records, n, has_answers)
    if all('ledger' in record for samples in records.values() for record in samples):
        return values | _strategy(records)
    return values | _costs(records, flops)


def _strategy(records: Records) -> dict[str, float]:
    """How many samples a strategy began, how often one it kept was right, and the ledger's sums."""
    solved = [record for [record] in records.values()]
    most = [max((sample['score'] for sample in r['samples']), default=0.0) for r in solved]
    ledgers = [record['ledger'] for record in solved]
    has_price = any(ledger['dollars'] for ledger in ledgers)
    names = {
        'generated_tokens': 'decoded_tokens',
        'prompt_tokens': 'prefill_tokens',
        'shared_tokens': 'shared_tokens',
        'flops': 'flops',
        'verifier_calls': 'calls',
        'seconds': 'seconds',
        **({'dollars': 'dollars'} if has_price else {}),
    }
    return {
        'strategy/samples': sum(ledger['samples'] for ledger in ledgers) / len(solved),
        'strategy/oracle': sum(most) / len(solved),
        'strategy/failed': sum(map(has_failed, solved)) / len(solved),
        **{
            f'cost/{k}': float(sum(ledger[name] for ledger in ledgers)) for k, name in names.items()
        },
    }


def _curves(records: Records, n: int, clusters: Clusters, has_answers: bool) -> dict[str, float]:
    """pass@k, pass^k, maj@k and the best of k by the model's own log-prob, for k = 2, 4, ... n."""
    values = {}
    for k in statistics.powers(n)[1:]:
        for name, each in _expect(records, k, has_answers).items():
            values |= statistics.share(each, clusters).values(f'{name}{k}')
    return values


def _expect(records: Records, k: int, has_answers: bool) -> dict[str, list[float]]:
    """{metric: what is expected of k samples of each question}."""
    samples = list(records.values())
    scores = [[record['score'] for record in each] for each in samples]
    answers = [[record['answer'] for record in each] for each in samples]
    logprobs = [[_mean_logprob(record) for record in each] for each in samples]
    found = {
        'pass@': [statistics.pass_at_k(each, k) for each in scores],
        'pass^': [statistics.all_of_k(each, k) for each in scores],
        'best@': [statistics.best_of_k(*each, k) for each in zip(scores, logprobs)],
    }
    if has_answers and len(scores[0]) <= statistics.MAX_VOTES:
        found['maj@'] = [statistics.majority_at_k(*each, k) for each in zip(answers, scores)]
    return found


def _mean_logprob(record: dict) -> float:
    return record['logprob'] / max(1, record['num_tokens'])


def _counts(records: Records, n: int, has_answers: bool) -> dict[str, float]:
    """Shares of the samples: distinct, cut off by length, without an end of thoughts, unparsed.

    Those of a strategy are of all samples it kept: what it chose hides what became of the others.
    """
    samples = samples_of(record for each in records.values() for record in each)
    shares = {
        'samples/truncated': [record['is_truncated'] for record in samples],
        'samples/unclosed_thinking': [record['is_unclosed'] for record in samples],
        'samples/failed': [has_failed(record) for record in samples],
        'samples/unjudged': [is_unjudged(record) for record in samples],
    }
    if has_answers:
        shares['samples/unparsed'] = [record['answer'] is None for record in samples]
    values = {name: sum(each) / max(1, len(each)) for name, each in shares.items()}
    if n > 1:
        distinct = [len({record['completion'] for record in each}) for each in records.values()]
        values['samples/distinct'] = sum(distinct) / len(samples)
    return values


def _costs(records: Records, flops: Callable[[int], float]) -> dict[str, float]:
    """Tokens, model FLOPs and calls of the judge, of all samples, also those of earlier starts.

    A prompt counts once for its n samples, which share its keys and values.
    """
    samples = [record for each in records.values() for record in each]
    prompts = [each[0]['prompt_tokens'] for each in records.values()]
    total = sum(map(flops, prompts))
    for record in samples:
        before = record['prompt_tokens']
        after = before + record['num_tokens'] + record.get('observed_tokens', 0)
        total += flops(after) - flops(before)
    return {
        'cost/generated_tokens': float(sum(record['num_tokens'] for record in samples)),
        'cost/prompt_tokens': float(sum(prompts)),
        'cost/flops': total,
        'cost/verifier_calls': float(sum(not has_failed(record) for record in samples)),
    }
