"""Records losses and gradients of TRL's GRPOTrainer and RLOOTrainer for given log-probs.

    ENV/bin/python -m tools.goldens.policy_gradient --output tests/goldens

The trainers have no model: they get the log-probs of the policy, of the old policy that sampled,
of the reference, and of the sampler (vLLM). Everything else is TRL's own code: advantages from
rewards, importance weights, the loss, and by autograd its gradient.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from safetensors.numpy import save_file
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

PROMPTS, SAMPLES, LENGTH = 4, 4, 9  # LENGTH: most tokens of a completion
SEED = 3
VLLM = {'use_vllm': True, 'vllm_importance_sampling_clip_max': 1.2}
MEAN_OF_MEANS = {'loss_type': 'grpo'}

# {name: arguments of GRPOConfig, or of RLOOConfig}. Bounds are such that some ratios are outside.
CASES = {
    'grpo': MEAN_OF_MEANS,
    'grpo_kl': {**MEAN_OF_MEANS, 'beta': 0.3},
    'grpo_kl_unweighted': {**MEAN_OF_MEANS, 'beta': 0.3, 'use_bias_correction_kl': False},
    'grpo_clip_high': {**MEAN_OF_MEANS, 'epsilon': 0.1, 'epsilon_high': 0.3},
    'grpo_delta': {**MEAN_OF_MEANS, 'delta': 1.4},
    'dr_grpo': {'loss_type': 'dr_grpo', 'scale_rewards': 'none', 'max_completion_length': 12},
    'dapo': {'loss_type': 'dapo', 'epsilon_high': 0.28},
    'bnpo_batch_scale': {'loss_type': 'bnpo', 'scale_rewards': 'batch'},
    'cispo': {'loss_type': 'cispo', 'epsilon_high': 1.3},
    'gspo': {
        **MEAN_OF_MEANS,
        'importance_sampling_level': 'sequence',
        'epsilon': 0.05,
        'epsilon_high': 0.08,
    },
    'truncate_token': {
        'loss_type': 'dapo',
        **VLLM,
        'vllm_importance_sampling_mode': 'token_truncate',
    },
    'truncate_sequence': {
        **MEAN_OF_MEANS,
        **VLLM,
        'vllm_importance_sampling_mode': 'sequence_truncate',
    },
    'mask_token': {
        'loss_type': 'dapo',
        **VLLM,
        'vllm_importance_sampling_mode': 'token_mask',
        'vllm_importance_sampling_clip_min': 0.8,
    },
    'mask_sequence': {**MEAN_OF_MEANS, **VLLM, 'vllm_importance_sampling_mode': 'sequence_mask'},
    'everything': {
        **VLLM,
        'loss_type': 'dr_grpo',
        'max_completion_length': 20,
        'importance_sampling_level': 'sequence',
        'epsilon': 0.05,
        'delta': 1.1,
        'beta': 0.2,
        'vllm_importance_sampling_mode': 'token_truncate',
    },
    'rloo': {'beta': 0.0},
}
# In these, no ratio is cut in the usual way, or not in both directions.
UNCLIPPED = ('cispo',)


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
    for name, arguments in CASES.items():
        kind, theirs = (RLOO, RLOOTrainer) if name == 'rloo' else (GRPO, GRPOTrainer)
        trainer = type(theirs.__name__, (kind, theirs), {})(arguments, data)
        loss, gradient, advantages = trainer.run()
        arrays |= {f'gradient/{name}': gradient.numpy(), f'advantages/{name}': advantages.numpy()}
        metrics = {key: values[0] for key, values in trainer._metrics['train'].items()}
        if name not in UNCLIPPED:
            assert metrics['clip_ratio/low_mean'] and metrics['clip_ratio/high_mean'], name
        kept = {key: metrics[key] for key in ('kl', 'clip_ratio/region_mean') if key in metrics}
        golden['cases'][name] = {'arguments': arguments, 'loss': loss.item(), 'metrics': kept}
    directory = flags.output / 'policy_gradient'
    directory.mkdir(exist_ok=True)
    save_file(arrays, directory / 'golden.safetensors')
    (directory / 'golden.json').write_text(json.dumps(golden, indent=1) + '\n', 'utf-8')


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--output', type=Path, required=True)
    return parser.parse_args(argv)


def make_data() -> dict[str, torch.Tensor]:
    """Rewards, lengths and log-probs; the rewards of one prompt are all equal."""
    random = torch.Generator().manual_seed(SEED)
    count = PROMPTS * SAMPLES

    def normal(scale):
        return scale * torch.randn(count, LENGTH, generator=random)

    rewards = torch.rand(PROMPTS, SAMPLES, generator=random)
    rewards[1] = 0.7
    lengths = torch.randint(1, LENGTH + 1, (count,), generator=random, dtype=torch.int32)
    lengths[:2] = torch.tensor([1, LENGTH])
    # Tokens inside a completion that the policy did not sample, such as the answer of a tool.
    tool_mask = torch.ones(count, LENGTH, dtype=torch.int32)
    tool_mask[2::5, 1:3] = 0
    tool_mask[:, 0] = 1
    policy = -torch.exp(normal(0.7))
    old = torch.clamp(policy + normal(0.25), max=-1e-3)
    return {
        'rewards': rewards,
        'prompt_lengths': torch.randint(1, 5, (count,), generator=random, dtype=torch.int32),
        'lengths': lengths,
        'tool_mask': tool_mask,
        'policy': policy,
        'old': old,
        'sampler': torch.clamp(old + normal(0.15), max=-1e-3),
        'reference': torch.clamp(policy + normal(0.4), max=-1e-3),
    }


class Policy(torch.nn.Module):
    """Stands for a model; all that anybody asks of it are these log-probs [samples, LENGTH]."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs):
        super().__init__()
        self.logprobs = torch.nn.Parameter(logprobs.clone())


