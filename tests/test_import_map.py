"""Who may import whom (DESIGN, section 3), held by reading the source of every module.

A room is a package or a module directly in jaxfm/. Imports inside functions count as well, and so
do the "module:Class" targets of the registries.
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

# Anyone may import these, and they import nothing of ours but each other.
FOUNDATIONS = {'errors', 'schema'}

# main -> modes -> run -> phase -> {train, plan, preflight, serving} -> {evals, rollout}
#      -> {sampling, tasks, objectives, data} -> models -> {ops, sharding} -> pallas_kernels
LAYERS = [
    {'train', 'plan', 'preflight', 'serving'},
    {'evals', 'rollout'},
    {'sampling', 'tasks', 'objectives', 'data', 'pretrained'},
    {'models'},
    {'ops', 'sharding'},
]
CONFIG = {'config', 'run_config', 'overrides', 'resume', 'validation'}
SIDE = CONFIG | {'state', 'optimizer', 'checkpoint', 'metrics', 'distributed'}


def _below(layer):
    return set().union(*LAYERS[layer + 1 :])


# room -> what it may import, beside itself and the foundations.
ARROWS = {
    'main': {'modes', 'data', 'checkpoint'} | CONFIG,
    'modes': {'run', 'phase'}.union(*LAYERS, SIDE),
    'run': {'phase'}.union(*LAYERS, SIDE),
    'phase': _below(1) | {'run_config', 'plan', 'state'},
    'train': {'state', 'checkpoint', 'metrics', 'sharding', 'distributed'},
    'plan': _below(0) | {'config', 'state', 'optimizer'},
    'preflight': _below(0) | {'config', 'distributed'},
    'serving': _below(0) | {'config', 'checkpoint', 'metrics', 'distributed'},
    'evals': _below(1),
    'rollout': _below(1),
    'sampling': _below(2) | {'data.tokenizer'},
    # Models from outside become ours; of its files only a tokenizer inside a .gguf is data's.
    # Several processes write one export, and fail as one.
    'pretrained': _below(2) | {'distributed'},
    'tasks': set(),
    'objectives': _below(2),
    # A .gguf file has the tokenizer inside.
    'data': {'pretrained.gguf_file'},
    'models': _below(3),
    # An op says where its result lives, because the mesh is explicit.
    'ops': {'sharding', 'pallas_kernels'},
    'sharding': set(),
    # The loop's own parts.
    'state': {'optimizer', 'models', 'ops', 'sharding'},
    'optimizer': {'run_config', 'models', 'sharding'},
    'checkpoint': {'distributed'},
    'metrics': set(),
    'distributed': set(),
    'config': {'run_config', 'overrides', 'validation', 'pretrained'},
    'run_config': {'validation'},
    'overrides': {'validation'},
    'resume': {'validation'},
    'validation': set(),
    'errors': set(),
    'schema': {'errors'},
    '': set(),  # jaxfm/__init__.py
}

ARRAYS = {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}
FORBIDDEN = {'models': {'optax'}, 'ops': {'flax'}, 'tasks': ARRAYS, 'data': ARRAYS}
# They belong to tools and tests, which compare with them.
NEVER = {'torch', 'transformers', 'wandb', 'tensorflow'}


@dataclasses.dataclass(frozen=True)
class Module:
    """One source file. `name` is dotted; a package's is that of its `__init__.py`."""

    name: str
    is_package: bool
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.removeprefix('jaxfm').lstrip('.').split('.')[0]


