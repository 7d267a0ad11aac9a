"""Part `determinism`: repeats a step and resumes a run, and compares the results bit for bit.

A step is compiled once with default options and once with nondeterministic ops excluded; if only
the first differs between repeats, XLA's choice of ops is the cause. Runs go through `jaxfm.main`:
one runs to its end, and a copy of it without the last checkpoint resumes from the one before.
"""

import functools
import hashlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.reader import Reader
from tools.bench.gpu import models
from tools.bench.gpu.record import Record, bar, outcome, show_bars
from tools.bench.gpu.stages import CACHE, ROOT, Refused, Runner, Task

REPEATS, STEPS = 3, 2
RUN_SECONDS = 150
KERNELS = dict(attention='mosaic', rms_norm='mosaic', token_logprobs='mosaic')
STEP_CASES = {
    'xla': dict(attention='xla'),
    'cudnn': dict(attention='cudnn', one_document=True),
    'mosaic': dict(attention='mosaic'),
    'all kernels': KERNELS,
}
RUN_CASES = {'as chosen': {}, 'mosaic': dict(attention='mosaic')}
# Several processes use the device at once: none may preallocate most of its memory.
ENVIRONMENT = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
STRICT = {'xla_gpu_exclude_nondeterministic_ops': True}

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 8
    config.model = dict(
        name='transformer',
        vocab_size=300,
        embed_dim=EMBED,
        num_layers=2,
        block=dict(num_heads=4, num_kv_heads=2, head_dim=HEAD, mlp_dim=2 * EMBED),
        implementations=IMPLEMENTATIONS,
    )
    config.tokenizer = dict(name='bytes')
    config.data = dict(
        name='files', path=TEXT, heldout_fraction=0.1, sequence_length=LENGTH, batch_size=8
    )
    config.optimizer = dict(name='adamw', learning_rate=1e-2, warmup_steps=2)
    config.checkpoint = dict(every=4)
    config.sampling = dict(num_samples=0)
    config.metrics = dict(log_every=2)
    return config
