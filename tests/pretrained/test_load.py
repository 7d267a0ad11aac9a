"""Weights stream from the file to their shards: each process reads its own part of each tensor
once, and never holds more than a few tensors."""

import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxfm.pretrained.huggingface.export import write_safetensors
from jaxfm.process import HUGE_PAGES
from tests.distributed.processes import ranks, start
from tests.hf_directories import LLAMA, random_tensors, shapes_of, write_json, write_model
from tests.pretrained.loading import ROOT, Counted, Loading
from tests.runs import PATIENCE

MESHES = {
    'fsdp': dict(fsdp=8),
    'tensor': dict(fsdp=2, tensor=2),
    'replicas': dict(replica=2, fsdp=2, tensor=2),
}
# Vocabulary sizes with which some devices hold a few padding rows, or only padding.
VOCABULARIES = {'some padding': 300, 'shards of padding': 60}

pytestmark = pytest.mark.usefixtures('quick_compilation')


def fused(tensors: dict) -> dict:
    """The same tensors in Phi-3's layout."""
    rest, parts = {}, {}
    places = {'q_proj': 'qkv_proj', 'k_proj': 'qkv_proj', 'v_proj': 'qkv_proj'}
    places |= {'gate_proj': 'gate_up_proj', 'up_proj': 'gate_up_proj'}
    for name, value in tensors.items():
        kind = name.split('.')[-2]
        if kind in places:
            parts.setdefault(name.replace(kind, places[kind]), []).append(value)
        else:
            rest[name] = value
    return rest | {name: np.concatenate(values) for name, values in parts.items()}


@pytest.fixture(scope='module', params=VOCABULARIES)
def vocabulary(request):
    return VOCABULARIES[request.param]


@pytest.fixture(scope='module')
def models(vocabulary, tmp_path_factory):
    """The same weights in two families -> {family: its directory}."""
    directory = tmp_path_factory.mktemp('models')
    tensors = random_tensors(LLAMA | {'vocab_size': vocabulary})
    about = dict(vocab_size=vocabulary, tokenizer=False)
    return {
        'llama': write_model(directory / 'llama', tensors, **about),
        'phi3': write_model(directory / 'phi3', fused(tensors), model_type='phi3', **about),
    }


@pytest.fixture(scope='module')
def whole(models):
    """{path: array} of the model on one device."""
    return jax.device_get(Loading(models['llama']).load())


@pytest.mark.parametrize('family', ['llama', 'phi3'])
@pytest.mark.parametrize('mesh', MESHES)
def test_weights_on_a_mesh_equal_those_on_one_device_and_are_sharded_as_in_a_state(
    mesh, family, models, whole
):
    loading = Loading(models[family], MESHES[mesh])
    loading.pretrained.tensors = Counted(loading.pretrained.tensors)
    params, places = loading.load(), loading.places()
    assert params.keys() == whole.keys() == places.keys()
    for path, value in params.items():
        assert value.sharding == places[path], path
        np.testing.assert_array_equal(value, whole[path], path)
    counted = loading.pretrained.tensors
    assert counted.elements == counted.size  # each element once, also with replicas
    ways = loading.mesh.shape['fsdp'] * loading.mesh.shape['tensor']
    down = 'model.layers.0.mlp.down_proj.weight'
    assert counted.largest[down] == np.prod(counted.shapes[down]) / ways


def test_stacked_layers_equal_those_of_the_file(models, whole, vocabulary):
    tensors = random_tensors(LLAMA | {'vocab_size': vocabulary})
    for layer in range(2):
        prefix = f'model.layers.{layer}.'
        gate, up = (tensors[f'{prefix}mlp.{name}_proj.weight'].T for name in ('gate', 'up'))
        expected = np.stack([gate, up], 1)
        np.testing.assert_array_equal(whole['trunk/0/0/mlp/gate_up'][layer], expected)
        queries = tensors[f'{prefix}self_attn.q_proj.weight'].T.reshape(16, 4, 4)
        np.testing.assert_array_equal(whole['trunk/0/0/attention/q'][layer], queries)
    table = whole['head/table']
    np.testing.assert_array_equal(table[:vocabulary], tensors['lm_head.weight'])
    assert not table[vocabulary:].any() and len(table) % 128 == 0


