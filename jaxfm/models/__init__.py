"""The model definitions: one decoder-only transformer assembled from named pieces.

This file defines the model's config; `transformer.py` defines the model.
"""

from typing import Literal

from pydantic import Field, model_validator

from jaxfm.models.families import FAMILIES
from jaxfm.ops import IMPLEMENTATIONS
from jaxfm.registry import Entry, Registry
from jaxfm.schema import ConflictError, Group, Problem


class RopeConfig(Group):
    """Rotary position embedding and its extension to contexts longer than it was trained for."""

    theta: float = Field(10_000.0, gt=0)
    scaling: Literal['none', 'linear', 'llama3', 'yarn'] = 'none'
    factor: float = Field(1.0, ge=1)  # context length / original_max_position
    low_freq_factor: float = Field(1.0, gt=0)  # llama3: wavelengths above original / low are scaled
    high_freq_factor: float = Field(4.0, gt=0)  # llama3: wavelengths below original / high are kept
    beta_slow: float = Field(1.0, gt=0)  # yarn: pairs with fewer turns than this are scaled
    beta_fast: float = Field(32.0, gt=0)  # yarn: pairs with more turns than this are kept
    attention_factor: float = Field(0.0, ge=0)  # yarn: scales q and k; 0: 0.1 ln(factor) + 1
    original_max_position: int = Field(8192, ge=1)  # turns are counted over this context

    @model_validator(mode='after')
    def _check(self):
        if self.scaling == 'llama3' and self.high_freq_factor <= self.low_freq_factor:
            sentence = (
                f'high_freq_factor {self.high_freq_factor} must exceed low_freq_factor '
                f'{self.low_freq_factor}'
            )
            paths = (('scaling',), ('high_freq_factor',), ('low_freq_factor',))
            raise ConflictError(Problem(paths, sentence))
        if self.scaling == 'yarn' and self.beta_fast <= self.beta_slow:
            sentence = f'beta_fast {self.beta_fast} must exceed beta_slow {self.beta_slow}'
            raise ConflictError(Problem((('scaling',), ('beta_fast',), ('beta_slow',)), sentence))
        return self


class BlockConfig(Group):
    """One transformer block: attention, then a gated MLP, each with its norms."""

    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)  # 1 is MQA, num_heads is MHA, between is GQA
    head_dim: int = Field(ge=2, multiple_of=2)
    mlp_dim: int = Field(ge=1)
    activation: Literal['silu', 'gelu', 'gelu_tanh', 'relu_squared'] = 'silu'
    gated: bool = True  # activation(gate) * up (SwiGLU, GeGLU); False: activation(up)
    rope: RopeConfig | None = RopeConfig()  # None: no position embedding in this block (NoPE)
    window: int = Field(0, ge=0)  # latest keys a query sees, itself included; 0: all
    query_scale: float = Field(0.0, ge=0)  # 0: 1 / sqrt(head_dim)
    attention_softcap: float = Field(0.0, ge=0)  # cap * tanh(scores / cap); 0: off
    qk_norm: bool = False
    joint_qk_norm: bool = False  # normalise all heads together (OLMo 2), not each one separately
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    norm_epsilon: float = Field(1e-6, gt=0)
    norm_unit_offset: bool = False  # scale by (1 + w) instead of w, as Gemma does

    @model_validator(mode='after')
    def _check(self):
        if self.num_heads % self.num_kv_heads:
            sentence = (
                f'num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}'
            )
            raise ConflictError(Problem((('num_heads',), ('num_kv_heads',)), sentence))
        if not (self.pre_norm or self.post_norm):
            sentence = 'pre_norm and post_norm are both off; a block needs at least one'
            raise ConflictError(Problem((('pre_norm',), ('post_norm',)), sentence))
        if self.joint_qk_norm and not self.qk_norm:
            sentence = 'joint_qk_norm needs qk_norm, which is off'
            raise ConflictError(Problem((('joint_qk_norm',), ('qk_norm',)), sentence))
        return self


class SegmentConfig(Group):
    """A pattern of blocks and its repeats, such as three local blocks and a global one, 8 times."""

    pattern: list[BlockConfig] = Field(min_length=1)
    repeats: int = Field(ge=1)


TARGETS = ('attention/q', 'attention/k', 'attention/v', 'attention/out', 'mlp/gate_up', 'mlp/down')


class LoraConfig(Group):
    """Low-rank adapters (Hu et al., 2021) on matrices of every block; only they are trained.

    A matrix W becomes W + alpha / rank x A B.
    """

    path: str = ''  # a PEFT adapter directory: sets rank, alpha, targets and weights
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    # Matrices of a block, or 'all'.
    targets: list[Literal[(*TARGETS, 'all')]] = Field(['attention/q', 'attention/v'], min_length=1)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices that have an adapter."""
        return tuple(name for name in TARGETS if {name, 'all'} & set(self.targets))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def description(self) -> str:
        """One line for logs."""
        return f'rank {self.rank}, alpha {self.alpha:g} on {", ".join(self.matrices)}'


def adapter_paths(path: str) -> tuple[str, str]:
    """The parameter paths of the adapter's A and B for the matrix at `path`."""
    return f'{path}_lora/a', f'{path}_lora/b'


