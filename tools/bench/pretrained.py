"""Times importing and exporting a Hugging Face model, against copying its file on the same disk.

    python -m tools.bench.pretrained --out tools/bench/results [--model PATH]

A random model with the shape of Llama 3.2 1B in bfloat16 (--layers scales its size) is copied,
imported and exported in turn, --repeats times. Reads come from the page cache; a copy or an export
ends when its bytes are on the disk. With --model (SmolLM2-135M as .gguf or directory), loading that
model is timed as well, in new processes, as in a run. Run it on a quiet machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from jaxfm import sharding, state
from jaxfm.metrics.clock import process_start
from jaxfm.models import TransformerConfig
from jaxfm.models.families.base import find_family, write_config
from jaxfm.models.transformer import Transformer
from jaxfm.pretrained import ExportConfig
from jaxfm.pretrained.huggingface.export import Exporter, write_safetensors
from jaxfm.pretrained.layout import make_layout
from jaxfm.pretrained.load import load_params
from jaxfm.pretrained.locate import open_pretrained, values_of
from tools.bench import machine

PACKAGES = ('jax', 'numpy', 'safetensors', 'gguf')
BARS = {'load_seconds': 5.0, 'copy_speed_ratio': 0.5}
SHAPE = dict(num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192)


def main() -> None:
    arguments = parse()
    if arguments.load_once:
        print(json.dumps(_load_once(arguments.load_once)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.out) as directory:
        record = measure(Path(directory), arguments.layers, arguments.repeats, arguments.model)
    path = arguments.out / f'pretrained-{record["date"]}.json'
    path.write_text(json.dumps(record, indent=1) + '\n', 'utf-8')
    show(record)
    print(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, required=True, help='directory for the results')
    parser.add_argument('--model', type=Path, help='a .gguf file or directory to load')
    parser.add_argument('--layers', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--load_once', type=Path, help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args(argv)


def measure(directory: Path, layers: int, repeats: int, model: Path | None) -> dict:
    """Runs everything; `directory` is for temporary files, on the disk to measure."""
    config = TransformerConfig(
        vocab_size=128256,
        embed_dim=2048,
        num_layers=layers,
        block=SHAPE,
        tie_embeddings=True,
        family='llama',
        param_dtype='bfloat16',
    )
    source = directory / 'source'
    size = _write_random(config, source)
    seconds = {'import': [], 'export': [], 'copy': []}
    target = directory / 'target'
    for _ in range(repeats):
        seconds['copy'].append(_time(_copy, source, target))
        shutil.rmtree(target)
        params, took = _import(source, config)
        seconds['import'].append(took)
        seconds['export'].append(_time(_export, config, params, target))
        del params
        assert (target / 'model.safetensors').stat().st_size >= size
        shutil.rmtree(target)
    both = [sum(pair) for pair in zip(seconds['import'], seconds['export'])]
    record = {**machine.about(PACKAGES), 'bytes': size, 'layers': layers, 'seconds': seconds}
    record['copy_speed_ratio'] = statistics.median(seconds['copy']) / statistics.median(both)
    if model:
        command = [sys.executable, '-m', 'tools.bench.pretrained', '--out=.', '--load_once', model]
        runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(repeats)]
        record['model'] = model.name
        record['loads'] = [json.loads(run.stdout) for run in runs]
        record['load_seconds'] = statistics.median(load['load'] for load in record['loads'])
    return record


def show(record: dict) -> None:
    """Prints the figures, with their bars."""
    gigabytes = record['bytes'] / 1e9
    for name, values in record['seconds'].items():
        median = statistics.median(values)
        print(
            f'{name:8} {median:6.2f} s ({min(values):.2f} .. {max(values):.2f}), '
            f'{gigabytes / median:.2f} GB/s'
        )
    ratio = record['copy_speed_ratio']
    print(
        f'import + export run at {ratio:.2f} of the speed of copying (bar: at least '
        f'{BARS["copy_speed_ratio"]})'
    )
    if 'load_seconds' in record:
        print(
            f'{record["model"]} loads in {record["load_seconds"]:.2f} s (bar: at most '
            f'{BARS["load_seconds"]}); {record["loads"][0]["all"]:.1f} s including process start'
        )


def _time(function, *arguments) -> float:
    start = time.monotonic()
    function(*arguments)
    return time.monotonic() - start


def _parts(config):
    return state.split(lambda key: Transformer(config, nnx.Rngs(key)))


def _mesh():
    return jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1]))


def _write_random(config, directory: Path) -> int:
    """Writes a model of random weights of moderate magnitude; returns their size in bytes."""
    directory.mkdir()
    parts = _parts(config)
    shapes = {path: leaf.shape for path, leaf in parts.shapes.items()}
    layout = make_layout(find_family('llama'), config, parts.axes, shapes)
    random = np.random.default_rng(0)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def tensor(shape):
        # With the upper exponent bits fixed, all are finite and between 2^-16 and 2^-1.
        bits = random.integers(0, 1 << 16, shape, np.uint16) & 0x87FF | 0x3800
        return bits.view(bfloat16)

    tensors = (tensor(shape) for shape in layout.shapes.values())
    write_safetensors(directory / 'model.safetensors', layout.shapes, bfloat16, tensors)
    (directory / 'config.json').write_text(json.dumps(write_config(config)), 'utf-8')
    return (directory / 'model.safetensors').stat().st_size


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for file in target.iterdir():
        _sync(file)


def _sync(path: Path) -> None:
    with path.open('rb') as file:
        os.fsync(file.fileno())


def _import(source: Path, config):
    with _mesh():
        parts = _parts(config)
        start = time.monotonic()
        params = load_params(open_pretrained(str(source)), config, parts.axes, parts.shapes)
        jax.block_until_ready(params)
        return params, time.monotonic() - start


def _export(config, params, target: Path) -> None:
    tokenizer = SimpleNamespace(bos_id=1, eos_id=2, save=_save_nothing)
    with _mesh():
        parts = _parts(config)
        config_of = ExportConfig(shard_gigabytes=100.0)
        exporter = Exporter(config_of, config, parts.axes, parts.shapes, tokenizer, frozenset([2]))
        exporter.write(params, target)
    for file in target.iterdir():
        _sync(file)


def _save_nothing(directory: Path) -> None:
    (directory / 'tokenizer_config.json').write_text('{}', 'utf-8')


def _load_once(path: Path) -> dict[str, float]:
    """Seconds to load a model as a run does, and seconds since this process started."""
    begun = time.monotonic()
    pretrained = open_pretrained(str(path))
    config = TransformerConfig.model_validate(values_of(pretrained)['model'])
    with _mesh():
        parts = _parts(config)
        params = load_params(pretrained, config, parts.axes, parts.shapes)
        jax.block_until_ready(params)
    ended = time.monotonic()
    return {'load': ended - begun, 'all': ended - process_start()}


if __name__ == '__main__':
    main()