TWO = """
    import json
    from pathlib import Path
    import jax
    import numpy as np
    from jaxfm.distributed import agree, join
    from jaxfm.tokenizer import BytesConfig
    from jaxfm.tokenizer.build import Bytes
    from jaxfm.pretrained import ExportConfig
    from jaxfm.pretrained.huggingface.export import Exporter
    from tests.pretrained.loading import Counted, Loading
    join.initialize(timeout_seconds=60)
    whole, read = np.load({saved!r}), []
    for axis in ('fsdp', 'tensor'):
        loading = Loading({path!r}, {{axis: 2}})
        counted = loading.pretrained.tensors = Counted(loading.pretrained.tensors)
        params, parts = loading.load(), loading.parts
        for name, value in params.items():
            for shard in value.addressable_shards:
                expected = whole[name.replace('/', '.')][shard.index]
                np.testing.assert_array_equal(shard.data, expected)
        read.append([counted.elements, counted.matrices])
        exporter = Exporter(
            ExportConfig(shard_gigabytes=1e-5),
            *(loading.config, parts.axes, parts.shapes, Bytes(BytesConfig(), ()), {{1}}),
        )
        with jax.set_mesh(loading.mesh):
            exporter.write(params, Path({output!r}) / axis)
    print('read', json.dumps(read), flush=True)
    agree.barrier('end')
"""


