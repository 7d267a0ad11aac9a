"""Weights are cast, then gathered, inside their block; gathered weights are never saved."""

import contextlib
import io

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jaxfm import sharding, state
from jaxfm.models.transformer import Transformer
from jaxfm.sharding import MESH_AXES

WEIGHT = (16, 4, 8)  # embed, heads, head_dim


@pytest.fixture
def mesh():
    with jax.set_mesh(sharding.make_mesh({axis: 1 for axis in MESH_AXES} | {'fsdp': 8})):
        yield jax.sharding.get_mesh()


def stored(shape, axes, mesh):
    spec = jax.NamedSharding(mesh, sharding.stored_spec(axes))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spec)


def moves(function, *arguments):
    """The casts and reshards of a function in order, with their output dtypes."""
    names = ('convert_element_type', 'reshard')
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in names:
                found.append((eqn.primitive.name, str(eqn.outvars[0].aval.dtype)))
            for inner in jaxprs_in_params(eqn.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


@pytest.mark.parametrize('reduce_dtype', [None, 'float32'])
def test_a_weight_is_cast_before_it_is_gathered_and_its_gradient_reduced_as_configured(
    mesh, reduce_dtype
):
    axes = ('embed', 'heads', 'head_dim')

    def gather(weight):
        param = nnx.Param(weight, axes=axes)
        return sharding.gather(nnx.State({'w': param}), jnp.bfloat16, reduce_dtype)['w'][...]

    weight = stored(WEIGHT, axes, mesh)
    forward = [('convert_element_type', 'bfloat16'), ('reshard', 'bfloat16')]
    # The weight in use has the dtype of its gradient.
    last = [('convert_element_type', reduce_dtype)] if reduce_dtype else []
    assert moves(gather, weight) == forward + last
    both = moves(jax.grad(lambda w: jnp.sum(gather(w))), weight)
    dtypes = [dtype for name, dtype in both if name == 'reshard']
    assert (dtypes[0], dtypes[-1]) == ('bfloat16', reduce_dtype or 'bfloat16')
    assert both[-1] == ('convert_element_type', 'float32') or reduce_dtype


def residuals(config, mesh):
    """Types of the residuals saved for the backward pass, as text, without parameters."""
    parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
    params = {
        path: stored(leaf.shape, parts.axes[path], mesh) for path, leaf in parts.shapes.items()
    }
    ids = np.zeros((8, 4), np.int32)

    def total(params):
        return jnp.sum(parts.merge(params)(ids, ids, ids + 1)[0].astype(jnp.float32))

    with contextlib.redirect_stdout(io.StringIO()) as lines:
        jax.ad_checkpoint.print_saved_residuals(total, params)
    return [line for line in lines.getvalue().splitlines() if 'from the argument' not in line]


@pytest.fixture
def small(configs):
    def config(**changes):
        wide = {'embed_dim': 32, 'num_layers': 3, 'compute_dtype': 'bfloat16'}
        return type(configs['llama'])(**{**dict(configs['llama']), **wide, **changes})

    return config


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_no_gathered_weight_is_kept_for_the_backward_pass(small, mesh, remat, scan):
    saved = residuals(small(remat=remat, scan=scan), mesh)
    layers = '3,' if scan else ''
    gathered = [
        f'bf16[{layers}{shape}]'
        for shape in (
            '32,4@tensor,8',
            '32,2@tensor,8',
            '4@tensor,8,32',
            '32,2,24@tensor',
            '24@tensor,32',
        )
    ]
    assert not [line for line in saved if line.startswith(tuple(gathered))]
    # Check that the test sees what scans save: activations are listed.
    hidden = f'bf16[{layers}8@(replica,fsdp,expert),4@context,32]'
    assert any(line.startswith(hidden) for line in saved)


def test_remat_keeps_what_its_name_says(small, mesh):
    rows = '3,8@(replica,fsdp,expert)'
    products = [f'bf16[{rows},4@context,4@tensor,8]', f'bf16[{rows},4@context,2,24@tensor]']
    softmax = f'f32[{rows},2@tensor,2,4@context,4]'
    kept = {
        remat: '\n'.join(residuals(small(remat=remat), mesh)) for remat in ('none', 'dots', 'full')
    }
    assert softmax in kept['none']
    assert softmax not in kept['dots']
    assert all(product in kept['dots'] for product in products)
    assert not any(product in kept['full'] for product in products)


@pytest.mark.parametrize(
    'scan, num_layers, pinned', [(True, 3, False), (True, 1, True), (False, 3, True)]
)
def test_a_recomputation_is_unpinned_only_inside_a_scan(small, scan, num_layers, pinned):
    """Outside a scan, XLA would merge the recomputation with the forward pass and undo it."""
    config = small(remat='full', scan=scan, num_layers=num_layers, compute_dtype='float32')
    parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
    ids = np.zeros((1, 4), np.int32)
    jaxpr = jax.make_jaxpr(lambda params: parts.merge(params)(ids, ids, ids + 1)[0])(parts.shapes)
    assert f'prevent_cse={pinned}' in str(jaxpr)
    assert f'prevent_cse={not pinned}' not in str(jaxpr)
