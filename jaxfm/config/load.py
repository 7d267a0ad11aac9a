"""Reads a run's config from a file and a command line, and the one that a run has written.

`load` runs the file's `get_config`, applies the `--config.*` overrides and reports every mistake at
once, in under 2 s and without jax. `run.py` says what a config may hold.
"""

import contextlib
import inspect
import json
import os
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from jaxfm.config import overrides as overriding
from jaxfm.config import validation
from jaxfm.config.run import RunConfig
from jaxfm.config.validation import dotted, shown
from jaxfm.errors import (
    ConfigError,
    DataError,
    MissingInputError,
    PermissionDeniedError,
    StorageError,
    UsageError,
)
from jaxfm.schema import Group, Problem


def split_arguments(argv: Iterable[str]) -> tuple[str | None, list[str], list[str]]:
    """Takes what concerns the config out of a command line.

    Returns:
        The argument of `--config`, or None; the overrides, as 'a.b=value'; all other arguments.

    Raises:
        UsageError: a flag without its value, or two configs.
    """
    config_argument, overrides, rest = None, [], []
    arguments = iter(argv)
    for argument in arguments:
        flag, has_value, value = argument.partition('=')
        if flag != '--config' and not flag.startswith('--config.'):
            rest.append(argument)
            continue
        if not has_value:
            value = next(arguments, '')
        is_next_flag = not has_value and value.startswith('--')
        if is_next_flag or (not value and (not has_value or flag == '--config')):
            raise UsageError(f'{flag} needs a value: {flag}=VALUE')
        if flag != '--config':
            overrides.append(f'{flag.removeprefix("--config.")}={value}')
        elif config_argument is not None:
            raise UsageError(f'--config is given twice: {config_argument} and {value}')
        else:
            config_argument = value
    return config_argument, overrides, rest


def load(
    config_argument: str,
    overrides: Iterable[str] = (),
    schema: type[Group] = RunConfig,
    workdir: Path | None = None,
):
    """The resolved config of `FILE[:ARG]` and the overrides of `split_arguments`.

    workdir: a run that has begun there inherits what it did then.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: everything that is wrong, one line each, with where the value came from.
    """
    problems, given, refusals = [], [], []
    values = _run_file(config_argument, problems)
    overrides = list(overrides)
    named = [text.partition('=')[2] for text in overrides if text.startswith('init_from=')]
    tokenizer = None
    if named[-1] if named else values.get('init_from'):
        tokenizer = _yield_to_inherited(values)
    for text in overrides:
        try:
            override = overriding.parse(text)
            overriding.apply(values, override, schema)
            given.append(override)
        except ConfigError as error:
            refusals.append(f'{error} (given by --config.{text})')
    values = overriding.plain(values, (), problems)
    inherited = _read_inherited(workdir)
    if isinstance(values.get('init_from'), str) and values['init_from']:
        _inherit(values, inherited, tokenizer)
    elif 'init_from' in values and 'model' not in values:
        raise ConfigError('config.init_from is empty: which model? --config.init_from=PATH')
    _take_adapter(values, inherited)
    return _resolve(schema, values, problems, given, refusals, config_argument)


# What of `model` says how it is trained and run, not what it is.
_NOT_INHERITED = (
    *('name', 'scan', 'remat', 'param_dtype', 'compute_dtype', 'gradient_reduce_dtype', 'lora'),
    *('implementations', 'matmul_dtype'),
)


def _yield_to_inherited(values: dict) -> dict:
    """Takes out of a file's values what the model of `init_from` decides -> its tokenizer.

    So any config can start from any model. What the command line says later is said of the
    inherited values, not of those of the file, nor of defaults.
    """
    model, tokenizer = values.get('model'), values.get('tokenizer') or {}
    if isinstance(model, dict):
        values['model'] = {key: model[key] for key in _NOT_INHERITED if key in model}
    is_trained = isinstance(tokenizer, dict) and tokenizer.get('name', 'file') != 'file'
    values['tokenizer'] = {} if is_trained else tokenizer
    return tokenizer


def _inherit(values: dict, inherited: dict, tokenizer: dict) -> None:
    """Fills in what the model that `init_from` names says of itself, where `values` does not.

    tokenizer: that of the file, for a model that brings none.
    """
    earlier = _said('init_from', values['init_from'], inherited, values.get('checkpoint'))
    for group, theirs in earlier.items():
        ours = values.get(group) or {}
        if isinstance(ours, dict) and ours.get('name') in (None, theirs.get('name')):
            values[group] = _merged(theirs, ours)
    values['tokenizer'] = values['tokenizer'] or tokenizer
    if not values['tokenizer']:
        raise ConfigError(
            'config.tokenizer is required: the model of init_from brings none; '
            '--config.tokenizer.name=file --config.tokenizer.path=PATH'
        )
    if earlier['model'].get('lora'):
        _keep_adapters(values['model'], earlier['model']['lora'])


