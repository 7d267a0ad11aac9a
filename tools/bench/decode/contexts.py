"""Case `context`: decoding and memory against the length of the context, with a small model.

Every context is measured in a process of its own, so that the peak of its memory is its own.
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys

import jax

from jaxfm.sampling.complete import complete
from jaxfm.sampling.request import Request
from tools.bench.decode.models import ROOT, make_small, random_prompts
from tools.bench.decode.timing import spread, timed

CONTEXTS, BATCHES = (1024, 4096, 8192, 16384, 32768), (1, 4)
# Of a batch: its contexts must be computed first, which costs their square.
MOST_TOKENS = 32768
STEPS, PAGE = 16, 16
_WARM_UP = 1024  # tokens of a prompt; longer ones come in the same sizes of chunks


def measure(repeats: int, threads: int, contexts=CONTEXTS, batches=BATCHES) -> dict:
    """Tokens a second and bytes, for every context and batch size of at most MOST_TOKENS."""
    rows = []
    for context in contexts:
        fitting = [batch for batch in batches if batch * context <= MOST_TOKENS]
        job = {'context': context, 'batches': fitting, 'repeats': repeats}
        command = [sys.executable, '-m', 'tools.bench.decode', '--out=.', f'--threads={threads}']
        done = subprocess.run(
            [*command, f'--context_once={json.dumps(job)}'],
            check=True,
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        rows += json.loads(done.stdout)
    return {'model': 'random, 4 layers of 256', 'steps': STEPS, 'rows': rows}


def measure_once(context: int, batches, repeats: int) -> list[dict]:
    """A row for each batch size, ascending; `peak_rss` is the process's so far."""
    return [_measure(context, batch, repeats) for batch in batches]


def _measure(context: int, batch: int, repeats: int) -> dict:
    model = make_small()
    before = _peak_rss()
    length = context + STEPS * (repeats + 4)
    sampler = model.sampler(slots=batch, max_length=length, page_size=PAGE, decode_steps=STEPS)

    def begin(context: int, seed: int) -> dict:
        """Fills the pages, so that all sequences decode -> how long that took."""
        prompts = random_prompts([context] * batch, model.config.vocab_size, seed)
        requests = [Request(str(i), tokens, 1, temperature=0.0) for i, tokens in enumerate(prompts)]
        took = timed(lambda: _prefill(sampler, requests, model.params))
        # Now the prompts are known, so all sequences begin to decode at the same time.
        for request in requests:
            sampler.add(dataclasses.replace(request, max_tokens=length - context))
        while not _is_full(sampler, batch):
            continue
        return took

    with jax.set_mesh(model.mesh):
        # Compiles what follows, and not all programs: there are other ones for every context.
        begin(min(context, _WARM_UP), seed=1)
        for index in range(batch):
            sampler.cancel(str(index))
        compiled = sampler.counters.compilations
        filled = begin(context, seed=0)
        results = [timed(lambda: _step(sampler, batch)) for _ in range(repeats)]
        if sampler.counters.compilations > compiled:
            raise RuntimeError('a program was compiled while the time was taken')
    pages = batch * -(-length // PAGE) + 1
    return {
        'context': context,
        'batch': batch,
        'page_bytes': pages * PAGE * model.token_bytes,
        'rss_before': before,
        'peak_rss': _peak_rss(),
        'prefill': filled,
        'results': {name: [one[name] for one in results] for name in results[0]},
        'tokens_per_second': [batch * STEPS / one['seconds'] for one in results],
    }


def _prefill(sampler, requests, params) -> None:
    complete(sampler, requests, params, sampler.version)


def _is_full(sampler, batch: int) -> bool:
    """Takes a step -> whether all sequences have decoded as much as they can."""
    before = sampler.counters.decoded_tokens
    sampler.step()
    return sampler.counters.decoded_tokens - before == batch * STEPS


def _step(sampler, batch: int) -> None:
    if not _is_full(sampler, batch):
        raise RuntimeError('a sequence did not decode as much as it could')


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def show(figures: dict) -> None:
    """A line for every context and batch size."""
    print(f'{figures["model"]}, {figures["steps"]} steps a call')
    for row in figures['rows']:
        rate = row['batch'] * row['context'] / row['prefill']['seconds']
        cpu = statistics.median(row['results']['cpu_seconds'])
        print(
            f'  context {row["context"]:6} batch {row["batch"]}: '
            f'{spread(row["tokens_per_second"], 1)} tokens/s, '
            f'{cpu / figures["steps"] * 1e3:.1f} CPU-ms a step, prefill {rate:.0f} tokens/s, '
            f'pages {row["page_bytes"] / 1e6:.1f} MB, peak RSS {row["peak_rss"] / 1e6:.0f} MB '
            f'({row["rss_before"] / 1e6:.0f} before)'
        )
