"""The models that the cases sample from, and the files that other libraries read."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxfm import sharding, state
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer, compute_dtype
from jaxfm.pretrained.load import load_params
from jaxfm.pretrained.locate import open_pretrained, values_of
from jaxfm.run.cache import cache_directory
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.engine import Sampler

ROOT = Path(__file__).resolve().parents[3]
# SmolLM2-135M-Instruct, where the tests keep it (see tests/conftest.py).
MODEL = cache_directory() / 'test_models' / 'SmolLM2-135M-Instruct.Q4_1.gguf'
SMALL = dict(
    vocab_size=4096,
    embed_dim=256,
    num_layers=4,
    block=dict(num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=1024),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its weights, in float32 on one device."""

    name: str
    config: TransformerConfig
    parts: state.Parts
    params: dict[str, jax.Array]
    mesh: jax.sharding.Mesh

    def sampler(self, **sampling) -> Sampler:
        """An engine to which the weights are lent. sampling: values of its config."""
        config = SamplingConfig(**sampling)
        made = Sampler(self.parts.merge, self.config, config, self.mesh)
        made.lend(self.params, 0)
        return made

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that every decode step reads."""
        names = self.params.keys() - (set() if self.config.tie_embeddings else {'embedding/table'})
        return sum(self.params[name].nbytes for name in names)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        width = compute_dtype(self.config).itemsize
        return sum(
            segment.repeats * 2 * block.num_kv_heads * block.head_dim * width
            for segment in self.config.trunk
            for block in segment.pattern
        )


def load(path: Path) -> Model:
    """A pretrained model: a .gguf file or a directory in Hugging Face's layout."""
    pretrained = open_pretrained(str(path))
    config = TransformerConfig.model_validate(values_of(pretrained)['model'])
    return _build(
        path.stem,
        config.model_copy(update={'param_dtype': 'float32'}),
        lambda config, parts: load_params(pretrained, config, parts.axes, parts.shapes),
    )


def make_small(**changes) -> Model:
    """Random weights: 256 wide, 4 layers, 4 heads of 64, 2 of them with keys and values."""
    config = TransformerConfig.model_validate(SMALL | changes)
    return _build('random', config, lambda _, parts: _random(parts))


def _build(name: str, config: TransformerConfig, make_params) -> Model:
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
        params = jax.block_until_ready(make_params(config, parts))
    return Model(name, config, parts, params, mesh)


def _random(parts: state.Parts) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    places = state.stored_shardings(parts)

    def weight(path, leaf):
        centre = 1.0 if path.endswith('scale') else 0.0
        values = centre + 0.05 * random.standard_normal(leaf.shape, np.float32)
        return jax.device_put(values.astype(leaf.dtype), places[path])

    return {path: weight(path, leaf) for path, leaf in parts.shapes.items()}


def random_prompts(
    lengths: list[int], vocab_size: int, seed: int, first: int = 0
) -> list[list[int]]:
    """Prompts of random ids from `first` on, no two of which start alike."""
    random = np.random.default_rng(seed)
    starts = random.permutation(np.arange(first, vocab_size))[: len(lengths)]
    return [
        [int(start), *random.integers(first, vocab_size, length - 1).tolist()]
        for start, length in zip(starts, lengths, strict=True)
    ]


def write_gguf(source: Path, directory: Path) -> Path:
    """The same model as a .gguf file in float32, made once."""
    target = directory / f'{source.stem}.f32.gguf'
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix('.part')
        _dequantize(source, part)
        part.rename(target)
    return target


def _dequantize(source: Path, target: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field('general.architecture').contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith('GGUF.') or name in ('general.architecture', 'general.file_type'):
            continue
        kind = field.types[0]
        items = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, items)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_directory(source: Path, directory: Path) -> Path:
    """The same model in Hugging Face's layout in float32, made once."""
    target = directory / f'{source.stem}.f32'
    if not target.exists():
        part = directory / f'{source.stem}.part'
        shutil.rmtree(part, ignore_errors=True)
        flags = ['--config', str(ROOT / 'configs/pretrained.py'), f'--config.init_from={source}']
        flags += ['--config.export.dtype=float32', '--mode', 'export', '--output', str(part)]
        environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
        command = [sys.executable, '-m', 'jaxfm.main', *flags]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr)
        part.rename(target)
    return target
