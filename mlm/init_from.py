"""A new run that starts from a checkpoint of another one, its parent (`checkpoint.init_from`).

The parent is only read, without a lock, so it may be in progress. A run that has a checkpoint of its own no longer
needs its parent.
"""

import dataclasses
import os
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlm import parallel
from mlm.errors import UserError
from mlm.run.checkpoint import FORMAT_VERSION as CHECKPOINT_FORMAT_VERSION
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError, Restored
from mlm.run.workdir import KeyChanges, WorkDir, describe_changes
from mlm.settings import RunSettings
from mlm.stages import check_branch, may_change, started_stages
from mlm.steps import TrainState, UpdateStats

# Keys for how the model is computed, which do not change the model.
_EXECUTION_KEYS = ("model.dtype", "model.attention", "model.remat", "tokenizer.backend")


@dataclasses.dataclass(frozen=True)
class Parent:
    """The checkpoint to start from.

    Attributes:
      workdir: the work directory of its run.
      step: steps in it.
      mode: "branch" or "restart".
    """

    workdir: WorkDir
    step: int
    mode: str

    def to_json(self) -> dict[str, Any]:
        """Returns what `config.json` records."""
        return {
            "path": self.workdir.display_path,
            "step": self.step,
            "mode": self.mode,
            "format_version": CHECKPOINT_FORMAT_VERSION,
        }

    def copy_tokenizer(self, directory: str) -> None:
        """Copies the tokenizer to a directory that does not exist."""
        shutil.copytree(self.workdir.tokenizer, directory)

    def restore(self, like: Any) -> Restored:
        """Reads the checkpoint, as `Checkpointer.restore` does. Raises UserError if it is corrupt or gone."""
        with Checkpointer(self.workdir.storage, keep_checkpoints=1) as checkpointer:
            try:
                return checkpointer.restore(self.step, like=like)
            except CorruptCheckpointError as error:
                raise UserError(
                    f"checkpoint.init_from={self.workdir.display_path!r}: cannot read checkpoint {self.step} "
                    f"({error}); choose another one with @STEP"
                ) from None


def open_parent(
    settings: RunSettings, workdir: WorkDir, *, key_changes: KeyChanges | None
) -> tuple[RunSettings, Parent | None]:
    """Finds the checkpoint that a run starts from; every process must call it.

    Args:
      settings: the run's settings, as `WorkDir.resume` returns them.
      workdir: the run's work directory.
      key_changes: how config keys have changed since earlier versions.

    Returns:
      The settings, for a branch completed with what its parent has decided; and the parent, None for a run that has no
      parent or that has a checkpoint of its own.

    Raises:
      UserError: there is no such checkpoint, or its run has another config.
    """
    if not settings.checkpoint.init_from:
        return settings, None
    with Checkpointer(workdir.storage, keep_checkpoints=1) as checkpointer:
        if checkpointer.steps():
            return settings, None
    # Left by a start that was killed before its first checkpoint.
    recorded = workdir.read_parent()
    return _find_parent(settings, recorded["step"] if recorded else None, key_changes=key_changes)


