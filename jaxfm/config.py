"""A run's config: what it may say, and how it is read from a file and a command line.

`load` runs the file's `get_config`, applies the `--config.*` overrides and reports every mistake at
once, in under 2 s and without jax. The groups of modules that are a single file (optimizer.py,
sharding.py) and the run itself stand here; those of the rooms stand in the rooms.
"""

import contextlib
import inspect
import json
import math
import os
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field

from jaxfm import overrides as overriding
from jaxfm import validation
from jaxfm.checkpoint import CheckpointConfig
from jaxfm.data import TOKENIZERS, BPEConfig, DataConfig
from jaxfm.errors import (
    ConfigError,
    DataError,
    MissingInputError,
    PermissionDeniedError,
    StorageError,
    UsageError,
)
from jaxfm.evals import EVALUATORS
from jaxfm.metrics import MetricsConfig
from jaxfm.models import MODELS
from jaxfm.objectives import OBJECTIVES, NextTokenConfig
from jaxfm.sampling import SamplingConfig
from jaxfm.schema import Entry, Group, one_of
from jaxfm.validation import Problem, dotted, shown

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _axis(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError(f'must be at least 1, or -1 for all remaining devices, got {size}')
    return size


def _only_one(size: int) -> int:
    if size != 1:
        raise ValueError(f'must be 1: nothing is split along this axis yet, got {size}')
    return size


Axis = Annotated[int, pydantic.AfterValidator(_axis)]
UnusedAxis = Annotated[int, pydantic.AfterValidator(_only_one)]


class MeshConfig(Group):
    """How many ways each axis of the mesh splits; -1, on one axis at most: all the rest."""

    replica: Axis = 1  # copies of the weights, over the slow network
    fsdp: Axis = -1  # weights and optimizer state stored in shards
    expert: UnusedAxis = 1
    context: UnusedAxis = 1
    tensor: Axis = 1  # heads and MLP split inside a layer, over the fastest links

    @pydantic.model_validator(mode='after')
    def _check(self):
        free = [axis for axis, size in self if size == -1]
        if len(free) > 1:
            raise ValueError(
                f'{" and ".join(free)} are -1; one axis at most can take all remaining devices'
            )
        return self


class OptimizerConfig(Group):
    """What every optimizer has: its schedule, decay, clipping, and what it leaves alone."""

    learning_rate: float = Field(gt=0)  # after warm-up
    warmup_steps: int = Field(0, ge=0)  # linear, from learning_rate / warmup_steps
    schedule: Literal['cosine', 'linear', 'constant'] = 'cosine'
    decay_steps: int = Field(0, ge=0)  # after warm-up; 0 is the rest of the run
    final_fraction: Share = 0.1  # of learning_rate, at the end of the decay
    weight_decay: float = Field(0.1, ge=0)
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: float = Field(1e-8, gt=0)
    clip_norm: float = Field(1.0, ge=0)  # of the global gradient; 0 is off
    accumulate: int = Field(1, ge=1)  # microbatches a step
    frozen: list[str] = []  # glob patterns of the paths of parameters that stay as they are
    moment_dtype: Literal['float32', 'bfloat16'] = 'float32'  # of first moments


class AdamWConfig(OptimizerConfig):
    """AdamW for every parameter."""

    name: Literal['adamw'] = 'adamw'


class MuonConfig(OptimizerConfig):
    """Muon for the matrices inside blocks, AdamW with the values above for everything else."""

    name: Literal['muon'] = 'muon'
    muon_learning_rate: float = Field(0.02, gt=0)  # on the same schedule
    momentum: Decay = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = Field(5, ge=1)


OPTIMIZERS = {
    'adamw': Entry('jaxfm.optimizer:AdamW', AdamWConfig),
    'muon': Entry('jaxfm.optimizer:Muon', MuonConfig),
}


def _vocabulary_fits(model, tokenizer) -> list[str]:
    # A tokenizer whose size is known only once it is built is checked then.
    size = getattr(tokenizer, 'vocab_size', 0)
    if size <= model.vocab_size:
        return []
    return [
        f'tokenizer.vocab_size {size} is more than model.vocab_size {model.vocab_size}: '
        f'{size - model.vocab_size} tokens would have no embedding'
    ]


def _batch_divides(data, optimizer, mesh) -> list[str]:
    rows, rest = divmod(data.batch_size, optimizer.accumulate)
    if rest:
        return [
            f'data.batch_size {data.batch_size} is not a multiple of optimizer.accumulate '
            f'{optimizer.accumulate}: {_division(data.batch_size, optimizer.accumulate)}'
        ]
    ways = math.prod(size for size in (mesh.replica, mesh.fsdp, mesh.expert) if size != -1)
    if rows % ways:
        return [
            f'data.batch_size {data.batch_size} / optimizer.accumulate {optimizer.accumulate} = '
            f'{rows} rows cannot be split over mesh.replica x mesh.fsdp x mesh.expert = '
            f'{ways}: {_division(rows, ways)}'
        ]
    return []


def _model_divides(model, mesh) -> list[str]:
    blocks = [block for segment in model.trunk for block in segment.pattern]
    splits = [
        (f'model: {name}', getattr(block, name), 'mesh.tensor', mesh.tensor)
        for name in ('num_heads', 'num_kv_heads', 'mlp_dim')
        for block in blocks
    ]
    splits.append(('model.embed_dim', model.embed_dim, 'mesh.fsdp', mesh.fsdp))
    sentences = [
        f'{name} {size} cannot be split over {axis} {ways}: {_division(size, ways)}'
        for name, size, axis, ways in splits
        if ways != -1 and size % ways
    ]
    return list(dict.fromkeys(sentences))


def _warmup_fits(steps, optimizer) -> list[str]:
    if steps == 0 or optimizer.warmup_steps <= steps:
        return []
    return [f'optimizer.warmup_steps {optimizer.warmup_steps} is more than steps {steps}']


def _completions_fit(evals, sampling) -> list[str]:
    own = []
    if sampling.max_tokens >= sampling.max_length:
        own.append(
            f'sampling.max_tokens {sampling.max_tokens} leaves no room for a prompt in '
            f'sampling.max_length {sampling.max_length}'
        )
    return own + [
        f'evals.{name}.max_tokens {config.max_tokens} leaves no room for a prompt in '
        f'sampling.max_length {sampling.max_length}'
        for name, config in evals.items()
        if getattr(config, 'max_tokens', 0) >= sampling.max_length
    ]


def _division(size: int, ways: int) -> str:
    return f'{size} = {size // ways} x {ways} + {size % ways}'


def _phases_or_one(steps, data, optimizer, phases) -> list[str]:
    own = {'steps': steps, 'data': data, 'optimizer': optimizer}
    if phases:
        given = [name for name, value in own.items() if value is not None]
        return [f'{name} belongs into a phase, because phases is given' for name in given]
    return [f'{name} is required and not given' for name, value in own.items() if value is None]


def _phase_names_differ(phases) -> list[str]:
    names = [phase.name for phase in phases]
    twice = sorted({name for name in names if names.count(name) > 1})
    return [f'phases: {name} is the name of more than one phase' for name in twice]


def _optimizer_can_be_kept(phases) -> list[str]:
    """Moments fit the parameters and the rules that they were made for."""
    sentences = []
    for index, phase in enumerate(phases):
        if not phase.keep_optimizer:
            continue
        if index == 0:
            sentences.append('phases[0].keep_optimizer: there is no phase before it')
            continue
        before, after = phases[index - 1].optimizer, phase.optimizer
        sentences += [
            f'phases[{index}].keep_optimizer needs the same optimizer.{key} as the phase before: '
            f'{shown(getattr(after, key))} is not {shown(getattr(before, key))}'
            for key in ('name', 'frozen', 'moment_dtype')
            if getattr(before, key) != getattr(after, key)
        ]
    return sentences


def _evaluators_name_phases(evals, phases) -> list[str]:
    names = [phase.name for phase in phases]
    sentences = []
    for name, config in evals.items():
        if names and not config.phase:
            sentences.append(
                f'evals.{name}.phase is required and not given: whose held-out documents? '
                f'it is one of {", ".join(names)}'
            )
        elif config.phase and config.phase not in names:
            hint = validation.nearest(config.phase, names) or '; this run does not list phases'
            sentences.append(f'evals.{name}.phase: there is no phase {config.phase}{hint}')
    return sentences


class PhaseConfig(Group):
    """A stretch of a run with its own data, objective, optimizer and steps."""

    name: str = Field(pattern=r'^[A-Za-z]\w*$')  # in metrics and messages
    steps: int = Field(ge=0)
    data: DataConfig
    objective: one_of(OBJECTIVES) = NextTokenConfig()
    optimizer: one_of(OPTIMIZERS)
    # A phase starts with the weights of the one before and a new optimizer, unless it says so.
    keep_optimizer: bool = False


class RunConfig(Group):
    """One run, resolved: every value that decides what it does.

    Most runs have one phase, given by steps, data, objective and optimizer; others list phases.
    """

    seed: int = Field(0, ge=0, lt=2**32)
    # The work directory of a run whose newest weights this one starts from. What `model` and
    # `tokenizer` do not say is then as it was there.
    init_from: str = ''
    model: one_of(MODELS)
    tokenizer: one_of(TOKENIZERS) = BPEConfig()
    steps: Annotated[int, Field(ge=0)] | None = None  # 0 is evaluate only
    data: DataConfig | None = None
    objective: one_of(OBJECTIVES) = NextTokenConfig()
    optimizer: one_of(OPTIMIZERS) | None = None
    phases: list[PhaseConfig] = []
    mesh: MeshConfig = MeshConfig()
    evals: dict[str, one_of(EVALUATORS)] = {}  # by the name their metrics carry
    sampling: SamplingConfig = SamplingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()

    cross_checks: ClassVar = (
        _phases_or_one,
        _phase_names_differ,
        _optimizer_can_be_kept,
        _evaluators_name_phases,
        _vocabulary_fits,
        _model_divides,
        _completions_fit,
    )
    phase_checks: ClassVar = (_batch_divides, _warmup_fits)

    @pydantic.model_validator(mode='after')
    def _check(self):
        sentences = self.cross_problems(dict(self))
        if sentences:
            raise ValueError('\n'.join(sentences))
        return self

    @classmethod
    def cross_problems(cls, parts: dict) -> list[str]:
        """What is wrong between the values of a run, as far as `parts` has them."""
        sentences = validation.cross_problems(cls.cross_checks, parts)
        given = {name: value for name, value in parts.items() if value is not None}
        if not given.get('phases'):
            return sentences + validation.cross_problems(cls.phase_checks, given)
        for index, phase in enumerate(given['phases']):
            sentences += [
                f'phases[{index}].{sentence}'
                for sentence in validation.cross_problems(cls.phase_checks, given | dict(phase))
            ]
        return sentences

    @property
    def all_phases(self) -> list[PhaseConfig]:
        """The phases; those of a run that lists none are one, without a name."""
        one = {name: getattr(self, name) for name in ('steps', 'data', 'objective', 'optimizer')}
        return self.phases or [PhaseConfig.model_construct(name='', **one)]

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.all_phases)


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


