"""A run's weights: fresh, from a checkpoint, an earlier run or a pretrained model; their export."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from jaxfm.chat.render import Chat
from jaxfm.checkpoint.base import LoadBase
from jaxfm.checkpoint.reader import Reader
from jaxfm.config.load import read_config
from jaxfm.config.run import OriginConfig, RunConfig
from jaxfm.errors import MissingInputError
from jaxfm.evals.export import PeriodicExport
from jaxfm.models import TransformerConfig, lora
from jaxfm.pretrained import locate
from jaxfm.pretrained.huggingface.adapters import AdapterExporter, load_adapters
from jaxfm.pretrained.huggingface.export import Exporter
from jaxfm.pretrained.orbax.load import Foreign
from jaxfm.run.phase import Phase
from jaxfm.run.run import Outside, Run, load_outside, model_maker, open_outside
from jaxfm.state import Parts, TrainState, abstract_params, fresh_params, split
from jaxfm.storage import open_storage
from jaxfm.tokenizer.kinds import Tokenizer

log = logging.getLogger('jaxfm')

_OF_MODEL = ('*.safetensors', '*.gguf', 'config.json', 'adapter_config.json')


def current_params(run: Run) -> tuple[dict, int | None]:
    """The newest weights of a run and their step.

    For a run that has not begun but names `init_from`: the weights it would start from, and None.

    Raises:
      MissingInputError: there is no checkpoint yet.
    """
    if run.has_begun or not run.config.init_from:
        return _restore_params(run.reader(), run.parts, base_loader(run))
    return _earlier_params(run), None


def identify_params(run: Run, step: int) -> str:
    """A digest that tells the weights of `current_params` from others, without reading them.

    Of a run, this one or the one that `init_from` names, it is that of the verified manifest. Of a
    model from outside it is that of the names, sizes and times of its files, so a copy that does
    not keep the times counts as another model.
    """
    config, lora_config = run.config, run.config.model.lora
    directory = Path(config.init_from).expanduser()
    if run.has_begun:
        known = [run.reader().read_manifest(step)]
    elif locate.is_run(directory):
        earlier = read_config(directory / 'config.json', OriginConfig)
        reader = Reader(earlier.checkpoint, directory / 'checkpoints')
        known = [reader.newest_whole(reader.read_manifest)]
    elif isinstance(run.outside, Foreign):
        stored = open_storage(run.outside.path).list()
        known = sorted((name, each.size, each.modified) for name, each in stored.items())
    else:
        known = _list_files(run.outside.path)
    if lora_config and lora_config.path and not run.has_begun:
        known += _list_files(Path(lora_config.path).expanduser())
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _list_files(path: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time) of a file, or of those in a directory that make up a model."""
    files = [path]
    if path.is_dir():
        files = sorted(each for pattern in _OF_MODEL for each in path.glob(pattern))
    stats = [(file.name, file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def initial_state(run: Run) -> TrainState:
    """The state at step 0, with fresh weights or with those of `init_from`."""
    first = run.phases[0]
    return first.begin(_earlier_params(run)) if run.config.init_from else first.init_state()


def first_weights(run: Run, phase: Phase, origin: dict | None) -> tuple[dict, dict | None]:
    """The weights with which a phase begins, the reference of its objective, and their origin.

    Args:
      origin: what an earlier call returned, so that a run that resumes has the same reference,
        even if the run that `init_from` names has gone on.

    Raises:
      MissingInputError: they are those of a checkpoint that is no longer there.
    """
    if phase.first == 0 and run.config.init_from:
        origin = origin or run.origin
        params, _, found = _origin_params(run, _Origin(**origin) if origin else run.config)
        if origin and found.step != origin['step']:
            raise MissingInputError(
                f'{found.init_from} has no checkpoint {origin["step"]}, whose weights are the '
                'reference of this run: restore it, or start a new run in another --workdir'
            )
        return params, dataclasses.asdict(found)
    if phase.first == 0:
        paths = run.parts.shapes
        return fresh_params(run.make_model, run.parts, run.phases[0].seed, paths), None
    checkpoints = run.reader()
    if phase.first not in checkpoints.steps():
        remedy = "objective.reference='none'" if phase.is_preference else 'objective.kl=0'
        raise MissingInputError(
            f'{checkpoints.root} has no checkpoint {phase.first}, whose weights are the reference '
            f'of phase {phase.name}: restore it, or set {remedy}'
        )
    return _restore_params(checkpoints, run.parts, base_loader(run), phase.first)[0], None


def base_loader(run: Run) -> LoadBase:
    """Loads the weights that the run's adapters belong to; see `jaxfm.checkpoint.base`."""

    def load(manifest: dict) -> dict:
        params, origin = _load_base(manifest, run.config, run.config.model)
        run.base.origin = dataclasses.asdict(origin)
        return params

    return load


def make_exporter(run: Run, tokenizer: Tokenizer) -> Exporter:
    """An exporter that writes the run's weights in a format that other libraries read."""
    config, parts = run.config, run.parts
    stop_ids = Chat(tokenizer).stop_ids | set(config.sampling.stop_ids)
    arguments = (config.export, config.model, parts.axes, parts.shapes, tokenizer, stop_ids)
    if config.export.adapters == 'peft':
        return AdapterExporter(*arguments, base=_base_of(config.init_from))
    return Exporter(*arguments)


def periodic_exports(run: Run, tokenizer: Tokenizer) -> dict[str, PeriodicExport]:
    """{'export': an evaluator that exports every `export.every` steps}; {} if that is 0."""
    every = run.config.export.every
    if not every:
        return {}
    exporter = make_exporter(run, tokenizer)
    return {'export': PeriodicExport(every, exporter, run.workdir / 'export')}


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where weights come from, as a manifest records it: a run at a step, or another model."""

    init_from: str
    step: int | None = None
    init_names: dict[str, str] = dataclasses.field(default_factory=dict)
    init_ignore: list[str] = dataclasses.field(default_factory=list)


def _restore_params(
    checkpoints: Reader, parts: Parts, load_base: LoadBase, at: int | None = None, paths=None
) -> tuple[dict, int]:
    """The weights of the newest complete checkpoint, without the optimizer state, and its step.

    parts: the structure of the model in the checkpoint. load_base: as in `Reader.restore`. at: the
    step to take if it is there. paths: of the weights; None is all.
    """
    wanted = abstract_params(parts)
    wanted = {path: leaf for path, leaf in wanted.items() if paths is None or path in paths}
    restored = checkpoints.newest_whole(
        lambda step: (checkpoints.restore_params(step, wanted, load_base), step),
        at if at in checkpoints.steps() else None,
    )
    if restored is None:
        raise MissingInputError(f'{checkpoints.root} holds no checkpoint yet: train first')
    return restored


def _earlier_params(run: Run) -> dict:
    """The weights that `init_from` names, from an earlier run or a pretrained model.

    If they lack the adapters that this run's model has, those come from `model.lora.path`, or are
    fresh.
    """
    params, origin, place = _origin_params(run, run.config)
    run.base.origin, run.origin = dataclasses.asdict(origin), dataclasses.asdict(place)
    if run.base.names:
        log.info('checkpoints hold only the adapters: %s must stay as it is', origin.init_from)
    return params


def _origin_params(run: Run, config: RunConfig | _Origin) -> tuple[dict, _Origin, _Origin]:
    """The weights that a run begins with, adapters included, and where to find them again."""
    adapters, model = run.parts.adapters, run.config.model
    params, *places = _params_of(config, model, lambda: run.outside)
    if not adapters <= params.keys():
        if model.lora.path:
            params |= load_adapters(model, run.parts.axes, run.parts.shapes)
        else:
            params |= fresh_params(run.make_model, run.parts, run.config.seed, adapters)
    return params, *places


def _load_base(
    manifest: dict, config: RunConfig | OriginConfig, model: TransformerConfig
) -> tuple[dict, _Origin]:
    """The weights that a step of a run with this config left out, and where they are now."""
    origin = _Origin(**manifest['base']['origin'])
    recorded = manifest.get('config', {}).get('init_from', config.init_from)
    if config.init_from != recorded:  # the user says that they have moved
        names = dict(config.init_names), list(config.init_ignore)
        origin = _Origin(config.init_from, origin.step, *names)
    return _params_of(origin, model, lambda: open_outside(origin), is_base=True)[:2]


def _params_of(
    config: RunConfig | OriginConfig | _Origin,
    model: TransformerConfig,
    outside: Callable[[], Outside],
    is_base: bool = False,
) -> tuple[dict, _Origin, _Origin]:
    """The weights that `init_from` names, for a model of this config, and where to find them again.

    Those of a run with adapters include these if `model` has adapters; otherwise they are merged
    into the weights. In the first place are the weights without adapters, in the second all.

    outside: opens what `init_from` names; not called if that is a run. is_base: the weights that
    adapters belong to, without any adapter.
    """
    directory = Path(config.init_from).expanduser()
    if not locate.is_run(directory):
        opened = outside()
        params = load_outside(opened, model, split(model_maker(model)))
        log.info('loaded weights from %s', opened.path)
        place = str(directory.absolute()) if directory.exists() else config.init_from
        origin = _Origin(place, None, dict(config.init_names), list(config.init_ignore))
        return params, origin, origin
    params, step, manifest = params_of_run(directory, model, getattr(config, 'step', None), is_base)
    base, place = manifest.get('base'), _Origin(str(directory.absolute()), step)
    return params, _Origin(**base['origin']) if base else place, place


def params_of_run(
    directory: Path, model: TransformerConfig, at: int | None = None, is_base: bool = False
) -> tuple[dict, int, dict]:
    """-> the weights of another run, for a model of this config, their step, and its manifest.

    Those of a run with adapters include these if `model` has adapters; otherwise they are merged
    into the weights.

    at: the step to take if it is there, instead of the newest. is_base: as in `_params_of`.
    """
    earlier = read_config(directory / 'config.json', OriginConfig)
    theirs = model.model_copy(update={'lora': earlier.model.lora})
    parts = split(model_maker(theirs))
    checkpoints = Reader(earlier.checkpoint, directory / 'checkpoints')
    params, step = _restore_params(
        checkpoints,
        parts,
        lambda manifest: _load_base(manifest, earlier, theirs)[0],
        at,
        parts.base_axes if is_base else None,
    )
    log.info('loaded weights from %s at step %d', directory, step)
    is_merged = theirs.lora and not model.lora and not is_base
    params = lora.merge(params, theirs) if is_merged else params
    return params, step, checkpoints.read_manifest(step)


def _base_of(init_from: str) -> str:
    """The base model of a run's adapters, found through the chain of runs that trained them."""
    while init_from and locate.is_run(Path(init_from)):
        earlier = read_config(Path(init_from) / 'config.json', OriginConfig)
        if earlier.model.lora is None:
            break
        init_from = earlier.init_from
    return init_from
