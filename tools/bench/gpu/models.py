"""Builds the model of configs/llama_1b.py, its train state and its step as a run does."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from jaxfm import sharding, state
from jaxfm.metrics.devices import peak_flops
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.optim import AdamWConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.plan.flops import model_flops_per_token
from jaxfm.sharding import MESH_AXES
from tools.bench.gpu import documents
from tools.bench.gpu.stages import Refused

OPTIMIZER = dict(learning_rate=6e-4, schedule='constant', weight_decay=0.1)
CLIP_NORM = 1.0


def model_config(smoke: bool, **changes) -> TransformerConfig:
    """The model config of configs/llama_1b.py; with smoke, of its `:smoke` variant."""
    try:
        from configs.llama_1b import get_config
    except ModuleNotFoundError as error:
        raise Refused(f'{error.name} is not installed') from error
    values = get_config('smoke' if smoke else '').model.to_dict()
    values |= {'num_layers': 2} if smoke else {}
    return TransformerConfig.model_validate(values | changes)


def sequence_length(smoke: bool) -> int:
    return 128 if smoke else 4096


@contextlib.contextmanager
def one_device():
    """Sets the mesh of a run on one device."""
    mesh = sharding.make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@dataclasses.dataclass
class Trainer:
    """A model and its optimizer; needs the mesh to be set."""

    config: TransformerConfig

    def __post_init__(self):
        self._make_model = lambda key: Transformer(self.config, nnx.Rngs(key))
        self.parts = state.split(self._make_model)
        axes = {path: self.parts.axes[path] for path in sorted(self.parts.trainable)}
        self.optimizer = AdamW(AdamWConfig(**OPTIMIZER), 1000, axes)

    def state(self) -> state.TrainState:
        return state.init_state(self._make_model, self.parts, self.optimizer, seed=0)

    def params(self) -> dict:
        """Only the weights of `state`."""
        return state.fresh_params(self._make_model, self.parts, 0, self.parts.shapes)

    def step(self):
        """(state, batch) -> (state, metrics), the state donated."""
        objective = NextToken(NextTokenConfig())
        return state.make_train_step(self.parts, objective, self.optimizer, clip_norm=CLIP_NORM)


def batch(vocab_size: int, rows: int, tokens: int, packed: bool, mesh) -> dict:
    """Random tokens on the device, with one document per row, or several if packed.

    They come from numpy's generator with seed 0, so that peers can draw the same tokens.
    """
    drawn = np.random.default_rng(0).integers(0, vocab_size, (rows, tokens + 1)).astype(np.int32)
    lengths = documents.lengths(rows, tokens) if packed else [[tokens]] * rows
    positions, segments = documents.places(lengths, tokens)
    arrays = dict(
        tokens=drawn[:, :-1].copy(),
        targets=drawn[:, 1:].copy(),
        positions=positions,
        segment_ids=segments,
        loss_mask=np.ones((rows, tokens), np.float32),
    )
    return sharding.put(arrays, mesh, rows)


@functools.cache
def flops_per_token(smoke: bool, packed: bool, causal: bool) -> float:
    """FLOPs per token as `plan` counts them; packed rows count only visible keys."""
    config, tokens = model_config(smoke), sequence_length(smoke)
    whole = model_flops_per_token(config, tokens, causal)
    if not packed:
        return whole
    rows = documents.lengths(64, tokens)
    if causal:
        seen = documents.visible_pairs(rows) / (64 * tokens) / (tokens / 2)
    else:
        seen = sum(length**2 for row in rows for length in row) / (64 * tokens) / tokens
    attention = model_flops_per_token(config, 2 * tokens, causal) - whole  # of `tokens` keys
    return whole - attention * (1 - seen)


def mfu(tokens_per_second: float, smoke: bool, packed: bool) -> dict:
    """MFU with causal and with full attention; empty if the device's peak is unknown."""
    peak = peak_flops(jax.devices()[0].device_kind, 'bfloat16')
    if peak is None:
        return {}
    return {
        name: tokens_per_second * flops_per_token(smoke, packed, causal) / peak
        for name, causal in (('mfu', True), ('mfu_full_attention', False))
    }
