"""The sampling engine: `lend` it weights, `add` requests, call `step()` until it has no work.

The engine is synchronous and has no threads. A step admits waiting requests, stores chunks of their
prompts in pages, and decodes all requests whose prompt is stored, so that a long prompt does not
stall the others. The keys and values of a common prefix are stored once. Shapes are static: chunks
and decode calls come in a few sizes, each compiled once. `warm_up` compiles them ahead.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Sequences

import jax

from jaxfm import sharding
from jaxfm.errors import ConfigError, DataError
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.logits import Sampled
from jaxfm.sampling.options import Extras
from jaxfm.sampling.output import Output
from jaxfm.sampling.packed import pack
from jaxfm.sampling.programs import Programs, read_sampled
from jaxfm.sampling.request import Event, Meter, Request, check_request
from jaxfm.sampling.rows import Rows
from jaxfm.sampling.scheduler import Scheduler, Sequence

# A decode call with rows to spare costs nearly as much as a full one, so prompts go first while
# fewer sequences decode than wait for theirs; but after this many chunks the others go on.
_MOST_CHUNKS = 4


@dataclasses.dataclass
class Counters:
    """What the engine has done since it was made."""

    prefill_tokens: int = 0  # tokens of prompts computed, recomputed ones included
    shared_tokens: int = 0  # tokens of prompts found in pages of others
    decoded_tokens: int = 0  # tokens given out
    decode_steps: int = 0  # of the whole batch
    preemptions: int = 0
    compilations: int = 0


class Sampler:
    """Continuous batching over a paged key-value cache, with weights lent by the caller.

    Args:
      merge: {path: array} -> model, such as `Parts.merge`.
      model_config: a TransformerConfig.
      tokenizer: for text in events, and for requests that stop at strings.
    """

    def __init__(self, merge, model_config, config: SamplingConfig, mesh, tokenizer=None):
        self.config, self._mesh, self._tokenizer = config, mesh, tokenizer
        self._params = self._version = None
        self._vocab_size = model_config.vocab_size
        self._context_length = model_config.context_length
        num_shards = sharding.batch_shards(mesh)
        slots = -(-config.slots // num_shards)
        num_pages = _pages_of_a_shard(config, num_shards, slots) + 1  # page 0 holds nothing
        self._scheduler = Scheduler(
            num_shards=num_shards,
            slots=slots,
            num_pages=num_pages,
            page_size=config.page_size,
        )
        self._programs = Programs(
            merge,
            model_config,
            num_pages=num_shards * num_pages,
            page_size=config.page_size,
            steps=config.decode_steps,
        )
        self._rows = Rows(
            config,
            num_shards=num_shards,
            slots=slots,
            vocab_size=model_config.padded_vocab_size,
        )
        self._cache = None  # allocated when the first request is admitted
        self._samples: dict[str, dict[int, Sequence]] = {}  # by id and sample index
        self._outputs: dict[Sequence, Output] = {}
        self._counters = Counters()

    def lend(self, params, version: int, *, restore: bool = False) -> None:
        """Sets the weights that the following steps use. They are not copied.

        It may be called at any time between steps. Running requests go on with the new weights, but
        keep the keys and values that the old weights computed; no request that is added later
        shares those. Prompt log-probs of a prompt that is half stored are then of both.

        Args:
          params: {path: array}.
          version: the training step of the weights.
          restore: store the keys and values of running requests anew, so that each token is sampled
            from exactly what the weights of its version give for the tokens before it.
        """
        is_same = self._params is not None and params.keys() == self._params.keys()
        is_same = is_same and all(value is self._params[path] for path, value in params.items())
        if not is_same or version != self._version:
            self._scheduler.forget()
            if restore:
                self._scheduler.restart()
        self._params, self._version = params, version

    def release(self) -> None:
        """Frees the cache and lets the weights go, until they are lent and asked for again.

        Raises RuntimeError if requests are waiting or running.
        """
        if self.has_work:
            raise RuntimeError('the sampler has requests, whose keys and values would be lost')
        self._scheduler.forget()
        self._cache = self._params = self._version = None

    @property
    def version(self) -> int | None:
        """The version of the lent weights; None before the first `lend`."""
        return self._version

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return min(self.config.max_length, self._context_length or self.config.max_length)

    @property
    def tokenizer(self):
        """The tokenizer of texts in events; None if there is none."""
        return self._tokenizer

    @property
    def counters(self) -> Counters:
        """What the engine has done so far."""
        return dataclasses.replace(
            self._counters,
            shared_tokens=self._scheduler.num_shared_tokens,
            preemptions=self._scheduler.num_preempted,
            compilations=self._programs.num_compiled,
        )

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._outputs)

    def _check_weights(self) -> None:
        """Raises RuntimeError unless weights have been lent."""
        if self._params is None:
            raise RuntimeError(
                'the sampler has no weights: call lend(params, version) before add() and step()'
            )

    def add(
        self,
        request: Request,
        *,
        meter: Meter | None = None,
        num_prompt: int | None = None,
        goes_first: bool = False,
    ) -> None:
        """Queues the samples of a request.

        Args:
          meter: is told what its samples, and forks of them, cost.
          num_prompt: how many of its tokens are the prompt, if the others are a completion that it
            goes on with: penalties count over that. Default: all.
          goes_first: ahead of those that wait. For what goes on where another request has just
            ended: the pages of that may be needed by others later.

        Raises RuntimeError without weights, DataError as `check` does, and DataError if a request
        with its id and sample index is waiting or running, or it has not `num_prompt` tokens.
        """
        self._check_weights()
        self.check(request)
        num_prompt = len(request.tokens) if num_prompt is None else num_prompt
        if not 0 < num_prompt <= len(request.tokens):
            raise DataError(
                f'request {request.id}: num_prompt is {num_prompt}, but must be from 1 to '
                f'{len(request.tokens)}, the number of its tokens'
            )
        indices = range(request.sample_index, request.sample_index + request.n)
        self._check_new(request.id, indices)
        tokens = [int(token) for token in request.tokens]
        for index in indices:
            one = dataclasses.replace(request, tokens=tokens, n=1, sample_index=index)
            scores = request.prompt_logprobs and index == request.sample_index
            first = request.prompt_logprobs_from if scores else None
            self._queue(one, num_prompt, score_from=first, meter=meter, goes_first=goes_first)

    def _queue(
        self,
        request: Request,
        num_prompt: int,
        *,
        score_from: int | None = None,
        output: Output | None = None,
        meter: Meter | None = None,
        goes_first: bool = False,
    ) -> None:
        sequence = Sequence(
            request,
            list(request.tokens),
            num_prompt,
            request.max_tokens,
            # A prompt of one token has no log-probs to compute.
            score_from=score_from if len(request.tokens) > 1 else None,
            first_end=len(request.tokens) + request.min_tokens,
            meter=meter,
        )
        if goes_first:
            self._scheduler.waiting.appendleft(sequence)
        else:
            self._scheduler.waiting.append(sequence)
        self._samples.setdefault(request.id, {})[request.sample_index] = sequence
        self._outputs[sequence] = output or Output(request, self._tokenizer, score_from)

    def check(self, request: Request) -> None:
        """Raises DataError unless the engine can serve a request; needs no weights.

        It rejects what `check_request` does, and requests with more tokens than sampling.max_length
        or the model's context length.
        """
        check_request(request, self._vocab_size, self._tokenizer is not None)
        num_prompt, max_tokens = len(request.tokens), request.max_tokens
        length = num_prompt + max_tokens
        told = f'request {request.id}: {num_prompt} prompt + {max_tokens} new tokens = {length}'
        if length > self.config.max_length:
            raise DataError(f'{told} exceed sampling.max_length {self.config.max_length}')
        if self._context_length and length > self._context_length:
            raise DataError(
                f'{told} exceed the context length of {self._context_length} that the model was '
                'trained for (config.model.context_length)'
            )

    def _check_new(self, id: str, indices: Sequences[int]) -> None:
        if taken := sorted(index for index in self._samples.get(id, ()) if index in indices):
            raise DataError(
                f'request {id}: another request with this id and sample index {taken[0]} is '
                'waiting or running'
            )

    def _find(self, id: str, sample_index: int | None = None) -> list[Sequence]:
        samples = self._samples.get(id, {})
        return [s for index, s in samples.items() if sample_index in (None, index)]

    def _one(self, id: str, sample_index: int | None) -> Sequence:
        found = self._find(id, sample_index)
        if len(found) != 1:
            raise DataError(
                f'request {id}: {len(found)} samples'
                + ('' if sample_index is None else f' with index {sample_index}')
                + ' are waiting or running, but exactly one must be'
            )
        return found[0]

    def share(self, id: str, sample_index: int | None = None) -> None:
        """Makes the pages of a running request known now, not when it ends: before it branches."""
        for sequence in self._find(id, sample_index):
            self._scheduler.share(sequence)

    def cancel(self, id: str, sample_index: int | None = None) -> None:
        """Cancels a waiting or running request, or one of its samples; unknown ids are ignored."""
        for sequence in self._find(id, sample_index):
            self._remove(sequence)

    def fork(
        self,
        id: str,
        new_id: str,
        *,
        sample_index: int,
        tokens: Iterable[int] = (),
        max_tokens: int | None = None,
        of_sample: int | None = None,
    ) -> None:
        """Queues a copy of a request as it is now, which shares its pages, under another id.

        It goes on with the same options behind the same tokens, of which its events tell only what
        the original's have not told yet.

        Args:
          sample_index: the copy's own, so that it has noise of its own.
          tokens: ids to append to the copy.
          max_tokens: to sample from now on; default: as many as the original still may.
          of_sample: the sample to copy, if the request has several.

        Raises:
          DataError: not exactly one such sample is waiting or running; the copy does not fit.
        """
        source, appended = self._one(id, of_sample), list(tokens)
        tokens = [*source.tokens, *appended]
        max_tokens = source.max_tokens if max_tokens is None else max_tokens
        request = dataclasses.replace(
            source.request,
            id=new_id,
            tokens=tokens,
            max_tokens=max_tokens,
            min_tokens=min(max(source.first_end - len(source.tokens), 0), max_tokens),
            sample_index=sample_index,
            prompt_logprobs=False,
            prompt_logprobs_from=0,
        )
        self.check(request)
        self._check_new(new_id, [sample_index])
        self._scheduler.share(source)
        output = self._outputs[source].fork(request)
        if appended:
            output.extend(appended)
        self._queue(request, source.num_prompt, output=output, meter=source.meter)

    def extend(self, id: str, tokens: Iterable[int], sample_index: int | None = None) -> None:
        """Appends ids to a request; it samples what follows them. Events do not report them.

        They do not count as its tokens, and no stop string reaches across them: text that was held
        back because it might become one is released.

        Raises:
          DataError: not exactly one such sample is waiting or running; ids outside the vocabulary;
          the request would become too long.
        """
        sequence, appended = self._one(id, sample_index), list(tokens)
        request = dataclasses.replace(
            sequence.request, tokens=[*sequence.tokens, *appended], max_tokens=sequence.max_tokens
        )
        self.check(dataclasses.replace(request, min_tokens=0))
        if appended:
            sequence.tokens = list(request.tokens)
            sequence.first_end += len(appended)
            self._outputs[sequence].extend(appended)

    def _remove(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        self._scheduler.leave(sequence, is_sound=is_sound)
        request = sequence.request
        del self._outputs[sequence], self._samples[request.id][request.sample_index]
        if not self._samples[request.id]:
            del self._samples[request.id]

    def step(self) -> list[Event]:
        """Admits waiting requests, stores prompts, decodes; returns what there is to tell.

        That may be nothing, while prompts are being stored. Raises RuntimeError without weights.
        """
        self._check_weights()
        if not self.has_work:
            return []
        self._allocate()
        for _ in range(_MOST_CHUNKS):
            self._admit()
            missing = [sequence for sequence in self._running if sequence.num_missing > 0]
            if not missing:
                break
            self._store(missing)
            if 2 * len(missing) <= len(self._running):
                break
        return [*self._end_scored(), *self._decode()]

    def wait(self) -> None:
        """Waits until the devices have done all that the steps so far asked of them."""
        jax.block_until_ready(self._cache)

    def _admit(self) -> None:
        if copies := self._scheduler.admit():
            self._cache = self._programs.copy(self._cache, self._put(self._rows.copies(copies)))

    def _allocate(self) -> None:
        """Makes the pools of pages, when they are first needed."""
        if self._cache is None:
            self._cache = self._programs.new_cache()

    @property
    def _running(self) -> list[Sequence]:
        return [sequence for shard in self._scheduler.running for sequence in shard]

    def _store(self, sequences: list[Sequence]) -> None:
        """Stores the next chunk of as many prompts as one call takes."""
        for sequence in sequences:
            if sequence.shard is not None:
                self._scheduler.grow(sequence, len(sequence.tokens))
        sequences = [sequence for sequence in sequences if sequence.shard is not None]
        rows, pieces = self._rows.store(self._rows.best_chunk(sequences), sequences)
        self._cache, scores = self._programs.store(self._params, self._cache, self._put(rows))
        if (rows['num_top'] >= 0).any():
            scores = jax.device_get(scores)
        for row, sequence, start, length in pieces:
            if rows['num_top'][row] >= 0:
                self._outputs[sequence].add_prompt(start, *(x[row, :length] for x in scores))
            self._scheduler.store(sequence, start + length)
            if sequence.num_missing == 0:
                sequence.score_from = None
            self._counters.prefill_tokens += length
            if sequence.meter:
                sequence.meter.prefill(start, length)

    def _end_scored(self) -> list[Event]:
        """Lets sequences go whose prompt is stored, if they sample nothing or it has NaN scores."""
        events = []
        for sequence in [one for one in self._running if one.num_missing == 0]:
            output = self._outputs[sequence]
            if sequence.max_tokens == 0 or output.has_bad_prompt:
                event = output.end()
                self._remove(sequence, is_sound=event.finish_reason != 'error')
                events.append(event)
        return events

    def _decode(self) -> list[Event]:
        ready = [sequence for sequence in self._running if sequence.num_missing == 0]
        for sequence in ready:
            if sequence.shard is not None:
                steps = min(self.config.decode_steps, sequence.max_tokens)
                self._scheduler.grow(sequence, len(sequence.tokens) + steps - 1)
        ready = [sequence for sequence in ready if sequence.shard is not None]
        if not ready:
            return []
        is_crowded = bool(self._scheduler.waiting) or len(ready) < len(self._running)
        rows, placed = self._rows.decode(ready, is_crowded)
        self._cache, data = self._programs.decode(self._params, self._cache, self._put(rows))
        sampled = read_sampled(data)
        self._counters.decode_steps += len(sampled.tokens)
        events = []
        for row, sequence in placed:
            of_row = Sampled(*(x[:, row] for x in sampled))
            if event := self._advance(sequence, of_row):
                events.append(event)
        return events

    def _put(self, rows):
        return sharding.distribute(pack(rows), self._mesh)

    def _advance(self, sequence: Sequence, sampled: Sampled) -> Event | None:
        """Appends what was sampled to a sequence, and lets it go if it has ended."""
        output = self._outputs[sequence]
        tokens, event = output.take(sampled, sequence.max_tokens, self._version)
        sequence.tokens += tokens
        sequence.max_tokens -= len(tokens)
        sequence.num_stored += len(tokens)
        self._counters.decoded_tokens += len(tokens)
        if sequence.meter:
            sequence.meter.decode(len(sequence.tokens) - len(tokens) - 1, len(tokens))
        if event and event.finish_reason:
            self._remove(sequence, is_sound=event.finish_reason != 'error')
        return event

    def expect_many_prompts(self) -> None:
        """Compiles more sizes of calls that store prompts when they are needed.

        Worth it for hundreds of prompts to score, whose continuations have a few tokens each.
        """
        self._rows.use_all_chunks()

    def warm_up(self) -> None:
        """Compiles every program, so that no later step does; weights must have been lent.

        There are more of them then, for calls with few rows: worth it for an engine that runs long.

        Raises RuntimeError without weights.
        """
        self._check_weights()
        self._allocate()
        self._cache = self._programs.copy(self._cache, self._put(self._rows.copies()))
        self._rows.use_all_sizes()
        for size in sorted(self._rows.chunks):
            rows, _ = self._rows.store(size)
            self._cache, _ = self._programs.store(self._params, self._cache, self._put(rows))
        for count, extras in itertools.product(self._rows.counts, Extras):
            rows, _ = self._rows.decode_rows(count, extras)
            self._cache, *_ = self._programs.decode(self._params, self._cache, self._put(rows))


def _pages_of_a_shard(config: SamplingConfig, num_shards: int, slots: int) -> int:
    """Raises ConfigError unless it holds the longest request, which could never run otherwise."""
    longest = -(-config.max_length // config.page_size)
    pages = slots * longest if config.pages is None else config.pages // num_shards
    if pages < longest:
        raise ConfigError(
            f'config.sampling.pages is {config.pages}, which gives each of {num_shards} shards of '
            f'the batch {pages} pages, but a request of max_length {config.max_length} needs '
            f'{longest} of page_size {config.page_size}: use at least {longest * num_shards}'
        )
    return pages
