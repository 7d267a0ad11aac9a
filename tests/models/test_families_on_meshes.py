"""Every family on a mesh: the same loss and gradients as on one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import sharding, state
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.pretrained.locate import open_pretrained, values_of
from tests.models import goldens

pytestmark = pytest.mark.usefixtures('quick_compilation')
ROWS, LENGTH = 4, 12


def pieces_of(name) -> TransformerConfig:
    """The config of a golden, enlarged to sizes that every mesh divides."""
    values = values_of(open_pretrained(str(goldens.Golden(name).path)))['model']
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16)
    blocks = [values['block']]
    blocks += [block for segment in values.get('segments', ()) for block in segment['pattern']]
    for block in blocks:
        block.update(sizes)
    return TransformerConfig.model_validate(values | dict(embed_dim=16, vocab_multiple=16))


def make_batch():
    """Rows of two documents, the second padded."""
    random = np.random.default_rng(0)
    place = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))
    second = place >= random.integers(2, 8, (ROWS, 1))
    start = np.argmax(second, axis=1)[:, None]
    segment_ids = np.where(place > 10, 0, 1 + second)
    tokens, targets = random.integers(0, 67, (2, ROWS, LENGTH))
    ids = (tokens, targets, np.where(second, place - start, place), segment_ids)
    names = ('tokens', 'targets', 'positions', 'segment_ids')
    batch = {name: values.astype(np.int32) for name, values in zip(names, ids)}
    return batch | {'loss_mask': (segment_ids > 0).astype(np.float32)}


def gradient_on(config, sizes):
    """(loss, {path: gradient}) of random weights that are the same on every mesh."""
    mesh = sharding.make_mesh(
        dict.fromkeys(sharding.MESH_AXES, 1) | sizes, jax.devices()[: math.prod(sizes.values())]
    )
    with jax.set_mesh(mesh):
        parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
        random = np.random.default_rng(0)
        params = {
            path: (0.5 + 0.3 * random.normal(size=leaf.shape)).astype(leaf.dtype)
            if path.endswith('scale')
            else (0.3 * random.normal(size=leaf.shape)).astype(leaf.dtype)
            for path, leaf in parts.shapes.items()
        }
        objective = NextToken(NextTokenConfig())

        def loss(params, batch):
            sums, _, _ = objective(parts.merge(params), batch, None)
            return sums['next_token'] / jnp.sum(batch['loss_mask'])

        batch = sharding.put(make_batch(), mesh, ROWS)
        placed = jax.device_put(params, state.stored_shardings(parts))
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(placed, batch))


@pytest.mark.parametrize('name', goldens.FAMILIES)
def test_a_family_has_the_same_gradients_on_a_mesh_as_on_one_device(name):
    config = pieces_of(name)
    loss, gradient = gradient_on(config, {})
    other_loss, other = gradient_on(config, dict(fsdp=2, tensor=2))
    np.testing.assert_allclose(other_loss, loss, rtol=5e-6)
    for path, right in gradient.items():
        difference = np.linalg.norm(other[path] - right) / np.linalg.norm(right)
        assert difference < 2e-5, path
