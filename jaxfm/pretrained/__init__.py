"""Import and export of models in public formats.

Whatever its format, a model is opened as a `source.Pretrained`: a Hugging Face config, and tensors
under Hugging Face names that can be read in part. This file defines the config of exports.
"""

from typing import Literal

from pydantic import Field

from jaxfm.schema import Group


class ExportConfig(Group):
    """Export of the model in Hugging Face's layout."""

    every: int = Field(0, ge=0)  # steps, to <workdir>/export/<step>; 0: only with --mode export
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: model.param_dtype
    # A model with adapters: merge them into the weights, or write only them, in PEFT's layout.
    adapters: Literal['merge', 'peft'] = 'merge'
    shard_gigabytes: float = Field(5.0, gt=0)  # most per file; 10^9 bytes
