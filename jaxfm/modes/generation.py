"""Shared by the modes: prompts -> sampler requests, and sampler events -> text."""

from pathlib import Path

from jaxfm import process
from jaxfm.chat.render import Chat
from jaxfm.modes.output import write_lines
from jaxfm.run.run import Run
from jaxfm.sampling.request import Request


def requests_for(config, tokenizer, prompts, flags=None) -> list[Request]:
    """One request per prompt. Flags, if given, take precedence over the config.

    Raises:
      DataError: the tokenizer or the chat template refuses a prompt.
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
    """The arguments that all requests share. Flags, if given, take precedence over the config."""
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
    # Begin like a document in training: with bos if the tokenizer has one.
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return begin + tokenizer.encode(prompt) or [tokenizer.eos_id]


def write_samples(run: Run, tokenizer, prompts, requests, events, path: Path | None) -> None:
    """Prints prompts and completions to stdout; also writes them to `path` as JSON lines.

    The file is written even if nobody reads stdout any more.
    """
    if not run.primary:
        return
    records = []
    for prompt, request in zip(prompts, requests, strict=True):
        ids = [token for event in events[request.id] for token in event.tokens]
        reason = events[request.id][-1].finish_reason
        ids = ids[:-1] if reason == 'stop' else ids
        # A chat answer is a text of its own; a completion is decoded as continuing its prompt.
        before = [] if run.config.sampling.chat else request.tokens
        text = tokenizer.decode_after(before, ids)
        process.print_text(prompt + '\n' * run.config.sampling.chat + text)
        if len(prompts) > 1:
            process.print_line('-' * 40)
        records.append({'prompt': prompt, 'completion': text, 'finish_reason': reason})
    if path:
        write_lines(path, records)
