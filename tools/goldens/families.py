"""Makes the goldens for tiny random models of every family (tests/goldens/README.md).

    ENV/bin/python -m tools.goldens.families --output tests/goldens [--only llama gemma3 ...]

On one machine the output is the same, byte for byte, every time.
"""

import argparse
import copy
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from tools.goldens.configs import FAMILIES, Family, old_layout

STEPS, ROWS, LENGTH = 3, 2, 24
REAL_LENGTHS = [[24, 17], [20, 24], [24, 24]]  # per step and row; the rest is padding
PROMPT_LENGTHS = [5, 19]  # the second is longer than every window
NEW_TOKENS = 16
LEAST_GAP = 5e-3  # between the two best logits of a greedy choice, so that rounding never decides
MOST_ROUNDING = 2e-5  # most that compared values may move when all weights are off by a bit
# With a smaller epsilon the last bit of a tiny gradient moves a parameter by more than 1e-4.
ADAMW = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-4)
WEIGHT_DECAY = 0.1  # only of tensors with two dimensions or more
SHARDED, BFLOAT16 = 'mistral', 'qwen2'  # families that are also written in a second form


def main() -> None:
    flags = parse()
    logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    for name in flags.only:
        first_seed = 1000 * list(FAMILIES).index(name)
        for seed in range(first_seed, first_seed + 1000):
            if make(name, FAMILIES[name], flags.output, seed):
                break


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--only', nargs='+', choices=FAMILIES, default=list(FAMILIES))
    return parser.parse_args(argv)


def make(name: str, family: Family, output: Path, seed: int) -> bool:
    """Writes all directories of a family; False if rounding would affect what tests compare."""
    directory = output / name
    model = random_model(family, seed)
    save(model, directory, family.generation)
    (directory / 'config_v4.json').write_text(
        json.dumps(old_layout(read_json(directory / 'config.json'), family), indent=2) + '\n',
        'utf-8',
    )
    arrays = batches(np.random.default_rng(seed))
    report = write_golden(directory, model, arrays, seed, train=True)
    if max(report['max_difference_of_rounding'].values()) > MOST_ROUNDING:
        return False
    check_old_layout(directory, arrays)
    (directory / 'golden.json').write_text(lines(report), 'utf-8')
    if name == SHARDED:
        save(model_from(directory), output / f'{name}_sharded', max_shard_size='20KB')
    if name == BFLOAT16:
        other = output / f'{name}_bfloat16'
        save(model_from(directory).to(torch.bfloat16), other)
        half = write_golden(other, model_from(other), arrays, seed, train=False)
        (other / 'golden.json').write_text(lines(half), 'utf-8')
    print(name, json.dumps({k: v for k, v in report.items() if k not in ('greedy', 'versions')}))
    return True


# The model


def random_model(family: Family, seed: int):
    """A model with scores, gates and logits of order one; biases and norms are not the default."""
    config = AutoConfig.for_model(family.model_type, **family.config)
    config._attn_implementation = 'eager'
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1:
                parameter += 0.3 * noise  # a norm starts at 1 (Gemma: 0), a bias at 0
            else:
                gain = 1.5 if 'embed' in name or 'lm_head' in name else 1.2
                parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)
    return model


def round_otherwise(model, seed: int):
    """A copy with every weight changed by at most one unit in its last place."""
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(seed)
    epsilon = torch.finfo(torch.float32).eps
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1 + epsilon * (2 * torch.rand(parameter.shape, generator=random) - 1)
    return other


def save(model, directory: Path, generation=None, **options) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    model.generation_config.update(**generation or {})
    model.save_pretrained(directory, **options)


def model_from(directory: Path, dtype=torch.float32):
    """The model of a directory, computing in `dtype` whatever its weights are stored in."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation='eager'
    ).eval()


def check_old_layout(directory: Path, arrays) -> None:
    """Asserts that config_v4.json gives the same logits in transformers as config.json."""
    old = directory / 'old'
    old.mkdir()
    shutil.copy(directory / 'config_v4.json', old / 'config.json')
    shutil.copy(directory / 'model.safetensors', old)
    new, read = (logits_of(model_from(d), arrays['inputs'][0]) for d in (directory, old))
    shutil.rmtree(old)
    assert (new == read).all(), f'{directory}: config_v4.json describes another model'


# Inputs


def batches(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Ids for three steps; padding also consists of random ids, so that a leak shows."""
    tokens = random.integers(0, 67, (STEPS, ROWS, LENGTH + 1))
    real = np.arange(LENGTH) < np.array(REAL_LENGTHS)[..., None]
    counted = random.random(real.shape) < 0.75
    return {
        'inputs': tokens[..., :-1],
        'targets': tokens[..., 1:],
        'attention_mask': real,
        'loss_mask': real & counted,
    } | pad_left(tokens[0, :, :-1], real[0])


