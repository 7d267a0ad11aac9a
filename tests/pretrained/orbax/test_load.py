"""Weights that stock Orbax saved, in every format, under our names or others', on any mesh."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import main, sharding, state
from jaxfm.config.inherit import write_inherited
from jaxfm.config.load import load_config, write_config
from jaxfm.errors import ConfigError, DataError
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.pretrained.orbax.directory import find_tree
from jaxfm.pretrained.orbax.load import Foreign
from tests import doc_examples
from tests.orbax_trees import BY_LAYER, FORMATS, MODEL, as_state, by_layer, nest
from tests.pretrained.loading import Counted
from tests.runs import measured

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compilation_cache_as_before')

MESHES = {'one': {}, 'fsdp': dict(fsdp=8), 'all': dict(replica=2, fsdp=2, tensor=2)}
LOCAL = '[local, global] x 2'
SEGMENTS = {
    LOCAL: [
        dict(pattern=[dict(MODEL['block'], window=8), MODEL['block']], repeats=2),
        dict(pattern=[MODEL['block']], repeats=1),
    ]
}


def parts_of(**changes):
    config = TransformerConfig.model_validate(MODEL | changes)
    return config, state.split(lambda key: Transformer(config, nnx.Rngs(key)))


def load(name, names=None, ignored=(), mesh=None, **changes):
    """{path: array}, loaded as a run does it."""
    config, parts = parts_of(**changes)
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | (mesh or {})
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(sharding.make_mesh(sizes, devices)):
        foreign = Foreign(find_tree(name), names or {}, ignored)
        foreign._tensors = counted = CountedParts(foreign._tensors)
        params = foreign.load(config, parts.axes, parts.shapes)
        places = state.stored_shardings(parts)
    assert {path: value.sharding for path, value in params.items()} == places
    assert counted.elements == sum(np.prod(counted.shapes[name]) for name in counted.largest)
    return params


class CountedParts(Counted):
    """Tensors of Orbax's that count what is read: each element once, whatever the mesh."""

    def read(self, name, index=(), order=None):
        value = self._tensors.read(name, index, order)
        self.elements += value.size
        self.largest[name] = max(self.largest.get(name, 0), value.size)
        return value

    def check_chunks(self, names):
        self._tensors.check_chunks(names)


def random_params(**changes) -> dict[str, np.ndarray]:
    """{path: array}; padding rows of the vocabulary are zeros."""
    config, parts = parts_of(**changes)
    draw = np.random.default_rng(0)
    params = {}
    for path, leaf in parts.shapes.items():
        params[path] = draw.standard_normal(leaf.shape).astype(np.float32)
        if 'vocab' in parts.axes[path]:
            params[path][config.vocab_size :] = 0
    return params


@pytest.fixture(scope='module')
def params():
    return random_params()


@pytest.fixture(scope='module')
def saved(params, tmp_path_factory):
    """{format: what init_from may name}, of our own names in a train state."""
    root = tmp_path_factory.mktemp('own')
    tree = as_state(nest({path: jnp.asarray(value) for path, value in params.items()}))
    return {name: save(root / name, tree) for name, save in FORMATS.items()}


@pytest.fixture(scope='module')
def foreign(params, tmp_path_factory):
    """A checkpoint of another stack, as BY_LAYER describes it."""
    return FORMATS['zarr'](tmp_path_factory.mktemp('foreign') / 'checkpoint', by_layer(params))


def assert_equal(loaded, params):
    assert loaded.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(loaded[path], value, path)


@pytest.mark.parametrize('kind', FORMATS)
def test_weights_under_our_names_are_loaded_from_every_format(kind, saved, params):
    assert_equal(load(saved[kind]), params)


@pytest.mark.parametrize('mesh', MESHES)
def test_a_table_loads_layers_of_their_own_transposed_and_merged(mesh, foreign, params, caplog):
    caplog.set_level('INFO', 'jaxfm')
    assert_equal(load(foreign, BY_LAYER, mesh=MESHES[mesh]), params)
    assert 'of float32, kept as float32' in caplog.text
    assert (
        'heads and head_dim are stored as one axis: params/decoder/layers_0/k/kernel' in caplog.text
    )
    assert 'left out: opt_state/count, opt_state/mu/params/w, step' in caplog.text


MAXTEXT = 'mine/from_maxtext.py'


