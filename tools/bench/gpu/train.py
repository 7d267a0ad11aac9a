"""Part `train`: trains the 1B shape on one device with our code and PyTorch, and times every op.

Both use the same shape, tokens, initial weights, optimizer and dtypes (float32 stored, bfloat16
computed). Each measurement has its own process, and so the whole memory; compiled programs come
from the cache. We compare with the best of PyTorch's settings. If time runs out, measure the rest
with another call: --only 'mosaic unrolled' --only 'mosaic scanned, *'.
"""

import functools
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from tools.bench.gpu import models
from tools.bench.gpu.record import Record, bar, outcome, show_bars
from tools.bench.gpu.stages import ROOT, Runner, Task, passes, quick
from tools.bench.gpu.timing import floor_microseconds

PEER = 'tools/bench/peers/llama_torch.py'
WARM_UP, GROUPS, STEPS = 4, 5, 3  # warm-up steps; timed groups of steps; steps per group
SMOKE_STEPS = (3, 1, 1)
# By default, XLA takes three quarters of the memory.
WHOLE_MEMORY = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.94'}
REPEATS = 2
LONGEST = 200  # seconds per process: unrolled layers take minutes to compile

# Rows per step: the first that fits is used. Beyond 32k tokens, only the optimizer's share (2 %)
# shrinks.
ROWS = {'none': (8, 4, 2, 1), 'dots': (16, 8, 4), 'full': (16, 8, 4)}
VARIANTS = {
    'cudnn scanned': dict(attention='cudnn'),
    'mosaic scanned': dict(attention='mosaic'),
    'cudnn scanned, fp8': dict(attention='cudnn', fp8=True),
    'cudnn unrolled': dict(attention='cudnn', scan=False),
    'mosaic unrolled': dict(attention='mosaic', scan=False),
    'cudnn scanned, remat full': dict(attention='cudnn', remat='full'),
    'mosaic scanned, all kernels': dict(
        attention='mosaic', rms_norm='mosaic', token_logprobs='mosaic'
    ),
    'mosaic scanned, packed': dict(attention='mosaic', packed=True),
}
SMOKE_VARIANTS = {'xla scanned': dict(attention='xla')}
SETTINGS = {
    'cudnn, blocks compiled': dict(sdpa='cudnn'),
    'flash, blocks compiled': dict(sdpa='flash'),
    'fa3, blocks compiled': dict(sdpa='fa3'),
    'cudnn, model compiled': dict(sdpa='cudnn', compile='model'),
    'cudnn, blocks compiled, linear_cross_entropy': dict(sdpa='cudnn', loss='library'),
    'cudnn, blocks compiled, all logits': dict(sdpa='cudnn', loss='whole'),
}
SMOKE_SETTINGS = {'math': dict(sdpa='math', compile='none')}


def run(record: Record, runner: Runner, peer_python: str | None = None) -> None:
    """Runs the most telling comparisons first: time may run out."""
    ours, *others = SMOKE_VARIANTS if runner.smoke else VARIANTS
    settings = SMOKE_SETTINGS if runner.smoke else SETTINGS
    with tempfile.TemporaryDirectory() as directory:
        measure = functools.partial(_run_ours, runner)
        peer = functools.partial(_run_peer, runner, peer_python, directory)
        runner.run('timing', limit=40)
        measure([ours], weights=directory)
        peer(settings)
        measure(others[:2])
        for repeat in range(2, REPEATS + 1):
            if (best := _best(record, 'peer')) and not runner.smoke:
                peer({f'{best} #{repeat}': settings[best]})
            if (best := _best(record, 'train')) and not runner.smoke:
                measure([f'{best} #{repeat}'])
    runner.run('train_ops', limit=90, patience=quick(90))
    measure(others[2:])


def _run_ours(runner: Runner, names: list[str], **options) -> None:
    for name in names:  # a process each
        if not passes(runner.only, 'train', name):
            continue
        runner.run(
            'train',
            limit=LONGEST,
            patience=LONGEST,
            environment=WHOLE_MEMORY,
            names=[name],
            **options,
        )


