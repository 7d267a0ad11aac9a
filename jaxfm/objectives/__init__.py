"""Objectives: the loss, as named sums over tokens with weights that depend only on the batch."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group, Problem

# Loads the weights of a reference: what an earlier call told of where they are from, as JSON, or
# None -> the weights, and that.
LoadReference = Callable[[dict | None], tuple[dict, dict | None]]


class NextTokenConfig(Group):
    """Next-token cross-entropy, for pre-training and SFT, which differ only in loss_mask."""

    name: Literal['next_token'] = 'next_token'
    z_loss: float = Field(0.0, ge=0)  # coefficient of the squared log-partition (PaLM, section 5)


_Baseline = Literal['group', 'leave_one_out', 'batch', 'none']
_Scale = Literal['group', 'batch', 'none']
_Ratio = Literal['token', 'sequence', 'sequence_mean']
_Clip = Literal['ppo', 'cispo', 'none']
_Aggregation = Literal['token', 'sequence', 'sum']
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PolicyGradientConfig(Group):
    """Policy gradient on samples and their rewards; the other names are presets of its parts."""

    name: Literal['policy_gradient'] = 'policy_gradient'
    # What is subtracted from a reward: the mean of the samples of its prompt, that of the other
    # samples of its prompt, that of the whole batch, or nothing.
    baseline: _Baseline = 'group'
    # The standard deviation by which that is divided: of the prompt's samples, of the batch, none.
    scale: _Scale = 'none'
    # The probability of a sample under the policy over that under the one that sampled it: of each
    # token; of the whole sample, the product of these; or their geometric mean.
    ratio: _Ratio = 'token'
    # ppo: min(ratio * advantage, clipped ratio * advantage). cispo: the gradient of the log-prob
    # times the ratio, which is cut above and has no gradient itself. none: ratio * advantage.
    clip: _Clip = 'ppo'
    clip_low: _NotNegative = 0.2  # ppo cuts ratios below 1 - clip_low
    clip_high: _NotNegative = 0.2  # ppo and cispo cut ratios above 1 + clip_high
    dual_clip: _NotNegative = 0.0  # ppo cuts ratios above this one if the advantage < 0; 0: never
    # token: the mean over all tokens. sequence: the mean over samples of the mean over their
    # tokens. sum: the mean over samples of the sum over their tokens, divided by `length`.
    aggregation: _Aggregation = 'token'
    length: int = Field(1, ge=1)
    # Which log-probs the ratio compares with: those of the sampler, or those that the trainer
    # computes for the same weights before the update.
    old_logprobs: Literal['sampler', 'recomputed'] = 'sampler'
    # With recomputed log-probs: weights each token, or sample, by the ratio between them and the
    # sampler's, which is cut above the cap (truncate), or replaced by 0 above it and below the
    # floor (mask).
    importance: Literal['none', 'truncate', 'mask'] = 'none'
    importance_level: Literal['token', 'sequence'] = 'token'
    importance_cap: _Positive = 2.0
    importance_floor: _NotNegative = 0.0
    # Coefficient of the divergence from the reference, the weights with which the phase begins,
    # and its estimator (J. Schulman, "Approximating KL divergence", 2020).
    kl: _NotNegative = 0.0
    kl_estimator: Literal['k1', 'k2', 'k3'] = 'k3'
    # Multiplies the estimate by the ratio, before it is cut. The gradient of k1 and k3 is then that
    # of the divergence (DeepSeek-AI 2025, arXiv 2512.02556); k2 has it without.
    kl_weighted: bool = True
    entropy: _NotNegative = 0.0  # coefficient of the entropy, which is raised

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        idle = _find_idle(cls, parts, _NEEDS)
        return [*idle, *cls._find_wrong_bounds(parts), *cls._find_wrong_kl(parts)]

    @classmethod
    def _find_wrong_bounds(cls, parts: dict) -> list[Problem]:
        found = []
        low, high = parts.get('importance_floor', 0.0), parts.get('importance_cap', 2.0)
        if low >= high:
            sentence = f'importance_floor {low:g} must be less than importance_cap {high:g}'
            found.append(Problem((('importance_floor',), ('importance_cap',)), sentence))
        dual, least = parts.get('dual_clip', 0.0), 1 + parts.get('clip_high', 0.2)
        if dual and dual <= least:
            sentence = f'dual_clip {dual:g} must be more than 1 + clip_high, {least:g}'
            found.append(Problem((('dual_clip',), ('clip_high',)), sentence))
        if parts.get('clip') == 'ppo' and parts.get('clip_low', 0.2) >= 1:
            sentence = f'must be less than 1 with clip ppo, got {parts["clip_low"]:g}'
            found.append(Problem.at(('clip_low',), sentence))
        return found

    @classmethod
    def _find_wrong_kl(cls, parts: dict) -> list[Problem]:
        """Estimators whose gradient is not that of the divergence, or that are not used."""
        if not {'kl', 'kl_weighted', 'kl_estimator'} <= parts.keys():
            return []
        if not parts['kl']:
            changed = [
                name
                for name in ('kl_weighted', 'kl_estimator')
                if parts[name] != cls.model_fields[name].default
            ]
            return [
                Problem(((name,), ('kl',)), f'{name} {parts[name]} would do nothing: kl is 0')
                for name in changed
            ]
        wrong = {
            (True, 'k2'): 'with kl_weighted, the gradient of k2 is not that of the divergence; set '
            'kl_weighted=False, or kl_estimator to k1 or k3',
            (False, 'k1'): 'without kl_weighted, the gradient of k1 does not depend on the '
            'reference; set kl_weighted=True, or kl_estimator to k2 or k3',
        }
        sentence = wrong.get((parts['kl_weighted'], parts['kl_estimator']))
        return [Problem((('kl_weighted',), ('kl_estimator',)), sentence)] if sentence else []


# {key: (another key, the values of it with which the key does something, what it belongs to)}
_Needs = dict[str, tuple[str, tuple, str]]


def _find_idle(group: type[Group], parts: dict, needs: _Needs) -> list[Problem]:
    """Keys that were changed, but do nothing without another."""
    found = []
    for name, (key, needed, sentence) in needs.items():
        usual = group.model_fields[name].get_default()
        is_idle = name in parts and key in parts and parts[key] not in needed
        if is_idle and parts[name] != usual:
            sentence = f'{name} {_shown(parts[name])} would do nothing: {sentence}'
            found.append(Problem(((name,), (key,)), sentence))
    return found


def _shown(value) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)


_NEEDS: _Needs = {
    'importance': (
        'old_logprobs',
        ('recomputed',),
        'the ratio compares with the log-probs of the sampler already; set old_logprobs=recomputed',
    ),
    **dict.fromkeys(
        ('importance_level', 'importance_cap'),
        ('importance', ('truncate', 'mask'), 'it belongs to importance truncate or mask'),
    ),
    'importance_floor': ('importance', ('mask',), 'it belongs to importance mask'),
    'dual_clip': ('clip', ('ppo',), 'it belongs to clip ppo'),
    'clip_low': ('clip', ('ppo',), 'it belongs to clip ppo'),
    'clip_high': ('clip', ('ppo', 'cispo'), 'it belongs to clip ppo or cispo'),
    'length': ('aggregation', ('sum',), 'it belongs to aggregation sum'),
}


class GRPOConfig(PolicyGradientConfig):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    name: Literal['grpo'] = 'grpo'
    scale: _Scale = 'group'
    aggregation: _Aggregation = 'sequence'


class DrGRPOConfig(PolicyGradientConfig):
    """GRPO without its biases by length and difficulty (Liu et al. 2025, arXiv 2503.20783)."""

    name: Literal['dr_grpo'] = 'dr_grpo'
    aggregation: _Aggregation = 'sum'
    length: int = Field(ge=1)  # the same for all samples, such as data.max_tokens


class DAPOConfig(PolicyGradientConfig):
    """DAPO's loss (Yu et al. 2025, arXiv 2503.14476); its other parts are keys of the rollout."""

    name: Literal['dapo'] = 'dapo'
    scale: _Scale = 'group'
    clip_high: _NotNegative = 0.28