def in_maxtexts_layout(params: dict) -> dict:
    """Our parameters, without biases and norms of heads, with layers stacked along axis 1."""
    ours = {name.split('/', 3)[-1]: value for name, value in params.items()}
    gate_up = ours['mlp/gate_up']
    layers = {
        'self_attention/query/kernel': ours['attention/q'],
        'self_attention/key/kernel': ours['attention/k'],
        'self_attention/value/kernel': ours['attention/v'],
        'self_attention/out/kernel': ours['attention/out'],
        'mlp/wi_0/kernel': gate_up[:, :, 0],
        'mlp/wi_1/kernel': gate_up[:, :, 1],
        'mlp/wo/kernel': ours['mlp/down'],
        'pre_self_attention_layer_norm/scale': ours['pre_attention/scale'],
        'post_self_attention_layer_norm/scale': ours['pre_mlp/scale'],
    }
    flat = {f'decoder/layers/{name}': np.moveaxis(one, 0, 1) for name, one in layers.items()}
    flat |= {
        'token_embedder/embedding': params['embedding/table'],
        'decoder/decoder_norm/scale': params['final_norm/scale'],
        'decoder/logits_dense/kernel': params['head/table'].T,
    }
    return as_state({'params': nest({name: jnp.asarray(value) for name, value in flat.items()})})


@pytest.mark.parametrize('mesh', MESHES)
def test_the_documented_table_loads_layers_that_are_stacked_along_the_second_axis(mesh, tmp_path):
    with doc_examples.written(tmp_path):
        path = FORMATS['standard'](tmp_path / 'any', {'params': {'w': jnp.ones(2)}})
        config = load_config(str(tmp_path / MAXTEXT), [f'init_from={path}'])
    plain = dict(block=MODEL['block'] | dict(qk_norm=False, qkv_bias=False), vocab_multiple=4)
    params = random_params(**plain)
    saved = FORMATS['zarr in ocdbt'](tmp_path / 'saved', in_maxtexts_layout(params))
    assert_equal(load(saved, config.init_names, mesh=MESHES[mesh], **plain), params)


@pytest.mark.parametrize('stacked', [False, True])
def test_layers_of_several_segments_are_numbered_through_the_whole_model(stacked, tmp_path):
    """Layers 0 to 3 are local and global in turn, layer 4 is a segment of its own."""
    params = random_params(num_layers=5, segments=SEGMENTS[LOCAL])
    rest = {path: value for path, value in params.items() if not path.endswith('/down')}
    first, second, last = (params[f'trunk/{at}/mlp/down'] for at in ('0/0', '0/1', '1/0'))
    downs = [first[0], second[0], first[1], second[1], last[0]]
    if stacked:
        tree, entry = {'downs': np.stack(downs, 2)}, 'downs [mlp, embed, layers]'
    else:
        tree, entry = {f'down_{i}': down for i, down in enumerate(downs)}, 'down_{layer}'
    path = FORMATS['zarr3'](tmp_path / 'checkpoint', nest(rest) | tree)
    names = {path: path for path in rest} | {'layers/mlp/down': entry}
    assert_equal(load(path, names, num_layers=5, segments=SEGMENTS[LOCAL]), params)


def test_a_prefix_is_left_out_once_and_nnx_values_too(params, tmp_path):
    tree = nest({f'{path}/value': jnp.asarray(value) for path, value in params.items()})
    assert_equal(load(FORMATS['v1'](tmp_path / 'nnx', tree)), params)
    twice = FORMATS['v1'](tmp_path / 'twice', {'params': {'params': nest(params)}})
    with pytest.raises(DataError, match='missing: embedding/table .there is params/embedding/tab'):
        load(twice)
    assert_equal(load(twice, {path: f'params/{path}' for path in params}), params)


def test_weights_are_cast_to_the_dtypes_of_the_parameters(saved, params):
    loaded = load(saved['zarr'], param_dtype='bfloat16')
    assert loaded['head/table'].dtype == jnp.bfloat16  # norms stay in float32
    assert_equal(loaded, {path: params[path].astype(loaded[path].dtype) for path in params})


# What does not fit


