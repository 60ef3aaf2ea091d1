"""The work directory: where its files are, and whether a run may go on in it."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from mlm.errors import UserError

# A run may go on with other values of these; any other key changes what the updates so far have meant.
MAY_CHANGE = (
    "num_train_steps",
    "per_device_eval_batch_size",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "data.prefetch_batches",
    # Past the checkpoint only: mlm/data/batches.py refuses others.
    "data.skip_steps",
    "data.cache_dir",
    "data.network_deadline_seconds",
    "data.network_timeout_seconds",
    "data.max_failed_shards",
    "tokenizer.backend",
    "optimizer.",
    "checkpoint.",
    "hub.",
    "profile.",
    "report.",
)


class WorkDir:
    """Paths of a run's files; making one touches nothing.

    Raises:
      UserError: the path cannot be a work directory.
    """

    def __init__(self, path: str):
        self.path = os.path.abspath(os.path.expanduser(path))
        self.config = os.path.join(self.path, "config.json")
        self.tokenizer = os.path.join(self.path, "tokenizer")
        self.checkpoints = os.path.join(self.path, "checkpoints")
        self.metrics = os.path.join(self.path, "metrics.jsonl")
        self.model = os.path.join(self.path, "model")

        existing = self.path
        while not os.path.lexists(existing):
            existing = os.path.dirname(existing)
        if not os.path.isdir(existing):
            raise UserError(f"--workdir={path}: {existing} is a file; name a directory, or one that can be made")
        try:
            # Rights do not tell: root has them all, and a read-only disk has none.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise UserError(
                f"--workdir={path}: {existing} is not writable ({error.strerror}); choose another"
            ) from None

    def check_same_run(self, config: dict[str, Any]) -> None:
        """Refuses a config that differs from the directory's own in a key that changes the run's result."""
        if not os.path.exists(self.config):
            return
        old, new = flatten(self.read_config()), flatten(config)
        differing = [
            f"{key} (there {old.get(key, 'absent')!r}, here {new.get(key, 'absent')!r})"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, "absent") != new.get(key, "absent") and not key.startswith(MAY_CHANGE)
        ]
        if differing:
            raise UserError(
                f"{self.path} holds a run with another config: {'; '.join(differing)}. "
                "Use the same values to go on with it, or another --workdir"
            )

    def read_config(self) -> dict[str, Any]:
        """The config of the run in this directory.

        Raises:
          UserError: `config.json` is not one of ours.
        """
        try:
            with open(self.config, encoding="utf-8") as file:
                return json.load(file)["config"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{self.config} is not a run's config; choose another --workdir") from None

    def read_layout(self) -> tuple[int, int] | None:
        """(processes, rows of an update on each) of the last start of the run; None where there is none."""
        if not os.path.exists(self.config):
            return None
        self.read_config()
        with open(self.config, encoding="utf-8") as file:
            content = json.load(file)
        return content["processes"], content["rows_per_process"]

    def create(
        self, config: dict[str, Any], *, save_tokenizer: Callable[[str], None], processes: int, rows_per_process: int
    ) -> None:
        """Makes the directory, the config and the tokenizer, each whole or not at all."""
        os.makedirs(self.checkpoints, exist_ok=True)
        if not os.path.isdir(self.tokenizer):
            shutil.rmtree(self.tokenizer + ".tmp", ignore_errors=True)
            save_tokenizer(self.tokenizer + ".tmp")
            os.rename(self.tokenizer + ".tmp", self.tokenizer)
        with open(self.config + ".tmp", "w", encoding="utf-8") as file:
            content = {"config": config, "processes": processes, "rows_per_process": rows_per_process}
            json.dump(content, file, indent=2)
            file.write("\n")
        os.replace(self.config + ".tmp", self.config)

    def exported_step(self) -> int | None:
        """The step of the model in `model/`, None when there is no complete one."""
        path = os.path.join(self.model, "trainer_state.json")
        if not os.path.exists(path):
            return None
        with open(path, encoding="utf-8") as file:
            return json.load(file)["global_step"]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, tuples as the lists JSON makes of them."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _as_json(value)
    return flat


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return value
