"""Case `step`: the engine against the bare decode step.

The bare step is a jitted loop over the same model, pages and `sample_tokens`, for as many steps as
a call of the engine, at the same positions; nothing but the sampled ids reaches the host. `argmax`
is such a loop that takes the likeliest id and knows no log-probs.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm import sharding
from jaxfm.models import kv_cache
from jaxfm.models.transformer import compute_dtype
from jaxfm.ops.logprobs import logits
from jaxfm.sampling import options
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.logits import sample_tokens
from jaxfm.sampling.request import Request
from tools.bench.decode.models import Model, random_prompts
from tools.bench.decode.timing import alternate, bar, ratios, spread

BATCHES, PROMPT, STEPS, PAGE = (1, 8, 32), 64, 16, 16
SAMPLINGS = {'greedy': 0.0, 'temperature 1': 1.0}


def measure(model: Model, repeats: int, batches=BATCHES, prompt: int = PROMPT) -> dict:
    """Tokens a second of the engine and the bare step, for every batch size and sampling."""
    rows = [
        _measure(model, batch, name, temperature, repeats, prompt)
        for batch in batches
        for name, temperature in SAMPLINGS.items()
    ]
    return {'model': model.name, 'prompt': prompt, 'steps': STEPS, 'rows': rows}


def _measure(model: Model, batch: int, name: str, temperature, repeats, prompt) -> dict:
    length = max(384, prompt + STEPS * (repeats + 8))
    with jax.set_mesh(model.mesh):
        engine = Engine(model, batch, temperature, prompt, length)
        works = {'engine': engine.step, 'bare': Bare(model, engine, sample_tokens).step}
        if temperature == 0:
            works['argmax'] = Bare(model, engine, None).step
        begun = statistics.mean(engine.lengths.values())
        results = alternate(works, repeats)
    context = begun + STEPS * (repeats + 2) / 2  # the mean over the repeats
    return {
        'batch': batch,
        'sampling': name,
        'results': results,
        'engine_vs_bare': ratios(results, 'engine', 'bare'),
        'bytes_per_step': model.weight_bytes + batch * context * model.token_bytes,
        'tokens_per_second': {
            work: [batch * STEPS / seconds for seconds in results[work]['seconds']]
            for work in works
        },
    }


class Engine:
    """An engine all of whose sequences decode, and how long they are.

    Attributes:
      requests: in the order of their rows.
      lengths, last: {id: number of tokens so far}, {id: the last one}.
    """

    def __init__(self, model: Model, batch: int, temperature, prompt: int, length: int):
        self.length = length
        prompts = random_prompts([prompt] * batch, model.config.vocab_size, seed=batch)
        self.requests = [
            Request(str(i), tokens, length - prompt, temperature=temperature, seed=i)
            for i, tokens in enumerate(prompts)
        ]
        self.lengths = {request.id: prompt for request in self.requests}
        self.last: dict[str, int] = {}
        self.sampler: Sampler = model.sampler(
            slots=batch, max_length=length, decode_steps=STEPS, page_size=PAGE
        )
        for request in self.requests:
            self.sampler.add(request)
        while len(self.last) < batch:
            self._advance()
        self._expected = batch * STEPS
        self.step()

    def step(self) -> None:
        """A step in which every sequence gets its tokens."""
        if (count := self._advance()) != self._expected:
            raise RuntimeError(f'the engine decoded {count} tokens, not {self._expected}')

    def _advance(self) -> int:
        before = self.sampler.counters.decoded_tokens
        for event in self.sampler.step():
            self.lengths[event.id] += len(event.tokens)
            self.last[event.id] = event.tokens[-1]
        return self.sampler.counters.decoded_tokens - before


class Bare:
    """The decode step alone, with pages of its own, from where an engine is now.

    sample: `sample_tokens`, or None for the likeliest ids.
    """

    def __init__(self, model: Model, engine: Engine, sample):
        requests = engine.requests
        table = -(-engine.length // PAGE)
        rows = {
            'page_table': 1 + np.arange(len(requests) * table, dtype=np.int32).reshape(-1, table),
            'options': options.rows(dict(enumerate(requests)), len(requests)),
        }
        ids = [request.id for request in requests]
        state = {
            'last': np.array([engine.last[i] for i in ids], np.int32),
            'positions': np.array([engine.lengths[i] - 1 for i in ids], np.int32),
        }
        self._params = model.params
        self._rows, self._state = (sharding.distribute(x, model.mesh) for x in (rows, state))
        num_pages, dtype = 1 + len(requests) * table, compute_dtype(model.config)
        self._cache = jax.jit(lambda: kv_cache.init_cache(model.config, num_pages, PAGE, dtype))()
        self._run = jax.jit(functools.partial(_decode, model.parts.merge, sample), donate_argnums=1)

    def step(self) -> None:
        """As many steps as a call of the engine; the sampled ids are on the host at the end."""
        self._cache, self._state, tokens = self._run(
            self._params, self._cache, self._state, self._rows
        )
        np.asarray(tokens)


def _decode(merge, sample, params, cache, state, rows):
    with sharding.whole_positions():
        model = merge(params)

        def body(step, carry):
            cache, last_B, positions_B, tokens_KB = carry
            cache = kv_cache.with_table(cache, rows['page_table'])
            ones_B1 = jnp.ones_like(last_B)[:, None]
            hidden_B1D, extras = model(last_B[:, None], positions_B[:, None], ones_B1, cache)
            logits_BV = logits(hidden_B1D, model.unembed())[:, 0]
            at_B = positions_B + 1
            if sample:
                last_B = sample(logits_BV, rows['options'], at_B).tokens
            else:
                last_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
            tokens_KB = lax.dynamic_update_index_in_dim(tokens_KB, last_B, step, 0)
            return kv_cache.with_table(extras['cache'], None), last_B, at_B, tokens_KB

        last_B, positions_B = state['last'], state['positions']
        spec = sharding.activation(None, 'batch')
        tokens_KB = jnp.zeros((STEPS, *last_B.shape), jnp.int32, out_sharding=spec)
        carry = cache, last_B, positions_B, tokens_KB
        cache, last_B, positions_B, tokens_KB = lax.fori_loop(0, STEPS, body, carry)
        return cache, {'last': last_B, 'positions': positions_B}, tokens_KB


def bars(figures: dict) -> list[dict]:
    """The engine may cost a twentieth."""
    return [
        bar(f'engine vs bare, batch {r["batch"]}, {r["sampling"]}', r['engine_vs_bare'], 0.95)
        for r in figures['rows']
    ]


def show(figures: dict) -> None:
    """A line for every batch size and sampling."""
    print(f'{figures["model"]}, prompts of {figures["prompt"]}, {figures["steps"]} steps a call')
    for row in figures['rows']:
        rates = row['tokens_per_second']
        told = '  '.join(f'{name} {spread(values, 1)}' for name, values in rates.items())
        print(f'  batch {row["batch"]:2} {row["sampling"]:14} tokens/s: {told}')
