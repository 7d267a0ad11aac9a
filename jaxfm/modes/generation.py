"""Shared by the modes: prompts -> sampler requests, and completions -> text."""

from pathlib import Path

from jaxfm import process
from jaxfm.chat.render import Chat
from jaxfm.errors import listed
from jaxfm.modes.output import write_lines
from jaxfm.run.run import Run
from jaxfm.sampling.request import Completion, Request

Completions = dict[str, list[Completion]]  # {id of a request: its samples}


def requests_for(config, tokenizer, prompts, seed: int | None = None) -> list[Request]:
    """One request per prompt, for config.sampling.n samples each.

    seed: of the noise; default: config.seed.

    Raises:
      DataError: the tokenizer or the chat template refuses a prompt.
    """
    chat = Chat(tokenizer)
    options = request_options(config, chat, seed)
    return [
        Request(
            id=str(index),
            tokens=_prompt_ids(config, tokenizer, chat, prompt),
            sample_index=index * config.sampling.n,
            **options,
        )
        for index, prompt in enumerate(prompts)
    ]


def request_options(config, chat: Chat, seed: int | None = None) -> dict:
    """The arguments that all requests share. seed: as in `requests_for`."""
    options = config.sampling.request_options(chat.stop_ids, config.sampling.stop_ids)
    return options | {'seed': config.seed if seed is None else seed}


def _prompt_ids(config, tokenizer, chat: Chat, prompt: str) -> list[int]:
    if config.sampling.chat:
        return chat.prompt([{'role': 'user', 'content': prompt}])
    # Begin like a document in training: with bos if the tokenizer has one.
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return begin + tokenizer.encode(prompt) or [tokenizer.eos_id]


def write_samples(
    run: Run,
    tokenizer,
    prompts,
    requests,
    completions: Completions,
    path: Path | None,
    logprobs: bool = False,
) -> None:
    """Prints prompts and completions to stdout; also writes them to `path` as JSON lines.

    The file is written even if nobody reads stdout any more.

    logprobs: also write the tokens and their log-probs.
    """
    if not run.primary:
        return
    is_chat, records = run.config.sampling.chat, []
    num_samples = sum(map(len, completions.values()))
    for prompt, request in zip(prompts, requests, strict=True):
        # A chat answer is a text of its own; other completions continue their prompt.
        before = [] if is_chat else request.tokens
        for sample in completions[request.id]:
            text = _text_after(tokenizer, before, sample)
            process.print_text(prompt + '\n' * is_chat + text)
            if num_samples > 1:
                process.print_line('-' * 40)
            records.append({'prompt': prompt, 'completion': text} | _describe(sample, logprobs))
    if path:
        write_lines(path, records)


def _text_after(tokenizer, before, sample: Completion) -> str:
    """The text that a sample adds to `before`. As a text of its own, it may lack a first space."""
    after, alone = tokenizer.decode_after(before, sample.tokens), tokenizer.decode(sample.tokens)
    return after[: len(after) - len(alone)] * after.endswith(alone) + sample.text


def _describe(sample: Completion, logprobs: bool) -> dict:
    names = ['sample_index', 'finish_reason']
    names += ['error'] if sample.error else []
    names += ['tokens', 'logprobs', 'sampling_logprobs'] if logprobs else []
    return {name: getattr(sample, name) for name in names}


def describe_failures(prompts, requests, completions: Completions) -> str:
    """Which samples failed, and why; '' if none did."""
    failed = [
        f'{prompt[:60]!r} (sample {sample.sample_index}): {sample.error}'
        for prompt, request in zip(prompts, requests, strict=True)
        for sample in completions[request.id]
        if sample.finish_reason == 'error'
    ]
    total = sum(map(len, completions.values()))
    return f'{len(failed)} of {total} samples failed: {listed(failed)}' if failed else ''
