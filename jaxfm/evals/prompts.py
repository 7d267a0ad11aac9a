"""A task's prompts as token ids, and what the engine says about given ids."""

import math

from jaxfm.errors import DataError
from jaxfm.evals.base import Context
from jaxfm.sampling.request import Completion
from jaxfm.schema import Group
from jaxfm.tasks import TASKS
from jaxfm.tasks.base import Choice, Prompt


def open_task(config: Group, documents: list, where: str) -> tuple:
    """-> the task, {id: its prompt}.

    Args:
      config: of the task.
      documents: for a task that reads documents.
      where: the group that has it, for messages: 'config.evals.mine'.

    Raises:
      DataError: the task has no prompt, or two prompts with one id.
    """
    task = TASKS.load(config.name)(config, documents)
    prompts, where = task.prompts(), f'{where}: task {config.name}'
    if not prompts:
        place = getattr(config, 'path', '') or 'the documents'
        raise DataError(f'{where} found no prompt in {place}')
    found = {prompt.id: prompt for prompt in prompts}
    if len(found) < len(prompts):
        ids = [prompt.id for prompt in prompts]
        twice = next(id for id in ids if ids.count(id) > 1)
        raise DataError(f'{where} has more than one prompt with the id {twice}')
    return task, found


def begin_ids(tokenizer) -> list[int]:
    """How a document begins: with a BOS token, if the tokenizer puts one there."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def prompt_ids(prompt: Prompt, context: Context, task) -> list[int]:
    """The ids of a prompt whose completion is sampled.

    A chat is rendered with the chat template. A text begins like a document, unless it comes from
    the middle of one.
    """
    if prompt.messages:
        return context.chat().prompt(prompt.messages, prompt.tools)
    ids = context.tokenizer.encode(prompt.text)
    is_inside = getattr(task, 'continues_documents', False)
    return ids if is_inside else begin_ids(context.tokenizer) + ids


def pair_ids(before: str, continuation: str, context: Context) -> tuple[list[int], list[int]]:
    """-> the ids of a context, and those of its continuation.

    The continuation has the ids of both texts together without the context's own, as in lm-eval:
    its first token may not be the one that it has alone. White space at the end of the context
    belongs to the continuation, because most tokenizers join it to the following word. An empty
    context is the beginning of a document: BOS, or the EOS that ended the document before.
    """
    kept = before.rstrip()
    continuation = before[len(kept) :] + continuation
    first = context.tokenizer.encode(kept) if kept else []
    both = context.tokenizer.encode(kept + continuation)
    begin = begin_ids(context.tokenizer)
    if not kept and not begin:
        begin = [context.tokenizer.eos_id]
    return [*begin, *first], both[len(first) :]


def choice_ids(prompt: Choice, context: Context) -> list[tuple[list[int], list[int]]]:
    """(ids of the context, ids of the continuation) of each choice.

    In a chat, every continuation begins the assistant's turn.
    """
    if prompt.messages:
        before = context.chat().prompt(prompt.messages, prompt.tools)
        return [(before, context.tokenizer.encode(text)) for _, text in prompt.pairs]
    return [pair_ids(*pair, context) for pair in prompt.pairs]


def read_logprob(sample: Completion) -> tuple[float, str]:
    """-> the log-prob of the scored tokens of a request that only scores, and '' or what failed."""
    if sample.finish_reason == 'error':
        return math.nan, sample.error
    total = sum(sample.prompt_logprobs)
    return total, '' if math.isfinite(total) else f'the model gives a log-prob of {total}'
