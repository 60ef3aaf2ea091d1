"""Checkpoints: the only file that imports Orbax.

Checkpoint N is the state after N steps: the train state; what the loop has accumulated since its last line of metrics;
and the stream state of every process. All are written together, in the background, and count only when complete.

Checksums of all content are written with it. Those of the train state are computed on the device, before the copy to
the host.
"""

import contextlib
import dataclasses
import json
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import future

from mlm.errors import UserError, one_line
from mlm.run.gcs import GcsStorage
from mlm.run.storage import LocalStorage

# Version of the layout of a checkpoint. Raise it when code of an earlier version would misread it.
FORMAT_VERSION = 1


class ProcessJsonHandler(ocp.AsyncCheckpointHandler):
    """Writes one JSON file per process. Orbax's own handler writes only that of process 0."""

    async def async_save(self, directory: epath.Path, args: "ProcessJsonSave") -> list[future.Future]:
        """Writes this process's value after Orbax has created the directory."""

        async def write() -> None:
            self.save(directory, args)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="process_json_save")]

    def save(self, directory: epath.Path, args: "ProcessJsonSave") -> None:
        """Writes this process's value."""
        path = directory / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        path.write_text(json.dumps(_with_checksum(args.item)))

    def restore(self, directory: epath.Path, args: "ProcessJsonRestore") -> list[Any]:
        """Returns the values of all processes, by process index."""
        paths = sorted(directory.glob("process_*-of-*.json"), key=_process_of)
        if [_process_of(path) for path in paths] != [(n, len(paths)) for n in range(len(paths))] or not paths:
            raise ValueError(f"{directory} lacks the file of a process")
        return [_without_checksum(json.loads(path.read_text())) for path in paths]


def _process_of(path: epath.Path) -> tuple[int, int]:
    """process_3-of-8.json -> (3, 8)"""
    index, count = path.name.removeprefix("process_").removesuffix(".json").split("-of-")
    return int(index), int(count)


def _with_checksum(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"item": dict(item), "crc32": zlib.crc32(json.dumps(item).encode())}


def _without_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    if _with_checksum(content["item"]) != content:
        raise ValueError("a checksum does not match")
    return content["item"]


@ocp.args.register_with_handler(ProcessJsonHandler, for_save=True)
@dataclasses.dataclass
class ProcessJsonSave(ocp.args.CheckpointArgs):
    """This process's value to save."""

    item: Mapping[str, Any]


@ocp.args.register_with_handler(ProcessJsonHandler, for_restore=True)
@dataclasses.dataclass
class ProcessJsonRestore(ocp.args.CheckpointArgs):
    """Requests the values of all processes."""


class SaveError(Exception):
    """A checkpoint could not be written. Earlier ones are unaffected, and the next one may succeed."""


class DiskFullError(SaveError):
    """The save was not started: there is too little space, or the directory cannot be written."""


