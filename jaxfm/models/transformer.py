"""The decoder-only transformer: embedding, a trunk of repeated patterns of blocks, a final norm.

One forward serves training, prefill and decode: the cache is an argument. It returns hidden states;
`unembed()` is separate, so that the logits of a whole batch never need to be in memory. The model
is written as if there were one device.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxfm import sharding
from jaxfm.models import BlockConfig, SegmentConfig, TransformerConfig
from jaxfm.models.attention import Attention
from jaxfm.models.layers import Embedding, Mlp, RMSNorm
from jaxfm.ops.attention import SAVED_NAMES
from jaxfm.ops.batch_invariant import by_rows
from jaxfm.ops.choice import target
from jaxfm.ops.linear import SAVED_NAME
from jaxfm.ops.logprobs import Unembedding

# Gathers and casts of weights are recomputed in the backward pass, never saved, so that no gathered
# weight outlives its block. This also holds under remat 'none' if weights are gathered or cast.
_WEIGHT_MOVES = ('reshard', 'convert_element_type')


def _policy(remat: str):
    """The jax.checkpoint policy for a `remat` value; none of them saves gathered weights."""
    policies = jax.checkpoint_policies
    saveable = {
        'none': lambda *_, **__: True,
        # Products in kernels and loops are not seen as a dot_general: save by name.
        'dots': policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(*SAVED_NAMES, SAVED_NAME),
        ),
        'full': jax.checkpoint_policies.nothing_saveable,
    }[remat]
    return lambda prim, *avals, **params: (
        prim.name not in _WEIGHT_MOVES and saveable(prim, *avals, **params)
    )


def compute_dtype(config: TransformerConfig) -> jnp.dtype:
    """The dtype of matmuls and the residual stream; 'auto' is bfloat16, or float32 on CPU."""
    name = config.compute_dtype
    if name == 'auto':
        name = 'float32' if target().platform == 'cpu' else 'bfloat16'
    return jnp.dtype(name)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); norms before, after, or both (Gemma 2)."""

    def __init__(self, config: BlockConfig, model: TransformerConfig, rngs: nnx.Rngs):
        D, implementations = model.embed_dim, model.implementations
        shared = dict(
            scale=model.init_scale,
            output_scale=0.0 if model.zero_init_outputs else model.init_scale,
            dtype=jnp.dtype(model.param_dtype),
            lora=model.lora,
            float8=model.matmul_dtype == 'float8',
            batch_invariant=model.batch_invariant,
        )
        norm = functools.partial(
            RMSNorm,
            D,
            epsilon=config.norm_epsilon,
            unit_offset=config.norm_unit_offset,
            implementation=implementations.rms_norm,
            batch_invariant=model.batch_invariant,
        )
        self.attention = Attention(config, D, implementations=implementations, **shared, rngs=rngs)
        self.mlp = Mlp(config, D, **shared, rngs=rngs)
        self.pre_attention = norm() if config.pre_norm else None
        self.post_attention = norm() if config.post_norm else None
        self.pre_mlp = norm() if config.pre_norm else None
        self.post_mlp = norm() if config.post_norm else None

    def __call__(self, x_BTD, positions_BT, segment_ids_BT, cache=None, layer=0):
        normed = self.pre_attention(x_BTD) if self.pre_attention else x_BTD
        out, cache = self.attention(normed, positions_BT, segment_ids_BT, cache, layer)
        x_BTD += self.post_attention(out) if self.post_attention else out
        normed = self.pre_mlp(x_BTD) if self.pre_mlp else x_BTD
        out = self.mlp(normed, has_cache=cache is not None)
        x_BTD += self.post_mlp(out) if self.post_mlp else out
        return x_BTD, cache


def _stack(block: BlockConfig, config: TransformerConfig, repeats: int, rngs: nnx.Rngs) -> Block:
    """`repeats` blocks stacked into one module: every weight has a leading layers axis."""

    def make(key):
        # Adapters have their own random stream, so that they do not change the initial weights.
        return Block(block, config, nnx.Rngs(key, lora=jax.random.fold_in(key, 2**31)))

    return nnx.vmap(make)(jax.random.split(rngs.params(), repeats))


