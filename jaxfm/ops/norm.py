"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

import functools

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxfm.ops.batch_invariant import by_rows
from jaxfm.ops.choice import choose
from jaxfm.sharding import mesh_axes, on_shards, spec_of
from pallas_kernels import rms_norm as kernels


def obstacles(width: int, dtype, split: tuple = ()) -> dict[str, str]:
    """{implementation: why it cannot normalise `width` elements, and what to use instead}.

    Args:
      split: mesh axes that shard those elements.
    """
    obstacle = kernels.obstacle(width=width, dtype=dtype)
    if split:
        obstacle = f'the normalised elements are sharded over {", ".join(split)}'
    return {'mosaic': f"{obstacle}; use 'xla'"} if obstacle else {}


def rms_norm(
    x, scale, *, epsilon: float, implementation: str | None = None, batch_invariant: bool = False
):
    """x / rms(x) * scale, with the rms over the last scale.ndim axes of x.

    Computes in float32 and returns x's dtype and shape.

    Args:
      implementation: a name in `ops.IMPLEMENTATIONS`; None picks the best known.
      batch_invariant: results for a row do not depend on the others (`ops.batch_invariant`).

    Raises:
      ValueError: the named implementation cannot run this call.
    """
    if batch_invariant:
        ordinary = functools.partial(rms_norm, epsilon=epsilon, implementation='xla')
        return by_rows(ordinary, (x,), (scale,))
    unsupported = obstacles(scale.size, x.dtype, _split(spec_of(x)[x.ndim - scale.ndim :]))
    name = choose('rms_norm', implementation, unsupported)
    if name == 'xla':
        return kernels.reference.forward(x, scale, epsilon=epsilon)[0]
    return _rms_norm(x, scale, epsilon, name == 'interpret')


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rms_norm(x, scale, epsilon, interpret):
    return _forward(x, scale, epsilon, interpret)[0]


def _forward(x, scale, epsilon, interpret):
    def norm(x, scale):
        rows = x.reshape(-1, scale.size)
        y, _, inverse = kernels.forward(
            rows, scale.reshape(-1), epsilon=epsilon, interpret=interpret
        )
        return y.reshape(x.shape), inverse.reshape(x.shape[: x.ndim - scale.ndim])

    spec, whole = spec_of(x), P(*(None,) * scale.ndim)
    rows = P(*spec[: x.ndim - scale.ndim])
    y, inverse = on_shards(norm, (spec, whole), (spec, rows))(x, scale)
    return y, (x, scale, inverse)


def _backward(epsilon, interpret, residuals, dy):
    x, scale, inverse = residuals
    spec, whole = spec_of(x), P(*(None,) * scale.ndim)

    def gradients(dy, x, scale, inverse):
        dy_MD, x_MD = (array.reshape(-1, scale.size) for array in (dy, x))
        dx, dscale = kernels.backward(
            dy_MD, None, x_MD, scale.reshape(-1), inverse.reshape(-1), interpret=interpret
        )
        if split := _split(spec):
            dscale = lax.psum(dscale, split)
        return dx.reshape(x.shape), dscale.reshape(scale.shape).astype(scale.dtype)

    rows = P(*spec[: x.ndim - scale.ndim])
    split_up = on_shards(gradients, (spec, spec, whole, rows), (spec, whole))
    return split_up(dy, x, scale, inverse)


_rms_norm.defvjp(_forward, _backward)


def _split(entries) -> tuple[str, ...]:
    """The mesh axes of size above 1 that shard the dimensions of these spec entries."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh_axes(entries) if mesh.shape.get(axis, 1) > 1)