class GSPOConfig(PolicyGradientConfig):
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071)."""

    name: Literal['gspo'] = 'gspo'
    scale: _Scale = 'group'
    ratio: _Ratio = 'sequence_mean'
    clip_low: _NotNegative = 3e-4
    clip_high: _NotNegative = 4e-4
    aggregation: _Aggregation = 'sequence'


class CISPOConfig(PolicyGradientConfig):
    """Clipped importance weights (MiniMax 2025, arXiv 2506.13585)."""

    name: Literal['cispo'] = 'cispo'
    scale: _Scale = 'group'
    clip: _Clip = 'cispo'
    clip_high: _NotNegative = 4.0


class RLOOConfig(PolicyGradientConfig):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

    name: Literal['rloo'] = 'rloo'
    baseline: _Baseline = 'leave_one_out'
    ratio: _Ratio = 'sequence'
    aggregation: _Aggregation = 'sequence'


class ReinforcePlusPlusConfig(PolicyGradientConfig):
    """REINFORCE++, with a baseline of the whole batch (Hu et al. 2025, arXiv 2501.03262)."""

    name: Literal['reinforce_plus_plus'] = 'reinforce_plus_plus'
    baseline: _Baseline = 'batch'
    scale: _Scale = 'batch'


FIRST_WEIGHTS, NO_REFERENCE = 'first_weights', 'none'
_PairLoss = Literal['sigmoid', 'hinge', 'squared', 'kto']


class PreferenceConfig(Group):
    """Preferences: chats that are wanted become more likely than those that are not.

    The score of a chat is the log-prob of its answer, less that under a reference. The other names
    are presets.
    """

    name: Literal['preference'] = 'preference'
    # Of a pair, with x = beta * (score of the better - score of the worse) - margin:
    # sigmoid: -log sigmoid(x). hinge: max(0, 1 - x). squared: (x / beta - 1 / (2 beta))^2.
    # kto: of each chat, 1 - sigmoid(beta * (score - kl)), or with the opposite sign if it is not
    # wanted, where kl is an estimate of the divergence from the reference.
    loss: _PairLoss = 'sigmoid'
    beta: _Positive = 0.1
    logprobs: Literal['sum', 'mean'] = 'sum'  # over the tokens of an answer
    # first_weights: those with which the phase begins. none: no reference. Or another model with
    # the tokenizer of this run, named as in `init_from`. Its log-probs are computed once, before
    # the first step.
    reference: str = Field(FIRST_WEIGHTS, min_length=1)
    margin: _NotNegative = 0.0
    # The share of pairs whose sides are taken to be swapped: their loss is part of the loss
    # (conservative), or is subtracted, which makes it right on average (robust).
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    smoothing: Literal['conservative', 'robust'] = 'conservative'
    # Coefficient of the cross-entropy of the chats that are wanted.
    sft: _NotNegative = 0.0
    # kto: weights of the two kinds of chats; their sums should be about equal.
    desirable_weight: _NotNegative = 1.0
    undesirable_weight: _NotNegative = 1.0

    @property
    def names_reference(self) -> bool:
        """Whether the reference is another model."""
        return self.reference not in (FIRST_WEIGHTS, NO_REFERENCE)

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        found = _find_idle(cls, parts, _PREFERENCE_NEEDS)
        if parts.get('loss') == 'kto' and parts.get('reference') == NO_REFERENCE:
            sentence = 'loss kto compares with a reference: set reference=first_weights'
            found.append(Problem((('loss',), ('reference',)), sentence))
        if parts.get('smoothing') == 'robust' and parts.get('label_smoothing') == 0:
            sentence = 'smoothing robust would do nothing: label_smoothing is 0'
            found.append(Problem((('smoothing',), ('label_smoothing',)), sentence))
        weights = [parts.get(name) for name in ('desirable_weight', 'undesirable_weight')]
        if parts.get('loss') == 'kto' and weights == [0, 0]:
            sentence = 'one of desirable_weight and undesirable_weight must be more than 0'
            found.append(Problem((('desirable_weight',), ('undesirable_weight',)), sentence))
        return found


_OF_KTO = ('loss', ('kto',), 'it belongs to loss kto')
_PREFERENCE_NEEDS: _Needs = {
    'margin': ('loss', ('sigmoid', 'hinge'), 'it belongs to loss sigmoid or hinge'),
    'label_smoothing': ('loss', ('sigmoid', 'hinge'), 'it belongs to loss sigmoid or hinge'),
    'desirable_weight': _OF_KTO,
    'undesirable_weight': _OF_KTO,
}


class DPOConfig(PreferenceConfig):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    name: Literal['dpo'] = 'dpo'


class IPOConfig(PreferenceConfig):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036)."""

    name: Literal['ipo'] = 'ipo'
    loss: _PairLoss = 'squared'
    logprobs: Literal['sum', 'mean'] = 'mean'


