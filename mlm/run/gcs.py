"""Work directories in Google Cloud Storage.

A bucket has no append, no rename and no locks, but every object is complete or absent. Orbax therefore writes
checkpoints directly to the bucket. All other files are written to a local mirror of the work directory, and changed
files are uploaded from there. Every process that opens the work directory makes a new mirror from the bucket, so
nothing depends on files of an earlier process.

`config.json` replaces a lock: every start of a run rewrites it. A run that finds another's version was restarted
elsewhere, and ends.
"""

import contextlib
import fcntl
import functools
import os
import re
import shlex
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import IO, Any

from mlm.errors import UserError, one_line

# Read once by etils and gcsfs, through which Orbax accesses the bucket. TensorFlow's file system has no setting for an
# emulated bucket and raises other exceptions than OSError; what gcsfs would query about hierarchical namespaces is not
# needed here.
os.environ.setdefault("EPATH_USE_TF", "0")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# Seconds of retries before a request fails. Training waits for it.
_RETRY_DEADLINE_SECONDS = 60.0
# Orbax keeps these in the bucket; they are not mirrored.
_CHECKPOINT_PREFIXES = ("checkpoints/", "damaged/")
# Large, and rarely needed: downloaded on request.
_WEIGHTS = "model/model.safetensors"
# Partial or machine-specific files, which are never uploaded.
_NOT_UPLOADED = re.compile(r"(^|/)(push\.[^/]*|\.lock|[^/]*\.tmp|[^/]*\.old)(/|$)")
# Files that mark others as complete; uploaded after them.
_UPLOADED_LAST = ("config.json", "model/trainer_state.json")
# The object by which Orbax marks a checkpoint in a bucket as complete.
_COMMITTED = re.compile(r"checkpoints/[^/]+/commit_success.txt")
# TensorStore status codes that mean I/O trouble, not corruption.
_TRANSIENT_STATUS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|RESOURCE_EXHAUSTED|INTERNAL)\b"
)
_ROLES = (
    "grant the account roles/storage.objectAdmin and roles/storage.legacyBucketReader on the bucket (gcloud storage "
    "buckets add-iam-policy-binding)"
)


def is_url(path: str) -> bool:
    """Returns whether a path is a URL."""
    return "://" in path


@functools.cache
def exceptions() -> tuple[type[Exception], ...]:
    """Returns the types of exceptions that our client and those of Orbax raise for failed requests."""
    import aiohttp
    import gcsfs.retry
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    ours = (OSError, GoogleAPIError, GoogleAuthError, DataCorruption, InvalidResponse)
    return (*ours, gcsfs.retry.HttpError, gcsfs.retry.ChecksumError, aiohttp.ClientError)


