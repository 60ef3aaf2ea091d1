"""Checkpoints: the only file that imports Orbax.

A checkpoint named N holds N updates: the train state, what the loop has summed up since its last line of metrics,
and every process's place in its stream. All are written together, in the background, and count only once complete.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from mlm.errors import UserError


class ProcessJsonHandler(ocp.AsyncCheckpointHandler):
    """Writes one JSON file per process; Orbax's own handler writes the first process's only."""

    async def async_save(self, directory: epath.Path, args: "ProcessJsonSave") -> list[future.Future]:
        """Writes this process's value once Orbax has made the directory."""

        async def write() -> None:
            self.save(directory, args)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="process_json_save")]

    def save(self, directory: epath.Path, args: "ProcessJsonSave") -> None:
        """Writes this process's value."""
        (directory / f"process_{jax.process_index()}-of-{jax.process_count()}.json").write_text(json.dumps(args.item))

    def restore(self, directory: epath.Path, args: "ProcessJsonRestore") -> list[Any]:
        """Returns the values of all processes, by process index."""
        paths = list(directory.glob("process_*-of-*.json"))
        return [json.loads(path.read_text()) for path in sorted(paths, key=_process_of)]


def _process_of(path: epath.Path) -> int:
    return int(path.name.removeprefix("process_").split("-")[0])


@ocp.args.register_with_handler(ProcessJsonHandler, for_save=True)
@dataclasses.dataclass
class ProcessJsonSave(ocp.args.CheckpointArgs):
    """This process's value to save."""

    item: Mapping[str, Any]


@ocp.args.register_with_handler(ProcessJsonHandler, for_restore=True)
@dataclasses.dataclass
class ProcessJsonRestore(ocp.args.CheckpointArgs):
    """Asks for the values of all processes."""


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
    """Saves and restores under one directory. A context manager: leaving it waits for what is being written."""

    def __init__(self, directory: str, *, keep_checkpoints: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_checkpoints,
            # The loop alone knows when to save; Orbax would silently skip steps off its own interval.
            save_interval_steps=1,
            enable_async_checkpointing=True,
            # The work directory is made once all is known to be well.
            create=False,
        )
        self._manager = ocp.CheckpointManager(
            os.path.abspath(directory),
            options=options,
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
        """Copies the state off the devices, then writes in the background.

        Args:
          step: updates in the state.
          state: global arrays (`parallel.to_global`).
          loop: JSON-serializable, the same on every process.
          stream: JSON-serializable, this process's own.
        """
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                loop=ocp.args.JsonSave(dict(loop)),
                stream=ProcessJsonSave(dict(stream)),
            ),
        )
        if not saved:
            # Orbax says no more than False, for a step that is not past the newest one.
            raise ValueError(f"Orbax did not save step {step}; the newest checkpoint is {self.latest_step()}")

    def restore(self, step: int, *, like: Any) -> Restored:
        """Reads checkpoint `step`; `like` is a tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          UserError: it is damaged, or not of such a state.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), loop=ocp.args.JsonRestore(), stream=ProcessJsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except (KeyError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"checkpoint {step} cannot be read ({type(error).__name__}: {reason}); remove "
                f"{self._manager.directory / str(step)} to go on from the one before"
            ) from None
        return Restored(step=step, state=restored.state, loop=dict(restored.loop), streams=restored.stream)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def streams(self, step: int) -> list[dict[str, Any]]:
        """Reads the stream states of checkpoint `step`, by process, and nothing else."""
        return self._manager.restore(step, args=ocp.args.Composite(stream=ProcessJsonRestore())).stream

    def wait(self) -> None:
        """Blocks until everything saved is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