class KTOConfig(PreferenceConfig):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306)."""

    name: Literal['kto'] = 'kto'
    loss: _PairLoss = 'kto'


class SimPOConfig(PreferenceConfig):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734)."""

    name: Literal['simpo'] = 'simpo'
    beta: _Positive = 2.0
    logprobs: Literal['sum', 'mean'] = 'mean'
    reference: str = Field(NO_REFERENCE, min_length=1)
    margin: _NotNegative = 1.0


_PREFERENCE = 'jaxfm.objectives.preference:Preference'


class DistillationConfig(Group):
    """Divergence from a frozen teacher (Hinton et al. 2015, arXiv 1503.02531)."""

    name: Literal['distillation'] = 'distillation'
    # A model of any architecture with the tokenizer of this run, named as in `init_from`: the work
    # directory of a run, a directory in Hugging Face's layout, a .gguf file, or one on the hub.
    teacher: str = Field(min_length=1)
    # 0: the forward KL, sum p log(p / q) with p of the teacher and q of the student. 1: the reverse
    # KL, sum q log(q / p). Between: the generalised Jensen-Shannon divergence (`gkd`).
    beta: float = Field(0.0, ge=0, le=1)
    temperature: _Positive = 1.0  # divides the logits of both
    # Compares this many ids, those that the teacher finds most probable, and all others as if they
    # were one; 0: all ids.
    top_k: int = Field(0, ge=0)
    hard: _NotNegative = 0.0  # coefficient of the cross-entropy with the tokens themselves

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        top_k, beta = parts.get('top_k', 0), parts.get('beta', 0)
        if not (top_k and beta):
            return []
        sentence = (
            f'top_k {top_k} needs beta 0, not {beta:g}: with it, what matters is where the student '
            'puts its probability, and that is not seen outside of top_k; set top_k=0'
        )
        return [Problem((('top_k',), ('beta',)), sentence)]


