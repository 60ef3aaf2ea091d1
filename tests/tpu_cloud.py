"""A Google Cloud project with a TPU VM for tests of launch/tpu_vm.sh, through a fake gcloud that records calls,
simulates failures, and runs the workers' commands in local directories. No test calls the real gcloud."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAKES = ROOT / "tests" / "fakes"
TRAIN = ("--", "--config=configs/roberta_base.py", "--workdir=gs://bucket/run", "--config.data.dataset_name=it's a b")
ON_DEMAND = "v3-8,tpu-ubuntu2204-base,,,"
SPOT = "v4-16,tpu-ubuntu2204-base,True,,"
QUEUED = "v4-16,tpu-ubuntu2204-base,True,,tpu"
READY = {"vm": "READY"}
FINISHED = {"vm": "READY", "exits": {"0": "exited 0", "1": "exited 0"}}


def git(repository, *words):
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", repository, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_repository(folder):
    """Creates a repository with the scripts of the working tree, committed."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "requirements.txt", folder)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


class Cloud:
    """A project with one TPU VM of `workers` workers."""

    def __init__(self, folder, repository, workers=2):
        self.folder, self.repository = folder, repository
        self.workers = [folder / f"worker-{i}" for i in range(workers)]
        for home in self.workers:
            home.mkdir()
        self.play()

    def play(self, **scenario):
        scenario = {"workers": len(self.workers), "is": ON_DEMAND} | scenario
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def __call__(self, *words, code=0, env=None):
        """Runs the script; returns stdout and stderr."""
        done = subprocess.run(
            [self.repository / "launch" / "tpu_vm.sh", *words],
            env=os.environ
            | {"CLOUD": str(self.folder), "PATH": f"{FAKES}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
            | (env or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def verbs(self):
        """The resource and verb of each call, without queries of the VM's state."""
        return [" ".join(call[2:4]) for call in self.calls if call[3] != "describe"]
