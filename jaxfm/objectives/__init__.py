"""Objectives: the loss, as named sums over tokens with weights that depend only on the batch."""

from typing import Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group


class NextTokenConfig(Group):
    """Next-token cross-entropy, for pre-training and SFT, which differ only in loss_mask."""

    name: Literal['next_token'] = 'next_token'
    z_loss: float = Field(0.0, ge=0)  # coefficient of the squared log-partition (PaLM, section 5)


OBJECTIVES = Registry(
    {'next_token': Entry('jaxfm.objectives.next_token:NextToken', NextTokenConfig)}, base=Group
)
