"""The layers other than attention: weights, norm, embedding, MLP.

Every weight carries the logical names of its dimensions (`axes`); `jaxfm.sharding` maps them to
mesh axes. B batch, T position, D embed, F mlp, V vocab.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfm.models import BlockConfig
from jaxfm.models.lora import adapter, project
from jaxfm.ops.batch_invariant import by_rows
from jaxfm.ops.embedding import look_up
from jaxfm.ops.norm import rms_norm
from jaxfm.sharding import activation

ACTIVATION_FUNCTIONS = {
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': jax.nn.gelu,
    'relu_squared': lambda x: jnp.square(jax.nn.relu(x)),
}


def matrix(rngs: nnx.Rngs, shape, axes, fan_in: int, scale: float, dtype) -> nnx.Param:
    """A weight drawn from a normal with std scale / sqrt(fan_in), truncated at two sigma."""
    init = jax.nn.initializers.truncated_normal(scale / fan_in**0.5)
    return nnx.Param(init(rngs.params(), shape, jnp.float32).astype(dtype), axes=axes)


def vector(value: float, size, axes) -> nnx.Param:
    """A constant-initialised norm scale or bias; always float32."""
    return nnx.Param(jnp.full(size, value, jnp.float32), axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) times a learned scale; with unit_offset, what is stored is scale - 1."""

    def __init__(
        self,
        size: int,
        *,
        epsilon: float,
        unit_offset: bool = False,
        implementation: str | None = None,
        batch_invariant: bool = False,
    ):
        self.epsilon, self.unit_offset = epsilon, unit_offset
        self.implementation, self.batch_invariant = implementation, batch_invariant
        self.scale = vector(0.0 if unit_offset else 1.0, (size,), ('norm',))

    def __call__(self, x, last_axes: int = 1):
        """Normalises the last `last_axes` axes jointly; their size must equal the scale's."""
        scale = 1.0 + self.scale[...] if self.unit_offset else self.scale[...]
        scale = scale.reshape(x.shape[-last_axes:])
        return rms_norm(
            x,
            scale,
            epsilon=self.epsilon,
            implementation=self.implementation,
            batch_invariant=self.batch_invariant,
        )


class Embedding(nnx.Module):
    """A table [V, D] with initial standard deviation `std`."""

    def __init__(self, vocab_size: int, embed_dim: int, *, std: float, dtype, rngs: nnx.Rngs):
        axes = ('vocab', 'embed')
        self.table = matrix(rngs, (vocab_size, embed_dim), axes, 1, std, dtype)

    def __call__(self, tokens_BT, dtype):
        return look_up(self.table[...], tokens_BT, dtype)


class Mlp(nnx.Module):
    """(activation(x gate) * (x up)) down, or activation(x up) down; gate and up share a matmul."""

    def __init__(
        self,
        config: BlockConfig,
        embed_dim: int,
        *,
        scale,
        output_scale,
        dtype,
        lora,
        float8,
        batch_invariant,
        rngs,
    ):
        D, F, ways = embed_dim, config.mlp_dim, 2 if config.gated else 1
        self.activation, self.gated = config.activation, config.gated
        self.float8, self.batch_invariant = float8, batch_invariant
        self.gate_up = matrix(rngs, (D, ways, F), ('embed', 'gate_up', 'mlp'), D, scale, dtype)
        self.down = matrix(rngs, (F, D), ('mlp', 'embed'), F, output_scale, dtype)
        self.gate_up_lora = adapter(lora, 'mlp/gate_up', self.gate_up, rngs)
        self.down_lora = adapter(lora, 'mlp/down', self.down, rngs)
        gate_up = ('gate_up', 'mlp')
        self.gate_up_bias = vector(0.0, (ways, F), gate_up) if config.mlp_bias else None
        self.down_bias = vector(0.0, (D,), ('norm',)) if config.mlp_bias else None

    def __call__(self, x_BTD, has_cache: bool = False):
        float8 = self.float8 and not has_cache  # for the same reason as in attention
        options = dict(float8=float8, batch_invariant=self.batch_invariant)
        hidden = project(x_BTD, self.gate_up, self.gate_up_lora, **options)
        if self.gate_up_bias is not None:
            hidden += self.gate_up_bias[...].astype(hidden.dtype)[None, None]
        if self.batch_invariant:
            hidden_BTF = by_rows(self._activate, (hidden,))
        else:
            hidden_BTF = self._activate(hidden)
        spec = activation('batch', 'position', 'embed')
        out_BTD = project(hidden_BTF, self.down, self.down_lora, out_sharding=spec, **options)
        if self.down_bias is not None:
            out_BTD += self.down_bias[...].astype(out_BTD.dtype)[None, None]
        return out_BTD

    def _activate(self, hidden):
        """[B, T, ways, F] -> [B, T, F]."""
        gate_BTF = ACTIVATION_FUNCTIONS[self.activation](hidden[:, :, 0])
        return gate_BTF * hidden[:, :, 1] if self.gated else gate_BTF