def _find_parent(
    settings: RunSettings, recorded_step: int | None, *, key_changes: KeyChanges | None
) -> tuple[RunSettings, Parent]:
    name, mode = settings.checkpoint.init_from or "", settings.checkpoint.init_mode or ""
    path, step = split_step(name)
    try:
        parent = WorkDir(path, key_changes=key_changes)
        parent.read_config()
    except UserError as error:
        problem = re.sub(r"^--workdir=\S*: ", "", str(error))
        raise UserError(f"checkpoint.init_from={name!r}: {problem}") from None
    if mode == "branch":
        settings = parent.complete(settings)
    _check_config(settings, parent, name=name, mode=mode)
    with Checkpointer(parent.storage, keep_checkpoints=1) as checkpointer:
        available = checkpointer.steps()
    if not available:
        raise UserError(f"checkpoint.init_from={name!r}: has no checkpoints; wait for its run to save one")
    if recorded_step is not None:
        step = recorded_step
    if step is None:
        # A run in progress may save another checkpoint while the processes look.
        step = int(parallel.broadcast_from_first(np.array(available[-1])))
    if step not in available:
        raise UserError(
            f"checkpoint.init_from={name!r}: has no checkpoint {step}; choose one of {', '.join(map(str, available))}"
        )
    if mode == "branch" and step >= settings.num_train_steps:
        raise UserError(
            f"num_train_steps={settings.num_train_steps}: the checkpoint of checkpoint.init_from={name!r} has {step} "
            "steps already; raise it, or choose an earlier checkpoint with @STEP"
        )
    if mode == "branch":
        try:
            num_begun = len(started_stages(parent.last_stages(), step=step)) or 1
            check_branch(settings, parent.read_settings(), num_begun=num_begun)
        except UserError as error:
            raise UserError(f"checkpoint.init_from={name!r}: {error}") from None
    return settings, Parent(parent, step, mode)


def split_step(name: str) -> tuple[str, int | None]:
    """WORKDIR@STEP -> WORKDIR, STEP; the step is None if there is none."""
    match = re.fullmatch(r"(.+)@(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def check_overwrite(settings: RunSettings, workdir: WorkDir, *, key_changes: KeyChanges | None) -> None:
    """Checks that a run can start from its parent before --overwrite renames anything; every process must call it.

    Raises:
      UserError: --overwrite would rename the parent, or the new run cannot start from it.
    """
    name = settings.checkpoint.init_from
    if name:
        path, _ = split_step(name)
        path = path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))
        if path == workdir.display_path:
            raise UserError(
                f"checkpoint.init_from={name!r}: is the run that --overwrite renames; choose another --workdir"
            )
        _find_parent(settings, None, key_changes=key_changes)


def _check_config(settings: RunSettings, parent: WorkDir, *, name: str, mode: str) -> None:
    """Raises UserError if a key that must not change differs from the parent's."""
    changes = parent.changes(settings)
    for_restart = {key: pair for key, pair in changes.items() if _is_fixed(key, *pair)}
    differing = for_restart
    if mode == "branch":
        own = ("checkpoint.init_from", "checkpoint.init_mode", "stages")
        differing = {key: pair for key, pair in changes.items() if key not in own and not may_change(key, *pair)}
    if not differing:
        return
    groups = {key.partition(".")[0] for key in differing}
    what = next((group for group in ("model", "tokenizer", "optimizer") if group in groups), "config")
    advice = "" if for_restart else ", or checkpoint.init_mode='restart'"
    raise UserError(
        f"checkpoint.init_from={name!r}: holds a run with another {what}: {describe_changes(differing)}; use the same "
        f"values{advice}"
    )


def _is_fixed(key: str, there: Any, here: Any) -> bool:
    """Returns whether a key that differs makes the parent's parameters or optimizer state useless."""
    if key == "optimizer.ema_decay":  # The checkpoint has an average, or it has none.
        return bool(there) != bool(here)
    return key == "optimizer.name" or (key.startswith(("model.", "tokenizer.")) and key not in _EXECUTION_KEYS)


def restart(state: TrainState) -> TrainState:
    """Returns a state at step 0 with the parameters and the optimizer's moments of another state.

    The schedule and the statistics of steps begin again. The step counts that belong to the moments stay, such as
    those of Adam's bias correction, which is for moments that begin at 0.
    """

    def zero(leaf: jax.Array) -> jax.Array:
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    opt_state = jax.tree.map(
        lambda node: jax.tree.map(zero, node) if is_schedule(node) else node, state.opt_state, is_leaf=is_schedule
    )
    stats = UpdateStats(zero(state.update_stats.num_applied), zero(state.update_stats.mean_grad_norm))
    return state.replace(step=zero(state.step), opt_state=opt_state, update_stats=stats)
