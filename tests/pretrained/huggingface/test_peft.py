"""PEFT adapters: what they compute, bit-exact import and export, and the ones we refuse."""

import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxfm import state
from jaxfm.config.load import load_config
from jaxfm.errors import ConfigError, DataError, MissingInputError
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.ops.logprobs import logits, token_logprobs
from jaxfm.pretrained import ExportConfig
from jaxfm.pretrained.huggingface import peft
from jaxfm.pretrained.huggingface.adapters import AdapterExporter, load_adapters
from jaxfm.pretrained.load import load_params
from jaxfm.pretrained.locate import open_pretrained, values_of
from tests.hf_directories import DEEP
from tests.models import goldens

pytestmark = pytest.mark.usefixtures('quick_compilation')

TARGETS = {
    'llama3_lora': ['attention/q', 'attention/v'],
    'gemma2_lora': [
        *('attention/q', 'attention/k', 'attention/v', 'attention/out'),
        *('mlp/gate_up', 'mlp/down'),
    ],
    'phi3_lora': ['attention/q', 'attention/k', 'attention/v', 'mlp/gate_up'],
}
SCALES = {'llama3_lora': 8 / 4, 'gemma2_lora': 5 / 3, 'phi3_lora': 3 / 2**0.5}


class Model:
    """A tiny model with an adapter written by PEFT."""

    def __init__(self, name, directory=None):
        self.golden = goldens.Golden(name)
        self.base = goldens.Golden(self.golden.about['base'])
        self.directory = directory or self.golden.path
        pretrained = open_pretrained(str(self.base.path))
        lora = peft.describe(self.directory) | {'path': str(self.directory)}
        values = values_of(pretrained)['model'] | {'lora': lora}
        self.config = TransformerConfig.model_validate(values)
        self.parts = state.split(lambda key: Transformer(self.config, nnx.Rngs(key)))
        axes = {n: x for n, x in self.parts.axes.items() if n not in self.parts.adapters}
        self.weights = load_params(pretrained, self.config, axes, self.parts.shapes)

    @functools.cached_property
    def adapters(self):
        return load_adapters(self.config, self.parts.axes, self.parts.shapes)

    def logits(self, adapters):
        """The logits of the base golden's tokens."""
        tokens, mask = (self.base.arrays[name][0] for name in ('inputs', 'attention_mask'))
        positions = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape)

        @jax.jit
        def forward(params):
            merged = self.parts.merge(params)
            hidden, _ = merged(tokens.astype(np.int32), positions, mask.astype(np.int32))
            return logits(hidden, merged.unembed())[..., : self.config.vocab_size]

        return np.asarray(forward(self.weights | adapters))[mask > 0]

    def export(self, adapters, directory):
        """Writes adapters as a run writes them."""
        tokenizer = SimpleNamespace(bos_id=1, eos_id=2, save=lambda directory: None)
        config, parts = ExportConfig(adapters='peft'), self.parts
        rest = (self.config, parts.axes, parts.shapes, tokenizer, frozenset([2]))
        exporter = AdapterExporter(config, *rest, base='some/model')
        exporter.write(self.weights | adapters, directory)
        size = sum(x.nbytes for x in adapters.values())
        assert exporter.num_bytes == size
        return load_file(directory / peft.WEIGHTS)


@pytest.fixture(scope='module', params=TARGETS)
def model(request) -> Model:
    return Model(request.param)


@pytest.fixture(scope='module')
def phi3() -> Model:
    return Model('phi3_lora')


def test_rank_alpha_and_targets_are_read_from_the_files(model):
    lora = model.config.lora
    assert lora.targets == TARGETS[model.golden.name]
    assert lora.rank == json.loads((model.directory / peft.CONFIG).read_text())['r']
    assert lora.scale == pytest.approx(SCALES[model.golden.name])