def _merged(theirs: dict, ours: dict) -> dict:
    """Ours over theirs, group by group."""
    merged = theirs | ours
    for key in theirs.keys() & ours.keys():
        if isinstance(theirs[key], dict) and isinstance(ours[key], dict) and key != 'lora':
            merged[key] = _merged(theirs[key], ours[key])
    return merged


def _take_adapter(values: dict, inherited: dict) -> None:
    """Fills in what the adapter that `model.lora.path` names says of itself.

    Raises:
        ConfigError: the config says something else of it.
    """
    model = values.get('model')
    lora = model.get('lora') if isinstance(model, dict) else None
    path = lora.get('path') if isinstance(lora, dict) else None
    if not path or not isinstance(path, str):
        return
    theirs = _said('model.lora.path', path, inherited, values.get('checkpoint'))
    for key, value in theirs.items():
        if lora.get(key, value) != value:
            raise ConfigError(
                f'config.model.lora.{key}: is {shown(lora[key])}, but that of the adapter in '
                f'{path} is {shown(value)}: leave it out'
            )
    model['lora'] = lora | theirs


def _keep_adapters(model: dict, earlier: dict) -> None:
    """Adapters that a run starts from stay as they are, unless it says None: then none are left.

    Raises:
        ConfigError: it wants others.
    """
    given = model.get('lora')
    if not isinstance(given, dict):
        return
    kept = earlier | {'path': ''}  # where they came from once
    differ = [key for key in given if given != earlier and given[key] != kept.get(key)]
    if differ:
        has = ', '.join(f'{key} {shown(value)}' for key, value in kept.items() if value)
        raise ConfigError(
            f'config.model.lora: the model of init_from has adapters already ({has}), which cannot '
            f'have another {differ[0]}: leave it out to train them further, or give '
            '--config.model.lora=None, which merges them into the weights'
        )
    model['lora'] = kept


def _said(place: str, name: str, inherited: dict, checkpoint=None) -> dict:
    """What that which `place` of a config names says of itself, or said when the run began.

    Raises:
        MissingInputError, DataError: there is none, or it is not one that we read.
    """
    if name in inherited.get(place, {}):
        return inherited[place][name]
    read = _said_by_model if place == 'init_from' else _said_by_adapter
    try:
        return read(name)
    except MissingInputError as error:
        elsewhere = checkpoint.get('directory') if isinstance(checkpoint, dict) else ''
        hint = f'; a run in {elsewhere} goes on without it only in the work directory it began in'
        raise MissingInputError(f'config.{place}: {error}{hint if elsewhere else ""}') from None
    except DataError as error:
        raise DataError(f'config.{place}: {error}') from None
    except OSError as error:  # not even a name that the system can look for
        kind = PermissionDeniedError if isinstance(error, PermissionError) else MissingInputError
        raise kind(f'config.{place}: {name} cannot be read: {error.strerror}') from None


def _said_by_adapter(path: str) -> dict:
    from jaxfm.pretrained.huggingface import (
        peft,  # numpy and safetensors, for those alone who need them
    )

    return peft.describe(path)


def _said_by_model(init_from: str) -> dict:
    """{group: values} of a model that exists: of a run of ours, or from outside."""
    from jaxfm.pretrained import locate  # numpy and safetensors, for those alone who need them

    directory = Path(init_from).expanduser()
    if not locate.is_run(directory):
        return locate.values_of(locate.open_pretrained(init_from))
    earlier = _read_json(directory / 'config.json')
    return {
        'model': earlier['model'],
        'tokenizer': {'name': 'file', 'path': str(directory)},
        'sampling': {'stop_ids': earlier.get('sampling', {}).get('stop_ids', [])},
        'export': {'dtype': earlier.get('export', {}).get('dtype', 'auto')},
    }


def _resolve(schema, values, problems, given, refusals, origin):
    config, found = validation.check(schema, values)
    known = {problem.place for problem in problems}
    problems = problems + [problem for problem in found if problem.place not in known]
    lines = [_line(problem, given, origin) for problem in problems]
    if refusals or lines:
        raise ConfigError('\n'.join(refusals + lines))
    return config


def _line(problem: Problem, given: list[overriding.Override], origin: str) -> str:
    flags = [f'--config.{override.given}' for override in overriding.find_sources(problem, given)]
    origin = f'given by {", ".join(flags)}' if flags else f'in {origin}'
    return f'{dotted(("config", *problem.place))}: {problem.sentence} ({origin})'


def _split_file(config_argument: str) -> tuple[Path, str | None]:
    """'configs/a.py:smoke' -> configs/a.py and smoke; a path may hold colons before its `.py`."""
    head, suffix, argument = config_argument.partition('.py:')
    return (Path(head + '.py'), argument or None) if suffix else (Path(config_argument), None)


