"""The wheel holds the library and nothing else, and works far from the repository."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ('jaxfm', 'pallas_kernels', 'configs', 'tests', 'pyproject.toml', 'README.md', 'LICENSE')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that the tree stays clean, by the installed setuptools."""
    if importlib.util.find_spec('setuptools') is None:
        pytest.skip('setuptools is not installed (it comes with the test extra)')
    tree = tmp_path_factory.mktemp('tree')
    ignore = shutil.ignore_patterns('__pycache__', '*.egg-info')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree)
    out = tmp_path_factory.mktemp('wheel')
    build = f'import setuptools.build_meta as build; build.build_wheel({str(out)!r})'
    subprocess.run([sys.executable, '-c', build], cwd=tree, check=True, capture_output=True)
    [path] = out.iterdir()
    return path


def test_wheel_holds_exactly_the_two_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if '.dist-info/' not in name}
    packages = ('jaxfm', 'pallas_kernels')
    kinds = ('*.py', '*.json')  # tile sizes of kernels, and what is proven of them
    ours = {path for name in packages for kind in kinds for path in (ROOT / name).rglob(kind)}
    assert modules == {str(path.relative_to(ROOT)) for path in ours}
    assert any(name.endswith('licenses/LICENSE') for name in names)


def test_wheel_imports_from_an_empty_directory(wheel, tmp_path):
    site, empty = tmp_path / 'site', tmp_path / 'empty'
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    program = f"""
import importlib, pkgutil, sys
sys.path.insert(0, {str(site)!r})
import jaxfm, pallas_kernels
for package in (jaxfm, pallas_kernels):
    assert package.__file__.startswith({str(site)!r}), package.__file__
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
        importlib.import_module(module.name)
"""
    command = [sys.executable, '-c', program]
    result = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_names_of_extras_are_single_words():
    """The pip that comes with Python 3.12.1 does not find others, and installs nothing for them."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    assert [name for name in project['optional-dependencies'] if not name.isalnum()] == []