def test_logits_and_gradients_of_adapters_equal_those_of_peft(model):
    base, golden = model.base.arrays, model.golden.arrays
    tokens, targets = (base[name][0].astype(np.int32) for name in ('inputs', 'targets'))
    mask, counted = base['attention_mask'][0], base['loss_mask'][0]
    positions = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape)

    def loss(adapters):
        merged = model.parts.merge(model.weights | adapters)
        hidden, _ = merged(tokens, positions, mask.astype(np.int32))
        unembedding = merged.unembed()
        logprobs, _ = token_logprobs(hidden, unembedding, targets)
        values = logits(hidden, unembedding)[..., : model.config.vocab_size]
        return -jnp.sum(logprobs * counted) / jnp.sum(counted), values

    (value, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.adapters)
    np.testing.assert_allclose(value, golden['losses'][0], rtol=1e-5)
    real = mask > 0
    np.testing.assert_allclose(found[real], golden['logits'][real], rtol=1e-4, atol=1e-4)
    if model.golden.name == 'phi3_lora':
        return  # its pairs of matrices are shared by several of ours
    expected = model.golden.parameters('gradient')
    for path, value in _by_name(model, gradients).items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-4, err_msg=path)


def _by_name(model, adapters):
    """Our arrays, with the names and layout of the files."""
    modules = {
        'attention/q': 'self_attn.q_proj',
        'attention/k': 'self_attn.k_proj',
        'attention/v': 'self_attn.v_proj',
        'attention/out': 'self_attn.o_proj',
        'mlp/down': 'mlp.down_proj',
    }
    found, layer = {}, 0
    for number, segment in enumerate(model.config.trunk):
        for repeat in range(segment.repeats):
            for place in range(len(segment.pattern)):
                prefix = f'base_model.model.model.layers.{layer}'
                for target in model.config.lora.targets:
                    path = f'trunk/{number}/{place}/{target}'
                    a, b = (np.asarray(adapters[f'{path}_lora/{x}'][repeat]) for x in 'ab')
                    r = a.shape[-1]
                    if target == 'mlp/gate_up':
                        for way, module in enumerate(('gate_proj', 'up_proj')):
                            found[f'{prefix}.mlp.{module}.lora_A.weight'] = a[:, way].T
                            found[f'{prefix}.mlp.{module}.lora_B.weight'] = b[way].T
                    else:
                        found[f'{prefix}.{modules[target]}.lora_A.weight'] = a.reshape(-1, r).T
                        found[f'{prefix}.{modules[target]}.lora_B.weight'] = b.reshape(r, -1).T
                layer += 1
    return found


def test_import_then_export_of_an_adapter_is_bit_equal(model, tmp_path):
    written = model.export(model.adapters, tmp_path / 'out')
    original = load_file(model.directory / peft.WEIGHTS)
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert written[name].dtype == value.dtype and written[name].tobytes() == value.tobytes()
    config = json.loads((tmp_path / 'out' / peft.CONFIG).read_text())
    before = json.loads((model.directory / peft.CONFIG).read_text())
    for key in ('peft_type', 'task_type', 'r', 'target_modules', 'rank_pattern', 'bias'):
        assert config[key] == before[key], key
    assert config['lora_alpha'] / config['r'] == pytest.approx(SCALES[model.golden.name])
    assert config['base_model_name_or_path'] == 'some/model' and not config['use_rslora']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [peft.CONFIG, peft.WEIGHTS]
    again = Model(model.golden.name, tmp_path / 'out')
    assert again.config.lora.scale == pytest.approx(model.config.lora.scale)
    for path, value in model.adapters.items():
        np.testing.assert_array_equal(again.adapters[path], value, path)


def deltas(tensors, config):
    """scale B A of every module, computed as in PEFT, whose patterns match the end of a name."""
    found = {}
    for name, a in tensors.items():
        if '.lora_A.' in name:
            module = name.removeprefix('base_model.model.').removesuffix('.lora_A.weight')
            last = module.rpartition('.')[2]
            rank = config['rank_pattern'].get(last, config['r'])
            alpha = config['alpha_pattern'].get(last, config['lora_alpha'])
            assert a.shape[0] == rank
            found[module] = alpha / rank * tensors[name.replace('lora_A', 'lora_B')] @ a
    return found