def load(config_argument: str, overrides: Iterable[str] = (), schema: type[Group] = RunConfig):
    """The resolved config of `FILE[:ARG]` and the overrides of `split_arguments`.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: everything that is wrong, one line each, with where the value came from.
    """
    problems, given, refusals = [], [], []
    values = _run_file(config_argument, problems)
    for text in overrides:
        try:
            override = overriding.parse(text)
            overriding.apply(values, override, schema)
            given.append(override)
        except ConfigError as error:
            refusals.append(f'{error} (given by --config.{text})')
    values = overriding.plain(values, (), problems)
    if isinstance(values.get('init_from'), str) and values['init_from']:
        _inherit(values)
    return _resolve(schema, values, problems, given, refusals, config_argument)


def _inherit(values: dict) -> None:
    """Fills in what the run that `init_from` names says of model and tokenizer."""
    directory = Path(values['init_from'])
    if not (directory / 'config.json').is_file():
        raise MissingInputError(
            f'config.init_from: {directory} holds no run (it has no config.json)'
            + validation.nearest(directory.name, _runs_beside(directory))
        )
    earlier = _read_json(directory / 'config.json')
    model, tokenizer = values.get('model') or {}, values.get('tokenizer') or {}
    if isinstance(model, dict) and model.get('name') in (None, earlier['model']['name']):
        values['model'] = earlier['model'] | model
    if isinstance(tokenizer, dict) and 'name' not in tokenizer:
        values['tokenizer'] = {'name': 'file', 'path': str(directory)} | tokenizer


