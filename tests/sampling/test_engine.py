"""The engine: samples agree with the model's forward and depend only on the request."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.errors import DataError
from jaxfm.sampling import options
from jaxfm.sampling.complete import complete
from jaxfm.sampling.logits import sample_tokens
from jaxfm.sampling.request import Request

PROMPTS = [[1, 2, 3], [4], list(range(10, 29)), [7, 7, 7, 7, 7], [30, 2], [59, 0, 59]]


def requests(**changes):
    return [
        Request(**{'id': f'r{i}', 'tokens': prompt, 'max_tokens': 8, 'seed': i, **changes})
        for i, prompt in enumerate(PROMPTS)
    ]


def short(**changes):
    """The requests whose prompts share one compiled prefill."""
    return [request for request in requests(**changes) if len(request.tokens) <= 16]


def run(sampler, requests, params=None, version=0, **options):
    """{id: (tokens, log-probs, sampling log-probs, finish reason)}; params None: keep weights."""
    results = {}
    params = sampler._params if params is None else params
    for id, [one] in complete(sampler, requests, params, version, **options).items():
        results[id] = one.tokens, one.logprobs, one.sampling_logprobs, one.finish_reason
    return results


def tokens_of(results):
    return {id: result[0] for id, result in results.items()}


def test_greedy_is_the_argmax_of_the_full_forward(sampler, score):
    results = run(sampler, requests(temperature=0.0))
    for request in requests():
        tokens, _, sampling_logprobs, reason = results[request.id]
        assert (len(tokens), reason) == (8, 'length')
        assert tokens == score(request.tokens, tokens)[2].tolist()
        assert not any(sampling_logprobs)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_logprobs_equal_those_of_the_trainer(sampler, score, temperature):
    results = run(sampler, requests(temperature=temperature))
    for request in requests():
        tokens, logprobs, sampling_logprobs, _ = results[request.id]
        plain, tempered, _ = score(request.tokens, tokens, temperature)
        np.testing.assert_allclose(logprobs, plain, rtol=0, atol=1e-4)
        np.testing.assert_allclose(sampling_logprobs, tempered, rtol=0, atol=1e-4)


def test_a_sample_does_not_depend_on_other_requests_or_its_slot(sampler):
    together = tokens_of(run(sampler, requests()))
    backwards = tokens_of(run(sampler, requests()[::-1]))
    alone = {}
    for request in requests():
        alone |= tokens_of(run(sampler, [request]))
    assert together == backwards == alone


def test_neighbours_do_not_change_a_bit_of_what_one_program_computes(sampler, params):
    """Of prompts without a common beginning: nothing is shared, and nothing gives way."""
    before = sampler.counters
    alone = {}
    for version, request in enumerate(requests(), 1):
        alone |= run(sampler, [request], params, version)
    together = run(sampler, requests(), params, 100)
    assert (sampler.counters.shared_tokens, sampler.counters.preemptions) == (
        before.shared_tokens,
        before.preemptions,
    )
    assert together == alone


@pytest.mark.parametrize('slots', [1, 2])
def test_a_sample_does_not_depend_on_decode_steps_or_slots(
    slots, sampler, build, params, one_device
):
    expected = tokens_of(run(sampler, short()))
    other = build(params, one_device, decode_steps=5, slots=slots)
    assert tokens_of(run(other, short())) == expected


def test_a_late_request_does_not_change_running_requests(sampler):
    first, *others = requests()
    expected = tokens_of(run(sampler, [first]))[first.id]
    tokens = []
    sampler.add(first)
    while sampler.has_work:
        events = sampler.step()
        tokens += [token for event in events if event.id == first.id for token in event.tokens]
        if others:
            sampler.add(others.pop())
    assert tokens == expected


def test_the_seed_and_the_sample_index_choose_the_sample(sampler):
    base = requests(temperature=2.0)[0]
    variants = [
        dataclasses.replace(base, id=f'{seed}/{index}', seed=seed, sample_index=index)
        for seed in (0, 1)
        for index in (0, 1, 2)
    ]
    results = tokens_of(run(sampler, variants))
    assert len({tuple(tokens) for tokens in results.values()}) == len(variants)
    assert tokens_of(run(sampler, variants)) == results


def test_the_noise_of_a_token_is_that_of_its_own_position(sampler, one_device):
    """At a temperature at which logits do not matter, a sample is the noise of one position after
    another, the first behind the prompt.
    """
    hot = Request('hot', [1, 2, 3], max_tokens=8, temperature=1e9, seed=5, sample_index=2)
    logits = np.zeros((8, 64), np.float32)  # the vocabulary is padded to a multiple of 16
    logits[:, 60:] = -np.inf
    rows = logits, options.rows(dict.fromkeys(range(8), hot), 8), np.arange(3, 11, dtype=np.int32)
    expected = sample_tokens(*sharding.distribute(rows, one_device)).tokens
    assert tokens_of(run(sampler, [hot]))['hot'] == expected.tolist()


def test_a_request_ends_at_its_first_stop_token_which_is_reported(sampler):
    free = run(sampler, requests())['r0']
    for index, stop in enumerate(free[0]):
        if stop in free[0][:index]:
            continue
        request = requests(stop_ids=frozenset([stop, 58]))[0]
        before = sampler.counters.decode_steps
        tokens, logprobs, sampling_logprobs, reason = run(sampler, [request])['r0']
        # The device stops, too, and does not leave it to the host to cut what follows.
        assert sampler.counters.decode_steps - before == index + 1
        assert tokens == free[0][: index + 1]
        assert (len(logprobs), len(sampling_logprobs)) == (index + 1, index + 1)
        assert reason == 'stop'


@pytest.mark.parametrize('max_tokens', [1, 2, 3, 4, 7])
def test_a_request_gets_exactly_max_tokens(sampler, max_tokens):
    results = run(sampler, requests(max_tokens=max_tokens))
    assert {len(tokens) for tokens in tokens_of(results).values()} == {max_tokens}
    assert {result[-1] for result in results.values()} == {'length'}


def test_a_request_may_fill_its_slot_to_the_last_token(sampler, score):
    request = Request('full', PROMPTS[0], max_tokens=37, temperature=0.0)
    tokens, logprobs, *_ = run(sampler, [request])['full']
    plain, _, greedy = score(request.tokens, tokens)
    assert tokens == greedy.tolist()
    np.testing.assert_allclose(logprobs, plain, rtol=0, atol=1e-4)


def test_more_requests_than_slots_all_finish(sampler):
    many = [dataclasses.replace(r, id=f'{i}/{r.id}') for i in range(3) for r in requests()]
    results = tokens_of(run(sampler, many))
    expected = tokens_of(run(sampler, requests()))
    assert results == {request.id: expected[request.id.split('/')[1]] for request in many}
    assert not sampler.has_work and sampler.step() == []


def test_a_cancelled_request_gives_no_more_events_and_frees_its_slot(sampler):
    expected = tokens_of(run(sampler, requests()))
    for request in requests():
        sampler.add(request)
    seen = {event.id for event in sampler.step()}
    assert seen == {'r0', 'r1', 'r2', 'r3'}
    sampler.cancel('r1')  # running
    sampler.cancel('r5')  # waiting
    sampler.cancel('nobody')
    results = {}
    while sampler.has_work:
        for event in sampler.step():
            results.setdefault(event.id, []).extend(event.tokens)
    assert set(results) == {'r0', 'r2', 'r3', 'r4'}
    assert results['r4'] == expected['r4']


def test_a_judge_may_stop_a_request_between_calls(sampler):
    expected = tokens_of(run(sampler, requests()))
    results = run(sampler, requests(), stop=lambda one: one.id == 'r2' and len(one.tokens) >= 3)
    assert results['r2'][0] == expected['r2'][:3] and results['r2'][-1] is None
    others = {id: tokens for id, tokens in tokens_of(results).items() if id != 'r2'}
    assert others == {id: tokens for id, tokens in expected.items() if id != 'r2'}


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(tokens=[]), 'the prompt is empty'),
        (dict(tokens=[1, 60]), 'from 1 to 60, but the vocabulary has 60 ids'),
        (dict(tokens=[-1, 5]), 'from -1 to 5'),
        (dict(tokens=[1] * 33), '33 prompt . 8 new tokens = 41 exceed sampling.max_length 40'),
    ],
    ids=str,
)
def test_a_request_that_does_not_fit_is_rejected(sampler, changes, message):
    with pytest.raises(DataError, match=f'request r0: .*{message}'):
        sampler.add(requests(**changes)[0])
    assert not sampler.has_work


def test_new_weights_take_effect_without_recompilation(sampler, score, other_params):
    run(sampler, requests(temperature=0.0))
    compiled = sampler.counters.compilations
    results = tokens_of(run(sampler, requests(temperature=0.0), other_params, version=5))
    assert sampler.version == 5
    for request in requests():
        greedy = score(request.tokens, results[request.id], params=other_params)[2]
        assert results[request.id] == greedy.tolist()
    assert sampler.counters.compilations == compiled


def test_weights_may_be_lent_while_requests_run(sampler, params, other_params):
    request = requests(temperature=0.0)[0]
    expected = tokens_of(run(sampler, [request]))[request.id]

    def finish(weights):
        """Samples three tokens (a step) with the first weights, the rest with others."""
        sampler.lend(params, 1)
        sampler.add(request)
        tokens = sampler.step()[0].tokens
        assert sampler.version == 1 and tokens == expected[:3]
        sampler.lend(weights, 2)
        while sampler.has_work:
            tokens += sampler.step()[0].tokens
        assert sampler.version == 2 and len(tokens) == len(expected)
        return tokens

    assert finish(params) == expected
    assert finish(other_params) != expected


def test_without_weights_requests_are_checked_but_not_accepted(build, params, one_device):
    with jax.set_mesh(one_device):
        empty = build(None, one_device)
        request = requests()[0]
        empty.check(request)
        for call in (lambda: empty.add(request), empty.step):
            with pytest.raises(RuntimeError, match=r'has no weights.*lend\(params, version\)'):
                call()
        assert empty.version is None and not empty.has_work
        empty.lend(params, 7)
        empty.add(request)
        assert empty.version == 7 and empty.has_work


@pytest.mark.parametrize(
    'sizes',
    [dict(fsdp=2, tensor=2), dict(replica=2, context=2)],
    ids=lambda sizes: ' x '.join(sizes),
)
def test_a_mesh_changes_nothing(sampler, build, params, store, sizes):
    greedy = [dataclasses.replace(r, id=f'greedy {r.id}', temperature=0.0) for r in short()]
    expected = run(sampler, short() + greedy)
    sizes = {axis: 1 for axis in sharding.MESH_AXES} | sizes
    mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
    with jax.set_mesh(mesh):
        spread = build(store(params), mesh, slots=3)  # rounded up to the shards of a batch
        results = run(spread, short() + greedy)
    assert tokens_of(results) == tokens_of(expected)
    for id, (_, logprobs, sampling_logprobs, _) in results.items():
        np.testing.assert_allclose(logprobs, expected[id][1], rtol=0, atol=1e-4)
        np.testing.assert_allclose(sampling_logprobs, expected[id][2], rtol=0, atol=1e-4)
