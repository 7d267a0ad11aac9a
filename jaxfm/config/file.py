"""Reading and writing config files: the Python file a user writes, the JSON a run stores."""

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path

from jaxfm.code import locate_error
from jaxfm.config.overrides import make_plain
from jaxfm.config.validation import format_value, suggest
from jaxfm.errors import (
    ConfigError,
    MissingInputError,
    PermissionDeniedError,
)
from jaxfm.schema import Problem
from jaxfm.storage.files import explain_damage, explain_write
from jaxfm.storage.whole import write_file


def split_file(config_argument: str) -> tuple[Path, str | None]:
    """'configs/a.py:smoke' -> configs/a.py and smoke; a path may hold colons before its `.py`."""
    head, suffix, argument = config_argument.partition('.py:')
    return (Path(head + '.py'), argument or None) if suffix else (Path(config_argument), None)


def run_file(config_argument: str, problems: list[Problem]) -> dict:
    """Calls the file's get_config and returns the result as plain values.

    Values that a config cannot hold are appended to `problems`.

    Raises:
        MissingInputError, PermissionDeniedError: the file cannot be read.
        ConfigError: the file fails (the message names the line), takes other arguments, or returns
            something other than a ConfigDict.
    """
    path, argument = split_file(config_argument)
    arguments = () if argument is None else (argument,)
    get_config = _find_get_config(path)
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        wrong = 'needs an argument' if argument is None else f'takes no argument, got {argument!r}'
        right = f'{path}:ARG' if argument is None else str(path)
        raise ConfigError(f'{path}: get_config {wrong}; use --config={right}') from None
    try:
        values = make_plain(get_config(*arguments), (), problems)
    except Exception as error:
        called = '' if argument is None else f' (with the argument {argument!r})'
        raise ConfigError(locate_error(error, path) + called) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f'{path}: get_config must return a ConfigDict, it returned {format_value(values)}'
        )
    return values


def _find_get_config(path: Path) -> Callable:
    """Runs the file and returns its function get_config."""
    source = _read_file(path)
    namespace = {'__name__': path.stem, '__file__': str(path)}
    try:
        exec(compile(source, str(path), 'exec'), namespace)
    except Exception as error:
        raise ConfigError(locate_error(error, path)) from None
    get_config = namespace.get('get_config')
    if not callable(get_config):
        raise ConfigError(f'{path}: must define get_config(), a function that returns the config')
    return get_config


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError:
        raise PermissionDeniedError(f'{path}: no permission to read this config file') from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        if not path.parent.is_dir():
            raise MissingInputError(f'{path}: there is no directory {path.parent}') from None
        names = sorted(other.name for other in path.parent.glob('*.py'))
        hint = suggest(path.name, names) or '; there are no .py files in that directory'
        raise MissingInputError(f'{path}: no such config file{hint}') from None


def write_whole(path: Path, text: str) -> None:
    with explain_write(path), write_file(path) as file:
        file.write(text.encode())


def read_json(path: str | os.PathLike) -> dict:
    try:
        with explain_damage(f'{path}: not a JSON config'):
            return json.loads(Path(path).read_text('utf-8'))
    except FileNotFoundError:
        raise MissingInputError(f'{path}: no such file') from None
