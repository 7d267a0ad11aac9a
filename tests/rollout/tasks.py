"""Tasks for tests of rollouts, named in configs as `tests.rollout.tasks:Ascii`."""

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
