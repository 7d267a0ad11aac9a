"""Another model beside the run's own: the teacher of distillation, or the reference of preferences.

Its architecture is its own; how it is computed (dtypes, implementations, scan) is the run's. A
checkpoint records which weights it has, so that a run that resumes has the same.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path

import jax

from jaxfm import sharding
from jaxfm.checkpoint.fingerprint import fingerprints
from jaxfm.checkpoint.reader import Reader
from jaxfm.config.inherit import NOT_INHERITED, describe_model
from jaxfm.config.load import read_config
from jaxfm.config.run import OriginConfig
from jaxfm.errors import ConfigError, DataError, MissingInputError, RunError
from jaxfm.models import MODELS, TransformerConfig
from jaxfm.models.implementations import choices
from jaxfm.models.transformer import compute_dtype
from jaxfm.objectives import LoadReference
from jaxfm.pretrained import locate
from jaxfm.pretrained.load import check_layout, load_params
from jaxfm.pretrained.source import Pretrained
from jaxfm.run.data import check_vocabulary
from jaxfm.run.phase import Phase
from jaxfm.run.run import Run, model_maker
from jaxfm.run.weights import first_weights, params_of_run
from jaxfm.state import Parts, abstract_params, split
from jaxfm.tokenizer.build import load_tokenizer
from jaxfm.tokenizer.compare import describe_difference
from jaxfm.tokenizer.kinds import Tokenizer

log = logging.getLogger('jaxfm')


@dataclasses.dataclass
class OtherModel:
    """A model that fits the devices and the tokenizer; its weights are not loaded yet.

    Attributes:
      place: how the config names it.
      config: its architecture, without adapters: those of its run are merged into the weights.
      origin: which weights exactly, as JSON; None until they have been loaded.
    """

    place: str
    config: TransformerConfig
    parts: Parts
    where: str  # the config key that names it, for messages
    pretrained: Pretrained | None = None  # None: it is the work directory of a run
    origin: dict | None = None

    def load(self, recorded: dict | None = None) -> dict[str, jax.Array]:
        """The weights, sharded like stored ones; matrices have the compute dtype.

        They are cast to it at each use anyway. Needs a current mesh.

        Args:
          recorded: an earlier `origin`; the weights must be the same if the config still names the
            same place. Of a run without it, they are the newest.

        Raises:
          MissingInputError, DataError: the weights are no longer there, or are others now.
        """
        same = recorded if recorded and recorded['place'] == self.place else None
        step = same['step'] if same else None
        directory = Path(self.place).expanduser()
        if self.pretrained is None:
            if step is not None and step not in _checkpoints(directory).steps():
                raise MissingInputError(
                    f'{self.where}: {directory} has no checkpoint {step} any more, with which this '
                    f'run began: restore it, or {_how_to_change(self.where)}'
                )
            params, step, _ = params_of_run(directory, self.config, step)
        else:
            axes, shapes = self.parts.axes, self.parts.shapes
            params = load_params(self.pretrained, self.config, axes, shapes)
            log.info('loaded weights from %s', self.pretrained.path)
        self.origin = {'place': self.place, 'step': step, 'digest': _digest(params)}
        if same and self.origin['digest'] != same['digest']:
            raise DataError(
                f'{self.where}: {self.place} has other weights than when this run began: put back '
                f'what was there, or {_how_to_change(self.where)}'
            )
        return _keep(params, self.parts, self.config)

    def abstract_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of what `load` returns. Needs a current mesh."""
        dtype = compute_dtype(self.config)
        return {
            path: leaf.update(dtype=dtype) if _is_cast(self.parts.axes[path]) else leaf
            for path, leaf in abstract_params(self.parts).items()
        }


def open_other(run: Run, place: str, tokenizer: Tokenizer, where: str) -> OtherModel:
    """The model of any architecture at a place, checked for this run; its weights are not read.

    Args:
      place: named as `init_from` names a model, but not weights without a config.
      tokenizer: that of the run, which must give the same ids as the model's.
      where: the config key that names it, for messages.

    Raises:
      MissingInputError, DataError, ConfigError: it is not there, is damaged, has another tokenizer,
        or does not fit the mesh.
    """
    try:
        directory = Path(place).expanduser()
        if directory.absolute() == run.workdir.absolute():
            raise ConfigError(f'{place} is this run itself: name another model')
        values = describe_model(place)
        if not values:
            raise ConfigError(f'{place} has weights, but not the shape of their model')
        config = _computed_as(values['model'], run.config.model)
        parts = split(model_maker(config))
        sharding.check_weights(_sizes(parts), parts.axes, run.mesh)
        choices(config, run.mesh)
        _check_tokenizer(place, values.get('tokenizer'), tokenizer)
        check_vocabulary(tokenizer, config.vocab_size, f'the vocabulary of {place}')
        pretrained = None
        if locate.is_run(directory):
            if _checkpoints(directory).latest_step() is None:
                raise MissingInputError(f'{directory} holds no checkpoint yet: train it first')
        else:
            pretrained = locate.open_pretrained(place)
            check_layout(pretrained, config, parts.axes, parts.shapes)
    except RunError as error:
        raise type(error)(f'{where}: {error}') from error
    return OtherModel(place, config, parts, where, pretrained)


