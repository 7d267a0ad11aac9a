"""The prompts of a rollout: those of a task, as token ids, in an endless shuffled order."""

import functools
import logging
import zlib

from jaxfm.data import SOURCES
from jaxfm.data.documents import Document
from jaxfm.environments.episode import Player
from jaxfm.errors import DataError
from jaxfm.evals.base import digest_of
from jaxfm.evals.prompts import open_task, prompt_ids
from jaxfm.rollout import RolloutConfig
from jaxfm.sampling import stop_ids_of
from jaxfm.sampling.request import Request
from jaxfm.tasks.base import Prompt

log = logging.getLogger('jaxfm')


class Prompts:
    """A task with its prompts; number n of the endless order asks the same in every process.

    Args:
      player: of the environment, if there is one: it shows its tools, and strings end its turns.

    Attributes:
      task: that judges the completions.
      longest: tokens of the longest prompt.

    Raises:
      DataError: there is no prompt, or one leaves no room for its completion.
    """

    def __init__(self, config: RolloutConfig, context, seed: int, player: Player | None = None):
        where = 'config.data'
        self._config, self._seed = config, seed
        self.task, found = open_task(config.task, _read_documents(config), where)
        self._prompts = list(found.values())
        self._stop = () if player is None else player.stop
        if player is not None:
            self._prompts = list(map(player.offer, self._prompts))
        self._ids = [prompt_ids(prompt, context, self.task) for prompt in self._prompts]
        self._stop_ids = stop_ids_of(
            context.chat().stop_ids, context.sampler.config.stop_ids, config.ignore_eos
        )
        self._leave_out_long(where, min(config.sequence_length + 1, context.sampler.longest))
        self.longest = max(map(len, self._ids))
        for place in range(len(self._prompts)):
            context.sampler.check(self._request(place, 0))

    def _leave_out_long(self, where: str, most: int) -> None:
        room = most - self._config.max_tokens
        long = [number for number, ids in enumerate(self._ids) if len(ids) > room]
        if not long:
            return
        longest = max(len(self._ids[number]) for number in long)
        told = (
            f'{where}: {len(long)} of {len(self._ids)} prompts have more than {room} tokens, the '
            f'longest {longest}, and leave no room for max_tokens {self._config.max_tokens}'
        )
        if self._config.too_long == 'error' or len(long) == len(self._ids):
            raise DataError(
                f'{told}: set sequence_length={longest + self._config.max_tokens - 1} and '
                f'config.sampling.max_length={longest + self._config.max_tokens}, or too_long=drop'
            )
        log.warning('%s; they are left out', told)
        kept = sorted(set(range(len(self._ids))) - set(long))
        self._prompts = [self._prompts[number] for number in kept]
        self._ids = [self._ids[number] for number in kept]

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def statistics(self) -> dict[str, int | float | str]:
        """What is asked, for the report."""
        return {
            'task': self._config.task.name,
            'prompts': len(self._ids),
            'prompt_tokens': sum(map(len, self._ids)) / len(self._ids),  # on average
            'longest_prompt': self.longest,
            'fingerprint': self.fingerprint,
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with any prompt, and with what its completions are compared with."""
        return digest_of([vars(prompt), ids] for prompt, ids in zip(self._prompts, self._ids))

    def place(self, number: int) -> int:
        """Which prompt is number `number` of the endless order."""
        return self._order[number]

    def request(self, place: int, number: int) -> tuple[Prompt, Request]:
        """-> the prompt at a place, and the request for its samples as number `number`."""
        return self._prompts[place], self._request(place, number)

    @functools.cached_property
    def _order(self):
        from jaxfm.data.order import shuffle  # imports Grain, which takes a third of a second

        return shuffle(range(len(self._prompts)), self._seed)

    def _request(self, place: int, number: int) -> Request:
        return Request(
            id=str(number),
            tokens=self._ids[place],
            max_tokens=self._config.max_tokens,
            # A prompt that comes again in another epoch gets other samples.
            seed=zlib.crc32(f'{self._seed} {number}'.encode()),
            stop_ids=self._stop_ids,
            stop=self._stop,
            n=self._config.samples,
        )


def _read_documents(config: RolloutConfig) -> list[Document]:
    """The documents that are not held out."""
    if config.documents is None:
        return []
    source = SOURCES.load(config.documents.name)(config.documents)
    return [
        document
        for shard in source.shards()
        for is_heldout, document in source.read(shard)
        if not is_heldout
    ]