@pytest.mark.parametrize('targets', [None, ['attention/q', 'attention/v', 'mlp/down']], ids=str)
def test_a_trained_fused_module_has_its_parts_as_blocks(phi3, targets, tmp_path):
    config = phi3.config
    if targets:
        lora = config.lora.model_copy(update={'targets': targets})
        config = config.model_copy(update={'lora': lora})
    trained = object.__new__(Model)
    trained.config, trained.weights = config, phi3.weights
    trained.parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
    random = np.random.default_rng(0)
    adapters = {
        path: jnp.asarray(random.normal(0, 0.1, trained.parts.shapes[path].shape), jnp.float32)
        for path in trained.parts.adapters
    }
    trained.base, directory = phi3.base, tmp_path / 'out'
    trained.export(adapters, directory)
    written = json.loads((directory / peft.CONFIG).read_text())
    found = deltas(load_file(directory / peft.WEIGHTS), written)
    rank = config.lora.rank
    assert written['r'] == (2 if targets else 3) * rank
    fewer = {'down_proj': rank} if targets else {'gate_up_proj': 2 * rank}
    assert written['rank_pattern'] == fewer
    block = config.block
    sizes = {
        'attention/q': block.num_heads * block.head_dim,
        'attention/k': block.num_kv_heads * block.head_dim,
        'attention/v': block.num_kv_heads * block.head_dim,
    }
    for layer in range(config.num_layers):
        rows = []
        for target, size in sizes.items():
            if target not in config.lora.matrices:
                rows.append(np.zeros((size, config.embed_dim), np.float32))
                continue
            a, b = (adapters[f'trunk/0/0/{target}_lora/{half}'][layer] for half in 'ab')
            rows.append(config.lora.scale * np.einsum('dr,rnh->nhd', a, b).reshape(size, -1))
        result = found[f'model.layers.{layer}.self_attn.qkv_proj']
        np.testing.assert_allclose(result, np.concatenate(rows), rtol=1e-5, atol=1e-5)
    again = Model('phi3_lora', directory)
    assert again.config.lora.rank == written['r']
    expected = trained.logits(adapters)
    np.testing.assert_allclose(again.logits(again.adapters), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - phi3.logits(phi3.adapters)).max() > 0.1


def test_modules_of_several_ranks_and_scales_compute_as_in_peft(directory):
    path = directory / peft.CONFIG
    patterns = {
        'rank_pattern': {'^model.layers.0.self_attn.q_proj': 2, 'q_proj': 3, 'other': 9},
        'alpha_pattern': {'1.self_attn.v_proj': 5, 'v_proj': 16.0},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | patterns))
    random = np.random.default_rng(0)
    spoil(directory, lambda tensors: tensors.update(_of_ranks(tensors, patterns, random)))
    model = Model('llama3_lora', directory)
    lora = model.config.lora
    assert (lora.rank, lora.scale) == (4, 2)
    tensors = load_file(directory / peft.WEIGHTS)
    for layer in range(model.config.num_layers):
        for target, name in (('q', 'q_proj'), ('v', 'v_proj')):
            module = f'model.layers.{layer}.self_attn.{name}'
            a, b = (tensors[f'base_model.model.{module}.lora_{half}.weight'] for half in 'AB')
            rank = 4 if target == 'v' else 2 if layer == 0 else 3
            alpha = 8 if target == 'q' else 5 if layer == 1 else 16
            assert a.shape[0] == rank
            ours = [_layer_of(model, f'attention/{target}_lora/{half}', layer) for half in 'ab']
            found = lora.scale * np.einsum('dr,rnh->nhd', *ours).reshape(len(b), -1)
            np.testing.assert_allclose(found, alpha / rank * b @ a, rtol=1e-5, atol=1e-5)


def _of_ranks(tensors, patterns, random):
    """Random tensors in which the queries have other ranks."""
    found = {}
    for name, value in tensors.items():
        rank = 4 if '.v_proj.' in name else 2 if '.0.' in name else 3
        shape = (rank, value.shape[1]) if '.lora_A.' in name else (len(value), rank)
        found[name] = random.normal(size=shape).astype(np.float32)
    return found


