"""A run: a resolved config, a work directory, and the parts that are built from them."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from jaxfm import process, sharding
from jaxfm.chat.render import Chat
from jaxfm.checkpoint.base import Base
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.reader import Reader
from jaxfm.config.load import format_config
from jaxfm.config.run import OriginConfig, RunConfig, check_on_mesh
from jaxfm.distributed import agree
from jaxfm.distributed.join import initialize, provide_threads
from jaxfm.errors import ConfigError
from jaxfm.evals import EVALUATORS
from jaxfm.evals.base import Context
from jaxfm.models import MODELS, TransformerConfig
from jaxfm.models.implementations import (
    check_batch_invariant,
    check_matmuls,
    choices,
)
from jaxfm.plan.flops import forward_flops
from jaxfm.pretrained import locate
from jaxfm.pretrained.load import check_layout, load_params
from jaxfm.pretrained.orbax.directory import find_tree
from jaxfm.pretrained.orbax.load import Foreign
from jaxfm.pretrained.source import Pretrained
from jaxfm.run.cache import cache_directory, keep_compiled_programs
from jaxfm.run.data import RunData
from jaxfm.run.phase import Phase, make_phases, phase_at
from jaxfm.sampling.engine import Sampler
from jaxfm.state import Parts, split
from jaxfm.tokenizer.kinds import Tokenizer

Outside = Pretrained | Foreign


@dataclasses.dataclass
class Run:
    """The parts of a run that every mode needs.

    Raises ConfigError when built if the config does not fit the devices or the model.
    """

    config: RunConfig
    workdir: Path

    def __post_init__(self):
        config = self.config
        sizes = sharding.mesh_shape(dict(config.mesh), jax.device_count())
        check_on_mesh(config, sizes)
        self.mesh = sharding.make_mesh(sizes)
        check_matmuls(config.model, self.mesh)
        check_batch_invariant(config.model, self.mesh)
        choices(config.model, self.mesh)  # raises if a chosen implementation cannot run here
        self.primary = agree.is_primary()
        _check_code(config)
        self.make_model = model_maker(config.model)
        self.phases = make_phases(config, self.make_model, self.mesh)
        self.parts = self.phases[0].parts if self.phases else split(self.make_model)
        shapes = {path: leaf.shape for path, leaf in self.parts.shapes.items()}
        sharding.check_weights(shapes, self.parts.axes, self.mesh)
        # {name of a phase: which weights its other model has}, which checkpoints record.
        self.others: dict[str, dict] = {}
        self.has_begun = agree.from_primary((self.workdir / 'config.json').exists)
        # Where the weights of step 0 are from, once they have been loaded; `run.weights` reads it.
        self.origin: dict | None = None
        name = '' if self.has_begun else config.init_from
        if name and not locate.is_run(Path(name).expanduser()):  # fail early
            self._check_outside()

    @functools.cached_property
    def outside(self) -> Outside:
        """The pretrained model that `init_from` names; cached, so the model checked is loaded."""
        return open_outside(self.config)

    def _check_outside(self) -> None:
        model, parts = self.config.model, self.parts
        if isinstance(self.outside, Foreign):
            self.outside.check(model, parts.base_axes, parts.shapes)
        else:
            check_layout(self.outside, model, parts.base_axes, parts.shapes)

    def phase_at(self, step: int) -> Phase:
        """The phase whose state a checkpoint at this step holds."""
        return phase_at(self.phases, step)

    def reader(self) -> Reader:
        """Read access to the checkpoints of this run."""
        return Reader(self.config.checkpoint, self.workdir / 'checkpoints')

    def checkpointer(self) -> Checkpointer:
        """Read and write access to the checkpoints of this run."""
        ends = [phase.last for phase in self.phases]
        about = {'config': json.loads(format_config(self.config)), 'others': self.others}
        directory = self.workdir / 'checkpoints'
        return Checkpointer(self.config.checkpoint, directory, ends[:-1], about, self.base)

    @functools.cached_property
    def base(self) -> Base:
        """What checkpoints leave out: of a run with adapters, the weights that these adapt."""
        if not self.parts.adapters or self.config.checkpoint.include_frozen:
            return Base(frozenset())
        paths = self.parts.base_axes.keys() - self.parts.buffers
        return Base(frozenset(f'frozen/{path}' for path in paths))

    def sampler(self, tokenizer: Tokenizer, slots: int | None = None) -> Sampler:
        """A sampler for this run's model; call its `lend` to give it weights.

        slots: caps the number of sequences decoded together.
        """
        config = self.config.sampling
        if slots:
            config = config.model_copy(update={'slots': min(slots, config.slots)})
        return Sampler(self.parts.merge, self.config.model, config, self.mesh, tokenizer)

    def evaluators(
        self,
        data: RunData,
        sampler: Sampler,
        samples: Path | None,
        *,
        weights: Callable[[int], dict] | None = None,
        goes_on: bool = False,
    ) -> dict:
        """{name: evaluator} of every evaluator in the config.

        Args:
          samples: the directory of their files; None writes none.
          weights: step -> which weights these are, as JSON; by default this run's.
          goes_on: with the files that are there, rather than replace them.
        """
        context = self.context(data.tokenizer, sampler, samples, weights=weights, goes_on=goes_on)
        return {
            name: EVALUATORS.load(group.name)(
                group,
                dataclasses.replace(context, name=name, dataset=data.datasets.get(group.phase)),
            )
            for name, group in self.config.evals.items()
        }

    def context(
        self,
        tokenizer: Tokenizer,
        sampler: Sampler,
        samples: Path | None = None,
        *,
        weights: Callable[[int], dict] | None = None,
        goes_on: bool = False,
    ) -> Context:
        """What evaluators get that measure this run's model. Arguments: as in `evaluators`."""
        model = self.config.model
        describe = weights or (lambda step: {'name': self.workdir.name, 'step': step})
        dtypes = {key: getattr(model, key) for key in ('param_dtype', 'compute_dtype')}
        return Context(
            name='',
            merge=self.parts.merge,
            dataset=None,
            tokenizer=tokenizer,
            chat=functools.cache(lambda: Chat(tokenizer)),
            sampler=sampler,
            mesh=self.mesh,
            seed=self.config.seed,
            flops=functools.cache(functools.partial(forward_flops, model)),
            weights=lambda step: describe(step) | dtypes,
            samples_directory=samples,
            goes_on=goes_on,
        )


