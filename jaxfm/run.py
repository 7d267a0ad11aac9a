"""A run: one resolved config and one work directory. Builds every part of it and runs a mode.

Nothing is written before everything that can be wrong has been looked at: config, mesh, data, the
fit of model and mesh, the room for checkpoints.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path

import jax
from flax import nnx

from jaxfm import config as configs
from jaxfm import distributed, plan, sharding
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.data import corpus as corpora
from jaxfm.data import tokenizer as tokenizers
from jaxfm.data.loader import PackedBatches
from jaxfm.errors import (
    DataError,
    MissingInputError,
    PermissionDeniedError,
    RunError,
    StorageError,
)
from jaxfm.evals import EVALUATORS
from jaxfm.evals.base import Context
from jaxfm.metrics.clock import StepClock
from jaxfm.metrics.console import Console
from jaxfm.metrics.devices import peak_flops
from jaxfm.metrics.report import write_report
from jaxfm.metrics.writers import JsonlWriter, Recorder
from jaxfm.models import MODELS
from jaxfm.models.transformer import compute_dtype
from jaxfm.objectives import OBJECTIVES
from jaxfm.sampling.sampler import Request, Sampler, complete
from jaxfm.state import TrainState, abstract_state, init_state, make_train_step, split
from jaxfm.train import Loop
from jaxfm.train import train as run_loop

log = logging.getLogger('jaxfm')


@dataclasses.dataclass
class Run:
    """The parts of a run that every mode needs."""

    config: configs.RunConfig
    workdir: Path

    def __post_init__(self):
        config = self.config
        sizes = sharding.mesh_shape(dict(config.mesh), jax.device_count())
        configs.check_on_mesh(config, sizes)
        self.mesh = sharding.make_mesh(sizes)
        self.primary = distributed.is_primary()
        model_class = MODELS[config.model.name].load()
        self.make_model = lambda key: model_class(config.model, nnx.Rngs(key))
        self.parts = split(self.make_model, config.optimizer.frozen)
        shapes = {path: leaf.shape for path, leaf in self.parts.shapes.items()}
        sharding.check_weights(shapes, self.parts.axes, self.mesh)
        self.optimizer = configs.OPTIMIZERS[config.optimizer.name].load()(
            config.optimizer,
            config.steps,
            {path: self.parts.axes[path] for path in sorted(self.parts.trainable)},
        )
        self.objective = OBJECTIVES[config.objective.name].load()(config.objective)

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the train state."""
        return abstract_state(self.make_model, self.parts, self.optimizer, self.config.seed)

    def init_state(self) -> TrainState:
        """A fresh train state."""
        return init_state(self.make_model, self.parts, self.optimizer, self.config.seed)

    def train_step(self):
        """The jitted step."""
        return make_train_step(
            self.parts,
            self.objective,
            self.optimizer,
            accumulate=self.config.optimizer.accumulate,
            clip_norm=self.config.optimizer.clip_norm,
        )

    def corpus(self) -> corpora.Corpus:
        """Tokenised data; the first process builds it, the others open what it built."""
        cache = _cache_directory() / 'corpus'
        if not self.primary:
            distributed.barrier('corpus')
        corpus = corpora.build(self.config.data, cache)
        if self.primary and jax.process_count() > 1:
            distributed.barrier('corpus')
        if corpus.tokenizer.vocab_size > self.config.model.vocab_size:
            raise DataError(
                f'the tokenizer has {corpus.tokenizer.vocab_size} tokens, '
                f'config.model.vocab_size is {self.config.model.vocab_size}'
            )
        return corpus

    def checkpointer(self, read_only: bool) -> Checkpointer:
        """The checkpoints of this run."""
        directory = self.workdir / 'checkpoints'
        return Checkpointer(self.config.checkpoint, directory, read_only=read_only)

    def sampler(self, params, slots: int | None = None) -> Sampler:
        """An engine for these weights."""
        config = self.config.sampling
        if slots:
            config = config.model_copy(update={'slots': min(slots, config.slots)})
        return Sampler(self.parts.merge, self.config.model, config, params, self.mesh)

    def evaluators(self, corpus, sampler: Sampler, write: bool) -> dict:
        """Every evaluator of the config, by name."""
        return {
            name: EVALUATORS[group.name].load()(
                group,
                Context(
                    name=name,
                    merge=self.parts.merge,
                    corpus=corpus,
                    sampler=sampler,
                    mesh=self.mesh,
                    sequence_length=self.config.data.sequence_length,
                    seed=self.config.seed,
                    samples_directory=self.workdir / 'samples' if write else None,
                ),
            )
            for name, group in self.config.evals.items()
        }

    def restore_params(self, checkpointer: Checkpointer) -> tuple[dict, int]:
        """The weights of the newest checkpoint alone, and its step."""
        step = checkpointer.latest_step()
        if step is None:
            raise MissingInputError(f'{checkpointer.directory} holds no checkpoint yet')
        wanted = self.abstract_state()
        names = {
            f'{group}/{path}': leaf
            for group in ('trainable', 'frozen', 'buffers')
            for path, leaf in getattr(wanted, group).items()
        }
        restored = checkpointer.restore_params(step, names)
        return {name.partition('/')[2]: value for name, value in restored.items()}, step


