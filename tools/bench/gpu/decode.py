"""Part `decode`: the sampler's speed with the 1B shape, against the bytes it has to read.

This measures the engine as it runs, with its pages and the model's ops; part `kernels` measures the
kernel `decode_attention` alone.

A decode step has to read all weights and all cached keys and values, nothing else. Those bytes
divided by the time are compared with the device's peak bandwidth and with a copy.
"""

import dataclasses
import functools
import statistics
import time

import jax

from jaxfm.models.transformer import compute_dtype
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Request
from pallas_kernels._tables import short_kind
from tools.bench.gpu import models
from tools.bench.gpu.record import Record, bar, outcome, show_bars
from tools.bench.gpu.stages import Runner, Task

# GB/s, from the vendor's data sheets; the H100 is the SXM version.
PEAK_GIGABYTES = {'H200': 4800, 'H100': 3350}
SLOTS = (1, 8, 32, 64, 128, 256)
PROMPT, LENGTH, STEPS, CALLS = 128, 1024, 16, 20
PREFILL = 8192  # tokens of prompts a call, so that the first sequences do not end before the last


def run(record: Record, runner: Runner) -> None:
    runner.run('timing', limit=40)
    runner.run('decode')


def tasks(smoke: bool) -> list[Task]:
    """One task per batch size."""
    sizes = (1, 2) if smoke else SLOTS
    return [Task(f'{slots} sequences', functools.partial(_decode, smoke, slots)) for slots in sizes]


@dataclasses.dataclass(frozen=True)
class _Model:
    config: object
    trainer: models.Trainer
    params: dict


@functools.cache
def _model(smoke: bool) -> _Model:
    """Random weights in bfloat16, made once; needs the mesh to be set."""
    config = models.model_config(smoke, param_dtype='bfloat16', remat='none')
    trainer = models.Trainer(config)
    return _Model(config, trainer, trainer.params())


def _decode(smoke: bool, slots: int) -> dict:
    prompt, length, steps, calls = (8, 64, 4, 3) if smoke else (PROMPT, LENGTH, STEPS, CALLS)
    with models.one_device() as mesh:
        model = _model(smoke)
        sampling = SamplingConfig(
            slots=slots, max_length=length, decode_steps=steps, prefill_tokens=PREFILL
        )
        merge = model.trainer.parts.merge
        sampler = Sampler(merge, model.config, sampling, mesh)
        sampler.lend(model.params, version=0)
        vocab = model.config.vocab_size
        for index in range(slots):
            tokens = [(7 * index + 13 * place) % vocab for place in range(prompt)]
            sampler.add(Request(str(index), tokens, length - prompt, temperature=1.0, seed=index))
        start = time.monotonic()
        while sampler.counters.prefill_tokens < slots * (prompt - 1):
            sampler.step()
        sampler.step()  # the first in which all sequences decode
        start_seconds = time.monotonic() - start
        decoded, times = sampler.counters.decoded_tokens, []
        for _ in range(calls):
            start = time.monotonic()
            sampler.step()  # its tokens are on the host when it returns
            times.append((time.monotonic() - start) / steps)
        count = sampler.counters.decoded_tokens - decoded
    if count != calls * slots * steps:
        raise RuntimeError(f'{count} tokens, but {slots} sequences should have decoded throughout')
    seconds = statistics.median(times)
    # Average cached tokens per sequence.
    present = prompt + (decoded + count / 2) / slots
    moved = _weight_bytes(model) + slots * present * _bytes_per_key(model.config)
    rate = moved / seconds / 1e9
    peak = PEAK_GIGABYTES.get(short_kind(jax.devices()[0].device_kind))
    return {
        'tokens_per_second': slots / seconds,
        'step_microseconds': seconds * 1e6,
        'spread': [min(times) * 1e6, max(times) * 1e6],
        'bytes': moved,
        'gigabytes_per_second': rate,
        **({'of_peak': rate / peak} if peak else {}),
        'start_seconds': start_seconds,
        'slots': slots,
        'cached_tokens': length,
    }


def _weight_bytes(model: _Model) -> int:
    tied = model.config.tie_embeddings
    return sum(p.nbytes for name, p in model.params.items() if tied or name != 'embedding/table')


def _bytes_per_key(config) -> int:
    width = compute_dtype(config).itemsize
    return sum(
        segment.repeats * 2 * block.num_kv_heads * block.head_dim * width
        for segment in config.trunk
        for block in segment.pattern
    )


def bars(record: Record) -> list[dict]:
    """The sampler has no speed goal; this bar reveals a device that idles half of the time."""
    rows = record.stage('decode').values()
    best = max((row.get('of_peak', 0) for row in rows), default=0)
    return [bar('bytes over the peak, best batch size', best or None, 0.5)]


def show(record: Record) -> None:
    """Prints the table."""
    copy = record.stage('timing').get('copy', {}).get('gigabytes_per_second')
    print(f'{"":20}{"tok/s":>10} {"us/step":>10} {"GB/s":>8} {"of peak":>8} {"of copy":>10}')
    for row in (row for row in record.rows if row['stage'] == 'decode'):
        if outcome(row):
            print(f'{row["name"]:20}{outcome(row)}')
            continue
        of_peak = f'{row["of_peak"]:8.1%}' if 'of_peak' in row else ' ' * 8
        of_copy = f'{row["gigabytes_per_second"] / copy:10.1%}' if copy else ''
        print(
            f'{row["name"]:20}{row["tokens_per_second"]:10.0f} {row["step_microseconds"]:10.0f} '
            f'{row["gigabytes_per_second"]:8.0f} {of_peak} {of_copy}'
        )
    show_bars(record.values['bars'])
