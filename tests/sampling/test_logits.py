"""Sampling one token from logits: every option against float64, the noise, and rows that are bad.

The oracle is written from the definitions: it sorts, and works on probabilities.
"""

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxfm import sharding
from jaxfm.sampling.logits import sample_tokens
from jaxfm.sampling.options import bias_row, rows
from jaxfm.sampling.request import MAX_TOP_LOGPROBS, Request

VOCAB, PADDED = 12, 16
# Ids 1 and 4 tie. Sorted: 0, 9, 1 = 4, 3, 8, 6, 11, 2, 10, 5, 7.
LOGITS = np.full(PADDED, -np.inf, np.float32)
LOGITS[:VOCAB] = [2.0, 1.1, -0.4, 0.7, 1.1, -1.0, 0.2, -2.0, 0.5, 1.6, -0.7, 0.0]
PROMPT, COMPLETION = [1, 2, 2, 5], [3, 3, 0]
POSITION = len(PROMPT) + len(COMPLETION)
ROWS, DRAWS = 1000, 4000  # of nearly every call, so that one program serves them all
EVERYTHING = dict(
    temperature=0.8,
    logit_bias={9: -2.0, 6: 1.5},
    allowed_ids=frozenset(range(10)),
    stop_ids={0},
    min_tokens=4,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    top_k=7,
    top_p=0.9,
    min_p=0.12,
)
CASES = {
    'plain': {},
    'cold': dict(temperature=0.5),
    'hot': dict(temperature=2.0),
    'very_hot': dict(temperature=1e30),  # ids that pad the vocabulary stay impossible
    'top_k': dict(top_k=5),
    'top_k_at_a_tie': dict(top_k=3),
    'top_k_of_all': dict(top_k=100),
    'top_p': dict(top_p=0.7),
    'top_p_at_a_tie': dict(top_p=0.5),
    'top_k_then_top_p': dict(top_k=5, top_p=0.8),
    'min_p': dict(min_p=0.2),
    'min_p_after_temperature': dict(min_p=0.2, temperature=3.0),
    'repetition': dict(repetition_penalty=1.8),
    'repetition_below_1': dict(repetition_penalty=0.5),
    'repetition_of_biased': dict(repetition_penalty=1.8, logit_bias={3: -1.5, 5: 2.0}),
    'presence': dict(presence_penalty=1.5),
    'frequency': dict(frequency_penalty=0.7),
    'negative_penalties': dict(presence_penalty=-1.0, frequency_penalty=-0.4),
    'bias': dict(logit_bias={7: 4.0, 0: -1.0, 4: -np.inf}),
    'allowed': dict(allowed_ids=[2, 3, 7, 9]),
    'min_tokens': dict(stop_ids={0, 9, 4}, min_tokens=4),
    'min_tokens_reached': dict(stop_ids={0, 9, 4}, min_tokens=3),
    'everything': EVERYTHING,
    'greedy_with_everything': dict(EVERYTHING, temperature=0.0),
}


def make_request(**options) -> Request:
    return Request(**{'id': 'r', 'tokens': PROMPT, 'max_tokens': 8, **options})


def adjust(logits, request, history, position):
    """The logits of one row after bias, masks and penalties, in float64."""
    logits = logits.astype(np.float64) + bias_row(request, len(logits))
    prompt, completion = history[: len(request.tokens)], history[len(request.tokens) :]
    if position < len(request.tokens) + request.min_tokens:
        logits[list(request.stop_ids)] = -np.inf
    for i in {*prompt, *completion}:
        penalty = request.repetition_penalty
        logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
    for i in set(completion):
        logits[i] -= request.presence_penalty + request.frequency_penalty * completion.count(i)
    return logits


def normalize(weights):
    return weights / weights.sum()


def keep(logits, request):
    """The probabilities of one row after temperature and filters, in float64."""
    p = normalize(np.exp((logits - logits.max()) / request.temperature))
    if 0 < request.top_k < len(p):
        p = normalize(np.where(p >= np.sort(p)[-request.top_k], p, 0))
    if request.top_p < 1:
        likeliest = np.sort(p)[::-1]
        crossing = np.argmax(np.cumsum(likeliest) >= request.top_p)
        p = normalize(np.where(p >= likeliest[crossing], p, 0))
    return normalize(np.where(p >= request.min_p * p.max(), p, 0))


