"""What a sequence has sampled becomes events: where it ends, and what must still be held back."""

import collections
import copy
import itertools
import math
from collections.abc import Iterable

from jaxfm.sampling.logits import Sampled
from jaxfm.sampling.request import Event, Request
from jaxfm.sampling.stops import Stops

_BAD = 'the model gives NaN or infinite logits'


class Output:
    """The events of one sample of a request."""

    def __init__(self, request: Request, tokenizer, score_from: int | None = None):
        self._request, self._score_from = request, score_from
        self._stops = Stops(tokenizer, request.stop, request.min_tokens)
        # Tokens that no event has told yet, each with what belongs to it.
        self._held = collections.deque()
        # These go with the next event. Nothing predicts the first token.
        self._prompt_logprobs: list | None = None if score_from is None else [None][score_from:]
        self._prompt_top = [[]] if score_from == 0 else []
        self._due = 0, ''  # held ids and text that nothing holds any longer

    def fork(self, request: Request) -> 'Output':
        """That of a copy of the sample: its events go on where those of this one are."""
        forked = copy.copy(self)
        forked._request = request
        forked._stops, forked._held = copy.copy(self._stops), self._held.copy()
        forked._prompt_logprobs, forked._prompt_top = None, []
        return forked

    def extend(self, ids: Iterable[int]) -> None:
        """Other ids follow the sample's own: what it holds goes with its next event."""
        released = self._stops.interrupt(ids)
        self._due = self._due[0] + released.count, self._due[1] + released.text

    def add_prompt(self, start: int, logprobs, top_ids, top_logprobs) -> None:
        """Adds scores of tokens of the prompt, [T], [T, NUM_TOP] and [T, NUM_TOP].

        start: the position of the token before the first of them. It goes back if the request gave
          way, and may lie before those that were asked for. Ids after the prompt have no scores.
        """
        index = start + 1 - self._score_from
        wanted = slice(max(0, -index), max(0, len(self._request.tokens) - start - 1))
        index = max(0, index)
        del self._prompt_logprobs[index:], self._prompt_top[index:]
        self._prompt_logprobs += logprobs[wanted].tolist()
        self._prompt_top += map(self._pairs, top_ids[wanted], top_logprobs[wanted])

    @property
    def has_bad_prompt(self) -> bool:
        """Whether log-probs of the prompt that no event has told yet are NaN."""
        return any(x is not None and math.isnan(x) for x in self._prompt_logprobs or ())

    def end(self) -> Event:
        """The event of a sample that ends before it has any token."""
        reason, error = ('error', _BAD) if self.has_bad_prompt else ('length', None)
        return self._event(0, '', reason, None, error)

    def take(self, sampled: Sampled, most: int, version: int) -> tuple[list[int], Event | None]:
        """-> the tokens that count, of those sampled, and an event if there is anything to tell.

        If the event has a finish reason, tokens sampled behind the end do not count.

        Args:
          sampled: host arrays, [steps] or [steps, ...].
          most: the number of tokens that the request may still get.
        """
        reason, stop, error, counted = None, None, None, []
        for scored, is_bad in zip(self._scored(sampled, most), sampled.is_bad.tolist()):
            if is_bad:
                reason, error = 'error', _BAD
                break
            token = scored[0]
            counted.append(token)
            self._held.append((*scored, version))
            if token in self._request.stop_ids:
                reason, stop = 'stop', token
                break
        if reason is None and len(counted) == most:
            reason = 'length'
        shown = counted[:-1] if stop is not None else counted
        count, text, string = self._stops.push(shown)
        (due, due_text), self._due = self._due, (0, '')
        count, text = due + count, due_text + text
        if string is None and reason:
            more, rest, string = self._stops.finish()
            count, text = count + more, text + rest
        if string is not None:
            reason, stop, error = 'stop', string, None
            del counted[len(counted) - (len(self._held) - count) :]
        elif reason:
            count = len(self._held)
        if not count and not text and not reason:
            return counted, None
        return counted, self._event(count, text, reason, stop, error)

    def _scored(self, sampled: Sampled, most: int):
        """The first tokens, each with its log-probs and the likeliest ones."""
        columns = sampled.tokens, sampled.logprobs, sampled.sampling_logprobs
        top = itertools.repeat([])
        if self._request.top_logprobs:
            top = map(self._pairs, sampled.top_ids, sampled.top_logprobs)
        return zip(*(column[:most].tolist() for column in columns), top)

    def _pairs(self, ids, logprobs) -> list[tuple[int, float]]:
        count = self._request.top_logprobs
        pairs = zip(ids[:count].tolist(), logprobs[:count].tolist())
        return [(i, logprob) for i, logprob in pairs if i >= 0]

    def _event(self, count: int, text: str, reason, stop, error) -> Event:
        told = [self._held.popleft() for _ in range(count)]
        columns = ([one[i] for one in told] for i in range(5))
        tokens, logprobs, sampling_logprobs, top, versions = columns
        prompt, self._prompt_logprobs = self._prompt_logprobs, None
        prompt_top, self._prompt_top = self._prompt_top, []
        asks = self._request.top_logprobs > 0
        return Event(
            id=self._request.id,
            sample_index=self._request.sample_index,
            tokens=tokens,
            logprobs=logprobs,
            sampling_logprobs=sampling_logprobs,
            top_logprobs=top if asks else [],
            prompt_logprobs=prompt,
            prompt_top_logprobs=prompt_top if asks else [],
            text=text,
            versions=versions,
            finish_reason=reason,
            stop=stop,
            error=error,
        )
