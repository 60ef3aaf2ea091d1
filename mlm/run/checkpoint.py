"""Checkpoints: the only file that imports Orbax.

A checkpoint named N holds N updates: the train state, what the loop has summed up since its last line of metrics,
and every process's place in its stream. All are written together, in the background, and count only once complete.

Checksums of all of it are written with it: those of the state are taken on the device, before the way to the disk.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import future

from mlm.errors import UserError, one_line
from mlm.run import gcs


class ProcessJsonHandler(ocp.AsyncCheckpointHandler):
    """Writes one JSON file per process; Orbax's own handler writes the first process's only."""

    async def async_save(self, directory: epath.Path, args: "ProcessJsonSave") -> list[future.Future]:
        """Writes this process's value once Orbax has made the directory."""

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


def _without_checksum(sealed: Mapping[str, Any]) -> dict[str, Any]:
    if _with_checksum(sealed["item"]) != sealed:
        raise ValueError("a checksum does not match")
    return sealed["item"]


@ocp.args.register_with_handler(ProcessJsonHandler, for_save=True)
@dataclasses.dataclass
class ProcessJsonSave(ocp.args.CheckpointArgs):
    """This process's value to save."""

    item: Mapping[str, Any]


@ocp.args.register_with_handler(ProcessJsonHandler, for_restore=True)
@dataclasses.dataclass
class ProcessJsonRestore(ocp.args.CheckpointArgs):
    """Asks for the values of all processes."""


# By which Orbax tells that a checkpoint in a bucket is whole.
_COMMITTED = re.compile(r"checkpoints/[^/]+/commit_success.txt")


# Of TensorStore's words for errors those that are none of what is stored.
_TRANSIENT_STATUS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|RESOURCE_EXHAUSTED|INTERNAL)\b"
)


class SaveError(Exception):
    """A checkpoint was not written. Those before it are as they were, and the next one may be."""


class DiskFullError(SaveError):
    """It was not even begun."""


class CorruptCheckpointError(Exception):
    """A checkpoint cannot be read, or is not what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint's content.

    Attributes:
      step: updates in it.
      state: the train state, global arrays.
      loop: what the loop saved.
      streams: the stream state of each process of the run that saved it.
    """

    step: int
    state: Any
    loop: dict[str, Any]
    streams: list[dict[str, Any]]