class Transformer(nnx.Module):
    """Tokens to final hidden states."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.param_dtype)
        table = functools.partial(
            Embedding, config.padded_vocab_size, config.embed_dim, dtype=dtype, rngs=rngs
        )
        # A tied table is also the output projection, so its rows start at unit length. Otherwise
        # entries have unit variance and the residual stream starts at unit scale.
        unit_length = config.embed_dim**-0.5
        std = config.embedding_std or (unit_length if config.tie_embeddings else 1.0)
        self.embedding = table(std=std)
        last = config.trunk[-1].pattern[-1]
        norm = functools.partial(
            RMSNorm,
            config.embed_dim,
            epsilon=last.norm_epsilon,
            unit_offset=last.norm_unit_offset,
            implementation=config.implementations.rms_norm,
            batch_invariant=config.batch_invariant,
        )
        self.embedding_norm = norm() if config.embedding_norm else None
        self.trunk = nnx.List(
            nnx.List(_stack(block, config, s.repeats, rngs) for block in s.pattern)
            for s in config.trunk
        )
        self.final_norm = norm()
        head_std = 0.0 if config.zero_init_outputs else unit_length * config.init_scale
        self.head = None if config.tie_embeddings else table(std=head_std)

    def _scale(self, x_BTD):
        return x_BTD * jnp.asarray(self.config.embedding_scale, x_BTD.dtype)

    def _gather_module(self, module: nnx.Module) -> nnx.Module:
        """The same module with its weights cast and gathered."""
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        return nnx.merge(graphdef, self._gather(params), rest)

    def _gather(self, params):
        dtype = compute_dtype(self.config)
        reduce_dtype = None if self.config.gradient_reduce_dtype == 'compute' else jnp.float32
        return sharding.gather(params, dtype, reduce_dtype)

    def __call__(self, tokens_BT, positions_BT, segment_ids_BT, cache=None):
        """Final hidden states [B, T, D] in the compute dtype, and extras ({'cache': updated}).

        Args:
          positions_BT: position in the document, the only position that masks and RoPE use.
          segment_ids_BT: a token attends only to tokens of its own segment; 0 is padding.
          cache: from `kv_cache.init_cache`; new keys are stored in it and attention reads it.
        """
        x_BTD = self._gather_module(self.embedding)(tokens_BT, compute_dtype(self.config))
        if self.config.embedding_scale != 1.0:
            # Fused with the first residual sum, it would round once in some programs, not twice.
            batch_invariant = self.config.batch_invariant
            x_BTD = by_rows(self._scale, (x_BTD,)) if batch_invariant else self._scale(x_BTD)
        if self.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        caches = []
        for index, (segment, stacks) in enumerate(zip(self.config.trunk, self.trunk, strict=True)):
            segment_cache = None if cache is None else cache[index]
            x_BTD, segment_cache = self._run_segment(
                segment, stacks, x_BTD, positions_BT, segment_ids_BT, segment_cache
            )
            caches.append(segment_cache)
        return self.final_norm(x_BTD), {} if cache is None else {'cache': caches}

    def _run_segment(self, segment: SegmentConfig, stacks, x, positions, segment_ids, caches):
        """All repeats of a pattern, scanned or unrolled; weights are gathered inside."""
        graphdefs, params, rest = zip(*(nnx.split(s, nnx.Param, ...) for s in stacks), strict=True)

        # Caches are part of the carry, not scanned over, so that decoding updates them in place.
        def body(carry, layer):
            x, caches = carry
            index, params, rest = layer
            new_caches = []
            for i, graphdef in enumerate(graphdefs):
                block = nnx.merge(graphdef, self._gather(params[i]), rest[i])
                cache = None if caches is None else caches[i]
                x, cache = block(x, positions, segment_ids, cache, index)
                new_caches.append(cache)
            return (x, None if caches is None else new_caches), None

        layers = (jnp.arange(segment.repeats), params, rest)
        is_scanned = self.config.scan and segment.repeats > 1
        if caches is None and (self.config.remat != 'none' or self._moves_weights()):
            # Outside a scan, XLA's common-subexpression elimination would undo the recomputation.
            policy = _policy(self.config.remat)
            body = jax.checkpoint(body, policy=policy, prevent_cse=not is_scanned)
        if is_scanned:
            return lax.scan(body, (x, caches), layers)[0]
        carry = (x, caches)
        for repeat in range(segment.repeats):
            carry, _ = body(carry, jax.tree.map(operator.itemgetter(repeat), layers))
        return carry

    def _moves_weights(self) -> bool:
        cast = compute_dtype(self.config) != jnp.dtype(self.config.param_dtype)
        return cast or sharding.is_gathered()

    def unembed(self) -> Unembedding:
        """The output projection, cast and gathered, for `ops.logprobs`."""
        table = self.embedding if self.config.tie_embeddings else self.head
        return Unembedding(
            self._gather_module(table).table[...],
            self.config.vocab_size,
            self.config.logits_softcap,
            self.config.implementations.token_logprobs,
            self.config.batch_invariant,
        )
