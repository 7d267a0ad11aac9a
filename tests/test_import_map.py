"""Which package may import which, checked by parsing the source of every module.

A room is a package or a module directly in jaxfm/. Imports inside functions count too, and so do
the "module:Class" targets of the registries.
"""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxfm.sharding import MESH_AXES

ROOT = Path(__file__).resolve().parent.parent

# Every room may import these; from jaxfm they import only each other.
GROUND = {'errors', 'schema', 'code', 'registry', 'command_line', 'process'}
# Rooms that check a config; they import nothing heavy.
LIGHT = {'config'}

# room -> the rooms that it may import, besides itself and GROUND. A part of a room ('data.corpus')
# has its own list. Every listed import must exist, so that the map stays true.
MAP = {
    'main': {'modes', 'config', 'data', 'storage', 'distributed'},
    'modes': {
        *('run', 'config', 'train', 'plan', 'evals', 'sampling', 'chat', 'state', 'models'),
        *('preferences', 'optim', 'metrics', 'storage', 'distributed'),
    },
    'run': {
        *(
            'config',
            'plan',
            'evals',
            'rollout',
            'preferences',
            'sampling',
            'objectives',
            'ops',
            'data',
        ),
        *('data.corpus', 'data.packing', 'tokenizer', 'chat', 'pretrained'),
        *(
            'pretrained.huggingface',
            'pretrained.orbax',
            'state',
            'models',
            'optim',
            'sharding',
            'checkpoint',
            'report',
        ),
        *('metrics', 'storage', 'distributed'),
    },
    # Samples of a task's prompts, judged as in an evaluation, packed as documents are.
    'rollout': {
        *('evals', 'sampling', 'tasks', 'objectives', 'data', 'data.packing', 'distributed'),
        'environments',
    },
    # Rows of documents, with what a reference says of them.
    'preferences': {'objectives', 'data', 'data.packing', 'storage', 'distributed'},
    # Turns between a model and what answers it: programs run as in tasks, one process steps.
    'environments': {'sampling', 'tasks', 'distributed'},
    # From the rooms that it configures, it imports only the schemas.
    'config': {
        *('evals', 'rollout', 'sampling', 'objectives', 'data', 'tokenizer', 'pretrained'),
        *('pretrained.huggingface', 'pretrained.orbax', 'models', 'optim', 'checkpoint'),
        *('metrics', 'storage'),
    },
    # A spike decides whether an update is applied.
    'train': {'state', 'checkpoint', 'optim', 'metrics', 'distributed'},
    'plan': {'models', 'optim', 'sharding'},
    # Files of samples are kept over starts, by all processes; files of text have a perplexity.
    'evals': {
        *(
            'sampling',
            'tasks',
            'data',
            'data.packing',
            'pretrained.huggingface',
            'ops',
            'sharding',
            'storage',
        ),
        *('distributed', 'environments'),
    },
    # Stop strings are found in text, and events tell text.
    'sampling': {'models', 'ops', 'sharding', 'tokenizer'},
    # Benchmarks are read from files, on disk and S3.
    'tasks': {'storage'},
    'objectives': {'ops'},
    'data': {'data.sources', 'data.corpus', 'data.packing', 'tokenizer', 'chat'},
    'data.sources': {'data', 'storage'},
    'data.corpus': {'data', 'data.sources', 'tokenizer', 'chat', 'storage'},
    'data.packing': {'data', 'data.corpus', 'storage'},
    # A tokenizer comes with its chat template; a .gguf file contains a tokenizer.
    'tokenizer': {'chat', 'pretrained.gguf', 'storage'},
    'chat': set(),
    # Models from outside become ours. Several processes write one export, and fail as one.
    'pretrained': {
        *('pretrained.gguf', 'pretrained.huggingface', 'pretrained.orbax', 'models'),
        *('models.families', 'sharding'),
    },
    'pretrained.gguf': {'pretrained', 'storage'},
    'pretrained.huggingface': {
        *('pretrained', 'models', 'models.families', 'sharding', 'storage', 'distributed'),
    },
    # Checkpoints of other JAX projects: names of our parameters, files on disk or S3.
    'pretrained.orbax': {'pretrained', 'models', 'sharding', 'storage'},
    # Norm scales and biases are a group of parameters for the optimizers and for the metrics.
    'state': {'optim', 'sharding'},
    'models': {'models.families', 'ops', 'sharding'},
    'models.families': {'models'},
    'optim': {'sharding'},
    # An op says where its result lives, because the mesh is explicit.
    'ops': {'sharding', 'pallas_kernels'},
    'sharding': set(),
    'checkpoint': {'storage', 'distributed'},
    'report': {'metrics'},
    'metrics': {'storage'},
    'storage': set(),
    'distributed': set(),
    'errors': set(),
    'process': set(),
    'schema': set(),
    'code': set(),
    'registry': set(),
    'command_line': set(),
    '': set(),  # jaxfm/__init__.py
}
# Rooms that import only the schemas and registries of others,
SCHEMAS_ONLY = {'config'}
# ... except to describe what `init_from` or an adapter names, read only if a config names one,
READ_LATE = {
    ('config', part) for part in ('pretrained', 'pretrained.huggingface', 'pretrained.orbax')
}
# ... and except to read and write files, which needs only the standard library.
FILES = {('config', 'storage')}

