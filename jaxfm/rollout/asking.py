"""Which prompts are asked next, and which are under way: asked, but in no batch yet.

Prompts are numbered in the order in which they are asked. The position is the number after the last
that was asked and, if some are under way that were asked before it, those: another process asks
them again first.
"""

import collections
import dataclasses

from jaxfm.rollout import RolloutConfig
from jaxfm.rollout.ahead import Ahead, InStep
from jaxfm.rollout.curriculum import Curriculum
from jaxfm.rollout.groups import Group
from jaxfm.rollout.prompts import Prompts
from jaxfm.sampling.request import Request
from jaxfm.tasks.base import Prompt


@dataclasses.dataclass(frozen=True)
class Asked:
    """Prompts whose samples are ordered together."""

    numbers: list[int]  # of the prompts, in the order in which they are asked
    places: list[int]  # of the prompts, among those of the task
    prompts: list
    requests: list[Request]
    order: object  # of the engine


class Asking:
    """Asks the prompts of a rollout for the steps of a phase.

    Args:
      engine: that samples what is asked.
      seed: of the phase.
    """

    def __init__(self, config: RolloutConfig, prompts: Prompts, engine: InStep | Ahead, seed: int):
        self._config, self._prompts, self._engine = config, prompts, engine
        self._curriculum = config.curriculum and Curriculum(config.curriculum, len(prompts), seed)
        self._next = 0  # the first number that was never asked
        self._again: collections.deque[int] = collections.deque()  # asked, but lost
        self._ahead: collections.deque[Asked] = collections.deque()  # for the next steps
        self._current: list[Asked] = []  # of the step that is being made
        self._step = 0  # that the first of `_ahead` is for

    def first(self, step: int) -> Asked:
        """What is asked for a step, and asks as far ahead as the weights that are lent allow.

        Raises RuntimeError if another step is the next one: what was asked for that might be from
        weights that are too old for this one.
        """
        if self._ahead and step != self._step:
            raise RuntimeError(f'samples were ordered for step {self._step}, not {step}: close it')
        while len(self._ahead) <= self._config.max_staleness:
            self._ahead.append(self._ask(self._config.prompts))
        self._current.append(self._ahead.popleft())
        self._step = step + 1
        return self._current[-1]

    def more(self, count: int) -> Asked:
        """Asks so many other prompts for the same step."""
        self._current.append(self._ask(count))
        return self._current[-1]

    def end_step(self, sampled: list[Group]) -> None:
        """The batch of the step is made, of these groups."""
        self._current = []
        for group in sampled if self._curriculum else ():
            self._curriculum.update(group.place, group.rewards)

    def _ask(self, count: int) -> Asked:
        numbers = [self._number() for _ in range(count)]
        places = self._places(numbers)
        asked = [self._prompts.request(*each) for each in zip(places, numbers)]
        requests = [request for _, request in asked]
        prompts = [prompt for prompt, _ in asked]
        # The task's `stop` is not asked: when it is depends on the other requests, and so would
        # the tokens behind what it saw.
        return Asked(numbers, places, prompts, requests, self._engine.order(requests))

    def _number(self) -> int:
        if self._again:
            return self._again.popleft()
        self._next += 1
        return self._next - 1

    def _places(self, numbers: list[int]) -> list[int]:
        if self._curriculum is None:
            return [self._prompts.place(number) for number in numbers]
        under_way = {place for asked in self._under_way for place in asked.places}
        return self._curriculum.draw(numbers[0], len(numbers), under_way)

    @property
    def _under_way(self) -> list[Asked]:
        return [*self._current, *self._ahead]

    @property
    def prompts(self) -> dict[str, Prompt]:
        """{id of a request: its prompt} of what is under way."""
        return {
            request.id: prompt
            for asked in self._under_way
            for request, prompt in zip(asked.requests, asked.prompts)
        }

    def _position(self) -> tuple[int, list[int]]:
        """-> the number after the last that was asked, and those before it to ask again."""
        numbers = [number for asked in self._under_way for number in asked.numbers]
        again, first = sorted([*numbers, *self._again]), self._next
        while again and again[-1] == first - 1:
            first = again.pop()
        return first, again

    def progress(self) -> dict[str, float]:
        """How many prompts batches had so far, and what is known of all."""
        first, again = self._position()
        asked, shares = first - len(again), self._curriculum.shares() if self._curriculum else {}
        return {
            **{f'rollout/{band}_prompts': share for band, share in shares.items()},
            'rollout/prompts': asked,
            'rollout/epochs': asked / len(self._prompts),
        }

    def get_state(self) -> dict:
        """The position after the last batch, as JSON."""
        first, again = self._position()
        state = {'next_prompt': first, 'asked_again': again}
        return state | ({'pass_rates': self._curriculum.get_state()} if self._curriculum else {})

    def set_state(self, state: dict) -> None:
        """Continues at a position, with nothing under way."""
        self.forget()
        # Checkpoints from before samples could be made ahead have nothing to ask again.
        self._next = state['next_prompt']
        self._again = collections.deque(state.get('asked_again', ()))
        if self._curriculum and 'pass_rates' in state:  # it may have been turned on since
            self._curriculum.set_state(state['pass_rates'])

    def forget(self) -> None:
        """What is under way will not come: it is asked again."""
        self._next, again = self._position()
        self._again = collections.deque(again)
        self._ahead.clear()
        self._current = []
