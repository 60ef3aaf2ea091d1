"""The work directory: where its files are, and whether a run may go on in it.

One in a bucket has a double on this machine's disk, where all files but the checkpoints are read and written: see
`bucket`. What is carried there, and when, is `push`'s callers' to say.
"""

import contextlib
import datetime
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from mlm.errors import UserError
from mlm.run.gcs import LocalMirror, is_url
from mlm.settings import MUTABLE_KEYS, RunSettings


class WorkDir:
    """Paths of a run's files; making one touches nothing.

    Attributes:
      path: a directory on this machine, where all that is not a checkpoint is read and written.
      typed: as it was given.
      shown: what people call the work directory: `path`, or the URL that `path` is the double of.
      is_remote: whether it is a URL.

    Raises:
      UserError: the path cannot be a work directory.
    """

    def __init__(self, path: str):
        self.is_remote = is_url(path)
        self.raw_path = path if self.is_remote else os.path.expanduser(path)
        self._double = LocalMirror(path) if self.is_remote else None
        self.path = self._double.path if self._double else os.path.abspath(os.path.expanduser(path))
        self.display_path = self._double.folder.url if self._double else self.path
        if glob.has_magic(self.path):
            # Orbax lists its files by glob, and would write checkpoints that it cannot find.
            raise UserError(f"--workdir={path}: a path with *, ? or [ cannot hold checkpoints; choose another")
        self.config = os.path.join(self.path, "config.json")
        self.tokenizer = os.path.join(self.path, "tokenizer")
        self.checkpoints = os.path.join(self.display_path, "checkpoints")
        self.metrics = os.path.join(self.path, "metrics.jsonl")
        self.model = os.path.join(self.path, "model")

        self._lock = None
        self._has_started = False
        if self._double is not None:
            return

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
            if self._has_checkpoints():
                raise UserError(
                    f"{self.display_path} has checkpoints but no config.json; put it back, or choose another --workdir"
                )
            return
        old, new = flatten(self.read_config()), flatten(config)
        differing = [
            f"{key} (there {old.get(key, 'absent')!r}, here {new.get(key, 'absent')!r})"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, "absent") != new.get(key, "absent") and key not in MUTABLE_KEYS
        ]
        if differing:
            raise UserError(
                f"{self.display_path} holds a run with another config: {'; '.join(differing)}. "
                "Use the same values to go on with it, another --workdir, or --overwrite to start anew here"
            )

    def _has_checkpoints(self) -> bool:
        if self._double is not None:
            return self._double.has_checkpoints()
        return os.path.isdir(self.checkpoints) and bool(os.listdir(self.checkpoints))

    def read_config(self) -> dict[str, Any]:
        """The config of the run in this directory.

        Raises:
          UserError: `config.json` is not one of ours.
        """
        return self._read()["config"]

    def read_settings(self, *, defaults: RunSettings) -> RunSettings:
        """Returns the settings of the run in this directory; keys that are newer than the run have their defaults."""
        if not os.path.exists(self.config):
            raise UserError(f"--workdir={self.display_path}: there is no run; name the work directory of one")
        return defaults.replace(flatten(self.read_config()))

    def last_topology(self) -> tuple[int, int] | None:
        """(processes, rows of an update on each) of the last start of the run; None where there is none."""
        if not os.path.exists(self.config):
            return None
        last = self._read()["history"][-1]
        return last["processes"], last["rows_per_process"]

    def read_history(self) -> list[dict[str, Any]]:
        """Every start of the run here, as `create` noted it."""
        return self._read()["history"]

    def _read(self) -> dict[str, Any]:
        try:
            with open(self.config, encoding="utf-8") as file:
                content = json.load(file)
        except ValueError:
            content = None
        if not (isinstance(content, dict) and isinstance(content.get("config"), dict) and content.get("history")):
            config = os.path.join(self.display_path, "config.json")
            raise UserError(f"{config} is damaged or not a run's config; mend it, or choose another --workdir")
        return content

    def create(
        self,
        config: dict[str, Any],
        *,
        save_tokenizer: Callable[[str], None],
        processes: int,
        rows_per_process: int,
        step: int,
    ) -> dict[str, list[Any]]:
        """Makes the directory, the config and the tokenizer, each whole or not at all.

        `config.json` also keeps the run's history: when it was started, after which update, with which keys changed.

        Returns:
          Those keys: name -> [value before, value now].

        Raises:
          UserError: a bucket does not take it, or has taken another start meanwhile.
        """
        history, changed = [], {}
        if os.path.exists(self.config):
            before = self._read()
            history = before["history"]
            old, new = flatten(before["config"]), flatten(config)
            changed = {
                key: [old.get(key), new.get(key)]
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            }
        history.append(
            {
                "step": step,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "event": "restart" if history else "start",
                "processes": processes,
                "rows_per_process": rows_per_process,
                "changed": changed,
            }
        )
        if not self.is_remote:
            os.makedirs(self.checkpoints, exist_ok=True)
        if not os.path.exists(self.config):
            # Of a run that was killed before it had a config: it may be another's.
            shutil.rmtree(self.tokenizer, ignore_errors=True)
        if not os.path.isdir(self.tokenizer):
            shutil.rmtree(self.tokenizer + ".tmp", ignore_errors=True)
            save_tokenizer(self.tokenizer + ".tmp")
            # On the disk before it counts, as all that follows: a machine that loses its power forgets the rest.
            for name in (*os.listdir(self.tokenizer + ".tmp"), "."):
                sync(os.path.join(self.tokenizer + ".tmp", name))
            os.rename(self.tokenizer + ".tmp", self.tokenizer)
        with open(self.config + ".tmp", "w", encoding="utf-8") as file:
            json.dump({"config": config, "history": history}, file, indent=2)
            file.write("\n")
        sync(self.config + ".tmp")
        os.replace(self.config + ".tmp", self.config)
        sync(self.path)
        self._has_started = True
        try:
            self.push()
        except OSError as error:
            raise UserError(f"{error}; mend that: the same command goes on") from None
        return changed

    def push(self) -> None:
        """Carries what has changed to the bucket, if the directory is in one. On process 0.

        Raises:
          OSError: it cannot be written; it is, the next time.
          UserError: the run was started again elsewhere.
        """
        if self._double is not None:
            self._double.push()

    def pull(self) -> None:
        """Looks again what is in the bucket, after another process has changed it."""
        if self._double is not None:
            with _reading(self.display_path):
                self._double.pull()

    def fetch_weights(self) -> None:
        """Has the weights in `model/`, if there are any: of a bucket's they are not here before."""
        if self._double is not None:
            with _reading(self.display_path):
                self._double.fetch_weights()

    def close(self) -> None:
        """Lets the directory go; on the process that has made it, what is left is carried to the bucket, if it can."""
        self.unlock()
        if self._has_started:
            with contextlib.suppress(OSError, UserError):
                self.push()

    def has_tokenizer(self) -> bool:
        """Whether the run here has made its tokenizer. One without a config is left of a start that was killed."""
        return os.path.isdir(self.tokenizer) and os.path.exists(self.config)

    def exported_step(self) -> int | None:
        """The step of the model in `model/`, None when there is no complete one."""
        try:
            with open(os.path.join(self.model, "trainer_state.json"), encoding="utf-8") as file:
                return json.load(file)["global_step"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def move_aside(self) -> str | None:
        """Makes room for a new run; returns where the old one is now, None if there was none.

        Raises:
          UserError: it is under way, or cannot be moved.
        """
        if self._double is not None:
            with _reading(self.display_path):
                target = self._double.folder.move_aside()
                self._double.pull()
            return target
        if not os.path.isdir(self.path) or not os.listdir(self.path):
            return None
        self.lock()
        number = 1
        while os.path.lexists(target := f"{self.path}.old-{number}"):
            number += 1
        try:
            os.rename(self.path, target)
        except OSError as error:
            raise UserError(
                f"--overwrite: {self.path} cannot be moved to {target} ({error.strerror}); choose another --workdir"
            ) from None
        finally:
            self.unlock()
        return target

    def lock(self) -> None:
        """Holds the directory, if it is there, until `unlock` or until this process ends, however it ends.

        A bucket cannot be held, see `push`; that it can be written to shows here.

        Raises:
          UserError: another process holds it, or the bucket cannot be written to.
        """
        if self._double is not None and not self._has_started:
            self._double.check_writable()
        if self._double is not None:
            return
        if self._lock is not None or not os.path.isdir(self.path):
            return
        self._lock = open(os.path.join(self.path, ".lock"), "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            raise UserError(f"{self.path} is in use by another run; wait for it, or choose another --workdir") from None
        except OSError:
            pass  # A file system without locks, such as some network mounts.

    def unlock(self) -> None:
        """Lets the directory go. The file stays: removing it could take another run's lock away."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@contextlib.contextmanager
def _reading(shown: str) -> Iterator[None]:
    """What a bucket does not give, or take, where there is no next time -> UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--workdir={shown}: {error}; mend that: the same command goes on") from None


def sync(path: str) -> None:
    """Waits until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return value
