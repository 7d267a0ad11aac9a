"""Rules that relate several values of a run's config.

A check takes the parts of a run that it reads and a prefix. It yields the problems that it finds,
each with the paths of the values that cause it. A check runs as soon as its own parts are valid,
even if other parts of the config are not. The prefix is the path of the phase: () in a run without
a list of phases, ('phases', 1) for the second phase. The mesh, the model and everything else that
belongs to the whole run are at the root.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

from jaxfm.config.validation import format_path, format_value, suggest
from jaxfm.objectives import DistillationConfig, PolicyGradientConfig, PreferenceConfig
from jaxfm.rollout import RolloutConfig, documents_of
from jaxfm.sampling import SamplingOptions
from jaxfm.schema import Group, KeyPath, Problem


@dataclasses.dataclass(frozen=True)
class Check:
    """One check, and the names of the parts that it reads. It sees no others."""

    reads: tuple[str, ...]
    find: Callable[[SimpleNamespace, KeyPath], Iterable[Problem]]


def reads(*names: str):
    """Decorator: turns a function that reads these parts into a Check."""
    return lambda find: Check(names, find)


def find_conflicts(parts: dict) -> list[Problem]:
    """Runs every check whose values are all in `parts`, and returns the problems."""
    problems = run_checks(RUN_CHECKS, parts)
    given = {name: value for name, value in parts.items() if value is not None}
    if not given.get('phases'):
        return problems + run_checks(PHASE_CHECKS, given)
    for index, phase in enumerate(given['phases']):
        problems += run_checks(PHASE_CHECKS, given | dict(phase), ('phases', index))
    return problems


def run_checks(checks: Iterable[Check], parts: dict, prefix: KeyPath = ()) -> list[Problem]:
    """The problems that the checks find; skips a check if `parts` lacks something it reads."""
    problems = []
    for check in checks:
        if all(name in parts for name in check.reads):
            own = {name: parts[name] for name in check.reads}
            problems += check.find(SimpleNamespace(**own), prefix)
    return problems


def path_to(keys: str, prefix: KeyPath = ()) -> KeyPath:
    """'data.batch_size' -> (*prefix, 'data', 'batch_size')."""
    return (*prefix, *keys.split('.'))


@reads('init_from', 'steps', 'data', 'optimizer', 'phases')
def phases_or_one(run, prefix):
    own = {'steps': run.steps, 'data': run.data, 'optimizer': run.optimizer}
    given = [name for name, value in own.items() if value is not None]
    if run.init_from and not run.phases and not given:
        return  # an existing model, to be sampled or exported rather than trained
    for name in own:
        if run.phases and name in given:
            sentence = f'{name} must be set in each phase, because this run lists phases'
            yield Problem(((name,), ('phases',)), sentence)
        elif not run.phases and name not in given:
            yield Problem(((name,),), f'{name} is required and not given')


@reads('phases')
def phase_names_differ(run, prefix):
    paths = {}
    for index, phase in enumerate(run.phases):
        paths.setdefault(phase.name, []).append(('phases', index, 'name'))
    for name in sorted(paths):
        if len(paths[name]) > 1:
            sentence = f'phases: more than one phase is named {name}'
            yield Problem(tuple(paths[name]), sentence)


@reads('phases')
def optimizer_can_be_kept(run, prefix):
    """Optimizer moments are valid only for the same parameters and the same optimizer."""
    for index, phase in enumerate(run.phases):
        flag = ('phases', index, 'keep_optimizer')
        if not phase.keep_optimizer:
            continue
        if index == 0:
            yield Problem((flag,), f'{format_path(flag)}: the first phase has no optimizer to keep')
            continue
        for key in ('name', 'frozen', 'moment_dtype'):
            ours, theirs = (getattr(run.phases[i].optimizer, key) for i in (index, index - 1))
            paths = [('phases', i, 'optimizer', key) for i in (index, index - 1)]
            if ours != theirs:
                sentence = (
                    f'{format_path(flag)} requires the same optimizer as in the phase before, but '
                    f'{format_path(paths[0])} is {format_value(ours)} and '
                    f'{format_path(paths[1])} is {format_value(theirs)}'
                )
                yield Problem((flag, *paths), sentence)


@reads('evals', 'phases')
def evaluators_name_phases(run, prefix):
    names = [phase.name for phase in run.phases]
    name_paths = [('phases', index, 'name') for index in range(len(names))]
    for name, config in run.evals.items():
        path = ('evals', name, 'phase')
        if names and not config.phase:
            sentence = (
                f'{format_path(path)} is required: it names the phase whose held-out documents are '
                f'used, one of {", ".join(names)}'
            )
            yield Problem((path, ('evals', name, 'name'), ('phases',)), sentence)
        elif config.phase and config.phase not in names:
            hint = suggest(config.phase, names) or '; this run lists no phases'
            sentence = f'{format_path(path)}: there is no phase {config.phase}{hint}'
            yield Problem((path, ('phases',), *name_paths), sentence)


@reads('evals', 'data', 'phases')
def evaluators_have_documents(run, prefix):
    if run.data or run.phases:
        return
    for path, group, _ in _readers_of_documents(run.evals):
        sentence = (
            f'{format_path(path)}: {group.name} needs held-out documents, but this config has no '
            'data; use it with the config of a run that has, such as configs/sft.py'
        )
        yield Problem((path, ('data',)), sentence)


def _readers_of_documents(evals: dict) -> Iterator[tuple[KeyPath, Group, str]]:
    """(path of the name, group, phase) of evaluators and tasks that need held-out documents."""
    for name, config in evals.items():
        groups = {('name',): config, ('task', 'name'): getattr(config, 'task', None)}
        for keys, group in groups.items():
            if getattr(group, 'reads_documents', False):
                yield ('evals', name, *keys), group, config.phase


@reads('evals', 'data', 'phases')
def evaluators_have_heldout_documents(run, prefix):
    """A phase that samples its batches holds no documents out."""
    places = {phase.name: ('phases', index) for index, phase in enumerate(run.phases)}
    for path, group, name in _readers_of_documents(run.evals):
        phase = places.get(name, ())
        data = run.phases[phase[1]].data if phase else run.data
        if data is not None and documents_of(data) is None:
            place = path_to('data.name', phase)
            sentence = (
                f'{format_path(path)}: {group.name} needs held-out documents, but '
                f'{format_path(place)} is rollout, which holds none out'
            )
            yield Problem((path, place), sentence)


@reads('data', 'objective')
def objective_fits_data(run, prefix):
    """Rewards need an objective that reads them, and that one needs rewards."""
    is_rollout, data = isinstance(run.data, RolloutConfig), path_to('data.name', prefix)
    objective = path_to('objective.name', prefix)
    is_policy_gradient = isinstance(run.objective, PolicyGradientConfig)
    if is_rollout and not isinstance(run.objective, PolicyGradientConfig | DistillationConfig):
        sentence = (
            f'{format_path(data)} is {run.data.name}, whose batches have rewards: set '
            f'{format_path(objective)}=grpo, another policy gradient, or distillation'
        )
        yield Problem((data, objective), sentence)
    if is_policy_gradient and documents_of(run.data) is not None:
        sentence = (
            f'{format_path(objective)} {run.objective.name} needs rewards: set '
            f'{format_path(data)}=rollout'
        )
        yield Problem((data, objective), sentence)
    if isinstance(run.objective, PreferenceConfig):
        yield from _pairs_are_cached(run, prefix)
    if not (is_rollout and is_policy_gradient):
        return
    if documents_of(run.data) is not None:
        return
    parts = {run.objective.baseline, run.objective.scale}
    samples, prompts = path_to('data.samples', prefix), path_to('data.prompts', prefix)
    if run.data.samples == 1 and parts & {'group', 'leave_one_out'}:
        sentence = (
            f'{format_path(samples)} is 1, but {format_path(objective)} {run.objective.name} '
            'compares the samples of a prompt: it needs at least 2'
        )
        yield Problem((samples, objective), sentence)
    elif run.data.samples * run.data.prompts == 1 and 'batch' in parts:
        sentence = (
            f'{format_path(prompts)} x {format_path(samples)} is 1, but {format_path(objective)} '
            f'{run.objective.name} compares the samples of a step: it needs at least 2'
        )
        yield Problem((prompts, samples, objective), sentence)


def _pairs_are_cached(run, prefix):
    """Preferences are learned from records that are packed before training."""
    paths = path_to('objective.name', prefix), path_to('data.name', prefix)
    names = [format_path(path) for path in paths]
    if not isinstance(run.data, RolloutConfig) and run.data.tokenize == 'on_the_fly':
        tokenize = path_to('data.tokenize', prefix)
        sentence = (
            f'{names[0]} {run.objective.name} reads pairs, which are packed before training: set '
            f'{format_path(tokenize)}=cached'
        )
        yield Problem((tokenize, paths[0]), sentence)
    if run.objective.loss == 'kto' and getattr(run.data, 'packing', '') == 'none':
        packing = path_to('data.packing', prefix)
        sentence = (
            f'{format_path(packing)} none: {names[0]} {run.objective.name} estimates a divergence '
            'from the answers to other prompts of a row, and a row would have one prompt: set '
            f'{format_path(packing)}=best_fit'
        )
        yield Problem((packing, paths[0]), sentence)


@reads('data', 'objective')
def staleness_is_corrected(run, prefix):
    """Recomputed log-probs are of the newest weights, older ones have sampled."""
    if not isinstance(run.objective, PolicyGradientConfig):
        return
    is_ignored = run.objective.old_logprobs == 'recomputed' and run.objective.importance == 'none'
    if getattr(run.data, 'max_staleness', 0) and is_ignored:
        keys = ('data.max_staleness', 'objective.old_logprobs', 'objective.importance')
        staleness, old, importance = paths = tuple(path_to(key, prefix) for key in keys)
        sentence = (
            f'{format_path(staleness)} {run.data.max_staleness}: with {format_path(old)} '
            'recomputed, the ratio does not see that older weights have sampled: set '
            f'{format_path(importance)}=truncate or mask, or {format_path(old)}=sampler'
        )
        yield Problem(paths, sentence)


@reads('data', 'sampling')
def rollouts_fit(run, prefix):
    if isinstance(run.data, RolloutConfig):
        path = path_to('data.max_tokens', prefix)
        yield from _completion_fits(path, run.data.max_tokens, run.sampling.max_length)


@reads('data', 'objective')
def rewards_are_read(run, prefix):
    """Distillation does not learn from rewards, so what changes only them would do nothing."""
    is_distillation = isinstance(run.objective, DistillationConfig)
    if is_distillation and getattr(run.data, 'overlong_penalty', 0):
        path, name = path_to('data.overlong_penalty', prefix), path_to('objective.name', prefix)
        sentence = (
            f'{format_path(path)} would do nothing: {format_path(name)} {run.objective.name} '
            'does not learn from rewards'
        )
        yield Problem((path, name), sentence)


@reads('model', 'objective')
def top_k_is_a_part(run, prefix):
    top_k = getattr(run.objective, 'top_k', 0)
    if isinstance(run.objective, DistillationConfig) and top_k >= run.model.vocab_size:
        path, size = path_to('objective.top_k', prefix), path_to('model.vocab_size')
        sentence = (
            f'{format_path(path)} {top_k} is not less than {format_path(size)} '
            f'{run.model.vocab_size}: set it to 0, which compares all ids'
        )
        yield Problem((path, size), sentence)


@reads('data', 'optimizer', 'objective')
def losses_can_be_judged(run, prefix):
    policy = run.optimizer.spikes.policy
    if isinstance(run.objective, PolicyGradientConfig) and policy in ('skip', 'rewind'):
        path, data = path_to('optimizer.spikes.policy', prefix), path_to('data.name', prefix)
        sentence = (
            f'{format_path(path)} {policy}: the loss of a policy gradient does not measure the '
            f'weights, so with {format_path(data)} rollout none is judged; set it to off'
        )
        yield Problem((path, data), sentence)


@reads('tokenizer', 'data')
def tokenizer_has_text(run, prefix):
    is_first = prefix in ((), ('phases', 0))
    if is_first and isinstance(run.data, RolloutConfig) and run.tokenizer.name == 'bpe':
        data, tokenizer = path_to('data.name', prefix), path_to('tokenizer.name')
        sentence = (
            f'{format_path(tokenizer)} bpe is trained on the data of the first phase, but '
            f'{format_path(data)} is {run.data.name}: start from a model (init_from), whose '
            'tokenizer is used, or name another tokenizer'
        )
        yield Problem((tokenizer, data), sentence)


@reads('model', 'tokenizer')
def vocabulary_fits(run, prefix):
    # Some tokenizers have a known size only once they are built; `run/data.py` checks those.
    size, largest = getattr(run.tokenizer, 'vocab_size', 0), run.model.vocab_size
    if size > largest:
        sentence = (
            f'tokenizer.vocab_size {size} is more than model.vocab_size {largest}: '
            f'{size - largest} tokens would have no embedding'
        )
        # tokenizer.name is listed because it determines the default of tokenizer.vocab_size.
        keys = ('tokenizer.name', 'tokenizer.vocab_size', 'model.vocab_size')
        yield Problem(tuple(map(path_to, keys)), sentence)


@reads('model', 'mesh')
def model_divides(run, prefix):
    problems = {}  # several blocks may have the same problem
    for name, path, size, axis in _list_splits(run.model):
        ways = getattr(run.mesh, axis.removeprefix('mesh.'))
        if ways != -1 and size % ways:
            sentence = f'{name} {size} cannot be split over {axis} {ways}: {_divide(size, ways)}'
            problems.setdefault(sentence, [path_to(axis)]).append(path)
    for sentence, paths in problems.items():
        yield Problem(tuple(paths), sentence)


def _list_splits(model) -> list[tuple[str, KeyPath, int, str]]:
    """(name, path, size, mesh axis) of every dimension of the model that a mesh splits."""
    blocks = {
        ('model', 'segments', i, 'pattern', j): block
        for i, segment in enumerate(model.segments)
        for j, block in enumerate(segment.pattern)
    }
    splits = [
        (f'model: {key}', (*path, key), getattr(block, key), 'mesh.tensor')
        for key in ('num_heads', 'num_kv_heads', 'mlp_dim')
        for path, block in (blocks or {('model', 'block'): model.block}).items()
    ]
    return [*splits, ('model.embed_dim', ('model', 'embed_dim'), model.embed_dim, 'mesh.fsdp')]


def _divide(size: int, ways: int) -> str:
    return f'{size} = {size // ways} x {ways} + {size % ways}'


@reads('model', 'init_from', 'export')
def adapters_fit(run, prefix):
    if run.model.lora and run.model.lora.path and not run.init_from:
        sentence = 'model.lora.path is an adapter: init_from must name the model it belongs to'
        yield Problem((path_to('model.lora.path'), ('init_from',)), sentence)
    if run.export.adapters == 'peft' and not run.model.lora:
        sentence = 'export.adapters is peft, but the model has no adapters: set model.lora'
        yield Problem((path_to('export.adapters'), path_to('model.lora')), sentence)


@reads('init_from', 'init_names', 'init_ignore')
def names_have_a_checkpoint(run, prefix):
    for key in ('init_names', 'init_ignore'):
        if getattr(run, key) and not run.init_from:
            sentence = f'{key} names arrays of a checkpoint: init_from must say where it is'
            yield Problem(((key,), ('init_from',)), sentence)


@reads('evals', 'sampling')
def completions_fit(run, prefix):
    longest = run.sampling.max_length
    wanted = {path_to('sampling.max_tokens'): run.sampling.max_tokens} | {
        ('evals', name, 'max_tokens'): getattr(config, 'max_tokens', 0)
        for name, config in run.evals.items()
        # The evaluator checks the length that a strategy has instead.
        if getattr(getattr(config, 'strategy', None), 'reads_max_tokens', True)
    }
    for path, tokens in wanted.items():
        yield from _completion_fits(path, tokens, longest)


def _completion_fits(path: KeyPath, tokens: int, longest: int) -> Iterator[Problem]:
    if tokens >= longest:
        room = path_to('sampling.max_length')
        sentence = (
            f'{format_path(path)} {tokens} must be less than {format_path(room)} {longest}, '
            'which includes the prompt'
        )
        yield Problem((path, room), sentence)


@reads('model', 'evals', 'sampling')
def sampled_ids_exist(run, prefix):
    size, groups = run.model.vocab_size, {('sampling',): run.sampling}
    groups |= {('evals', name): config for name, config in run.evals.items()}
    for place, group in groups.items():
        if not isinstance(group, SamplingOptions):
            continue
        for key in ('allowed_ids', 'logit_bias'):
            largest, path = max(getattr(group, key) or (), default=0), (*place, key)
            if largest >= size:
                sentence = (
                    f'{format_path(path)}: token id {largest} does not exist, because '
                    f'model.vocab_size is {size}'
                )
                yield Problem((path, path_to('model.vocab_size')), sentence)


@reads('evals', 'export')
def export_has_its_name(run, prefix):
    if run.export.every and 'export' in run.evals:
        sentence = (
            f'evals.export: with export.every {run.export.every} this name is taken by the '
            'periodic export; rename the evaluator'
        )
        yield Problem((path_to('evals.export.name'), path_to('export.every')), sentence)


@reads('model', 'evals', 'sampling')
def nothing_is_packed(run, prefix):
    """cuDNN attention supports neither packed held-out rows nor a KV cache."""
    readers = [('evals', name, 'name') for name in run.evals]
    if run.sampling.num_samples:
        readers.append(path_to('sampling.num_samples'))
    if readers and run.model.implementations.attention == 'cudnn':
        sentence = (
            "model.implementations.attention 'cudnn' supports only rows of one document, but evals "
            'pack several into a row and sampling uses a KV cache; set evals={} and '
            'sampling.num_samples=0, or use mosaic or xla'
        )
        yield Problem((path_to('model.implementations.attention'), *readers), sentence)


@reads('data', 'optimizer', 'mesh')
def batch_divides(run, prefix):
    batch, accumulate = path_to('data.batch_size', prefix), path_to('optimizer.accumulate', prefix)
    size, parts = run.data.batch_size, run.optimizer.accumulate
    axes = ('mesh.replica', 'mesh.fsdp', 'mesh.expert')
    mesh = [run.mesh.replica, run.mesh.fsdp, run.mesh.expert]
    rows, ways = size // parts, math.prod(number for number in mesh if number != -1)
    if size % parts:
        sentence = (
            f'{format_path(batch)} {size} is not a multiple of {format_path(accumulate)} {parts}: '
            f'{_divide(size, parts)}'
        )
        yield Problem((batch, accumulate), sentence)
    elif rows % ways:
        sentence = (
            f'{format_path(batch)} {size} / {format_path(accumulate)} {parts} = {rows} rows '
            f'cannot be split over {" x ".join(axes)} = {ways}: {_divide(rows, ways)}'
        )
        yield Problem((batch, accumulate, *map(path_to, axes)), sentence)


@reads('steps', 'optimizer')
def warmup_fits(run, prefix):
    if run.steps != 0 and run.optimizer.warmup_steps > run.steps:
        warmup, steps = path_to('optimizer.warmup_steps', prefix), path_to('steps', prefix)
        sentence = (
            f'{format_path(warmup)} {run.optimizer.warmup_steps} is more than '
            f'{format_path(steps)} {run.steps}'
        )
        yield Problem((warmup, steps), sentence)


@reads('model', 'data')
def rows_are_one_document(run, prefix):
    documents = getattr(run.data, 'off_policy', None)
    for key, data in {'data.packing': run.data, 'data.off_policy.packing': documents}.items():
        if run.model.implementations.one_document and data and data.packing != 'none':
            packing = path_to(key, prefix)
            sentence = (
                'model.implementations.one_document requires rows of one document, but '
                f'{format_path(packing)} is {data.packing}: set it to none'
            )
            yield Problem((path_to('model.implementations.one_document'), packing), sentence)


RUN_CHECKS = (
    phases_or_one,
    phase_names_differ,
    optimizer_can_be_kept,
    evaluators_name_phases,
    evaluators_have_documents,
    evaluators_have_heldout_documents,
    vocabulary_fits,
    model_divides,
    adapters_fit,
    names_have_a_checkpoint,
    completions_fit,
    sampled_ids_exist,
    export_has_its_name,
    nothing_is_packed,
)
PHASE_CHECKS = (
    batch_divides,
    warmup_fits,
    rows_are_one_document,
    objective_fits_data,
    staleness_is_corrected,
    rewards_are_read,
    top_k_is_a_part,
    rollouts_fit,
    losses_can_be_judged,
    tokenizer_has_text,
)
