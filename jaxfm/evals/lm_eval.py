"""What lm-eval asks of a model, answered by the sampling engine; `tools/lm_eval.py` passes it on.

The tokens are those of lm-eval's own models, except that

- a text never becomes a special token, even if it spells one, whereas a chat's text was rendered
  here and has the ids of `Chat.prompt`: a continuation is encoded after it, not together with it;
- a text begins with BOS once, if the tokenizer puts it there. lm-eval's Hugging Face models put a
  second one before a rolling text if the tokenizer adds one itself, and count its log-prob;
- an empty context is BOS only if the tokenizer puts one before texts, else EOS; they take BOS if
  the tokenizer has one. A context of white space alone is an empty one, where they fail;
- a completion also ends with the chat template's end of turn, as in `jaxfm.evals.generate`; a stop
  string is not searched in the names of special tokens.
"""

import collections
import difflib
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxfm.errors import DataError, NumericsError
from jaxfm.evals.base import Context
from jaxfm.evals.perplexity import windows
from jaxfm.evals.prompts import begin_ids, pair_ids
from jaxfm.evals.scoring import Scored, key, score_each, score_request
from jaxfm.sampling.complete import complete_each
from jaxfm.sampling.request import Request

log = logging.getLogger('jaxfm')

MAX_GEN_TOKS = 256  # lm-eval's, for tasks that give none
# What tasks call the most tokens of a completion.
_LENGTHS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
_PENALTIES = ('repetition_penalty', 'presence_penalty', 'frequency_penalty')
_NUMBERS = ('top_k', 'top_p', 'min_p', *_PENALTIES)
_OPTIONS = ('until', 'do_sample', 'temperature', *_LENGTHS, *_NUMBERS)

Answered = Callable[[int, object], None]  # (index of a request, its answer)


def _ignore(index: int, answer) -> None:
    pass