@pytest.mark.parametrize(
    'change, words',
    [
        (
            dict(num_layers=2, vocab_size=50),
            [
                r'embedding/table is \[128, 16\], not \[50, 16\] \[vocab, embed\], with model.v',
                r'trunk/0/0/attention/k is \[3, 16, 2, 4\], not \[2, 16, 2, 4\]',
            ],
        ),
        (
            dict(block=MODEL['block'] | dict(qkv_bias=False, post_norm=True)),
            [
                'missing: trunk/0/0/post_attention/scale .there is',
                'unexpected: trunk/0/0/attention/k_bias, trunk/0/0/attention/q_bias',
            ],
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_names_and_shapes(change, words, saved):
    change = dict(vocab_multiple=50) | change if 'vocab_size' in change else change
    with pytest.raises(DataError) as raised:
        load(saved['standard'], **change)
    assert raised.match('standard: the checkpoint does not fit the model')
    for word in words:
        assert raised.match(word)


def changed(**entries):
    return {key: entry for key, entry in (BY_LAYER | entries).items() if entry}


@pytest.mark.parametrize(
    'names, kind, words',
    [
        (
            changed(**{'layers/mlp/down': ''}),
            DataError,
            'not in config.init_names: trunk/0/0/mlp/d',
        ),
        (changed(**{'layers/mlp/gate_up/1': ''}), DataError, 'gate_up has only one half'),
        (
            changed(**{'layers/mlp/down': 'params/decoder/layers_{layer}/w0/kernel'}),
            DataError,
            'missing: params/decoder/layers_0/w0/kernel .there is params/decoder/layers_0/wo/kern',
        ),
        (
            changed(**{'layers/mlp/down': 'params/decoder/layers_{layer}/wo/kernel [embed, mlp]'}),
            DataError,
            r'wo/kernel is \[24, 16\], not \[16, 24\] \[embed, mlp\] for layers/mlp/down',
        ),
        (
            changed(
                **{'layers/mlp/down': 'params/decoder/layers_{layer}/wo/kernel [embed, heads]'}
            ),
            ConfigError,
            r'layers/mlp/down has the axes \[mlp, embed\], in any order, not \[embed, heads\]',
        ),
        (changed(**{'layers/mlp/dawn': 'x'}), ConfigError, 'no parameter layers/mlp/dawn; did you'),
        (changed(**{'head/table': 'x_{layer}'}), ConfigError, 'head/table is not in a layer'),
    ],
)
def test_a_table_that_does_not_fit_is_refused(names, kind, words, foreign):
    with pytest.raises(kind, match=words):
        load(foreign, names)


def test_what_is_no_parameter_must_be_ignored_by_name(params, tmp_path):
    tree = nest(params) | {'rngs': {'count': jnp.arange(3)}}
    path = FORMATS['zarr in ocdbt'](tmp_path / 'more', tree)
    with pytest.raises(DataError, match='unexpected: rngs/count'):
        load(path)
    assert_equal(load(path, ignored=['rngs/*']), params)


def test_quantised_weights_are_refused(params, tmp_path):
    whole = params | {'final_norm/scale': np.ones(16, np.int8)}
    with pytest.raises(DataError, match='not floating point: final_norm/scale is int8'):
        load(FORMATS['zarr'](tmp_path / 'whole', nest(whole)))


# Runs


@pytest.fixture(scope='module')
def theirs(tiny, straight, tmp_path_factory):
    """The weights of a run, saved with stock Orbax."""
    trained = {
        name.removeprefix('trainable/'): value
        for name, value in tiny.saved_state(straight, 40).items()
        if name.startswith('trainable/')
    }
    return FORMATS['steps'](tmp_path_factory.mktemp('theirs') / 'run', {'params': nest(trained)})


def test_a_run_from_foreign_weights_begins_where_the_other_ended(tiny, straight, theirs, tmp_path):
    """And with fresh adapters, which change nothing yet."""
    output = tmp_path / 'scores.jsonl'
    more = [f'--config.init_from={theirs}', '--config.model.lora.rank=2', '--mode=eval']
    assert main.main([*tiny.arguments(tmp_path / 'run', *more), f'--output={output}']) == 0
    scores = json.loads(output.read_text().splitlines()[0])
    expected = measured(straight)[40, 'eval']['eval/heldout/loss']
    assert scores['eval/heldout/loss'] == pytest.approx(expected, rel=1e-6)
    assert not (tmp_path / 'run').exists()


def test_a_begun_run_resumes_after_the_checkpoint_has_gone(tiny, theirs, tmp_path):
    gone = shutil.copytree(theirs, tmp_path / 'gone')
    config = load_config(str(tiny.config), [f'init_from={gone}'])
    assert (config.model.embed_dim, config.tokenizer.name) == (32, 'bytes')
    (tmp_path / 'run').mkdir()
    write_inherited(config, tmp_path / 'run')
    write_config(config, tmp_path / 'run' / 'config.json')
    shutil.rmtree(gone)
    resumed = load_config(str(tiny.config), [f'init_from={gone}'], workdir=tmp_path / 'run')
    assert resumed == config


def test_weights_are_read_from_s3(params, s3, s3_environment, monkeypatch, capsys, tiny, tmp_path):
    saved = {'zarr': 'zarr 2', 'v1': 'zarr 3'}
    for kind in saved:
        FORMATS[kind](tmp_path / kind, by_layer(params))
        s3.put(str(tmp_path / kind), f'bucket/foreign/{kind}', recursive=True)
        assert_equal(load(f's3://bucket/foreign/{kind}', BY_LAYER, mesh=MESHES['all']), params)
    [chunk] = s3.glob('bucket/foreign/zarr/params.params.decoder.norm.scale/0')
    s3.rm(chunk)
    with pytest.raises(DataError, match=r'foreign/zarr lacks chunks of params/decoder/norm/scale'):
        load('s3://bucket/foreign/zarr', BY_LAYER)
    arguments = tiny.arguments(tmp_path / 'run', '--config.init_from=s3://bucket/foreign/v1')
    for name in [name for name in os.environ if name.endswith(('_KEY', '_KEY_ID'))]:
        monkeypatch.delenv(name)
    assert main.main(arguments) == 77
    assert 'no credentials for bucket bucket' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()
