"""Products of activations with weights, with the gradient written so that little is moved."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P


def linear(x, weight, *, contracted: int = 1, out_sharding=None, out_dtype=None):
    """x [B, T, *I] times weight [*I, *O] -> [B, T, *O], in the dtype of x.

    A weight of a wider dtype has its gradient in that: devices sum what they have of it so.

    On CPU the product that gives a weight's gradient transposes its first operand. Autodiff puts
    the gradient of the output there, whatever its size; this puts the narrower of the two. The
    gradients have the shardings of what they belong to.

    Args:
      contracted: how many trailing dimensions of x are summed over.
      out_sharding: of the result, where the sum is over a sharded dimension.
      out_dtype: of the result; the sums are float32 for bfloat16 operands in any case.
    """
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
    # Not by way of _linear: a remat policy that saves products must see a dot_general.
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
    sharding = jax.typeof(array).sharding
    missing = array.ndim - len(sharding.spec)
    return None if sharding.mesh.empty else P(*sharding.spec, *(None,) * missing)


_linear.defvjp(_forward, _backward)
