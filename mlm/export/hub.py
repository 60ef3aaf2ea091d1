"""Uploads exported models to the Hugging Face hub, in the background.

A failed upload is retried with growing waits while the run lasts; a newer model replaces one that is still waiting.
`pushed.json` records the last upload: a run that was killed between its last export and its upload uploads the model
when it is started again.
"""

import dataclasses
import glob
import json
import os
import shlex
import shutil
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import huggingface_hub
from absl import logging

from mlm.data.sources import retry
from mlm.data.sources.retry import RetryPolicy
from mlm.errors import UserError, one_line

# Errors of an upload. huggingface_hub turns some responses into RuntimeErrors and ValueErrors.
_FAILURES = (*retry.CLIENT_ERRORS, OSError, RuntimeError, ValueError)
# Attempts of the last upload after the run: more than two minutes with waits of 5, 10, 20, 40 and 80 seconds.
_LAST_TRIES = 6


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """Links or copies of a step's files in a temporary directory: path in the repository -> path here."""

    step: int
    directory: str
    files: Mapping[str, str]

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


class Hub:
    """Uploads the work directory's model and TensorBoard events to a repository, one upload at a time.

    The thread is a daemon: a run that fails or is killed does not wait for an upload.

    Attributes:
      repo_id: "owner/name" of the repository.
    """

    def __init__(
        self,
        name: str,
        *,
        private: bool,
        workdir: str,
        retry_policy: RetryPolicy,
        first_wait_seconds: float = 5.0,
        download_command: str | None = None,
    ):
        """Creates the repository if it does not exist, and removes leftovers of an interrupted upload in `workdir`.

        Args:
          name: "owner/name", or "name" for a repository of the token's owner.
          private: True to create a private repository.
          workdir: path of the work directory on this machine.
          retry_policy: for the network; its timeout also ends a silent upload.
          first_wait_seconds: wait before an upload is retried; it doubles up to five minutes.
          download_command: the shell command that copies `model/` from a bucket; None if the run is local.

        Raises:
          UserError: the repository cannot be created, or the token cannot write to it.
        """
        for leftover in glob.glob(os.path.join(glob.escape(workdir), "push.*")):
            shutil.rmtree(leftover, ignore_errors=True)
        self._name = name
        self._workdir, self._download_command = workdir, download_command
        self._first_wait = first_wait_seconds
        self._api = huggingface_hub.HfApi()
        self.repo_id = self._create(
            check_token(name, retry_policy=retry_policy), private=private, retry_policy=retry_policy
        )
        self._changed = threading.Condition()
        self._waiting: _Snapshot | None = None
        self._closing = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
        self._thread.start()

    def _create(self, repo_id: str, *, private: bool, retry_policy: RetryPolicy) -> str:
        retries = retry.Retries(retry_policy, f"creating {repo_id} on the hub")
        while True:
            try:
                try:
                    return self._api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                except _FAILURES as error:
                    retries.failed(error)
            except _FAILURES as error:
                raise UserError(
                    f"hub.hub_model_id={self._name!r}: cannot create the repository ({one_line(error)}); check the "
                    "name, the token's rights (`hf auth whoami`) and the network, or set hub.push_to_hub=False"
                ) from None

    def push(self, *, step: int) -> None:
        """Queues an upload of the model that is now in `workdir`; does not wait for it."""
        try:
            snapshot = self._take_snapshot(step)
        except OSError as error:
            logging.warning("step %d: not uploaded to the hub, the files cannot be copied: %s", step, one_line(error))
            return
        with self._changed:
            older, self._waiting = self._waiting, snapshot
            self._changed.notify_all()
        if older is not None:
            logging.warning("step %d: not uploaded to the hub, a newer model replaces it", older.step)
            older.remove()

    def _take_snapshot(self, step: int) -> _Snapshot:
        directory = tempfile.mkdtemp(prefix="push.", dir=self._workdir)
        # Hard links keep the files of an upload in progress when the next export replaces the model.
        model = shutil.copytree(
            os.path.join(self._workdir, "model"), os.path.join(directory, "model"), copy_function=_link_or_copy
        )
        files: dict[str, str] = {}
        for folder, _, names in os.walk(model):
            paths = [os.path.join(folder, name) for name in names]
            files |= {os.path.relpath(path, model): path for path in paths}
        for name in os.listdir(self._workdir):
            if name.startswith("events.out.tfevents"):
                # Copied, because the run appends to it.
                files[f"runs/{name}"] = shutil.copy(os.path.join(self._workdir, name), directory)
        return _Snapshot(step, directory, files)

    def _work(self) -> None:
        """Runs in the thread: uploads the newest snapshot, with retries unless the error is permanent."""
        tries_left, wait = _LAST_TRIES, self._first_wait
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                snapshot, self._waiting = self._waiting, None
                closing = self._closing
            if snapshot is None:
                return
            try:
                self._commit(snapshot)
            except _FAILURES as error:
                self._failure = one_line(error)
                logging.warning("step %d: uploading to %s failed: %s", snapshot.step, self.repo_id, self._failure)
                is_permanent = retry.classify_error(error) is retry.Failure.PERMANENT
                tries_left -= closing
                with self._changed:
                    if self._waiting is None and not is_permanent and tries_left > 0:
                        self._waiting, snapshot = snapshot, None
                    run_ended = self._waiting is not None and self._wait(wait, until_closing=not closing)
                # The tries after the end of the run have their own waits.
                wait = self._first_wait if run_ended else min(2 * wait, 300.0)
            else:
                self._failure = None
                tries_left, wait = _LAST_TRIES, self._first_wait
            if snapshot is not None:
                snapshot.remove()

    def _wait(self, seconds: float, *, until_closing: bool) -> bool:
        """Waits, with `until_closing` until the end of the run at most; a newer model does not end the wait."""
        return self._changed.wait_for(lambda: until_closing and self._closing, timeout=seconds)

    def _commit(self, snapshot: _Snapshot) -> None:
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            for name, path in sorted(snapshot.files.items())
        ]
        self._api.create_commit(self.repo_id, operations, commit_message=f"Step {snapshot.step}")
        path = _marker(self._workdir)
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump({"hub_model_id": self._name, "step": snapshot.step}, file)
        os.replace(path + ".tmp", path)
        logging.info("step %d: uploaded to %s", snapshot.step, self.repo_id)

    def finish(self, *, step: int) -> None:
        """Uploads the final model and waits for it.

        Raises:
          UserError: the upload failed; the message has the command for a manual upload.
        """
        self.push(step=step)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if not is_pushed(self._workdir, name=self._name, step=step):
            upload = f"hf upload {self.repo_id} {shlex.quote(os.path.join(self._workdir, 'model'))}"
            if self._download_command is not None:
                upload = f"{self._download_command} && hf upload {self.repo_id} model"
            raise UserError(
                f"hub.push_to_hub=True: the run is finished, but uploading the model to {self.repo_id} failed "
                f"({self._failure or 'see above'}); rerun the same command, or upload it yourself: {upload}"
            )