class LmEval:
    """Log-likelihoods and completions of texts, as lm-eval defines them.

    `answered` is called with each answer as soon as it is there, in any order. A context that is
    too long loses tokens at its beginning, which is told with their number.

    Raises:
      DataError: a request cannot be served; before any runs.
      NumericsError: the model gives a log-prob that is not finite.
    """

    def __init__(self, context: Context, params, step: int):
        self._context, self._params, self._step = context, params, step
        self._sampler, self._tokenizer = context.sampler, context.tokenizer
        self._chats: dict[str, list[int]] = {}  # {the text of a chat rendered here: its ids}

    @property
    def weights(self) -> dict:
        """Which weights these are, as JSON."""
        return self._context.weights(self._step)

    @property
    def tokenizer_name(self) -> str:
        """A digest of tokenizer and chat template."""
        return self._tokenizer.fingerprint[:16]

    @property
    def chat_template(self) -> str:
        """The chat template that is in force, as Jinja."""
        return self._context.chat().template

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], answered: Answered = _ignore
    ) -> list[tuple[float, bool]]:
        """(context, continuation) -> (log-prob of the continuation in nats, greedy gives it)."""
        requests, cut = [], []
        for number, (before, continuation) in enumerate(pairs):
            ids, new = self._pair(before, continuation)
            if not new:
                raise DataError(
                    f'loglikelihood request {number}: the continuation {continuation!r} adds no '
                    f'token to its context, which ends in {before[-40:]!r}'
                )
            room = self._sampler.longest - len(new)
            if room < 1:
                raise DataError(
                    f'loglikelihood request {number}: a continuation of {len(new)} tokens does '
                    f'not fit behind a token of context: {self._lengths}'
                )
            cut.append(max(0, len(ids) - room))
            requests.append(score_request(str(number), ids[cut[-1] :], new))
        self._tell_cuts('loglikelihood', cut)
        scores = [(0.0, False)] * len(requests)
        for index, scored in self._score(requests):
            scores[index] = scored.logprob, scored.is_greedy
            answered(index, scores[index])
        return scores

    def loglikelihood_rolling(
        self, texts: Sequence[str], answered: Answered = _ignore
    ) -> list[float]:
        """The log-prob of every token of each text, in nats.

        The first token is predicted from BOS, or from the EOS that ended the text before. A text
        that is too long is cut into windows of full length, of which the last overlaps.
        """
        requests, owners = [], []
        length = self._sampler.longest
        for number, text in enumerate(texts):
            begin = begin_ids(self._tokenizer) or [self._tokenizer.eos_id]
            ids = [*begin, *self._tokenizer.encode(text)]
            for start, first, end in windows(len(ids), length, length - 1):
                id = f'{number}[{first}]'
                requests.append(score_request(id, ids[start:first], ids[first:end]))
                owners.append(number)
        totals, left = [0.0] * len(texts), collections.Counter(owners)
        for index, scored in self._score(requests):
            number = owners[index]
            totals[number] += scored.logprob
            left[number] -= 1
            if not left[number]:
                answered(number, totals[number])
        return totals

    def generate_until(
        self, asked: Sequence[tuple[str, Mapping]], answered: Answered = _ignore
    ) -> list[str]:
        """(context, generation_kwargs) -> a completion, which ends before a string of `until`.

        Equal requests are samples of one: their noise differs.
        """
        requests, cut, seen = [], [], collections.Counter()
        for number, (before, given) in enumerate(asked):
            options = self._options(number, given)
            room = self._sampler.longest - options['max_tokens']
            if room < 1:
                raise DataError(
                    f'generate_until request {number}: max_gen_toks {options["max_tokens"]} '
                    f'leave no room for a context: {self._lengths}'
                )
            ids = self._prompt(before)
            cut.append(max(0, len(ids) - room))
            same = before, json.dumps(given, sort_keys=True)
            # With one seed for all, contexts of one length would share their noise.
            seed = (self._context.seed + zlib.crc32(before.encode())) % 2**32
            order = {'seed': seed, 'sample_index': seen[same]}
            requests.append(Request(str(number), ids[cut[-1] :], **options, **order))
            seen[same] += 1
        for request in requests:
            self._sampler.check(request)
        self._tell_cuts('generate_until', cut)
        texts = [''] * len(requests)
        for sample in complete_each(
            self._sampler, requests, self._params, self._step, most=self._context.most
        ):
            if sample.finish_reason == 'error':
                raise NumericsError(f'generate_until request {sample.id}: {sample.error}')
            index = int(sample.id)
            texts[index] = sample.text
            answered(index, sample.text)
        return texts

    def apply_chat_template(
        self, messages: Sequence[Mapping], add_generation_prompt: bool = True
    ) -> str:
        """The text before the assistant's answer; a request with it as its context has its ids."""
        if not add_generation_prompt:
            raise DataError(
                'gen_prefix, which begins the assistant turn, is not supported with a chat '
                'template: take it out of the task, or leave the chat template away'
            )
        chat = self._context.chat()
        text, ids = chat.prompt_text(messages), chat.prompt(messages)
        if self._chats.setdefault(text, ids) != ids:
            raise DataError(
                'two chats are the same text, but one of them spells the special tokens that the '
                f'other has: {text[:200]!r}'
            )
        return text

    def _prompt(self, before: str) -> list[int]:
        """The ids of a context; an empty one is the beginning of a text."""
        if before in self._chats:
            return self._chats[before]
        ids = begin_ids(self._tokenizer) + self._tokenizer.encode(before)
        return ids or [self._tokenizer.eos_id]

    def _pair(self, before: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context, and those of its continuation: as in `jaxfm.evals.prompts`."""
        if before in self._chats:
            return self._chats[before], self._tokenizer.encode(continuation)
        return pair_ids(before, continuation, self._context)

    def _score(self, requests: list[Request]) -> Iterator[tuple[int, Scored]]:
        """Yields (index of a request, its scores); equal requests are scored once."""
        indices = collections.defaultdict(list)
        for index, request in enumerate(requests):
            self._sampler.check(request)
            indices[key(request)].append(index)
        ordered = [requests[indices[each][0]] for each in sorted(indices)]
        for each, scored in score_each(ordered, self._context, self._params, self._step):
            if scored.error:
                raise NumericsError(f'request {requests[indices[each][0]].id}: {scored.error}')
            for index in indices[each]:
                yield index, scored

    @property
    def _lengths(self) -> str:
        return (
            f'the engine holds {self._sampler.longest} tokens (config.sampling.max_length and '
            'config.model.context_length)'
        )

    def _tell_cuts(self, kind: str, cut: list[int]) -> None:
        """Warns of contexts that lost so many tokens."""
        if numbers := [number for number, lost in enumerate(cut) if lost]:
            log.warning(
                '%s: %d of %d contexts are too long and lose %d tokens at their beginning, '
                'request %d as the first; %s',
                *(kind, len(numbers), len(cut), sum(cut), numbers[0], self._lengths),
            )

    def _options(self, number: int, given: Mapping) -> dict:
        """The arguments of a Request that a task's generation_kwargs give."""
        where = f'generate_until request {number}'
        for name in given:
            if name not in _OPTIONS:
                near = difflib.get_close_matches(str(name), _OPTIONS, 1)
                hint = f'do you mean {near[0]}?' if near else f'known are {", ".join(_OPTIONS)}'
                raise DataError(
                    f'{where}: generation_kwargs has {name!r}, which is unknown; {hint}'
                )
        lengths = {name: given[name] for name in _LENGTHS if given.get(name) is not None}
        if len(set(lengths.values())) > 1:
            raise DataError(f'{where}: generation_kwargs has several lengths: {lengths}')
        until = given.get('until') or []
        until = [until] if isinstance(until, str) else list(until)
        chat, special = self._context.chat(), self._tokenizer.special_tokens
        ends = {special[text] for text in until if text in special}
        options = {name: given[name] for name in _NUMBERS if given.get(name) is not None}
        return options | {
            'max_tokens': next(iter(lengths.values()), MAX_GEN_TOKS),
            'temperature': _temperature(given),
            # A special token adds no text, so a stop string would never find it.
            'stop': tuple(text for text in until if text and text not in special),
            'stop_ids': chat.stop_ids | set(self._sampler.config.stop_ids) | ends,
        }


def _temperature(given: Mapping) -> float:
    """As in lm-eval: greedy unless do_sample or the temperature asks for samples.

    do_sample=False is greedy at any temperature.
    """
    temperature = given.get('temperature')
    samples = given.get('do_sample')
    if samples is None:
        samples = bool(temperature)
    if not samples:
        return 0.0
    return 1.0 if temperature is None else temperature
