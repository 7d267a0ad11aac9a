"""Completes requests with llama.cpp's server and parallel slots, as the peer of tools.bench.decode.

It needs xllamacpp (PyPI), which contains the server, and none of our code. Each line of stdin is a
JSON list of requests, {"tokens": [ids], "max_tokens": number}; each line of stdout says how long
they took and how many tokens each got. Decoding is greedy and ignores end ids. Requests wait in the
server's queue and start as slots become free (continuous batching); prompts are not cached.
"""

import argparse
import concurrent.futures
import json
import resource
import sys
import time
from pathlib import Path

import xllamacpp as llama


def main() -> None:
    flags = parse()
    began = time.perf_counter()
    server = start(flags)
    told = vars(flags) | {'model': Path(flags.model).name}
    about = {'xllamacpp': llama.__version__, 'flags': told}
    _tell(about | {'load_seconds': time.perf_counter() - began})
    with concurrent.futures.ThreadPoolExecutor(1024) as pool:
        for line in sys.stdin:
            requests = json.loads(line)
            began, cpu = time.perf_counter(), time.process_time()
            counts = list(pool.map(lambda request: complete(server, request), requests))
            took = {
                'seconds': time.perf_counter() - began,
                'cpu_seconds': time.process_time() - cpu,
                'max_rss': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            }
            _tell(took | {'tokens': counts})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--model', required=True, help='a .gguf file')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--slots', type=int, default=32)
    parser.add_argument('--length', type=int, default=384, help='tokens of a slot')
    parser.add_argument('--ubatch', type=int, default=512, help='tokens of a forward pass')
    parser.add_argument('--flash', choices=('on', 'off'), default='on', help='flash attention')
    parser.add_argument('--cache', choices=('f16', 'f32'), default='f16', help='of keys and values')
    return parser.parse_args(argv)


def start(flags: argparse.Namespace) -> llama.Server:
    """A server with everything off that the requests do not need."""
    params = llama.CommonParams()
    params.model.path = flags.model
    params.n_parallel, params.n_ctx = flags.slots, flags.slots * flags.length
    params.n_batch, params.n_ubatch = max(2048, flags.ubatch), flags.ubatch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = flags.threads
    params.n_gpu_layers = 0
    on = llama.llama_flash_attn_type
    params.flash_attn_type = {
        'on': on.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        'off': on.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }[flags.flash]
    kinds = llama.ggml_type
    kind = {'f16': kinds.GGML_TYPE_F16, 'f32': kinds.GGML_TYPE_F32}[flags.cache]
    params.cache_type_k = params.cache_type_v = kind
    params.cont_batching = True
    params.cache_prompt, params.cache_ram_mib, params.n_ctx_checkpoints = False, 0, 0
    params.fit_params = False
    return llama.Server(params)


def complete(server: llama.Server, request: dict) -> int:
    """-> the number of tokens of the greedy completion."""
    answer = server.handle_completions(
        {
            'prompt': request['tokens'],
            'max_tokens': request['max_tokens'],
            'ignore_eos': True,
            'cache_prompt': False,
            'temperature': 0.0,
            'samplers': ['top_k'],
            'top_k': 1,
            'repeat_penalty': 1.0,
        }
    )
    if 'usage' not in answer:
        raise SystemExit(f'llama.cpp: {answer}')
    return answer['usage']['completion_tokens']


def _tell(record: dict) -> None:
    print(json.dumps(record), flush=True)


if __name__ == '__main__':
    main()
