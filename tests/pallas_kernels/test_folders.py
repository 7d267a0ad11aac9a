"""Every kernel has a folder with the same layout, named like the op that runs it."""

import importlib
import inspect
import shutil
from types import ModuleType

import pytest

from jaxfm.ops import IMPLEMENTATIONS
from pallas_kernels import _tables

OPS = [op for op, names in IMPLEMENTATIONS.items() if 'mosaic' in names]
FILES = {'__init__.py', 'reference.py', 'tiles.py', 'tiles.json', 'forward.py'}
# Files that the kernels of a folder share, besides tiles.py.
SHARED = {'attention': {'schedule.py'}, 'token_logprobs': {'walk.py'}}
NAMES = {'candidates', 'choose_tiles', 'forward', 'obstacle', 'reference', 'table_key'}


def package(op: str) -> ModuleType:
    return importlib.import_module(f'pallas_kernels.{op}')


def files(op: str) -> set[str]:
    return {path.name for path in (_tables.DIRECTORY / op).iterdir() if path.is_file()}


def parameters(function) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def test_every_op_with_a_kernel_has_a_folder_of_its_name():
    folders = {path.parent.name for path in _tables.DIRECTORY.glob('*/__init__.py')}
    assert folders == set(OPS)


@pytest.mark.parametrize('op', OPS)
def test_a_folder_has_the_files_of_all_and_says_what_its_kernels_share(op):
    assert files(op) - {'backward.py'} == FILES | SHARED.get(op, set())


@pytest.mark.parametrize('op', OPS)
def test_a_folder_offers_the_names_of_all(op):
    wanted = NAMES | ({'backward'} if 'backward.py' in files(op) else set())
    assert set(package(op).__all__) == wanted
    assert all(hasattr(package(op), name) for name in wanted)


@pytest.mark.parametrize('op', OPS)
def test_tiles_are_asked_for_by_the_part_and_the_words_of_a_shape(op):
    functions = [getattr(package(op), name) for name in ('choose_tiles', 'table_key', 'candidates')]
    (part, *words), *others = (parameters(function) for function in functions)
    assert others == [[part, *words]] * 2
    assert part.name == 'part'
    words += parameters(package(op).obstacle)
    assert all(word.kind is inspect.Parameter.KEYWORD_ONLY for word in words)


@pytest.mark.parametrize('op', OPS)
def test_tiles_are_chosen_without_mosaic(op):
    assert '_compat' not in (_tables.DIRECTORY / op / 'tiles.py').read_text()


@pytest.mark.parametrize('op', OPS)
def test_a_proof_ends_when_any_file_of_the_kernel_changes(op, tmp_path, monkeypatch):
    digest = _tables.source_digest.__wrapped__
    copied = shutil.copytree(_tables.DIRECTORY, tmp_path / 'pallas_kernels')
    monkeypatch.setattr(_tables, 'DIRECTORY', copied)
    seen = {digest(op)}
    assert seen == {_tables.source_digest(op)}
    paths = [*(copied / op).glob('*.py'), copied / '_compat.py', copied / '_padding.py']
    for path in paths:
        path.write_text(path.read_text() + '# changed\n')
        seen.add(digest(op))
    assert len(seen) == 1 + len(paths)
