"""Tasks for tests of rollouts, named in configs as `tests.rollout.tasks:Ascii`."""

import time

from jaxfm.schema import Group
from jaxfm.tasks.base import Prompt, Task


class Ascii(Task):
    """Rewards the share of letters that are ASCII: something that is learned in a few steps."""

    class Config(Group):
        """No keys."""

    def __init__(self, config, documents):
        del config, documents

    def prompts(self):
        return [Prompt(id=f'{number}', text=f'{number}:') for number in range(20)]

    def evaluate(self, prompt, completion):
        return sum(letter.isascii() for letter in completion) / max(len(completion), 1)


class Faulty(Ascii):
    """Judges some prompts in ways that a judge must not."""

    def reward(self, prompt, completion):
        kind = int(prompt.id) % 4
        if kind == 1:
            raise ValueError('no verifier')
        if kind == 2:
            return float('nan')
        if kind == 3:
            time.sleep(60)
        return super().reward(prompt, completion)