def is_pushed(workdir: str, *, name: str, step: int) -> bool:
    """Returns True if the model of this step was uploaded to the repository `name`."""
    try:
        with open(_marker(workdir), encoding="utf-8") as file:
            return json.load(file) == {"hub_model_id": name, "step": step}
    except (FileNotFoundError, ValueError):
        return False


def _marker(workdir: str) -> str:
    return os.path.join(workdir, "pushed.json")


def check_token(name: str, *, retry_policy: RetryPolicy) -> str:
    """Checks the hub token; returns "owner/name" of the repository.

    Raises:
      UserError: the token is missing, invalid or read-only.
    """
    if huggingface_hub.get_token() is None:
        raise UserError(
            "hub.push_to_hub=True: needs a token; run `hf auth login`, set HF_TOKEN, or set hub.push_to_hub=False"
        )
    retry.configure_hub_retries(retry_policy)
    try:
        account = huggingface_hub.HfApi().whoami()
    except _FAILURES as error:
        raise UserError(
            f"hub.push_to_hub=True: cannot check the token ({one_line(error)}); check it with `hf auth whoami`, check "
            "the network, or set hub.push_to_hub=False"
        ) from None
    repo_id = name if "/" in name else f"{account['name']}/{name}"
    if not _may_write(account, repo_id=repo_id):
        raise UserError(
            f"hub.push_to_hub=True: the token of {account['name']} cannot write to {repo_id}; create one with write "
            "access at https://huggingface.co/settings/tokens and run `hf auth login`, or set hub.push_to_hub=False"
        )
    return repo_id


def _may_write(account: Mapping[str, Any], *, repo_id: str) -> bool:
    """Returns False if the response of whoami-v2 says that the token cannot write; otherwise the upload decides."""
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        return False
    if token.get("role") != "fineGrained" or "fineGrained" not in token:
        return True
    scopes = token["fineGrained"]
    if any("write" in permission for permission in scopes.get("global", ()) if permission.startswith("repo.")):
        return True
    return any(
        scope["entity"].get("name") in (repo_id, repo_id.split("/")[0]) and "repo.write" in scope["permissions"]
        for scope in scopes.get("scoped", ())
    )


def _link_or_copy(source: str, target: str) -> None:
    """Makes a hard link, or a copy on file systems without them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
