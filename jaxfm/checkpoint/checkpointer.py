"""Saves and restores a run with Orbax: asynchronous, the last N kept, a step whole or not at all.

A step is a directory with two items: `state` (arrays, OCDBT) and `extra` (JSON: the position of the
source, the clocks, the position of the metrics file). It is written under a temporary name and
renamed last: a process killed in the middle of a save leaves nothing that could be taken for a
checkpoint, and the next process sweeps it.
"""

import contextlib
import functools
import gc
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.fit import check_fit
from jaxfm.checkpoint.storage import PosixStorage, explained
from jaxfm.errors import DataError, MissingInputError, StorageError

log = logging.getLogger('jaxfm')


class Checkpointer:
    """The checkpoints of one run. With several processes every method is called by all of them.

    directory: where they are, unless the config names another place.
    read_only: makes and sweeps nothing, so that a training run may go on beside this reader.
    milestones: steps whose checkpoints stay whatever comes after them, such as ends of phases.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        directory: str | Path,
        read_only: bool = False,
        milestones: Iterable[int] = (),
    ):
        _quieten_orbax()
        self._storage = PosixStorage(config.directory or directory)
        self._milestones = tuple(milestones)
        self.directory = self._storage.directory
        if not read_only:
            self._storage.prepare()
        several = jax.process_count() > 1
        # Hosts must agree on what is there; a shared file system may not show it to all at once.
        self._names = ocp.path.step.standard_name_format(single_host_load_and_broadcast=several)
        with explained(f'checkpoint directory {self.directory}'):
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={
                    # Bare zarr reads a lost chunk as zeros, OCDBT as an error.
                    'state': ocp.PyTreeCheckpointHandler(use_ocdbt=True),
                    'extra': ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy(
                        [LatestN(config.keep), CustomSteps(list(milestones))]
                    ),
                    step_name_format=self._names,
                    single_host_load_and_broadcast=several,
                    create=not read_only,
                    cleanup_tmp_directories=not read_only,
                ),
            )
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """The committed steps, in order."""
        if not self.directory.is_dir():
            return []
        # Several hosts agree by way of a device array: numpy numbers, which are no JSON.
        return sorted(int(found.step) for found in self._names.find_all(self.directory))

    def latest_step(self) -> int | None:
        """The newest committed step; None when there is no checkpoint."""
        return max(self.steps(), default=None)

    def check_room(self, nbytes: int) -> None:
        """Raises StorageError unless two checkpoints of `nbytes` fit, or one beside those here.

        Two, because the last good one stays while the next is written; and the milestones to come.
        """
        steps = self.steps()
        to_come = sum(step > max(steps, default=0) for step in self._milestones)
        need = nbytes * (to_come + (1 if steps else 2))
        have = self._storage.free_bytes()
        if have < need:
            raise StorageError(
                f'no room for checkpoints in {self.directory}: '
                f'need {_gib(need)} ({need // max(nbytes, 1)} of {_gib(nbytes)}), have {_gib(have)}'
            )

    def save(self, step: int, state, extra: dict[str, Any]) -> None:
        """Starts a save and returns once the state is copied: the caller may donate it right away.

        A step that is already there is left alone. Raises StorageError when the save before failed.
        state: tree of global arrays. extra: JSON.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            # A copy: the source goes on moving while this is written.
            extra=ocp.args.JsonSave(json.loads(json.dumps(extra))),
        )
        # The one transfer from the device that the training loop means to make.
        with self._failing_as_storage_error(step), jax.transfer_guard('allow'):
            # force: by default Orbax skips, without a word, a step older than the newest it has.
            self._manager.save(step, args=items, force=True)
        self._saving = step

    def wait(self) -> None:
        """Blocks until the save under way is committed. Raises StorageError when it failed."""
        step, self._saving = self._saving, None
        with self._failing_as_storage_error(step):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of threads. Raises StorageError when the last save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, step: int, abstract_state) -> tuple[Any, dict[str, Any]]:
        """The state of a step on the shardings of `abstract_state`, and its extra.

        abstract_state: tree of jax.ShapeDtypeStruct with concrete NamedShardings, of any mesh.
        Raises ConfigError naming each leaf that differs in name, shape or dtype; DataError when
        the checkpoint is damaged; MissingInputError when there is no such step.
        """
        check_fit(abstract_state, self._stored(step), self._name(step))
        return self._restore_state(step, abstract_state), self.read_extra(step)

    def restore_params(self, step: int, abstract_params: dict[str, Any]) -> dict[str, Any]:
        """The parameters alone, {path: array}, whichever of them that phase trained or froze."""
        stored = self._stored(step)
        names = {path: _name_of_param(path, stored) for path in abstract_params}
        wanted = {names[path]: leaf for path, leaf in abstract_params.items()}
        check_fit(wanted, stored, self._name(step), partial=True)
        tree = self._restore_state(step, wanted, partial_restore=True)
        return {path: tree[name] for path, name in names.items()}

    def read_extra(self, step: int) -> dict[str, Any]:
        """The JSON that was saved with a step."""
        self._check_there(step)
        with self._failing_as_data_error(step):
            return self._manager.restore(
                step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())
            ).extra

    def _restore_state(self, step: int, abstract, **options):
        restore = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            **options,
        )
        with self._failing_as_data_error(step):
            return self._manager.restore(step, args=ocp.args.Composite(state=restore)).state

    def _stored(self, step: int):
        """Names, shapes and dtypes of what a checkpoint holds."""
        self._check_there(step)
        with self._failing_as_data_error(step):
            stored = self._manager.item_metadata(step).state
            if stored is None or stored.tree is None:
                raise ValueError('its metadata is missing')
        return stored.tree

    def _name(self, step: int) -> str:
        return f'checkpoint {step} in {self.directory}'

    def _check_there(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            raise MissingInputError(
                f'no checkpoint {step} in {self.directory}; there are: '
                f'{", ".join(map(str, steps)) or "none"}'
            )

    @contextlib.contextmanager
    def _failing_as_storage_error(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = _reason(error, self.directory)
            raise StorageError(
                f'checkpoint {step} could not be saved in {self.directory}: {reason}'
            ) from error

    @contextlib.contextmanager
    def _failing_as_data_error(self, step: int) -> Iterator[None]:
        _mute_late_reads()
        try:
            yield
        except Exception as error:
            reason = _reason(error, self.directory)
        else:
            return
        gc.collect()  # the reads that were never awaited, while their complaints are muted
        raise DataError(f'checkpoint {step} in {self.directory} cannot be read: {reason}')


def _name_of_param(path: str, stored) -> str:
    names = [f'{kind}/{path}' for kind in ('trainable', 'frozen', 'buffers')]
    return next((name for name in names if name in stored), names[0])


def _reason(error: Exception, directory: Path) -> str:
    """One line: TensorStore appends its whole specification and repeats the directory."""
    text = f'{error}: {error.__cause__}' if error.__cause__ else str(error)
    text = re.sub(r' See full TensorStore details.*?>\.?(?=: |$)', '', text, flags=re.DOTALL)
    text = re.sub(r'\[(tensorstore_spec|os_error|source).*', '', text, flags=re.DOTALL)
    text = ' '.join(text.replace(f'{directory}/', '').split())
    return text[:600] or type(error).__name__


def _gib(nbytes: int) -> str:
    return f'{nbytes / 2**30:.3g} GiB'


def _quieten_orbax() -> None:
    """Orbax tells every step and prints tracebacks of errors that it raises; we report those."""
    logger = logging.getLogger('absl')
    if _from_elsewhere not in logger.filters:
        logger.addFilter(_from_elsewhere)


def _from_elsewhere(record: logging.LogRecord) -> bool:
    if '/orbax/' not in record.pathname:
        return True
    log.debug('orbax: %s', record.getMessage())
    return False


def _mute_late_reads() -> None:
    """When one read fails, the others end on threads of TensorStore after their event loop closed,
    and each prints a traceback. These are muted from the first read on, no other complaint is.
    """
    if not getattr(sys.unraisablehook, 'mutes_late_reads', False):
        sys.unraisablehook = functools.partial(_unraisable_hook, sys.unraisablehook)
        sys.unraisablehook.mutes_late_reads = True


def _unraisable_hook(otherwise, unraisable) -> None:
    late = str(unraisable.exc_value) == 'Event loop is closed'
    unawaited = getattr(unraisable.object, '__qualname__', '') == '_read_array_index_and_device_put'
    if not late and not unawaited:
        otherwise(unraisable)