def chi_square_is_small(tokens, p) -> bool:
    """Whether draws follow probabilities, at the 99.9 % limit; rare ids count together."""
    expected, observed = len(tokens) * p, np.bincount(tokens, minlength=len(p))
    is_rare = expected < 5
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    observed = np.append(observed[~is_rare], observed[is_rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    wide = 2 / (9 * freedom)  # Wilson and Hilferty 1931
    limit = freedom * (1 - wide + 3.09 * np.sqrt(wide)) ** 3
    return np.sum((observed - expected) ** 2 / expected) < limit


def batch(requests, logits=LOGITS, position=POSITION) -> list:
    """The arguments of sample_tokens, with history and biases, in ROWS rows."""
    history = np.full((ROWS, 10), -1, np.int32)
    history[:, :POSITION] = PROMPT + COMPLETION
    bias = np.zeros((ROWS, PADDED), np.float32)
    for row, request in enumerate(requests):
        bias[row] = bias_row(request, PADDED)
    logits = np.broadcast_to(logits, (ROWS, PADDED)).astype(np.float32)
    positions = np.full(ROWS, position, np.int32)
    return [logits, rows(dict(enumerate(requests)), ROWS), positions, history, bias]


def take(tree, index):
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope='module')
def sample():
    compiled = jax.jit(sample_tokens)
    return lambda *arguments: jax.device_get(compiled(*arguments))


@pytest.fixture
def draw(sample):
    """A request -> what is sampled in DRAWS rows, each with its own sample index."""

    def run(request):
        arguments = jax.tree.map(lambda x: np.repeat(x[:1], ROWS, axis=0), batch([request]))
        calls = []
        for first in range(0, DRAWS, ROWS):
            arguments[1]['seeds'] = np.stack(
                [np.full(ROWS, 7), np.arange(first, first + ROWS)], axis=1
            ).astype(np.uint32)
            calls.append(sample(*arguments))
        return jax.tree.map(lambda *x: np.concatenate(x), *calls)

    return run


@pytest.mark.parametrize('name', [name for name in CASES if 'greedy' not in name])
def test_draws_follow_the_float64_distribution(draw, name):
    request = make_request(**CASES[name])
    sampled = draw(request)
    p = keep(adjust(LOGITS, request, PROMPT + COMPLETION, POSITION), request)
    assert set(sampled.tokens) <= set(np.flatnonzero(p)), 'a token outside the kept set was drawn'
    assert chi_square_is_small(sampled.tokens, p)
    expected = np.log(p[sampled.tokens])
    np.testing.assert_allclose(sampled.sampling_logprobs, expected, rtol=1e-5, atol=2e-6)


def test_logprobs_are_raw_whatever_the_options(sample):
    requests = [make_request(**options) for options in CASES.values()]
    sampled = take(sample(*batch(requests)), slice(len(requests)))
    raw = np.log(normalize(np.exp(LOGITS[:VOCAB].astype(np.float64))))
    np.testing.assert_allclose(sampled.logprobs, raw[sampled.tokens], rtol=1e-5)


def test_greedy_takes_the_likeliest_after_the_penalties(draw):
    request = make_request(**CASES['greedy_with_everything'])
    likeliest = np.argmax(adjust(LOGITS, request, PROMPT + COMPLETION, POSITION))
    assert likeliest not in (0, 9), 'the options must change the choice'
    sampled = draw(request)
    assert set(sampled.tokens) == {likeliest}
    assert not sampled.sampling_logprobs.any()


def test_random_options_on_a_wide_vocabulary_have_the_oracles_logprobs(sample):
    random, size, count = np.random.default_rng(3), 3000, 64
    requests = [
        make_request(
            sample_index=i,
            temperature=float(random.uniform(0.3, 2)),
            top_k=int(random.choice([0, 1, 2, 50, 1000, 2999, 3000, 5000])),
            top_p=float(random.choice([1.0, 0.95, 0.5, 0.1, 1e-30])),
            min_p=float(random.choice([0.0, 0.01, 0.3, 1.0])),
        )
        for i in range(count)
    ]
    logits = (random.choice([0.01, 1, 3], (count, 1)) * random.normal(size=(count, size))).astype(
        np.float32
    )
    sampled = sample(logits, rows(dict(enumerate(requests)), count), np.zeros(count, np.int32))
    for row, request in enumerate(requests):
        p = keep(logits[row].astype(np.float64), request)
        expected = np.log(p[sampled.tokens[row]])
        np.testing.assert_allclose(sampled.sampling_logprobs[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options', [dict(top_k=1), dict(top_p=1e-50), dict(min_p=1.0)], ids=str)
def test_the_narrowest_filters_keep_one_token(draw, options):
    sampled = draw(make_request(**options))
    assert set(sampled.tokens) == {0}
    assert not sampled.sampling_logprobs.any()


def test_noise_is_fold_in_of_seed_sample_index_and_position(sample):
    requests = [make_request(seed=2**32 - 1 - i, sample_index=3 * i) for i in range(ROWS)]
    logits, options, positions, *rest = batch(requests)
    positions += np.arange(ROWS, dtype=np.int32)

    def expect(seed_2, position):
        key = jax.random.fold_in(jax.random.key(seed_2[0]), seed_2[1])
        noise = jax.random.gumbel(jax.random.fold_in(key, position), (PADDED,))
        return np.argmax(LOGITS + noise)

    expected = jax.jit(jax.vmap(expect))(options['seeds'], positions)
    assert_equal(sample(logits, options, positions, *rest).tokens, np.asarray(expected))


def test_a_neighbour_does_not_change_a_row(sample):
    requests = [
        make_request(**options, seed=5, sample_index=i, top_logprobs=3)
        for i, options in enumerate(CASES.values())
    ]
    arguments, nobody = batch(requests), batch([], logits=0.0)
    among = sample(*arguments)
    for row in range(len(requests)):
        mine, others = take(arguments, [row]), take(nobody, slice(1, None))
        alone = jax.tree.map(lambda *x: np.concatenate(x), mine, others)
        assert_equal(take(sample(*alone), 0), take(among, row))


@pytest.mark.parametrize('options', [{}, EVERYTHING, dict(temperature=0.0)], ids=str)
def test_a_bad_row_is_told_and_leaves_the_others_alone(sample, options):
    requests = [make_request(**options, sample_index=i, top_logprobs=2) for i in range(8)]
    arguments = batch(requests)
    good = sample(*arguments)
    logits = arguments[0]
    logits[1, 3], logits[2, 3], logits[3] = np.nan, np.inf, -np.inf
    logits[4, [0, 1]] = np.inf, np.nan
    sampled = sample(*arguments)
    assert np.flatnonzero(sampled.is_bad).tolist() == [1, 2, 3, 4]
    assert not sampled.tokens[1:5].any()
    others = [0, *range(5, ROWS)]
    assert_equal(take(sampled, others), take(good, others))


def test_a_row_with_no_id_left_is_bad(sample):
    arguments = batch([make_request(allowed_ids={13}), make_request()])
    assert np.flatnonzero(sample(*arguments).is_bad).tolist() == [0]


def test_large_finite_logits_are_not_bad(sample):
    logits = np.where(np.isfinite(LOGITS), LOGITS * 1.5e38, -np.inf).astype(np.float32)
    sampled = sample(*batch([make_request(), make_request(temperature=0.0)], logits=logits))
    assert not sampled.is_bad.any()
    assert not sampled.tokens.any()


@pytest.mark.parametrize('temperature', [1e-6, 2e-38, 1e-42])
def test_a_temperature_near_zero_is_greedy(sample, temperature):
    logits = LOGITS.copy()
    logits[[0, 3]] = 90.0, 100.0
    requests = [make_request(temperature=temperature, sample_index=i) for i in range(8)]
    sampled = take(sample(*batch(requests, logits=logits)), slice(8))
    assert sampled.tokens.tolist() == [3] * 8
    np.testing.assert_allclose(sampled.logprobs, -np.log1p(np.exp(-10.0)), rtol=1e-3)
    np.testing.assert_allclose(sampled.sampling_logprobs, 0.0, atol=1e-6)


def test_min_tokens_ends_at_its_position(sample):
    likely = np.where(np.arange(PADDED) == 3, 10.0, LOGITS).astype(np.float32)
    request = make_request(temperature=0.0, stop_ids={3}, min_tokens=2)
    first = len(PROMPT)  # of the completion
    tokens = [sample(*batch([request], likely, first + i)).tokens[0] for i in range(4)]
    assert [token == 3 for token in tokens] == [False, False, True, True]


def test_empty_places_of_history_and_stop_ids_are_no_ids(sample):
    logits = np.where(np.arange(PADDED) == PADDED - 1, 1.0, 0.0).astype(np.float32)  # not padded
    request = make_request(temperature=0.0, presence_penalty=2.0, stop_ids={1}, min_tokens=8)
    assert sample(*batch([request], logits)).tokens[0] == PADDED - 1


def test_all_ids_are_drawn_if_none_pads_the_vocabulary(sample):
    requests = [make_request(sample_index=i) for i in range(ROWS)]
    tokens = sample(*batch(requests, logits=0.0)).tokens
    assert (np.bincount(tokens, minlength=PADDED) > 0).all()


def test_top_logprobs_are_the_likeliest_of_the_raw_logits(sample):
    options = dict(EVERYTHING, temperature=0.0)
    sampled = sample(*batch([make_request(**options, top_logprobs=4), make_request(top_k=1)]))
    order = np.argsort(-LOGITS, kind='stable')[:VOCAB]
    assert sampled.top_ids.shape == (ROWS, MAX_TOP_LOGPROBS)
    assert sampled.top_ids[0, :VOCAB].tolist() == order.tolist()
    assert (sampled.top_ids[:, PADDED:] == -1).all()
    raw = np.log(normalize(np.exp(LOGITS.astype(np.float64)))[order])
    np.testing.assert_allclose(sampled.top_logprobs[0, :VOCAB], raw, rtol=1e-5)
    nobody = sample(*batch([make_request(), make_request()]))
    assert not nobody.top_ids.any() and not nobody.top_logprobs.any()


def test_shards_of_a_mesh_sample_what_one_device_samples(sample):
    biased = {'logit_bias', 'allowed_ids'}
    kinds = [options for options in CASES.values() if not options.keys() & biased]
    arguments = batch(
        [make_request(**kinds[i % len(kinds)], sample_index=i, top_logprobs=3) for i in range(ROWS)]
    )
    alone = sample(*arguments)
    sizes = {axis: 1 for axis in sharding.MESH_AXES} | dict(fsdp=2, tensor=2)
    mesh = sharding.make_mesh(sizes, jax.devices()[:4])
    with jax.set_mesh(mesh):
        spread = jax.jit(sample_tokens)(*sharding.distribute(arguments[:4], mesh))  # without bias
        assert sharding.spec_of(spread.tokens) == sharding.activation('batch')
    spread = jax.device_get(spread)
    assert_equal(spread.tokens, alone.tokens)
    assert_equal(spread.top_ids, alone.top_ids)
    for name in ('logprobs', 'sampling_logprobs', 'top_logprobs'):
        np.testing.assert_allclose(getattr(spread, name), getattr(alone, name), rtol=1e-6)


def unconditional(jaxpr) -> set[str]:
    """What a program computes in every call: the primitives outside branches."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        if equation.primitive.name != 'cond':
            names |= set().union(*map(unconditional, jaxprs_in_params(equation.params)))
    return names


def test_nothing_is_computed_that_no_row_asks_for():
    jaxpr = jax.make_jaxpr(sample_tokens)(*batch([])[:3]).jaxpr
    costly = {'scatter', 'top_k', 'while', 'scan', 'sort', 'random_bits', 'cond'}
    assert unconditional(jaxpr) & costly == {'cond'}
    conds = [x for x in jaxpr.eqns if x.primitive.name == 'cond']
    branches = [[unconditional(x) & costly for x in cond.params['branches']] for cond in conds]
    early_ends, draws, ranks = branches
    assert early_ends == [set(), {'scatter'}]
    assert draws == [{'random_bits', 'cond'}, set()]  # of sampled rows, of greedy rows
    assert ranks == [set(), {'top_k'}]
