"""Pages shared between samples, prompts, forks and after preemption give what each gives alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.errors import ConfigError, DataError
from jaxfm.sampling.complete import complete
from jaxfm.sampling.request import Completion, Request
from tests.sampling.conftest import pages_in_use

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]  # two pages of four tokens, and three tokens


def drain(sampler, completions=None):
    """Steps until nothing is left -> {(id, sample index): Completion}."""
    completions = {} if completions is None else completions
    while sampler.has_work:
        for event in sampler.step():
            key = event.id, event.sample_index
            completions.setdefault(key, Completion(*key)).add(event)
    return completions


def alone(sampler, request):
    """The completion of one sample, without anything to share."""
    sampler.lend(sampler._params, sampler.version + 1)
    [[completion]] = complete(sampler, [request], sampler._params, sampler.version).values()
    return completion


def assert_same(found, expected):
    assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
    for name in ('logprobs', 'sampling_logprobs'):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-4)


def test_samples_of_a_prompt_share_its_pages_and_equal_those_alone(sampler):
    request = Request('a', PROMPT, max_tokens=9, n=6, sample_index=2, seed=7)
    before = sampler.counters
    sampler.add(request)
    found = drain(sampler)
    after = sampler.counters
    # When the first four have ended, only whole pages are known: the others store the rest again.
    rest = (len(PROMPT) - 1) % 4
    assert after.prefill_tokens - before.prefill_tokens == len(PROMPT) - 1 + rest
    assert after.shared_tokens - before.shared_tokens == 5 * (len(PROMPT) - 1) - rest
    assert after.decode_steps - before.decode_steps == 2 * 9  # six samples in four slots
    assert list(found) == [('a', index) for index in range(2, 8)]
    assert len({tuple(completion.tokens) for completion in found.values()}) == 6
    for index in range(2, 8):
        one = dataclasses.replace(request, n=1, sample_index=index)
        assert_same(found['a', index], alone(sampler, one))


def test_requests_with_a_common_prefix_store_it_once(sampler):
    requests = [Request(f'r{i}', [*PROMPT, 10 + i, 20 + i], 6, seed=i) for i in range(6)]
    before = sampler.counters.prefill_tokens
    for request in requests:
        sampler.add(request)
    found = drain(sampler)
    # The first stores all but its last token, three others what lies behind the common tokens, and
    # the last two, which wait until the first four have ended, what lies behind the whole pages.
    assert sampler.counters.prefill_tokens - before == 12 + 3 + 2 * 4
    for request in requests:
        assert_same(found[request.id, 0], alone(sampler, request))


def test_a_later_turn_shares_what_the_answer_stored(sampler):
    [first] = complete(sampler, [Request('1', PROMPT, 9)], sampler._params, 0)['1']
    before = sampler.counters.prefill_tokens
    turn = Request('2', [*PROMPT, *first.tokens, 8, 8, 8], 6)
    [second] = complete(sampler, [turn], sampler._params, 0)['2']
    stored = (len(PROMPT) + 9 - 1) // 4 * 4
    assert sampler.counters.prefill_tokens - before == len(turn.tokens) - 1 - stored
    assert_same(second, alone(sampler, turn))


@pytest.mark.parametrize('appended', [(), (50, 51, 52, 53, 54)], ids=['as it is', 'with ids'])
def test_a_fork_goes_on_as_a_request_with_the_same_tokens(sampler, appended):
    request = Request('a', PROMPT, max_tokens=14, seed=3)
    sampler.add(request)
    [event] = sampler.step()
    tokens = [*PROMPT, *event.tokens]
    before = sampler.counters.prefill_tokens
    for index in (5, 6):
        sampler.fork('a', f'fork {index}', sample_index=index, tokens=appended)
    completion = Completion('a', 0)
    completion.add(event)
    found = drain(sampler, {('a', 0): completion})
    assert sampler.counters.prefill_tokens - before <= 2 * (len(appended) + 3)
    assert_same(found['a', 0], alone(sampler, request))
    for index in (5, 6):
        same = Request('x', [*tokens, *appended], 11, seed=3, sample_index=index)
        assert_same(found[f'fork {index}', index], alone(sampler, same))
    assert found['fork 5', 5].tokens != found['fork 6', 6].tokens


def test_a_meter_is_told_what_its_requests_and_their_forks_cost(sampler):
    """Beside requests without one, and with a sample that is cancelled."""

    class Meter:
        def __init__(self):
            self.told = dict.fromkeys(('prefill', 'share', 'decode'), 0)

        def prefill(self, start, length):
            self.told['prefill'] += length

        def share(self, length):
            self.told['share'] += length

        def decode(self, start, length):
            self.told['decode'] += length

    def spent():
        counters = sampler.counters
        return counters.prefill_tokens, counters.shared_tokens, counters.decoded_tokens

    before, meters = spent(), [Meter(), Meter()]
    for name, meter in zip('ab', meters):
        sampler.add(Request(name, PROMPT, 9, n=2), meter=meter)
    sampler.step()
    sampler.cancel('a', 1)
    sampler.fork('a', 'c', sample_index=7, tokens=[5])
    drain(sampler)
    told = [sum(meter.told[name] for meter in meters) for name in meters[0].told]
    assert told == [new - old for old, new in zip(before, spent())]
    assert meters[0].told['decode'] == 3 + 9 + 6 and meters[1].told['decode'] == 2 * 9


def test_forks_write_to_pages_of_their_own(sampler):
    """The original and its forks fill the same page at the same time, each with its tokens."""
    request = Request('a', PROMPT[:9], max_tokens=12, seed=1)
    sampler.add(request)
    first = sampler.step()[0].tokens
    for index in (1, 2, 3):
        sampler.fork('a', f'{index}', sample_index=index, tokens=[index])
    found = drain(sampler)
    for index in (1, 2, 3):
        same = Request('x', [*PROMPT[:9], *first, index], 9, seed=1, sample_index=index)
        assert_same(found[f'{index}', index], alone(sampler, same))
    assert found['a', 0].tokens == alone(sampler, request).tokens[3:]


def test_a_fork_keeps_counting_penalties_over_the_completion(sampler):
    request = Request('a', PROMPT[:5], 12, seed=1, presence_penalty=2.0, frequency_penalty=2.0)
    expected = alone(sampler, request)
    sampler.add(request)
    first = sampler.step()[0].tokens
    sampler.fork('a', 'b', sample_index=0)
    found = drain(sampler)
    assert first + found['b', 0].tokens == expected.tokens


def test_ids_appended_to_a_running_request_are_what_it_goes_on_from(sampler):
    sampler.add(Request('a', PROMPT, max_tokens=9, seed=3))
    first = sampler.step()[0].tokens
    sampler.extend('a', [50, 51, 52, 53, 54, 55])
    [found] = drain(sampler).values()
    assert len(first) + len(found.tokens) == 9
    same = Request('x', [*PROMPT, *first, *range(50, 56)], 6, seed=3)
    assert_same(found, alone(sampler, same))


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda s: s.fork('nobody', 'b', sample_index=1), 'nobody: 0 samples are waiting'),
        (lambda s: s.fork('two', 'b', sample_index=1), 'two: 2 samples are waiting'),
        (
            lambda s: s.fork('a', 'a', sample_index=0),
            'a: another request with this id and sample index 0',
        ),
        (lambda s: s.fork('a', 'b', sample_index=0, tokens=[60]), 'b: .*60'),
        (lambda s: s.extend('a', range(30)), 'a: .*exceed sampling.max_length 40'),
        (lambda s: s.extend('nobody', [1]), 'nobody: 0 samples'),
        (
            lambda s: s.add(Request('two', [1], 1, sample_index=1)),
            'two: another request with this id and sample index 1',
        ),
    ],
)
def test_what_cannot_be_forked_or_extended_is_refused(sampler, call, message):
    sampler.add(Request('a', PROMPT, 5))
    sampler.add(Request('two', PROMPT, 5, n=2))
    with pytest.raises(DataError, match=message):
        call(sampler)
    assert len(drain(sampler)) == 3


def test_one_sample_of_several_can_be_cancelled(sampler):
    sampler.add(Request('a', PROMPT, 9, n=3))
    sampler.step()
    sampler.cancel('a', 1)
    assert {index for _, index in drain(sampler)} == {0, 2}


def test_no_prefix_outlives_its_weights(sampler, other_params):
    request = Request('a', PROMPT, 6, temperature=0.0)
    complete(sampler, [request], sampler._params, 0)
    expected = alone(sampler, request)
    before = sampler.counters.shared_tokens
    [[found]] = complete(sampler, [request], other_params, 0).values()  # even under the same name
    assert sampler.counters.shared_tokens == before
    assert found.tokens != expected.tokens
    assert_same(found, alone(sampler, request))


def test_pages_that_mix_weights_are_not_shared(sampler, params, other_params):
    sampler.add(Request('a', PROMPT, 12))
    sampler.step()
    sampler.lend(other_params, 1)
    same = Request('b', PROMPT, 6, temperature=0.0)
    sampler.add(same)
    found = drain(sampler)
    sampler.add(same)
    again = drain(sampler)
    assert_same(found['b', 0], alone(sampler, same))
    assert_same(again['b', 0], alone(sampler, same))


def test_after_a_swap_with_restore_tokens_are_those_of_their_version_alone(
    sampler, params, other_params
):
    """Of running requests, of one that waits, and of those that share pages with others."""
    requests = [Request(f'{i}', PROMPT[: 11 - i], 14, seed=i, n=2) for i in range(3)]
    for request in requests:
        sampler.add(request)
    weights, found = [params, other_params, params], {}
    before = sampler.counters.preemptions
    for version, lent in enumerate(weights):
        sampler.lend(lent, version, restore=True)
        for event in [*sampler.step(), *sampler.step()]:
            key = event.id, event.sample_index
            found.setdefault(key, Completion(*key)).add(event)
    drain(sampler, found)
    assert sampler.counters.preemptions == before
    assert sum(len(set(completion.versions)) == 3 for completion in found.values()) == 4
    for request in requests:
        for index in range(2):
            completion, start = found[request.id, index], 0
            for version, run in itertools.groupby(completion.versions):
                stop = start + len(list(run))
                sampler.lend(weights[version], 10 * sampler.version + 10)
                rest = dataclasses.replace(
                    request,
                    tokens=[*request.tokens, *completion.tokens[:start]],
                    max_tokens=stop - start,
                    n=1,
                    sample_index=index,
                )
                again = alone(sampler, rest)
                assert again.tokens == completion.tokens[start:stop]
                expected = completion.logprobs[start:stop]
                np.testing.assert_allclose(again.logprobs, expected, rtol=0, atol=1e-4)
                start = stop


def test_the_same_weights_lent_again_keep_what_is_known(sampler, params):
    request = Request('a', PROMPT, 2)
    complete(sampler, [request], params, 0)
    before = sampler.counters.prefill_tokens
    complete(sampler, [request], dict(params), 0)
    assert sampler.counters.prefill_tokens - before == 2  # behind two whole pages


def test_requests_that_give_way_are_computed_again(build, params, one_device):
    """12 pages for four requests that need 8 each."""
    requests = [Request(f'{i}', PROMPT[i:], 20, seed=i) for i in range(4)]
    with jax.set_mesh(one_device):
        tight = build(params, one_device, pages=12)
        for request in requests:
            tight.add(request)
        found = drain(tight)
        assert tight.counters.preemptions > 0
        for request in requests:
            assert_same(found[request.id, 0], alone(tight, request))
        assert not tight._scheduler.sequences and not pages_in_use(tight)


def test_a_long_prompt_does_not_stall_the_others(sampler):
    """While a prompt is stored chunk by chunk, every step has tokens of those that run."""
    small = Request('small', [1, 2], 36)
    sampler.add(small)
    sampler.step()
    sampler.add(Request('long', list(range(34)), 3))
    steps = 0
    while True:
        events = {event.id for event in sampler.step()}
        assert 'small' in events
        steps += 1
        if 'long' in events:
            break
    assert steps >= 2
    drain(sampler)


def test_many_long_prompts_do_not_stall_the_others(build, params, one_device):
    """Three prompts of six chunks each wait beside one request that decodes."""
    with jax.set_mesh(one_device):
        narrow = build(params, one_device, prefill_tokens=16, max_length=100)
        narrow.add(Request('small', [1, 2], 36))
        narrow.step()
        for i in range(3):
            narrow.add(Request(f'{i}', [i] * 90, 3))
        for _ in range(4):
            before = narrow.counters.prefill_tokens
            assert 'small' in {event.id for event in narrow.step()}
            assert narrow.counters.prefill_tokens - before <= 4 * 16
        drain(narrow)


@pytest.mark.parametrize('waiting, steps', [(0, 3), (1, 1)])
def test_a_call_ends_early_for_who_waits(sampler, waiting, steps):
    for i in range(4):
        sampler.add(Request(f'{i}', [1, 2], 1 if i == 0 else 6, seed=i))
    for i in range(waiting):
        sampler.add(Request(f'late {i}', [1, 2], 6))
    before = sampler.counters.decode_steps
    sampler.step()
    assert sampler.counters.decode_steps - before == steps
    drain(sampler)


def test_no_prefix_is_known_after_a_release(sampler, params):
    request = Request('a', PROMPT, 6, temperature=0.0)
    expected = alone(sampler, request)
    version = sampler.version
    sampler.release()
    before = sampler.counters.shared_tokens
    [[found]] = complete(sampler, [request], params, version).values()
    assert sampler.counters.shared_tokens == before
    assert_same(found, expected)


def test_after_warming_up_nothing_is_compiled(build, params, other_params, one_device):
    with jax.set_mesh(one_device):
        warm = build(params, one_device, slots=2, max_length=24)
        warm.warm_up()
        compiled = warm.counters.compilations
        random = np.random.default_rng(0)
        for i in range(12):
            prompt = random.integers(0, 60, size=random.integers(1, 18)).tolist()
            options = [{}, dict(top_k=3, min_p=0.1), dict(repetition_penalty=1.3)][i % 3]
            options |= dict(prompt_logprobs=i % 4 == 0, top_logprobs=i % 5, n=1 + i % 2)
            warm.add(Request(str(i), prompt, 6, logit_bias={i: 1.0} if i % 2 else {}, **options))
            warm.step()
            if i == 6:
                warm.lend(other_params, 1)
        drain(warm)
        assert warm.counters.compilations == compiled
        # One for the cache, one to copy, one size of chunks, two of decoding three times each.
        assert compiled == 1 + 1 + len(warm._rows.chunks) + 3 * len(warm._rows.counts)


def test_nan_ends_a_request_with_its_reason_and_spoils_no_page(sampler, params, score):
    """Token 7 has a NaN embedding: who reads it fails, whose pages hold it later does not."""
    broken = dict(params)
    broken['embedding/table'] = jnp.asarray(params['embedding/table']).at[7].set(jnp.nan)
    sampler.lend(broken, 3)
    good = Request('good', PROMPT, 6, temperature=0.0, logit_bias={7: -np.inf})
    for request in (Request('bad', [1, 2, 7, 3], 6), good):
        sampler.add(request)
    found = drain(sampler)
    bad = found['bad', 0]
    assert (bad.tokens, bad.finish_reason) == ([], 'error') and 'NaN' in bad.error
    assert len(found['good', 0].tokens) == 6 and np.isfinite(found['good', 0].logprobs).all()
    for i in range(6):  # over pages that held NaN
        sampler.add(dataclasses.replace(good, id=str(i), tokens=PROMPT[i:]))
    assert all(np.isfinite(x.logprobs).all() for x in drain(sampler).values())


def test_a_cache_too_small_for_the_longest_request_is_refused(build, params, one_device):
    message = 'sampling.pages is 9, .* 9 pages, .* max_length 40 needs 10 .* use at least 10'
    with pytest.raises(ConfigError, match=message):
        build(params, one_device, pages=9)
