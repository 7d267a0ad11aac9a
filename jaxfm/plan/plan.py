"""What a resolved config will need: parameters, FLOPs, bytes, and the tables that say so at start.

Nothing here allocates.
"""

import math

import jax

from jaxfm import sharding
from jaxfm.errors import ConfigError, human_bytes
from jaxfm.models import BlockConfig, TransformerConfig
from jaxfm.models.transformer import compute_dtype
from jaxfm.ops import IMPLEMENTATIONS, attention, logprobs, norm
from jaxfm.ops.choice import Choice, decide
from jaxfm.optim.rules import is_vector


def visible_keys(length: int, window: int, causal: bool) -> float:
    """Keys a query sees on average in a document of `length` tokens.

    Causal counts half of the square, as the field does: length / 2. Not causal is the other common
    convention, in which masked products count too.
    """
    reach = min(window, length) if window else length
    if not causal:
        return float(reach)
    # Below the diagonal: a triangle until the window is full, then a band.
    return reach - reach * reach / (2 * length)


def _block_matmul_params(block: BlockConfig, config: TransformerConfig) -> int:
    heads, kv_heads = (n * block.head_dim for n in (block.num_heads, block.num_kv_heads))
    matrices = [  # the name that adapters know it by, inputs, outputs
        ('attention/q', config.embed_dim, heads),
        ('attention/k', config.embed_dim, kv_heads),
        ('attention/v', config.embed_dim, kv_heads),
        ('attention/out', heads, config.embed_dim),
        *[('mlp/gate_up', config.embed_dim, block.mlp_dim)] * (2 if block.gated else 1),
        ('mlp/down', block.mlp_dim, config.embed_dim),
    ]
    count = sum(inputs * outputs for _, inputs, outputs in matrices)
    if config.lora is None:
        return count
    adapted = [sides for name, *sides in matrices if name in config.lora.matrices]
    return count + config.lora.rank * sum(map(sum, adapted))


def model_flops_per_token(
    config: TransformerConfig, length: int, causal: bool = True, frozen: int = 0
) -> float:
    """FLOPs of training on one token: forward and twice that backward, no recomputation.

    Counts matmuls alone: the weights that multiply (the output projection too, not the embedding
    look-up) and attention's two products over the visible keys of documents of `length` tokens.
    The gradient of a frozen weight is not computed, that of every activation is.

    Args:
      frozen: elements of the weights that multiply and are not trained (`frozen_matmul_params`).
    """
    matmul_params = config.padded_vocab_size * config.embed_dim
    attention = 0.0
    for segment in config.trunk:
        for block in segment.pattern:
            matmul_params += segment.repeats * _block_matmul_params(block, config)
            width = block.num_heads * block.head_dim
            keys = visible_keys(length, block.window, causal)
            attention += segment.repeats * 4 * width * keys
    return 3 * (2 * matmul_params + attention) - 2 * frozen


def frozen_matmul_params(parts) -> int:
    """Elements of the weights that multiply and are not trained; a look-up is no product."""
    tied = 'head/table' not in parts.shapes
    return sum(
        leaf.size
        for path, leaf in parts.shapes.items()
        if not is_vector(parts.axes[path])
        and path not in parts.trainable
        and (tied or path != 'embedding/table')
    )


