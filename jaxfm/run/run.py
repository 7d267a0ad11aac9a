"""A run: one resolved config and one work directory, and every part that is built from them."""

import base64
import contextlib
import dataclasses
import functools
import json
import logging
import os
import zlib
from pathlib import Path

import jax
from flax import nnx

from jaxfm import distributed, sharding
from jaxfm.chat.render import Chat
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.reader import Reader
from jaxfm.config import load as configs
from jaxfm.config.run import RunConfig, check_on_mesh
from jaxfm.data import SOURCES
from jaxfm.data.corpus.build import make_tokenizer
from jaxfm.data.dataset import open_dataset
from jaxfm.errors import DataError, MissingInputError
from jaxfm.evals import EVALUATORS
from jaxfm.evals.base import Context
from jaxfm.evals.export import PeriodicExport
from jaxfm.models import MODELS, TransformerConfig, lora
from jaxfm.plan import plan
from jaxfm.pretrained import locate
from jaxfm.pretrained.huggingface.adapters import AdapterExporter, load_adapters
from jaxfm.pretrained.huggingface.export import Exporter
from jaxfm.pretrained.load import checked_layout, load_params
from jaxfm.pretrained.source import Pretrained
from jaxfm.run.phase import Phase, make_phases, phase_at
from jaxfm.sampling.engine import Sampler
from jaxfm.state import Parts, TrainState, abstract_params, fresh_params, split
from jaxfm.tokenizer import build as tokenizers

log = logging.getLogger('jaxfm')


