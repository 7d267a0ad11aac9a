"""The mean and the variance of an estimator's gradient, exactly or from sampled batches.

Either way it is the gradient of `PolicyGradient` through the table of logits. A batch has GROUP
samples of every prompt. N batches of B samples each; other letters as in `world`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.objectives import PolicyGradientConfig
from jaxfm.objectives.advantages import advantages
from jaxfm.objectives.policy_gradient import PolicyGradient
from tools.bench.policy_gradient.estimators import GROUP, Estimator, credit
from tools.bench.policy_gradient.world import (
    COMPLETIONS,
    LENGTH,
    World,
    probabilities,
    token_logprobs,
)

CHUNKS = 50  # parts of the sampled batches; how far their means differ is the error of the whole


@dataclasses.dataclass(frozen=True)
class Errors:
    """Standard errors of what sampled batches say."""

    batches: int
    scale: float  # of the mean along the true gradient, as a share of its length
    prompts: tuple[float, ...]  # the same of each prompt
    square: float  # of the squared length of the mean, if the true mean were 0


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of the gradient that one batch gives."""

    mean_PXV: np.ndarray
    variance: float  # the trace of the covariance
    errors: Errors | None = None  # None: exact

    def squared_distance(self, expected_PXV: np.ndarray) -> float:
        """That of the mean from what is expected; without bias, so noise can make it negative."""
        square = float(np.square(self.mean_PXV - expected_PXV).sum())
        return square - self._square_of_noise() if self.errors else square

    def _square_of_noise(self) -> float:
        """What the squared distance would be on average, if there were no bias."""
        return self.variance / self.errors.batches

    def sigmas(self, expected_PXV: np.ndarray, true_PXV: np.ndarray) -> float:
        """How many standard errors the mean is from what is expected.

        The larger of two figures: along the true gradient, and by the distance in all directions.
        The squared distance has about a chi-squared distribution, whose cube root is nearly normal
        (Wilson and Hilferty 1931).
        """
        along = abs(share(self.mean_PXV - expected_PXV, true_PXV)) / self.errors.scale
        noise = self._square_of_noise()
        spread = (self.errors.square / noise) ** 2 / 9
        times = self.squared_distance(expected_PXV) / noise + 1
        return max(along, (np.cbrt(times) - (1 - spread)) / np.sqrt(spread))


def share(part: np.ndarray, whole: np.ndarray) -> float:
    """The length of `part` along `whole`, as a share of the length of `whole`."""
    return float(np.vdot(part, whole) / np.vdot(whole, whole))


def measure(
    world: World, estimator: Estimator, sampler_PXV: np.ndarray, batches: int, seed: int = 0
) -> Moments:
    """Exactly, if advantages do not depend on other samples; else from so many sampled batches."""
    if estimator.credit == 'group':
        return _sample(world, estimator.config, sampler_PXV, batches, seed)
    return _enumerate(world, estimator, sampler_PXV)


def _enumerate(world: World, estimator: Estimator, sampler_PXV: np.ndarray) -> Moments:
    means, variance = [], 0.0
    for index, credit_YT in enumerate(credit(world, sampler_PXV, estimator.credit)):
        prompt, sampler_1XV = world.prompt(index), sampler_PXV[index : index + 1]
        every_Y1 = np.arange(len(credit_YT))[:, None]  # each completion is a batch
        gradients_Y1XV = _gradients(
            prompt, estimator.config, sampler_1XV, 0 * every_Y1, every_Y1, credit_YT[:, None]
        )
        chances_Y = probabilities(sampler_1XV)[0]
        means.append(np.einsum('y,ypxv->pxv', chances_Y, gradients_Y1XV)[0])
        squares = np.einsum('y,ypxv->', chances_Y, np.square(gradients_Y1XV))
        variance += squares - np.square(means[-1]).sum()
    mean_PXV = np.stack(means) / len(means)
    return Moments(mean_PXV, float(variance) / (len(means) ** 2 * GROUP))


