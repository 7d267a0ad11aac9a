"""The policy gradient: TRL's losses and gradients, float64 references, and what must be equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxfm.objectives import (
    OBJECTIVES,
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    PolicyGradientConfig,
    ReinforcePlusPlusConfig,
    RLOOConfig,
)
from jaxfm.objectives.advantages import advantages
from jaxfm.objectives.policy_gradient import PolicyGradient
from jaxfm.ops.logprobs import Unembedding, token_logprobs
from jaxfm.sharding import MESH_AXES, make_mesh, place
from jaxfm.state import init_state, make_train_step, split
from tests.objectives.samples import GOLDEN, golden_samples

pytestmark = pytest.mark.usefixtures('quick_compilation')

PRESETS = {
    'policy_gradient': PolicyGradientConfig(),
    'grpo': GRPOConfig(),
    'dr_grpo': DrGRPOConfig(length=12),
    'dapo': DAPOConfig(),
    'gspo': GSPOConfig(),
    'cispo': CISPOConfig(),
    'rloo': RLOOConfig(),
    'reinforce_plus_plus': ReinforcePlusPlusConfig(),
}
REWARDS = GOLDEN.arrays['rewards']


def loss_and_gradient(config, packed, logprobs=None):
    """-> loss, its gradient [N, L] with respect to the policy's log-probs, metrics."""
    objective, batch = PolicyGradient(config), packed.batch()
    logprobs = packed.spread(packed.samples.policy) if logprobs is None else logprobs

    def total(logprobs):
        sums, metrics = objective.terms(logprobs, batch)
        weights = objective.weights(batch)
        terms = [objective.coefficients[name] * sums[name] / weights[name] for name in sums]
        return sum(terms), metrics

    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(logprobs)
    return float(loss), packed.collect(gradient), metrics


# TRL

RECOMPUTED = dict(old_logprobs='recomputed', importance_cap=1.2)
TRUNCATE = dict(RECOMPUTED, importance='truncate')
MASK = dict(RECOMPUTED, importance='mask')
OURS = {
    'grpo': GRPOConfig(),
    'grpo_kl': GRPOConfig(kl=0.3),
    'grpo_kl_unweighted': GRPOConfig(kl=0.3, kl_weighted=False),
    'grpo_clip_high': GRPOConfig(clip_low=0.1, clip_high=0.3),
    'grpo_delta': GRPOConfig(dual_clip=1.4),
    'dr_grpo': DrGRPOConfig(length=12),
    'dapo': DAPOConfig(),
    'bnpo_batch_scale': PolicyGradientConfig(scale='batch'),
    'cispo': CISPOConfig(clip_high=0.3),
    'gspo': GSPOConfig(clip_low=0.05, clip_high=0.08),
    'truncate_token': DAPOConfig(clip_high=0.2, **TRUNCATE),
    'truncate_sequence': GRPOConfig(importance_level='sequence', **TRUNCATE),
    'mask_token': DAPOConfig(clip_high=0.2, importance_floor=0.8, **MASK),
    'mask_sequence': GRPOConfig(importance_level='sequence', **MASK),
    'everything': GSPOConfig(
        clip_low=0.05,
        clip_high=0.05,
        dual_clip=1.1,
        kl=0.2,
        aggregation='sum',
        length=20,
        **TRUNCATE,
    ),
    'rloo': RLOOConfig(),
}


@functools.cache
def of_trl(name):
    config = OURS[name]
    samples = golden_samples(
        advantages(REWARDS, config), tools=name != 'rloo', apart=config.importance != 'none'
    )
    return samples, *loss_and_gradient(config, samples.pack())


def test_every_case_of_trl_is_compared():
    assert OURS.keys() == GOLDEN.about['cases'].keys()