@dataclasses.dataclass
class Run:
    """The parts of a run that every mode needs."""

    config: RunConfig
    workdir: Path

    def __post_init__(self):
        config = self.config
        sizes = sharding.mesh_shape(dict(config.mesh), jax.device_count())
        check_on_mesh(config, sizes)
        self.mesh = sharding.make_mesh(sizes)
        plan.check_matmuls(config.model, self.mesh)
        plan.choices(config.model, self.mesh)  # an op that cannot run is told before anything is
        self.primary = distributed.is_primary()
        self.make_model = model_maker(config.model)
        self.phases = make_phases(config, self.make_model, self.mesh)
        self.parts = self.phases[0].parts if self.phases else split(self.make_model)
        shapes = {path: leaf.shape for path, leaf in self.parts.shapes.items()}
        sharding.check_weights(shapes, self.parts.axes, self.mesh)
        self.has_begun = distributed.from_primary((self.workdir / 'config.json').exists)
        name = '' if self.has_begun else config.init_from
        if name and not locate.is_run(Path(name).expanduser()):  # before anything is done with it
            checked_layout(self._outside, config.model, *self._outside_parts)

    @functools.cached_property
    def _outside(self) -> Pretrained:
        """The model from outside that `init_from` names: what is checked is what is loaded."""
        return locate.open_pretrained(self.config.init_from)

    @property
    def _outside_parts(self) -> tuple[dict, dict]:
        """Axes and shapes of what a model from outside has: all but adapters."""
        axes, adapters = self.parts.axes, self.parts.adapters
        return {path: axes[path] for path in axes if path not in adapters}, self.parts.shapes

    def phase_at(self, step: int) -> Phase:
        """The phase whose state a checkpoint of this step holds."""
        return phase_at(self.phases, step)

    def open_data(self) -> None:
        """Tokenised data of every phase; the first process builds it, the others open that."""
        cache = cache_directory() / 'corpus'
        self._check_files()
        if not self.primary:
            distributed.barrier('corpus')
        self.tokenizer = self._make_tokenizer(cache)
        self._check_tokenizer()
        for phase in self.phases:
            phase.dataset = open_dataset(phase.config.data, self.tokenizer, cache)
        if self.primary and jax.process_count() > 1:
            distributed.barrier('corpus')
        self._check_tokens()

    def _make_tokenizer(self, cache: Path):
        """That of the config; where its files are gone the one that the run has saved."""
        config, saved = self.config.tokenizer, self.workdir / 'tokenizer'
        try:
            return make_tokenizer(config, self.phases[0].config.data, cache)
        except MissingInputError:
            known = self.workdir / 'config.json'
            is_there = known.exists() and saved.exists()
            if not is_there or configs.read(known).tokenizer != config:
                raise
        return tokenizers.load(saved)

    def open_tokenizer(self) -> None:
        """The tokenizer alone: what the weights were trained with, or came with."""
        saved = self.workdir / 'tokenizer'
        if saved.exists():
            self.tokenizer = tokenizers.load(saved)
        else:
            self.tokenizer = tokenizers.build(self.config.tokenizer, ())
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        # Gemma 3 has a special token, of images, that its text models have no weights for.
        size = self.config.model.vocab_size
        beyond = set(range(size, self.tokenizer.vocab_size))
        if not beyond <= set(self.tokenizer.special_tokens.values()):
            raise DataError(
                f'the tokenizer has {self.tokenizer.vocab_size} tokens, '
                f'config.model.vocab_size is {self.config.model.vocab_size}'
            )

    def _check_files(self) -> None:
        """Every process has the files of the first: else each would train on rows of its own.

        Raises:
          MissingInputError, DataError: a file that one of them has not, or in another size.
        """
        here = {}
        phases = [phase for phase in self.phases if not phase.config.data.cache]
        for phase in phases if jax.process_count() > 1 else ():
            sources = phase.config.data.all_sources
            for name, source in sources.items():
                found = SOURCES[source.name].load()(source).files() or ()
                where = [part for part in (phase.name, name if len(sources) > 1 else '') if part]
                here |= {'/'.join([*where, file.name]): file.size for file, _ in found}
        every = distributed.compared('files', _packed(here))
        for index, packed in every.items():
            if packed != every[0]:
                _refuse_files(_unpacked(every[0]), _unpacked(packed), index)

    def _check_tokens(self) -> None:
        """Every process has the same tokens; what is read on the fly was compared as files."""
        cached = [phase.dataset for phase in self.phases if phase.dataset.packings]
        every = distributed.compared('tokens', ' '.join(each.fingerprint for each in cached))
        for index, fingerprints in every.items():
            if fingerprints != every[0]:
                raise DataError(
                    f'config.data: processes 0 and {index} have not the same tokens, though their '
                    'files have the same names and sizes: copy the files once more'
                )

    def reader(self) -> Reader:
        """The checkpoints of this run, to be read."""
        return Reader(self.config.checkpoint, self.workdir / 'checkpoints')

    def checkpointer(self) -> Checkpointer:
        """The checkpoints of this run, and the right to write them."""
        ends = [phase.last for phase in self.phases]
        about = {'config': json.loads(configs.to_json(self.config))}
        directory = self.workdir / 'checkpoints'
        return Checkpointer(self.config.checkpoint, directory, ends[:-1], about)

    def sampler(self, params, slots: int | None = None) -> Sampler:
        """An engine for these weights."""
        config = self.config.sampling
        if slots:
            config = config.model_copy(update={'slots': min(slots, config.slots)})
        return Sampler(self.parts.merge, self.config.model, config, params, self.mesh)

    def evaluators(self, sampler: Sampler, write: bool) -> dict:
        """Every evaluator of the config, by name."""
        datasets = {phase.name: phase.dataset for phase in self.phases}
        return {
            name: EVALUATORS[group.name].load()(
                group,
                Context(
                    name=name,
                    merge=self.parts.merge,
                    dataset=datasets[group.phase],
                    sampler=sampler,
                    mesh=self.mesh,
                    seed=self.config.seed,
                    samples_directory=self.workdir / 'samples' if write else None,
                ),
            )
            for name, group in self.config.evals.items()
        }

    def exports(self) -> dict:
        """The export of every so many steps, as an evaluator by its name, if it is asked for."""
        every = self.config.export.every
        directory = self.workdir / 'export'
        return {'export': PeriodicExport(every, self.exporter(), directory)} if every else {}

    def exporter(self) -> Exporter:
        """Writes weights of this run for other libraries; needs the tokenizer to be open."""
        config, parts = self.config, self.parts
        stop_ids = Chat(self.tokenizer).stop_ids | set(config.sampling.stop_ids)
        arguments = (
            config.export,
            config.model,
            parts.axes,
            parts.shapes,
            self.tokenizer,
            stop_ids,
        )
        if config.export.adapters == 'peft':
            return AdapterExporter(*arguments, base=_base_of(config.init_from))
        return Exporter(*arguments)

    def restore_params(self, checkpoints: Reader, parts: Parts | None = None) -> tuple[dict, int]:
        """The weights of the newest whole checkpoint alone, and its step.

        parts: of the model in the checkpoint, where it is not that of the run.
        """
        wanted = abstract_params(parts or self.parts)
        restored = checkpoints.newest_whole(
            lambda step: (checkpoints.restore_params(step, wanted), step)
        )
        if restored is None:
            raise MissingInputError(f'{checkpoints.root} holds no checkpoint yet')
        return restored

    def current_params(self) -> tuple[dict, int | None]:
        """The newest weights of this run and their step.

        Of a run that has not begun: the weights that it would start from, and None.
        """
        if self.has_begun or not self.config.init_from:
            return self.restore_params(self.reader())
        return self._earlier_params(), None

    def initial_state(self) -> TrainState:
        """The state at step 0: fresh weights, or those of the model that `init_from` names."""
        first = self.phases[0]
        return first.begin(self._earlier_params()) if self.config.init_from else first.init_state()

    def _earlier_params(self) -> dict:
        """The weights that `init_from` names: of a run of ours, or from outside.

        Adapters that the model has and they have not are those of `model.lora.path`, or fresh.
        """
        name, adapters = self.config.init_from, self.parts.adapters
        directory = Path(name).expanduser()
        if locate.is_run(directory):
            earlier = configs.read(directory / 'config.json')
            params, step = self._params_of(earlier, directory)
            log.info('weights of %s at step %d', directory, step)
        else:
            params = load_params(self._outside, self.config.model, *self._outside_parts)
            log.info('weights of %s', self._outside.path)
        if adapters <= params.keys():
            return params
        if self.config.model.lora.path:
            return params | load_adapters(self.config.model, self.parts.axes, self.parts.shapes)
        return params | fresh_params(self.make_model, self.parts, self.config.seed, adapters)

    def _params_of(self, earlier: RunConfig, directory: Path) -> tuple[dict, int]:
        """The newest weights of an earlier run and their step.

        Its adapters are merged into the weights where this run has none.
        """
        model = self.config.model.model_copy(update={'lora': earlier.model.lora})
        checkpoints = Reader(earlier.checkpoint, directory / 'checkpoints')
        params, step = self.restore_params(checkpoints, split(model_maker(model)))
        if model.lora and not self.config.model.lora:
            params = lora.merge(params, model)
        return params, step