ARRAYS = {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}
FORBIDDEN = {'models': {'optax'}, 'ops': {'flax'}, 'tasks': ARRAYS} | dict.fromkeys(
    ('data', 'tokenizer', 'chat'), ARRAYS
)
# Only tools and tests may import these, to compare with them.
NEVER = {'torch', 'transformers', 'wandb', 'tensorflow'}


def room_of(name: str) -> str:
    """The room of a dotted module: the deepest one in the map, or the first part of its name."""
    if name.split('.')[0] == 'pallas_kernels':
        return 'pallas_kernels'
    parts = name.removeprefix('jaxfm').lstrip('.').split('.')
    inner = ('.'.join(parts[:end]) for end in range(len(parts), 1, -1))
    return next((room for room in inner if room in MAP), parts[0])


@dataclasses.dataclass(frozen=True)
class Module:
    """One source file. `name` is dotted; `__init__.py` has the name of its package."""

    name: str
    is_package: bool
    tree: ast.Module

    @property
    def room(self) -> str:
        return room_of(self.name)


@dataclasses.dataclass(frozen=True)
class Import:
    """One import; the target of a registry is imported later, when the run needs it."""

    target: str
    line: int
    is_lazy: bool = False


def parse(name: str, source: str, is_package: bool = False) -> Module:
    return Module(name, is_package, ast.parse(source))


