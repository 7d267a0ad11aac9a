"""LoRA (Hu et al., 2021): a frozen matrix W plus a trained low-rank product, W + scale A B.

A maps W's inputs to `rank` values, B maps these to W's outputs; scale is alpha / rank. B starts at
zero, so fresh adapters do not change the model's outputs. Both are stored in float32 whatever W's
dtype, then cast and gathered like every weight. Gate and up have an A and a B each, stored
together as [D, 2, r] and [2, r, F].
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxfm.models import LoraConfig, TransformerConfig, adapter_paths
from jaxfm.ops.linear import linear
from jaxfm.sharding import activation

_WAYS = 'gate_up'  # the axis that stacks several matrices in one parameter


class Lora(nnx.Module):
    """The adapter of one matrix [*inputs, ways?, *outputs]."""

    def __init__(self, config: LoraConfig, matrix: nnx.Param, num_inputs: int, rngs: nnx.Rngs):
        shape, axes = matrix.shape, tuple(matrix.axes)
        outputs = num_inputs + (_WAYS in axes)
        ways = slice(num_inputs, outputs)
        self.num_inputs, self.scale = num_inputs, config.scale
        # PEFT's init (kaiming_uniform with a = sqrt(5)). Scaling [-1, 1) rounds only once, so that
        # every mesh gives the same bits.
        bound = math.prod(shape[:num_inputs]) ** -0.5
        a_shape = (*shape[:outputs], config.rank)
        a = bound * jax.random.uniform(rngs.lora(), a_shape, jnp.float32, -1.0, 1.0)
        b = jnp.zeros((*shape[ways], config.rank, *shape[outputs:]), jnp.float32)
        self.a = nnx.Param(a, axes=(*axes[:outputs], 'lora'))
        self.b = nnx.Param(b, axes=(*axes[ways], 'lora', *axes[outputs:]))

    def __call__(self, x, out_sharding=None, batch_invariant: bool = False):
        """x [B, T, *inputs] -> scale x A B, to be added to x W."""
        product = functools.partial(linear, batch_invariant=batch_invariant)
        # `out` and `down` have sharded inputs; the rank dimension is never sharded.
        spec = activation('batch', 'position', *self.a.axes[self.num_inputs :])
        low = product(x, self.a[...], contracted=self.num_inputs, out_sharding=spec) * self.scale
        if _WAYS not in self.a.axes:
            return product(low, self.b[...], out_sharding=out_sharding)
        ways = range(self.b.shape[0])
        return jnp.stack([product(low[:, :, way], self.b[way]) for way in ways], axis=2)


def adapter(config: LoraConfig | None, target: str, matrix: nnx.Param, rngs, num_inputs: int = 1):
    """An adapter for the matrix named `target`, or None if the config does not target it.

    Args:
      num_inputs: how many leading dimensions of the matrix are inputs.
    """
    if config is None or target not in config.matrices:
        return None
    return Lora(config, matrix, num_inputs, rngs)


def project(
    x,
    matrix: nnx.Param,
    lora: Lora | None,
    *,
    contracted: int = 1,
    out_sharding=None,
    float8: bool = False,
    batch_invariant: bool = False,
):
    """`ops.linear` of x and the matrix, plus the output of the adapter if there is one."""
    out = linear(
        x,
        matrix[...],
        contracted=contracted,
        out_sharding=out_sharding,
        float8=float8,
        batch_invariant=batch_invariant,
    )
    return out if lora is None else out + lora(x, out_sharding, batch_invariant)


# Einsums that compute A B for a stack of layers, by target.
_PRODUCTS = {
    'attention/q': 'ldr,lrnh->ldnh',
    'attention/k': 'ldr,lrkh->ldkh',
    'attention/v': 'ldr,lrkh->ldkh',
    'attention/out': 'lnhr,lrd->lnhd',
    'mlp/gate_up': 'ldcr,lcrf->ldcf',
    'mlp/down': 'lfr,lrd->lfd',
}


def merge(params: dict[str, jax.Array], config: TransformerConfig) -> dict[str, jax.Array]:
    """The parameters with adapters merged into their weights; every weight keeps its dtype."""
    adapters = {name for path in params for name in adapter_paths(path)}
    return {
        path: merge_parameter(params, path, config.lora).astype(value.dtype)
        for path, value in params.items()
        if path not in adapters
    }


def merge_parameter(params: dict[str, jax.Array], path: str, config: LoraConfig) -> jax.Array:
    """W + scale A B in float32, sharded like W; a parameter without an adapter unchanged."""
    w, a, b = (params.get(name) for name in (path, *adapter_paths(path)))
    target = '/'.join(path.split('/')[-2:])
    return w if a is None else _sum(w, a, b, _PRODUCTS[target], config.scale)


@functools.partial(jax.jit, static_argnames=('product', 'scale'))
def _sum(w, a, b, product: str, scale: float):
    change = jnp.einsum(product, a, b, precision=lax.Precision.HIGHEST)
    return w.astype(jnp.float32) + scale * change
