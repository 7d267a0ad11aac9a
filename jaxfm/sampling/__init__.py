"""Sampling: the engine that evaluation, rollouts and the server drive, one `step()` at a time."""

from pydantic import Field

from jaxfm.schema import Group


class SamplingConfig(Group):
    """The engine's static shapes, and what a request gets if it does not say."""

    slots: int = Field(64, ge=1)  # sequences decoded together
    max_length: int = Field(512, ge=2)  # prompt and completion together, in tokens
    decode_steps: int = Field(16, ge=1)  # tokens per compiled call; stopping is seen between calls
    temperature: float = Field(1.0, ge=0)
    max_tokens: int = Field(128, ge=1)
    num_samples: int = Field(3, ge=0)  # shown on the console at the end of a training run
    prompts: list[str] = []  # what those samples continue; the end of the list repeats
    stop_ids: list[int] = []  # that end a completion, beside those of the tokenizer and its chats
    chat: bool = False  # a prompt is what a user says, and is put into the chat template
