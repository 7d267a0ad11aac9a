"""Case `requests`: completing requests of mixed lengths, against transformers and llama.cpp.

Lengths are those of ShareGPT conversations (shared/data), a quarter as long: prompts of at most 256
tokens, answers of at most 128. Without that file they are log-normal with the same medians. Prompts
are random ids, so none shares a prefix; decoding is greedy and ignores end ids, so that everybody
produces the same number of tokens.

Each library first completes a few requests with each of its settings, and goes on with the fastest.
"""

import contextlib
import csv
import dataclasses
import gzip
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxfm.sampling.complete import complete
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Request
from tools.bench.decode.models import ROOT, Model, random_prompts
from tools.bench.decode.peer import Peer
from tools.bench.decode.timing import alternate, bar, ratios, spread, timed

LENGTHS = Path('data') / 'serving_sharegpt_lengths' / 'lengths_cl100k.csv.gz'
SCALE, MOST_PROMPT, MOST_ANSWER = 4, 256, 128
FIRST_ID = 32  # most vocabularies begin with special tokens
COUNT, TRIALS, SEED = 128, 32, 0
SLOTS = (32, 64)
LIMITS = {'transformers': 2.5, 'llama.cpp': 1.0}


@dataclasses.dataclass(frozen=True)
class Library:
    """A peer: {setting: how to start it}."""

    name: str
    settings: dict[str, Callable[[], Peer]]


def transformers(python: str, model: Path, threads: int) -> Library:
    """Static batches of 32, with either kind of cache."""

    def start(cache: str) -> Peer:
        flags = [f'--model={model}', f'--threads={threads}', f'--cache={cache}']
        return Peer(python, 'transformers_generate.py', *flags)

    return Library('transformers', {x: lambda x=x: start(x) for x in ('dynamic', 'static')})


def llama_cpp(python: str, model: Path, threads: int) -> Library:
    """Parallel slots and continuous batching."""

    def start(slots: int, flash: str, cache: str) -> Peer:
        flags = [
            f'--model={model}',
            f'--threads={threads}',
            f'--length={MOST_PROMPT + MOST_ANSWER}',
        ]
        flags += [f'--slots={slots}', f'--flash={flash}', f'--cache={cache}']
        return Peer(python, 'llama_cpp.py', *flags)

    # A cache in f32 takes longer, with flash attention (1.3 times) and without (1.1 times).
    settings = [(16, 'on', 'f16'), (32, 'on', 'f16')]
    named = {'{} slots, flash attention {}, cache {}'.format(*each): each for each in settings}
    return Library('llama.cpp', {name: lambda x=x: start(*x) for name, x in named.items()})


def make_requests(count: int, vocab_size: int) -> tuple[list[dict], str]:
    """-> requests in the form that the peers read, and where their lengths come from."""
    places = (place / 'shared' / LENGTHS for place in (ROOT, ROOT.parent))
    path = next((place for place in places if place.exists()), None)
    random = np.random.default_rng(SEED)
    if path:
        with gzip.open(path, 'rt', encoding='utf-8') as file:
            table = list(csv.DictReader(file))
        rows = [table[i] for i in random.permutation(len(table))[:count]]
        lengths = [(int(row['prompt_tokens']), int(row['output_tokens'])) for row in rows]
    else:
        lengths = np.exp(random.normal(np.log([134, 121]), 1.3, (count, 2))).tolist()
    lengths = [
        (_scale(prompt, MOST_PROMPT), _scale(answer, MOST_ANSWER)) for prompt, answer in lengths
    ]
    prompts = random_prompts([prompt for prompt, _ in lengths], vocab_size, SEED, FIRST_ID)
    requests = [
        {'tokens': tokens, 'max_tokens': answer}
        for tokens, (_, answer) in zip(prompts, lengths, strict=True)
    ]
    return requests, path.name if path else 'log-normal'


def _scale(length: float, most: int) -> int:
    return max(1, min(most, round(length / SCALE)))