@pytest.mark.parametrize('name', OURS)
def test_advantages_are_those_of_trl(name):
    theirs = GOLDEN.arrays[f'advantages/{name}']
    np.testing.assert_allclose(of_trl(name)[0].advantages, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', OURS)
def test_loss_and_gradient_are_those_of_trl(name):
    _, loss, gradient, _ = of_trl(name)
    np.testing.assert_allclose(loss, GOLDEN.about['cases'][name]['loss'], rtol=1e-5, atol=1e-7)
    theirs = GOLDEN.arrays[f'gradient/{name}']
    np.testing.assert_allclose(gradient, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('name', OURS)
def test_metrics_are_those_of_trl(name):
    config, metrics = OURS[name], of_trl(name)[3]
    theirs = GOLDEN.about['cases'][name]['metrics']
    found = {key: float(metrics[key][0] / metrics[key][1]) for key in metrics if key[-1] != '_'}
    if 'kl' in theirs and not config.kl_weighted:
        np.testing.assert_allclose(found['reference_kl'], theirs['kl'], rtol=1e-5)
    if config.ratio == 'token' and config.clip == 'ppo' and not config.dual_clip:
        clipped = theirs['clip_ratio/region_mean']
        np.testing.assert_allclose(found['clip_fraction'], clipped, rtol=1e-6)


# Float64


def loss_of_sample(config, samples, i, policy):
    """What sample i adds to the loss, from the log-probs `policy` of its tokens."""
    kept = samples.mask[i] > 0
    frozen, sampler, old, reference = (
        getattr(samples, name)[i][kept].astype(np.float64)
        for name in ('policy', 'sampler', 'old', 'reference')
    )
    advantage, count = float(samples.advantages[i]), kept.sum()
    old = sampler if config.old_logprobs == 'sampler' else old

    def ratio_of(level, log_ratio):
        if level == 'token':
            return np.exp(log_ratio)
        return np.full(count, np.exp(log_ratio.sum() / (count if level != 'sequence' else 1)))

    ratio = ratio_of(config.ratio, policy - old)
    gains = ratio * advantage
    if config.clip == 'cispo':
        cut = np.minimum(ratio_of(config.ratio, frozen - old), 1 + config.clip_high)
        gains = cut * advantage * policy
    if config.clip == 'ppo':
        cut = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage
        gains = np.minimum(gains, cut)
        if config.dual_clip and advantage < 0:
            gains = np.maximum(gains, config.dual_clip * advantage)
    if config.importance != 'none':
        weight = ratio_of(config.importance_level, old - sampler)
        outside = (weight > config.importance_cap) | (weight < config.importance_floor)
        cut = config.importance_cap if config.importance == 'truncate' else 0
        gains = gains * np.where(outside, cut, weight)
    log_ratio = reference - policy
    estimators = {'k1': -log_ratio, 'k2': log_ratio**2 / 2, 'k3': np.exp(log_ratio) - 1 - log_ratio}
    kl = estimators[config.kl_estimator] * (ratio if config.kl_weighted else 1)
    total = np.sum(config.kl * kl - gains)
    tokens = {
        'token': samples.mask.sum(),
        'sequence': count * len(samples.mask),
        'sum': config.length * len(samples.mask),
    }
    return total / tokens[config.aggregation]


def reference_of(config, samples):
    """-> loss, and its gradient [N, L] from central differences."""
    loss, gradient = 0.0, np.zeros(samples.mask.shape)
    for i, kept in enumerate(samples.mask > 0):
        policy = samples.policy[i][kept].astype(np.float64)
        loss += loss_of_sample(config, samples, i, policy)
        steps = 1e-6 * np.eye(len(policy))
        gradient[i, kept] = [
            loss_of_sample(config, samples, i, policy + step)
            - loss_of_sample(config, samples, i, policy - step)
            for step in steps
        ]
    return loss, gradient / 2e-6


WITHOUT_TRL = {
    'reinforce': PolicyGradientConfig(baseline='none', clip='none'),
    'reinforce++': ReinforcePlusPlusConfig(),
    'reinforce of samples': PolicyGradientConfig(clip='none', ratio='sequence', baseline='batch'),
    'leave one out, k1': PolicyGradientConfig(baseline='leave_one_out', kl=0.2, kl_estimator='k1'),
    'k2': GRPOConfig(kl=0.2, kl_estimator='k2', kl_weighted=False),
    'k3 of samples': GSPOConfig(kl=0.2, aggregation='token'),
    'sum of a product': DrGRPOConfig(length=7, ratio='sequence', clip_low=0.3, clip_high=0.3),
    'cispo of samples': CISPOConfig(ratio='sequence_mean', clip_high=0.1, aggregation='sequence'),
    'dual clip of samples': RLOOConfig(dual_clip=1.4),
    'cispo, masked samples': CISPOConfig(
        clip_high=0.3, importance_level='sequence', importance_floor=0.7, **MASK
    ),
    'gspo, truncated samples': GSPOConfig(
        clip_low=0.1, clip_high=0.1, importance_level='sequence', kl=0.1, **TRUNCATE
    ),
}


@pytest.mark.parametrize('name', WITHOUT_TRL)
def test_loss_and_gradient_equal_float64(name):
    config = WITHOUT_TRL[name]
    samples = golden_samples(advantages(REWARDS, config))
    loss, gradient, _ = loss_and_gradient(config, samples.pack())
    wanted_loss, wanted_gradient = reference_of(config, samples)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-7)


# What must be equal


@pytest.mark.parametrize('name', PRESETS)
def test_packed_samples_equal_samples_in_rows_of_their_own(name):
    config = PRESETS[name].model_copy(update=dict(kl=0.1, **TRUNCATE))
    samples = golden_samples(advantages(REWARDS, config))
    loss, gradient, metrics = loss_and_gradient(config, samples.pack())
    apart = samples.pack(rows=len(samples.mask), length=13)
    apart_loss, apart_gradient, apart_metrics = loss_and_gradient(config, apart)
    np.testing.assert_allclose(loss, apart_loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, apart_gradient, rtol=1e-6, atol=1e-8)
    for a, b in zip(jax.tree.leaves(metrics), jax.tree.leaves(apart_metrics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize('name', PRESETS)
def test_at_equal_logprobs_the_gradient_is_that_of_reinforce(name):
    """The log-prob of a token, times the advantage, in the mean that the preset takes."""
    config = PRESETS[name]
    samples = golden_samples(advantages(REWARDS, config))
    samples.sampler = samples.policy
    _, gradient, metrics = loss_and_gradient(config, samples.pack())
    count = samples.mask.sum(1, keepdims=True)
    each = {
        'token': 1 / count.sum(),
        'sequence': (count if config.ratio != 'sequence' else 1) ** -1.0 / len(count),
        'sum': 1 / len(count) / config.length,
    }
    # The ratio of a whole sample has the gradient of all its tokens.
    wanted = -samples.advantages[:, None] * samples.mask * each[config.aggregation]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-9)
    assert metrics['clip_fraction'][0] == 0
    assert metrics['ratio_'].value == 1 and metrics['ratio'][0] == count.sum()


@pytest.mark.parametrize('name', [name for name in PRESETS if name != 'reinforce_plus_plus'])
def test_a_group_of_equal_rewards_has_no_gradient(name):
    config = PRESETS[name].model_copy(update=dict(clip_low=0.5, clip_high=0.5))
    assert np.ptp(REWARDS[1]) == 0
    gradient = loss_and_gradient(config, golden_samples(advantages(REWARDS, config)).pack())[1]
    assert not gradient[4:8].any()
    assert gradient[:4].any() and gradient[8:].any()


@pytest.mark.parametrize('aggregation', ['token', 'sequence', 'sum'])
def test_weights_come_from_the_batch_alone(aggregation):
    config = PolicyGradientConfig(aggregation=aggregation, kl=0.1, entropy=0.1)
    packed = golden_samples(np.zeros(16)).pack()
    weights = PolicyGradient(config).weights(packed.batch())
    tokens = packed.samples.mask.sum()
    of_policy = tokens if aggregation == 'token' else 16
    assert weights == {'policy': of_policy, 'kl': of_policy, 'entropy': tokens}
    assert PolicyGradient(PolicyGradientConfig()).weights(packed.batch()).keys() == {'policy'}


def test_a_long_prompt_whose_sample_has_moved_far_is_finite():
    """The sum over the sample is not divided at its prompt, where it would overflow."""
    samples = golden_samples(np.ones(16))
    samples.policy = samples.sampler + 30
    loss, gradient, _ = loss_and_gradient(GSPOConfig(), samples.pack())
    assert np.isfinite(loss) and not gradient.any()


# The whole objective

D, V, PADDED = 6, 23, 24


class Model:
    """A model with given hidden states and output projection."""

    def __init__(self, hidden, weight):
        self.hidden, self.weight = hidden, weight

    def __call__(self, tokens, positions, segment_ids):
        assert tokens.shape == positions.shape == segment_ids.shape
        return self.hidden, {}

    def unembed(self):
        return Unembedding(self.weight, V)


def near(packed, hidden, weight):
    """The batch with sampler's log-probs that are near those of the model."""
    batch = packed.batch()
    logprobs, _ = token_logprobs(hidden, Unembedding(weight, V), batch['targets'])
    noise = np.random.default_rng(1).normal(size=logprobs.shape) * 0.2
    for name, scale in dict(sampler=1, old=0.5, reference=2).items():
        nowhere = batch[f'{name}_logprobs'] * 0  # NaN where no sample is
        batch[f'{name}_logprobs'] = np.float32(logprobs + scale * noise + nowhere)
    return batch


def hidden_and_weight(packed):
    random = np.random.default_rng(0)
    hidden = random.normal(size=(*packed.segment_ids.shape, D))
    return np.float32(hidden), np.float32(random.normal(size=(PADDED, D)))


ALL_PARTS = GSPOConfig(
    clip_low=0.02, clip_high=0.02, kl=0.2, entropy=0.3, importance_level='sequence', **TRUNCATE
)


def test_the_objective_is_its_terms_and_the_entropy():
    packed = golden_samples(advantages(REWARDS, ALL_PARTS)).pack()
    hidden, weight = hidden_and_weight(packed)
    batch, objective = near(packed, hidden, weight), PolicyGradient(ALL_PARTS)
    sums, _, increments = jax.jit(lambda *arrays: objective(Model(*arrays), batch, None))(
        hidden, weight
    )
    assert objective.coefficients == {'policy': 1.0, 'kl': 0.2, 'entropy': -0.3}
    assert sums.keys() == objective.coefficients.keys() and increments == {}
    logits = hidden.astype(np.float64) @ weight[:V].T.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    entropy = -np.sum(np.exp(logprobs) * logprobs, -1)
    np.testing.assert_allclose(sums['entropy'], np.sum(entropy * batch['loss_mask']), rtol=1e-5)
    picked = np.take_along_axis(logprobs, batch['targets'][..., None], -1)[..., 0]
    terms, _ = objective.terms(np.float32(picked), batch)
    for name, value in terms.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)


def test_eight_devices_compute_what_one_does():
    """A sample may begin on one device and end on another."""
    packed = golden_samples(advantages(REWARDS, ALL_PARTS)).pack()
    hidden, weight = hidden_and_weight(packed)
    batch, objective = near(packed, hidden, weight), PolicyGradient(ALL_PARTS)

    @jax.jit
    def step(hidden, weight, batch):
        def total(hidden, weight):
            sums, metrics, _ = objective(Model(hidden, weight), batch, None)
            weights = objective.weights(batch)
            terms = {k: objective.coefficients[k] * sums[k] / weights[k] for k in sums}
            return sum(terms.values()), (terms, metrics)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, weight)

    alone = step(hidden, weight, batch)
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1) | dict(fsdp=2, context=2, tensor=2))
    with jax.set_mesh(mesh):
        split_batch = {name: place(value, 'batch', 'position') for name, value in batch.items()}
        hidden = place(hidden, 'batch', 'position', 'embed')
        together = step(hidden, place(weight, 'vocab', 'embed'), split_batch)
    assert jax.tree.structure(alone) == jax.tree.structure(together)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


