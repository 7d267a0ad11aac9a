"""Code that is not jaxfm's: the modules that a config names by `module:Class`, and what they were.

A module is looked for beside the config file, then among what is installed, then where the run in
the work directory has found it before. Its file is digested when it is imported; what it imports in
turn is not. It may import jax, but must leave devices alone: a run is not set up yet when its
config is read.
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

# Directories that modules are looked for in: before what is installed, and after it.
_BESIDE: list[Path] = []
_RECORDED: list[Path] = []
# {file of a module that was imported: its sha256 then}.
_DIGESTS: dict[str, str] = {}

_PATH = re.compile(r'[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*')


def is_path(name) -> bool:
    """Whether a name of a config is meant as the path of a class."""
    return isinstance(name, str) and ':' in name


def search_beside(directory: Path) -> None:
    """Looks for modules in this directory, before other ones and before what is installed."""
    directory = directory.resolve()
    if directory in _BESIDE:
        _BESIDE.remove(directory)
    _BESIDE.insert(0, directory)


def search_recorded(values) -> None:
    """Looks for modules, last of all, where the values of an earlier config say that they were."""
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
    """Where modules are looked for, for `search_as` of another process."""
    return _BESIDE, _RECORDED


def search_as(searched: tuple[list[Path], list[Path]]) -> None:
    """Looks for modules where another process does."""
    for ours, theirs in zip((_BESIDE, _RECORDED), searched):
        ours += [directory for directory in theirs if directory not in ours]


def find_code(values) -> dict[str, dict[str, str]]:
    """{path of a class: its file and the sha256 of that} of all that values of a config name.

    Those that cannot be imported are left out: the check of the config tells of them.

    Raises:
      ConfigError: a file is not what this process has imported.
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
    """The sha256 of the module of a class as it was imported; None of a name that is no path."""
    return _DIGESTS[import_module(name).__file__] if is_path(name) else None


def import_module(name: str) -> ModuleType:
    """The module of the path of a class.

    Raises:
      ConfigError: it is no path, there is no such module, or the module fails.
    """
    if not _PATH.fullmatch(name):
        raise ConfigError(f'{name!r} is no path of a class: want module:Class')
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
        raise ConfigError(f'{module_name} is no file of Python')
    if file is not None and not file.samefile(found):
        raise ConfigError(f'{module_name} beside the config is hidden by {found}: rename it')
    if found not in _DIGESTS:
        _DIGESTS[found] = _read_digest(found)
    return module


def locate_error(error: Exception, path: Path) -> str:
    """'configs/a.py:12: NameError: ...': the last line of the file itself that the error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, message = [error.lineno], error.msg
    else:
        message = ' '.join(str(error).split())
    place = f'{path}:{lines[-1]}' if lines else str(path)
    return f'{place}: {type(error).__name__}: {message}'


def _find_file(module_name: str, directories: list[Path]) -> Path | None:
    """The file of a module in the first directory that has it, which Python then finds, too.

    Behind all else: a file beside a config must hide nothing that somebody imports later.
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
    """Where it was looked for, and the nearest name there."""
    if not _BESIDE:
        return ''
    names = sorted(path.stem for path in _BESIDE[0].glob('*.py'))
    close = difflib.get_close_matches(module_name, names, 1)
    hint = f'; did you mean {close[0]}?' if close else ''
    return f' in {_BESIDE[0]}, and none is installed{hint}'


def _names_in(values) -> set[str]:
    """The paths of classes anywhere in values of a config."""
    if isinstance(values, list):
        return set().union(*map(_names_in, values))
    if not isinstance(values, dict):
        return set()
    name = values.get('name')
    found = {name} if is_path(name) else set()
    return found.union(*map(_names_in, values.values()))
