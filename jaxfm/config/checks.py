"""What must hold between the values of a run.

A check is given the parts of a run that it reads and a prefix, and returns the problems it finds,
each with the paths of the values that it comes from. It runs when these parts are sound, whatever
is wrong with the others. The prefix is where the parts of a phase are: () in a run without a list
of phases, else ('phases', 1); the mesh, the model and what else belongs to the run are at the root.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace

from jaxfm.config.validation import dotted, nearest, shown
from jaxfm.schema import KeyPath, Problem


@dataclasses.dataclass(frozen=True)
class Check:
    """One check, and the parts of a run that it reads: it is given these alone."""

    reads: tuple[str, ...]
    find: Callable[[SimpleNamespace, KeyPath], list[Problem]]


def reads(*names: str):
    """Makes a Check of a function that reads these parts."""
    return lambda find: Check(names, find)


def find_conflicts(parts: dict) -> list[Problem]:
    """What is wrong between the values of a run, as far as `parts` has them."""
    problems = make_checks(RUN_CHECKS, parts)
    given = {name: value for name, value in parts.items() if value is not None}
    if not given.get('phases'):
        return problems + make_checks(PHASE_CHECKS, given)
    for index, phase in enumerate(given['phases']):
        problems += make_checks(PHASE_CHECKS, given | dict(phase), ('phases', index))
    return problems


def make_checks(checks: Iterable[Check], parts: dict, prefix: KeyPath = ()) -> list[Problem]:
    """What the checks find; one that reads a part which is not there is left out."""
    problems = []
    for check in checks:
        if all(name in parts for name in check.reads):
            own = {name: parts[name] for name in check.reads}
            problems += check.find(SimpleNamespace(**own), prefix)
    return problems


def path_to(keys: str, prefix: KeyPath = ()) -> KeyPath:
    """'data.batch_size' -> ('data', 'batch_size'), behind a prefix."""
    return (*prefix, *keys.split('.'))


@reads('init_from', 'steps', 'data', 'optimizer', 'phases')
def phases_or_one(run, prefix) -> list[Problem]:
    own = {'steps': run.steps, 'data': run.data, 'optimizer': run.optimizer}
    if run.init_from and not run.phases and all(value is None for value in own.values()):
        return []  # a model to be used as it is
    if run.phases:
        given = [name for name, value in own.items() if value is not None]
        return [
            Problem(((name,), ('phases',)), f'{name} belongs into a phase, because phases is given')
            for name in given
        ]
    missing = [name for name, value in own.items() if value is None]
    return [Problem(((name,),), f'{name} is required and not given') for name in missing]


@reads('phases')
def phase_names_differ(run, prefix) -> list[Problem]:
    places = {}
    for index, phase in enumerate(run.phases):
        places.setdefault(phase.name, []).append(('phases', index, 'name'))
    return [
        Problem(tuple(places[name]), f'phases: {name} is the name of more than one phase')
        for name in sorted(places)
        if len(places[name]) > 1
    ]


@reads('phases')
def optimizer_can_be_kept(run, prefix) -> list[Problem]:
    """Moments fit the parameters and the rules that they were made for."""
    problems = []
    for index, phase in enumerate(run.phases):
        flag = ('phases', index, 'keep_optimizer')
        if not phase.keep_optimizer:
            continue
        if index == 0:
            problems.append(Problem((flag,), f'{dotted(flag)}: there is no phase before it'))
            continue
        before, after = run.phases[index - 1].optimizer, phase.optimizer
        for key in ('name', 'frozen', 'moment_dtype'):
            ours, theirs = (('phases', i, 'optimizer', key) for i in (index, index - 1))
            if getattr(before, key) != getattr(after, key):
                sentence = (
                    f'{dotted(flag)}: {dotted(ours)} is not that of the phase before: '
                    f'{shown(getattr(after, key))}, not {shown(getattr(before, key))}'
                )
                problems.append(Problem((flag, ours, theirs), sentence))
    return problems


@reads('evals', 'phases')
def evaluators_name_phases(run, prefix) -> list[Problem]:
    names = [phase.name for phase in run.phases]
    name_paths = [('phases', index, 'name') for index in range(len(names))]
    problems = []
    for name, config in run.evals.items():
        path = ('evals', name, 'phase')
        if names and not config.phase:
            sentence = (
                f'{dotted(path)} is required and not given: whose held-out documents? '
                f'it is one of {", ".join(names)}'
            )
            problems.append(Problem((path, _kind_of(name), ('phases',)), sentence))
        elif config.phase and config.phase not in names:
            hint = nearest(config.phase, names) or '; this run does not list phases'
            sentence = f'{dotted(path)}: there is no phase {config.phase}{hint}'
            problems.append(Problem((path, ('phases',), *name_paths), sentence))
    return problems


def _kind_of(evaluator: str) -> KeyPath:
    """The key without which there is no such evaluator."""
    return ('evals', evaluator, 'name')


@reads('model', 'tokenizer')
def vocabulary_fits(run, prefix) -> list[Problem]:
    # A tokenizer whose size is known only once it is built is checked then.
    size, largest = getattr(run.tokenizer, 'vocab_size', 0), run.model.vocab_size
    if size <= largest:
        return []
    sentence = (
        f'tokenizer.vocab_size {size} is more than model.vocab_size {largest}: '
        f'{size - largest} tokens would have no embedding'
    )
    # The name decides the default of the size.
    keys = ('tokenizer.name', 'tokenizer.vocab_size', 'model.vocab_size')
    return [Problem(tuple(map(path_to, keys)), sentence)]


@reads('model', 'mesh')
def model_divides(run, prefix) -> list[Problem]:
    problems = {}  # several blocks may say the same
    for name, path, size, axis in _splits(run.model):
        ways = getattr(run.mesh, axis.removeprefix('mesh.'))
        if ways != -1 and size % ways:
            sentence = f'{name} {size} cannot be split over {axis} {ways}: {_divide(size, ways)}'
            problems.setdefault(sentence, [path_to(axis)]).append(path)
    return [Problem(tuple(paths), sentence) for sentence, paths in problems.items()]


def _splits(model) -> list[tuple[str, KeyPath, int, str]]:
    """(name, path, size, axis of the mesh) of all that a mesh splits in a model."""
    blocks = [(('model', 'block'), model.block)]
    if model.segments:
        blocks = [
            (('model', 'segments', i, 'pattern', j), block)
            for i, segment in enumerate(model.segments)
            for j, block in enumerate(segment.pattern)
        ]
    splits = [
        (f'model: {key}', (*path, key), getattr(block, key), 'mesh.tensor')
        for key in ('num_heads', 'num_kv_heads', 'mlp_dim')
        for path, block in blocks
    ]
    embed_dim = path_to('model.embed_dim')
    return [*splits, (dotted(embed_dim), embed_dim, model.embed_dim, 'mesh.fsdp')]


def _divide(size: int, ways: int) -> str:
    return f'{size} = {size // ways} x {ways} + {size % ways}'


@reads('model', 'init_from', 'export')
def adapters_fit(run, prefix) -> list[Problem]:
    problems = []
    if run.model.lora and run.model.lora.path and not run.init_from:
        paths = (path_to('model.lora.path'), ('init_from',))
        sentence = 'model.lora.path is an adapter of a model: init_from must name that one'
        problems.append(Problem(paths, sentence))
    if run.export.adapters == 'peft' and not run.model.lora:
        paths = (path_to('export.adapters'), path_to('model.lora'))
        sentence = 'export.adapters is peft, but model.lora gives the model no adapters'
        problems.append(Problem(paths, sentence))
    return problems


@reads('evals', 'sampling')
def completions_fit(run, prefix) -> list[Problem]:
    length = path_to('sampling.max_length')
    wanted = {path_to('sampling.max_tokens'): run.sampling.max_tokens} | {
        ('evals', name, 'max_tokens'): getattr(config, 'max_tokens', 0)
        for name, config in run.evals.items()
    }
    return [
        Problem(
            (path, length),
            f'{dotted(path)} {tokens} leaves no room for a prompt in '
            f'{dotted(length)} {run.sampling.max_length}',
        )
        for path, tokens in wanted.items()
        if tokens >= run.sampling.max_length
    ]


@reads('evals', 'export')
def export_has_its_name(run, prefix) -> list[Problem]:
    if not run.export.every or 'export' not in run.evals:
        return []
    sentence = (
        f'evals.export has the name of the export of every export.every {run.export.every} steps, '
        'which is measured beside the evaluators: give it another one'
    )
    return [Problem((_kind_of('export'), path_to('export.every')), sentence)]


@reads('model', 'evals', 'sampling')
def nothing_is_packed(run, prefix) -> list[Problem]:
    """Held-out documents stand side by side, and samples read a cache."""
    attention = path_to('model.implementations.attention')
    samples = [path_to('sampling.num_samples')] if run.sampling.num_samples else []
    readers = [_kind_of(name) for name in run.evals] + samples
    if run.model.implementations.attention != 'cudnn' or not readers:
        return []
    sentence = (
        "model.implementations.attention 'cudnn' is right for rows of one document alone: evals "
        'pack them and samples read a cache; say evals={} and sampling.num_samples=0, or mosaic '
        'or xla'
    )
    return [Problem((attention, *readers), sentence)]


@reads('data', 'optimizer', 'mesh')
def batch_divides(run, prefix) -> list[Problem]:
    batch, accumulate = path_to('data.batch_size', prefix), path_to('optimizer.accumulate', prefix)
    size, parts = run.data.batch_size, run.optimizer.accumulate
    rows, rest = divmod(size, parts)
    if rest:
        sentence = (
            f'{dotted(batch)} {size} is not a multiple of {dotted(accumulate)} {parts}: '
            f'{_divide(size, parts)}'
        )
        return [Problem((batch, accumulate), sentence)]
    axes = {
        'mesh.replica': run.mesh.replica,
        'mesh.fsdp': run.mesh.fsdp,
        'mesh.expert': run.mesh.expert,
    }
    ways = math.prod(size for size in axes.values() if size != -1)
    if rows % ways == 0:
        return []
    sentence = (
        f'{dotted(batch)} {size} / {dotted(accumulate)} {parts} = {rows} rows cannot be split over '
        f'{" x ".join(axes)} = {ways}: {_divide(rows, ways)}'
    )
    return [Problem((batch, accumulate, *map(path_to, axes)), sentence)]


@reads('steps', 'optimizer')
def warmup_fits(run, prefix) -> list[Problem]:
    if run.steps == 0 or run.optimizer.warmup_steps <= run.steps:
        return []
    warmup, steps = path_to('optimizer.warmup_steps', prefix), path_to('steps', prefix)
    sentence = (
        f'{dotted(warmup)} {run.optimizer.warmup_steps} is more than {dotted(steps)} {run.steps}'
    )
    return [Problem((warmup, steps), sentence)]


@reads('model', 'data')
def rows_are_one_document(run, prefix) -> list[Problem]:
    if not run.model.implementations.one_document or run.data.packing == 'none':
        return []
    promise, packing = (
        path_to('model.implementations.one_document'),
        path_to('data.packing', prefix),
    )
    sentence = (
        f'{dotted(promise)} promises rows of one document, {dotted(packing)} is '
        f'{run.data.packing}: say none'
    )
    return [Problem((promise, packing), sentence)]


RUN_CHECKS = (
    phases_or_one,
    phase_names_differ,
    optimizer_can_be_kept,
    evaluators_name_phases,
    vocabulary_fits,
    model_divides,
    adapters_fit,
    completions_fit,
    export_has_its_name,
    nothing_is_packed,
)
PHASE_CHECKS = (batch_divides, warmup_fits, rows_are_one_document)
