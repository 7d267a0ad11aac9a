"""Chooses the implementation of each op of a model on a mesh, before anything is built."""

import jax

from jaxfm import sharding
from jaxfm.errors import ConfigError
from jaxfm.models import BlockConfig, TransformerConfig
from jaxfm.models.transformer import compute_dtype
from jaxfm.ops import IMPLEMENTATIONS, attention, logprobs, norm, paged_attention
from jaxfm.ops.choice import Choice, decide

_ANY_PAGE_SIZE = 16  # the sampler's own is checked when it decodes


def choices(model: TransformerConfig, mesh) -> dict[str, Choice]:
    """{op: the implementation that runs on the mesh, and why}.

    Raises:
      ConfigError: the config names an implementation that cannot run there.
    """
    chosen, ops = {}, IMPLEMENTATIONS.keys() & dict(model.implementations).keys()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for op in sorted(ops):
            try:
                chosen[op] = decide(op, getattr(model.implementations, op), _obstacles(op, model))
            except ValueError as error:
                raise ConfigError(f'config.model.implementations.{op}: {error}') from error
    return chosen


def _obstacles(op: str, model: TransformerConfig) -> dict[str, str]:
    """{implementation: why some block of the model cannot use it}."""
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
        elif op == 'decode_attention':
            found |= paged_attention.obstacles(
                num_heads=block.num_heads,
                num_kv_heads=block.num_kv_heads,
                head_dim=block.head_dim,
                page_size=_ANY_PAGE_SIZE,
                dtypes=(dtype,),
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


def check_batch_invariant(model: TransformerConfig, mesh) -> None:
    """Raises ConfigError if the model asks for equal bits on devices where nobody has seen them."""
    platform = mesh.devices.flat[0].platform
    if model.batch_invariant and platform != 'cpu':
        raise ConfigError(
            f'config.model.batch_invariant is proven on CPU in float32 only, and the device is a '
            f'{platform}: leave it out, or run on CPU'
        )


def check_matmuls(model: TransformerConfig, mesh) -> None:
    """Raises ConfigError unless the devices support the model's matmul_dtype.

    GPUs older than Ada and Hopper have no float8; CPUs emulate it slowly.
    """
    device = mesh.devices.flat[0]
    capability = getattr(device, 'compute_capability', None) if device.platform == 'gpu' else None
    version = tuple(map(int, capability.split('.'))) if capability else (9, 0)
    if model.matmul_dtype == 'float8' and version < (8, 9):
        raise ConfigError(
            f'config.model.matmul_dtype is float8, which {device.device_kind} (compute capability '
            f'{capability}) does not support: it needs 8.9 (Ada), 9.0 (Hopper) or newer; '
            'use compute'
        )