def read_tree(*roots) -> list[Module]:
    modules = []
    for path in sorted(path for root in roots for path in (ROOT / root).rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        is_package = parts[-1] == '__init__'
        name = '.'.join(parts[:-1] if is_package else parts)
        modules.append(parse(name, path.read_text(), is_package))
    return modules


def imports(module: Module, names: set[str]):
    """All imports of a module; `names` distinguishes submodules from names inside a module."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                drop = node.level - module.is_package
                package = module.name.split('.')[: -drop or None]
                base = '.'.join([*package, *filter(None, [base])])
            for alias in node.names:
                inner = f'{base}.{alias.name}'
                is_module = inner in names or base == 'jaxfm'
                yield Import(inner if is_module else base, node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if match := re.fullmatch(r'(jaxfm(?:\.\w+)+):\w+', node.value):
                yield Import(match[1], node.lineno, is_lazy=True)


def _ours(module, imported, packages):
    """What is wrong with an import of a module of jaxfm, or None."""
    room = room_of(imported.target)
    is_schema = imported.target in packages or imported.is_lazy
    if room in {module.room, '', *GROUND}:
        return None
    if room not in MAP[module.room]:
        return f'{module.room or "jaxfm"} may not import {room}'
    is_light = module.is_package and module.room or module.room in SCHEMAS_ONLY
    if is_light and not is_schema and (module.room, room) not in READ_LATE | FILES:
        return f'imports more of {room} than its schemas'
    return None


def _theirs(module, package):
    """What is wrong with an import of another package, or None."""
    if package in sys.stdlib_module_names:
        return None
    if package in NEVER | FORBIDDEN.get(module.room, set()):
        return f'{module.room} may not import {package}'
    is_light = module.is_package or module.room in GROUND | LIGHT
    if is_light and package not in ('pydantic', 'pydantic_core', 'ml_collections'):
        return f'{package} is imported where a config is checked'
    return None


def broken_arrows(modules: list[Module]) -> list[str]:
    """One line for every import in jaxfm that the map forbids."""
    names = {module.name for module in modules}
    packages = {module.name for module in modules if module.is_package}
    problems = []
    for module in modules:
        if module.room not in MAP:
            problems.append(f'{module.name}: {module.room} is not on the map')
            continue
        for imported in imports(module, names):
            package = imported.target.split('.')[0]
            ours = package in ('jaxfm', 'pallas_kernels')
            problem = _ours(module, imported, packages) if ours else _theirs(module, package)
            if problem:
                problems.append(f'{module.name}:{imported.line}: {problem}')
    return problems


def unused_arrows(modules: list[Module]) -> list[str]:
    """One line for every entry of the map that no import uses."""
    names = {module.name for module in modules}
    used = {(m.room, room_of(imported.target)) for m in modules for imported in imports(m, names)}
    return [
        f'{room} lists {other}, which it does not import'
        for room, others in MAP.items()
        for other in sorted(others)
        if (room, other) not in used
    ]


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components with more than one name."""
    reach = {name: set(others) for name, others in arrows.items()}
    for via in arrows:
        for name in arrows:
            if via in reach[name]:
                reach[name] |= reach[via]
    found = {
        frozenset(other for other in reach[name] if name in reach.get(other, ())) | {name}
        for name in arrows
    }
    return sorted((set(one) for one in found if len(one) > 1), key=sorted)


def module_arrows(modules: list[Module]) -> dict[str, set[str]]:
    """{module: the modules it imports}, without targets of registries, which are imported later."""
    names = {module.name for module in modules}
    return {
        module.name: {
            imported.target
            for imported in imports(module, names)
            if not imported.is_lazy and imported.target != module.name
        }
        & names
        for module in modules
    }


def top_rooms() -> dict[str, set[str]]:
    """The map without parts of rooms, and without rooms that import only schemas."""
    arrows = {}
    for room, others in MAP.items():
        top = room.split('.')[0]
        arrows.setdefault(top, set()).update({other.split('.')[0] for other in others} - {top})
    return {room: others for room, others in arrows.items() if room not in SCHEMAS_ONLY}


def foreign_imports(modules: list[Module], allowed: set[str]) -> list[str]:
    """One line for every import of a package that is not allowed."""
    found = [(module, imported) for module in modules for imported in imports(module, set())]
    return [
        f'{module.name}:{imported.line}: imports {imported.target}'
        for module, imported in found
        if imported.target.split('.')[0] not in allowed
    ]


def axis_literals(modules: list[Module]) -> list[str]:
    """One line for every string outside sharding.py that is exactly the name of a mesh axis.

    A word inside a longer text, a part of an f-string, an attribute and a keyword are none.
    """
    problems = []
    for module in modules:
        if module.name == 'jaxfm.sharding':
            continue
        texts = [node for node in ast.walk(module.tree) if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for text in texts for part in text.values}
        problems += [
            f'{module.name}:{node.lineno}: {node.value!r} is a mesh axis'
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Constant) and node.value in MESH_AXES and id(node) not in parts
        ]
    return problems


def test_imports_flow_one_way():
    assert broken_arrows(read_tree('jaxfm')) == []


def test_the_map_has_no_arrow_that_nobody_uses():
    assert unused_arrows(read_tree('jaxfm')) == []


def test_no_module_imports_itself_through_others():
    assert circles(module_arrows(read_tree('jaxfm', 'pallas_kernels'))) == []


