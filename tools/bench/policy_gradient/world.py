"""Prompts so small that all their completions can be listed: at most three of eight tokens.

A policy is a table of logits, one row a prefix. Arrays are float64; their dimensions are P prompts,
X prefixes, V tokens, Y completions of a prompt, T positions.
"""

import dataclasses

import numpy as np

VOCAB, LENGTH, END = 8, 3, 0
# The probability of a success, with rewards 0 and 1: of hard prompts, middling ones, and easy ones.
SUCCESS = {'hard': 0.1, 'middling': 0.5, 'easy': 0.9}
DIFFICULTIES = 4 * tuple(SUCCESS)  # of the prompts
REWARDS = ('graded', 'binary')


@dataclasses.dataclass(frozen=True)
class Completions:
    """All completions. One that has LENGTH tokens without END is truncated, and counts as well."""

    tokens_YT: np.ndarray  # padded with END
    prefixes_YT: np.ndarray  # which prefix each token follows
    mask_YT: np.ndarray  # bool: what is no padding

    @property
    def lengths_Y(self) -> np.ndarray:
        return self.mask_YT.sum(axis=1)


def _enumerate() -> Completions:
    prefixes, whole = [()], []
    for prefix in prefixes:  # which grows
        for token in range(VOCAB):
            longer = (*prefix, token)
            is_whole = token == END or len(longer) == LENGTH
            (whole if is_whole else prefixes).append(longer)
    shape = (len(whole), LENGTH)
    tokens, followed, mask = np.full(shape, END), np.zeros(shape, int), np.zeros(shape, bool)
    for i, completion in enumerate(whole):
        count = len(completion)
        tokens[i, :count], mask[i, :count] = completion, True
        followed[i, :count] = [prefixes.index(completion[:t]) for t in range(count)]
    return Completions(tokens, followed, mask)


COMPLETIONS = _enumerate()
NUM_PREFIXES = int(COMPLETIONS.prefixes_YT.max()) + 1


@dataclasses.dataclass(frozen=True)
class World:
    """A policy, and the rewards of its completions. What is wanted is the mean over prompts."""

    logits_PXV: np.ndarray
    rewards_PY: np.ndarray

    def prompt(self, index: int) -> 'World':
        """With one of the prompts."""
        return World(self.logits_PXV[index : index + 1], self.rewards_PY[index : index + 1])

    def sampler(self, staleness: float, seed: int = 1) -> np.ndarray:
        """The logits [P, X, V] of another policy: noise with this standard deviation is added."""
        noise = np.random.default_rng(seed).normal(size=self.logits_PXV.shape)
        return self.logits_PXV + staleness * noise

    def expected_reward(self, logits_PXV: np.ndarray) -> float:
        """The mean over prompts."""
        return float((probabilities(logits_PXV) * self.rewards_PY).sum(axis=1).mean())

    def true_gradient(self) -> np.ndarray:
        """[P, X, V]: the gradient of the expected reward by the logits."""
        return self.sum_scores(probabilities(self.logits_PXV) * self.rewards_PY)

    def sum_scores(self, weights_PY: np.ndarray) -> np.ndarray:
        """[P, X, V]: the gradient of every completion's log-prob, weighted and summed; over P."""
        visits_PXV = _visits(weights_PY)
        policy_PXV = np.exp(log_softmax(self.logits_PXV))
        return (visits_PXV - policy_PXV * visits_PXV.sum(axis=2, keepdims=True)) / len(weights_PY)

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """What can be expected after a prefix, and after a token: [P, Y, T] each, exactly."""
        chances_PY = probabilities(self.logits_PXV)
        earned_PXV, visits_PXV = _visits(chances_PY * self.rewards_PY), _visits(chances_PY)
        before_PX = earned_PXV.sum(axis=2) / visits_PXV.sum(axis=2)
        prefixes, tokens = COMPLETIONS.prefixes_YT, COMPLETIONS.tokens_YT
        return before_PX[:, prefixes], (earned_PXV / visits_PXV)[:, prefixes, tokens]


def make_world(rewards: str, seed: int = 0) -> World:
    """A random policy with random rewards.

    A reward is 2 plus a random amount for each token after its prefix, so that every position
    matters ('graded'); or 1 for the best completions and 0 for the others ('binary').
    """
    random = np.random.default_rng(seed)
    shape = (len(DIFFICULTIES), NUM_PREFIXES, VOCAB)
    logits_PXV = random.normal(size=shape)
    logits_PXV[..., END] += 1  # or nearly all completions would be truncated
    effects_PXV = random.normal(scale=0.5, size=shape)
    effects_PYT = effects_PXV[:, COMPLETIONS.prefixes_YT, COMPLETIONS.tokens_YT]
    graded_PY = 2 + (effects_PYT * COMPLETIONS.mask_YT).sum(axis=2)
    if rewards == 'graded':
        return World(logits_PXV, graded_PY)
    successes = [SUCCESS[difficulty] for difficulty in DIFFICULTIES]
    cases = zip(graded_PY, probabilities(logits_PXV), successes)
    return World(logits_PXV, np.stack([_best(*case) for case in cases]))


def _best(graded_Y: np.ndarray, chances_Y: np.ndarray, success: float) -> np.ndarray:
    """1 for the best completions that together are about as likely as `success`, 0 for others."""
    if success > 0.5:  # fewer are bad, and a likely completion is none of these few
        return 1 - _best(-graded_Y, chances_Y, 1 - success)
    binary_Y, taken = np.zeros_like(graded_Y), 0.0
    for i in np.argsort(-graded_Y):
        if taken + chances_Y[i] <= success:
            binary_Y[i], taken = 1.0, taken + chances_Y[i]
    return binary_Y


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def token_logprobs(logits_PXV: np.ndarray) -> np.ndarray:
    """[P, Y, T]: the log-prob of every token of every completion; 0 for padding."""
    logprobs_PXV = log_softmax(logits_PXV)
    logprobs_PYT = logprobs_PXV[:, COMPLETIONS.prefixes_YT, COMPLETIONS.tokens_YT]
    return logprobs_PYT * COMPLETIONS.mask_YT


def probabilities(logits_PXV: np.ndarray) -> np.ndarray:
    """[P, Y]: the probability of every completion."""
    return np.exp(token_logprobs(logits_PXV).sum(axis=2))


def _visits(weights_PY: np.ndarray) -> np.ndarray:
    """[P, X, V]: the summed weights of the completions that have this token after this prefix."""
    sums_PXV = np.zeros((len(weights_PY), NUM_PREFIXES, VOCAB))
    mask_YT = COMPLETIONS.mask_YT
    places = COMPLETIONS.prefixes_YT[mask_YT], COMPLETIONS.tokens_YT[mask_YT]
    weights_PYT = np.broadcast_to(weights_PY[..., None], (*weights_PY.shape, LENGTH))
    for sums_XV, weights_YT in zip(sums_PXV, weights_PYT):
        np.add.at(sums_XV, places, weights_YT[mask_YT])
    return sums_PXV
