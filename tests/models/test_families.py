"""Every family against transformers: outputs, gradients, training, generation and export."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxfm import sharding, state
from jaxfm.models import TransformerConfig
from jaxfm.models.families import FAMILIES
from jaxfm.models.families.base import blocks_of, read_config, write_config
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.ops.logprobs import logits
from jaxfm.optim import AdamWConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.pretrained import ExportConfig
from jaxfm.pretrained.huggingface.export import Exporter
from jaxfm.pretrained.load import load_params
from jaxfm.pretrained.locate import open_pretrained, values_of
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.complete import complete
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Request
from tests.models import goldens

pytestmark = pytest.mark.usefixtures('quick_compilation')
STEPS = 3


@dataclasses.dataclass
class Model:
    """A golden, loaded as a run loads it."""

    golden: goldens.Golden

    def __post_init__(self):
        self.pretrained = open_pretrained(str(self.golden.path))
        self.config = TransformerConfig.model_validate(values_of(self.pretrained)['model'])
        self.parts = state.split(self.make)

    def make(self, key):
        return Transformer(self.config, nnx.Rngs(key))

    @functools.cached_property
    def params(self):
        shapes = self.parts.shapes
        return load_params(self.pretrained, self.config, self.parts.axes, shapes)

    @functools.cached_property
    def exporter(self):
        return exporter_of(self)

    def tensors(self, params) -> dict[str, np.ndarray]:
        """{name in the file: array}."""
        return {name: self.exporter.tensor(params, name) for name in self.pretrained.tensors.shapes}

    @functools.cached_property
    def _forward(self):
        def forward(params, tokens, positions, segment_ids):
            model = self.parts.merge(params)
            hidden, _ = model(tokens, positions, segment_ids)
            return logits(hidden, model.unembed())[..., : self.config.vocab_size]

        return jax.jit(forward)

    def logits(self, tokens, positions, segment_ids):
        return np.asarray(self._forward(self.params, tokens, positions, segment_ids))


def exporter_of(model, **config):
    def save(directory):
        (directory / 'tokenizer_config.json').write_text('{}')

    tokenizer = SimpleNamespace(bos_id=1, eos_id=2, save=save)
    parts = model.parts
    return Exporter(
        ExportConfig(**config), model.config, parts.axes, parts.shapes, tokenizer, frozenset([2])
    )


@pytest.fixture(scope='module', params=goldens.FAMILIES)
def model(request) -> Model:
    return Model(goldens.Golden(request.param))


def batch_of(arrays, step):
    mask = arrays['attention_mask'][step]
    positions = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape)
    return {
        'tokens': arrays['inputs'][step].astype(np.int32),
        'targets': arrays['targets'][step].astype(np.int32),
        'positions': positions,
        'segment_ids': mask.astype(np.int32),
        'loss_mask': arrays['loss_mask'][step].astype(np.float32),
    }


def assert_close(result, expected, name=''):
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4, err_msg=name)


def test_logits_equal_those_of_transformers(model):
    arrays = model.golden.arrays
    batch = batch_of(arrays, 0)
    mask = batch['segment_ids'] > 0
    result = model.logits(batch['tokens'], batch['positions'], batch['segment_ids'])
    assert_close(result[mask], arrays['logits'][mask])
    assert np.std(result[mask]) > 1  # small logits would hide a mistake


def test_padding_on_the_left_changes_nothing(model):
    arrays = model.golden.arrays
    mask = arrays['left_attention_mask']
    result = model.logits(
        arrays['left_inputs'].astype(np.int32),
        arrays['left_positions'].astype(np.int32),
        mask.astype(np.int32),
    )
    assert_close(result[mask > 0], arrays['left_logits'][mask > 0])


def optimizer_of(model) -> AdamW:
    said = model.golden.about['optimizer']
    b1, b2 = said['betas']
    config = AdamWConfig(
        learning_rate=said['lr'],
        schedule='constant',
        weight_decay=said['weight_decay_of_matrices'],
        b1=b1,
        b2=b2,
        eps=said['eps'],
        clip_norm=0.0,
    )
    return AdamW(config, STEPS, model.parts.axes)


def test_gradients_and_three_steps_of_adamw_equal_those_of_torch(model):
    rule = optimizer_of(model)
    step = state.make_train_step(model.parts, NextToken(NextTokenConfig()), rule)
    # Copies, for a step takes over what it gets; by numpy, for a copy by jax is a program a shape.
    params = jax.tree.map(lambda x: jax.device_put(np.array(x)), model.params)
    current = state.begin_phase(params, model.parts, rule, seed=0)
    for number in range(STEPS):
        current, metrics = step(current, batch_of(model.golden.arrays, number))
        assert_close(metrics['loss'], model.golden.arrays['losses'][number])
        if number == 0:  # then the first moments are proportional to the gradient
            moments = jax.device_get(current.opt_state[0].mu)
            share = functools.partial(np.multiply, np.float32(1 / (1 - rule.config.b1)))
            assert_gradients(model, jax.tree.map(share, moments))
    found, before = model.tensors(current.params), model.tensors(model.params)
    for name, right in model.golden.parameters('after').items():
        assert_close(found[name], right, name)
        assert np.abs(right - before[name]).max() > 5e-3, name


def assert_gradients(model, gradient):
    expected = model.golden.parameters('gradient')
    found = model.tensors(gradient)
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert_close(found[name], right, name)
        assert np.abs(right).max() > 1e-4, name


def test_greedy_generation_is_identical_and_has_the_logprobs_of_the_trainer(model):
    greedy = model.golden.about['greedy']
    loaded = model.params  # not on the mesh
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.device_put(loaded, state.stored_shardings(model.parts))
        config = SamplingConfig(slots=2, max_length=48, decode_steps=4)
        sampler = Sampler(model.parts.merge, model.config, config, mesh)
        requests = [
            Request(str(i), prompt, max_tokens=16, temperature=0.0)
            for i, prompt in enumerate(greedy['prompts'])
        ]
        completions = complete(sampler, requests, params, 0)
    answers = [completions[request.id][0] for request in requests]
    whole, segment_ids = np.zeros((2, 2, 35), np.int32)
    for i, (prompt, right) in enumerate(zip(greedy['prompts'], greedy['outputs'], strict=True)):
        assert answers[i].tokens == right
        whole[i, : len(prompt) + 16], segment_ids[i, : len(prompt) + 16] = prompt + right, 1
    positions = np.broadcast_to(np.arange(35, dtype=np.int32), whole.shape)
    logprobs = jax.nn.log_softmax(model.logits(whole, positions, segment_ids))
    for i, (prompt, right) in enumerate(zip(greedy['prompts'], greedy['outputs'], strict=True)):
        expected = logprobs[i, np.arange(16) + len(prompt) - 1, right]
        np.testing.assert_allclose(answers[i].logprobs, expected, rtol=0, atol=1e-4)


def test_a_packed_row_equals_its_documents_alone(model):
    tokens = np.repeat(model.golden.arrays['inputs'][0][:1].astype(np.int32), 2, axis=0)
    positions = np.concatenate([np.arange(9), np.arange(15)]).astype(np.int32)
    positions = np.stack([positions, positions])
    packed = model.logits(tokens, positions, np.repeat([[1, 2]] * 2, [9, 15], axis=1))
    # Row 0 has only the first document, row 1 only the second.
    alone = model.logits(tokens, positions, np.repeat([[1, 0], [0, 1]], [9, 15], axis=1))
    np.testing.assert_allclose(packed[0, :9], alone[0, :9], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[1, 9:], alone[1, 9:], rtol=1e-4, atol=1e-4)


def test_import_then_export_is_bit_equal(model, tmp_path):
    model.exporter.write(model.params, tmp_path / 'out')
    before = load_file(model.golden.path / 'model.safetensors')
    after = load_file(tmp_path / 'out' / 'model.safetensors')
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        np.testing.assert_array_equal(after[name], value, name)


def test_old_new_and_written_config_layouts_agree(model):
    hf = json.loads((model.golden.path / 'config.json').read_text())
    old = json.loads((model.golden.path / 'config_v4.json').read_text())
    assert read_config(old) == read_config(hf)
    again = read_config(write_config(model.config))
    assert TransformerConfig.model_validate(again) == model.config


def test_written_values_have_the_types_that_transformers_expects(model):
    """It refuses 11.0 for an integer value."""
    hf = json.loads((model.golden.path / 'config.json').read_text())
    written = json.loads(json.dumps(write_config(model.config)))
    for name in hf.keys() & written.keys():
        assert type(written[name]) is type(hf[name]) or None in (written[name], hf[name]), name


@pytest.mark.parametrize(
    'changes, with_window',
    [
        ({}, [3, 7]),
        (dict(no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 1]), [1, 4]),
        (dict(no_rope_layer_interval=3), [2, 5]),
        (dict(use_sliding_window=False), []),
        (dict(sliding_window=None), []),
        (dict(layer_types=['sliding_attention'] * 2 + ['full_attention'] * 6), [0, 1]),
    ],
    ids=str,
)
def test_smollm3_has_windows_in_the_layers_without_rope(changes, with_window):
    hf = json.loads((goldens.Golden('smollm3').path / 'config.json').read_text())
    hf = {key: value for key, value in hf.items() if key not in ('layer_types', 'no_rope_layers')}
    hf |= dict(num_hidden_layers=8, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    model = TransformerConfig.model_validate(read_config(hf | changes))
    windows = [block.window for block in blocks_of(model)]
    assert windows == [16 if layer in with_window else 0 for layer in range(8)]


@pytest.mark.parametrize(
    'changes, with_window',
    [
        ({}, [0, 1, 2, 3, 4, 6]),  # released configs of Gemma 3 do not all say the period
        (dict(sliding_window_pattern=3), [0, 1, 3, 4, 6]),
    ],
    ids=str,
)
def test_every_sixth_layer_of_gemma3_sees_everything(changes, with_window):
    hf = json.loads((goldens.Golden('gemma3').path / 'config_v4.json').read_text())
    hf = {key: value for key, value in hf.items() if 'pattern' not in key and key != 'layer_types'}
    model = TransformerConfig.model_validate(read_config(hf | dict(num_hidden_layers=7) | changes))
    windows = [bool(block.window) for block in blocks_of(model)]
    assert windows == [layer in with_window for layer in range(7)]


def test_every_family_has_a_golden():
    types = {
        json.loads((goldens.Golden(n).path / 'config.json').read_text())['model_type']
        for n in goldens.FAMILIES
    }
    assert types == FAMILIES.keys()
