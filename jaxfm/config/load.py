"""Loads a run's config from a file and a command line, or from a run's config.json.

`load_config` runs the file's `get_config`, applies the `--config.*` overrides and reports all
mistakes at once, in under 2 s and without importing jax. `run.py` declares the keys of a config.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from jaxfm.code import find_code, search_beside, search_recorded
from jaxfm.config.file import read_json, run_file, split_file, write_whole
from jaxfm.config.inherit import brings_config, inherit, read_inherited, remove_inherited
from jaxfm.config.overrides import (
    Override,
    apply_override,
    find_sources,
    make_plain,
    parse_override,
)
from jaxfm.config.run import RunConfig
from jaxfm.config.validation import format_path, validate
from jaxfm.errors import ConfigError, UsageError
from jaxfm.schema import Group, Problem


def split_arguments(argv: Iterable[str]) -> tuple[str | None, list[str], list[str]]:
    """Separates the config arguments of a command line from all others.

    Returns:
        The argument of `--config`, or None; the overrides, as 'a.b=value'; all other arguments.

    Raises:
        UsageError: a flag has no value, or --config is given twice.
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


def load_config(
    config_argument: str,
    overrides: Iterable[str] = (),
    schema: type[Group] = RunConfig,
    workdir: Path | None = None,
):
    """Resolves the config `FILE[:ARG]` with the overrides that `split_arguments` returned.

    Args:
        workdir: a run that has begun there keeps the values it inherited when it began.

    Raises:
        MissingInputError: the file, or a model or adapter that the config names, does not exist.
        ConfigError: every mistake, one line each, with the source of the value.
    """
    problems, overrides = [], list(overrides)
    search_beside(split_file(config_argument)[0].parent)
    values = run_file(config_argument, problems)
    named = [text.partition('=')[2] for text in overrides if text.startswith('init_from=')]
    inherited, tokenizer = read_inherited(workdir), None
    init_from = named[-1] if named else values.get('init_from')
    if isinstance(init_from, str) and init_from and brings_config(init_from, inherited):
        tokenizer = remove_inherited(values)
    given, refusals = _apply_overrides(values, overrides, schema)
    values = make_plain(values, (), problems)
    inherit(values, inherited, tokenizer)
    _record_code(values, problems)
    return _resolve(schema, values, config_argument, problems, given, refusals)


def _record_code(values: dict, problems: list[Problem]) -> None:
    """Adds to `values` the path and digest of each module outside jaxfm that they name."""
    if 'code' in values:
        problems.append(Problem.at(('code',), 'is recorded by the run and cannot be set'))
    try:
        code = find_code(values)
    except ConfigError as error:
        problems.append(Problem.at(('code',), str(error)))
        return
    if code:
        values['code'] = code


def _apply_overrides(values: dict, overrides: list[str], schema) -> tuple[list[Override], list]:
    """Applies the overrides to `values`; returns those that fit, and an error line per other."""
    given, refusals = [], []
    for text in overrides:
        try:
            override = parse_override(text)
            apply_override(values, override, schema)
            given.append(override)
        except ConfigError as error:
            refusals.append(f'{error} (given by --config.{text})')
    return given, refusals


def _resolve(schema, values: dict, origin: str, problems=(), given=(), refusals=()):
    """Validates the values. Raises ConfigError with the refusals and one line per problem."""
    config, found = validate(schema, values)
    known = {problem.place for problem in problems}
    problems = [*problems, *(problem for problem in found if problem.place not in known)]
    lines = [_format_problem(problem, given, origin) for problem in problems]
    if refusals or lines:
        raise ConfigError('\n'.join([*refusals, *lines]))
    return config


def _format_problem(problem: Problem, given: Iterable[Override], origin: str) -> str:
    flags = [f'--config.{override.given}' for override in find_sources(problem, given)]
    origin = f'given by {", ".join(flags)}' if flags else f'in {origin}'
    return f'{format_path(("config", *problem.place))}: {problem.sentence} ({origin})'


def workdir_for(config_argument: str) -> Path:
    """configs/llama.py:depth=4 -> runs/llama-depth=4."""
    path, argument = split_file(config_argument)
    suffix = '-' + re.sub(r'[^\w.=+-]+', '_', argument) if argument else ''
    return Path('runs') / (path.stem + suffix)


def format_config(config: Group) -> str:
    """Every value of the config as JSON, defaults included."""
    return json.dumps(config.model_dump(), indent=2) + '\n'


def write_config(config: Group, path: str | os.PathLike) -> None:
    """Writes the resolved config atomically.

    Raises:
        StorageError, PermissionDeniedError: it cannot be written.
    """
    write_whole(Path(path), format_config(config))


def read_config(path: str | os.PathLike, schema: type[Group] = RunConfig):
    """The config that `write_config` wrote.

    Raises:
        MissingInputError: the file does not exist.
        DataError: the file is not JSON.
        ConfigError: the config is not valid in this version of jaxfm.
    """
    values = read_json(path)
    if schema is RunConfig:
        search_recorded(values)
    return make_config(values, str(path), schema)


def make_config(values: dict, where: str, schema: type[Group] = RunConfig):
    """Validates values loaded from JSON; `where` names their source. Raises ConfigError."""
    return _resolve(schema, values, where)