class WithoutModel:
    """What replaces the parts of a trainer that generate, run a model or call reward functions."""

    def __init__(self, arguments: dict, data: dict):
        self.data = data
        with tempfile.TemporaryDirectory() as directory:
            args = self.configure(
                output_dir=directory,
                use_cpu=True,
                bf16=False,
                report_to=[],
                per_device_train_batch_size=PROMPTS * SAMPLES,
                num_generations=SAMPLES,
                steps_per_generation=1,
                num_iterations=2,  # so that the policy differs from the old one
                **{'max_completion_length': LENGTH} | arguments,
            )
        vars(self).update(vars(args))  # most of a trainer's attributes have the names of arguments
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        vars(self).update(
            args=args,
            accelerator=Accelerator(cpu=True),
            model=Policy(data['old']),
            ref_model=Policy(data['reference']),
            epsilon_low=args.epsilon,
            epsilon_high=high,
            reward_weights=torch.ones(1),
            reward_funcs=[None],
            reward_func_names=['reward'],
            environments=None,
            environment_factories=None,
            tools=None,
            aux_loss_enabled=False,
            current_gradient_accumulation_steps=1,
            _tokenizer=SimpleNamespace(pad_token_id=0),
            _entropy_bonus_enabled=False,
            _metrics={'train': defaultdict(list)},
            _logs=defaultdict(list, rewards=defaultdict(list)),
            _pending_extra_logs={},
            _pending_metrics={},
        )

    def run(self):
        """-> the loss, its gradient with respect to the log-probs, advantages."""
        count = PROMPTS * SAMPLES
        inputs = self._generate_and_score_completions([{'prompt': ''}] * count)
        policy = Policy(self.data['policy'])
        loss = self._compute_loss(policy, inputs)
        loss.backward()
        return loss.detach(), policy.logprobs.grad, inputs['advantages']

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self.data['rewards'].reshape(-1, 1)

    def _get_per_token_logps_and_entropies(self, model, *arguments, **options):
        return model.logprobs, torch.zeros_like(model.logprobs), None

    def _ids(self, lengths: str) -> list[list[int]]:
        return [[1] * length for length in self.data[lengths].tolist()]


class GRPO(WithoutModel):
    """For GRPOTrainer, whose loss has several types."""

    configure = GRPOConfig

    def _generate(self, prompts):
        lengths = self.data['lengths'].tolist()
        ids = self._ids('lengths')
        sampler = [row[:n] for row, n in zip(self.data['sampler'].tolist(), lengths)]
        tool_mask = [row[:n] for row, n in zip(self.data['tool_mask'].tolist(), lengths)]
        return self._ids('prompt_lengths'), ids, tool_mask, [''] * len(ids), sampler, {}, None, None


class RLOO(WithoutModel):
    """For RLOOTrainer, which knows no tools."""

    configure = RLOOConfig

    def _generate(self, prompts):
        ids = self._ids('lengths')
        return self._ids('prompt_lengths'), ids, [''] * len(ids)


if __name__ == '__main__':
    main()