def _runs_beside(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.parent.glob('*/config.json'))


def _resolve(schema, values, problems, given, refusals, origin):
    config, found = validation.check(schema, values)
    known = {problem.path for problem in problems}
    problems = problems + [problem for problem in found if problem.path not in known]
    lines = [_line(problem, given, origin) for problem in problems]
    if refusals or lines:
        raise ConfigError('\n'.join(refusals + lines))
    return config


def _line(problem: Problem, given: list[overriding.Override], origin: str) -> str:
    flags = [f'--config.{override.given}' for override in _sources(problem, given)]
    origin = f'given by {", ".join(flags)}' if flags else f'in {origin}'
    return f'{dotted(("config", *problem.path))}: {problem.sentence} ({origin})'


def _sources(problem: Problem, given) -> list[overriding.Override]:
    """The overrides a problem comes from: the last at or above its place, else those it names."""
    above = [o for o in given if o.path == problem.path[: len(o.path)]]
    if above:
        return above[-1:]
    below = [o for o in given if problem.path == o.path[: len(problem.path)]]
    return [o for o in below if _names(problem.sentence, o.path[len(problem.path) :])]


def _names(sentence: str, path) -> bool:
    """Whether a sentence speaks of the value at `path`, of something inside it or its last key."""
    words = re.findall(r'[\w.\[\]-]+', sentence)
    inside = (f'{dotted(path)}.', f'{dotted(path)}[')
    return dotted(path) in words or path[-1] in words or any(w.startswith(inside) for w in words)


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


def check_on_mesh(config: RunConfig, sizes: dict[str, int]) -> None:
    """The checks between groups once more, with the mesh of the devices that are really there.

    Raises:
        ConfigError: what does not divide, with the arithmetic.
    """
    parts = dict(config) | {'mesh': config.mesh.model_copy(update=sizes)}
    sentences = config.cross_problems(parts)
    if sentences:
        raise ConfigError('\n'.join(f'config: {sentence}' for sentence in sentences))


def to_json(config: Group) -> str:
    """Every value of the config, defaults included."""
    return json.dumps(config.model_dump(), indent=2) + '\n'


def write(config: Group, path: str | os.PathLike) -> None:
    """Writes the resolved config whole or not at all.

    Raises:
        StorageError, PermissionDeniedError: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.partial')
    try:
        with temporary.open('w') as file:
            file.write(to_json(config))
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
    return _resolve(schema, _read_json(path), [], [], [], str(path))


def _read_json(path: str | os.PathLike) -> dict:
    try:
        return json.loads(Path(path).read_text('utf-8'))
    except FileNotFoundError:
        raise MissingInputError(f'{path}: no such file') from None
    except ValueError as error:
        raise DataError(f'{path}: not a config in JSON: {error}') from None
