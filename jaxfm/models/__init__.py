"""The model definitions: one decoder-only transformer assembled from named pieces.

This file holds what a config may say of a model; `transformer.py` is the model.
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
    factor: float = Field(1.0, ge=1)  # how much longer than original_max_position the context is
    low_freq_factor: float = Field(1.0, gt=0)  # llama3: wavelengths above original / low are scaled
    high_freq_factor: float = Field(4.0, gt=0)  # llama3: wavelengths below original / high are kept
    beta_slow: float = Field(1.0, gt=0)  # yarn: as low_freq_factor, in turns over the original
    beta_fast: float = Field(32.0, gt=0)  # yarn: as high_freq_factor
    attention_factor: float = Field(0.0, ge=0)  # yarn: of rotated q and k; 0: 0.1 ln(factor) + 1
    original_max_position: int = Field(8192, ge=1)

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
    window: int = Field(0, ge=0)  # keys a query sees, itself included; 0 is all before it
    query_scale: float = Field(0.0, ge=0)  # 0 is 1 / sqrt(head_dim)
    attention_softcap: float = Field(0.0, ge=0)  # cap * tanh(scores / cap); 0 is off
    qk_norm: bool = False
    joint_qk_norm: bool = False  # the norm goes over all heads together (OLMo 2), not over each
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
            sentence = 'pre_norm and post_norm are both off; a block needs one of them'
            raise ConflictError(Problem((('pre_norm',), ('post_norm',)), sentence))
        if self.joint_qk_norm and not self.qk_norm:
            sentence = 'joint_qk_norm says how qk_norm works, which is off'
            raise ConflictError(Problem((('joint_qk_norm',), ('qk_norm',)), sentence))
        return self


class SegmentConfig(Group):
    """A pattern of blocks and how often it repeats: three local and one global, eight times."""

    pattern: list[BlockConfig] = Field(min_length=1)
    repeats: int = Field(ge=1)


TARGETS = ('attention/q', 'attention/k', 'attention/v', 'attention/out', 'mlp/gate_up', 'mlp/down')


class LoraConfig(Group):
    """Low-rank adapters (Hu et al., 2021) beside matrices of every block; they alone are trained.

    A matrix W becomes W + alpha / rank x A B.
    """

    path: str = ''  # a directory that PEFT has written: its rank, alpha, targets and weights count
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    # Names of matrices in a block, or 'all'.
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
        """For people."""
        return f'rank {self.rank}, alpha {self.alpha:g} on {", ".join(self.matrices)}'


def adapter_paths(path: str) -> tuple[str, str]:
    """The paths of A and B of the adapter of a matrix."""
    return f'{path}_lora/a', f'{path}_lora/b'


class ImplementationsConfig(Group):
    """What the model's ops run as, by name; None is the best that is proven on the device.

    A name that cannot run is an error at start; `jaxfm.ops.choice` says what the names mean.
    """

    attention: Literal[IMPLEMENTATIONS['attention']] | None = None
    rms_norm: Literal[IMPLEMENTATIONS['rms_norm']] | None = None
    token_logprobs: Literal[IMPLEMENTATIONS['token_logprobs']] | None = None
    # A promise that cudnn needs, for what is not read from a cache: every row is one document, its
    # positions 0, 1, 2, ..., with padding behind it. A run must keep it: data.packing='none'.
    one_document: bool = False


class TransformerConfig(Group):
    """A decoder-only transformer."""

    name: Literal['transformer'] = 'transformer'
    family: str = ''  # whose weight names its files have; '' is the first that can express it
    context_length: int = Field(0, ge=0)  # tokens of a document it was trained for; 0: not said
    vocab_size: int = Field(ge=2)
    vocab_multiple: int = Field(128, ge=1)  # tables are padded to it; padding gets probability 0
    embed_dim: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    block: BlockConfig  # every block, unless segments says otherwise
    segments: list[SegmentConfig] = []
    tie_embeddings: bool = False
    embedding_scale: float = Field(1.0, gt=0)  # Gemma: sqrt(embed_dim)
    embedding_norm: bool = False  # RMSNorm right after the look-up (BLOOM)
    embedding_std: float = Field(0.0, ge=0)  # of the initial table; 0: 1, tied 1 / sqrt(embed_dim)
    logits_softcap: float = Field(0.0, ge=0)
    init_scale: float = Field(1.0, gt=0)  # multiplies the fan-in initialisation of every matrix
    zero_init_outputs: bool = False  # output projections of attention, MLP and model start at zero
    scan: bool = True  # lax.scan over the repeats of a segment; False unrolls them
    remat: Literal['none', 'dots', 'full'] = 'none'
    param_dtype: Literal['float32', 'bfloat16'] = 'float32'
    compute_dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # bfloat16, but float32 on CPU
    gradient_reduce_dtype: Literal['compute', 'float32'] = 'compute'
    # Of products with the matrices of blocks, in training and where the loss is evaluated: float8
    # with a scale for each tensor. Embedding, output, attention and sampling keep compute_dtype.
    matmul_dtype: Literal['compute', 'float8'] = 'compute'
    implementations: ImplementationsConfig = ImplementationsConfig()
    lora: LoraConfig | None = None

    @model_validator(mode='after')
    def _check(self):
        if self.family and self.family not in FAMILIES:
            sentence = f'family {self.family} is none of {", ".join(FAMILIES)}'
            raise ConflictError(Problem((('family',),), sentence))
        if self.lora and self.matmul_dtype != 'compute':
            sentence = (
                'matmul_dtype float8 is for training all weights; with lora it must be compute'
            )
            raise ConflictError(Problem((('matmul_dtype',), ('lora',)), sentence))
        layers = sum(len(s.pattern) * s.repeats for s in self.segments)
        if self.segments and layers != self.num_layers:
            terms = ' + '.join(f'{s.repeats} x {len(s.pattern)}' for s in self.segments)
            sentence = f'segments hold {terms} = {layers} blocks, num_layers is {self.num_layers}'
            numbers = [
                ('segments', index, key)
                for index in range(len(self.segments))
                for key in ('repeats', 'pattern')
            ]
            raise ConflictError(Problem((('num_layers',), *numbers), sentence))
        return self

    @property
    def trunk(self) -> list[SegmentConfig]:
        """The segments; a uniform model is one segment."""
        return self.segments or [SegmentConfig(pattern=[self.block], repeats=self.num_layers)]

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


MODELS = Registry({'transformer': Entry('jaxfm.models.transformer:Transformer', TransformerConfig)})
