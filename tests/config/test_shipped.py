"""Every shipped config builds; the large ones have the parameters they claim and lower."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxfm import sharding
from jaxfm.config.load import load_config, write_config
from jaxfm.config.run import check_on_mesh
from jaxfm.errors import ConfigError
from jaxfm.models import MODELS
from jaxfm.plan.memory import bytes_per_device, bytes_total, num_parameters
from jaxfm.run.phase import make_phases
from jaxfm.state import split

ROOT = Path(__file__).resolve().parents[2]
# {config: its override that names the user's file}.
PATHS = {'sft.py': 'data.path=my.jsonl', 'rl_gsm8k.py': 'data.task.path=train.jsonl'}
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / 'configs').glob('*.py'))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize('arg', ['', ':smoke'])
@pytest.mark.parametrize('path', FILES, ids=str)
def test_every_config_builds(path, arg, tmp_path):
    overrides = []
    if path.name == 'pretrained.py' or (path.name in PATHS and not arg):
        # Only the user can provide these: a model and chats.
        write_config(load_config('configs/quickstart.py'), tmp_path / 'config.json')
        overrides = [f'init_from={tmp_path}']
    if path.name in PATHS and not arg:
        overrides.append(PATHS[path.name])
    load_config(f'{path}{arg}', overrides)


def test_fine_tuning_asks_for_chats(tmp_path):
    write_config(load_config('configs/quickstart.py'), tmp_path / 'config.json')
    with pytest.raises(ConfigError, match='config.data.path: is required and not given'):
        load_config('configs/sft.py', [f'init_from={tmp_path}'])


@pytest.mark.parametrize('path', [f for f in FILES if f.name != 'pretrained.py'], ids=str)
def test_smoke_is_short_and_saves_at_least_three_checkpoints(path):
    smoke = load_config(f'{path}:smoke')
    assert smoke.total_steps <= 60
    generated = {'python_stdlib', 'problems', 'rollout'}
    assert {phase.data.name for phase in smoke.all_phases} <= generated
    assert smoke.total_steps // smoke.checkpoint.every >= 3


@pytest.mark.parametrize('path', FILES, ids=str)
def test_every_config_states_its_command_and_hardware_and_does_not_import_jaxfm(path):
    tree = ast.parse(path.read_bytes())
    text = ast.get_docstring(tree)
    assert f'python -m jaxfm.main --config {path}' in text
    assert 'Hardware:' in text
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imports] == ['ml_collections']


@pytest.mark.parametrize('path', ['configs/llama_1b.py', 'configs/llama_8b.py'])
def test_smoke_has_the_shape_of_the_full_model(path):
    full, smoke = load_config(path).model, load_config(f'{path}:smoke').model
    assert smoke.block.rope == full.block.rope
    assert smoke.tie_embeddings == full.tie_embeddings
    for ratio in (
        lambda model: model.block.num_heads / model.block.num_kv_heads,
        lambda model: model.block.num_heads * model.block.head_dim / model.embed_dim,
        lambda model: model.block.mlp_dim / model.embed_dim,
    ):
        assert ratio(smoke) == ratio(full)


class Built:
    """The parts of a config that its train step needs. Allocates no arrays."""

    def __init__(self, path):
        self.config = load_config(path, ['model.compute_dtype=bfloat16'])
        model_class = MODELS.load(self.config.model.name)
        self.make_model = lambda key: model_class(self.config.model, nnx.Rngs(key))
        self.parts = split(self.make_model)

    def lower(self, mesh):
        """The abstract state, and the train step on a mesh as StableHLO text."""
        (phase,) = make_phases(self.config, self.make_model, mesh)
        data = self.config.data
        rows = jax.NamedSharding(mesh, sharding.activation('batch', 'position'))
        names = dict(tokens=jnp.int32, targets=jnp.int32, positions=jnp.int32)
        names |= dict(segment_ids=jnp.int32, loss_mask=jnp.float32)
        shape = (data.batch_size, data.sequence_length)
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in names.items()
        }
        state = phase.abstract_state()
        return state, phase.train_step().lower(state, batch).as_text()


@pytest.fixture(scope='module')
def llama_1b():
    return Built('configs/llama_1b.py')


@pytest.fixture(scope='module')
def llama_8b():
    return Built('configs/llama_8b.py')


def test_llamas_have_the_published_number_of_parameters(llama_1b, llama_8b):
    assert num_parameters(llama_1b.parts.shapes) == 1_235_814_400
    assert num_parameters(llama_8b.parts.shapes) == 8_030_261_248


@pytest.mark.parametrize(
    'name, sizes',
    [('llama_1b', dict(fsdp=8)), ('llama_1b', dict(fsdp=2, tensor=4)), ('llama_8b', dict(fsdp=8))],
    ids=lambda value: value if isinstance(value, str) else ' x '.join(value),
)
def test_the_train_step_of_a_llama_lowers_and_its_state_is_split(name, sizes, request):
    built = request.getfixturevalue(name)
    given = dict.fromkeys(sharding.MESH_AXES, 1) | sizes
    check_on_mesh(built.config, given)
    mesh = sharding.make_mesh(given)
    with jax.set_mesh(mesh):
        state, text = built.lower(mesh)
    whole = bytes_total(state)
    assert whole >= 12 * num_parameters(built.parts.shapes)  # weights and two moments in f32
    assert bytes_per_device(state) == pytest.approx(whole / 8, rel=0.01)
    assert 'bf16' in text
    # Layers are scanned; unrolled, each would add seven of these in the forward pass alone.
    assert text.count('dot_general') < 7 * built.config.model.num_layers


def test_one_document_per_row_is_checked_against_data_and_evaluators():
    words = ['model.implementations.attention=cudnn', 'model.implementations.one_document=true']
    path = 'configs/quickstart.py'
    with pytest.raises(ConfigError) as told:
        load_config(path, words)
    assert 'requires rows of one document, but data.packing is auto' in str(told.value)
    assert "'cudnn' supports only rows of one document, but evals" in str(told.value)
    nothing = ['data.packing=none', 'sampling.num_samples=0', 'evals={}']
    assert load_config(path, words + nothing).model.implementations.one_document
    with pytest.raises(ConfigError, match='fa4'):
        load_config(path, ['model.implementations.attention=fa4'])
