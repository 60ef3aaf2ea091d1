"""A work directory in a Google Cloud Storage bucket: its objects, and its double on this machine's disk.

A bucket has no append, no rename and no locks; an object is there whole or not at all. So checkpoints go straight to
the bucket, by Orbax, and all other files are written to a double of the directory on the disk, from where what has
changed is carried to the bucket. Whoever opens the directory makes a double of its own, of what is in the bucket:
nothing depends on what a machine had before.

What stands for a lock is `config.json`, for every start of a run writes it anew: a run that finds another's there was
started again elsewhere, and ends.
"""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import IO, Any

from mlm.errors import UserError, one_line

# Read once, by etils and gcsfs, which Orbax goes to the bucket by. Through TensorFlow it could neither be told of
# a stand-in for the bucket nor would errors be OSErrors; what gcsfs would find out about a bucket is no use here.
os.environ.setdefault("EPATH_USE_TF", "0")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# Seconds after which a request that fails again and again is given up: training waits for it.
_DEADLINE = 60.0
# Orbax keeps these in the bucket itself.
_NOT_DOUBLED = ("checkpoints/", "damaged/")
# Large, and not wanted by most who open a run: fetched when it is.
_WEIGHTS = "model/model.safetensors"
# Half-written, or of this machine alone.
_NOT_CARRIED = re.compile(r"(^|/)(push\.[^/]*|\.lock|[^/]*\.tmp|[^/]*\.old)(/|$)")
# Each says that what it tells of is there: they come after that.
_LAST = ("config.json", "model/trainer_state.json")


def is_url(path: str) -> bool:
    """Whether a path is not one of this machine's."""
    return "://" in path


@functools.cache
def failures() -> tuple[type[Exception], ...]:
    """What network, bucket and their clients raise, ours and those that Orbax uses."""
    import aiohttp
    import gcsfs.retry
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    ours = (OSError, GoogleAPIError, GoogleAuthError, DataCorruption, InvalidResponse)
    return (*ours, gcsfs.retry.HttpError, gcsfs.retry.ChecksumError, aiohttp.ClientError)


class GcsPrefix:
    """The objects below gs://BUCKET/PATH/, by their names from there on. Its methods raise OSError, or what is said.

    Attributes:
      url: without a slash at its end.
    """

    def __init__(self, url: str):
        """Opens it; it need not be there.

        Raises:
          UserError: the URL is no such, or the bucket cannot be reached.
        """
        if not url.startswith("gs://"):
            raise UserError(f"--workdir={url}: of URLs only gs://BUCKET/PATH can be a work directory; mount others")
        match = re.fullmatch(r"gs://([^/]+)/(.*[^/])/*", url)
        if match is None:
            raise UserError(f"--workdir={url} names no path in a bucket; it must be gs://BUCKET/PATH")
        if re.search(r"[*?\[\]#]|(^|/)(\.{0,2})(/|$)", match[2]):
            raise UserError(
                f"--workdir={url}: a path with *, ?, [, #, // or .. cannot hold checkpoints; choose another"
            )
        self.url = f"gs://{match[1]}/{match[2]}"
        self._prefix = match[2] + "/"
        self._bucket = _open_bucket(match[1], url=self.url)

    def generations(self, *, under: str = "") -> dict[str, int]:
        """The names of the objects below `under`, each with a number that changes with its content."""
        with _as_os_error(f"{self.url} could not be read"):
            blobs = self._bucket.list_blobs(prefix=self._prefix + under, **_retry_policy())
            # A name that ends in / is a folder's, such as the console makes.
            return {blob.name.removeprefix(self._prefix): blob.generation for blob in blobs if blob.name[-1] != "/"}

    def generation(self, name: str) -> int:
        """That of one object; 0 where there is none."""
        with _as_os_error(f"{self.url} could not be read"):
            blob = self._bucket.get_blob(self._prefix + name, **_retry_policy())
        return 0 if blob is None else blob.generation

    def download(self, name: str, path: str) -> None:
        """Copies an object to a file, whose directory is made."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _as_os_error(f"{self.url}/{name} could not be read"):
            self._bucket.blob(self._prefix + name).download_to_filename(path, **_retry_policy())

    def upload(self, name: str, path: str, *, over: int | None = None) -> int:
        """Copies a file to an object. With `over` only where the object is of that generation, else FileExistsError.

        Returns:
          Its new generation.
        """
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._prefix + name)
        with _as_os_error(f"{self.url}/{name} could not be written"):
            try:
                blob.upload_from_filename(path, if_generation_match=over, **_retry_policy())
            except PreconditionFailed:
                raise FileExistsError(f"{self.url}/{name} is not what it was") from None
        return blob.generation

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; what makes a checkpoint count before what is in it."""
        from google.api_core.exceptions import NotFound

        for name in sorted(names, key=lambda name: not name.endswith("commit_success.txt")):
            with _as_os_error(f"{self.url}/{name} could not be removed"), contextlib.suppress(NotFound):
                self._bucket.delete_blob(self._prefix + name, **_retry_policy())

    def move(self, target: str, *, under: str = "") -> None:
        """Moves the objects below `under` to the path `target` in the bucket, which copies them by itself.

        Wherever it is broken off, every object is whole in one of the two places.
        """
        names = self.generations(under=under)
        with _as_os_error(f"{self.url}/{under} could not be copied to {target}"):
            for name in names:
                copy = self._bucket.blob(f"{target}/{name.removeprefix(under)}")
                token, *_ = copy.rewrite(self._bucket.blob(self._prefix + name), **_retry_policy())
                while token is not None:  # Of a large one it tells how far it is.
                    token, *_ = copy.rewrite(self._bucket.blob(self._prefix + name), token=token, **_retry_policy())
        self.remove(names)

    def move_aside(self) -> str | None:
        """Moves everything to the first free gs://BUCKET/PATH.old-N, and returns that; None if there is nothing."""
        if not self.generations():
            return None
        number = 1
        while self._is_there(f"{self._prefix.removesuffix('/')}.old-{number}/"):
            number += 1
        self.move(f"{self._prefix.removesuffix('/')}.old-{number}")
        return f"{self.url}.old-{number}"

    def _is_there(self, prefix: str) -> bool:
        with _as_os_error(f"{self.url} could not be read"):
            return any(True for _ in self._bucket.list_blobs(prefix=prefix, max_results=1, **_retry_policy()))

    def quarantine(self, under: str, *, to: str) -> str:
        """Moves what is below `under` to `to`, or `to`.1, `to`.2, ..., whichever is free; returns that."""
        number = 0
        while self._is_there(f"{self._prefix}{(target := to + f'.{number}' * (number > 0))}/"):
            number += 1
        self.move(self._prefix + target, under=under + "/")
        return f"{self.url}/{target}"