def measure(
    model: Model, libraries: list[Library], repeats: int, count: int = COUNT, slots=SLOTS
) -> dict:
    """Samples a second of every library, in alternation."""
    requests, source = make_requests(count, model.config.vocab_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(model.mesh))
        works = {f'ours, {n} slots': Ours(model, n).complete for n in slots}
        settings = {}
        for library in libraries:
            peer, settings[library.name] = _fastest(library, requests[:TRIALS])
            works[library.name] = stack.enter_context(peer).ask
        results = alternate(
            {name: lambda work=work: work(requests) for name, work in works.items()},
            repeats,
            warm_up=0,
        )
    _check(results, requests)
    best = min(
        (name for name in results if name.startswith('ours')),
        key=lambda name: statistics.median(results[name]['seconds']),
    )
    return {
        'model': model.name,
        'lengths': source,
        'requests': len(requests),
        'prompt_tokens': sum(len(request['tokens']) for request in requests),
        'answer_tokens': sum(request['max_tokens'] for request in requests),
        'settings': settings,
        'results': {
            name: {k: v for k, v in result.items() if k != 'tokens'}
            for name, result in results.items()
        },
        'fastest': best,
        'vs': {library.name: ratios(results, best, library.name) for library in libraries},
    }


def _fastest(library: Library, requests: list[dict]) -> tuple[Peer, dict]:
    """-> a peer with the setting that completes some requests fastest, and what was tried."""
    best, tried = None, {}
    for name, start in library.settings.items():
        peer = start()
        peer.ask(requests[:2])
        seconds = timed(lambda peer=peer: peer.ask(requests))['seconds']
        tried[name] = {'seconds': seconds, 'requests': len(requests), 'about': peer.about}
        if best is None or seconds < best[0]:
            best, peer = (seconds, peer), best and best[1]
        if peer:
            peer.close()
    return best[1], tried


class Ours:
    """Our engine, compiled."""

    def __init__(self, model: Model, slots: int):
        self._params, self._version = model.params, 0
        self._sampler: Sampler = model.sampler(slots=slots, max_length=MOST_PROMPT + MOST_ANSWER)
        self._sampler.warm_up()

    def complete(self, requests: list[dict]) -> dict:
        """As the peers. Another version of the weights, so nothing is known of earlier prompts."""
        self._version += 1
        made = [
            Request(str(i), request['tokens'], request['max_tokens'], temperature=0.0)
            for i, request in enumerate(requests)
        ]
        compiled = self._sampler.counters.compilations
        answers = complete(self._sampler, made, self._params, self._version)
        return {
            'tokens': [len(answers[request.id][0].tokens) for request in made],
            'compilations': self._sampler.counters.compilations - compiled,
        }


def _check(results: dict, requests: list[dict]) -> None:
    """Raises RuntimeError unless everybody gave each request all of its tokens."""
    wanted = [request['max_tokens'] for request in requests]
    for name, result in results.items():
        if any(counts != wanted for counts in result['tokens']):
            raise RuntimeError(f'{name} produced {result["tokens"]} tokens, not {wanted}')


def bars(figures: dict) -> list[dict]:
    """Programs compiled after the warm-up, and samples a second over those of each peer."""
    compiled = figures['results'][figures['fastest']]['compilations']
    return [bar('compiled after the warm-up', compiled, 0, is_least=False)] + [
        bar(f'samples/s vs {name}', values, LIMITS[name]) for name, values in figures['vs'].items()
    ]


def show(figures: dict) -> None:
    """A line for every library."""
    print(
        f'{figures["requests"]} requests, {figures["prompt_tokens"]} tokens of prompts, '
        f'{figures["answer_tokens"]} of answers ({figures["lengths"]}), {figures["model"]}'
    )
    for name, result in figures['results'].items():
        rates = [figures['requests'] / seconds for seconds in result['seconds']]
        cpu = statistics.median(result['cpu_seconds'])
        print(f'  {name:16} {spread(rates)} samples/s, {cpu:.1f} CPU-s')
    for name, tried in figures['settings'].items():
        for setting, one in tried.items():
            print(f'  {name}, {setting}: {one["seconds"]:.1f} s for {one["requests"]}')
