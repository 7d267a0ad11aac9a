"""Sampling: the engine that evaluation, chat and the sample mode drive step by step."""

from pydantic import Field

from jaxfm.schema import Group


class SamplingConfig(Group):
    """The engine's static shapes, and the defaults for requests."""

    slots: int = Field(64, ge=1)  # most sequences decoded together
    max_length: int = Field(512, ge=2)  # tokens of prompt plus completion
    decode_steps: int = Field(16, ge=1)  # most tokens of a sequence per compiled call
    prefill_tokens: int = Field(512, ge=16)  # of prompts per compiled call, padding included
    page_size: int = Field(16, ge=1)  # tokens of a page of the key-value cache
    # Pages of the cache, over all shards of the batch; None: enough for all slots at max_length.
    # With fewer, sequences that no longer fit wait, and are computed again.
    pages: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0)
    max_tokens: int = Field(128, ge=1)  # of a completion
    num_samples: int = Field(3, ge=0)  # samples to show at the end of a training run
    prompts: list[str] = []  # prompts of those samples; repeated if fewer than num_samples
    stop_ids: list[int] = []  # end a completion, besides those of tokenizer and chat template
    chat: bool = False  # treat a prompt as a user's message and apply the chat template
