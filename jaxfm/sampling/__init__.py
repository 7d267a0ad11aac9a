"""Sampling: the engine that evaluation, chat and the sample mode drive step by step."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from jaxfm.schema import Group, KeyPath, Problem

MAX_INT32 = 2**31 - 1
MIN_FLOAT32, MAX_FLOAT32 = 1.1754943508222875e-38, 3.4028234663852886e38  # above 0
MAX_SAMPLES = 1 << 14  # of a request
MAX_STOPS = 64  # stop strings of a request
MAX_STOP_LENGTH = 1000  # characters of a stop string
# The ranges are those of `request.check_request`, except that a config holds no infinity.
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Bias = Annotated[_Number, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
_TokenId = Annotated[int, Field(ge=0)]
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_INT32)]
Temperature = Annotated[_Number, Field(ge=0, le=MAX_FLOAT32)]


def stop_ids_of(end_ids: Iterable[int], others: Iterable[int], ignore_eos: bool) -> frozenset[int]:
    """The ids that end a completion.

    Args:
      end_ids: those with which tokenizer and chat template end a text.
      others: those that end it besides.
    """
    ends, others = frozenset(end_ids), frozenset(others)
    return others - ends if ignore_eos else others | ends


class SamplingOptions(Group):
    """How to sample the completions of a prompt."""

    max_tokens: MaxTokens = 128  # of a completion
    temperature: Temperature = 1.0  # 0: greedy decoding
    n: int = Field(1, ge=1, le=MAX_SAMPLES)  # completions of each prompt
    top_k: int = Field(0, ge=0, le=MAX_INT32)  # only so many likeliest tokens; 0: all
    # Only the likeliest tokens that together have this probability.
    top_p: _Number = Field(1.0, gt=0, le=1)
    # Only tokens with at least this share of the likeliest one's probability.
    min_p: _Number = Field(0.0, ge=0, le=1)
    # Divides positive logits of tokens in prompt and completion, multiplies negative ones.
    repetition_penalty: _Number = Field(1.0, ge=MIN_FLOAT32, le=MAX_FLOAT32)
    # Subtracted from the logits of tokens in the completion; frequency: for each occurrence.
    presence_penalty: _Number = Field(0.0, ge=-2, le=2)
    frequency_penalty: _Number = Field(0.0, ge=-2, le=2)
    logit_bias: dict[_TokenId, _Bias] = {}  # {token id: what is added to its logit}
    allowed_ids: Annotated[list[_TokenId], Field(min_length=1)] | None = None  # None: all
    # A completion ends before one of these.
    stop: list[_StopString] = Field([], max_length=MAX_STOPS)
    min_tokens: int = Field(0, ge=0, le=MAX_INT32)  # nothing stops a completion with fewer tokens
    ignore_eos: bool = False  # the end tokens of tokenizer and chat template stop nothing

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        least, most = parts.get('min_tokens', 0), parts.get('max_tokens', MAX_INT32)
        if least <= most:
            return []
        paths: tuple[KeyPath, ...] = ('min_tokens',), ('max_tokens',)
        return [Problem(paths, f'min_tokens {least} is more than max_tokens {most}')]

    def request_options(self, end_ids: Iterable[int], stop_ids: Iterable[int]) -> dict:
        """The arguments of a `Request` that these options give.

        Args:
          end_ids: the ids with which tokenizer and chat template end a text.
          stop_ids: other ids that end a completion.
        """
        names = SamplingOptions.model_fields.keys() - {'ignore_eos'}
        stops = stop_ids_of(end_ids, stop_ids, self.ignore_eos)
        return {name: getattr(self, name) for name in names} | {'stop_ids': stops}


class SamplingConfig(SamplingOptions):
    """The engine's static shapes, and the options of requests, by default."""

    slots: int = Field(64, ge=1)  # most sequences decoded together
    max_length: int = Field(512, ge=2)  # tokens of prompt plus completion
    decode_steps: int = Field(16, ge=1)  # most tokens of a sequence per compiled call
    prefill_tokens: int = Field(512, ge=16)  # of prompts per compiled call, padding included
    page_size: int = Field(16, ge=1)  # tokens of a page of the key-value cache
    # Pages of the cache, over all shards of the batch; None: enough for all slots at max_length.
    # With fewer, sequences that no longer fit wait, and are computed again.
    pages: int | None = Field(None, ge=1)
    num_samples: int = Field(3, ge=0)  # prompts to sample at the end of a training run
    prompts: list[str] = []  # these prompts; repeated if fewer than num_samples
    stop_ids: list[int] = []  # end a completion, besides those of tokenizer and chat template
    chat: bool = False  # treat a prompt as a user's message and apply the chat template