class GKDConfig(DistillationConfig):
    """Generalised knowledge distillation (Agarwal et al. 2023, arXiv 2306.13649)."""

    name: Literal['gkd'] = 'gkd'
    beta: float = Field(0.5, ge=0, le=1)


_DISTILLATION = 'jaxfm.objectives.distillation:Distillation'
_POLICY_GRADIENT = 'jaxfm.objectives.policy_gradient:PolicyGradient'
OBJECTIVES = Registry(
    {
        'next_token': Entry('jaxfm.objectives.next_token:NextToken', NextTokenConfig),
        'policy_gradient': Entry(_POLICY_GRADIENT, PolicyGradientConfig),
        'grpo': Entry(_POLICY_GRADIENT, GRPOConfig),
        'dr_grpo': Entry(_POLICY_GRADIENT, DrGRPOConfig),
        'dapo': Entry(_POLICY_GRADIENT, DAPOConfig),
        'gspo': Entry(_POLICY_GRADIENT, GSPOConfig),
        'cispo': Entry(_POLICY_GRADIENT, CISPOConfig),
        'rloo': Entry(_POLICY_GRADIENT, RLOOConfig),
        'reinforce_plus_plus': Entry(_POLICY_GRADIENT, ReinforcePlusPlusConfig),
        'preference': Entry(_PREFERENCE, PreferenceConfig),
        'dpo': Entry(_PREFERENCE, DPOConfig),
        'ipo': Entry(_PREFERENCE, IPOConfig),
        'kto': Entry(_PREFERENCE, KTOConfig),
        'simpo': Entry(_PREFERENCE, SimPOConfig),
        'distillation': Entry(_DISTILLATION, DistillationConfig),
        'gkd': Entry(_DISTILLATION, GKDConfig),
    },
    base=Group,
)
