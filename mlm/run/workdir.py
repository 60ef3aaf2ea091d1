"""The work directory: its files, the history of the run, and whether a config may resume it.

A work directory in Google Cloud Storage has a local mirror, where all files but the checkpoints are read and written;
`push` uploads what has changed. See `storage`.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from absl import logging

from mlm.errors import UserError
from mlm.run.storage import free_name, open_storage
from mlm.settings import Boundaries, RunSettings, as_tuples
from mlm.stages import Stage, may_change

# Version of the layout of config.json. Raise it when code of an earlier version would misread the file.
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class KeyChanges:
    """How config keys have changed since format version 1; `configs/compat.py` has the tables and explains them.

    Attributes:
      added: key -> the value that reproduces the behavior from before the key existed.
      renamed: old key -> new key.
      removed: key -> the only value with which a run can be resumed without the key.
      given: keys that the user has set on the command line.
    """

    added: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    removed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    given: Collection[str] = ()

    def apply(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the keys of `config.json`, with renamed keys mapped and removed keys dropped."""
        return {
            self.renamed.get(key, key): as_tuples(value)
            for key, value in stored.items()
            if key not in self.removed or as_tuples(value) != self.removed[key]
        }


class WorkDir:
    """The files of a run. Opening it creates nothing.

    Attributes:
      storage: where the files are.
      path: the local directory of all files but the checkpoints.
      display_path: the work directory in messages: an absolute path or a URL.
      raw_path: the work directory as the user wrote it.

    Raises:
      UserError: the path is invalid, or the bucket cannot be read.
    """

    def __init__(self, path: str, *, key_changes: KeyChanges | None = None):
        self.storage = open_storage(path)
        self.raw_path = os.path.expanduser(path)
        self.path, self.display_path = self.storage.path, self.storage.display_path
        self.config = os.path.join(self.path, "config.json")
        self.tokenizer = os.path.join(self.path, "tokenizer")
        self.metrics = os.path.join(self.path, "metrics.jsonl")
        self.model = os.path.join(self.path, "model")
        self._key_changes = key_changes or KeyChanges()
        self._has_started = False

    def read_config(self) -> dict[str, Any]:
        """Returns the run's value of every config key; keys newer than the run have the value of the old behavior.

        Raises:
          UserError: there is no run, or `config.json` is damaged or has another format version.
        """
        return {**self._key_changes.added, **self._stored_keys()}

    def read_settings(self) -> RunSettings:
        """Returns the settings of the run, with `read_config`'s values and errors."""
        keys = self.read_config()
        try:
            return RunSettings.from_flat(keys)
        except UserError as error:
            raise UserError(f"{self.display_path}/config.json: {error}") from None

    def resume(self, settings: RunSettings) -> RunSettings:
        """Returns the settings to resume the run with, as `complete` does; `settings` itself if there is no run.

        Raises:
          UserError: the settings differ from the run's in a key that must not change during a run.
        """
        if not os.path.exists(self.config):
            # Files that a new run would overwrite, without a config.json that says whose they are.
            found = ["checkpoints"] if self.storage.has_checkpoints() else []
            found += [name for name in ("model", "metrics.jsonl") if os.path.exists(os.path.join(self.path, name))]
            if found:
                raise UserError(
                    f"--workdir={self.display_path}: has {found[0]} but no config.json; restore it, or choose another"
                )
            return settings
        settings = self.complete(settings)
        differing = {key: pair for key, pair in self.changes(settings).items() if not may_change(key, *pair)}
        if differing:
            raise UserError(
                f"--workdir={self.display_path}: holds a run with another config: {describe_changes(differing)}; use "
                "the same values to resume it, choose another --workdir, or start a new run with --overwrite"
            )
        return settings

    def complete(self, settings: RunSettings) -> RunSettings:
        """Returns the settings with what the run has already decided.

        Keys newer than the run keep the old behavior, unless the user has set them on the command line.
        `per_device_train_batch_size=0` becomes the size that the run has found.
        """
        stored, config = self._stored_keys(), settings.flat()
        resolved, old = self._resolved_keys(), {}
        for key, value in self._key_changes.added.items():
            if key not in stored and key not in self._key_changes.given and config[key] != resolved[key]:
                old[key] = value
                text = "%s=%r, not %r: the run was started before the key existed"
                logging.info(text, key, resolved[key], config[key])
        if settings.per_device_train_batch_size == 0:
            old["per_device_train_batch_size"] = stored["per_device_train_batch_size"]
        return settings.replace(old)

    def _stored_keys(self) -> dict[str, Any]:
        return self._key_changes.apply(self._read()["config"])

    def _resolved_keys(self) -> dict[str, Any]:
        """Returns `read_config` with the defaults that depend on other keys, as `RunSettings` have them."""
        keys = self.read_config()
        try:
            return RunSettings.from_flat(keys).flat()
        except UserError:  # A key or value of another version, which the caller reports as a difference.
            return keys

    def changes(self, settings: RunSettings) -> dict[str, list[Any]]:
        """Returns key -> [old value, new value] of the keys that differ, "absent" where a version has no such key."""
        old, new = self._resolved_keys(), settings.flat()
        return {
            key: [old.get(key, "absent"), new.get(key, "absent")]
            for key in sorted(old.keys() | new.keys())
            if old.get(key, "absent") != new.get(key, "absent")
        }

    def last_topology(self) -> tuple[int, int] | None:
        """Returns (processes, sequences of a step per process) at the last start; None if there is no run."""
        if not os.path.exists(self.config):
            return None
        last = self._read()["history"][-1]
        return last["processes"], last["rows_per_process"]

    def last_stages(self) -> list[dict[str, Any]]:
        """Returns the stages at the last start, each with `end` and `borders`; one for a run without stages.

        Empty if there is no run, or it was started by an earlier version.
        """
        if not os.path.exists(self.config) or "borders" not in (last := self._read()["history"][-1]):
            return []
        stages = last.get("stages") or [{"end": self.read_config()["num_train_steps"], "borders": last["borders"]}]
        return [stage | {"borders": Boundaries(**stage["borders"])} for stage in stages]

    def read_parent(self) -> dict[str, Any] | None:
        """Returns the checkpoint that the run started from, as `create` wrote it; None if there is none, or no run."""
        return self._read().get("parent") if os.path.exists(self.config) else None

    def read_history(self) -> list[dict[str, Any]]:
        """Returns an entry for each start of the run, as `create` wrote it."""
        return self._read()["history"]

    def _read(self) -> dict[str, Any]:
        path = os.path.join(self.display_path, "config.json")
        try:
            with open(self.config, encoding="utf-8") as file:
                content = json.load(file)
        except FileNotFoundError:
            raise UserError(f"--workdir={self.display_path}: contains no run; choose a run's work directory") from None
        except ValueError:
            content = None
        if not (isinstance(content, dict) and isinstance(content.get("config"), dict) and content.get("history")):
            raise UserError(f"{path}: is damaged, or not the config of a run; restore it, or choose another --workdir")
        if (version := content.get("format_version", 0)) != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version={version} is not supported, this version of the code reads {FORMAT_VERSION}; "
                "use the version that started the run, or choose another --workdir"
            )
        return content

    def create(
        self,
        settings: RunSettings,
        *,
        save_tokenizer: Callable[[str], None],
        processes: int,
        rows_per_process: int,
        stages: Sequence[Stage] = (),
        eval_checksum: str | None = None,
        step: int,
        parent: Mapping[str, Any] | None = None,
        resumes: "WorkDir | None" = None,
    ) -> dict[str, list[Any]]:
        """Writes the tokenizer, and `config.json` with an entry for this start in its history.

        Args:
          settings: as `resume` returns them.
          save_tokenizer: writes the tokenizer to a directory.
          processes: number of processes.
          rows_per_process: sequences of a step per process.
          stages: the run's stages.
          eval_checksum: checksum of the evaluation sequences: the losses of two runs can be compared if it is equal.
          step: steps done in the checkpoint that the run resumes from; 0 for a new run.
          parent: JSON-serializable, another run's checkpoint that this run starts from; None to keep the recorded one.
          resumes: for a new run that continues another run, the other run's work directory.

        Returns:
          key -> [old value, new value] of the keys changed since the last start.

        Raises:
          UserError: the upload failed, or the run was restarted elsewhere.
        """
        history, changed, keys = [], {}, settings.flat()
        parent = parent or self.read_parent()
        if os.path.exists(self.config):
            history, changed, resumes = self.read_history(), self.changes(settings), self
        if resumes is not None:
            # A key newer than the run that keeps the old behavior stays absent: every later start must complete it
            # again.
            stored, old = resumes._stored_keys(), resumes._resolved_keys()
            keys = {key: value for key, value in keys.items() if key in stored or old[key] != value}
        history.append(
            {
                "step": step,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "event": "restart" if history else "start",
                "processes": processes,
                "rows_per_process": rows_per_process,
                "changed": changed,
                **({"borders": dataclasses.asdict(stages[0].boundaries)} if stages else {}),
                **({"stages": [stage.to_json() for stage in stages]} if len(stages) > 1 else {}),
                **({"eval_checksum": eval_checksum} if eval_checksum else {}),
            }
        )
        self.storage.create()
        if not os.path.exists(self.config) and os.path.isdir(self.tokenizer):
            # Left by a start that was killed before it wrote a config, or the user's own.
            kept = free_name(self.tokenizer)
            os.rename(self.tokenizer, kept)
            logging.info("renamed %s, which is not the tokenizer of a run, to %s", self.tokenizer, kept)
        if not os.path.isdir(self.tokenizer):
            shutil.rmtree(self.tokenizer + ".tmp", ignore_errors=True)
            save_tokenizer(self.tokenizer + ".tmp")
            # Files are synced before the rename makes them count: after a power failure the rename may be on the disk
            # and the contents not.
            for name in (*os.listdir(self.tokenizer + ".tmp"), "."):
                sync(os.path.join(self.tokenizer + ".tmp", name))
            os.rename(self.tokenizer + ".tmp", self.tokenizer)
        with open(self.config + ".tmp", "w", encoding="utf-8") as file:
            content = {"format_version": FORMAT_VERSION, "config": keys, "history": history}
            if parent is not None:
                content["parent"] = dict(parent)
            json.dump(content, file, indent=2)
            file.write("\n")
        sync(self.config + ".tmp")
        os.replace(self.config + ".tmp", self.config)
        sync(self.path)
        self._has_started = True
        try:
            self.push()
        except OSError as error:
            raise UserError(f"--workdir={self.display_path}: {error}; fix that, then rerun the same command") from None
        return changed

    def push(self) -> None:
        """Uploads changed files where the work directory is in a bucket. Call it on process 0.

        Raises:
          OSError: an upload failed. The next call repeats it.
          UserError: the run was restarted elsewhere.
        """
        self.storage.push()

    def pull(self) -> None:
        """Reads the directory again after another process has changed it. Raises UserError if that fails."""
        self.storage.pull()

    def fetch_weights(self) -> None:
        """Makes the weights in `model/` available locally, if there are any. Raises UserError if that fails."""
        self.storage.fetch_weights()

    def lock(self) -> None:
        """Locks the directory, if it exists, until `unlock` or the end of the process.

        Raises:
          UserError: another process holds the lock, or the directory is not writable.
        """
        self.storage.lock()

    def unlock(self) -> None:
        """Releases the lock."""
        self.storage.unlock()

    def close(self) -> None:
        """Releases the lock; after `create` it also uploads what remains, if it can."""
        self.unlock()
        if self._has_started:
            with contextlib.suppress(OSError, UserError):
                self.push()

    def move_aside(self) -> str | None:
        """Moves an existing run to PATH.old-N; returns the new path, None if there was no run.

        A directory with neither `config.json` nor checkpoints is not a run's, and stays where it is.

        Raises:
          UserError: the run is in progress, or cannot be moved.
        """
        is_run = os.path.exists(self.config) or self.storage.has_checkpoints()
        return self.storage.move_aside() if is_run else None

    def has_tokenizer(self) -> bool:
        """Returns whether the run has its tokenizer. One without a config was left by a start that was killed."""
        return os.path.isdir(self.tokenizer) and os.path.exists(self.config)

    def exported_step(self) -> int | None:
        """Returns the step of the model in `model/`; None if there is no complete one."""
        try:
            with open(os.path.join(self.model, "trainer_state.json"), encoding="utf-8") as file:
                return json.load(file)["global_step"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def describe_changes(changes: Mapping[str, Any]) -> str:
    """Returns key -> [there, here] as text."""
    return "; ".join(f"{key} (there {there!r}, here {here!r})" for key, (there, here) in changes.items())


def sync(path: str) -> None:
    """Fsyncs a file, or the entries of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