def test_rooms_form_no_circle():
    assert circles(top_rooms()) == []


def test_kernels_import_only_jax():
    kernels = read_tree('pallas_kernels')
    assert foreign_imports(kernels, {'jax', 'pallas_kernels', *sys.stdlib_module_names}) == []


def test_configs_import_only_ml_collections():
    assert foreign_imports(read_tree('configs'), {'ml_collections'}) == []


def test_no_mesh_axis_is_named_outside_sharding():
    assert axis_literals(read_tree('jaxfm', 'pallas_kernels')) == []


@pytest.mark.parametrize('name', [module.name for module in read_tree('jaxfm', 'pallas_kernels')])
def test_module_imports(name):
    importlib.import_module(name)


def test_checking_a_config_imports_no_jax():
    rooms = [module.name for module in read_tree('jaxfm') if module.is_package]
    program = f'import sys, {", ".join(rooms)}, jaxfm.config.load; print(*sys.modules)'
    command = [sys.executable, '-c', program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heavy = ARRAYS | {'numpy', 'grain', 'tokenizers', 'matplotlib', 'rich'}
    assert not heavy & set(loaded.split())


def test_training_imports_no_grain_orbax_or_mosaic_before_they_are_used():
    program = 'import sys, jaxfm.modes.train, jaxfm.data.loader; print(*sys.modules)'
    command = [sys.executable, '-c', program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    late = {'grain', 'orbax', 'orbax.checkpoint', 'jax.experimental.mosaic'}
    assert not late & set(loaded.split())


# The checker itself, on planted sources.


def test_a_circle_is_found():
    arrows = {'a': {'b'}, 'b': {'c'}, 'c': {'b'}, 'd': {'a'}}
    assert circles(arrows) == [{'b', 'c'}]


def test_a_circle_of_modules_is_found():
    package = parse('jaxfm.data', 'from jaxfm.data import loader', is_package=True)
    loader = parse('jaxfm.data.loader', 'def late():\n    from jaxfm import data')
    assert circles(module_arrows([package, loader])) == [{'jaxfm.data', 'jaxfm.data.loader'}]


def test_an_unused_arrow_is_found():
    names = ('next_token', 'policy_gradient', 'preference', 'distillation')
    users = [f'jaxfm.objectives.{name}' for name in names]
    modules = [m for m in read_tree('jaxfm') if m.name not in users]
    assert unused_arrows(modules) == ['objectives lists ops, which it does not import']


TREE = [
    parse('jaxfm', '', is_package=True),
    parse('jaxfm.data', '', is_package=True),
    parse('jaxfm.data.loader', ''),
    parse('jaxfm.tokenizer.build', ''),
    parse('jaxfm.tasks', '', is_package=True),
    parse('jaxfm.tasks.code', ''),
    parse('jaxfm.models', '', is_package=True),
    parse('jaxfm.ops', '', is_package=True),
]


@pytest.mark.parametrize(
    'name, source',
    [
        ('jaxfm.train', 'from jaxfm import evals'),
        ('jaxfm.train', 'import jaxfm.models.transformer as transformer'),
        ('jaxfm.evals.loss', 'from jaxfm.train import train'),
        ('jaxfm.objectives.next_token', 'from jaxfm.data import loader'),
        ('jaxfm.sampling.engine', 'from jaxfm.data.loader import PackedBatches'),
        ('jaxfm.sampling.engine', 'from jaxfm import data'),
        ('jaxfm.models.layers', 'from jaxfm.tokenizer.build import Tokenizer'),
        ('jaxfm.models.layers', 'from jaxfm.config.run import RunConfig'),
        ('jaxfm.models.layers', 'import optax'),
        ('jaxfm.models.layers', 'from ..tokenizer import build'),
        ('jaxfm.models.layers', 'def late():\n    from jaxfm.data import loader'),
        ('jaxfm.models.layers', 'import pallas_kernels.rms_norm'),
        ('jaxfm.models.layers', "TARGET = 'jaxfm.train:train'"),
        ('jaxfm.ops.norm', 'from flax import nnx'),
        ('jaxfm.ops.norm', 'from jaxfm.models import layers'),
        ('jaxfm.sharding', 'from jaxfm.ops import norm'),
        ('jaxfm.tasks.code', 'import jax.numpy as jnp'),
        ('jaxfm.data.loader', 'import jax'),
        ('jaxfm.data.loader', 'from jaxfm import sharding'),
        ('jaxfm.metrics.writers', 'from jaxfm.sharding import to_host'),
        ('jaxfm.config.load', 'import jax'),
        ('jaxfm.config.load', 'from jaxfm.data.loader import PackedBatches'),
        ('jaxfm.errors', 'import numpy'),
        ('jaxfm.errors', 'import jaxfm.config.load'),
        ('jaxfm.main', 'import torch'),
        ('jaxfm.evals.generate', 'def late():\n    import transformers'),
        ('jaxfm.metrics.writers', 'import wandb'),
        ('jaxfm.helpers', ''),
    ],
)
def test_a_forbidden_import_is_found(name, source):
    assert len(broken_arrows([*TREE, parse(name, source)])) == 1


@pytest.mark.parametrize(
    'source',
    [
        'import jax',
        'import numpy',
        'from jaxfm.tasks.code import FunctionBodies',
        'from ..tasks.code import FunctionBodies',
        'from ..train import train',
    ],
)
def test_a_heavy_import_in_the_init_of_a_room_is_found(source):
    assert len(broken_arrows([*TREE, parse('jaxfm.evals', source, is_package=True)])) == 1


@pytest.mark.parametrize(
    'name, source',
    [
        ('jaxfm.main', 'from jaxfm import modes\nfrom jaxfm.config import load'),
        (
            'jaxfm.run.run',
            'import jax\nfrom jaxfm import plan\nfrom jaxfm.evals import loss',
        ),
        ('jaxfm.train', 'from jaxfm import checkpoint\nfrom jaxfm.errors import Preempted'),
        ('jaxfm.sampling.engine', 'from jaxfm.models.kv_cache import init_cache'),
        ('jaxfm.sampling.engine', 'from jaxfm.models import kv_cache'),
        ('jaxfm.models.layers', 'from .attention import Attention\nfrom . import attention'),
        ('jaxfm.ops.norm', 'import jax\nfrom pallas_kernels import rms_norm'),
        ('jaxfm.config.run', "from jaxfm.data import DataConfig\nT = 'jaxfm.optim.muon:Muon'"),
        ('jaxfm.tasks.code', "import ast\nNOTE = 'see jaxfm.train'"),
    ],
)
def test_an_allowed_import_is_not_found(name, source):
    assert broken_arrows([*TREE, parse(name, source)]) == []


def test_the_init_of_a_room_may_use_schemas_and_name_its_own_classes():
    source = "from jaxfm.tasks import TASKS\nT = 'jaxfm.evals.loss:Loss'\nimport pydantic"
    assert broken_arrows([*TREE, parse('jaxfm.evals', source, is_package=True)]) == []


def test_a_foreign_import_is_found():
    module = parse('pallas_kernels.rms_norm', 'import jax\nimport flax\nimport jaxfm.ops')
    assert len(foreign_imports([module], {'jax'})) == 2


@pytest.mark.parametrize(
    'source', ["P('fsdp', None)", "{'batch': ('replica', 'expert')}", "mesh.shape['tensor']"]
)
def test_the_name_of_a_mesh_axis_is_found(source):
    assert axis_literals([parse('jaxfm.models.layers', source)])


@pytest.mark.parametrize(
    'source',
    [
        '"""Sharded over fsdp, gathered over tensor."""',
        'config.mesh.fsdp',
        'MeshConfig(context=1)',
        "'the context is full'",
        "f'{longest} tokens: {context}context'",
    ],
)
def test_other_uses_of_the_words_are_not_found(source):
    assert axis_literals([parse('jaxfm.models.layers', source)]) == []


def test_sharding_itself_may_name_them():
    assert axis_literals([parse('jaxfm.sharding', "P('fsdp')")]) == []
