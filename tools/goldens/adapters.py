"""Makes the goldens for LoRA adapters in PEFT's layout, on the tiny models of tests/goldens.

    ENV/bin/python -m tools.goldens.adapters --output tests/goldens

It reads the models and the batch that `tools.goldens.families` wrote there: run that first.
"""

import argparse
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers.utils import logging

from tools.goldens.families import lines, logits_of, mean_loss, model_from, read_json

# Name -> (base, options for LoraConfig). All ranks and scales differ, so that a mix-up shows.
ADAPTERS = {
    'llama3_lora': ('llama3', dict(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'])),
    'gemma2_lora': (
        'gemma2',
        dict(
            r=3,
            lora_alpha=5,
            target_modules=[
                *('q_proj', 'k_proj', 'v_proj', 'o_proj'),
                *('gate_proj', 'up_proj', 'down_proj'),
            ],
        ),
    ),
    'phi3_lora': (
        'phi3',
        dict(r=2, lora_alpha=3, target_modules=['qkv_proj', 'gate_up_proj'], use_rslora=True),
    ),
}
SEED, STD = 11, 0.2


def main() -> None:
    flags = parse()
    logging.disable_progress_bar()
    for name, (base, options) in ADAPTERS.items():
        make(flags.output / name, flags.output / base, options)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--output', type=Path, required=True)
    return parser.parse_args(argv)


def make(directory: Path, base: Path, options: dict) -> None:
    """Writes an adapter with random A and B, and the logits and gradients it produces."""
    model = get_peft_model(model_from(base), LoraConfig(task_type='CAUSAL_LM', **options)).eval()
    random = torch.Generator().manual_seed(SEED)
    trained = {n.replace('.default', ''): p for n, p in model.named_parameters() if 'lora_' in n}
    with torch.no_grad():
        for name in sorted(trained):
            trained[name].copy_(STD * torch.randn(trained[name].shape, generator=random))
    shutil.rmtree(directory, ignore_errors=True)
    model.peft_config['default'].base_model_name_or_path = f'tests/goldens/{base.name}'
    model.save_pretrained(directory)
    (directory / 'README.md').unlink(missing_ok=True)  # an empty model card
    config = directory / 'adapter_config.json'
    written = read_json(config)  # PEFT writes a set, in arbitrary order
    written['target_modules'].sort()
    config.write_text(json.dumps(written, indent=2) + '\n', 'utf-8')

    batch = load_file(base / 'golden.safetensors')
    keys = ('inputs', 'targets', 'attention_mask', 'loss_mask')
    first = [torch.from_numpy(batch[k][0]).long() for k in keys]
    loss = mean_loss(model, *first[:3], first[3].bool())
    loss.backward()
    arrays = {f'gradient/{name}': p.grad.numpy() for name, p in trained.items()}
    arrays['losses'] = np.array([loss.item()])
    real = batch['attention_mask'][0]
    arrays['logits'] = logits_of(model, first[0].numpy(), real) * real[..., None]
    merged = logits_of(model.merge_and_unload(), first[0].numpy(), real) * real[..., None]
    save_file(arrays, directory / 'golden.safetensors')
    about = {
        'versions': {n: version(n) for n in ('torch', 'transformers', 'peft')},
        'seed': SEED,
        'base': base.name,
        'max_difference_of_merging': float(f'{np.abs(arrays["logits"] - merged).max():.2g}'),
    }
    (directory / 'golden.json').write_text(lines(about), 'utf-8')
    print(directory.name, about)


if __name__ == '__main__':
    main()
