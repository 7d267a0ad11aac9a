"""Saves and restores a tree of arrays with Orbax, so that stock Orbax can restore it too.

Orbax's `PyTreeCheckpointHandler` names the arrays and describes the tree in a file of its own,
`_METADATA`. It hands the arrays to a type handler of ours, which writes and reads them with
`arrays`, on any storage. Orbax itself sees only a temporary directory with that file, because it
cannot write to S3.

Used of Orbax are public names, and one private attribute (`_array_metadata_store`): without it
Orbax warns about every handler that keeps no array metadata.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import traverse_util

from jaxfm.checkpoint import arrays
from jaxfm.checkpoint.arrays import Deadline, Snapshot
from jaxfm.checkpoint.store import METADATA


def save(base: dict, parts: dict[str, Snapshot], deadline: Deadline, private: bool) -> bytes | None:
    """Writes the arrays of this process, and returns the content of `_METADATA`.

    That is None except on the primary process, or with `private`: every process has its own store.

    Args:
      base: TensorStore's spec of the place of the database.
      parts: {name: the shards to write}; the parts of a name, separated by '/', nest.

    Raises as `arrays.write` does.
    """
    import orbax.checkpoint as ocp

    with _handler(base, deadline, private) as (handler, directory):
        handler.save(directory, args=ocp.args.PyTreeSave(_nest(parts)))
        written = directory / METADATA
        return written.read_bytes() if written.exists() else None


def restore(
    base: dict, metadata: bytes, wanted: dict[str, jax.ShapeDtypeStruct], deadline: Deadline
) -> dict[str, jax.Array]:
    """Reads {name: array} onto the shardings of `wanted`, which may name only some of the arrays.

    metadata: the content of `_METADATA`. Raises as `arrays.read` does.
    """
    import orbax.checkpoint as ocp

    places = {
        name: ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )
        for name, leaf in wanted.items()
    }
    with _handler(base, deadline, private=True) as (handler, directory):
        (directory / METADATA).write_bytes(metadata)
        args = ocp.args.PyTreeRestore(
            item=_nest(wanted), restore_args=_nest(places), partial_restore=True
        )
        return traverse_util.flatten_dict(handler.restore(directory, args=args), sep='/')


def _nest(flat: dict[str, Any]) -> dict:
    return traverse_util.unflatten_dict(flat, sep='/')


@contextmanager
def _handler(base: dict, deadline: Deadline, private: bool) -> Iterator[tuple]:
    """Yields (Orbax's handler with our type handler in it, an empty directory for it)."""
    import orbax.checkpoint as ocp  # here, because it takes a quarter of a second
    from etils import epath

    leaves = _make_type_handler(ocp)(base, deadline)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, leaves), (Snapshot, leaves)
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_zarr3=True,
        type_handler_registry=registry,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index() if private else 0  # it writes `_METADATA`
        ),
    )
    with tempfile.TemporaryDirectory(prefix='jaxfm') as directory:
        yield handler, epath.Path(directory)


def _make_type_handler(ocp):
    class Leaves(ocp.type_handlers.TypeHandler):
        """Writes and reads all arrays of a tree at once."""

        _array_metadata_store = None

        def __init__(self, base: dict, deadline: Deadline):
            self._base, self._deadline = base, deadline

        def typestr(self) -> str:
            return 'np.ndarray'  # readers of a jax.Array would want a file of shardings

        async def serialize(self, values, infos, args=None):
            named = {info.name: value for info, value in zip(infos, values, strict=True)}
            if len(named) < len(infos):
                raise ValueError("names of arrays that differ only in '/' and '.' are one to Orbax")
            arrays.write(self._base, named, self._deadline)
            return [ocp.future.NoopFuture()]  # Orbax does not take "nothing left to wait for"

        async def deserialize(self, infos, args=None):
            wanted = {
                info.name: jax.ShapeDtypeStruct(
                    place.global_shape, place.dtype, sharding=place.sharding
                )
                for info, place in zip(infos, args, strict=True)
            }
            found = arrays.read(self._base, wanted, self._deadline)
            return [found[info.name] for info in infos]

        async def metadata(self, infos):
            raise NotImplementedError

    return Leaves
