"""SmolLM2-135M, fine-tuned on real chats, against the same steps in PyTorch (tools/goldens)."""

import gzip
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxfm import sharding, state
from jaxfm.chat.render import Chat
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.optim import AdamWConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.pretrained.huggingface import peft
from jaxfm.pretrained.huggingface.adapters import load_adapters
from jaxfm.pretrained.load import load_params
from jaxfm.pretrained.locate import open_pretrained, values_of
from jaxfm.tokenizer.build import load_tokenizer

GOLDEN = Path(__file__).resolve().parent / 'goldens' / 'finetune_smollm2'
CHATS = 'sft_oasst_sample/chat_best_path.jsonl.gz'


@pytest.fixture(scope='module')
def golden() -> dict:
    return json.loads((GOLDEN / 'golden.json').read_text())


@pytest.fixture(scope='module')
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int32 and bool whether they are the assistant's [steps, B, T], lengths [steps, B]."""
    arrays = load_file(GOLDEN / 'batches.safetensors')
    supervised = np.unpackbits(arrays['supervised_bits'], axis=-1).astype(bool)
    return arrays['ids'].astype(np.int32), supervised, arrays['lengths']


def test_our_chats_have_the_ids_and_the_mask_of_these_batches(rows, smollm2_gguf, shared_data):
    ids, supervised, lengths = (array.reshape(-1, *array.shape[2:]) for array in rows)
    tokenizer = load_tokenizer(smollm2_gguf)
    chat, chat_text = Chat(tokenizer), tokenizer.decode
    lines = gzip.open(shared_data / CHATS, 'rt', encoding='utf-8')
    encoded = (chat.encode(json.loads(line)['messages']) for line in lines)
    size = ids.shape[1]
    kept = (pair for pair in encoded if pair[1][:size].any())
    alike = 0
    for row, (tokens, mask) in enumerate(itertools.islice(kept, len(ids))):
        length = min(len(tokens), lengths[row])
        same = tokens[:length] == ids[row, :length]
        if same.all():
            np.testing.assert_array_equal(mask[:length], supervised[row, :length])
            alike += 1
        else:
            # SmolLM2 cuts before a digit, so that the line breaks there are one token. The
            # tokenizer that transformers makes of a .gguf file does not.
            first = np.argmin(same)
            assert chat_text(tokens[first:])[:2] == '\n\n'
            assert chat_text(tokens[first:])[2].isdigit()
    assert alike == 34


def batches(rows):
    """The batches of a run: a target is the token that follows."""
    for ids, supervised, lengths in zip(*rows):
        place = np.arange(ids.shape[1], dtype=np.int32)
        yield {
            'tokens': ids[:, :-1],
            'targets': ids[:, 1:],
            'positions': np.broadcast_to(place[:-1], ids[:, 1:].shape),
            'segment_ids': (place[:-1] < lengths[:, None]).astype(np.int32),
            'loss_mask': supervised[:, 1:].astype(np.float32),
        }


def train(config, params_of, rate, rows):
    """(loss, gradient norm) of every step; `params_of(parts)` are the first weights."""
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])

    def make_model(key):
        return Transformer(config, nnx.Rngs(key))

    with jax.set_mesh(mesh):
        parts = state.split(make_model)
        axes = {path: parts.axes[path] for path in sorted(parts.trainable)}
        said = AdamWConfig(
            learning_rate=rate, schedule='constant', weight_decay=0.0, b1=0.9, b2=0.95, eps=1e-8
        )
        rule = AdamW(said, len(rows[0]), axes)
        step = state.make_train_step(parts, NextToken(NextTokenConfig()), rule, clip_norm=1.0)
        current = state.begin_phase(params_of(parts), parts, rule, seed=0)
        measured = []
        for batch in batches(rows):
            size = len(batch['tokens'])
            current, metrics = step(current, sharding.put(batch, mesh, size))
            measured.append((metrics['loss'].item(), metrics['grad_norm'].item()))
    return np.array(measured).T


@pytest.mark.slow
def test_twenty_steps_on_real_chats_equal_those_of_torch(golden, rows, smollm2_gguf):
    pretrained = open_pretrained(str(smollm2_gguf))
    config = TransformerConfig.model_validate(values_of(pretrained)['model'])

    def params_of(parts):
        return load_params(pretrained, config, parts.axes, parts.shapes)

    right = golden['full']
    losses, norms = train(config, params_of, right['learning_rate'], rows)
    np.testing.assert_allclose(losses, right['losses'], rtol=1e-4)
    np.testing.assert_allclose(norms, right['gradient_norms'], rtol=1e-4)


def write_adapter(directory, golden):
    """The adapters that PyTorch began with, as PEFT would have written them."""
    block = dict(inputs=576, q_proj=576, v_proj=192)
    rank = golden['config']['r']
    modules = [f'layers.{i}.self_attn.{n}_proj' for i in range(30) for n in 'qv']
    names = sorted(f'base_model.model.model.{module}.lora_A.weight' for module in modules)
    tensors = {}
    for i, name in enumerate(names):
        drawn = np.random.default_rng([7, i]).standard_normal([rank, block['inputs']])
        outputs = block[name.split('.')[-3]]
        tensors[name] = (drawn * 0.02).astype(np.float32)
        tensors[name.replace('lora_A', 'lora_B')] = np.zeros((outputs, rank), np.float32)
    directory.mkdir()
    save_file(tensors, directory / peft.WEIGHTS)
    said = {'peft_type': 'LORA', **golden['config']}
    (directory / peft.CONFIG).write_text(json.dumps(said))


@pytest.mark.slow
def test_twenty_steps_of_adapters_equal_those_of_peft(golden, rows, smollm2_gguf, tmp_path):
    right, directory = golden['lora'], tmp_path / 'adapter'
    write_adapter(directory, right)
    pretrained = open_pretrained(str(smollm2_gguf))
    lora = peft.describe(directory) | {'path': str(directory)}
    values = values_of(pretrained)['model'] | {'lora': lora}
    config = TransformerConfig.model_validate(values)

    def params_of(parts):
        axes = {path: axes for path, axes in parts.axes.items() if path not in parts.adapters}
        params = load_params(pretrained, config, axes, parts.shapes)
        return params | load_adapters(config, parts.axes, parts.shapes)

    losses, norms = train(config, params_of, right['learning_rate'], rows)
    np.testing.assert_allclose(losses, right['losses'], rtol=1e-4)
    np.testing.assert_allclose(norms, right['gradient_norms'], rtol=1e-4)
