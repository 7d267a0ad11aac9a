"""Multiple choice by log-likelihood, through the sampling engine, which computes prefixes once."""

import operator
from collections import defaultdict

from jaxfm.errors import DataError
from jaxfm.evals import LikelihoodConfig, choice
from jaxfm.evals.base import Context, Periodic, judged_by, text_of, warn_of_failures
from jaxfm.evals.prompts import choice_ids, open_task, pair_ids
from jaxfm.evals.samples import Samples
from jaxfm.evals.scoring import Key, Scored, key, score_each, score_request
from jaxfm.sampling.request import Request
from jaxfm.tasks.base import Choice


class Likelihood(Periodic):
    """Accuracy of the likeliest choice: raw, per byte, normalised by the unconditional likelihood.

    Of prompts with a single pair: greedy accuracy and perplexity. `docs/evaluation.md` has all.

    Raises:
      DataError: a prompt has no choices, or the sampler cannot hold one; before anything runs.
    """

    def __init__(self, config: LikelihoodConfig, context: Context):
        super().__init__(config.every, config.at_start)
        self._config, self._context, self._sampler = config, context, context.sampler
        _, self._prompts = open_task(config.task, context.documents, context.where)
        # By prompt: the request of each choice, and of each choice without the question.
        self._requests: dict[str, list[Request]] = {}
        self._alone: dict[str, list[Request]] = {}
        for prompt in self._prompts.values():
            if not isinstance(prompt, Choice):
                raise DataError(
                    f'{context.where}: the prompts of task {config.task.name} have no '
                    'choices to compare; use name=generate'
                )
            pairs = choice_ids(prompt, context)
            self._requests[prompt.id] = self._score(prompt, pairs)
            alone = [pair_ids(prompt.unconditional, text, context) for _, text in prompt.pairs]
            self._alone[prompt.id] = self._score(prompt, alone) if len(pairs) > 1 else []
        for requests in (*self._requests.values(), *self._alone.values()):
            for request in requests:
                self._sampler.check(request)

    @property
    def prompt_texts(self) -> list[str]:
        """The texts of the prompts, chats included; see `text_of`."""
        return [text_of(prompt) for prompt in self._prompts.values()]

    def _score(self, prompt: Choice, pairs: list[tuple[list[int], list[int]]]) -> list[Request]:
        for number, (_, continuation) in enumerate(pairs):
            if not continuation:
                raise DataError(
                    f'{self._context.where}: choice {number} of {prompt.id} adds no '
                    f'token to its context: {prompt.pairs[number][1]!r}'
                )
        return [
            score_request(f'{prompt.id} choice {number}', *pair)
            for number, pair in enumerate(pairs)
        ]

    def open(self, step: int) -> Samples:
        """The file of the questions at a step."""
        subject = (
            (
                id,
                [[list(one.tokens), one.prompt_logprobs_from] for one in requests],
                judged_by(self._prompts[id]),
            )
            for id, requests in self._requests.items()
        )
        return self._context.open_samples(self._config, step, subject)

    def run(self, params, step: int) -> dict[str, float]:
        """Scores all choices -> {metric: value}; {} on a process that has not all questions.

        Questions that the file of an interrupted evaluation has are not scored again.
        """
        with self.open(step) as samples:
            kept = {id for id, _ in samples.kept}
            missing = [id for id in self._prompts if id not in kept]
            for id, scored in self._score_all(missing, params, step):
                samples.add(self._record(id, scored, step))
            records = [one for one in samples.records if one['id'] in self._prompts]
        if len(records) < len(self._prompts):
            return {}
        places = {id: place for place, id in enumerate(self._prompts)}
        records.sort(key=lambda record: places[record['id']])
        warn_of_failures(
            step, self._context.name, records, operator.itemgetter('error'), 'questions failed'
        )
        return choice.summarize(records, self._config.cluster_by_group) | self._costs()

    def _score_all(self, ids: list[str], params, step: int):
        """Yields (id of a prompt, {its different requests, as `key`: scores}) once all are there.

        Equal requests are scored once, and those with a common prefix (examples, a question's
        context) one after another.
        """
        waiting, missing, distinct = defaultdict(set), {}, {}
        for id in ids:
            requests = {key(one): one for one in (*self._requests[id], *self._alone[id])}
            distinct |= requests
            missing[id] = set(requests)
            for each in requests:
                waiting[each].add(id)
        # Those without a question first: they are few, and many questions need them.
        ranked = sorted(distinct, key=lambda each: (len(waiting[each]) == 1, each))
        found: dict[Key, Scored] = {}
        ordered = [distinct[each] for each in ranked]
        for each, scored in score_each(ordered, self._context, params, step):
            found[each] = scored
            for id in sorted(waiting[each]):
                missing[id].discard(each)
                if not missing[id]:
                    yield id, found

    def _record(self, id: str, scored: dict[Key, Scored], step: int) -> dict:
        """What is kept of a question, with its scores."""
        prompt, requests = self._prompts[id], self._requests[id]
        choices = [scored[key(request)] for request in requests]
        alone = [scored[key(request)] for request in self._alone[id]]
        error = next((one.error for one in (*choices, *alone) if one.error), '')
        logprobs, unconditional = ([one.logprob for one in each] for each in (choices, alone))
        num_bytes = [len(text.strip().encode('utf-8', 'replace')) for _, text in prompt.pairs]
        if error:
            names = (*choice.ACCURACIES.values(), 'probability')
            scores = dict.fromkeys(names, 0.0) if alone else {'score': 0.0}
        elif alone:
            scores = choice.score_choices(logprobs, unconditional, num_bytes, prompt.right)
        else:
            scores = {'score': float(choices[0].is_greedy)}
        return {
            'task': self._config.task.name,
            'step': step,
            'id': id,
            'group': prompt.group,
            'sample_index': 0,
            'prompt': prompt.text or list(prompt.messages),
            **scores,
            'logprobs': None if error else logprobs,
            'unconditional': None if error else unconditional,
            'bytes': num_bytes,
            'is_greedy': [one.is_greedy for one in choices],
            'right': list(prompt.right),
            'error': error,
            'prompt_tokens': sum(request.prompt_logprobs_from for request in requests),
            'num_tokens': sum(
                len(request.tokens) - request.prompt_logprobs_from for request in requests
            ),
        }

    def _costs(self) -> dict[str, float]:
        """Tokens and model FLOPs of contexts and continuations.

        The choices of a question share its context. Examples that several questions share count for
        each of them; what is scored without a question counts once for all.
        """
        flops, total, num_tokens = self._context.flops, 0.0, 0
        alone = [one for requests in self._alone.values() for one in requests]
        for group in (*self._requests.values(), alone):
            requests = {key(one): one for one in group}.values()
            contexts = {tuple(one.tokens[: one.prompt_logprobs_from]) for one in requests}
            total += sum(flops(len(context)) for context in contexts)
            num_tokens += sum(map(len, contexts))
            for request in requests:
                start = request.prompt_logprobs_from
                total += flops(len(request.tokens)) - flops(start)
                num_tokens += len(request.tokens) - start
        return {'cost/prompt_tokens': float(num_tokens), 'cost/flops': total}