class CorruptCheckpointError(Exception):
    """A checkpoint cannot be read, or differs from what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """The content of a checkpoint.

    Attributes:
      step: number of steps done.
      state: the train state, global arrays.
      loop: what the loop has saved.
      streams: the stream state of each process of the run that saved it.
    """

    step: int
    state: Any
    loop: dict[str, Any]
    streams: list[dict[str, Any]]


class Checkpointer:
    """Saves and restores the checkpoints of a work directory. A context manager: leaving it waits for a save.

    Attributes:
      keep_steps: further steps whose checkpoints are kept.
      last_save_seconds: time that the last save took until its checkpoint was complete, as `check` has noticed; None if
        there was none.
    """

    def __init__(self, storage: LocalStorage | GcsStorage, *, keep_checkpoints: int, keep_every_steps: int = 0):
        """Opens the checkpoints; there may be none.

        Args:
          storage: the work directory's storage.
          keep_checkpoints: number of newest checkpoints to keep.
          keep_every_steps: older checkpoints at multiples of this are kept too; 0 for none.

        Raises:
          UserError: the checkpoints cannot be listed.
        """
        self._storage = storage
        self._exceptions: tuple[type[Exception], ...] = (OSError, ValueError, *storage.exceptions)
        self.keep_steps: Collection[int] = ()
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=_Preservation(self, keep_checkpoints=keep_checkpoints, every_steps=keep_every_steps),
            # Only the loop decides when to save: Orbax would silently skip steps off its own interval.
            save_interval_steps=1,
            enable_async_checkpointing=True,
            # The work directory is created after all checks have passed.
            create=False,
        )
        try:
            self._manager = self._open()
        except storage.exceptions as error:
            raise UserError(
                f"{storage.checkpoints}: cannot be read ({one_line(error)}); fix that, then rerun the same command"
            ) from None
        # True if the manager would raise the error of an earlier save again, and could not be replaced yet.
        self._is_stale = False
        self._save_start: float | None = None
        self.last_save_seconds: float | None = None

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._storage.checkpoints,
            options=self._options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "loop": ocp.JsonCheckpointHandler(),
                "stream": ProcessJsonHandler(),
            },
        )

    @property
    def damaged(self) -> str:
        """The directory of quarantined checkpoints."""
        return self._storage.damaged

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, *, state: Any, loop: Mapping[str, Any], stream: Mapping[str, Any]) -> None:
        """Waits for the previous save, copies the state off the devices, then writes in the background.

        Args:
          step: number of steps done.
          state: global arrays (`parallel.to_global`).
          loop: JSON-serializable, the same on every process.
          stream: JSON-serializable, this process's stream state.

        Raises:
          SaveError: the checkpoint cannot be written. A failure of the previous save is only logged, unless there are
            several processes.
        """
        try:
            self.wait()
        except SaveError as error:
            if jax.process_count() > 1:
                raise
            logging.warning("%s", error)
        content = {"format_version": FORMAT_VERSION, "loop": dict(loop), "checksums": checksums(state)}
        self._save_start = time.monotonic()
        with self._as_save_error():
            if self._is_stale:
                self._manager, self._is_stale = self._open(), False
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    loop=ocp.args.JsonSave(_with_checksum(content)),
                    stream=ProcessJsonSave(dict(stream)),
                ),
            )
            if not saved:
                # Orbax returns False without a reason for a step that is not after the newest one.
                raise AssertionError(f"Orbax did not save step {step}; the newest is {self.latest_step()}")

    def check_space(self, state: Any) -> None:
        """Detects before a save what would make it fail: a missing directory, a full or read-only disk.

        Raises:
          DiskFullError: the state cannot be saved.
        """
        try:
            self._storage.check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        except OSError as error:
            raise DiskFullError(f"a checkpoint could not be written ({one_line(error)})") from None

    def check(self) -> None:
        """Raises SaveError if the save in progress has failed; does not wait."""
        with self._as_save_error():
            self._manager.check_for_errors()
            if self._save_start is not None and not self._manager.is_saving_in_progress():
                self.last_save_seconds, self._save_start = time.monotonic() - self._save_start, None

    def wait(self) -> None:
        """Blocks until the save in progress is complete. Raises SaveError if it fails."""
        with self._as_save_error():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _as_save_error(self) -> Iterator[None]:
        """Turns exceptions of Orbax and its storage into SaveError, and replaces the manager."""
        try:
            yield
        except self._exceptions as error:
            # The manager's threads keep the error and would raise it again at the next save.
            self._is_stale = True
            # With several processes a new manager waits for all of them, and perhaps only this one has failed.
            if jax.process_count() == 1:
                with contextlib.suppress(*self._exceptions):
                    self._manager, self._is_stale = self._open(), False
                    self.remove_partial()
            raise SaveError(f"a checkpoint could not be written ({one_line(error)})") from None

    def remove_partial(self) -> None:
        """Removes what a failed or interrupted save has left. Must not be called during a save."""
        self._storage.remove_partial_checkpoints()

    def restore(self, step: int, *, like: Any) -> Restored:
        """Reads checkpoint `step`; `like` is a tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          CorruptCheckpointError: it cannot be read, or differs from what was written.
          UserError: its format version or its tree of arrays is not that of `like`; or the storage is unreachable.
        """
        with self._reading(step):
            small = self._manager.restore(
                step, args=ocp.args.Composite(loop=ocp.args.JsonRestore(), stream=ProcessJsonRestore())
            )
            content = self._checked_content(step, small.loop)
        expected = content["checksums"]
        names = list(_by_path(like))
        if sorted(names) != sorted(expected):
            raise UserError(
                f"{self._storage.checkpoints}/{step}: the checkpoint structure does not match the model; use the "
                "version of the code that wrote it, or choose another --workdir"
            )
        with self._reading(step):
            fields = self._stored_fields(step, like)
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(fields)))
            state = restored.state if fields is like else dataclasses.replace(like, **restored.state)
            _compare_checksums(expected, checksums(state))
        return Restored(step=step, state=state, loop=content["loop"], streams=small.stream)

    def _stored_fields(self, step: int, like: Any) -> Any:
        """Returns `like`; or its fields by name if some are None and were not in the state when it was saved.

        Orbax stores None as an entry of the tree, and compares the trees.
        """
        if not dataclasses.is_dataclass(like) or None not in vars(like).values():
            return like
        directory = epath.Path(self._storage.checkpoints) / str(step) / "state"
        stored = ocp.PyTreeCheckpointHandler().metadata(directory).tree
        return {name: value for name, value in vars(like).items() if value is not None or name in stored}

    def restore_params(self, step: int) -> tuple[Any, dict[str, Any]]:
        """Reads the parameters to evaluate from checkpoint `step`, as NumPy arrays, and what the loop has saved.

        They are the moving average of the parameters if the checkpoint has one.

        Raises:
          CorruptCheckpointError: it cannot be read, or differs from what was written.
          UserError: it has another format version, or the storage is unreachable.
        """
        directory = epath.Path(self._storage.checkpoints) / str(step) / "state"
        handler = ocp.PyTreeCheckpointHandler()
        with self._reading(step):
            small = self._manager.restore(step, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))
            content = self._checked_content(step, small.loop)
            tree = handler.metadata(directory).tree
            name = "ema_params" if tree.get("ema_params") else "params"
            wanted = {name: tree[name]}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
            params = handler.restore(directory, args=args)[name]
            _compare_checksums(
                content["checksums"], {f".{name}{path}": value for path, value in checksums(params).items()}
            )
        return params, content["loop"]

    def _checked_content(self, step: int, loop: Mapping[str, Any]) -> dict[str, Any]:
        content = _without_checksum(loop)
        if (version := content.get("format_version", 0)) != FORMAT_VERSION:
            raise UserError(
                f"{self._storage.checkpoints}/{step}: format_version={version} is not supported, this version of the "
                f"code reads {FORMAT_VERSION}; use the version that wrote the checkpoint, or choose another --workdir"
            )
        return content

    def quarantine(self, step: int) -> str:
        """Moves a corrupt checkpoint to `damaged/`; returns its new path. Call it on process 0, then `reload` on all.

        Raises:
          UserError: the storage is unreachable.
        """
        with self._reading(step):
            return self._storage.quarantine(step)

    def reload(self) -> None:
        """Lists the checkpoints again."""
        self._manager.reload()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def streams(self, step: int) -> list[dict[str, Any]]:
        """Reads only the stream states of checkpoint `step`, by process. Raises errors as `restore` does."""
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(stream=ProcessJsonRestore())).stream

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns exceptions of reads into CorruptCheckpointError, or UserError where the storage is unreachable."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self._storage.is_unreachable(error):
                raise UserError(
                    f"{self._storage.checkpoints}/{step}: cannot be read now ({one_line(error)}); check the network "
                    "and the permissions, then rerun the same command to resume"
                ) from None
            # Orbax raises a plain Exception where a part of an array cannot be read.
            if type(error) is Exception or isinstance(error, KeyError | TypeError | ValueError | OSError):
                raise CorruptCheckpointError(f"{type(error).__name__}: {one_line(error)}") from None
            raise

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc: object) -> None:
        # Failures up to here were logged, or matter less than the exception that ends the run.
        with contextlib.suppress(SaveError):
            self.wait()
        self._manager.close()


@dataclasses.dataclass(frozen=True)
class _Preservation:
    """The checkpoints that stay: the newest ones, multiples of `every_steps`, and `checkpointer.keep_steps`."""

    checkpointer: Checkpointer
    keep_checkpoints: int
    every_steps: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps, every = [checkpoint.step for checkpoint in checkpoints], self.every_steps
        kept = {*steps[-self.keep_checkpoints :], *self.checkpointer.keep_steps}
        return [step in kept or bool(every and step % every == 0) for step in steps]


def checksums(state: Any) -> dict[str, int]:
    """Returns path -> checksum of each leaf, which changes with any bit; computed on a device of this process."""
    local = {
        path: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
        for path, leaf in _by_path(state).items()
    }
    return {path: int(value) for path, value in jax.device_get(_checksums(local)).items()}


def _compare_checksums(expected: Mapping[str, int], found: Mapping[str, int]) -> None:
    for path, value in found.items():
        if expected.get(path) != value:
            raise ValueError(f"the checksum of {path} does not match")


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# One program instead of one for each shape.
@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _checksum(leaf) for path, leaf in leaves.items()}


def _checksum(leaf: jax.Array) -> jax.Array:
    """Returns the sum of all words, each times a different odd number, modulo 2^32: any change of one word is found."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, unsigned).ravel().astype(jnp.uint32)
    return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