class LocalMirror:
    """A directory on this disk that stands for one in a bucket. It goes with the object, at the latest when the process
    ends, or is killed and another one makes a double.

    Attributes:
      folder: the one in the bucket.
      path: the directory; its last name is that of the URL.
    """

    def __init__(self, url: str):
        """Makes it, of what is in the bucket.

        Raises:
          UserError: the URL is no such, the bucket cannot be read, or there is no room.
        """
        self.folder = GcsPrefix(url)
        try:
            home, lock = _make_home()
            weakref.finalize(self, _remove_home, home, lock, os.getpid())
            self.path = os.path.join(home, self.folder.url.rsplit("/", 1)[1])
            self.pull()
        except OSError as error:
            raise UserError(f"--workdir={url}: {error}; mend that, or choose another") from None

    def pull(self) -> None:
        """Makes it what is in the bucket, again. Raises OSError."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.makedirs(self.path)
        # As it was when it was last the same in both places.
        self._carried: dict[str, tuple[int, ...]] = {}
        self._there = self.folder.generations()
        for name in self._there:
            if not name.startswith(_NOT_DOUBLED) and not _NOT_CARRIED.search(name) and name != _WEIGHTS:
                self._fetch(name)

    def has_checkpoints(self) -> bool:
        """Whether there were any when it was pulled."""
        return any(name.startswith("checkpoints/") for name in self._there)

    def fetch_weights(self) -> None:
        """Copies the model's weights here, which `pull` does not, if there are any. Raises OSError."""
        if _WEIGHTS in self._there and not os.path.exists(os.path.join(self.path, _WEIGHTS)):
            self._fetch(_WEIGHTS)

    def _fetch(self, name: str) -> None:
        path = os.path.join(self.path, name)
        self.folder.download(name, path)
        self._carried[name] = _stamp(path)

    def push(self) -> None:
        """Carries to the bucket what has changed here, and removes there what was removed here.

        Raises:
          OSError: it cannot be written. What is missing comes the next time.
          UserError: the run was started again elsewhere.
        """
        here = dict(self._files())
        changed = [name for name, stamp in here.items() if self._carried.get(name) != stamp]
        gone = self._carried.keys() - here.keys()
        if not changed and not gone:
            return
        of_start = self._there.get("config.json", 0)
        if self.folder.generation("config.json") != of_start:
            self._end()
        for name in sorted(changed, key=lambda name: (name in _LAST, name)):
            over = of_start if name == "config.json" else None
            try:
                self._there[name] = self.folder.upload(name, os.path.join(self.path, name), over=over)
            except FileExistsError:
                self._end()
            self._carried[name] = here[name]
        self.folder.remove(gone)
        for name in gone:
            del self._carried[name], self._there[name]

    def _end(self) -> None:
        raise UserError(
            f"{self.folder.url} is another run's by now: it was started again elsewhere, or removed; this one ends. "
            "Run one at a time, or choose another --workdir"
        )

    def _files(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for at, _, names in os.walk(self.path):
            for name in names:
                path = os.path.join(at, name)
                name = os.path.relpath(path, self.path)
                if not _NOT_CARRIED.search(name):
                    yield name, _stamp(path)

    def check_writable(self) -> None:
        """Writes an object and removes it.

        Raises:
          UserError: that cannot be.
        """
        path = os.path.join(os.path.dirname(self.path), ".lock")
        try:
            self.folder.upload(".lock", path)
            self.folder.remove([".lock"])
        except OSError as error:
            raise UserError(f"--workdir={self.folder.url}: {error}; {_ROLES}") from None


_ROLES = (
    "the account needs roles/storage.objectAdmin and roles/storage.legacyBucketReader on the bucket (gcloud storage "
    "buckets add-iam-policy-binding)"
)


def _open_bucket(name: str, *, url: str) -> Any:
    import fsspec
    import google.auth.exceptions
    from google.api_core import exceptions
    from google.cloud import storage

    # Other processes write there, too: what was listed a while ago tells nothing.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        return storage.Client().get_bucket(name, **_retry_policy())
    except google.auth.exceptions.DefaultCredentialsError:
        reason = "there are no Google Cloud credentials here; run `gcloud auth application-default login`"
    except exceptions.NotFound:
        reason = f"there is no bucket {name}; make it (gcloud storage buckets create gs://{name}), or name another"
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        reason = f"the bucket {name} may not be read ({one_line(error)}); {_ROLES}"
    except ValueError as error:
        reason = f"{one_line(error)}; name another bucket"
    except failures() as error:
        reason = f"the bucket {name} cannot be reached ({one_line(error)}); mend that, or choose another"
        if "Project was not passed" in str(error):
            reason = "there is no Google Cloud project here; set GOOGLE_CLOUD_PROJECT to the name of yours"
    raise UserError(f"--workdir={url}: {reason}")


def _retry_policy() -> dict[str, Any]:
    """How long a call of the client is tried, in its own words."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {"retry": DEFAULT_RETRY.with_timeout(_DEADLINE)}


@contextlib.contextmanager
def _as_os_error(what: str) -> Iterator[None]:
    """What clients raise -> OSError, as of a disk."""
    try:
        yield
    except FileExistsError:
        raise
    except failures() as error:
        raise OSError(f"{what} ({one_line(error)})") from None


def _stamp(path: str) -> tuple[int, ...]:
    """Changes with the file."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _make_home() -> tuple[str, IO[str]]:
    """A new directory for a double, and the lock on it; removes those whose processes are no more."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    homes = os.path.join(cache, "mlm", "workdirs")
    os.makedirs(homes, exist_ok=True)
    with open(os.path.join(homes, ".lock"), "w") as one_at_a_time:
        _lock(one_at_a_time, fcntl.LOCK_EX)
        for name in os.listdir(homes):
            home = os.path.join(homes, name)
            if os.path.isdir(home):
                with open(os.path.join(home, ".lock"), "w") as left:
                    if _lock(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        shutil.rmtree(home, ignore_errors=True)
        home = tempfile.mkdtemp(dir=homes)
        lock = open(os.path.join(home, ".lock"), "w")  # noqa: SIM115
        _lock(lock, fcntl.LOCK_EX)
    return home, lock


def _lock(file: IO[str], how: int) -> bool:
    """False where another has it, or where the file system, such as some network mounts, has no locks."""
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True


def _remove_home(home: str, lock: IO[str], process: int) -> None:
    if process == os.getpid():  # Not in a fork.
        shutil.rmtree(home, ignore_errors=True)
        lock.close()
