"""A scripted engine and task for tests of rollouts: what is sampled and rewarded is known."""

import dataclasses
import time
import types

from jaxfm.rollout import RolloutConfig
from jaxfm.sampling.request import Event
from jaxfm.tasks.base import Prompt, Task

# The rewards of a prompt's samples, which the engine writes as digits.
SCRIPTS = {'a': '0110', 'bb': '0000', 'ccc': '1101', 'd': '1111', 'e': '1000', 'f': '0101'}


class Digits(Task):
    """The reward is the digit that the completion begins with; a letter is a fault of the judge."""

    class Config(RolloutConfig):
        """Never used."""

    def __init__(self, config, documents):
        self.documents = documents

    def prompts(self):
        return [Prompt(f'id {text}', text) for text in SCRIPTS]

    def evaluate(self, prompt, completion):
        return float(int(completion[0]))

    def reward(self, prompt, completion):
        if completion.startswith('h'):
            time.sleep(60)
        faults = {'n': float('nan'), 'g': 10**400}
        found = faults.get(completion[0])
        return self.evaluate(prompt, completion) if found is None else found

    def stop(self, prompt, completion):
        raise AssertionError('samples end by themselves')


class Engine:
    """Answers at once: sample i of a prompt is letter i of its script, and `tail`."""

    def __init__(self, scripts=SCRIPTS, tail='xy\0'):
        self.config = types.SimpleNamespace(stop_ids=[])
        self.longest, self.scripts, self.tail = 40, scripts, tail
        self.waiting, self.asked, self.versions = [], [], []
        self.tails = None  # of the samples, if they differ

    def check(self, request):
        assert len(request.tokens) + request.max_tokens <= self.longest

    def lend(self, params, version):
        self.versions.append(version)

    def add(self, request):
        self.asked.append(request)
        self.waiting.append(request)

    def release(self):
        self.versions.append('released')

    @property
    def has_work(self):
        return bool(self.waiting)

    def step(self):
        request = self.waiting.pop(0)
        script = self.scripts[''.join(map(chr, request.tokens))]
        return [self._event(request, index, script[index]) for index in range(request.n)]

    def _event(self, request, index, letter):
        if letter == '!':
            return Event(request.id, [], [], [], 'error', index, error='NaN logits')
        text = letter + (self.tails[index] if self.tails else self.tail)
        ids = [ord(x) for x in text]
        logprobs = [-0.5 - index] * len(ids)
        reason = 'stop' if text.endswith('\0') else 'length'
        return Event(
            request.id, ids, logprobs, logprobs, reason, index, text=text.rstrip('\0'), versions=[7]
        )


class Stepwise(Engine):
    """Gives each sample a token a step, from the weights that it has then, in so many seconds."""

    def __init__(self, seconds: float = 0.0, **words):
        super().__init__(**words)
        self.seconds, self.version, self.fault = seconds, None, None
        self.running, self.steps, self.cancelled = {}, [], []

    def lend(self, params, version, restore=False):
        assert restore
        super().lend(params, version)
        self.version = version

    def add(self, request):
        super().add(request)
        for event in Engine.step(self):
            key = event.id, event.sample_index
            assert key not in self.running
            self.running[key] = list(zip(event.tokens, event.logprobs))

    @property
    def has_work(self):
        return bool(self.running)

    def step(self):
        began = time.monotonic()
        time.sleep(self.seconds)
        if self.fault:
            raise self.fault
        events = []
        for (id, index), left in [*self.running.items()]:
            token, logprob = left.pop(0)
            reason = None if left else 'stop'
            text = chr(token).rstrip('\0')
            event = Event(id, [token], [logprob], [logprob], reason, index, text=text)
            events.append(dataclasses.replace(event, versions=[self.version]))
            if reason:
                del self.running[id, index]
        self.steps.append((began, time.monotonic()))
        return events

    def cancel(self, id, index):
        self.cancelled.append((id, index))
        self.running.pop((id, index), None)

    def release(self):
        assert not self.running
        super().release()

    def wait(self):
        """Its steps have ended when they return."""
