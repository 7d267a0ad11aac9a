"""Records losses and gradients of TRL's DPOTrainer, KTOTrainer and CPOTrainer for given log-probs.

    ENV/bin/python -m tools.goldens.preference --output tests/goldens

The trainers have no model: what stands for it gives the log-probs of each token. Everything else is
TRL's own code: sums over tokens, the loss, and by autograd its gradient.
"""

import argparse
import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.numpy import save_file
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer

PAIRS, LENGTH = 6, 9  # LENGTH: most tokens of an answer
SEED = 5

DPO = {'beta': 0.3, 'loss_types': ['sigmoid'], 'label_smoothing': 0.0}
# {name: attributes of the DPOTrainer}.
DPO_CASES = {
    'dpo': DPO,
    'hinge': {**DPO, 'loss_types': ['hinge']},
    'ipo': {**DPO, 'loss_types': ['ipo']},
    'robust': {**DPO, 'loss_types': ['robust'], 'label_smoothing': 0.2},
    'mean': {**DPO, 'loss_types': ['sigmoid_norm']},
    'with_sft': {**DPO, 'loss_types': ['sigmoid', 'sft'], 'loss_weights': [1.0, 0.4]},
}
KTO_CASES = {
    'kto': {'beta': 0.3, 'desirable_weight': 1.0, 'undesirable_weight': 1.0},
    'kto_weights': {'beta': 0.5, 'desirable_weight': 0.7, 'undesirable_weight': 1.4},
}
CPO = {'beta': 2.0, 'loss_type': 'simpo', 'simpo_gamma': 0.8, 'label_smoothing': 0.0, 'alpha': 0.0}
CPO_CASES = {
    'simpo': CPO,
    'simpo_smoothed': {**CPO, 'label_smoothing': 0.1},
    'cpo': {**CPO, 'loss_type': 'sigmoid', 'beta': 0.3},
    'cpo_hinge': {**CPO, 'loss_type': 'hinge', 'beta': 0.3},
}


def main() -> None:
    flags = parse()
    torch.set_num_threads(1)
    data = make_data()
    golden = {
        'versions': {name: version(name) for name in ('trl', 'torch', 'transformers')},
        'seed': SEED,
        'cases': {},
    }
    arrays = {name: value.numpy() for name, value in data.items()}
    runs = {
        **{name: (run_dpo, case) for name, case in DPO_CASES.items()},
        **{name: (run_kto, case) for name, case in KTO_CASES.items()},
        **{name: (run_cpo, case) for name, case in CPO_CASES.items()},
    }
    for name, (run, case) in runs.items():
        policy = torch.nn.Parameter(data['policy'].clone())
        loss, metrics = run(case, data, policy)
        loss.backward()
        arrays[f'gradient/{name}'] = policy.grad.numpy()
        golden['cases'][name] = {'arguments': case, 'loss': loss.item(), 'metrics': metrics}
    directory = flags.output / 'preference'
    directory.mkdir(exist_ok=True)
    save_file(arrays, directory / 'golden.safetensors')
    (directory / 'golden.json').write_text(json.dumps(golden, indent=1) + '\n', 'utf-8')


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--output', type=Path, required=True)
    return parser.parse_args(argv)


def make_data() -> dict[str, torch.Tensor]:
    """Log-probs [2 * PAIRS, LENGTH] of the better answers, then of the worse ones."""
    random = torch.Generator().manual_seed(SEED)
    count = 2 * PAIRS

    def normal(scale):
        return scale * torch.randn(count, LENGTH, generator=random)

    lengths = torch.randint(1, LENGTH + 1, (count,), generator=random)
    lengths[:2] = torch.tensor([1, LENGTH])
    policy = -torch.exp(normal(0.7))
    mismatched = -torch.exp(normal(0.7))
    return {
        'lengths': lengths.to(torch.int32),
        'policy': policy,
        'reference': torch.clamp(policy + normal(0.4), max=-1e-3),
        'mismatched': mismatched,
        'mismatched_reference': torch.clamp(mismatched + normal(0.2) - 0.1, max=-1e-3),
    }


def mask_of(lengths: torch.Tensor) -> torch.Tensor:
    """[count, LENGTH]: 1 for the tokens of an answer."""
    return (torch.arange(LENGTH) < lengths[:, None]).int()


class Model:
    """Stands for a model: gives these log-probs, one for each token after the first."""

    training = True

    def __init__(self, logprobs, mask):
        self.logprobs = logprobs * mask  # TRL's fused head gives 0 for other tokens

    def __call__(self, **inputs):
        shape = self.logprobs.shape
        return SimpleNamespace(
            log_probs=self.logprobs,
            entropy=torch.zeros(shape),
            mean_logits=torch.zeros(shape),
            is_top1=torch.zeros(shape, dtype=torch.bool),
        )


class Accelerator:
    """One process."""

    device = 'cpu'

    @staticmethod
    def gather_for_metrics(value):
        return value

    gather = gather_for_metrics

    @staticmethod
    def unwrap_model(model):
        return model


def stand_in(trainer, **attributes):
    """An instance of a trainer that was not initialised."""
    made = trainer.__new__(type('Bare', (trainer,), {'__init__': lambda self: None}))
    vars(made).update(
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )
    return made


def inputs_of(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt of one token, and an answer."""
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=mask.dtype), mask], dim=1)
    return {
        'input_ids': torch.ones_like(whole),
        'attention_mask': torch.ones_like(whole),
        'completion_mask': whole,
    }


def kept(metrics) -> dict[str, float]:
    """The metrics that ours are compared with."""
    names = ('rewards/chosen', 'rewards/rejected', 'rewards/accuracies', 'rewards/margins', 'kl')
    return {name: float(values[0]) for name, values in metrics['train'].items() if name in names}


def run_dpo(case, data, policy):
    mask = mask_of(data['lengths'])
    reference = (data['reference'] * mask).sum(1)
    attributes = {'loss_weights': [1.0] * len(case['loss_types']), **case}
    trainer = stand_in(
        DPOTrainer,
        **attributes,
        ld_alpha=None,
        f_divergence_type='reverse_kl',
        use_weighting=False,
    )
    model = trainer.model = Model(policy, mask)
    inputs = inputs_of(mask) | {
        'ref_chosen_logps': reference[:PAIRS],
        'ref_rejected_logps': reference[PAIRS:],
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, kept(trainer._metrics)


def run_kto(case, data, policy):
    mask = mask_of(data['lengths'])
    trainer = stand_in(KTOTrainer, **case, loss_type='kto', calculate_KL=True)
    trainer._compute_kl_logps = lambda model, batch: (data['mismatched'] * mask).sum(1)
    model = trainer.model = Model(policy, mask)
    inputs = inputs_of(mask) | {
        'label': torch.tensor([True] * PAIRS + [False] * PAIRS),
        'ref_logps': (data['reference'] * mask).sum(1),
        'ref_KL_logps': (data['mismatched_reference'] * mask).sum(1),
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, kept(trainer._metrics)


def run_cpo(case, data, policy):
    mask = mask_of(data['lengths'])
    trainer = stand_in(CPOTrainer, **case)
    scores = (policy * mask).sum(1)
    if case['loss_type'] == 'simpo':
        scores = scores / mask.sum(1)
    losses, _, _ = trainer.cpo_loss(scores[:PAIRS], scores[PAIRS:])
    return losses.mean(), {}


if __name__ == '__main__':
    main()
