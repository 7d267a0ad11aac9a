"""The sampling engine: `lend` it weights, `add` requests, call `step()` until it has no work.

The engine is synchronous and has no threads. It decodes `slots` sequences together; a slot that
becomes free takes a waiting request at the next step. Shapes are static: prompts are padded to
powers of two, and a compiled call decodes `decode_steps` tokens. Weights are an argument of every
call, so new weights need no recompilation. B slots, T padded prompt length, V vocabulary.
"""

import collections
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm import sharding
from jaxfm.errors import DataError
from jaxfm.models import kv_cache
from jaxfm.models.transformer import compute_dtype
from jaxfm.ops.logprobs import logits
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.logits import sample_tokens
from jaxfm.sampling.request import Event, Request


class Sampler:
    """Continuous batching over a contiguous key-value cache, with weights lent by the caller.

    Args:
      merge: {path: array} -> model, such as `Parts.merge`.
      model_config: a TransformerConfig.
    """

    def __init__(self, merge, model_config, config: SamplingConfig, mesh):
        self.config, self._mesh = config, mesh
        self._params = self._version = None
        self._slots = sharding.whole_rows(config.slots, mesh)
        self._merge = merge
        self._vocab_size = model_config.vocab_size
        self._context_length = model_config.context_length
        self._new_cache = jax.jit(
            lambda: kv_cache.init_cache(
                model_config, self._slots, config.max_length, compute_dtype(model_config)
            )
        )
        self._cache = None  # allocated when the first request is admitted
        self._waiting = collections.deque()
        self._requests: list[Request | None] = [None] * self._slots
        self._produced = [0] * self._slots
        self._last = np.zeros(self._slots, np.int32)  # the last token of each slot
        self._prefill = jax.jit(self._prefill_slots, donate_argnums=1)
        self._decode = jax.jit(self._decode_slots, donate_argnums=1)

    def lend(self, params, version: int) -> None:
        """Sets the weights that the following steps use. They are not copied.

        It may be called at any time between steps. Running requests go on with the new weights, but
        keep the keys and values that the old weights computed.

        Args:
          params: {path: array}.
          version: the training step of the weights.
        """
        self._params, self._version = params, version

    @property
    def version(self) -> int | None:
        """The version of the lent weights; None before the first `lend`."""
        return self._version

    def _check_weights(self) -> None:
        """Raises RuntimeError unless weights have been lent."""
        if self._params is None:
            raise RuntimeError(
                'the sampler has no weights: call lend(params, version) before add() and step()'
            )

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._waiting) or any(self._requests)

    def add(self, request: Request) -> None:
        """Queues a request. Raises RuntimeError without weights, and DataError as `check` does."""
        self._check_weights()
        self.check(request)
        self._waiting.append(request)

    def check(self, request: Request) -> None:
        """Raises DataError unless the engine can serve a request; needs no weights.

        It rejects an empty prompt, ids outside the vocabulary, and requests with more tokens than
        sampling.max_length or the model's context length.
        """
        tokens = np.asarray(request.tokens)
        if tokens.size == 0:
            raise DataError(f'request {request.id}: the prompt is empty')
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise DataError(
                f'request {request.id}: token ids range from {tokens.min()} to {tokens.max()}, but '
                f'the vocabulary has {self._vocab_size} ids'
            )
        length = tokens.size + request.max_tokens
        if length > self.config.max_length:
            raise DataError(
                f'request {request.id}: {tokens.size} prompt + {request.max_tokens} new tokens = '
                f'{length} exceed sampling.max_length {self.config.max_length}'
            )
        if self._context_length and length > self._context_length:
            raise DataError(
                f'request {request.id}: {tokens.size} prompt + {request.max_tokens} new tokens = '
                f'{length} exceed the context length of {self._context_length} that the model was '
                'trained for (config.model.context_length)'
            )

    def cancel(self, request_id: str) -> None:
        """Cancels a waiting or running request; unknown ids are ignored."""
        self._waiting = collections.deque(r for r in self._waiting if r.id != request_id)
        for slot, request in enumerate(self._requests):
            if request is not None and request.id == request_id:
                self._requests[slot] = None

    def step(self) -> list[Event]:
        """Admits waiting requests if a slot is free; otherwise decodes all running requests.

        Raises RuntimeError without weights.
        """
        self._check_weights()
        free = [slot for slot, request in enumerate(self._requests) if request is None]
        if self._waiting and free:
            return self._admit(free)
        return self._advance() if any(self._requests) else []

    def _admit(self, free: Iterable[int]) -> list[Event]:
        admitted = []
        for slot in free:
            if not self._waiting:
                break
            self._requests[slot], self._produced[slot] = self._waiting.popleft(), 0
            admitted.append(slot)
        longest = max(len(self._requests[slot].tokens) for slot in admitted)
        bucket = min(self.config.max_length, max(16, 1 << (longest - 1).bit_length()))
        tokens = np.zeros((self._slots, bucket), np.int32)
        lengths = np.zeros(self._slots, np.int32)
        for slot in admitted:
            prompt = self._requests[slot].tokens
            tokens[slot, : len(prompt)] = prompt
            lengths[slot] = len(prompt)
        if self._cache is None:
            self._cache = self._new_cache()
        rows = dict(tokens=tokens, lengths=lengths, **self._sampling_rows())
        return self._run(self._prefill, rows, admitted)

    def _advance(self) -> list[Event]:
        running = [slot for slot, request in enumerate(self._requests) if request is not None]
        positions = np.full(self._slots, -1, np.int32)
        for slot in running:
            positions[slot] = len(self._requests[slot].tokens) + self._produced[slot] - 1
        rows = dict(last=self._last, positions=positions, **self._sampling_rows())
        return self._run(self._decode, rows, running)

    def _sampling_rows(self) -> dict[str, np.ndarray]:
        temperature = np.zeros(self._slots, np.float32)
        seeds = np.zeros((self._slots, 2), np.uint32)
        for slot, request in enumerate(self._requests):
            if request is not None:
                temperature[slot] = request.temperature
                seeds[slot] = request.seed, request.sample_index
        return dict(temperature=temperature, seeds=seeds)

    def _run(self, function, rows, slots) -> list[Event]:
        rows = sharding.distribute(rows, self._mesh)
        self._cache, sampled = function(self._params, self._cache, rows)
        tokens, logprobs, sampling_logprobs = jax.device_get(sampled)  # [steps, slots] each
        events = [
            self._event(slot, tokens[:, slot], logprobs[:, slot], sampling_logprobs[:, slot])
            for slot in slots
        ]
        return events

    def _event(self, slot: int, tokens, logprobs, sampling_logprobs) -> Event:
        """Cuts new tokens at the request's end, because decoding may have run past it."""
        request = self._requests[slot]
        count = min(len(tokens), request.max_tokens - self._produced[slot])
        reason = 'length' if self._produced[slot] + count == request.max_tokens else None
        for index, token in enumerate(tokens[:count].tolist()):
            if token in request.stop_ids:
                count, reason = index + 1, 'stop'
                break
        self._produced[slot] += count
        self._last[slot] = tokens[count - 1]
        if reason:
            self._requests[slot] = None
        kept = (x[:count].tolist() for x in (tokens, logprobs, sampling_logprobs))
        return Event(request.id, *kept, finish_reason=reason)

    def _prefill_slots(self, params, cache, rows):
        """Fills the cache of admitted slots and samples their first token; leaves others alone."""
        model = self._merge(params)
        tokens_BT, lengths_B = rows['tokens'], rows['lengths']
        T = tokens_BT.shape[1]
        positions_BT = jnp.broadcast_to(
            jnp.arange(T, dtype=jnp.int32),
            tokens_BT.shape,
            out_sharding=sharding.activation('batch', 'position'),
        )
        segment_ids_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
        hidden_BTD, extras = model(tokens_BT, positions_BT, segment_ids_BT, cache)
        is_last_BT = positions_BT == lengths_B[:, None] - 1
        last_BD = jnp.sum(jnp.where(is_last_BT[..., None], hidden_BTD, 0), axis=1)
        sampled = self._sample(model, last_BD, rows, lengths_B)
        # Every process reads all sampled tokens, so that all of them make the same schedule.
        return extras['cache'], tuple(sharding.replicate(x)[None] for x in sampled)

    def _decode_slots(self, params, cache, rows):
        """Decodes `decode_steps` tokens in every slot; position -1 marks an empty slot."""
        model = self._merge(params)
        running_B = (rows['positions'] >= 0).astype(jnp.int32)

        def body(carry, _):
            cache, last_B, positions_B = carry
            # A request may end within this call: the cache drops writes past its end.
            hidden_B1D, extras = model(
                last_B[:, None], positions_B[:, None], running_B[:, None], cache
            )
            sampled = self._sample(model, hidden_B1D[:, 0], rows, positions_B + 1)
            return (extras['cache'], sampled[0], positions_B + 1), sampled

        carry = (cache, rows['last'], rows['positions'])
        (cache, *_), sampled = lax.scan(body, carry, length=self.config.decode_steps)
        return cache, tuple(sharding.replicate(x) for x in sampled)

    def _sample(self, model, hidden_BD, rows, positions_B):
        logits_B1V = logits(hidden_BD[:, None], model.unembed())
        logits_BV = sharding.place(logits_B1V, 'batch', None, None)[:, 0]
        return sample_tokens(logits_BV, rows['temperature'], rows['seeds'], positions_B)


def complete(
    sampler: Sampler, requests: Iterable[Request], params, version: int, stop=None
) -> dict[str, list[Event]]:
    """Lends weights to the sampler and runs all requests to completion -> {id: events}.

    params, version: as in `Sampler.lend`.
    stop: called with (request id, all its tokens so far) after each event; True ends that request.
    """
    sampler.lend(params, version)
    events = {}
    for request in requests:
        sampler.add(request)
        events[request.id] = []
    while sampler.has_work:
        for event in sampler.step():
            events[event.id].append(event)
            if stop and event.finish_reason is None:
                if stop(event.id, [t for e in events[event.id] for t in e.tokens]):
                    sampler.cancel(event.id)
    return events