def _layer_of(model, name, layer):
    found = layer
    for number, segment in enumerate(model.config.trunk):
        size = len(segment.pattern)
        if found < size * segment.repeats:
            path = f'trunk/{number}/{found % size}/{name}'
            return np.asarray(model.adapters[path][found // size])
        found -= size * segment.repeats


# Configs with an adapter


@pytest.fixture
def load(tmp_path):
    """(overrides) -> a config that starts from the tiny llama3."""
    file = tmp_path / 'config.py'
    file.write_text(
        "def get_config():\n    return dict(steps=1, data=dict(name='python_stdlib', "
        "sequence_length=8, batch_size=8), tokenizer=dict(name='bytes'), "
        "optimizer=dict(name='adamw', learning_rate=1e-3), "
        f'init_from={str(goldens.DIRECTORY / "llama3")!r})\n'
    )

    def load(*overrides):
        return load_config(str(file), [*overrides, 'model.vocab_size=300'])

    return load


def test_a_config_takes_rank_alpha_and_targets_from_an_adapter(load):
    path = goldens.DIRECTORY / 'llama3_lora'
    lora = load(f'model.lora.path={path}').model.lora
    assert (lora.rank, lora.alpha, lora.targets) == (4, 8.0, ['attention/q', 'attention/v'])
    with pytest.raises(ConfigError, match='lora.rank is 3, but the adapter in .* has 4'):
        load(f'model.lora.path={path}', 'model.lora.rank=3')
    with pytest.raises(MissingInputError, match='config.model.lora.path: .*adapter_config.json'):
        load(f'model.lora.path={path.parent}')


def test_an_adapter_needs_a_model_and_a_peft_export_needs_adapters(load):
    with pytest.raises(ConfigError, match='export.adapters is peft, but the model has no adapters'):
        load('export.adapters=peft')
    path = goldens.DIRECTORY / 'llama3_lora'
    model = "model={'vocab_size': 300, 'embed_dim': 8, 'num_layers': 1, 'block': "
    model += "{'num_heads': 1, 'num_kv_heads': 1, 'head_dim': 8, 'mlp_dim': 8}}"
    with pytest.raises(ConfigError, match='init_from must name'):
        load('init_from=', model, f'model.lora.path={path}')


# Adapters that are refused


@pytest.fixture
def directory(tmp_path):
    """A copy of the tiny llama3's adapter, for tests to damage."""
    return shutil.copytree(goldens.DIRECTORY / 'llama3_lora', tmp_path / 'adapter')


def spoil(directory, change):
    tensors = load_file(directory / peft.WEIGHTS)
    change(tensors)
    save_file(tensors, directory / peft.WEIGHTS)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(peft_type='IA3'), "peft_type 'IA3' is not supported, only LORA"),
        (dict(use_dora=True), 'use_dora True is not supported'),
        (dict(rank_pattern={'q_proj': 4, '.*v_proj': 4}), r"rank_pattern '\.\*v_proj': 4 is not"),
        (dict(rank_pattern={'q_proj': 4.0}), "rank_pattern 'q_proj': 4.0 is not supported"),
        (dict(rank_pattern=['q_proj']), r"rank_pattern must be an object, got \['q_proj'\]"),
        (dict(alpha_pattern={'v_proj': 0}), "alpha_pattern 'v_proj': 0 is not supported"),
        (dict(alpha_pattern={'q|v': 2}), "alpha_pattern 'q|v': 2 is not supported"),
        (dict(r=3), r'does not match adapter_config.json: .*A.weight is \[4, 32\], .* should be 3'),
        (dict(r=10**12), r'lora_A.weight is \[4, 32\], but its rank should be 1000000000000'),
        (dict(rank_pattern={'q_proj': 2}), r'q_proj.lora_A.weight is \[4, 32\], .* be 2'),
        (dict(modules_to_save=['lm_head']), r"modules_to_save \['lm_head'\]"),
        (dict(bias='all'), "bias 'all'"),
        (dict(layers_to_transform=[0], use_dora=True), r'layers_to_transform \[0\], use_dora True'),
        (dict(init_lora_weights='pissa'), "init_lora_weights 'pissa'"),
        (dict(r=0), 'r must be a whole number of at least 1, got 0'),
        (dict(r='4'), "r must be a whole number of at least 1, got '4'"),
        (dict(lora_alpha=None), 'lora_alpha must be a number above 0, got None'),
    ],
    ids=str,
)
def test_unsupported_values_in_a_peft_config_are_refused(directory, change, message):
    path = directory / peft.CONFIG
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | change))
    with pytest.raises(DataError, match=message):
        peft.describe(directory)


