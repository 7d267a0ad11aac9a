"""From prompts to requests of the sampler, and from its events to text: what modes share."""

import sys
from pathlib import Path

from jaxfm.data.chat import Chat
from jaxfm.modes.output import write_lines
from jaxfm.run import Run
from jaxfm.sampling.sampler import Request, complete


def requests_for(config, tokenizer, prompts, flags=None) -> list[Request]:
    """One request a prompt; what flags, if there are any, do not say the config says.

    Raises:
      DataError: a prompt that the tokenizer or the chat template refuses.
    """
    sampling = config.sampling
    temperature, max_tokens = sampling.temperature, sampling.max_tokens
    chat = Chat(tokenizer)
    if flags is not None:
        temperature = temperature if flags.temperature is None else flags.temperature
        max_tokens = flags.max_tokens or max_tokens
    return [
        Request(
            id=str(index),
            tokens=_prompt_ids(config, tokenizer, chat, prompt),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=flags.seed if flags is not None else config.seed,
            sample_index=index,
            stop_ids=chat.stop_ids | set(sampling.stop_ids),
        )
        for index, prompt in enumerate(prompts)
    ]


def _prompt_ids(config, tokenizer, chat: Chat, prompt: str) -> list[int]:
    if config.sampling.chat:
        return chat.prompt([{'role': 'user', 'content': prompt}])
    # As documents begin in training: with bos, where there is one.
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return begin + tokenizer.encode(prompt) or [tokenizer.eos_id]


def write_samples(run: Run, sampler, tokenizer, prompts, requests, path: Path | None) -> None:
    """Runs the requests; prompts and what follows on them go to stdout, and to a file if asked."""
    events = complete(sampler, requests)
    if not run.primary:
        return
    records = []
    for prompt, request in zip(prompts, requests, strict=True):
        ids = [token for event in events[request.id] for token in event.tokens]
        reason = events[request.id][-1].finish_reason
        text = tokenizer.decode(ids[:-1] if reason == 'stop' else ids)
        print(prompt + '\n' * run.config.sampling.chat + text, flush=True)
        if len(prompts) > 1:
            print('-' * 80, file=sys.stderr, flush=True)
        records.append({'prompt': prompt, 'completion': text, 'finish_reason': reason})
    if path:
        write_lines(path, records)
