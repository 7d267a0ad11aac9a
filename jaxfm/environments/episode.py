"""Episodes: the turns of the model and what an environment answers, on the engine.

What the model has sampled stays the very ids; an observation is encoded once, and its ids follow
them. The next turn is a request for the ids so far, whose keys and values the engine still has in
its pages. Nothing that was sampled is decoded and encoded again, because that may give other ids,
which the model never wrote.
"""

import dataclasses
import json
import math
import numbers
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from jaxfm.distributed import agree
from jaxfm.environments import ENVIRONMENTS, EnvironmentConfig
from jaxfm.environments.base import Observation
from jaxfm.errors import ConfigError, DataError
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Completion, Request
from jaxfm.tasks.base import Prompt

MAX_REWARD = 1e6  # as of a task: far larger ones would overflow in the gradient


@dataclasses.dataclass
class Episode(Completion):
    """A sample of several turns.

    Its tokens, log-probs and versions are those of the model alone, its text is all of it, to be
    read. Besides the reasons of the engine it ends for the reason 'turns', with more turns wanted
    than allowed, or 'environment', which failed, as `error` tells.
    """

    turns: list[Completion] = dataclasses.field(default_factory=list)
    # Ids and text between turns: one less than turns, or as many before the next one begins.
    observations: list[tuple[list[int], str]] = dataclasses.field(default_factory=list)
    is_chat: bool = False  # observations come in turns of their own
    reward: float = 0.0  # of the environment

    @property
    def parts(self) -> list[Completion]:
        """What is judged: of a chat the last turn; otherwise all, whose last may end thoughts."""
        return self.turns[-1:] if self.is_chat else self.turns

    @property
    def trail(self) -> tuple[list[int], list[float | None]]:
        """All ids after the prompt, with their log-probs: None for those that were not sampled."""
        ids, logprobs = [], []
        for index, turn in enumerate(self.turns):
            ids += turn.tokens
            logprobs += turn.logprobs
            for observed, _ in self.observations[index : index + 1]:
                ids += observed
                logprobs += [None] * len(observed)
        return ids, logprobs

    @property
    def num_observed(self) -> int:
        """Tokens of observations."""
        return sum(len(ids) for ids, _ in self.observations)

    def record(self) -> dict:
        """Who wrote what, as JSON."""
        parts = []
        for index, turn in enumerate(self.turns):
            parts.append({'by': 'model', 'text': turn.text, 'tokens': turn.tokens})
            for ids, text in self.observations[index : index + 1]:
                parts.append({'by': 'environment', 'text': text, 'tokens': ids})
        return {'turns': parts, 'observed_tokens': self.num_observed}

    def close_turn(self, stop: str) -> None:
        """Adds what the turn that has ended tells. stop: the mark of a call that ended it."""
        turn = self.turns[-1]
        for name in ('tokens', 'logprobs', 'sampling_logprobs', 'top_logprobs', 'versions'):
            setattr(self, name, getattr(self, name) + getattr(turn, name))
        turn.text += stop  # the ids have it, too
        self.text += turn.text

    def observe(self, ids: list[int], text: str) -> None:
        """Adds an observation, behind which a turn follows."""
        self.observations.append((ids, text))
        self.text += text


@dataclasses.dataclass(eq=False)
class _Seat:
    """An episode that is running."""

    prompt: Prompt
    request: Request  # of its first turn, with n = 1
    episode: Episode
    state: object = None  # of the environment; only in the process that steps it