@contextlib.contextmanager
def _started(flags, config: configs.RunConfig):
    """JAX set up, the other processes found, the mesh set -> Run."""
    distributed.initialize()
    jax.config.update('jax_compilation_cache_dir', str(_cache_directory() / 'compile'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
    run = Run(config, flags.workdir)
    with jax.set_mesh(run.mesh):
        yield run


def _cache_directory() -> Path:
    """What may be deleted at any time: compiled programs and tokenised data."""
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(home) / 'jaxfm'


def train(flags, config: configs.RunConfig) -> int:
    """Trains to the end, from the newest checkpoint if there is one."""
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(_started(flags, config))
        preemption = stack.enter_context(distributed.Preemption())
        console = Console(config.steps, enabled=run.primary)
        stack.callback(console.close)
        corpus = run.corpus()
        wanted = run.abstract_state()
        sharding.check_replication(wanted.to_tree(), run.mesh)
        checkpointer = _open_checkpoints(run, wanted, stack)
        step = checkpointer.latest_step()
        if step is not None and step >= config.steps:
            log.warning('%s is finished at step %d; %s', run.workdir, step, _how_to_go_on(config))
            if not (run.workdir / 'report.html').exists():
                _report(run)
            return 0
        source = sharding.Prefetch(_batches(run, corpus), run.mesh, config.data.batch_size)
        stack.callback(source.close)
        clock = _clock(run)
        sampler = run.sampler(params=None)
        evaluators = run.evaluators(corpus, sampler, write=run.primary)
        prompts, requests = _last_samples(config, corpus.tokenizer)
        for request in requests:
            sampler.check(request)
        if step is None:
            state, position = run.init_state(), 0
        else:
            state, position = _restore(wanted, checkpointer, step, source, clock)
        # Only now is anything of an earlier run in this directory changed.
        recorder = _open_records(run, corpus, console, stack, is_new=step is None)
        recorder.jsonl.truncate(position)
        for change in flags.changes:
            log.warning('config.%s: %s -> %s', *change)
        log.info('work directory: %s', run.workdir)
        if step is not None:
            log.info('resumed at step %d', step)
        console.show_tables(plan.tables(config, run.parts, run.mesh, wanted, corpus.statistics))
        console.show_parameters(plan.parameter_rows(run.parts, run.mesh, run.optimizer.rules))
        loop = Loop(
            steps=config.steps,
            train_step=run.train_step(),
            source=source,
            evaluators=evaluators,
            checkpointer=checkpointer,
            checkpoint_every=config.checkpoint.every,
            recorder=recorder,
            log_every=config.metrics.log_every,
            clock=clock,
            preemption=preemption,
            tokens_per_step=config.data.batch_size * config.data.sequence_length,
        )
        state = run_loop(loop, state, step or 0, resumed=step is not None)
        sampler.params = state.params
        path = run.workdir / 'samples' / 'final.jsonl'
        _write_samples(run, sampler, corpus.tokenizer, prompts, requests, path)
        _report(run)
    return 0


def evaluate(flags, config: configs.RunConfig) -> int:
    """Runs every evaluator on the newest checkpoint."""
    with _started(flags, config) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        checkpointer = run.checkpointer(read_only=True)
        stack.callback(checkpointer.close)
        params, step = run.restore_params(checkpointer)
        corpus, sampler = run.corpus(), run.sampler(params)
        _batches(run, corpus).set_state(checkpointer.read_extra(step)['source'])  # the same data?
        scores = {}
        for name, evaluator in run.evaluators(corpus, sampler, write=False).items():
            values = evaluator.run(params, step)
            scores |= {f'eval/{name}/{key}': value for key, value in values.items()}
        for name, value in scores.items():
            log.info('step %d  %s %.6g', step, name, value)
        if run.primary and flags.output:
            _write_lines(flags.output, [{'step': step} | scores])
    return 0


def sample(flags, config: configs.RunConfig) -> int:
    """Continues the prompts with the weights of the newest checkpoint; text goes to stdout."""
    with _started(flags, config) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        tokenizer = tokenizers.load(run.workdir / 'tokenizer.json')
        checkpointer = run.checkpointer(read_only=True)
        stack.callback(checkpointer.close)
        params, step = run.restore_params(checkpointer)
        prompts = flags.prompt or list(config.sampling.prompts) or ['']
        sampler = run.sampler(params, slots=len(prompts))
        requests = _requests(config, tokenizer, prompts, flags)
        log.info('sampling from step %d', step)
        _write_samples(run, sampler, tokenizer, prompts, requests, flags.output)
    return 0


MODES = {'train': train, 'eval': evaluate, 'sample': sample}


def _open_checkpoints(run: Run, wanted: TrainState, stack) -> Checkpointer:
    """The run's checkpoints, when there is room for them; else nothing of the run is left."""
    directory = Path(run.config.checkpoint.directory or run.workdir / 'checkpoints')
    known = (directory, *directory.parents, run.workdir, *run.workdir.parents)
    created = [d for d in dict.fromkeys(known) if not d.exists()]
    checkpointer = None
    try:
        checkpointer = run.checkpointer(read_only=False)
        checkpointer.check_room(plan.bytes_total(wanted))
    except RunError:
        if checkpointer:
            checkpointer.close()
        for directory in created:
            with contextlib.suppress(OSError):  # another process has removed it, or it is not empty
                directory.rmdir()
        raise
    stack.callback(checkpointer.close)
    return checkpointer


def _open_records(run: Run, corpus, console: Console, stack, is_new: bool) -> Recorder:
    """The work directory's files: config, tokenizer, log, metrics."""
    if run.primary:
        configs.write(run.config, run.workdir / 'config.json')
        if is_new:  # a checkpoint belongs to the tokenizer it was trained with
            with _explained(run.workdir / 'tokenizer.json') as path:
                corpus.tokenizer.save(path)
    console.log_to(run.workdir / 'log.txt')
    jsonl = JsonlWriter(run.workdir / 'metrics.jsonl', enabled=run.primary)
    recorder = Recorder(jsonl, console, enabled=run.primary)
    stack.callback(recorder.close)
    stack.push(_log_refusal)
    return recorder


def _log_refusal(kind, error, traceback) -> bool:
    """The reason of a stop goes to the log; main shows it on the screen."""
    if isinstance(error, RunError):
        log.error('%s', error, extra={'shown': True})
    return False


def _report(run: Run) -> None:
    """The page about a run, which must not fail after all the work."""
    if not run.primary:
        return
    try:
        log.info('report: %s', write_report(run.workdir))
    except OSError as error:
        log.warning('the report could not be written: %s', error)


def _batches(run: Run, corpus) -> PackedBatches:
    data = run.config.data
    rows = sharding.local_rows(run.mesh, data.batch_size)
    return PackedBatches(corpus.train, data.sequence_length, data.batch_size, run.config.seed, rows)


def _clock(run: Run) -> StepClock:
    data, model = run.config.data, run.config.model
    flops = plan.model_flops_per_token(model, data.sequence_length)
    peak = peak_flops(jax.devices()[0].device_kind, compute_dtype(model).name)
    return StepClock(
        run.config.steps,
        flops * data.batch_size * data.sequence_length,
        peak and peak * jax.device_count(),
    )


def _restore(wanted, checkpointer, step, source, clock) -> tuple[TrainState, int]:
    """The state of a step and the end of its metrics; refuses data that is not the run's."""
    with clock.aside('checkpoint_restore'):
        tree, extra = checkpointer.restore(step, wanted.to_tree())
    source.set_state(extra['source'])
    clock.set_state(extra['clock'])
    return wanted.with_tree(tree), extra['metrics_position']


def _how_to_go_on(config) -> str:
    return (
        f'to train on give --config.steps={2 * config.steps} --allow_change=steps, '
        'for a new run another --workdir'
    )


def _requests(config, tokenizer, prompts, flags=None) -> list[Request]:
    sampling = config.sampling
    temperature, max_tokens = sampling.temperature, sampling.max_tokens
    if flags is not None:
        temperature = temperature if flags.temperature is None else flags.temperature
        max_tokens = flags.max_tokens or max_tokens
    return [
        Request(
            id=str(index),
            tokens=tokenizer.encode(prompt) or [tokenizer.bos_id],
            max_tokens=max_tokens,
            temperature=temperature,
            seed=flags.seed if flags is not None else config.seed,
            sample_index=index,
            stop_ids=frozenset([tokenizer.eos_id]),
        )
        for index, prompt in enumerate(prompts)
    ]


def _last_samples(config, tokenizer) -> tuple[list[str], list[Request]]:
    """The samples at the end of a training run: prompts, and requests to continue them."""
    sampling = config.sampling
    known = list(sampling.prompts) or ['']
    prompts = [known[index % len(known)] for index in range(sampling.num_samples)]
    return prompts, _requests(config, tokenizer, prompts)


def _write_samples(run: Run, sampler, tokenizer, prompts, requests, path: Path | None) -> None:
    events = complete(sampler, requests)
    if not run.primary:
        return
    records = []
    for prompt, request in zip(prompts, requests, strict=True):
        ids = [token for event in events[request.id] for token in event.tokens]
        reason = events[request.id][-1].finish_reason
        text = tokenizer.decode(ids[:-1] if reason == 'stop' else ids)
        print(prompt + text, flush=True)
        if len(prompts) > 1:
            print('-' * 80, file=sys.stderr, flush=True)
        records.append({'prompt': prompt, 'completion': text, 'finish_reason': reason})
    if path:
        _write_lines(path, records)


def _write_lines(path: Path, records: list[dict]) -> None:
    """JSON lines; a reason to stop when they cannot be written."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(json.dumps(record) + '\n' for record in records), 'utf-8')


@contextlib.contextmanager
def _explained(path: Path):
    try:
        yield path
    except OSError as error:
        kind = PermissionDeniedError if isinstance(error, PermissionError) else StorageError
        raise kind(f'{path}: cannot be written: {error.strerror}') from None
