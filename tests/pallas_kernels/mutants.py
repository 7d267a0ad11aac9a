"""Kernels with a planted mistake: a test that cannot fail is a defect."""

import importlib.util
from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """The module made again from its source, in which `old` stands exactly once, as `new`."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f'{module.__name__} has {source.count(old)} of {old!r}'
    spec = importlib.util.spec_from_loader(module.__name__, loader=None)
    made = importlib.util.module_from_spec(spec)
    made.__file__ = module.__file__
    made.__package__ = module.__package__
    exec(compile(source.replace(old, new), module.__file__, 'exec'), made.__dict__)
    return made
