"""An environment for real runs, named in configs as `tests.environments.counting:Counting`."""

import string

from jaxfm.environments import EnvironmentConfig
from jaxfm.environments.base import Environment, Observation


class Counting(Environment):
    """Answers with the number of letters so far, twice; letters of words end a turn."""

    class Config(EnvironmentConfig):
        """No keys of its own."""

    stop = tuple(string.ascii_lowercase + string.digits)

    def __init__(self, config):
        pass

    def reset(self, prompt):
        return []

    def step(self, state, text, ids):
        state.append(len(ids))
        return Observation(done=True) if len(state) > 2 else Observation(f' {sum(state)}é')
