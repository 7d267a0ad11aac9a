"""Many requests in a random schedule: nothing leaks, and each answer is the one it gives alone."""

import csv
import dataclasses
import gzip
import itertools

import jax
import numpy as np
import pytest

from jaxfm.sampling.complete import complete
from jaxfm.sampling.request import Completion, Request
from jaxfm.sampling.scheduler import Scheduler, Sequence
from tests.sampling.conftest import LENGTH, new_sampler, pages_in_use


def lengths_like_chats(random, count):
    """Prompts and answers whose lengths are as uneven as those of real chats."""
    prompts = np.clip(random.lognormal(1.6, 1.2, count), 1, LENGTH - 12)
    answers = np.clip(random.lognormal(1.8, 0.8, count), 1, 12)
    return zip(prompts.astype(int).tolist(), answers.astype(int).tolist())


def some_requests(random, lengths):
    """Some continue an earlier prompt; options, samples and lengths differ."""
    options = [
        {},
        dict(temperature=0.0),
        dict(top_p=0.8),
        dict(top_k=4),
        dict(presence_penalty=1.0),
    ]
    prompts, requests = [[]], []
    for index, (num_prompt, num_answer) in enumerate(lengths):
        common = prompts[random.integers(len(prompts))] if random.random() < 0.5 else []
        prompt = (common + random.integers(0, 60, size=num_prompt).tolist())[:num_prompt]
        prompts.append(prompt)
        words = options[random.integers(len(options))]
        stop_ids = frozenset(random.integers(0, 60, size=2).tolist())
        n = 1 + int(random.random() < 0.1) * 2
        request = Request(
            str(index), prompt, num_answer, seed=index, n=n, stop_ids=stop_ids, **words
        )
        requests.append(request)
    return requests


def run_at_random(sampler, requests, random):
    """Adds requests as it goes, cancels some and forks some -> completions, and who was cancelled.

    Of a fork, also the request that asks for the same.
    """
    completions, cancelled, forks = {}, set(), {}
    requests = list(reversed(requests))
    while requests or sampler.has_work:
        for _ in range(min(len(requests), random.integers(0, 4))):
            sampler.add(requests.pop())
        for event in sampler.step():
            key = event.id, event.sample_index
            completions.setdefault(key, Completion(*key)).add(event)
        running = [s for shard in sampler._scheduler.running for s in shard]
        if running and random.random() < 0.1:
            one = running[random.integers(len(running))].request
            sampler.cancel(one.id, one.sample_index)
            cancelled.add((one.id, one.sample_index))
        elif running and random.random() < 0.2:
            one = running[random.integers(len(running))]
            if one.request.presence_penalty or len(sampler._find(one.request.id)) > 1:
                continue
            name = f'fork {len(forks)}'
            sampler.fork(one.request.id, name, sample_index=77)
            forks[name] = dataclasses.replace(
                one.request, id=name, tokens=list(one.tokens), max_tokens=one.max_tokens,
                sample_index=77,
            )  # fmt: skip
    return completions, cancelled, forks


def check_random_schedule(sampler, lengths, seed):
    random = np.random.default_rng(seed)
    requests = some_requests(random, lengths)
    completions, cancelled, forks = run_at_random(sampler, requests, random)
    assert not sampler._scheduler.sequences and not pages_in_use(sampler)
    samples = [
        dataclasses.replace(request, n=1, sample_index=index)
        for request in [*requests, *forks.values()]
        for index in range(request.sample_index, request.sample_index + request.n)
    ]
    for version, request in enumerate(samples, 100):
        key = request.id, request.sample_index
        [[alone]] = complete(sampler, [request], sampler._params, version).values()
        found = completions.get(key, Completion(*key))
        if key in cancelled:
            assert alone.tokens[: len(found.tokens)] == found.tokens
            continue
        assert (found.tokens, found.finish_reason) == (alone.tokens, alone.finish_reason)
        np.testing.assert_allclose(found.logprobs, alone.logprobs, rtol=0, atol=1e-4)
    return len(forks), len(cancelled)


@pytest.fixture(scope='module')
def tight(params, one_device):
    """An engine with pages for less than half of its slots."""
    return new_sampler(params, one_device, pages=18)


def test_a_random_schedule_leaks_nothing_and_changes_no_answer(tight, one_device):
    with jax.set_mesh(one_device):
        random = np.random.default_rng(0)
        forks, cancelled = check_random_schedule(tight, lengths_like_chats(random, 100), 1)
        assert forks > 2 and cancelled > 2 and tight.counters.preemptions > 0
        assert tight.counters.shared_tokens > 100


@pytest.mark.slow
def test_500_requests_with_real_lengths(tight, one_device, shared_data):
    path = shared_data / 'serving_sharegpt_lengths' / 'lengths_cl100k.csv.gz'
    with gzip.open(path, 'rt', encoding='utf-8') as file:
        rows = list(itertools.islice(csv.DictReader(file), 500))
    scaled = [
        (max(1, min(int(row['prompt_tokens']) // 32, LENGTH - 12)),
         max(1, min(int(row['output_tokens']) // 32, 12)))
        for row in rows
    ]  # fmt: skip
    with jax.set_mesh(one_device):
        check_random_schedule(tight, scaled, 2)


def test_the_first_in_line_is_not_overtaken_by_smaller_ones():
    scheduler = Scheduler(num_shards=1, slots=4, num_pages=9, page_size=4)

    def waiting(name, length):
        sequence = Sequence(Request(name, [1], 1), [ord(name)] * length, length, 1)
        scheduler.waiting.append(sequence)
        return sequence

    first, big, small = waiting('a', 20), waiting('b', 16), waiting('c', 2)
    scheduler.admit()
    assert scheduler.running == [[first]]
    scheduler.leave(first)
    scheduler.admit()
    assert scheduler.running == [[big, small]]


def test_who_was_admitted_last_gives_way_and_comes_back_first():
    scheduler = Scheduler(num_shards=1, slots=4, num_pages=7, page_size=4)
    old, young = (Sequence(Request(n, [1], 1), [ord(n)] * 4, 4, 20) for n in 'ab')
    later = Sequence(Request('c', [1], 1), [3] * 12, 12, 1)
    scheduler.waiting.extend([old, young, later])
    scheduler.admit()
    assert scheduler.running == [[old, young]]
    assert scheduler.grow(old, 16) and scheduler.grow(young, 8)
    assert scheduler.grow(old, 20)
    assert scheduler.running == [[old]] and list(scheduler.waiting) == [young, later]
    assert not young.pages and young.num_stored == 0 and scheduler.num_preempted == 1
    scheduler.leave(old)
    scheduler.admit()
    assert scheduler.running == [[young, later]]
