"""Loads an export of jaxfm into transformers, and compares it with a reference.

    ENV/bin/python -m tools.goldens.check_export DIR [--reference DIR]
    ENV/bin/python -m tools.goldens.check_export ADAPTER --base DIR [--reference ADAPTER]

DIR is in the Hugging Face layout, ADAPTER in PEFT's. Prints one line of JSON; exits with 1 if a
tensor is missing, unexpected or misshapen, or if logits or ids differ from the reference's.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

TOLERANCE = 1e-4  # of logits
LENGTH, NEW_TOKENS = 24, 16
TEXT = 'Once upon a time, there was 1 café.\n\tThe end 😀'


def main() -> int:
    flags = parse()
    logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        report = check(flags.directory, flags.reference, flags.base)
    print(json.dumps(report))
    return 0 if report['agrees'] else 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('directory', type=Path)
    parser.add_argument('--reference', type=Path, help='what to compare it with')
    parser.add_argument('--base', type=Path, help='for an adapter: its base model')
    return parser.parse_args(argv)


def check(directory: Path, reference: Path | None, base: Path | None) -> dict:
    """Reports tensors that do not fit, and how far the export is from the reference."""
    model, report = load(directory, base)
    faults = any(report.values())
    report |= {'parameters': sum(p.numel() for p in model.parameters())}
    report |= tokens(directory)
    faults |= report.get('tokenizer_size', 0) > model.config.vocab_size
    if reference is not None:
        theirs, _ = load(reference, base)
        mine, expected = answers(model), answers(theirs)
        difference = float(np.abs(mine[0] - expected[0]).max())
        report |= {'max_logit_difference': difference, 'greedy_agrees': mine[1] == expected[1]}
        faults |= not (difference <= TOLERANCE and report['greedy_agrees'])
        faults |= report.get('token_ids') != tokens(reference).get('token_ids')
    return report | {'agrees': not faults}


def load(directory: Path, base: Path | None):
    """Returns (model in float32, {fault: names of tensors})."""
    options = dict(dtype=torch.float32, attn_implementation='eager')
    model, info = AutoModelForCausalLM.from_pretrained(
        base or directory, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    report = {
        'missing': sorted(info['missing_keys']),
        'unexpected': sorted(info['unexpected_keys']),
        'misshapen': sorted(str(key) for key in info['mismatched_keys']),
    }
    if base is not None:
        model = PeftModel.from_pretrained(model, directory)
        report['missing'], report['unexpected'] = adapter_faults(model, directory)
    return model.eval(), report


def adapter_faults(model, directory: Path) -> tuple[list[str], list[str]]:
    """Returns (tensors that the adapter lacks, tensors that the model does not have)."""
    names = {name.replace('.default', '') for name, _ in model.named_parameters()}
    names = {name for name in names if 'lora_' in name}
    with safe_open(directory / 'adapter_model.safetensors', 'np') as file:
        found = set(file.keys())
    return sorted(names - found), sorted(found - names)


def tokens(directory: Path) -> dict:
    """The ids of a fixed text and the tokenizer's size; empty without a tokenizer."""
    if not any((directory / name).exists() for name in ('tokenizer.json', 'tokenizer.model')):
        return {}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return {'token_ids': tokenizer(TEXT)['input_ids'], 'tokenizer_size': len(tokenizer)}


@torch.no_grad()
def answers(model) -> tuple[np.ndarray, list[int]]:
    """Logits of fixed ids, and the greedy continuation of their first half."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, LENGTH))
    logits = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    greedy = ids[:1, : LENGTH // 2]
    for _ in range(NEW_TOKENS):
        following = model(input_ids=torch.from_numpy(greedy)).logits[:, -1].argmax(-1)
        greedy = np.concatenate([greedy, following.numpy()[:, None]], axis=1)
    return logits, greedy[0].tolist()


if __name__ == '__main__':
    sys.exit(main())
