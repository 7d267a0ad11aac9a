"""From prompts to requests of the sampler, and from its events to text: what modes share."""

import sys
from pathlib import Path

from jaxfm.chat.render import Chat
from jaxfm.modes.output import write_lines
from jaxfm.run.run import Run
from jaxfm.sampling.request import Request


def requests_for(config, tokenizer, prompts, flags=None) -> list[Request]:
    """One request a prompt; what flags, if there are any, do not say the config says.

    Raises:
      DataError: a prompt that the tokenizer or the chat template refuses.
    """
    chat = Chat(tokenizer)
    options = request_options(config, chat, flags)
    return [
        Request(
            id=str(index),
            tokens=_prompt_ids(config, tokenizer, chat, prompt),
            sample_index=index,
            **options,
        )
        for index, prompt in enumerate(prompts)
    ]


def request_options(config, chat: Chat, flags=None) -> dict:
    """What all requests have in common: of the flags, or else of the config."""
    sampling = config.sampling
    temperature, max_tokens, seed = sampling.temperature, sampling.max_tokens, config.seed
    if flags is not None:
        temperature = temperature if flags.temperature is None else flags.temperature
        max_tokens, seed = flags.max_tokens or max_tokens, flags.seed
    stop_ids = chat.stop_ids | set(sampling.stop_ids)
    return dict(temperature=temperature, max_tokens=max_tokens, seed=seed, stop_ids=stop_ids)


def _prompt_ids(config, tokenizer, chat: Chat, prompt: str) -> list[int]:
    if config.sampling.chat:
        return chat.prompt([{'role': 'user', 'content': prompt}])
    # As documents begin in training: with bos, where there is one.
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return begin + tokenizer.encode(prompt) or [tokenizer.eos_id]


def write_samples(run: Run, tokenizer, prompts, requests, events, path: Path | None) -> None:
    """Prompts and what follows on them go to stdout, and to a file if asked."""
    if not run.primary:
        return
    records = []
    for prompt, request in zip(prompts, requests, strict=True):
        ids = [token for event in events[request.id] for token in event.tokens]
        reason = events[request.id][-1].finish_reason
        ids = ids[:-1] if reason == 'stop' else ids
        # An answer begins a text of its own, what continues a prompt does not.
        before = [] if run.config.sampling.chat else request.tokens
        text = tokenizer.decode_after(before, ids)
        print(prompt + '\n' * run.config.sampling.chat + text, flush=True)
        if len(prompts) > 1:
            print('-' * 80, file=sys.stderr, flush=True)
        records.append({'prompt': prompt, 'completion': text, 'finish_reason': reason})
    if path:
        write_lines(path, records)
