"""What all evaluators share: their context, their cadence, and the file of their samples."""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxfm.evals import EvaluatorConfig
from jaxfm.evals.samples import Samples
from jaxfm.tasks.base import Prompt

log = logging.getLogger('jaxfm')

# Samples that wait or run, for each slot.
_IN_LINE = 8
# Keys of a config that do not change what a sample is. With a larger n, those that are there stay.
_NOT_OF_SAMPLES = (
    *('every', 'at_start', 'phase', 'contamination_bytes', 'cluster_by_group', 'n'),
    'call_seconds',
)
# Fields of a prompt that its tokens stand for.
_TOKENIZED = ('text', 'messages', 'tools', 'pairs')


@dataclasses.dataclass(frozen=True)
class Context:
    """What a run gives to each of its evaluators."""

    name: str  # of the evaluator: its metrics are eval/<name>/...
    merge: Callable[[dict], Any]  # {path: array} -> model
    dataset: Any  # of the evaluator's phase: held-out tokens and documents; None without a phase
    tokenizer: Any
    chat: Callable[[], Any]  # -> the chat template
    sampler: Any
    mesh: Any
    seed: int
    flops: Callable[[int], float]  # tokens of a document -> model FLOPs of its forward pass
    weights: Callable[[int], dict]  # step -> which weights these are, as JSON
    samples_directory: Path | None  # None on processes that write no files
    goes_on: bool = False  # with the files of an interrupted evaluation

    @property
    def where(self) -> str:
        """The evaluator's place in the config, for messages."""
        return f'config.evals.{self.name}'

    @property
    def documents(self) -> list:
        """The held-out documents; [] for a run without data."""
        return [] if self.dataset is None else self.dataset.heldout_documents

    @property
    def most(self) -> int:
        """Samples in the sampler at a time: enough to fill its slots, but not all of a big task."""
        return _IN_LINE * self.sampler.config.slots

    def open_samples(
        self, config: EvaluatorConfig, step: int, subject: Iterable, **options
    ) -> Samples:
        """The file of an evaluation at a step.

        Args:
          subject: everything that is evaluated, right answers included; only its digest goes into
            the header.
          options: more that the samples depend on, as JSON.
        """
        given = config.model_dump(exclude=set(_NOT_OF_SAMPLES))
        header = {
            'evaluator': given.pop('name'),
            'task': given.pop('task', {'name': given.get('path', self.name)}),
            'weights': self.weights(step),
            'options': given | options,
            'seed': self.seed,
            'subject': digest_of(subject),
        }
        path = None
        if self.samples_directory:
            path = self.samples_directory / f'{self.name}-{step:06d}.jsonl'
        return Samples(path, header, self.goes_on)


def digest_of(subject: Iterable) -> str:
    """A digest of values that are JSON, or a task's own; the same in every process."""
    digest = hashlib.sha256()
    for each in subject:
        digest.update(json.dumps(each, default=_as_json).encode())
    return digest.hexdigest()[:16]


def _as_json(value: Any) -> Any:
    """A task's own value in a form that is the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    # Without the address that the default repr has.
    return re.sub(r' at 0x[0-9a-f]+', '', repr(value))


class Periodic:
    """The cadence of an evaluator.

    Args:
      every: steps between two runs; 0 means only at the end of each phase.
      at_start: whether to run on the weights of step 0 too.
    """

    def __init__(self, every: int, at_start: bool):
        self._every, self._at_start = every, at_start

    def is_due(self, step: int, last: int) -> bool:
        """Whether to run at `step`. last: the last step of the phase, at which it always runs."""
        if step in (0, last):
            return step == last or self._at_start
        return bool(self._every) and step % self._every == 0


def judged_by(prompt: Prompt) -> dict[str, Any]:
    """What the scores of a prompt depend on besides its tokens: right answers, group and more."""
    return {key: value for key, value in vars(prompt).items() if key not in _TOKENIZED}


def text_of(prompt: Prompt) -> str:
    """The prompt's text; of a chat without one, the contents of its messages, in lines."""
    return prompt.text or '\n'.join(message['content'] for message in prompt.messages)


def warn_of_failures(
    step: int, name: str, records: list[dict], is_it: Callable[[dict], Any], what: str
) -> None:
    """Tells how many of an evaluation's records score 0 because something failed, and the first.

    what: who they are and what happened, such as 'samples failed'.
    """
    if found := [record for record in records if is_it(record)]:
        log.warning(
            'step %d  %s: %d of %d %s and score 0; the first (%s): %s',
            *(step, name, len(found), len(records), what, found[0]['id'], found[0]['error']),
        )