@contextlib.contextmanager
def started(flags, config: RunConfig):
    """JAX set up, the other processes found, the mesh set -> Run."""
    distributed.initialize()
    jax.config.update('jax_compilation_cache_dir', str(cache_directory() / 'compile'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
    run = Run(config, flags.workdir)
    with jax.set_mesh(run.mesh):
        yield run


def _base_of(init_from: str) -> str:
    """The model that the adapters of a run stand beside: behind the runs that trained them, too."""
    while init_from and locate.is_run(Path(init_from)):
        earlier = configs.read(Path(init_from) / 'config.json')
        if earlier.model.lora is None:
            break
        init_from = earlier.init_from
    return init_from


def model_maker(model: TransformerConfig):
    """key -> the model with fresh weights."""
    model_class = MODELS[model.name].load()
    return lambda key: model_class(model, nnx.Rngs(key))


def _packed(sizes: dict[str, int]) -> str:
    """As text, and short: the names of millions of files pass through the coordinator."""
    text = json.dumps(sizes, sort_keys=True)
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _unpacked(text: str) -> dict[str, int]:
    return json.loads(zlib.decompress(base64.b64decode(text)))


def _refuse_files(first: dict[str, int], other: dict[str, int], index: int) -> None:
    """Names the first file that differs between process 0 and another one."""
    name = min(name for name, _ in first.items() ^ other.items())
    if name in first and name in other:
        raise DataError(
            f'config.data: {name} has {first[name]} bytes on the host of process 0, '
            f'{other[name]} on that of process {index}'
        )
    lacking = index if name in first else 0
    raise MissingInputError(f'config.data: {name} is missing on the host of process {lacking}')


def cache_directory() -> Path:
    """What may be deleted at any time: compiled programs and tokenised data."""
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(home) / 'jaxfm'
