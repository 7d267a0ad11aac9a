"""Writes .gguf files as llama.cpp's converter does, with the package `gguf`."""

import json
import math
from pathlib import Path

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], 'little')
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != '__metadata__':
            begin, end = entry['data_offsets']
            data = np.frombuffer(content[start + begin : start + end], np.float32)
            tensors[name] = data.reshape(entry['shape'])
    return tensors


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """q or k in the order of rows that llama.cpp wants; as `LlamaModel.permute` there."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(theta: float, turned: int, scaling: dict) -> np.ndarray:
    """`generate_extra_tensors` of the converter: by how much each wavelength is stretched."""
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    context, found = scaling['original_max_position_embeddings'], []
    for frequency in theta ** (-np.arange(0, turned, 2) / turned):
        wave = 2 * math.pi / frequency
        if wave < context / high:
            found.append(1)
        elif wave > context / low:
            found.append(scaling['factor'])
        else:
            smooth = (context / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / scaling['factor'] + smooth))
    return np.array(found, np.float32)


def write(
    path: Path,
    architecture: str,
    metadata: dict,
    tensors: dict[str, np.ndarray],
    kinds: dict | None = None,
) -> Path:
    """A file; keys with a dot in front are of the architecture, `kinds` of quantised tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = architecture + key if key.startswith('.') else key
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        if kind := (kinds or {}).get(name):
            data = gguf.quantize(np.ascontiguousarray(tensor, np.float32), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shape_keys(config: dict) -> dict:
    """The metadata that the shapes of a Hugging Face config become."""
    return {
        '.block_count': config['num_hidden_layers'],
        '.embedding_length': config['hidden_size'],
        '.feed_forward_length': config['intermediate_size'],
        '.attention.head_count': config['num_attention_heads'],
        '.attention.head_count_kv': config['num_key_value_heads'],
        '.context_length': config['max_position_embeddings'],
        '.attention.layer_norm_rms_epsilon': config['rms_norm_eps'],
        '.rope.freq_base': config['rope_theta'],
        '.rope.dimension_count': config['head_dim'],
    }


def sentencepiece_keys(path: Path) -> dict:
    """The vocabulary of a tokenizer.model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(model.vocab_size())

    def kind(i):
        checks = (model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5)
        return next((kind for is_so, kind in (*checks, (model.is_byte, 6)) if is_so(i)), 1)

    return {
        'tokenizer.ggml.model': 'llama',
        'tokenizer.ggml.tokens': [model.id_to_piece(i) for i in ids],
        'tokenizer.ggml.scores': [model.get_score(i) for i in ids],
        'tokenizer.ggml.token_type': [kind(i) for i in ids],
        'tokenizer.ggml.bos_token_id': model.bos_id(),
        'tokenizer.ggml.eos_token_id': model.eos_id(),
        'tokenizer.ggml.unknown_token_id': model.unk_id(),
    }


def byte_level_keys(tokenizer: dict, pre: str, config: dict) -> dict:
    """The vocabulary of a tokenizer.json, with `get_vocab_base` of the converter."""
    added = {token['id']: token for token in tokenizer['added_tokens']}
    ids = {i: token for token, i in tokenizer['model']['vocab'].items()}
    ids |= {i: token['content'] for i, token in added.items()}
    count = max(ids) + 1
    kinds = [1 if i not in added else 3 if added[i]['special'] else 4 for i in range(count)]
    merges = tokenizer['model']['merges']
    by_name = {token: i for i, token in ids.items()}
    keys = {
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.pre': pre,
        'tokenizer.ggml.tokens': [ids.get(i, f'[PAD{i}]') for i in range(count)],
        'tokenizer.ggml.token_type': kinds,
        'tokenizer.ggml.merges': [m if isinstance(m, str) else ' '.join(m) for m in merges],
    }
    for role in ('bos', 'eos'):
        if token := config.get(f'{role}_token'):
            keys[f'tokenizer.ggml.{role}_token_id'] = by_name[token]
    if config.get('chat_template'):
        keys['tokenizer.chat_template'] = config['chat_template']
    return keys


def stories_tensors(config: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A Llama's tensors by the names of gguf, q and k interleaved."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config['num_hidden_layers'])
    found = {}
    for name, tensor in tensors.items():
        if name.endswith('q_proj.weight'):
            tensor = interleaved(tensor, config['num_attention_heads'])
        if name.endswith('k_proj.weight'):
            tensor = interleaved(tensor, config['num_key_value_heads'])
        found[names.get_name(name, try_suffixes=('.weight',))] = tensor
    return found


def stories(path: Path, directory: Path, kinds: dict | None = None) -> Path:
    """The model of `stories260k_hf`, converted."""
    config = json.loads((directory / 'config.json').read_text())
    tensors = stories_tensors(config, read_safetensors(directory / 'model.safetensors'))
    keys = shape_keys(config) | sentencepiece_keys(directory / 'tokenizer.model')
    return write(path, 'llama', keys, tensors, kinds)
