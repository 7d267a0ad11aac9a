"""Matmuls of activations with weights, with a hand-written gradient that moves little data.

In float8 (Micikevicius et al., 2022) activations and weights are e4m3 and gradients e5m2. Each
tensor has one scale, computed from its current largest element; on a mesh, from the largest across
all devices, so that results do not depend on the mesh.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxfm.ops.batch_invariant import by_rows
from jaxfm.sharding import mesh_axes, on_shards, spec_of

# The product of a batch-invariant call, which no remat policy would take for one.
SAVED_NAME = 'linear_out'

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def linear(
    x,
    weight,
    *,
    contracted: int = 1,
    out_sharding=None,
    out_dtype=None,
    float8: bool = False,
    batch_invariant: bool = False,
):
    """x [B, T, *I] times weight [*I, *O] -> [B, T, *O], in the dtype of x.

    If the weight's dtype is wider than x's, its gradient (and the cross-device reduction) uses the
    weight's dtype. Each gradient has the sharding of its operand.

    On CPU the matmul for the weight's gradient transposes its first operand. Autodiff always puts
    the output's gradient there; this puts the smaller of the two.

    Args:
      contracted: how many trailing dimensions of x are summed over.
      out_sharding: of the result; needed if the sum is over a sharded dimension.
      out_dtype: of the result; bfloat16 operands are accumulated in float32 either way.
      float8: multiplies in float8, here and for both gradients; the result has x's dtype.
      batch_invariant: results for a row do not depend on the others (`ops.batch_invariant`).
    """
    if batch_invariant:
        on_tile = functools.partial(linear, contracted=contracted, out_dtype=out_dtype)
        op = functools.partial(on_tile, out_sharding=out_sharding)
        return checkpoint_name(by_rows(op, (x,), (weight,), on_tile=on_tile), SAVED_NAME)
    if float8:
        return _linear_8(x, weight, contracted, out_sharding)
    return _linear(x, weight, contracted, out_sharding, out_dtype and jnp.dtype(out_dtype))


def _product(x, weight, contracted, out_sharding, out_dtype):
    inputs = tuple(range(x.ndim - contracted, x.ndim))
    return lax.dot_general(
        x,
        weight.astype(x.dtype),
        ((inputs, tuple(range(contracted))), ((), ())),
        out_sharding=out_sharding,
        preferred_element_type=out_dtype,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _linear(x, weight, contracted, out_sharding, out_dtype):
    return _product(x, weight, contracted, out_sharding, out_dtype)


def _forward(x, weight, contracted, out_sharding, out_dtype):
    # Not through _linear: a remat policy that saves products must see the dot_general.
    return _product(x, weight, contracted, out_sharding, out_dtype), (x, weight)


def _backward(contracted, out_sharding, out_dtype, operands, gradient):
    x, weight = operands
    gradient = gradient.astype(x.dtype)
    rows = tuple(range(x.ndim - contracted))
    outputs = tuple(range(len(rows), gradient.ndim))
    weight_outputs = tuple(range(contracted, weight.ndim))
    dx = lax.dot_general(
        gradient,
        weight.astype(x.dtype),
        ((outputs, weight_outputs), ((), ())),
        out_sharding=_spec_of(x),
    )
    return dx, _weight_gradient(x, gradient, rows, _spec_of(weight), weight.dtype)


def _weight_gradient(x, gradient, rows, spec, dtype):
    over_rows = ((rows, rows), ((), ()))
    inputs, outputs = x.ndim - len(rows), gradient.ndim - len(rows)
    if x.size <= gradient.size:
        return lax.dot_general(
            x, gradient, over_rows, out_sharding=spec, preferred_element_type=dtype
        )
    swapped = spec and P(*spec[inputs:], *spec[:inputs])
    transposed = lax.dot_general(
        gradient, x, over_rows, out_sharding=swapped, preferred_element_type=dtype
    )
    order = tuple(range(outputs, outputs + inputs)) + tuple(range(outputs))
    return lax.transpose(transposed, order)


def _spec_of(array):
    return None if jax.typeof(array).sharding.mesh.empty else spec_of(array)


_linear.defvjp(_forward, _backward)


def quantize(x, dtype):
    """x / scale in float8, and the float32 scale, which maps max |x| to the dtype's maximum."""
    largest = float(jnp.finfo(dtype).max)
    amax = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = jnp.where(amax == 0, 1.0, amax / largest)
    # Rounding may exceed the range; e4m3 has no infinity, so that would give NaN.
    scaled = jnp.clip(x.astype(jnp.float32) / scale, -largest, largest)
    return scaled.astype(dtype), scale


def _product_8(a, b, dimensions, dtype, out_sharding=None, precision=lax.Precision.DEFAULT):
    """The product of two quantised arrays (values, scale), rescaled.

    XLA fuses this into one float8 matmul, scales included. On Hopper that accumulates with fewer
    bits than float32 unless the highest precision is requested, as it is for gradients only.
    """
    (a, a_scale), (b, b_scale) = a, b
    product = lax.dot_general(
        a,
        b,
        (dimensions, ((), ())),
        precision=precision,
        out_sharding=out_sharding,
        preferred_element_type=dtype,
    )
    return (product.astype(jnp.float32) * (a_scale * b_scale)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear_8(x, weight, contracted, out_sharding):
    inputs = tuple(range(x.ndim - contracted, x.ndim))
    dimensions = (inputs, tuple(range(contracted)))
    weight = quantize(weight.astype(x.dtype), E4M3)
    return _product_8(quantize(x, E4M3), weight, dimensions, x.dtype, out_sharding)


def _forward_8(x, weight, contracted, out_sharding):
    return _linear_8(x, weight, contracted, out_sharding), (x, weight)


def _backward_8(contracted, out_sharding, operands, gradient):
    x, weight = operands
    rows = tuple(range(x.ndim - contracted))
    outputs = tuple(range(len(rows), gradient.ndim))
    weight_outputs = tuple(range(contracted, weight.ndim))
    x_spec, gradient_spec, weight_spec = _spec_of(x), _spec_of(gradient), _spec_of(weight)
    gradient = quantize(gradient, E5M2), gradient_spec
    whole = quantize(weight.astype(x.dtype), E4M3), weight_spec
    dx = _gradient_8(gradient, whole, (outputs, weight_outputs), x.dtype, x_spec)
    x = quantize(x, E4M3), x_spec
    return dx, _gradient_8(x, gradient, (rows, rows), weight.dtype, weight_spec)


def _gradient_8(a, b, dimensions, dtype, out_spec):
    """A gradient, rescaled on each device before the sum over devices.

    With nothing between that sum and what follows, XLA can combine several sums into one, or turn
    a sum and the resharding to a stored weight into a reduce-scatter.
    """
    (a, a_spec), (b, b_spec) = a, b

    def shard(a, b):
        return _product_8(a, b, dimensions, dtype, precision=lax.Precision.HIGHEST)

    if out_spec is None:
        return shard(a, b)
    axes = mesh_axes(a_spec[i] for i in dimensions[0])
    return on_shards(
        lambda a, b: lax.psum(shard(a, b), axes) if axes else shard(a, b),
        ((a_spec, P()), (b_spec, P())),
        out_spec,
    )(a, b)


_linear_8.defvjp(_forward_8, _backward_8)
