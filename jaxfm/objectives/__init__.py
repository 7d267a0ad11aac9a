"""Objectives: what is minimised, as named sums with weights that depend on the batch alone."""

from typing import Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group


class NextTokenConfig(Group):
    """Cross-entropy of the next token: pre-training and SFT, which differ in loss_mask only."""

    name: Literal['next_token'] = 'next_token'
    z_loss: float = Field(0.0, ge=0)  # coefficient of the squared log-partition (PaLM, section 5)


OBJECTIVES = Registry(
    {'next_token': Entry('jaxfm.objectives.next_token:NextToken', NextTokenConfig)}, base=Group
)
