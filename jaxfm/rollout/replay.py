"""Samples a trajectory again, from what `samples/PHASE-STEP.jsonl` records of it.

A token depends on the seed, the sample's index, its position, the tokens before it and the weights
of its version, not on what else was in the engine. So each run of tokens of one version is sampled
anew, behind the tokens before it. What an environment wrote is not sampled: it is in the record.
"""

import itertools
from collections.abc import Callable, Iterator

from jaxfm.sampling.complete import complete
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Request


def replay(
    sampler: Sampler, sample: dict, weights: Callable[[int], dict]
) -> tuple[list[int], list[float]]:
    """-> the tokens of a recorded sample, and their log-probs, as the weights give them again.

    They have the bits of those recorded if the model is batch_invariant and the rest is as it was;
    otherwise the log-probs are the same to rounding, and so are, nearly always, the tokens.

    Args:
      sample: a line of a file of samples (`jaxfm.evals.samples.read_samples`).
      weights: version -> the weights at that step of the run, such as those of its checkpoint.
    """
    tokens, logprobs, before = [], [], list(sample['prompt_tokens'])
    for version, count, others in _pieces(sample):
        before += others
        request = Request(
            id=str(sample['number']),
            tokens=before,
            max_tokens=count,
            seed=sample['seed'],
            sample_index=sample['sample_index'],
        )
        [[found]] = complete(sampler, [request], weights(version), version).values()
        tokens += found.tokens
        logprobs += found.logprobs
        before += found.tokens
    return tokens, logprobs


def _pieces(sample: dict) -> Iterator[tuple[int, int, list[int]]]:
    """(version, tokens of that version, ids that others wrote before them), in order."""
    versions = iter([version for version, count in sample['versions'] for _ in range(count)])
    observed: list[int] = []
    for turn in sample.get('turns', [{'by': 'model', 'tokens': sample['tokens']}]):
        if turn['by'] != 'model':
            observed = turn['tokens']
            continue
        own = itertools.islice(versions, len(turn['tokens']))
        for version, run in itertools.groupby(own):
            yield version, len(list(run)), observed
            observed = []
