"""Small models in Hugging Face's layout, for tests: random weights and a tokenizer of bytes."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import Bytes

LLAMA = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': 300,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 4,
    'max_position_embeddings': 64,
    'rms_norm_eps': 1e-5,
    'rope_theta': 10000.0,
    'hidden_act': 'silu',
    'tie_word_embeddings': False,
    'bos_token_id': 0,
    'eos_token_id': 1,
}
# JSON that no reader follows to its end.
DEEP = '{"model":' * 100_000


def shapes_of(hf: dict) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama."""
    embed, mlp, vocab = hf['hidden_size'], hf['intermediate_size'], hf['vocab_size']
    queries = hf['num_attention_heads'] * hf['head_dim']
    keys = hf['num_key_value_heads'] * hf['head_dim']
    shapes = {'model.embed_tokens.weight': (vocab, embed), 'model.norm.weight': (embed,)}
    if not hf['tie_word_embeddings']:
        shapes['lm_head.weight'] = (vocab, embed)
    for layer in range(hf['num_hidden_layers']):
        shapes |= {
            f'model.layers.{layer}.{name}.weight': shape
            for name, shape in {
                'input_layernorm': (embed,),
                'self_attn.q_proj': (queries, embed),
                'self_attn.k_proj': (keys, embed),
                'self_attn.v_proj': (keys, embed),
                'self_attn.o_proj': (embed, queries),
                'post_attention_layernorm': (embed,),
                'mlp.gate_proj': (mlp, embed),
                'mlp.up_proj': (mlp, embed),
                'mlp.down_proj': (embed, mlp),
            }.items()
        }
    return shapes


def random_tensors(hf: dict, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: random.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes_of(hf).items()
    }


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def write_model(path: Path, tensors=None, tokenizer: bool = True, **changes) -> Path:
    """LLAMA with other values in its config.json; None takes one away.

    tensors: instead of those that such a model has.
    """
    hf = {name: value for name, value in (LLAMA | changes).items() if value is not None}
    path.mkdir(parents=True)
    write_json(path / 'config.json', hf)
    write_json(path / 'generation_config.json', {'eos_token_id': [1, 7]})
    save_file(random_tensors(LLAMA) if tensors is None else tensors, path / 'model.safetensors')
    if tokenizer:
        Bytes(BytesConfig(), ()).save(path)
    return path
