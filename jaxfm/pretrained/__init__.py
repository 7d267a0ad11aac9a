"""Models that others made, and ours for others: the formats of the outside world.

Whatever the format, a model arrives as `source.Pretrained`: the config of Hugging Face and tensors
under the names of Hugging Face, of which any part is read alone. This file holds what a config may
say of writing one.
"""

from typing import Literal

from pydantic import Field

from jaxfm.schema import Group


class ExportConfig(Group):
    """A model in Hugging Face's layout, for others to read."""

    every: int = Field(0, ge=0)  # steps, into <workdir>/export/<step>; 0 is by --mode export alone
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: as weights are stored
    # Of a model with adapters: merged into its weights, or they alone in the layout of PEFT.
    adapters: Literal['merge', 'peft'] = 'merge'
    shard_gigabytes: float = Field(5.0, gt=0)  # of a file; of 10^9 bytes
