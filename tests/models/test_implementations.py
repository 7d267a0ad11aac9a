"""A model whose ops run as kernels, simulated, has the loss and gradients of one without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm.models import BlockConfig, ImplementationsConfig, TransformerConfig
from jaxfm.models.transformer import Transformer

T = 24
# Two documents and padding; one document.
POSITIONS = np.array([[*range(9), *range(11), 0, 0, 0, 0], range(T)], np.int32)
SEGMENTS = np.array([[1] * 9 + [2] * 11 + [0] * 4, [1] * T], np.int32)


def hidden_and_gradients(**words):
    config = TransformerConfig(
        vocab_size=64,
        embed_dim=64,
        num_layers=2,
        block=BlockConfig(num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=64, qk_norm=True),
        # With nothing cast nothing is recomputed, which the simulation cannot be.
        param_dtype='bfloat16',
        compute_dtype='bfloat16',
        implementations=ImplementationsConfig(**words),
    )
    model = Transformer(config, nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, T))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, T, 64)), jnp.float32)

    def total(model):
        hidden, _ = model(tokens, POSITIONS, SEGMENTS)
        return jnp.sum(hidden.astype(jnp.float32) * weights * (SEGMENTS > 0)[:, :, None]), hidden

    (_, hidden), gradients = nnx.value_and_grad(total, has_aux=True)(model)
    leaves = [hidden * (SEGMENTS > 0)[:, :, None], *jax.tree.leaves(gradients)]
    return [np.asarray(leaf, np.float64) for leaf in leaves]


@pytest.mark.slow
def test_kernels_change_nothing_but_rounding(interpreter):
    kernels = hidden_and_gradients(attention='interpret', rms_norm='interpret')
    for ours, xla in zip(kernels, hidden_and_gradients(), strict=True):
        assert np.linalg.norm(ours - xla) <= 0.02 * np.linalg.norm(xla)