def pad_left(inputs: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """The first batch with its padding before the row instead of after it."""
    shifts = (~real).sum(-1)
    mask = np.stack([np.roll(row, shift) for row, shift in zip(real, shifts)])
    return {
        'left_inputs': np.stack([np.roll(row, shift) for row, shift in zip(inputs, shifts)]),
        'left_attention_mask': mask,
        'left_positions': np.maximum(np.cumsum(mask, -1) - 1, 0),
    }


# Outputs


def write_golden(directory: Path, model, arrays, seed: int, train: bool) -> dict:
    """Writes golden.safetensors; returns the content of golden.json."""
    arrays = dict(arrays, **forward(model, arrays))
    other = round_otherwise(model, seed)
    moved = forward(other, arrays)
    if train:
        arrays |= learn(copy.deepcopy(model), arrays)
        moved |= learn(other, arrays)
    prompts, outputs, gap = greedy(model, np.random.default_rng([seed, 1]))
    whole = {k: v.astype(np.int32) for k, v in arrays.items() if v.dtype == np.int64}
    save_file(arrays | whole, directory / 'golden.safetensors')
    return {
        'versions': {name: version(name) for name in ('torch', 'transformers', 'numpy')},
        'seed': seed,
        'parameters': sum(p.numel() for p in model.parameters()),
        'logits_std': round(float(arrays['logits'][arrays['attention_mask'][0]].std()), 3),
        'max_difference_of_rounding': {
            kind: max(difference_of(arrays[k], v) for k, v in moved.items() if k.startswith(kind))
            for kind in ('logits', 'losses', 'gradient', 'after')
            if train or kind == 'logits'
        },
        'greedy': {'prompts': prompts, 'outputs': outputs, 'least_gap': gap},
    } | ({'optimizer': ADAMW | {'weight_decay_of_matrices': WEIGHT_DECAY}} if train else {})


def forward(model, arrays) -> dict[str, np.ndarray]:
    """Logits of the first batch, [B, T, V]; zero at padding."""
    right, left = arrays['attention_mask'][0], arrays['left_attention_mask']
    return {
        'logits': logits_of(model, arrays['inputs'][0], right) * right[..., None],
        'left_logits': left[..., None]
        * logits_of(model, arrays['left_inputs'], left, arrays['left_positions']),
    }


@torch.no_grad()
def logits_of(model, inputs, mask=None, positions=None) -> np.ndarray:
    return model(
        input_ids=torch.from_numpy(inputs),
        attention_mask=None if mask is None else torch.from_numpy(mask).long(),
        position_ids=None if positions is None else torch.from_numpy(positions),
    ).logits.numpy()


def learn(model, arrays) -> dict[str, np.ndarray]:
    """The loss of each step, the gradients of the first step, the parameters after the last."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            dict(params=[p for p in parameters.values() if p.ndim >= 2], weight_decay=WEIGHT_DECAY),
            dict(params=[p for p in parameters.values() if p.ndim < 2], weight_decay=0.0),
        ],
        **ADAMW,
    )
    losses, gradients = [], {}
    for step in range(STEPS):
        batch = [
            torch.from_numpy(arrays[k][step])
            for k in ('inputs', 'targets', 'attention_mask', 'loss_mask')
        ]
        optimizer.zero_grad()
        loss = mean_loss(model, *batch)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {f'gradient/{k}': p.grad.numpy().copy() for k, p in parameters.items()}
        optimizer.step()
    after = {f'after/{k}': p.detach().numpy() for k, p in parameters.items()}
    return {'losses': np.array(losses)} | gradients | after


def mean_loss(model, inputs, targets, attention_mask, loss_mask) -> torch.Tensor:
    """Cross-entropy in nats, averaged over the targets in `loss_mask`."""
    logits = model(input_ids=inputs, attention_mask=attention_mask.long()).logits
    return F.cross_entropy(logits[loss_mask], targets[loss_mask])


def greedy(model, random: np.random.Generator) -> tuple[list, list, float]:
    """(prompts, continuations, smallest gap between the two best logits); eos does not stop it.

    Draws prompts until every greedy choice is clear. generate(), with its cache, must agree.
    """
    prompts, outputs, gaps = [], [], []
    for length in PROMPT_LENGTHS:
        gap = 0.0
        while gap < LEAST_GAP:
            prompt = random.integers(0, 67, length)
            output, gap = continue_greedily(model, prompt)
        model.generation_config.eos_token_id = None
        ids = torch.from_numpy(prompt)[None]
        cached = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)
        cached = cached[0, length:].tolist()
        assert cached == output, f'generate() gives {cached}, without a cache {output}'
        prompts.append(prompt.tolist())
        outputs.append(output)
        gaps.append(gap)
    return prompts, outputs, round(min(gaps), 5)


def continue_greedily(model, prompt: np.ndarray) -> tuple[list[int], float]:
    """The greedy continuation of a prompt, recomputed from scratch for every token, and its gap."""
    ids, gap = list(prompt), np.inf
    for _ in range(NEW_TOKENS):
        logits = logits_of(model, np.array(ids)[None])[0, -1]
        second, first = np.sort(logits)[-2:]
        gap = min(gap, float(first - second))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], gap


def difference_of(a: np.ndarray, b: np.ndarray) -> float:
    return float(f'{np.abs(a - b).max():.2g}')


def lines(values: dict) -> str:
    """JSON with one line per key."""
    items = [f' {json.dumps(name)}: {json.dumps(value)}' for name, value in values.items()]
    return '{\n' + ',\n'.join(items) + '\n}\n'


def read_json(path: Path) -> dict:
    return json.loads(path.read_text('utf-8'))


if __name__ == '__main__':
    main()