class Player:
    """Plays episodes with an environment.

    In a run of several processes the primary one steps the environment, and tells what it says.

    Args:
      context: has the tokenizer and the chat template.
      where: the group, for messages: 'config.data.environment'.
      limit: (function, arguments) -> what the function returns; raises if that takes too long.

    Attributes:
      stop: strings that end a turn.
      seconds: that all this took so far, besides the engine's time.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        context,
        where: str,
        limit: Callable[[Callable, tuple], object],
    ):
        self._config, self._context, self._where, self._limit = config, context, where, limit
        self._environment = ENVIRONMENTS.load(config.name)(config)
        self._role = getattr(self._environment, 'role', None)
        self._tools = tuple(getattr(self._environment, 'tools', ()))
        self.stop = tuple(getattr(self._environment, 'stop', ()))
        self.seconds = 0.0
        self._checked: set[str] = set()  # tools that the template is known to show

    def offer(self, prompt: Prompt) -> Prompt:
        """The prompt of a chat with the tools of the environment.

        Raises:
          ConfigError: observations come in chat turns, or tools must be shown, but the prompt is no
            chat; or what the template writes around an observation is not clear.
        """
        if prompt.messages:
            offered = dataclasses.replace(prompt, tools=(*prompt.tools, *self._tools))
            if self._role:
                self._check_template(offered)
            return offered
        if self._role or self._tools:
            told = f'comes in a chat turn of the role {self._role}' if self._role else 'has tools'
            raise ConfigError(
                f'{self._where}: {self._config.name} {told}, but the prompt {prompt.id} is a text '
                'without turns: set role to None, or take a task with chats'
            )
        return prompt

    def _check_template(self, prompt: Prompt) -> None:
        if (tools := json.dumps(prompt.tools)) in self._checked:
            return
        self._checked.add(tools)
        try:
            self._context.chat().check_turns(self._role, prompt.tools)
        except DataError as error:
            raise ConfigError(f'{self._where}: {error}') from error

    def play(
        self,
        sampler: Sampler,
        requests: Iterable[Request],
        prompts: Mapping[str, Prompt],
        params,
        version: int,
        longest: int,
    ) -> dict[str, list[Episode]]:
        """Lends weights to the sampler and plays all requests -> {id: its episodes}.

        Arguments are those of `play_each`.
        """
        found: dict[str, list[Episode]] = {request.id: [] for request in requests}
        for episode in self.play_each(sampler, requests, prompts, params, version, longest):
            found[episode.id].append(episode)
        return {id: sorted(each, key=lambda one: one.sample_index) for id, each in found.items()}

    def play_each(
        self,
        sampler: Sampler,
        requests: Iterable[Request],
        prompts: Mapping[str, Prompt],
        params,
        version: int,
        longest: int,
        most: int | None = None,
    ) -> Iterator[Episode]:
        """Lends weights to the sampler and plays all requests; yields each episode at its end.

        If the caller stops reading, the episodes that are left are cancelled.

        Args:
          requests: of the first turns. Each further turn has the same options, max_tokens included.
          prompts: {id of a request: its prompt}.
          params, version: as in `Sampler.lend`.
          longest: tokens of prompt and episode together.
          most: about how many episodes run at a time; None: all.

        Raises:
          RuntimeError: the sampler has other requests, whose events would be lost.
        """
        if sampler.has_work:
            raise RuntimeError('the sampler has other requests, whose events would be lost')
        sampler.lend(params, version)
        waiting = (
            dataclasses.replace(request, n=1, sample_index=index)
            for request in requests
            for index in range(request.sample_index, request.sample_index + request.n)
        )
        seats: dict[tuple[str, int], _Seat] = {}
        try:
            while True:
                new = []
                while most is None or len(seats) + len(new) < most:
                    request = next(waiting, None)
                    if request is None:
                        break
                    new.append(self._seat(request, prompts[request.id]))
                ended = self._begin(sampler, new)
                seats |= {_key(seat): seat for seat in new if seat not in ended}
                if sampler.has_work:
                    ended += self._step(sampler, seats, longest)
                for seat in ended:
                    seats.pop(_key(seat), None)
                    yield seat.episode
                if not (seats or new):
                    return
        except BaseException:  # also if the caller stops reading
            for id, index in seats:
                sampler.cancel(id, index)
            raise

    def _seat(self, request: Request, prompt: Prompt) -> _Seat:
        episode = Episode(request.id, request.sample_index, is_chat=self._role is not None)
        return _Seat(prompt, request, episode)

    def _begin(self, sampler: Sampler, seats: list[_Seat]) -> list[_Seat]:
        """Has the first turns sampled -> episodes that cannot begin, because of a failed reset."""
        if not seats:
            return []
        failed = []
        for seat, error in zip(seats, self._of_all(self._reset, seats)):
            if error:
                self._fail(seat.episode, error)
                seat.episode.turns.append(Completion(*_key(seat)))
                failed.append(seat)
            else:
                self._add(sampler, seat, seat.request)
        return failed

    def _add(self, sampler: Sampler, seat: _Seat, request: Request) -> None:
        seat.episode.turns.append(Completion(*_key(seat)))
        is_later = len(seat.episode.turns) > 1  # it has pages that others might take
        sampler.add(request, num_prompt=len(seat.request.tokens), goes_first=is_later)

    def _step(self, sampler: Sampler, seats: Mapping, longest: int) -> list[_Seat]:
        """A step of the engine, and of the environment for turns that it ends -> ended episodes."""
        ended, asking = [], []
        for event in sampler.step():
            seat = seats[event.id, event.sample_index]
            turn = seat.episode.turns[-1]
            turn.add(event)
            if not event.finish_reason:
                continue
            seat.episode.close_turn(turn.stop if turn.stop in self.stop else '')
            if event.finish_reason == 'stop':
                asking.append(seat)
            else:
                seat.episode.finish_reason, seat.episode.error = event.finish_reason, event.error
                ended.append(seat)
        if not asking:
            return ended
        for seat, said in zip(asking, self._of_all(self._ask, asking)):
            request = self._go_on(seat, longest, *said)
            if request is None:
                ended.append(seat)
            else:
                self._add(sampler, seat, request)
        return ended

    def _go_on(
        self, seat: _Seat, longest: int, ids: list[int], text: str, done: bool, reward: float, error
    ) -> Request | None:
        """The request for the next turn; None if the episode has ended, which it then tells."""
        episode, first = seat.episode, seat.request
        episode.reward += reward
        if error:
            return self._fail(episode, error)
        tokens = [*first.tokens, *episode.trail[0], *ids]
        most = min(first.max_tokens, longest - len(tokens))
        is_last = len(episode.turns) == self._config.max_turns
        if done or is_last or most < 1:
            episode.finish_reason = 'stop' if done else 'turns' if is_last else 'length'
            # As of a sample of one turn: the id or the string.
            episode.stop = episode.turns[-1].stop
            return None
        episode.observe(ids, text)
        least = min(first.min_tokens, most)
        return dataclasses.replace(first, tokens=tokens, max_tokens=most, min_tokens=least)

    def _fail(self, episode: Episode, error: str) -> None:
        episode.finish_reason, episode.error = 'environment', f'{self._config.name}: {error}'

    def _of_all(self, ask: Callable[[_Seat], object], seats: list[_Seat]) -> list:
        """What the environment of the primary process says of each, in every process."""
        began = time.monotonic()
        said = agree.from_primary(lambda: list(map(ask, seats)))
        self.seconds += time.monotonic() - began
        return said

    # Below: what only the primary process does.

    def _reset(self, seat: _Seat) -> str:
        """Begins an episode of the environment -> '', or why that failed."""
        try:
            seat.state = self._limit(self._environment.reset, (seat.prompt,))
        except Exception as error:
            return _describe(error)
        return ''

    def _ask(self, seat: _Seat) -> tuple[list[int], str, bool, float, str]:
        """The environment's answer to a turn -> (ids, text, done, reward, '' or why it failed)."""
        turn = seat.episode.turns[-1]
        given = seat.state, turn.text, tuple(turn.tokens)
        try:
            said = self._limit(self._environment.step, given)
            if wrong := _find_wrong(said):
                return [], '', False, 0.0, wrong
            ids, text = self._encode(said, seat)
        except Exception as error:
            return [], '', False, 0.0, _describe(error)
        return ids, text, said.done, float(said.reward), ''

    def _encode(self, said: Observation, seat: _Seat) -> tuple[list[int], str]:
        """The ids that follow a turn, and their text.

        Raises DataError if an id is not in the vocabulary, or the text cannot be encoded.
        """
        tokenizer = self._context.tokenizer
        if said.ids:
            ids = [int(i) for i in said.ids]
            least, most = min(ids), max(ids)
            if least < 0 or most >= tokenizer.vocab_size:
                raise DataError(
                    f'its ids range from {least} to {most}, but the vocabulary has '
                    f'{tokenizer.vocab_size} ids'
                )
            return ids, tokenizer.decode(ids)
        if said.done:
            return [], ''
        if self._role:
            ids = self._context.chat().turn_ids(self._role, said.text, seat.prompt.tools)
            return ids, tokenizer.decode(ids)
        return tokenizer.encode_after(said.text), said.text


def _key(seat: _Seat) -> tuple[str, int]:
    return seat.request.id, seat.request.sample_index


def _describe(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'


def _find_wrong(said) -> str:
    """What is wrong with what an environment gave; '' if nothing is."""
    if not isinstance(said, Observation):
        return f'step gave {reprlib.repr(said)}, but must give an Observation'
    checks = {
        'text': (isinstance(said.text, str), 'a text'),
        'ids': (_are_ids(said.ids), 'a sequence of token ids'),
        'done': (isinstance(said.done, bool), 'True or False'),
        'reward': (_is_reward(said.reward), 'a number from -1e6 to 1e6'),
    }
    for name, (is_right, wanted) in checks.items():
        if not is_right:
            return f'{name} is {reprlib.repr(getattr(said, name))}, but must be {wanted}'
    if (said.text and len(said.ids)) or (said.done and (said.text or len(said.ids))):
        return 'an observation has a text or ids, and neither if the episode is done'
    return ''


def _are_ids(ids) -> bool:
    is_sequence = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
    return is_sequence and all(
        isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in ids
    )


def _is_reward(value) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and abs(value) <= MAX_REWARD