def test_each_of_two_processes_reads_its_own_part_and_together_they_write(tmp_path):
    path = write_model(
        tmp_path / 'model',
        random_tensors(LLAMA | {'vocab_size': 60}),
        vocab_size=60,
        tokenizer=False,
    )
    whole, saved = Loading(path).load(), tmp_path / 'whole.npz'
    np.savez(saved, **{name.replace('/', '.'): value for name, value in whole.items()})
    output = tmp_path / 'output'
    program = TWO.format(path=str(path), saved=str(saved), output=str(output))
    devices = dict(JAX_NUM_CPU_DEVICES='1', PYTHONPATH=str(ROOT))
    with start(program, [environment | devices for environment in ranks(2)]) as processes:
        told = [process.communicate(timeout=PATIENCE) for process in processes]
    read = []
    for out, error in told:
        lines = [line for line in out.splitlines() if line.startswith('read ')]
        assert lines, error[-2000:]
        read.append(json.loads(lines[0].removeprefix('read ')))
    vectors = 16 * 5  # norms, which every process reads whole
    matrices = Counted(Loading(path).pretrained.tensors).size - vectors
    tables = 2 * 60 * 16  # on `tensor`, the second of two processes has only padding
    by_fsdp, by_tensor = zip(*read)
    assert by_fsdp == ([matrices // 2 + vectors, matrices // 2],) * 2
    layers = (matrices - tables) // 2
    assert [found for _, found in by_tensor] == [layers + tables, layers]
    before = load_file(path / 'model.safetensors')
    for axis in ('fsdp', 'tensor'):
        files = [load_file(file) for file in (output / axis).glob('*.safetensors')]
        assert len(files) > 1
        after = {name: value for file in files for name, value in file.items()}
        assert after.keys() == before.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, name)


FAILING = """
    import resource
    from pathlib import Path
    from types import SimpleNamespace
    import jax
    from jaxfm.distributed import agree, join
    from jaxfm.tokenizer import BytesConfig
    from jaxfm.tokenizer.build import Bytes
    from jaxfm.errors import RunError
    from jaxfm.pretrained import ExportConfig
    from jaxfm.pretrained.huggingface.export import Exporter
    from tests.pretrained.loading import Loading
    join.initialize(timeout_seconds=60)
    loading = Loading({path!r}, {{'fsdp': 2}})
    params, parts = loading.load(), loading.parts
    about = ExportConfig(shard_gigabytes=1e-5), loading.config, parts.axes, parts.shapes
    good = Bytes(BytesConfig(), ())

    def refuse(directory):
        raise PermissionError(13, 'Denied')

    closed = SimpleNamespace(bos_id=0, eos_id=1, save=refuse)

    def export(name, tokenizer=good, limit=resource.RLIM_INFINITY):
        if agree.is_primary():  # the other one writes nothing and would see no limit
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            Exporter(*about, tokenizer, {{1}}).write(params, Path({output!r}) / name)
        except RunError as error:
            print('met', error.exit_code, error, flush=True)

    with jax.set_mesh(loading.mesh):
        export('file/below')
        export('full', limit=2000)
        export('closed', closed)
        export('good')
    agree.barrier('end')
"""


def test_if_one_of_two_processes_cannot_write_both_report_it(tmp_path):
    path = write_model(
        tmp_path / 'model',
        random_tensors(LLAMA | {'vocab_size': 60}),
        vocab_size=60,
        tokenizer=False,
    )
    output = tmp_path / 'output'
    output.mkdir()
    (output / 'file').write_text('')
    program = FAILING.format(path=str(path), output=str(output))
    devices = dict(JAX_NUM_CPU_DEVICES='1', PYTHONPATH=str(ROOT))
    with start(program, [environment | devices for environment in ranks(2)]) as processes:
        told = [process.communicate(timeout=PATIENCE) for process in processes]
    expected = [
        f'met 74 {output}/file/below: cannot be written: Not a directory',
        f'met 74 {output}/full: cannot be written: File too large',
        f'met 77 {output}/closed: cannot be written: Denied',
    ]
    for out, error in told:
        assert [line for line in out.splitlines() if line.startswith('met')] == expected, error
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(entry.name for entry in output.iterdir()) == ['file', 'good']


# Memory

# How many tensors may be in memory besides this process's weights: the prefetched ones, one after
# them and one being transposed, each as in the file and as in JAX, plus what malloc keeps per
# thread and what compilation keeps. 7.2 were measured.
TENSORS = 10

BIG = LLAMA | {
    'vocab_size': 8192,
    'hidden_size': 1024,
    'intermediate_size': 4096,
    'num_hidden_layers': 10,
    'num_attention_heads': 16,
    'num_key_value_heads': 16,
    'head_dim': 64,
}

MEASURE = """
import json, re, sys, threading, time
import jax
from jaxfm.models import TransformerConfig
from jaxfm.pretrained import pipeline
from tests.pretrained.loading import Loading

def anonymous():
    text = open('/proc/self/status').read()
    return 1024 * int(re.search(r'RssAnon:\\s+(\\d+)', text)[1])

def peak_of(function):
    peak, done = [anonymous()], threading.Event()
    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    function()
    done.set()
    thread.join()
    return peak[0]

Loading(sys.argv[2]).load()  # what JAX itself takes
loading = Loading(sys.argv[1])
values = dict(loading.config) | {'param_dtype': 'bfloat16'}
loading.config = TransformerConfig(**values)
loading.split()
sizes = [leaf.size * leaf.dtype.itemsize for leaf in loading.parts.shapes.values()]

def run():
    jax.block_until_ready(loading.load())

before = anonymous()
streamed = peak_of(run)
pipeline.AHEAD = 10**6
print(json.dumps([before, streamed, peak_of(run), sum(sizes)]))
"""


@pytest.fixture(scope='module')
def big_model(tmp_path_factory):
    """(bytes, directory) of a model of more than 300 MB, written by our own writer."""
    path = tmp_path_factory.mktemp('big')
    shapes = shapes_of(BIG)
    block = np.random.default_rng(0).integers(0, 2**14, 2**24, np.uint16).view(ml_dtypes.bfloat16)
    tensors = (block[: np.prod(shape)].reshape(shape) for shape in shapes.values())
    file = path / 'model.safetensors'
    write_safetensors(file, shapes, np.dtype(ml_dtypes.bfloat16), tensors)
    write_json(path / 'config.json', BIG)
    yield path
    file.unlink()


def test_peak_memory_is_the_local_shards_and_a_few_tensors(big_model, tmp_path):
    small = write_model(tmp_path / 'small', tokenizer=False)
    environment = {'GLIBC_TUNABLES': HUGE_PAGES, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        [sys.executable, '-c', MEASURE, str(big_model), str(small)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, streamed, all_first, shards = json.loads(done.stdout)
    largest = 2 * BIG['vocab_size'] * BIG['hidden_size']
    assert shards > 20 * largest
    assert streamed - before < shards + TENSORS * largest
    assert all_first - before > shards + TENSORS * largest  # else the measurement saw nothing
