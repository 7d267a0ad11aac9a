"""Completes requests with transformers in static batches, as the peer of tools.bench.decode.

It needs torch and transformers, and none of our code. Each line of stdin is a JSON list of
requests, {"tokens": [ids], "max_tokens": number}; each line of stdout says how long they took and
how many tokens each got. Requests form batches as they come; prompts are padded on the left, and
`generate` runs each batch to its longest answer. Decoding is greedy and ignores end ids.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
import transformers


def main() -> None:
    flags = parse()
    torch.set_num_threads(flags.threads)
    began = time.perf_counter()
    model = load(flags)
    about = {'transformers': transformers.__version__, 'torch': torch.__version__}
    told = vars(flags) | {'model': Path(flags.model).name}
    about |= {'flags': told, 'load_seconds': time.perf_counter() - began}
    _tell(about)
    for line in sys.stdin:
        requests = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        counts = []
        for start in range(0, len(requests), flags.batch):
            counts += complete(model, requests[start : start + flags.batch], flags.cache)
        took = {
            'seconds': time.perf_counter() - began,
            'cpu_seconds': time.process_time() - cpu,
            'max_rss': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        }
        _tell(took | {'tokens': counts})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--model', required=True, help="a directory in Hugging Face's layout")
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--cache', choices=('dynamic', 'static'), default='dynamic')
    return parser.parse_args(argv)


def load(flags: argparse.Namespace):
    """The model in float32, which never ends an answer by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def complete(model, requests: list[dict], cache: str) -> list[int]:
    """-> the number of tokens of each greedy completion, of one batch."""
    longest = max(len(request['tokens']) for request in requests)
    padding = [longest - len(request['tokens']) for request in requests]
    ids = [[0] * pad + request['tokens'] for pad, request in zip(padding, requests)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    with torch.inference_mode():
        answers = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=max(request['max_tokens'] for request in requests),
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )[:, longest:]
    return [
        min(len(answer), request['max_tokens'])
        for answer, request in zip(answers.tolist(), requests)
    ]


def _tell(record: dict) -> None:
    print(json.dumps(record), flush=True)


if __name__ == '__main__':
    main()