class GcsPrefix:
    """The objects below gs://BUCKET/PATH/, named relative to it. Methods raise OSError for failed requests.

    Attributes:
      url: gs://BUCKET/PATH, without a trailing slash.
    """

    def __init__(self, url: str):
        """Opens the bucket; there may be no objects yet.

        Raises:
          UserError: the URL is invalid, or the bucket cannot be read.
        """
        if not url.startswith("gs://"):
            raise UserError(f"--workdir={url}: is not a supported URL; use gs://BUCKET/PATH, or mount the storage")
        match = re.fullmatch(r"gs://([^/]+)/(.*[^/])/*", url)
        if match is None:
            raise UserError(f"--workdir={url}: has no path after the bucket name; use gs://BUCKET/PATH")
        if re.search(r"[*?\[\]#]|(^|/)(\.{0,2})(/|$)", match[2]):
            raise UserError(
                f"--workdir={url}: *, ?, [, #, // and .. are not supported in checkpoint paths; choose another path"
            )
        self.url = f"gs://{match[1]}/{match[2]}"
        self._prefix = match[2] + "/"
        self._bucket = _open_bucket(match[1], url=self.url)

    def generations(self, *, under: str = "") -> dict[str, int]:
        """Returns name -> generation, a number that changes with the content, of all objects below `under`."""
        with _as_os_error(f"{self.url} could not be read"):
            blobs = self._bucket.list_blobs(prefix=self._prefix + under, **_retry_policy())
            # The web console creates objects whose name ends in / for folders.
            return {blob.name.removeprefix(self._prefix): blob.generation for blob in blobs if blob.name[-1] != "/"}

    def generation(self, name: str) -> int:
        """Returns the generation of one object; 0 if it does not exist."""
        with _as_os_error(f"{self.url} could not be read"):
            blob = self._bucket.get_blob(self._prefix + name, **_retry_policy())
        return 0 if blob is None else blob.generation

    def download(self, name: str, path: str) -> None:
        """Copies an object to a file; creates its directory."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _as_os_error(f"{self.url}/{name} could not be read"):
            self._bucket.blob(self._prefix + name).download_to_filename(path, **_retry_policy())

    def upload(self, name: str, path: str, *, if_generation: int | None = None) -> int:
        """Copies a file to an object and returns the new generation.

        Raises:
          FileExistsError: the object's generation is not `if_generation`; nothing was written.
        """
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._prefix + name)
        with _as_os_error(f"{self.url}/{name} could not be written"):
            try:
                blob.upload_from_filename(path, if_generation_match=if_generation, **_retry_policy())
            except PreconditionFailed:
                raise FileExistsError(f"{self.url}/{name} was changed by another process") from None
        return blob.generation

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; for a checkpoint, its completion marker first."""
        from google.api_core.exceptions import NotFound

        for name in sorted(names, key=lambda name: not name.endswith("commit_success.txt")):
            with _as_os_error(f"{self.url}/{name} could not be deleted"), contextlib.suppress(NotFound):
                self._bucket.delete_blob(self._prefix + name, **_retry_policy())

    def move(self, target: str, *, under: str = "") -> None:
        """Moves the objects below `under` to the path `target` of the bucket, by server-side copies.

        Objects are deleted after all copies are made, so an interrupted move loses nothing.
        """
        names = self.generations(under=under)
        with _as_os_error(f"{self.url}/{under} could not be copied to {target}"):
            for name in names:
                copy = self._bucket.blob(f"{target}/{name.removeprefix(under)}")
                token, *_ = copy.rewrite(self._bucket.blob(self._prefix + name), **_retry_policy())
                while token is not None:  # A large object takes several requests.
                    token, *_ = copy.rewrite(self._bucket.blob(self._prefix + name), token=token, **_retry_policy())
        self.delete(names)

    def move_aside(self) -> str | None:
        """Moves all objects to the first unused gs://BUCKET/PATH.old-N and returns it; None if there are none."""
        if not self.generations():
            return None
        path, number = self._prefix.removesuffix("/"), 1
        while self._exists(f"{path}.old-{number}/"):
            number += 1
        self.move(f"{path}.old-{number}")
        return f"{self.url}.old-{number}"

    def quarantine(self, under: str, *, to: str) -> str:
        """Moves the objects below `under` to the first unused of `to`, `to`.1, `to`.2, ...; returns its URL."""
        target, number = to, 0
        while self._exists(f"{self._prefix}{target}/"):
            number += 1
            target = f"{to}.{number}"
        self.move(self._prefix + target, under=under + "/")
        return f"{self.url}/{target}"

    def _exists(self, prefix: str) -> bool:
        with _as_os_error(f"{self.url} could not be read"):
            return any(True for _ in self._bucket.list_blobs(prefix=prefix, max_results=1, **_retry_policy()))


