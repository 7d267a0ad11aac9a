"""Kernels with a planted mistake, to prove that the kernel tests can fail."""

import importlib.util
from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """The module recompiled with `old` replaced by `new`; `old` must occur exactly once."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f'{module.__name__} contains {old!r} {source.count(old)} times'
    spec = importlib.util.spec_from_loader(module.__name__, loader=None)
    made = importlib.util.module_from_spec(spec)
    made.__file__ = module.__file__
    made.__package__ = module.__package__
    exec(compile(source.replace(old, new), module.__file__, 'exec'), made.__dict__)
    return made