def test_missing_or_damaged_files_are_named(directory):
    weights = directory / peft.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=peft.WEIGHTS):
        peft.describe(directory)
    weights.rename(directory / 'adapter_model.bin')
    with pytest.raises(DataError, match='adapter_model.bin, which is never loaded'):
        peft.describe(directory)
    (directory / 'adapter_model.bin').unlink()
    with pytest.raises(MissingInputError, match=peft.WEIGHTS):
        peft.describe(directory)
    weights.write_bytes(whole)
    (directory / peft.CONFIG).write_text('{')
    with pytest.raises(DataError, match='adapter_config.json'):
        peft.describe(directory)
    (directory / peft.CONFIG).write_text(DEEP)
    with pytest.raises(DataError, match='adapter_config.json is damaged: .*recursion'):
        peft.describe(directory)
    with pytest.raises(MissingInputError, match='cannot be read: File name too long'):
        peft.describe('a' * 300)


Q = 'base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight'


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda t: t.update(x=t[Q.format(0, 'A')]), 'adapters of x are not supported'),
        (
            lambda t: t.update({'base_model.model.lm_head.lora_A.weight': t[Q.format(0, 'A')]}),
            'adapters of base_model.model.lm_head.lora_A.weight',
        ),
        (
            lambda t: t.update(
                {Q.format(0, 'A').replace('self_attn.q', 'mlp.up'): t[Q.format(0, 'A')]}
            ),
            'gate_proj and up_proj',
        ),
        (lambda t: t.clear(), 'no adapters'),
        (
            lambda t: t.update({Q.format(1, 'A'): ones(2, 32)}),
            r'is \[2, 32\], but .* be 4',
        ),
        (lambda t: t.update({Q.format(1, 'A'): ones()}), r'lora_A.weight is \[\], but .* be 4'),
        (lambda t: t.update({Q.format(1, 'B'): ones(32)}), r'lora_B.weight is \[32\], but .* be 4'),
    ],
)
def test_adapters_of_unsupported_modules_are_refused(directory, change, message):
    spoil(directory, change)
    with pytest.raises(DataError, match=message):
        peft.describe(directory)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda t: t.pop(Q.format(1, 'B')), r'missing: .*layers\.1\.self_attn\.q_proj\.lora_B'),
        (lambda t: t.update({Q.format(9, 'A'): ones(4, 32)}), r'unexpected: .*\.9\.'),
        (lambda t: t.update({Q.format(0, 'B'): ones(3, 4)}), 'wrong shape: .*lora_B'),
        (lambda t: t.update({Q.format(1, 'A'): ones(4, 31)}), r'wrong shape: .*lora_A.*\[4, 31\]'),
        (
            lambda t: [t.pop(name) for name in list(t) if '.lora_A.' in name],
            r'missing: .*layers\.1\.self_attn\.q_proj\.lora_A',
        ),
        (lambda t: t[Q.format(0, 'B')].fill(np.nan), 'not finite: trunk/0/0/attention/q_lora/b'),
    ],
)
def test_adapters_of_another_model_are_refused_with_the_names(directory, change, message):
    spoil(directory, change)
    model = Model('llama3_lora', directory)
    with pytest.raises(DataError, match=message):
        load_adapters(model.config, model.parts.axes, model.parts.shapes)
