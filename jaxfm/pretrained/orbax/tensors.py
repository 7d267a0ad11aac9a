"""Reads parts of the arrays of a tree with TensorStore (`source.Tensors`)."""

import itertools
import math

import numpy as np

from jaxfm.errors import DataError, PermissionDeniedError, UnavailableError, listed
from jaxfm.pretrained.orbax.directory import Tree
from jaxfm.storage.arrays import CONTEXT, ERRORS, kind_of


class OrbaxTensors:
    """The arrays of a tree, opened at once and read on demand.

    Raises:
        DataError: an array is missing or damaged, or has fewer chunks than its shape needs.
        PermissionDeniedError, UnavailableError: the storage cannot be read.
    """

    def __init__(self, tree: Tree):
        import tensorstore as ts  # imported late: only a run that starts from a tree needs it

        self._tree, context = tree, ts.Context(CONTEXT)
        opening = {
            name: ts.open(_spec(tree, zarr), open=True, read=True, context=context)
            for name, zarr in tree.arrays.items()
        }
        self._stores = {name: self._result(name, future) for name, future in opening.items()}
        self.shapes = {name: tuple(store.shape) for name, store in self._stores.items()}
        self.dtypes = {name: store.dtype.numpy_dtype for name, store in self._stores.items()}

    def read(
        self, name: str, index: tuple[slice, ...] = (), order: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """A slice of an array, contiguous; only the chunks that it touches are read.

        order: the axes of the result, as numbers of stored axes; by default as stored.
        """
        store = self._stores[name][index] if index else self._stores[name]
        store = store if order is None else store.transpose(order)
        return self._result(name, store.read(order='C'))

    def check_chunks(self, names: list[str]) -> None:
        """Raises DataError if a chunk of these arrays has no file.

        Zarr would read it as zeros. An OCDBT database reports what it lacks when it is read.
        """
        if self._tree.is_database:
            return
        missing = {name: self._missing_chunks(name) for name in names}
        missing = {name: count for name, count in missing.items() if count}
        if not missing:
            return
        why = 'it was copied only in part'
        if not self._tree.keeps_zeros:
            why += ', or saved by an old Orbax, which leaves out zeros'
        raise DataError(
            f'{self._tree.place} lacks chunks of '
            + listed([f'{name} ({count})' for name, count in missing.items()])
            + f': {why}; save or copy it again'
        )

    def _missing_chunks(self, name: str) -> int:
        store, zarr = self._stores[name], self._tree.arrays[name]
        chunks = store.chunk_layout.write_chunk.shape or ()
        counts = [math.ceil(size / chunk) for size, chunk in zip(store.shape, chunks)]
        separator = '/'
        if not self._tree.is_zarr3:
            separator = store.spec().to_json()['metadata'].get('dimension_separator', '.')
        return sum(
            f'{zarr}/{_chunk_name(place, separator, self._tree.is_zarr3)}' not in self._tree.files
            for place in itertools.product(*map(range, counts))
        )

    def _result(self, name: str, future):
        # Nothing waits for ever: requests to S3 have time-outs and a bounded number of tries.
        try:
            return future.result()
        except ERRORS as error:
            raise self._explain(name, error) from error

    def _explain(self, name: str, error: Exception) -> Exception:
        place, text = self._tree.place, ' '.join(str(error).split(' [')[0].split())[:300]
        kind = kind_of(error)
        if kind is PermissionDeniedError:
            return kind(f'no permission to read {place}: {text}')
        if kind is UnavailableError:
            return kind(f'{place} cannot be reached: {text}')
        return DataError(
            f'{place} is damaged or was copied only in part: {name} cannot be read: {text}'
        )


def _spec(tree: Tree, zarr: str) -> dict:
    driver = 'zarr3' if tree.is_zarr3 else 'zarr'
    if tree.is_database:
        base = {'driver': 'ocdbt', 'base': tree.kvstore, 'cache_pool': 'cache_pool#index'}
        kvstore = base | {'path': f'{zarr}/'}
    else:
        kvstore = tree.kvstore | {'path': f'{tree.kvstore["path"]}{zarr}/'}
    # The files do not change, so no chunk in the cache is checked again.
    return {'driver': driver, 'kvstore': kvstore, 'recheck_cached_data': 'open'}


def _chunk_name(place: tuple[int, ...], separator: str, is_zarr3: bool) -> str:
    if is_zarr3:
        return '/'.join(['c', *map(str, place)])
    return separator.join(map(str, place)) or '0'