def num_parameters(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Elements of all parameters."""
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


def bytes_per_device(tree) -> int:
    """Bytes of a tree of arrays or ShapeDtypeStructs on the fullest device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_total(tree) -> int:
    """Bytes of one copy of a tree: what a checkpoint holds."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def choices(model: TransformerConfig, mesh) -> dict[str, Choice]:
    """What every op of the model runs as on the mesh, and why.

    Raises:
      ConfigError: an implementation that the config names cannot run there.
    """
    chosen, ops = {}, IMPLEMENTATIONS.keys() & dict(model.implementations).keys()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for op in sorted(ops):
            try:
                chosen[op] = decide(op, getattr(model.implementations, op), _unsupported(op, model))
            except ValueError as error:
                raise ConfigError(f'config.model.implementations.{op}: {error}') from error
    return chosen


def _unsupported(op: str, model: TransformerConfig) -> dict[str, str]:
    """{implementation: why some block of the model cannot have it}."""
    dtype, found = compute_dtype(model), {}
    if op == 'token_logprobs':
        found |= logprobs.obstacles(dtype, model.embed_dim)
    if op == 'rms_norm':
        found |= norm.obstacles(model.embed_dim, dtype)
    for block in (block for segment in model.trunk for block in segment.pattern):
        if op == 'attention':
            found |= attention.obstacles(
                head_dim=block.head_dim,
                dtype=dtype,
                softcap=block.attention_softcap,
                one_document=model.implementations.one_document,
            )
        elif op == 'rms_norm' and block.qk_norm:
            found |= _obstacles_of_head_norms(block, dtype)
    return found


def _obstacles_of_head_norms(block: BlockConfig, dtype) -> dict[str, str]:
    if not block.joint_qk_norm:
        return norm.obstacles(block.head_dim, dtype)
    is_split = sharding.axis_size(sharding.ACTIVATIONS, 'heads') > 1
    split = sharding.split_axes('heads') if is_split else ()
    widths = (heads * block.head_dim for heads in (block.num_heads, block.num_kv_heads))
    return {k: v for width in widths for k, v in norm.obstacles(width, dtype, split).items()}


def check_matmuls(model: TransformerConfig, mesh) -> None:
    """Whether the devices can multiply as the model wants; a CPU can, slowly.

    Raises:
      ConfigError: GPUs from before Ada and Hopper have no float8.
    """
    device = mesh.devices.flat[0]
    capability = getattr(device, 'compute_capability', None) if device.platform == 'gpu' else None
    version = tuple(map(int, capability.split('.'))) if capability else (9, 0)
    if model.matmul_dtype == 'float8' and version < (8, 9):
        raise ConfigError(
            f'config.model.matmul_dtype is float8, which {device.device_kind} (compute capability '
            f'{capability}) has not: it needs 8.9 (Ada), 9.0 (Hopper) or newer; use compute'
        )


def tables(config, phases, datasets, mesh, state) -> dict[str, list[tuple]]:
    """What a run is, as {title: [(name, value), ...]}.

    Args:
      config: a RunConfig. phases: its Phases. datasets: {name of a phase: its data}. state: the
      TrainState of the first, or its shapes and shardings.
    """
    model = config.model
    split = [f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1]
    chosen = choices(model, mesh)
    sections = {
        'run': [('steps', f'{config.total_steps:,}'), *_origin(config)],
        'model': [
            ('name', f'{model.name}, {model.num_layers} layers'),
            ('parameters', f'{num_parameters(phases[0].parts.shapes):,}'),
            *([('adapters', f'{model.lora.described}, stored float32')] if model.lora else []),
            (
                'precision',
                f'stored {model.param_dtype}, computed {compute_dtype(model).name}, logits float32',
            ),
            *(
                [
                    (
                        'matrices of blocks',
                        'multiplied in float8, unproven on hardware; MFU is of '
                        f'the peak in {compute_dtype(model).name}',
                    )
                ]
                if model.matmul_dtype == 'float8'
                else []
            ),
        ],
        'ops': [(op, f'{choice.name}: {choice.reason}') for op, choice in chosen.items()],
        'devices': [
            ('devices', f'{jax.device_count()} x {jax.devices()[0].device_kind}'),
            ('processes', jax.process_count()),
            ('mesh', ', '.join(split) or 'one device'),
            ('train state', f'{human_bytes(bytes_per_device(state))} a device'),
        ],
    }
    for phase in phases:
        title = f'phase {phase.name}' if phase.name else 'training'
        sections[title] = _phase_rows(phase, model)
        sections[f'data of {title}'] = _data_rows(datasets[phase.name].statistics)
    return sections


def _origin(config) -> list[tuple]:
    return [('weights from', config.init_from)] if config.init_from else []


def _phase_rows(phase, model) -> list[tuple]:
    optimizer, data = phase.config.optimizer, phase.config.data
    total = num_parameters(phase.parts.shapes)
    trained = num_parameters({path: phase.parts.shapes[path] for path in phase.parts.trainable})
    frozen = frozen_matmul_params(phase.parts)
    flops = model_flops_per_token(model, data.sequence_length, frozen=frozen)
    tokens, steps = phase.tokens_per_step, phase.config.steps
    return [
        ('steps', f'{steps:,} of {tokens:,} tokens, {steps * tokens:,} in all'),
        ('optimizer', f'{optimizer.name}, {optimizer.schedule} schedule'),
        *([('trained', f'{trained:,} parameters of {total:,}')] if trained < total else []),
        ('model FLOPs', f'{flops:.3g} a token in training, causal attention counted half'),
        *([('not counted', 'gradients of frozen weights: none are computed')] if frozen else []),
    ]


# What the start-up table shows of the statistics; the records and the report have them all.
SHOWN_STATISTICS = (
    *('train_documents', 'train_bytes', 'train_tokens', 'train_supervised_tokens'),
    *('heldout_documents', 'heldout_tokens', 'bytes_per_token', 'share', 'rows_per_epoch'),
    *('packing', 'packing_efficiency', 'cut_documents', 'truncated_documents'),
    *('dropped_documents', 'bad_records', 'duplicates_dropped', 'vocab_size', 'fingerprint'),
)


def _data_rows(statistics: dict) -> list[tuple]:
    """Of a mixture, '<source>/' stands before the names."""
    return [
        (name.replace('_', ' '), _shown(value))
        for name, value in statistics.items()
        if name.rpartition('/')[2] in SHOWN_STATISTICS and value != 0
    ]


def _shown(value) -> str:
    if isinstance(value, int):
        return f'{value:,}'
    return f'{value:.4g}' if isinstance(value, float) else value[:16]


def parameter_rows(phases, mesh):
    """(name, shape, dtype, sharding, rule of the optimizer in each phase) of every parameter."""
    parts = phases[0].parts
    for path, leaf in parts.shapes.items():
        spec = sharding.stored_spec(parts.axes[path])
        split = [axis if axis and mesh.shape[axis] > 1 else '-' for axis in spec]
        rules = [phase.optimizer.rules.get(path, 'frozen') for phase in phases]
        rule = '; then '.join(dict.fromkeys(rules)) if len(set(rules)) > 1 else rules[0]
        yield path, leaf.shape, leaf.dtype.name, ', '.join(split), rule
