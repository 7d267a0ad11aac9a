"""Saves trees of arrays with stock Orbax, in each of its formats, under our names and others'."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1

# A square matrix for queries and outputs, so that no shape tells a transposed one.
MODEL = dict(
    name='transformer',
    vocab_size=60,
    embed_dim=16,
    num_layers=3,
    block=dict(num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, qk_norm=True, qkv_bias=True),
)


def nest(flat: dict) -> dict:
    """{'a/b': x} -> {'a': {'b': x}}."""
    tree = {}
    for name, value in flat.items():
        *above, last = name.split('/')
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return tree


def _save_standard(path: Path, tree) -> str:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return str(path)


def _save_pytree(use_zarr3: bool, use_ocdbt: bool):
    def save(path: Path, tree) -> str:
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=use_zarr3, use_ocdbt=use_ocdbt)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, tree)
        return str(path)

    return save


def _save_steps(path: Path, tree) -> str:
    """A manager's root; its newest step has the tree, an older one has zeros."""
    import jax

    with ocp.CheckpointManager(path) as manager:
        manager.save(9, args=ocp.args.StandardSave(jax.tree.map(np.zeros_like, tree)))
        manager.save(12, args=ocp.args.StandardSave(tree))
    return str(path)


def _save_items(path: Path, tree) -> str:
    """A manager's step with several items; one is called `params`."""
    with ocp.CheckpointManager(path) as manager:
        items = dict(
            opt_state=ocp.args.StandardSave({'mu': tree}),
            params=ocp.args.StandardSave(tree['params'] if 'params' in tree else tree),
            about=ocp.args.JsonSave({'by': 'another stack'}),
        )
        manager.save(7, args=ocp.args.Composite(**items))
    return str(path / '7')


def _save_v1(path: Path, tree) -> str:
    v1.save(path, tree)
    return str(path)


# {format: a function that saves a tree at a path and returns what `init_from` may name}.
FORMATS = {
    'standard': _save_standard,
    'zarr': _save_pytree(False, False),
    'zarr in ocdbt': _save_pytree(False, True),
    'zarr3': _save_pytree(True, False),
    'zarr3 in ocdbt': _save_pytree(True, True),
    'steps': _save_steps,
    'items': _save_items,
    'v1': _save_v1,
}


def as_state(params: dict) -> dict:
    """A train state around a nested tree of parameters."""
    moments = {'mu': {'params': {'w': np.ones(3, np.float32)}}, 'count': jnp.int32(3)}
    return {'params': params, 'opt_state': moments, 'step': 12}


# A stack with one module per layer, heads merged, and outputs before inputs.
BY_LAYER = {
    'embedding/table': 'params/embed/kernel [embed, vocab]',
    'final_norm/scale': 'params/decoder/norm/scale',
    'head/table': 'params/decoder/logits/kernel',
    'layers/attention/q': 'params/decoder/layers_{layer}/q/kernel [heads, head_dim, embed]',
    'layers/attention/k': 'params/decoder/layers_{layer}/k/kernel [kv_heads, head_dim, embed]',
    'layers/attention/v': 'params/decoder/layers_{layer}/v/kernel [kv_heads, head_dim, embed]',
    'layers/attention/q_bias': 'params/decoder/layers_{layer}/q/bias',
    'layers/attention/k_bias': 'params/decoder/layers_{layer}/k/bias',
    'layers/attention/v_bias': 'params/decoder/layers_{layer}/v/bias',
    'layers/attention/out': 'params/decoder/layers_{layer}/out/kernel [embed, heads, head_dim]',
    'layers/attention/q_norm/scale': 'params/decoder/layers_{layer}/q_norm/scale',
    'layers/attention/k_norm/scale': 'params/decoder/layers_{layer}/k_norm/scale',
    'layers/pre_attention/scale': 'params/decoder/layers_{layer}/norm_1/scale',
    'layers/pre_mlp/scale': 'params/decoder/layers_{layer}/norm_2/scale',
    'layers/mlp/gate_up/0': 'params/decoder/layers_{layer}/wi_0/kernel',
    'layers/mlp/gate_up/1': 'params/decoder/layers_{layer}/wi_1/kernel [mlp, embed]',
    'layers/mlp/down': 'params/decoder/layers_{layer}/wo/kernel',
}


def by_layer(params: dict) -> dict:
    """Our parameters as a stack saves them that BY_LAYER describes."""
    ours = {name.split('/', 3)[-1]: value for name, value in params.items()}
    vocab = MODEL['vocab_size']
    flat = {
        'embed/kernel': params['embedding/table'][:vocab].T,
        'decoder/norm/scale': params['final_norm/scale'],
        'decoder/logits/kernel': params['head/table'][:vocab],
    }
    for layer in range(MODEL['num_layers']):
        for name in ('q', 'k', 'v'):
            weight, bias = (ours[f'attention/{name}{end}'][layer] for end in ('', '_bias'))
            flat[f'decoder/layers_{layer}/{name}/kernel'] = weight.reshape(len(weight), -1).T
            flat[f'decoder/layers_{layer}/{name}/bias'] = bias.reshape(-1)
        out, gate_up = ours['attention/out'][layer], ours['mlp/gate_up'][layer]
        rest = {
            'out/kernel': out.reshape(-1, out.shape[-1]).T,
            'q_norm/scale': ours['attention/q_norm/scale'][layer],
            'k_norm/scale': ours['attention/k_norm/scale'][layer],
            'norm_1/scale': ours['pre_attention/scale'][layer],
            'norm_2/scale': ours['pre_mlp/scale'][layer],
            'wi_0/kernel': gate_up[:, 0],
            'wi_1/kernel': gate_up[:, 1].T,
            'wo/kernel': ours['mlp/down'][layer],
        }
        flat |= {f'decoder/layers_{layer}/{name}': value for name, value in rest.items()}
    return as_state({'params': nest({name: jnp.asarray(value) for name, value in flat.items()})})
