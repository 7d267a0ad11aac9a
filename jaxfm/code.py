"""Code outside jaxfm: importing the modules that a config names as `module:Class`, with digests.

The search order is: next to the config file, the installed packages, the directory where the run in
the work directory found the module earlier. A module's file is hashed when it is imported; the
modules it imports are not. A module may import jax but must not touch devices, because the config
is read before the run sets them up.
"""

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from jaxfm.errors import ConfigError

# Directories to search before the installed packages, and after them.
_BESIDE: list[Path] = []
_RECORDED: list[Path] = []
# {file of an imported module: its sha256 when it was imported}.
_DIGESTS: dict[str, str] = {}

_PATH = re.compile(r'[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*')


def is_path(name) -> bool:
    """Whether a name in a config is meant as a class path (it contains a colon)."""
    return isinstance(name, str) and ':' in name


def search_beside(directory: Path) -> None:
    """Makes this the first directory to search, before the installed packages."""
    directory = directory.resolve()
    if directory in _BESIDE:
        _BESIDE.remove(directory)
    _BESIDE.insert(0, directory)


def search_recorded(values) -> None:
    """Adds the directories recorded in an earlier config's values, to be searched last."""
    code = values.get('code') if isinstance(values, dict) else None
    for name, found in code.items() if isinstance(code, dict) else ():
        path = found.get('path') if isinstance(found, dict) else None
        if not (isinstance(path, str) and is_path(name)):
            continue
        depth = name.split(':')[0].count('.') + (Path(path).name == '__init__.py')
        parents = Path(path).parents
        if depth < len(parents) and parents[depth] not in _RECORDED:
            _RECORDED.append(parents[depth])


def searched() -> tuple[list[Path], list[Path]]:
    """The search directories, to be passed to `search_as` in another process."""
    return _BESIDE, _RECORDED


def search_as(searched: tuple[list[Path], list[Path]]) -> None:
    """Adopts the search directories of another process."""
    for ours, theirs in zip((_BESIDE, _RECORDED), searched):
        ours += [directory for directory in theirs if directory not in ours]


def find_code(values) -> dict[str, dict[str, str]]:
    """{class path: its file and the file's sha256} of every outside class that a config names.

    Skips classes that cannot be imported; the validation of the config reports them.

    Raises:
      ConfigError: a file has changed since this process imported it.
    """
    code = {}
    for name in sorted(_names_in(values)):
        try:
            path = import_module(name).__file__
        except ConfigError:
            continue
        if _read_digest(path) != _DIGESTS[path]:
            raise ConfigError(f'{path} has changed since this process imported it: start a new one')
        code[name] = {'path': path, 'sha256': _DIGESTS[path]}
    return code


def find_digest(name: str) -> str | None:
    """The sha256 of a class's module when it was imported; None if the name is not a path."""
    return _DIGESTS[import_module(name).__file__] if is_path(name) else None


def import_module(name: str) -> ModuleType:
    """Imports the module of a class path.

    Raises:
      ConfigError: the path is malformed, the module does not exist, or importing it fails.
    """
    if not _PATH.fullmatch(name):
        raise ConfigError(f'{name!r} is not the path of a class: write module:Class')
    module_name = name.split(':')[0]
    file = _find_file(module_name, _BESIDE)
    if file is None and not _is_installed(module_name):
        file = _find_file(module_name, _RECORDED)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f'{module_name}.'.startswith(f'{error.name}.'):
            raise ConfigError(f'{name}: {error}') from error
        raise ConfigError(f'there is no module {module_name}{_hint(module_name)}') from None
    except Exception as error:
        raise ConfigError(locate_error(error, file or Path(module_name))) from error
    found = getattr(module, '__file__', None)
    if found is None:
        raise ConfigError(f'{module_name} is not a Python file')
    if file is not None and not file.samefile(found):
        raise ConfigError(
            f'{found} hides the module {module_name} next to the config: rename yours'
        )
    if found not in _DIGESTS:
        _DIGESTS[found] = _read_digest(found)
    return module


def locate_error(error: Exception, path: Path) -> str:
    """'configs/a.py:12: NameError: ...': the innermost line of that file in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, message = [error.lineno], error.msg
    else:
        message = ' '.join(str(error).split())
    place = f'{path}:{lines[-1]}' if lines else str(path)
    return f'{place}: {type(error).__name__}: {message}'


def _find_file(module_name: str, directories: list[Path]) -> Path | None:
    """The file of a module in the first directory that has it; adds the directory to sys.path.

    It is appended at the end, so that a file next to a config never hides another module.
    """
    for directory in directories:
        module = directory.joinpath(*module_name.split('.'))
        for file in (module / '__init__.py', module.with_suffix('.py')):
            if file.is_file():
                if str(directory) not in sys.path:
                    sys.path.append(str(directory))
                    importlib.invalidate_caches()
                return file
    return None


def _is_installed(module_name: str) -> bool:
    top = module_name.split('.')[0]
    return top in sys.modules or importlib.util.find_spec(top) is not None


def _read_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f'{path} cannot be read: {error.strerror}') from error


def _hint(module_name: str) -> str:
    """For an error message: the directory that was searched, and the closest name in it."""
    if not _BESIDE:
        return ''
    names = sorted(path.stem for path in _BESIDE[0].glob('*.py'))
    close = difflib.get_close_matches(module_name, names, 1)
    hint = f'; did you mean {close[0]}?' if close else ''
    return f' in {_BESIDE[0]}, and none is installed{hint}'


def _names_in(values) -> set[str]:
    """Every class path anywhere in the values of a config."""
    if isinstance(values, list):
        return set().union(*map(_names_in, values))
    if not isinstance(values, dict):
        return set()
    name = values.get('name')
    found = {name} if is_path(name) else set()
    return found.union(*map(_names_in, values.values()))
