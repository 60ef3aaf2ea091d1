"""Where the files of a work directory are: a local directory, or Google Cloud Storage.

`LocalStorage` and `gcs.GcsStorage` have the same attributes and methods, so that callers need not know which they have.
"""

import fcntl
import glob
import os
import shutil
import tempfile
from typing import IO

from mlm.errors import UserError
from mlm.run.gcs import GcsStorage, is_url


def open_storage(path: str) -> "LocalStorage | GcsStorage":
    """Opens the storage of a work directory, which need not exist.

    Raises:
      UserError: the path is invalid, or the bucket cannot be read.
    """
    return GcsStorage(path) if is_url(path) else LocalStorage(path)


def free_name(path: str) -> str:
    """Returns the first of PATH.old-1, PATH.old-2, ... that does not exist."""
    number = 1
    while os.path.lexists(found := f"{path}.old-{number}"):
        number += 1
    return found


def try_to_write(directory: str) -> None:
    """Raises OSError unless files can be created in a directory."""
    # Permission bits are not enough: root ignores them, and a read-only disk has them.
    tempfile.TemporaryFile(dir=directory).close()


class LocalStorage:
    """A work directory on a local or mounted disk. Opening it creates nothing.

    Attributes:
      path: the local directory of all files except checkpoints.
      display_path: the work directory in messages.
      checkpoints: the directory of checkpoints, which Orbax reads and writes.
      damaged: the directory of quarantined checkpoints.
      needs_upload: whether files in `path` must be pushed to be safe.
      exceptions: the types of exceptions that failing reads and writes raise.
    """

    needs_upload = False
    exceptions: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, path: str):
        self.path = self.display_path = os.path.abspath(os.path.expanduser(path))
        self.checkpoints = os.path.join(self.path, "checkpoints")
        self.damaged = os.path.join(self.path, "damaged")
        self._lock: IO[str] | None = None
        if glob.has_magic(self.path):
            # Orbax lists files with glob, and would not find the checkpoints that it writes.
            raise UserError(f"--workdir={path}: *, ? and [ are not supported in checkpoint paths; choose another path")
        existing = _existing_parent(self.path)
        if not os.path.isdir(existing):
            raise UserError(f"--workdir={path}: {existing} is a file; choose a directory, which need not exist")

    def create(self) -> None:
        """Creates the directories."""
        os.makedirs(self.checkpoints, exist_ok=True)

    def check_writable(self) -> None:
        """Raises UserError unless files can be created in the directory, or in the parent where it would be created."""
        existing = _existing_parent(self.path)
        try:
            try_to_write(existing)
        except OSError as error:
            raise UserError(
                f"--workdir={self.path}: {existing} is not writable ({error.strerror}); choose another"
            ) from None

    def check_space(self, num_bytes: int) -> None:
        """Raises OSError unless a checkpoint of `num_bytes` can be written: disk full, read-only or unmounted."""
        free = shutil.disk_usage(self.checkpoints).free
        if free < num_bytes:
            raise OSError(f"{self.checkpoints} has {free / 1e6:,.0f} MB free and needs {num_bytes / 1e6:,.0f}")
        try_to_write(self.checkpoints)

    def free_bytes(self) -> int | None:
        """Returns the free space; None where it is unlimited."""
        return shutil.disk_usage(_existing_parent(self.path)).free

    def lock(self) -> None:
        """Locks the directory, if it exists, until `unlock` or the end of the process.

        Raises:
          UserError: another process holds the lock, or the directory is not writable.
        """
        self.check_writable()
        if self._lock is not None or not os.path.isdir(self.path):
            return
        self._lock = open(os.path.join(self.path, ".lock"), "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            raise UserError(
                f"--workdir={self.path}: is in use by another run; wait for it, or choose another"
            ) from None
        except OSError:
            pass  # A file system without locks, such as some network mounts.

    def unlock(self) -> None:
        """Releases the lock. The file stays: deleting it could delete the lock of another run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def push(self) -> None:
        """Uploads changed files."""

    def pull(self) -> None:
        """Downloads what other processes have changed."""

    def fetch_weights(self) -> None:
        """Downloads the weights in `model/`."""

    def has_checkpoints(self) -> bool:
        """Returns whether there is anything in the directory of checkpoints."""
        return os.path.isdir(self.checkpoints) and bool(os.listdir(self.checkpoints))

    def remove_partial_checkpoints(self) -> None:
        """Removes what an unfinished save has left. Must not be called during a save."""
        for name in os.listdir(self.checkpoints) if os.path.isdir(self.checkpoints) else ():
            if ".orbax-checkpoint-tmp" in name:
                shutil.rmtree(os.path.join(self.checkpoints, name), ignore_errors=True)

    def quarantine(self, step: int) -> str:
        """Moves a checkpoint to `damaged/`; returns its new path."""
        os.makedirs(self.damaged, exist_ok=True)
        target, number = os.path.join(self.damaged, str(step)), 0
        while os.path.exists(target):
            number += 1
            target = os.path.join(self.damaged, f"{step}.{number}")
        os.rename(os.path.join(self.checkpoints, str(step)), target)
        return target

    def move_aside(self) -> str | None:
        """Renames the directory, if it is not empty, to PATH.old-N and returns that path; else returns None.

        Raises:
          UserError: another process holds the lock, or the directory cannot be renamed.
        """
        if not os.path.isdir(self.path) or not os.listdir(self.path):
            return None
        self.lock()
        target = free_name(self.path)
        try:
            os.rename(self.path, target)
        except OSError as error:
            raise UserError(
                f"--overwrite: {self.path} cannot be renamed to {target} ({error.strerror}); choose another --workdir"
            ) from None
        finally:
            self.unlock()
        return target

    def is_unreachable(self, error: Exception) -> bool:
        """Returns whether a read failed because the storage is unreachable; always False for a disk."""
        return False

    def download_command(self, name: str) -> str | None:
        """Returns the shell command that copies a file or directory to the current directory; None if it is local."""
        return None


def _existing_parent(path: str) -> str:
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