def _run_peer(runner: Runner, python: str | None, weights: str, settings: dict) -> None:
    settings = {name: each for name, each in settings.items() if passes(runner.only, 'peer', name)}
    if not settings:
        return
    if python is None and importlib.util.find_spec('torch') is None:
        reason = f'torch is not installed for {Path(sys.executable).name}: pass --peer_python'
        for name in settings:
            runner.record.add({'stage': 'peer', 'name': name, 'refused': reason})
        return
    # This process never imports torch, so that --smoke works with another interpreter.
    command = [python or sys.executable, ROOT / PEER, '--model', json.dumps(_shape(runner.smoke))]
    command += ['--settings', json.dumps(settings)]
    command += ['--weights', weights, '--optimizer', json.dumps(models.OPTIMIZER)]
    command += ['--steps', json.dumps(SMOKE_STEPS if runner.smoke else (WARM_UP, GROUPS, STEPS))]
    command += ['--rows_a_step', json.dumps([2] if runner.smoke else ROWS['none'])]
    runner.run_command('peer', command, limit=LONGEST, patience=LONGEST)


def _shape(smoke: bool) -> dict:
    """What another library needs to know about the model."""
    config = models.model_config(smoke)
    return {
        **config.model_dump(include={'vocab_size', 'embed_dim', 'num_layers'}),
        **config.block.model_dump(),
        'sequence_length': models.sequence_length(smoke),
        'clip_norm': models.CLIP_NORM,
    }


def _best(record: Record, stage: str) -> str | None:
    """The fastest name among rows that do the compared work: bfloat16, one document a row."""
    medians = _medians(record, stage)
    return max(medians, key=medians.get, default=None)


def _medians(record: Record, stage: str) -> dict[str, float]:
    """{name: median tokens/s over its repeats}."""
    found = {}
    for name, row in record.stage(stage).items():
        if not any(word in name for word in ('packed', 'fp8')):
            found.setdefault(name.partition(' #')[0], []).append(row['tokens_per_second'])
    return {name: statistics.median(values) for name, values in found.items()}


def tasks(smoke: bool, names: list[str], weights: str = '') -> list[Task]:
    """Variants by name; a name may end in ' #2'. weights: directory for the initial weights."""
    variants = SMOKE_VARIANTS if smoke else VARIANTS
    return [
        Task(
            name,
            functools.partial(
                _first_that_fits, smoke, weights, **variants[name.partition(' #')[0]]
            ),
        )
        for name in names
    ]


def _first_that_fits(smoke: bool, weights: str, remat: str = 'none', **variant) -> dict:
    """Trains with the first number of rows that fits in memory, and lists those that did not."""
    too_many = []
    for rows in (2,) if smoke else ROWS[remat]:
        try:
            measured = _train(smoke, weights, rows, remat, **variant)
            return measured | ({'out_of_memory_at_rows': too_many} if too_many else {})
        except Exception as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
        # Only here is the exception gone, and with it the traceback that keeps the arrays alive.
        too_many.append(rows)
        gc.collect()
    raise MemoryError(f'out of memory at {too_many} rows a step')