def open_teachers(run: Run, tokenizer: Tokenizer) -> None:
    """Gives every phase whose objective has a teacher that model, without its weights."""
    for phase in run.phases:
        if phase.has_teacher:
            name, where = phase.config.objective.teacher, f'{phase.where}.objective.teacher'
            phase.teacher = open_other(run, name, tokenizer, where)


def open_reference(
    run: Run, phase: Phase, tokenizer: Tokenizer
) -> tuple[LoadReference, Parts | None]:
    """What loads the reference of a phase that learns from preferences.

    Also the structure of its model, if that is another model.
    """
    objective = phase.config.objective
    if not objective.names_reference:
        return functools.partial(first_weights, run, phase), None
    where = f'{phase.where}.objective.reference'
    other = open_other(run, objective.reference, tokenizer, where)

    def load(origin: dict | None) -> tuple[dict, dict | None]:
        params = other.load(origin)
        return params, other.origin

    return load, other.parts


def load_teacher(run: Run, phase: Phase, manifest: dict | None = None) -> None:
    """Loads the weights of a phase's teacher, if it has one and they are not there yet.

    manifest: of the checkpoint at which the phase resumes.
    """
    if phase.teacher is None or phase.teacher_params is not None:
        return
    recorded = (manifest or {}).get('others', {}).get(phase.name)
    phase.teacher_params = phase.teacher.load(recorded)
    run.others[phase.name] = phase.teacher.origin


def _computed_as(theirs: dict, ours: TransformerConfig) -> TransformerConfig:
    """The config of an architecture that is computed like the run's own model."""
    kept = {key: getattr(ours, key) for key in NOT_INHERITED if key != 'name'}
    inherited = {key: value for key, value in theirs.items() if key not in kept}
    # Nothing is trained: adapters are merged, nothing is recomputed.
    values = {'name': ours.name} | inherited | kept
    values |= {'lora': None, 'matmul_dtype': 'compute', 'remat': 'none'}
    return MODELS.find(values['name']).schema.model_validate(values)


def _sizes(parts: Parts) -> dict[str, tuple]:
    return {path: leaf.shape for path, leaf in parts.shapes.items()}


def _check_tokenizer(place: str, values: dict | None, ours: Tokenizer) -> None:
    if values is None:
        raise MissingInputError(
            f'{place} comes without a tokenizer, so nothing says that its ids are those of this '
            'run: put its tokenizer beside it'
        )
    if difference := describe_difference(ours, load_tokenizer(values['path'])):
        raise DataError(
            f'{place} has another tokenizer than this run: {difference}; name a model with the '
            'same one'
        )


def _checkpoints(directory: Path) -> Reader:
    theirs = read_config(directory / 'config.json', OriginConfig)
    return Reader(theirs.checkpoint, directory / 'checkpoints')


def _how_to_change(where: str) -> str:
    group = where.removeprefix('config.').partition('[')[0].partition('.')[0]
    return f'name another model with --allow_change={group}'


def _digest(params: dict[str, jax.Array]) -> str:
    prints = json.dumps(fingerprints(params), sort_keys=True)
    return hashlib.sha256(prints.encode()).hexdigest()[:16]


def _keep(params: dict, parts: Parts, config: TransformerConfig) -> dict[str, jax.Array]:
    """The same weights, with matrices in the compute dtype. The arrays are donated."""
    dtype = compute_dtype(config)
    cast = {path for path in params if _is_cast(parts.axes[path]) and params[path].dtype != dtype}
    if not cast:
        return params
    # One by one, so that there is never a second copy of the model.
    narrow = jax.jit(lambda weight: weight.astype(dtype))
    for path in sorted(cast):
        params[path] = narrow(params[path])
        params[path].block_until_ready()
    return params


def _is_cast(axes: tuple[str, ...]) -> bool:
    """Whether the model casts such a weight for use (`sharding.gather`)."""
    return len([name for name in axes if name != 'layers']) > 1
