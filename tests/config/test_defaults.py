"""Defaults and bounds of every config group, against tests/goldens/config_defaults.json.

    python -m tests.config.test_defaults

makes the golden anew. A default decides what a run does whose config does not name the value, so a
change of one is a change of behaviour, and shows as a line in the diff of the golden.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest

from jaxfm.schema import Group

# Every module that declares groups; named here, so that a change of one picks this file.
MODULES = (
    'jaxfm.checkpoint',
    'jaxfm.config.run',
    'jaxfm.data',
    'jaxfm.environments',
    'jaxfm.evals',
    'jaxfm.metrics',
    'jaxfm.models',
    'jaxfm.objectives',
    'jaxfm.optim',
    'jaxfm.pretrained',
    'jaxfm.rollout',
    'jaxfm.sampling',
    'jaxfm.sampling.strategies',
    'jaxfm.tasks',
    'jaxfm.tokenizer',
)
GOLDEN = Path(__file__).resolve().parents[2] / 'tests' / 'goldens' / 'config_defaults.json'


def find_groups(kind: type[Group] = Group) -> dict[str, type[Group]]:
    """{module.class: class} of all groups that jaxfm declares.

    Tests declare some of their own, and the registry makes groups for classes from outside.
    """
    found = {f'{kind.__module__}.{kind.__name__}': kind}
    for inner in kind.__subclasses__():
        found |= find_groups(inner)
    return {path: found[path] for path in sorted(found) if is_declared(path, found[path])}


def is_declared(path: str, group: type[Group]) -> bool:
    module, _, name = path.rpartition('.')
    return module.startswith('jaxfm.') and vars(sys.modules[module]).get(name) is group


def describe(field) -> str:
    """What a value may be and is when nobody gives it: 'required; Gt(gt=0)', '0.0; Ge(ge=0)'."""
    default = repr(field.get_default(call_default_factory=True))
    return '; '.join(['required' if field.is_required() else default, *map(name, field.metadata)])


def name(bound) -> str:
    """A bound, without the places in memory that some of them show."""
    if hasattr(bound, 'registry'):
        return f'one of {", ".join(bound.registry)}'
    return bound.func.__name__ if hasattr(bound, 'func') else repr(bound)


def collect() -> dict[str, dict[str, str]]:
    """{group: {key: its default and bounds}} of groups that have keys."""
    for module in MODULES:
        importlib.import_module(module)
    return {
        path: {key: describe(field) for key, field in group.model_fields.items()}
        for path, group in find_groups().items()
        if group.model_fields
    }


@pytest.mark.parametrize('path', json.loads(GOLDEN.read_text()) if GOLDEN.exists() else [])
def test_defaults_and_bounds_are_those_of_the_golden(path):
    assert collect()[path] == json.loads(GOLDEN.read_text())[path]


def test_the_golden_has_every_group():
    found = collect()
    assert found.keys() == json.loads(GOLDEN.read_text()).keys()
    assert {path.rpartition('.')[0] for path in found} == {*MODULES}


if __name__ == '__main__':
    GOLDEN.write_text(json.dumps(collect(), indent=1, ensure_ascii=False) + '\n')