@dataclasses.dataclass(frozen=True)
class Import:
    """What a line imports; a registry's target is imported later, when the run needs it."""

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
    """All imports of a module; `names` tells a submodule from a name inside a module."""
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
    """What is wrong with an import of our own, or None."""
    package, _, inner = imported.target.partition('.')
    room = 'pallas_kernels' if package == 'pallas_kernels' else inner.split('.')[0]
    is_schema = imported.target in packages
    if module.room == room or room in FOUNDATIONS or (package == 'jaxfm' and not inner):
        return None
    if module.room == 'run_config' and (is_schema or imported.is_lazy):
        return None
    if room in ARROWS[module.room] or inner in ARROWS[module.room]:
        if module.is_package and module.room and not (is_schema or imported.is_lazy):
            return 'the __init__ of a room imports only schemas'
        return None
    return f'{module.room or "jaxfm"} may not import {room}'


def _theirs(module, package):
    """What is wrong with an import of somebody else's package, or None."""
    if package in sys.stdlib_module_names:
        return None
    if package in NEVER | FORBIDDEN.get(module.room, set()):
        return f'{module.room} may not import {package}'
    is_light = module.is_package or module.room in FOUNDATIONS | CONFIG
    if is_light and package not in ('pydantic', 'pydantic_core', 'ml_collections'):
        return f'{package} is imported where a config is checked'
    return None


def broken_arrows(modules: list[Module]) -> list[str]:
    """One line for every import in jaxfm that the map forbids."""
    names = {module.name for module in modules}
    packages = {module.name for module in modules if module.is_package}
    problems = []
    for module in modules:
        if module.room not in ARROWS:
            problems.append(f'{module.name}: {module.room} is not on the map')
            continue
        for imported in imports(module, names):
            package = imported.target.split('.')[0]
            ours = package in ('jaxfm', 'pallas_kernels')
            problem = _ours(module, imported, packages) if ours else _theirs(module, package)
            if problem:
                problems.append(f'{module.name}:{imported.line}: {problem}')
    return problems


def foreign_imports(modules: list[Module], allowed: set[str]) -> list[str]:
    """One line for every import of anything but the allowed packages."""
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
    program = f'import sys, {", ".join(rooms)}, jaxfm.config; print(*sys.modules)'
    command = [sys.executable, '-c', program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heavy = ARRAYS | {'numpy', 'grain', 'tokenizers', 'matplotlib', 'rich'}
    assert not heavy & set(loaded.split())


# The checker itself, on planted sources.

TREE = [
    parse('jaxfm', '', is_package=True),
    parse('jaxfm.data', '', is_package=True),
    parse('jaxfm.data.loader', ''),
    parse('jaxfm.data.tokenizer', ''),
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
        ('jaxfm.sampling.sampler', 'from jaxfm.data.loader import PackedBatches'),
        ('jaxfm.sampling.sampler', 'from jaxfm import data'),
        ('jaxfm.models.layers', 'from jaxfm.data.tokenizer import Tokenizer'),
        ('jaxfm.models.layers', 'from jaxfm.config import RunConfig'),
        ('jaxfm.models.layers', 'import optax'),
        ('jaxfm.models.layers', 'from ..data import tokenizer'),
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
        ('jaxfm.config', 'import jax'),
        ('jaxfm.config', 'from jaxfm.data.loader import PackedBatches'),
        ('jaxfm.errors', 'import numpy'),
        ('jaxfm.errors', 'import jaxfm.config'),
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
        ('jaxfm.main', 'from jaxfm import config, modes'),
        ('jaxfm.run', 'import jax\nfrom jaxfm import config, train\nfrom jaxfm.evals import loss'),
        ('jaxfm.train', 'from jaxfm import checkpoint\nfrom jaxfm.errors import Preempted'),
        ('jaxfm.sampling.sampler', 'from jaxfm.data.tokenizer import Tokenizer'),
        ('jaxfm.sampling.sampler', 'from jaxfm.data import tokenizer'),
        ('jaxfm.models.layers', 'from .attention import Attention\nfrom . import attention'),
        ('jaxfm.ops.norm', 'import jax\nfrom pallas_kernels import rms_norm'),
        ('jaxfm.run_config', "from jaxfm.data import DataConfig\nT = 'jaxfm.optimizer:adamw'"),
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