def _sample(
    world: World, config: PolicyGradientConfig, sampler_PXV: np.ndarray, batches: int, seed: int
) -> Moments:
    true_PXV, random = world.true_gradient(), np.random.default_rng(seed)
    norms_P = np.square(true_PXV).sum(axis=(1, 2))
    means, squares, shares_NP = [], 0.0, []
    for _ in range(CHUNKS):
        completions_NPG = _draw(probabilities(sampler_PXV), batches // CHUNKS, random)
        prompts_NPG = np.broadcast_to(np.arange(len(norms_P))[:, None], completions_NPG.shape)
        advantages_NPG = _advantages(world.rewards_PY[prompts_NPG, completions_NPG], config)
        rows = [array.reshape(len(array), -1) for array in (prompts_NPG, completions_NPG)]
        credit_NBT = np.repeat(advantages_NPG.reshape(*rows[0].shape, 1), LENGTH, axis=2)
        gradients = _gradients(world, config, sampler_PXV, *rows, credit_NBT)
        means.append(gradients.mean(axis=0))
        squares += np.square(gradients).sum()
        shares_NP.append(np.einsum('npxv,pxv->np', gradients, true_PXV) / norms_P)
    means, shares_NP = np.stack(means), np.concatenate(shares_NP)
    count, mean_PXV = len(shares_NP), means.mean(axis=0)
    variance = (squares / count - np.square(mean_PXV).sum()) * count / (count - 1)
    whole_N = shares_NP @ norms_P / norms_P.sum()
    errors = Errors(
        count,
        float(whole_N.std(ddof=1) / np.sqrt(count)),
        tuple((shares_NP.std(axis=0, ddof=1) / np.sqrt(count)).tolist()),
        _square_error((means - mean_PXV).reshape(CHUNKS, -1)),
    )
    return Moments(mean_PXV, float(variance), errors)


def _square_error(deviations: np.ndarray) -> float:
    """The standard error of the squared length of a mean that is 0, from the means of its parts.

    For a covariance S of the mean it is sqrt(2 tr(S S)); the products of two parts of K vary by
    K^2 tr(S S).
    """
    products = deviations @ deviations.T
    between = products[~np.eye(len(products), dtype=bool)]
    return float(np.sqrt(2) * between.std() / len(products))


def _draw(chances_PY: np.ndarray, batches: int, random: np.random.Generator) -> np.ndarray:
    """[N, P, G]: completions of the policy with these probabilities."""
    uniform_PNG = random.random((len(chances_PY), batches, GROUP))
    pairs = zip(np.cumsum(chances_PY, axis=1), uniform_PNG)
    drawn_PNG = np.stack([np.searchsorted(edges / edges[-1], u, 'right') for edges, u in pairs])
    return drawn_PNG.swapaxes(0, 1)


def _advantages(rewards_NPG: np.ndarray, config: PolicyGradientConfig) -> np.ndarray:
    """Our own, of each batch."""
    if 'batch' in (config.baseline, config.scale):
        return np.stack([advantages(rewards_PG, config) for rewards_PG in rewards_NPG])
    every_group = rewards_NPG.reshape(-1, rewards_NPG.shape[2])  # groups are independent
    return advantages(every_group, config).reshape(rewards_NPG.shape)


def _gradients(world, config, sampler_PXV, prompts_NB, completions_NB, advantages_NBT):
    """[N, P, X, V]: the gradient by the logits of what the objective raises, of each batch."""
    mask_NBT = COMPLETIONS.mask_YT[completions_NB].astype(float)
    shape = mask_NBT.shape
    old_NBT = token_logprobs(world.logits_PXV)[prompts_NB, completions_NB]
    batches = {
        'prompts': np.broadcast_to(prompts_NB[..., None], shape),
        'prefixes': COMPLETIONS.prefixes_YT[completions_NB],
        'tokens': COMPLETIONS.tokens_YT[completions_NB],
        'loss_mask': mask_NBT,
        'segment_ids': mask_NBT.astype(int),
        'lengths': np.broadcast_to(mask_NBT.sum(axis=2, keepdims=True), shape),
        'advantages': advantages_NBT * mask_NBT,
        'sampler_logprobs': token_logprobs(sampler_PXV)[prompts_NB, completions_NB],
        'old_logprobs': old_NBT,
    }
    # Once the advantages are there, it does not matter how they were made: one program for all.
    config = config.model_copy(update={'baseline': 'none', 'scale': 'none'})
    with jax.enable_x64(True):
        return np.asarray(_ascent(config)(jnp.asarray(world.logits_PXV), batches))


@functools.cache
def _ascent(config: PolicyGradientConfig):
    objective = PolicyGradient(config)

    def gain(logits_PXV, batch):
        logprobs_PXV = jax.nn.log_softmax(logits_PXV)
        logprobs_BT = logprobs_PXV[batch['prompts'], batch['prefixes'], batch['tokens']]
        sums, _ = objective.terms(logprobs_BT, batch)
        return -sums['policy'] / objective.weights(batch)['policy']

    return jax.jit(jax.vmap(jax.grad(gain), in_axes=(None, 0)))