@contextlib.contextmanager
def start_run(config: RunConfig, workdir: Path):
    """Context: joins the other processes, configures JAX, sets the mesh and yields the Run."""
    logging.getLogger('jax._src.xla_bridge').addFilter(_shorten_plugin_error)
    provide_threads()
    initialize()
    keep_compiled_programs(cache_directory() / 'compile', min_seconds=0.3)
    run = Run(config, workdir)
    process.unwind_on_interrupt()
    with jax.set_mesh(run.mesh):
        yield run


def _shorten_plugin_error(record: logging.LogRecord) -> bool:
    """A filter for JAX's report on a plugin that cannot be loaded, which is two tracebacks.

    It keeps the reason, in a line; without an NVIDIA GPU there is nothing to report.
    """
    if record.exc_info and record.exc_info[1] is not None:
        record.msg, record.args = f'{record.getMessage()}: {record.exc_info[1]}', ()
        record.exc_info = record.exc_text = None
        return process.has_nvidia_gpu()
    return True


def _check_code(config: RunConfig) -> None:
    """Raises ConfigError unless every process has the same code as the first."""
    digests = {name: found.sha256 for name, found in config.code.items()}
    if found := agree.find_difference('code', json.dumps(digests)):
        index, *both = found
        first, other = map(json.loads, both)
        name = min(name for name, _ in first.items() ^ other.items())
        raise ConfigError(
            f'config.code: the file of {name} is not the same on the hosts of processes 0 and '
            f'{index}: copy it again'
        )


def open_outside(config: RunConfig | OriginConfig) -> Outside:
    """The model that `init_from` names, if that is no run of ours; its weights are not read yet."""
    if not locate.is_without_config(config.init_from):
        return locate.open_pretrained(config.init_from)
    # Another run may be saving newer steps there meanwhile.
    place = agree.from_primary(lambda: find_tree(config.init_from))
    return Foreign(place, config.init_names, config.init_ignore)


def load_outside(outside: Outside, model: TransformerConfig, parts: Parts) -> dict[str, jax.Array]:
    """Its weights, {path: array}, for a model of this config. Needs a current mesh."""
    if isinstance(outside, Foreign):
        return outside.load(model, parts.base_axes, parts.shapes)
    return load_params(outside, model, parts.base_axes, parts.shapes)


def model_maker(model: TransformerConfig):
    """Returns a function: random key -> the model with fresh weights."""
    model_class = MODELS.load(model.name)
    return lambda key: model_class(model, nnx.Rngs(key))
