"""Sampling-based evaluation: completes a task's prompts, scores them, and keeps every sample."""

import itertools
import json
import logging

from jaxfm.errors import DataError
from jaxfm.evals import GenerateConfig
from jaxfm.evals.base import Context, Periodic
from jaxfm.evals.statistics import wilson_interval
from jaxfm.sampling.engine import complete
from jaxfm.sampling.request import Completion, Request
from jaxfm.tasks import TASKS

log = logging.getLogger('jaxfm')


def _text_of(prompt) -> str:
    return prompt.text or '\n'.join(message['content'] for message in prompt.messages)


class Generate(Periodic):
    """pass@1 with its 95 % interval, and pass@1 per group of prompts.

    The score of a prompt is the mean over its n samples. With n > 1 the interval is
    conservative, because it treats these means as single answers. A sample that fails scores 0.

    Chats are rendered with the chat template. Other prompts are continued without a BOS token,
    because they come from the middle of documents.

    Raises:
      DataError: there is no prompt, or the sampler cannot hold one; raised before anything runs.
    """

    def __init__(self, config: GenerateConfig, context: Context):
        super().__init__(config.every, config.at_start)
        self._config, self._sampler, self._seed = config, context.sampler, context.seed
        self._tokenizer, self._chat = context.dataset.tokenizer, context.dataset.chat
        documents = context.dataset.heldout_documents
        self._task = TASKS.load(config.task.name)(config.task, documents)
        self._name, self._directory = context.name, context.samples_directory
        self._prompts = {prompt.id: prompt for prompt in self._task.prompts()}
        if not self._prompts:
            raise DataError(
                f'config.evals.{context.name}: task {config.task.name} found no prompt in the '
                'held-out documents'
            )
        self._requests = [self._request(prompt) for prompt in self._prompts.values()]
        for request in self._requests:
            self._sampler.check(request)

    def run(self, params, step: int) -> dict[str, float]:
        """Samples and scores -> {'pass@1', 'pass@1_low', 'pass@1_high', 'prompts'} and by group.

        The scores by group are called 'pass@1/<group>'.
        """
        prompts = self._prompts
        completions = complete(
            self._sampler,
            self._requests,
            params,
            step,
            stop=lambda sample: self._task.stop(prompts[sample.id], sample.text),
        )
        self._warn_of_failures(step, list(itertools.chain(*completions.values())))
        scores, records = {}, []
        for prompt in prompts.values():
            judged = [self._judge(step, prompt, sample) for sample in completions[prompt.id]]
            scores[prompt.id] = sum(record['score'] for record in judged) / len(judged)
            records += judged
        self._write(step, records)
        passed = sum(scores.values())
        low, high = wilson_interval(passed, len(scores))
        return {
            'pass@1': passed / len(scores),
            'pass@1_low': low,
            'pass@1_high': high,
            'prompts': float(len(scores)),
            **self._by_group(scores),
        }

    def _judge(self, step: int, prompt, sample: Completion) -> dict:
        """The record of a sample, with its score."""
        has_failed = sample.finish_reason == 'error'
        return {
            'step': step,
            'id': prompt.id,
            'sample_index': sample.sample_index,
            'prompt': prompt.text or list(prompt.messages),
            'completion': sample.text,
            'score': 0.0 if has_failed else self._task.evaluate(prompt, sample.text),
            'finish_reason': sample.finish_reason or 'judged',
        }

    def _warn_of_failures(self, step: int, samples: list[Completion]) -> None:
        failed = [sample for sample in samples if sample.finish_reason == 'error']
        if failed:
            log.warning(
                'step %d  %s: %d of %d samples failed and score 0; the first (%s): %s',
                *(step, self._name, len(failed), len(samples), failed[0].id, failed[0].error),
            )

    @property
    def prompt_texts(self) -> list[str]:
        """The prompts as text; for a chat, the contents of its messages, joined by newlines."""
        return [_text_of(prompt) for prompt in self._prompts.values()]

    def _by_group(self, scores: dict[str, float]) -> dict[str, float]:
        groups = {}
        for prompt in self._prompts.values():
            if prompt.group:
                groups.setdefault(prompt.group, []).append(scores[prompt.id])
        return {f'pass@1/{name}': sum(passed) / len(passed) for name, passed in groups.items()}

    def _request(self, prompt) -> Request:
        stop_ids = self._sampler.config.stop_ids
        return Request(
            id=prompt.id,
            tokens=self._prompt_ids(prompt),
            seed=self._seed,
            **self._config.request_options(self._chat.stop_ids, stop_ids),
        )

    def _prompt_ids(self, prompt) -> list[int]:
        if prompt.messages:
            return self._chat.prompt(prompt.messages, prompt.tools)
        return self._tokenizer.encode(prompt.text)

    def _write(self, step: int, records: list[dict]) -> None:
        """Writes one file per step, so a resumed run that repeats a step replaces its file."""
        if self._directory is None:
            return
        path = self._directory / f'{self._name}-{step:06d}.jsonl'
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            path.write_text(''.join(json.dumps(record) + '\n' for record in records), 'utf-8')
        except OSError as error:  # the scores matter more: training goes on
            log.warning('%s: the samples could not be written: %s', path, error.strerror)