class GcsStorage:
    """A work directory in a bucket, with a mirror on the local disk; the counterpart of `storage.LocalStorage`.

    The mirror is deleted with this object or at the end of the process; after a kill, by the next process that makes
    one.

    Attributes: as those of `storage.LocalStorage`; `path` is the mirror.
    """

    needs_upload = True

    def __init__(self, url: str):
        """Downloads the mirror.

        Raises:
          UserError: the URL is invalid, the bucket cannot be read, or the local disk is full.
        """
        self._prefix = GcsPrefix(url)
        self.display_path = self._prefix.url
        self.checkpoints = f"{self.display_path}/checkpoints"
        self.damaged = f"{self.display_path}/damaged"
        self.exceptions = exceptions()
        self._is_writable = False
        with self._as_user_error():
            home, lock = _make_mirror_home()
            weakref.finalize(self, _remove_mirror_home, home, lock, os.getpid())
            self.path = os.path.join(home, self.display_path.rsplit("/", 1)[1])
        self.pull()

    def pull(self) -> None:
        """Downloads the mirror again. Raises UserError if that fails."""
        shutil.rmtree(self.path, ignore_errors=True)
        # name -> stamp of the local file when it was last identical to the object.
        self._synced: dict[str, tuple[int, ...]] = {}
        with self._as_user_error():
            os.makedirs(self.path)
            # name -> generation of the object when it was last read or written here.
            self._generations = self._prefix.generations()
            for name in self._generations:
                if not name.startswith(_CHECKPOINT_PREFIXES) and not _NOT_UPLOADED.search(name) and name != _WEIGHTS:
                    self._fetch(name)

    def fetch_weights(self) -> None:
        """Downloads the weights of the exported model, which `pull` leaves out. Raises UserError if that fails."""
        if _WEIGHTS in self._generations and not os.path.exists(os.path.join(self.path, _WEIGHTS)):
            with self._as_user_error():
                self._fetch(_WEIGHTS)

    def _fetch(self, name: str) -> None:
        path = os.path.join(self.path, name)
        self._prefix.download(name, path)
        self._synced[name] = _stamp(path)

    def push(self) -> None:
        """Uploads changed files, and deletes the objects of deleted files.

        Raises:
          OSError: an upload failed. The next call repeats it.
          UserError: the run was restarted elsewhere.
        """
        local = dict(self._local_files())
        changed = [name for name, stamp in local.items() if self._synced.get(name) != stamp]
        deleted = self._synced.keys() - local.keys()
        if not changed and not deleted:
            return
        own_config = self._generations.get("config.json", 0)
        if self._prefix.generation("config.json") != own_config:
            self._raise_restarted_elsewhere()
        for name in sorted(changed, key=lambda name: (name in _UPLOADED_LAST, name)):
            if_generation = own_config if name == "config.json" else None
            path = os.path.join(self.path, name)
            try:
                self._generations[name] = self._prefix.upload(name, path, if_generation=if_generation)
            except FileExistsError:
                self._raise_restarted_elsewhere()
            self._synced[name] = local[name]
        self._prefix.delete(deleted)
        for name in deleted:
            del self._synced[name], self._generations[name]

    def _raise_restarted_elsewhere(self) -> None:
        raise UserError(
            f"--workdir={self.display_path}: the run was restarted or removed elsewhere, so this process ends; start "
            "one run at a time, or choose another --workdir"
        )

    def _local_files(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for directory, _, names in os.walk(self.path):
            for name in names:
                path = os.path.join(directory, name)
                name = os.path.relpath(path, self.path)
                if not _NOT_UPLOADED.search(name):
                    yield name, _stamp(path)

    def create(self) -> None:
        """Does nothing: objects need no directories."""

    def check_writable(self) -> None:
        """Writes and deletes an object. Raises UserError if that fails."""
        path = os.path.join(os.path.dirname(self.path), ".lock")
        try:
            self._prefix.upload(".lock", path)
            self._prefix.delete([".lock"])
        except OSError as error:
            raise UserError(f"--workdir={self.display_path}: {error}; {_ROLES}") from None

    def lock(self) -> None:
        """Checks once that the bucket is writable. There are no locks in a bucket: see `push`."""
        if not self._is_writable:
            self.check_writable()
            self._is_writable = True

    def unlock(self) -> None:
        """Does nothing."""

    def check_space(self, num_bytes: int) -> None:
        """Does nothing: a bucket is never full."""

    def free_bytes(self) -> int | None:
        """Returns None: space is unlimited."""
        return None

    def has_checkpoints(self) -> bool:
        """Returns whether there were any at the last `pull`."""
        return any(name.startswith("checkpoints/") for name in self._generations)

    def remove_partial_checkpoints(self) -> None:
        """Deletes what an unfinished save has left. Must not be called during a save."""
        # Partial checkpoints are ignored, and the next start tries again.
        with contextlib.suppress(OSError):
            names = self._prefix.generations(under="checkpoints/")
            complete = {name.split("/")[1] for name in names if _COMMITTED.fullmatch(name)}
            self._prefix.delete([name for name in names if name.split("/")[1] not in complete])

    def quarantine(self, step: int) -> str:
        """Moves a checkpoint to `damaged/`; returns its new URL."""
        return self._prefix.quarantine(f"checkpoints/{step}", to=f"damaged/{step}")

    def move_aside(self) -> str | None:
        """Moves everything to URL.old-N and returns that URL; None if there was nothing. Raises UserError."""
        with self._as_user_error():
            target = self._prefix.move_aside()
        self.pull()
        return target

    def is_unreachable(self, error: Exception) -> bool:
        """Returns whether a read failed because of the network or missing rights, rather than damage."""
        if isinstance(error, FileNotFoundError):
            return False
        return isinstance(error, self.exceptions) or _TRANSIENT_STATUS.search(str(error)) is not None

    def download_command(self, name: str) -> str | None:
        """Returns the shell command that copies a file or directory to the current directory."""
        return f"gcloud storage cp --recursive {shlex.quote(f'{self.display_path}/{name}')} ."

    @contextlib.contextmanager
    def _as_user_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--workdir={self.display_path}: {error}; fix that, then rerun the same command") from None


def _open_bucket(name: str, *, url: str) -> Any:
    import fsspec
    import google.auth.exceptions
    from google.api_core import exceptions as api_exceptions
    from google.cloud import storage

    # Other processes write to the bucket, so a cached listing may be outdated.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        return storage.Client().get_bucket(name, **_retry_policy())
    except google.auth.exceptions.DefaultCredentialsError:
        reason = "found no Google Cloud credentials; run `gcloud auth application-default login`"
    except api_exceptions.NotFound:
        reason = f"there is no bucket {name}; create it (gcloud storage buckets create gs://{name}), or name another"
    except (api_exceptions.Forbidden, api_exceptions.Unauthorized) as error:
        reason = f"no permission to read the bucket {name} ({one_line(error)}); {_ROLES}"
    except ValueError as error:
        reason = f"{one_line(error)}; name another bucket"
    except exceptions() as error:
        reason = f"the bucket {name} cannot be reached ({one_line(error)}); check the network, or name another bucket"
        if "Project was not passed" in str(error):
            reason = "found no Google Cloud project; set GOOGLE_CLOUD_PROJECT to the name of yours"
    raise UserError(f"--workdir={url}: {reason}")


def _retry_policy() -> dict[str, Any]:
    """Returns the client's keyword arguments for retries."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {"retry": DEFAULT_RETRY.with_timeout(_RETRY_DEADLINE_SECONDS)}


@contextlib.contextmanager
def _as_os_error(message: str) -> Iterator[None]:
    """Turns exceptions of the clients into OSError, as a disk raises it."""
    try:
        yield
    except FileExistsError:
        raise
    except exceptions() as error:
        raise OSError(f"{message} ({one_line(error)})") from None


def _stamp(path: str) -> tuple[int, ...]:
    """Returns numbers that change when the file is rewritten."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _make_mirror_home() -> tuple[str, IO[str]]:
    """Creates a directory for a mirror and locks it; deletes those whose processes have ended."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    homes = os.path.join(cache, "mlm", "workdirs")
    os.makedirs(homes, exist_ok=True)
    with open(os.path.join(homes, ".lock"), "w") as one_at_a_time:
        _lock(one_at_a_time, fcntl.LOCK_EX)
        for name in os.listdir(homes):
            home = os.path.join(homes, name)
            # Meanwhile a process that ends may remove its own.
            with (
                contextlib.suppress(FileNotFoundError, NotADirectoryError),
                open(os.path.join(home, ".lock"), "w") as stale,
            ):
                if _lock(stale, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(home, ignore_errors=True)
        home = tempfile.mkdtemp(dir=homes)
        lock = open(os.path.join(home, ".lock"), "w")  # noqa: SIM115
        _lock(lock, fcntl.LOCK_EX)
    return home, lock


def _lock(file: IO[str], operation: int) -> bool:
    """Returns False if another process holds the lock, or the file system (some network mounts) has no locks."""
    try:
        fcntl.flock(file, operation)
    except OSError:
        return False
    return True


def _remove_mirror_home(home: str, lock: IO[str], process_id: int) -> None:
    if process_id == os.getpid():  # Not in a fork.
        shutil.rmtree(home, ignore_errors=True)
        lock.close()
