"""LoRA (Hu et al., 2021): beside a frozen matrix W a trained product of low rank, W + scale A B.

A maps the inputs of W to `rank` numbers, B those to its outputs; scale is alpha / rank. B starts at
zero, so a model with fresh adapters computes what it computed without them. Both are float32 at
rest whatever W is stored in, and are cast and gathered as every weight is. The two ways of gate_up
have an A and a B each, in one pair of arrays [D, 2, r] and [2, r, F].
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

_WAYS = 'gate_up'  # the axis of matrices that lie side by side in one parameter


class Lora(nnx.Module):
    """The adapter of one matrix [*inputs, ways?, *outputs]."""

    def __init__(self, config: LoraConfig, matrix: nnx.Param, num_inputs: int, rngs: nnx.Rngs):
        shape, axes = matrix.shape, tuple(matrix.axes)
        outputs = num_inputs + (_WAYS in axes)
        ways = slice(num_inputs, outputs)
        self.num_inputs, self.scale = num_inputs, config.scale
        # What PEFT draws (kaiming_uniform with a = sqrt(5)). One rounding: the same on every mesh.
        bound = math.prod(shape[:num_inputs]) ** -0.5
        a_shape = (*shape[:outputs], config.rank)
        a = bound * jax.random.uniform(rngs.lora(), a_shape, jnp.float32, -1.0, 1.0)
        b = jnp.zeros((*shape[ways], config.rank, *shape[outputs:]), jnp.float32)
        self.a = nnx.Param(a, axes=(*axes[:outputs], 'lora'))
        self.b = nnx.Param(b, axes=(*axes[ways], 'lora', *axes[outputs:]))

    def __call__(self, x, out_sharding=None):
        """x [B, T, *inputs] -> what is added to the product with the matrix."""
        # The inputs of `out` and `down` are split over devices; the rank is not.
        spec = activation('batch', 'position', *self.a.axes[self.num_inputs :])
        low = linear(x, self.a[...], contracted=self.num_inputs, out_sharding=spec) * self.scale
        if _WAYS not in self.a.axes:
            return linear(low, self.b[...], out_sharding=out_sharding)
        ways = range(self.b.shape[0])
        return jnp.stack([linear(low[:, :, way], self.b[way]) for way in ways], axis=2)


def adapter(config: LoraConfig | None, target: str, matrix: nnx.Param, rngs, num_inputs: int = 1):
    """The adapter of the matrix that targets call `target`, or None where it has none.

    Args:
      num_inputs: how many of the leading dimensions of the matrix are inputs.
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
):
    """`ops.linear` with a matrix, and what its adapter adds."""
    out = linear(x, matrix[...], contracted=contracted, out_sharding=out_sharding, float8=float8)
    return out if lora is None else out + lora(x, out_sharding)


# A B of every layer of a stack, by the target.
_PRODUCTS = {
    'attention/q': 'ldr,lrnh->ldnh',
    'attention/k': 'ldr,lrkh->ldkh',
    'attention/v': 'ldr,lrkh->ldkh',
    'attention/out': 'lnhr,lrd->lnhd',
    'mlp/gate_up': 'ldcr,lcrf->ldcf',
    'mlp/down': 'lfr,lrd->lfd',
}


def merge(params: dict[str, jax.Array], config: TransformerConfig) -> dict[str, jax.Array]:
    """The parameters of the same model without adapters, each stored in the dtype that it has."""
    adapters = {name for path in params for name in adapter_paths(path)}
    return {
        path: merge_parameter(params, path, config.lora).astype(value.dtype)
        for path, value in params.items()
        if path not in adapters
    }


def merge_parameter(params: dict[str, jax.Array], path: str, config: LoraConfig) -> jax.Array:
    """One parameter with what its adapter adds, W + scale A B in float32, sharded as W is.

    What has no adapter comes as it is.
    """
    w, a, b = (params.get(name) for name in (path, *adapter_paths(path)))
    target = '/'.join(path.split('/')[-2:])
    return w if a is None else _sum(w, a, b, _PRODUCTS[target], config.scale)


@functools.partial(jax.jit, static_argnames=('product', 'scale'))
def _sum(w, a, b, product: str, scale: float):
    change = jnp.einsum(product, a, b, precision=lax.Precision.HIGHEST)
    return w.astype(jnp.float32) + scale * change
