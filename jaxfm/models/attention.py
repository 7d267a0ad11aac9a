"""Multi-head attention with grouped key-value heads, RoPE and an optional cache.

B batch, T query position, D embed, N heads, K kv heads, H head dim.
"""

from flax import nnx

from jaxfm.models import BlockConfig, ImplementationsConfig
from jaxfm.models.kv_cache import LayerCache
from jaxfm.models.layers import RMSNorm, matrix, vector
from jaxfm.models.lora import adapter, project
from jaxfm.ops.attention import KeyValues, attention
from jaxfm.ops.paged_attention import paged_attention
from jaxfm.ops.rope import apply_rope, rope_frequencies
from jaxfm.sharding import activation


class Attention(nnx.Module):
    """Causal self-attention of one block."""

    def __init__(
        self,
        config: BlockConfig,
        embed_dim: int,
        *,
        implementations: ImplementationsConfig,
        scale,
        output_scale,
        dtype,
        lora,
        float8,
        batch_invariant,
        rngs,
    ):
        D, N, K, H = embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.config, self.implementations = config, implementations
        self.float8, self.batch_invariant = float8, batch_invariant
        self.q = matrix(rngs, (D, N, H), ('embed', 'heads', 'head_dim'), D, scale, dtype)
        self.k = matrix(rngs, (D, K, H), ('embed', 'kv_heads', 'head_dim'), D, scale, dtype)
        self.v = matrix(rngs, (D, K, H), ('embed', 'kv_heads', 'head_dim'), D, scale, dtype)
        out_axes = ('heads', 'head_dim', 'embed')
        self.out = matrix(rngs, (N, H, D), out_axes, N * H, output_scale, dtype)
        self.q_lora = adapter(lora, 'attention/q', self.q, rngs)
        self.k_lora = adapter(lora, 'attention/k', self.k, rngs)
        self.v_lora = adapter(lora, 'attention/v', self.v, rngs)
        self.out_lora = adapter(lora, 'attention/out', self.out, rngs, num_inputs=2)
        # Assign each attribute once: nnx decides at the first assignment whether it is data.
        heads, kv_heads = ('heads', 'head_dim'), ('kv_heads', 'head_dim')
        self.q_bias = vector(0.0, (N, H), heads) if config.qkv_bias else None
        self.k_bias = vector(0.0, (K, H), kv_heads) if config.qkv_bias else None
        self.v_bias = vector(0.0, (K, H), kv_heads) if config.qkv_bias else None
        self.out_bias = vector(0.0, (D,), ('norm',)) if config.output_bias else None
        norm = dict(
            epsilon=config.norm_epsilon,
            unit_offset=config.norm_unit_offset,
            implementation=implementations.rms_norm,
            batch_invariant=batch_invariant,
        )
        joint = config.joint_qk_norm
        self.q_norm = RMSNorm(N * H if joint else H, **norm) if config.qk_norm else None
        self.k_norm = RMSNorm(K * H if joint else H, **norm) if config.qk_norm else None

    def _project(self, x_BTD, weight, lora, bias, norm, positions_BT, options):
        heads = project(x_BTD, weight, lora, **options)
        if bias is not None:
            heads += bias[...].astype(heads.dtype)[None, None]
        if norm is not None:
            heads = norm(heads, last_axes=2 if self.config.joint_qk_norm else 1)
        rope = self.config.rope
        if positions_BT is None or rope is None:
            return heads
        frequencies = rope_frequencies(heads.shape[-1], **dict(rope))
        return apply_rope(heads, positions_BT, *frequencies, batch_invariant=self.batch_invariant)

    def __call__(self, x_BTD, positions_BT, segment_ids_BT, cache: LayerCache | None, layer):
        """-> (out [B, T, D], updated cache). Without a cache, queries attend to x itself.

        Args:
          layer: index of this layer in the cache's stack.
        """
        config = self.config
        # The float8 scale is shared by all rows of a batch. When sampling (with a cache), that
        # would make one request's output depend on the others in its batch.
        float8 = self.float8 and cache is None
        options = dict(float8=float8, batch_invariant=self.batch_invariant)
        q_BTNH, k_BTKH, v_BTKH = (
            self._project(x_BTD, *piece, options)
            for piece in (
                (self.q, self.q_lora, self.q_bias, self.q_norm, positions_BT),
                (self.k, self.k_lora, self.k_bias, self.k_norm, positions_BT),
                (self.v, self.v_lora, self.v_bias, None, None),
            )
        )
        scores = dict(
            scale=config.query_scale or config.head_dim**-0.5,
            window=config.window,
            softcap=config.attention_softcap,
            batch_invariant=self.batch_invariant,
        )
        if cache is None:
            heads_BTNH = attention(
                q_BTNH,
                KeyValues(k_BTKH, v_BTKH, positions_BT, segment_ids_BT),
                positions_BT,
                segment_ids_BT,
                one_document=self.implementations.one_document,
                implementation=self.implementations.attention,
                **scores,
            )
        else:
            cache = cache.update(layer, k_BTKH, v_BTKH, positions_BT, segment_ids_BT)
            heads_BTNH = paged_attention(
                q_BTNH,
                cache.pages(layer),
                positions_BT,
                segment_ids_BT,
                implementation=self.implementations.decode_attention,
                **scores,
            )
        spec = activation('batch', 'position', 'embed')
        out_BTD = project(
            heads_BTNH, self.out, self.out_lora, contracted=2, out_sharding=spec, **options
        )
        if self.out_bias is not None:
            out_BTD += self.out_bias[...].astype(out_BTD.dtype)[None, None]
        return out_BTD, cache