"""


def run(record: Record, runner: Runner) -> None:
    # A row consists of two runs, and appears only after both have ended.
    runner.run('determinism', environment=ENVIRONMENT, patience=2 * RUN_SECONDS + 30)


def tasks(smoke: bool) -> list[Task]:
    """Repeated steps, then resumed runs."""
    steps = {'xla': STEP_CASES['xla']} if smoke else STEP_CASES
    runs = {'as chosen': {}} if smoke else RUN_CASES
    found = []
    for name, implementations in steps.items():
        repeat = functools.partial(_repeat, smoke, implementations)
        found.append(Task(f'step {REPEATS} times, {name}', repeat))
        if not smoke:
            strict = functools.partial(repeat, options=STRICT)
            found.append(Task(f'step {REPEATS} times, {name}, strict', strict))
    for name, implementations in runs.items():
        resume = functools.partial(_resume, smoke, implementations)
        found.append(Task(f'run resumed, {name}', resume))
    return found


def _repeat(smoke: bool, implementations: dict, options: dict | None = None) -> dict:
    """Runs two steps from the same state REPEATS times, on packed rows unless the op forbids it."""
    config = models.model_config(smoke, num_layers=2, remat='none', implementations=implementations)
    tokens = models.sequence_length(smoke)
    packed = not implementations.get('one_document')
    with models.one_device() as mesh:
        trainer = models.Trainer(config)
        first = trainer.state()
        batch = models.batch(config.vocab_size, 2, tokens, packed, mesh)
        step = trainer.step().lower(first, batch).compile(compiler_options=options)
        digests = []
        for _ in range(REPEATS):
            state = jax.tree.map(jnp.copy, first)
            for _ in range(STEPS):
                state, metrics = step(state, batch)
            digests.append(_digests(state.to_tree()))
    different = _different(digests)
    return {'equal': not different, 'different': different, 'loss': metrics['loss'].item()}


def _different(digests: list[dict]) -> list[str]:
    return sorted({name for each in digests for name in each if each[name] != digests[0][name]})


def _digests(tree: dict) -> dict[str, str]:
    return {
        name: hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
        for name, value in jax.device_get(tree).items()
    }


def _resume(smoke: bool, implementations: dict) -> dict:
    for package in ('ml_collections', 'pydantic', 'grain', 'gguf', 'tensorstore'):
        if importlib.util.find_spec(package) is None:
            raise Refused(f'a run needs {package}, which is not installed')
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = _write_config(directory, smoke, implementations)
        straight, resumed = directory / 'straight', directory / 'resumed'
        _main(config, straight, smoke)
        shutil.copytree(straight, resumed)
        steps = sorted(int(path.name) for path in (resumed / 'checkpoints').glob('[0-9]*'))
        shutil.rmtree(resumed / 'checkpoints' / str(steps[-1]))
        said = _main(config, resumed, smoke)
        if f'resumed at step {steps[-2]}' not in said:
            raise RuntimeError(f'the run did not resume at step {steps[-2]}: {said[-300:]}')
        before, after = (_digest_checkpoint(workdir, steps[-1]) for workdir in (straight, resumed))
    different = _different([before, after])
    return {'equal': not different, 'different': different, 'resumed_at': steps[-2]}


def _write_config(directory: Path, smoke: bool, implementations: dict) -> Path:
    (directory / 'text').mkdir()
    for index in range(40):
        draw = random.Random(index)
        words = ' '.join(f'{draw.randrange(300):x}' for _ in range(1000))
        (directory / 'text' / f'{index}.txt').write_text(words, 'utf-8')
    sizes = dict(EMBED=32, HEAD=8, LENGTH=32) if smoke else dict(EMBED=256, HEAD=64, LENGTH=512)
    values = sizes | {'TEXT': str(directory / 'text' / '*.txt'), 'IMPLEMENTATIONS': implementations}
    text = CONFIG
    for name, value in values.items():
        text = text.replace(name, repr(value))
    path = directory / 'tiny.py'
    path.write_text(text, 'utf-8')
    return path


def _main(config: Path, workdir: Path, smoke: bool) -> str:
    """Runs `jaxfm.main` to its end; returns its stderr."""
    command = [sys.executable, '-m', 'jaxfm.main', '--config', config, '--workdir', workdir]
    environment = {'PYTHONPATH': str(ROOT), 'XDG_CACHE_HOME': CACHE, 'GLIBC_TUNABLES': ''}
    environment |= ENVIRONMENT | {'JAX_NUM_CPU_DEVICES': '1'}
    environment |= {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'} if smoke else {}
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | environment,
        cwd=config.parent,
        capture_output=True,
        encoding='utf-8',
        errors='replace',
        timeout=RUN_SECONDS,
    )
    if done.returncode:
        raise RuntimeError(f'exit code {done.returncode}: {done.stderr.strip()[-400:]}')
    return done.stderr


def _digest_checkpoint(workdir: Path, step: int) -> dict[str, str]:
    """The digests of all arrays of a checkpoint."""
    reader = Reader(CheckpointConfig(), workdir / 'checkpoints')
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(entry['shape']), jnp.dtype(entry['dtype']), sharding=here)
        for name, entry in reader.read_manifest(step)['arrays'].items()
    }
    return _digests(reader.restore(step, wanted)[0])


def bars(record: Record) -> list[dict]:
    """Every row must be equal, except the strict ones, which only explain differences."""
    rows = [row for row in record.rows if row['stage'] == 'determinism' and 'equal' in row]
    shares = [row['equal'] for row in rows if not row['name'].endswith('strict')]
    value = sum(shares) / len(shares) if shares else None
    return [bar('equal bit for bit, share of what ran', value, 1.0)]


def show(record: Record) -> None:
    """Prints the table."""
    for row in (row for row in record.rows if row['stage'] == 'determinism'):
        said = outcome(row)
        if not said:
            said = 'equal' if row['equal'] else f'DIFFERENT: {", ".join(row["different"][:4])}'
        print(f'{row["name"]:48}{said[:110]}')
    show_bars(record.values['bars'])
