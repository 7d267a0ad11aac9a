"""A scripted engine and environments for tests: what is written and answered is known."""

import time
import types

from jaxfm.environments import EnvironmentConfig
from jaxfm.environments.base import Environment, Observation
from jaxfm.errors import DataError
from jaxfm.sampling.request import Event

EOS = 0


class Tokenizer:
    """A letter is its code; 200 and above are other ids of the letters from `a` on.

    So text that is decoded and encoded again has other ids.
    """

    eos_id, bos_id, vocab_size = EOS, None, 226
    special_tokens = {}
    invalid_byte_id = None

    def encode(self, text):
        return [ord(letter) for letter in text]

    encode_after = encode

    def decode(self, ids):
        return ''.join(chr(i - 200 + ord('a') if i >= 200 else i) for i in ids if i != EOS)


class Writer:
    """An engine that writes what a function of (text so far, sample index) says, a token a step.

    '$' in it is the end of the text, '!' is a fault. Letters are written by their other ids.
    """

    def __init__(self, write, longest: int = 60, tokenizer=None):
        self.write, self.longest = write, longest
        self.tokenizer = tokenizer or Tokenizer()
        self.config = types.SimpleNamespace(stop_ids=[], slots=4)
        self.asked, self.running, self.cancelled, self.versions = [], {}, [], []

    def check(self, request):
        if len(request.tokens) + request.max_tokens > self.longest:
            raise DataError('too long')

    def lend(self, params, version):
        self.versions.append(version)

    def add(self, request, num_prompt=None, goes_first=False):
        self.check(request)
        assert request.n == 1 and (request.id, request.sample_index) not in self.running
        self.asked.append((request, num_prompt))
        text = self.write(self.tokenizer.decode(request.tokens), request.sample_index)
        self.running[request.id, request.sample_index] = request, text, ''

    def cancel(self, id, index):
        self.cancelled.append((id, index))
        self.running.pop((id, index), None)

    def release(self):
        assert not self.running

    @property
    def has_work(self):
        return bool(self.running)

    def spell(self, letter: str) -> int:
        if isinstance(self.tokenizer, Tokenizer) and letter.islower():
            return ord(letter) - ord('a') + 200
        return self.tokenizer.encode(letter)[0]

    def step(self):
        return [self._advance(key) for key in list(self.running)]

    def _advance(self, key):
        request, rest, written = self.running.pop(key)
        letter, rest = rest[0], rest[1:]
        if letter == '!':
            return Event(key[0], [], [], [], 'error', key[1], error='NaN logits')
        is_end = letter == '$'
        written += letter
        token = self.tokenizer.eos_id if is_end else self.spell(letter)
        logprob = -0.01 * (len(request.tokens) + len(written)) - key[1]
        found = [string for string in request.stop if written.endswith(string)]
        reason = stop = None
        if found or is_end:
            reason, stop = 'stop', found[0] if found else token
        elif len(written) == request.max_tokens:
            reason = 'length'
        else:
            self.running[key] = request, rest, written
        # As of the real one: the text ends before a stop string, whose ids are there.
        text = '' if found or is_end else letter
        given = [token], [logprob], [logprob]
        return Event(key[0], *given, reason, key[1], text=text, versions=[7], stop=stop)


class Doubling(Environment):
    """Answers a number in brackets with its double, and ends at a turn without any."""

    class Config(EnvironmentConfig):
        """No keys of its own."""

    stop = (']',)

    def __init__(self, config):
        self.turns = []  # (text, ids) that it was given
        self.states = []

    def reset(self, prompt):
        state = {'id': prompt.id, 'turns': 0}
        self.states.append(state)
        return state

    def step(self, state, text, ids):
        self.turns.append((text, ids))
        state['turns'] += 1
        if not text.endswith(']'):
            return Observation(done=True)
        return Observation(f'={2 * int(text.partition("[")[2][:-1])};')


def sleep():
    """Longer than any test has patience."""
    time.sleep(60)


class Moody(Doubling):
    """What it does is the first letter of the turn: h hangs, r raises, and so on."""

    answers = {
        'n': lambda: None,
        'h': sleep,
        'r': lambda: 1 // 0,
        't': lambda: Observation(None),
        'q': lambda: Observation(ids=[5, 999]),
        'f': lambda: Observation(ids=[0.5]),
        'b': lambda: Observation('x', ids=[5]),
        'd': lambda: Observation('x', done=True),
        'u': lambda: Observation(done='no'),
        'x': lambda: Observation(done=True, reward=float('nan')),
        'y': lambda: Observation(done=True, reward=None),
        'w': lambda: Observation(done=True, reward=2.0),
        'i': lambda: Observation(ids=[101, 102]),
    }

    def reset(self, prompt):
        if 'z' in prompt.text:
            raise ValueError('no such game')
        return super().reset(prompt)

    def step(self, state, text, ids):
        answer = self.answers.get(text[:1])
        return answer() if answer else super().step(state, text, ids)