class Tiny(nnx.Module):
    """Hidden states from a table, so that its gradient is that of all tokens."""

    def __init__(self, key):
        table_key, out_key = jax.random.split(key)
        self.table = nnx.Param(jax.random.normal(table_key, (V, D)), axes=('vocab', 'embed'))
        self.out = nnx.Param(jax.random.normal(out_key, (PADDED, D)), axes=('vocab', 'embed'))

    def __call__(self, tokens, positions, segment_ids):
        return jnp.tanh(self.table[tokens]), {}

    def unembed(self):
        return Unembedding(self.out[...], V)


class Descent:
    """Subtracts the gradient."""

    transform = optax.identity()

    def schedule(self, updates):
        return 1.0


def test_microbatches_equal_one_batch():
    packed = golden_samples(advantages(REWARDS, ALL_PARTS)).pack()
    parts = split(Tiny)
    start = init_state(Tiny, parts, Descent(), 0)
    model = parts.merge(start.params)
    batch = packed.batch()
    hidden, _ = model(*(batch[name] for name in ('tokens', 'positions', 'segment_ids')))
    batch = near(packed, hidden, model.out[...])
    found = {}
    for count in (1, 4):
        state = jax.tree.map(jnp.array, start)
        step = make_train_step(parts, PolicyGradient(ALL_PARTS), Descent(), accumulate=count)
        found[count] = jax.device_get(step(state, batch))
    (whole, metrics), (added, added_metrics) = found[1], found[4]
    assert {'kl_term', 'entropy_term', 'policy_term', 'ratio', 'ratio_max'} <= metrics.keys()
    assert {'ratio_error_p50', 'ratio_error_p99', 'ratio_error_p999'} <= metrics.keys()
    assert 0 < metrics['ratio_error_p50'] < metrics['ratio_error_p99'] and metrics['ratio_max'] > 1
    assert metrics.keys() == added_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(added_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for path, value in whole.trainable.items():
        assert not np.array_equal(value, start.trainable[path])
        np.testing.assert_allclose(added.trainable[path], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_is_registered(name):
    assert OBJECTIVES.load(name) is PolicyGradient
    assert PRESETS[name].name == name