class ImplementationsConfig(Group):
    """The implementation of each op; None picks the best one proven on the device.

    An implementation that cannot run is an error at start-up; `jaxfm.ops.choice` defines the names.
    """

    attention: Literal[IMPLEMENTATIONS['attention']] | None = None
    decode_attention: Literal[IMPLEMENTATIONS['decode_attention']] | None = None
    rms_norm: Literal[IMPLEMENTATIONS['rms_norm']] | None = None
    token_logprobs: Literal[IMPLEMENTATIONS['token_logprobs']] | None = None
    # A promise that cudnn needs wherever there is no cache: every row is one document at positions
    # 0, 1, 2, ..., padded only at the end. data.packing='none' keeps the promise.
    one_document: bool = False


class TransformerConfig(Group):
    """A decoder-only transformer."""

    name: Literal['transformer'] = 'transformer'
    family: str = ''  # names the weights in files; '': the first family that fits
    context_length: int = Field(0, ge=0)  # longest document it trained on; 0: unknown
    vocab_size: int = Field(ge=2)
    vocab_multiple: int = Field(128, ge=1)  # of table rows; padding ids have probability 0
    embed_dim: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    block: BlockConfig  # every block, unless segments is given
    segments: list[SegmentConfig] = []
    tie_embeddings: bool = False
    embedding_scale: float = Field(1.0, gt=0)  # Gemma: sqrt(embed_dim)
    embedding_norm: bool = False  # RMSNorm right after the lookup (BLOOM)
    embedding_std: float = Field(0.0, ge=0)  # at init; 0: 1, or 1 / sqrt(embed_dim) if tied
    logits_softcap: float = Field(0.0, ge=0)
    init_scale: float = Field(1.0, gt=0)  # multiplies the fan-in init of every matrix
    zero_init_outputs: bool = False  # zero the output projections of attention, MLP and model
    scan: bool = True  # lax.scan over the repeats of a segment; False unrolls them
    remat: Literal['none', 'dots', 'full'] = 'none'
    param_dtype: Literal['float32', 'bfloat16'] = 'float32'
    compute_dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16, float32 on CPU
    gradient_reduce_dtype: Literal['compute', 'float32'] = 'compute'
    # For matmuls with the blocks' weights, in training and loss evaluation; float8 has one scale
    # per tensor. Embedding, output projection, attention and sampling use compute_dtype.
    matmul_dtype: Literal['compute', 'float8'] = 'compute'
    # A token's log-probability has the same bits in training and sampling, whatever the batch.
    batch_invariant: bool = False
    implementations: ImplementationsConfig = ImplementationsConfig()
    lora: LoraConfig | None = None

    @model_validator(mode='after')
    def _check(self):
        self._check_batch_invariant()
        if self.family and self.family not in FAMILIES:
            sentence = f'family {self.family} is not one of {", ".join(FAMILIES)}'
            raise ConflictError(Problem((('family',),), sentence))
        if self.lora and self.matmul_dtype != 'compute':
            sentence = 'matmul_dtype float8 needs all weights to be trained; with lora use compute'
            raise ConflictError(Problem((('matmul_dtype',), ('lora',)), sentence))
        layers = sum(len(s.pattern) * s.repeats for s in self.segments)
        if self.segments and layers != self.num_layers:
            terms = ' + '.join(f'{s.repeats} x {len(s.pattern)}' for s in self.segments)
            sentence = f'segments have {terms} = {layers} blocks, num_layers is {self.num_layers}'
            numbers = [
                ('segments', index, key)
                for index in range(len(self.segments))
                for key in ('repeats', 'pattern')
            ]
            raise ConflictError(Problem((('num_layers',), *numbers), sentence))
        return self

    def _check_batch_invariant(self):
        """Raises ConflictError for a value with which equal bits are impossible or unproven."""
        proven = {'compute_dtype': ('float32', 'auto'), 'matmul_dtype': ('compute',)}
        given = {(key,): (getattr(self, key), values) for key, values in proven.items()}
        for op in IMPLEMENTATIONS.keys() & dict(self.implementations).keys():
            path = ('implementations', op)
            given[path] = (getattr(self.implementations, op), ('xla', None))
        for path, (value, values) in sorted(given.items()):
            if self.batch_invariant and value not in values:
                sentence = (
                    f'batch_invariant is not possible with {".".join(path)} {value}; '
                    f'use {values[0]}'
                )
                raise ConflictError(Problem((('batch_invariant',), path), sentence))

    @property
    def trunk(self) -> list[SegmentConfig]:
        """All segments in order; a model without `segments` is a single segment."""
        return self.segments or [SegmentConfig(pattern=[self.block], repeats=self.num_layers)]

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


MODELS = Registry({'transformer': Entry('jaxfm.models.transformer:Transformer', TransformerConfig)})
