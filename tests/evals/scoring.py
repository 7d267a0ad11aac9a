"""For tests of evaluators that score: an engine whose log-probs are a formula, and a tokenizer."""

import types

from jaxfm.evals.base import Context
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.request import Event


class Tokenizer:
    """Letters are their own ids, but a space and the letter after it are one token."""

    eos_id, bos_id = 0, None
    special_tokens = {}

    def encode(self, text):
        ids = []
        while text:
            size = 2 if text[0] == ' ' and len(text) > 1 and text[1] != ' ' else 1
            ids.append(ord(text[size - 1]) + 1000 * (size - 1))
            text = text[size:]
        return ids


class Chat:
    """Ends every message with a bar."""

    stop_ids = frozenset([0])

    def prompt(self, messages, tools=()):
        return Tokenizer().encode(''.join(message['content'] + '|' for message in messages))


def logprob(before: int, token: int) -> float:
    """log p(token | the token before it), as far as these tests are concerned."""
    return -0.1 - (before * 31 + token * 17) % 97 / 20


def total(ids, start) -> float:
    """The log-prob of ids[start:]."""
    return sum(logprob(ids[i - 1], ids[i]) for i in range(start, len(ids)))


class Engine:
    """Scores one request per step. `fails`: first tokens of requests that give NaN."""

    def __init__(self, max_length=64, fails=()):
        # One slot: few requests are in line at a time.
        self.config = SamplingConfig(max_length=max_length, slots=1)
        self.fails, self.checked, self.added, self.waiting = fails, [], [], []
        self.longest = 0  # requests that waited together

    def lend(self, params, version):
        self.lent = params, version

    def check(self, request):
        self.checked.append(request)
        assert request.max_tokens == 0 and request.prompt_logprobs
        assert 1 <= request.prompt_logprobs_from < len(request.tokens) <= self.config.max_length

    def add(self, request):
        self.added.append(request)
        self.waiting.append(request)
        self.longest = max(self.longest, len(self.waiting))

    def cancel(self, id, sample_index):
        self.waiting = [request for request in self.waiting if request.id != id]

    @property
    def has_work(self):
        return bool(self.waiting)

    def step(self):
        request = self.waiting.pop(0)
        ids, start = list(request.tokens), request.prompt_logprobs_from
        scores = [logprob(ids[i - 1], ids[i]) for i in range(start, len(ids))]
        if any(letter in ids[1:] for letter in self.fails):
            scores[-1] = float('nan')
        # Greedy decoding gives capitals.
        top = [[(i if 65 <= i % 1000 <= 90 else -1, -0.1)] for i in ids[start:]]
        return [
            Event(
                request.id,
                *([], [], []),
                finish_reason='length',
                prompt_logprobs=scores,
                prompt_top_logprobs=top if request.top_logprobs else [],
            )
        ]


def context_of(engine, directory=None, goes_on=False, tokenizer=None) -> Context:
    return Context(
        name='quiz',
        merge=None,
        dataset=None,
        tokenizer=tokenizer or Tokenizer(),
        chat=Chat,
        sampler=engine,
        mesh=None,
        seed=0,
        flops=lambda length: float(length**2),
        weights=lambda step: {'name': 'run', 'step': step},
        samples_directory=directory,
        goes_on=goes_on,
    )


def entry(task) -> types.SimpleNamespace:
    """An entry of a registry that loads this class."""
    return types.SimpleNamespace(load=lambda: task)