class Checkpointer:
    """Saves and restores under one directory. A context manager: leaving it waits for what is being written.

    Attributes:
      damaged: where checkpoints go that cannot be read.
    """

    def __init__(self, directory: str, *, keep_checkpoints: int, keep_every_steps: int = 0):
        """Keeps the newest `keep_checkpoints`, and those at multiples of `keep_every_steps` unless it is 0."""
        self._directory = directory if gcs.is_url(directory) else os.path.abspath(directory)
        self.damaged = os.path.join(os.path.dirname(self._directory), "damaged")
        # Where it is in a bucket: that of the run.
        self._folder = gcs.GcsPrefix(os.path.dirname(directory)) if gcs.is_url(directory) else None
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_checkpoints,
            keep_period=keep_every_steps or None,
            # The loop alone knows when to save; Orbax would silently skip steps off its own interval.
            save_interval_steps=1,
            enable_async_checkpointing=True,
            # The work directory is made once all is known to be well.
            create=False,
        )
        unreachable = gcs.failures() if self._folder else ()
        try:
            self._manager = self._open()
        except unreachable as error:
            raise UserError(f"the checkpoints in {directory} cannot be read ({one_line(error)}); mend that") from None
        # Whether an error that was told of still sticks to the manager, for another could not be made.
        self._is_stale = False

    def _failures(self) -> tuple[type[Exception], ...]:
        """What Orbax and its storage raise when they cannot write."""
        return (OSError, ValueError) if self._folder is None else (OSError, ValueError, *gcs.failures())

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._directory,
            options=self._options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "loop": ocp.JsonCheckpointHandler(),
                "stream": ProcessJsonHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, *, state: Any, loop: Mapping[str, Any], stream: Mapping[str, Any]) -> None:
        """Copies the state off the devices, then writes in the background, once the save before it is done.

        Args:
          step: updates in the state.
          state: global arrays (`parallel.to_global`).
          loop: JSON-serializable, the same on every process.
          stream: JSON-serializable, this process's own.

        Raises:
          SaveError: it cannot be written, as far as is known by now. One before it that failed is only told of.
        """
        try:
            self.wait()
        except SaveError as error:
            logging.warning("%s", error)
        if jax.process_count() == 1:
            # Orbax has every device write a slice of what all of them hold: a program for each shape and device, which
            # takes longer than it saves where one process writes them all.
            state = jax.tree.map(lambda leaf: leaf.addressable_data(0), state)
        loop = {"loop": dict(loop), "checksums": checksums(state)}
        with self._translate_errors():
            if self._is_stale:
                self._manager, self._is_stale = self._open(), False
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    loop=ocp.args.JsonSave(_with_checksum(loop)),
                    stream=ProcessJsonSave(dict(stream)),
                ),
            )
            if not saved:
                # Orbax says no more than False, for a step that is not past the newest one.
                raise AssertionError(f"Orbax did not save step {step}; the newest is {self.latest_step()}")

    def require_room(self, state: Any) -> None:
        """Finds out what it can before a save: a directory that is gone, a disk that is full or cannot be written to.

        Raises:
          NoRoomError: the state cannot be saved.
        """
        if self._folder is not None:
            return  # A bucket is never full.
        try:
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            free = shutil.disk_usage(self._directory).free
            if free < needed:
                raise OSError(f"{free / 1e6:,.0f} MB are free in {self._directory}, and {needed / 1e6:,.0f} are needed")
            tempfile.TemporaryFile(dir=self._directory).close()
        except OSError as error:
            raise DiskFullError(f"a checkpoint could not be written ({error})") from None

    def check(self) -> None:
        """Raises SaveError if the save under way has failed by now; waits for nothing."""
        with self._translate_errors():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until everything saved is on disk.

        Raises:
          SaveError: it is not.
        """
        with self._translate_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """What Orbax and its storage raise when they cannot write -> SaveError, and a clean slate."""
        try:
            yield
        except self._failures() as error:
            # Its parts keep the error, and would raise it again at the next save.
            self._is_stale = True
            with contextlib.suppress(*self._failures()):
                self._manager, self._is_stale = self._open(), False
                if jax.process_index() == 0:
                    self.remove_partial()
            raise SaveError(f"a checkpoint could not be written ({one_line(error)})") from None

    def remove_partial(self) -> None:
        """Removes what a save that failed, or was cut off, has left. Not while one is under way."""
        if self._folder is not None:
            # No rename ends a save in a bucket, but an object of this name.
            with contextlib.suppress(OSError):  # Nobody takes it for a checkpoint, and the next start tries again.
                names = self._folder.generations(under="checkpoints/")
                whole = {name.split("/")[1] for name in names if _COMMITTED.fullmatch(name)}
                self._folder.remove([name for name in names if name.split("/")[1] not in whole])
            return
        for name in os.listdir(self._directory) if os.path.isdir(self._directory) else ():
            if ".orbax-checkpoint-tmp" in name:
                shutil.rmtree(os.path.join(self._directory, name), ignore_errors=True)

    def restore(self, step: int, *, like: Any) -> Restored:
        """Reads checkpoint `step`; `like` is a tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          DamagedError: it cannot be read, or is not what was written.
          UserError: it holds another state than `like`.
        """
        with self._reading(step):
            head = self._manager.restore(
                step, args=ocp.args.Composite(loop=ocp.args.JsonRestore(), stream=ProcessJsonRestore())
            )
            loop = _without_checksum(head.loop)
            written = loop["checksums"]
        names = list(_paths(like))
        if sorted(names) != sorted(written):
            raise UserError(
                f"checkpoint {step} in {self._directory} holds a state of other parts than this run's: it is of "
                "another version of the code, or of another model; choose another --workdir"
            )
        with self._reading(step):
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
            found = checksums(state)
            if differing := [name for name in names if found[name] != written[name]]:
                raise ValueError(f"the checksum of {differing[0]} does not match")
        return Restored(step=step, state=state, loop=loop["loop"], streams=head.stream)

    def restore_params(self, step: int) -> tuple[Any, dict[str, Any]]:
        """Reads the parameters of checkpoint `step`, NumPy arrays, and what the loop saved; whatever devices wrote it.

        Raises:
          DamagedError: it cannot be read, or is not what was written.
        """
        directory = epath.Path(self._directory) / str(step) / "state"
        handler = ocp.PyTreeCheckpointHandler()
        with self._reading(step):
            head = self._manager.restore(step, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))
            loop = _without_checksum(head.loop)
            wanted = {"params": handler.metadata(directory).tree["params"]}
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=kinds, partial_restore=True)
            params = handler.restore(directory, args=arguments)["params"]
            found = {f".params{name}": value for name, value in checksums(params).items()}
            if differing := [name for name, value in found.items() if loop["checksums"].get(name) != value]:
                raise ValueError(f"the checksum of {differing[0]} does not match")
        return params, loop["loop"]

    def quarantine(self, step: int) -> str:
        """Moves a damaged checkpoint out of the way, on process 0. Call `reload` on all after it.

        Returns:
          Where to.
        """
        if self._folder is not None:
            with self._reading(step):
                return self._folder.quarantine(f"checkpoints/{step}", to=f"damaged/{step}")
        os.makedirs(self.damaged, exist_ok=True)
        number = 0
        while os.path.exists(target := os.path.join(self.damaged, f"{step}" + f".{number}" * (number > 0))):
            number += 1
        os.rename(os.path.join(self._directory, str(step)), target)
        return target

    def reload(self) -> None:
        """Looks again which checkpoints there are."""
        self._manager.reload()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def streams(self, step: int) -> list[dict[str, Any]]:
        """Reads the stream states of checkpoint `step`, by process, and nothing else."""
        return self._manager.restore(step, args=ocp.args.Composite(stream=ProcessJsonRestore())).stream

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """What they raise when they cannot read -> DamagedError; UserError where it is the way to the bucket."""
        try:
            yield
        except Exception as error:
            if self._is_unreachable(error):
                raise UserError(
                    f"checkpoint {step} in {self._directory} cannot be read now ({one_line(error)}); mend the network "
                    "or the rights: the same command goes on"
                ) from None
            # Where a part of an array cannot be read Orbax raises a plain Exception.
            if type(error) is Exception or isinstance(error, KeyError | TypeError | ValueError | OSError):
                raise CorruptCheckpointError(f"{type(error).__name__}: {one_line(error)}") from None
            raise

    def _is_unreachable(self, error: Exception) -> bool:
        if self._folder is None or isinstance(error, FileNotFoundError):
            return False
        return isinstance(error, gcs.failures()) or _TRANSIENT_STATUS.search(str(error)) is not None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc: object) -> None:
        # What failed by now was told, or does not matter beside what ends the run.
        with contextlib.suppress(SaveError):
            self.wait()
        self._manager.close()


def checksums(state: Any) -> dict[str, int]:
    """A number for each leaf, by path, that changes with any bit of it; computed where the leaf is."""
    return {name: int(value) for name, value in jax.device_get({k: _sum(v) for k, v in _paths(state).items()}).items()}


def _paths(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit
def _sum(leaf: jax.Array) -> jax.Array:
    """The sum of all words, each times an odd number of its own, modulo 2^32: a change of one word always shows."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, unsigned).ravel().astype(jnp.uint32)
    return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