def _train(
    smoke: bool,
    weights: str,
    rows: int,
    remat: str,
    *,
    scan: bool = True,
    packed: bool = False,
    fp8: bool = False,
    **implementations,
) -> dict:
    # cuDNN requires this promise; all rows that are not packed keep it.
    implementations |= dict(one_document=not packed)
    changes = dict(scan=scan, remat=remat, implementations=implementations)
    changes |= dict(matmul_dtype='float8') if fp8 else {}
    config = models.model_config(smoke, **changes)
    tokens = models.sequence_length(smoke)
    warm_up, groups, steps = SMOKE_STEPS if smoke else (WARM_UP, GROUPS, STEPS)
    with models.one_device() as mesh:
        trainer = models.Trainer(config)
        state = trainer.state()
        if weights:
            _write(state.params, Path(weights))
        batch = models.batch(config.vocab_size, rows, tokens, packed, mesh)
        start = time.monotonic()
        step = trainer.step().lower(state, batch).compile()
        compile_seconds = time.monotonic() - start
        losses = []
        for _ in range(warm_up):
            state, metrics = step(state, batch)
            losses.append(metrics['loss'].item())
        times = []
        for _ in range(groups):
            start = time.monotonic()
            for _ in range(steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(state)
            times.append((time.monotonic() - start) / steps)
    speed = rows * tokens / statistics.median(times)
    return {
        'tokens_per_second': speed,
        **models.mfu(speed, smoke, packed),
        'rows': rows,
        'step_seconds': statistics.median(times),
        'spread': [min(times), max(times)],
        'compile_seconds': compile_seconds,
        'losses': losses,
        **_memory(step),
    }


def _memory(step) -> dict:
    analysis = step.memory_analysis()
    found = {'temporary_bytes': analysis.temp_size_in_bytes} if analysis else {}
    stats = jax.devices()[0].memory_stats() or {}
    return found | ({'peak_bytes': stats['peak_bytes_in_use']} if stats else {})


def _write(params: dict, directory: Path) -> None:
    for path, value in params.items():
        np.save(directory / f'{path.replace("/", ".")}.npy', jax.device_get(value))


def bars(record: Record) -> list[dict]:
    """The goals, with what was measured."""
    ours, theirs = _best(record, 'train'), _best(record, 'peer')
    rows = record.stage('train')
    ratio = ours and theirs and _medians(record, 'train')[ours] / _medians(record, 'peer')[theirs]
    fp8, plain = rows.get('cudnn scanned, fp8'), rows.get('cudnn scanned')
    faster = fp8 and plain and fp8['tokens_per_second'] / plain['tokens_per_second']
    return [
        bar('MFU, causal attention counted half', ours and rows[ours].get('mfu'), 0.55),
        bar('tokens/s, times the best of PyTorch', ratio, 1.15),
        bar('fp8, times bfloat16', faster, 1.15),
    ]


def show(record: Record) -> None:
    """Prints the tables."""
    _show_ops(record)
    print(f'{"":58}{"tok/s":>9} {"MFU":>6} {"full":>6} {"rows":>4}  first and last loss')
    for row in record.rows:
        if row['stage'] not in ('train', 'peer'):
            continue
        name = f'{"PyTorch " if row["stage"] == "peer" else "ours "}{row["name"]}'
        if outcome(row):
            print(f'{name:58}{outcome(row)[:90]}')
            continue
        mfu = [
            f'{row[key]:6.1%}' if key in row else ' ' * 6 for key in ('mfu', 'mfu_full_attention')
        ]
        losses = row['losses']
        print(
            f'{name:58}{row["tokens_per_second"]:9.0f} {mfu[0]} {mfu[1]} {row["rows"]:4}  '
            f'{losses[0]:.4f} {losses[-1]:.4f}'
        )
    show_bars(record.values['bars'])


def _show_ops(record: Record) -> None:
    """Prints the time of each op by itself, its floor, and how close the step comes to it."""
    rows, ceilings = record.stage('train_ops'), record.stage('timing')
    floors = {name: floor_microseconds(row, ceilings) for name, row in rows.items()}
    if not rows or None in floors.values():
        return
    print(f'{"us/token":58}{"alone":>9} {"floor":>8} {"of the speed of light":>22}')
    alone, fastest = {}, {}
    for name, row in rows.items():
        share = row['count'] / row['tokens']
        alone[name], fastest[name] = row['microseconds'] * share, floors[name] * share
        print(
            f'{name:58}{alone[name]:9.3f} {fastest[name]:8.3f} {fastest[name] / alone[name]:22.0%}'
        )
    # If an op has several implementations, the fastest one counts.
    ops = {name.partition(' / ')[0] for name in rows}
    best = [min((alone[n], fastest[n]) for n in rows if n.partition(' / ')[0] == op) for op in ops]
    total, light = (sum(values) for values in zip(*best))
    print(f'{"all ops":58}{total:9.3f} {light:8.3f} {light / total:22.0%}')
    if ours := _best(record, 'train'):
        step = 1e6 / _medians(record, 'train')[ours]
        print(f'{"whole step, " + ours:58}{step:9.3f} {light:8.3f} {light / step:22.0%}')
