"""Records what lm-eval asks of a model in its tasks, and what its own Hugging Face model answers.

    ENV/bin/python -m tools.goldens.lm_eval --output tests/goldens

Run it in the root of the repository, to which the tasks in OUTPUT/lm_eval refer. It reads the model
that `tools.goldens.families` wrote to OUTPUT/llama, and writes a tokenizer for its 67 tokens and
texts that greedy decoding continues as written.
"""

import argparse
import json
import string
from importlib.metadata import version
from pathlib import Path

import lm_eval
import tokenizers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from tools.goldens.families import model_from

LENGTH = 31  # tokens that the model reads at once
SPECIAL = ('<unk>', '<s>', '</s>')
LETTERS = string.ascii_lowercase + string.digits + ' \n.:?'
# A space and the letter after it are one token, so a continuation changes the tokens before it.
MERGES = [(' ', letter) for letter in 'aeinoprstuwyz0124']
MERGES += [('e', 's'), ('t', 'h'), ('th', 'e'), (' ', 'the'), (' y', 'es'), (' n', 'o')]
# Tokens across the border, and a space that belongs to the continuation.
BORDERS = [{'before': 'so at', 'last': 'he z'}, {'before': 'then ', 'last': '1'}]
STARTS = [f'{word} {letter}' for word in ('so', 'then', 'now', 'up') for letter in 'abcdefgh']


class Recorder(HFLM):
    """Keeps every request with its answer."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.asked = {}

    def loglikelihood(self, requests, disable_tqdm=False):
        return self._keep('loglikelihood', requests, super().loglikelihood(requests))

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return self._keep(
            'loglikelihood_rolling', requests, super().loglikelihood_rolling(requests)
        )

    def generate_until(self, requests, disable_tqdm=False):
        # Here the last token counts, though the model need not read it.
        self._max_length = LENGTH + 1
        answers = super().generate_until(requests)
        self._max_length = LENGTH
        return self._keep('generate_until', requests, answers)

    def _keep(self, kind, requests, answers):
        self.asked[kind] = [[*one.args, answer] for one, answer in zip(requests, answers)]
        return answers


def main() -> None:
    flags = parse()
    logging.disable_progress_bar()
    directory = flags.output / 'lm_eval'
    tokenizer = make_tokenizer(directory)
    model = Recorder(
        pretrained=model_from(flags.output / 'llama'),
        tokenizer=tokenizer,
        max_length=LENGTH,
        device='cpu',
        batch_size=1,
    )
    write_last_words(directory / 'last_word.jsonl', model)
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=manager.all_subtasks, task_manager=manager, bootstrap_iters=0
    )
    golden = {
        'versions': {name: version(name) for name in ('lm_eval', 'torch', 'transformers')},
        'max_length': LENGTH,
        'results': found['results'],
        **model.asked,
    }
    text = json.dumps(golden, indent=1, ensure_ascii=False)
    (directory / 'golden.json').write_text(text + '\n', 'utf-8')


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--output', type=Path, required=True)
    return parser.parse_args(argv)


def make_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Writes the tokenizer, without BOS, and opens it."""
    tokens = [*SPECIAL, *LETTERS, *map(''.join, MERGES)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    assert len(vocabulary) == 67, len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, MERGES, unk_token=SPECIAL[0]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(directory / 'tokenizer.json'))
    names = {'unk_token': SPECIAL[0], 'eos_token': SPECIAL[2]}
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **names}
    (directory / 'tokenizer_config.json').write_text(json.dumps(config) + '\n', 'utf-8')
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def write_last_words(path: Path, model: HFLM) -> None:
    """Writes texts with the two tokens that greedy decoding adds, and with others."""
    rows = []
    for start in STARTS:
        ids = model.tok_encode(start)
        inputs = model.tokenizer(start, return_tensors='pt').input_ids
        new = model.model.generate(inputs, max_new_tokens=2, do_sample=False)[0].tolist()
        last = model.tok_decode(new[len(ids) :])
        if len(new) == len(ids) + 2 and model.tok_encode(start + last) == new:
            rows.append({'before': start, 'last': last})
            rows.append({'before': start, 'last': last[:-1] + 'q'})
    assert len(rows) >= 8, rows
    rows = [*rows[:8], *BORDERS]
    lines = [json.dumps(row) + '\n' for row in rows]
    path.write_text(''.join(lines), 'utf-8')


if __name__ == '__main__':
    main()
