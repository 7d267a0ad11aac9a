"""Metrics of an objective that are no means: they are merged over microbatches, then read.

A mean is a pair (sum, weight) instead.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Upper edges of the bins: eight a factor of ten, from 1e-7, which is float32's precision.
_EDGES = np.concatenate([[0.0], 10.0 ** np.arange(-7, 1.25, 0.125)]).astype(np.float32)
_QUANTILES = {'p50': 0.5, 'p99': 0.99, 'p999': 0.999}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest of values that are not negative; 0 if there are none."""

    value: jax.Array

    @classmethod
    def of(cls, values, mask) -> 'Largest':
        """That of the values where the mask is not 0."""
        return cls(jnp.max(jnp.where(mask > 0, values, 0.0)))

    def merge(self, other: 'Largest') -> 'Largest':
        """That of both."""
        return Largest(jnp.maximum(self.value, other.value))

    def read(self) -> dict[str, jax.Array]:
        """{suffix of the metric's name: value}."""
        return {'max': self.value}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantiles:
    """Quantiles of values that are not negative, from their counts in bins.

    A quantile is the upper edge of its bin, which is at most a third more than the value itself.
    """

    counts: jax.Array  # [bins]; the last one has no upper edge

    @classmethod
    def of(cls, values, mask) -> 'Quantiles':
        """Those of the values where the mask is not 0."""
        axes = tuple(range(values.ndim))
        edges = np.expand_dims(_EDGES, axes)
        above = (values[..., None] > edges) & (mask > 0)[..., None]
        counts = jnp.sum(above, axis=axes, dtype=jnp.float32)
        count = jnp.sum(mask > 0, dtype=jnp.float32)[None]
        return cls(jnp.concatenate([count, counts]) - jnp.concatenate([counts, jnp.zeros(1)]))

    def merge(self, other: 'Quantiles') -> 'Quantiles':
        """Those of both."""
        return Quantiles(self.counts + other.counts)

    def read(self) -> dict[str, jax.Array]:
        """{suffix of the metric's name: value}."""
        up_to = jnp.cumsum(self.counts)
        edges = jnp.append(_EDGES, jnp.inf)
        return {
            name: edges[jnp.argmax(up_to >= share * up_to[-1])]
            for name, share in _QUANTILES.items()
        }