def _run_file(config_argument: str, problems: list[Problem]) -> dict:
    """What the file's get_config returns, as plain values; its own faults name their line."""
    path, argument = _split_file(config_argument)
    source = _read_file(path)
    namespace = {'__name__': path.stem, '__file__': str(path)}
    try:
        exec(compile(source, str(path), 'exec'), namespace)
    except Exception as error:
        raise ConfigError(_inside_file(error, path)) from None
    get_config = namespace.get('get_config')
    if not callable(get_config):
        raise ConfigError(f'{path}: has no function get_config(), which returns the config')
    arguments = () if argument is None else (argument,)
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        wrong = 'needs an argument' if argument is None else f'takes no argument, got {argument!r}'
        right = f'{path}:ARG' if argument is None else str(path)
        raise ConfigError(f'{path}: its get_config {wrong}; write --config={right}') from None
    try:
        values = overriding.plain(get_config(*arguments), (), problems)
    except Exception as error:
        called = '' if argument is None else f' (with the argument {argument!r})'
        raise ConfigError(_inside_file(error, path) + called) from None
    if not isinstance(values, dict):
        raise ConfigError(f'{path}: get_config returns {shown(values)}, not a ConfigDict')
    return values


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError:
        raise PermissionDeniedError(f'{path}: this config file may not be read') from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        if not path.parent.is_dir():
            raise MissingInputError(f'{path}: there is no directory {path.parent}') from None
        names = sorted(other.name for other in path.parent.glob('*.py'))
        hint = validation.nearest(path.name, names) or '; there is no .py file beside it'
        raise MissingInputError(f'{path}: no such config file{hint}') from None


def _inside_file(error: Exception, path: Path) -> str:
    """'configs/a.py:12: NameError: ...': the last line of the file itself that the error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, message = [error.lineno], error.msg
    else:
        message = ' '.join(str(error).split())
    place = f'{path}:{lines[-1]}' if lines else str(path)
    return f'{place}: {type(error).__name__}: {message}'


def workdir_for(config_argument: str) -> Path:
    """configs/llama.py:depth=4 -> runs/llama-depth=4."""
    path, argument = _split_file(config_argument)
    suffix = '-' + re.sub(r'[^\w.=+-]+', '_', argument) if argument else ''
    return Path('runs') / (path.stem + suffix)


def to_json(config: Group) -> str:
    """Every value of the config, defaults included."""
    return json.dumps(config.model_dump(), indent=2) + '\n'


def write(config: Group, path: str | os.PathLike) -> None:
    """Writes the resolved config whole or not at all.

    Raises:
        StorageError, PermissionDeniedError: it cannot be written.
    """
    _write_whole(Path(path), to_json(config))


# {place in the config: {what it names: what that said of itself}}, in the work directory.
INHERITED = 'inherited.json'


def write_inherited(config: RunConfig, workdir: Path) -> None:
    """Keeps what a run has inherited; call it before `write`, by which a run begins.

    So a run that has begun does not need the others any more, and what becomes of them does not
    matter to it.
    """
    known, lora = _read_inherited(workdir), config.model.lora
    names = {'init_from': config.init_from, 'model.lora.path': lora.path if lora else ''}
    inherited = {place: {name: _said(place, name, known)} for place, name in names.items() if name}
    if inherited:
        _write_whole(workdir / INHERITED, json.dumps(inherited, indent=2) + '\n')


def _read_inherited(workdir: Path | None) -> dict:
    """What the run in a work directory has inherited; nothing where none has begun."""
    if workdir is None or not (workdir / 'config.json').exists():
        return {}
    return _read_json(workdir / INHERITED) if (workdir / INHERITED).exists() else {}


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + '.partial')
    try:
        with temporary.open('w') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kind = PermissionDeniedError if isinstance(error, PermissionError) else StorageError
        raise kind(f'{path}: cannot be written: {error.strerror}') from None


def read(path: str | os.PathLike, schema: type[Group] = RunConfig):
    """The config that `write` wrote.

    Raises:
        MissingInputError: there is none.
        DataError: the file is not JSON.
        ConfigError: it says something that this version does not know.
    """
    return from_json(_read_json(path), str(path), schema)


def from_json(values: dict, where: str, schema: type[Group] = RunConfig):
    """The config whose JSON was kept somewhere. Raises ConfigError as `read` does."""
    return _resolve(schema, values, [], [], [], where)


def _read_json(path: str | os.PathLike) -> dict:
    try:
        return json.loads(Path(path).read_text('utf-8'))
    except FileNotFoundError:
        raise MissingInputError(f'{path}: no such file') from None
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}: not a config in JSON: {error}') from None
