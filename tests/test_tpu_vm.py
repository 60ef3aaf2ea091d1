"""The commands of launch/tpu_vm.sh, and tpu_worker.sh; test_tpu_vm_train.py tests the monitoring."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_cloud import FAKES, QUEUED, ROOT, TRAIN, Cloud, git, make_repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def cloud(tmp_path, repository):
    return Cloud(tmp_path, repository)


@pytest.mark.parametrize("script", sorted([*ROOT.glob("launch/*.sh"), *FAKES.glob("worker/*")]), ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script):
    # pip installs it beside this Python.
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "call"),
    [
        (
            ["--type=v3-8", "--zone=europe-west4-a"],
            "tpu-vm create tpu --accelerator-type=v3-8 --version=tpu-ubuntu2204-base --zone=europe-west4-a",
        ),
        (
            ["--type=v5litepod-8", "--spot", "--project=p"],
            "tpu-vm create tpu --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --spot --project=p",
        ),
        (
            ["--type=v6e-8", "--reserved", "--version=mine"],
            "tpu-vm create tpu --accelerator-type=v6e-8 --version=mine --reserved",
        ),
        (
            ["--type=v5p-16", "--queued", "--spot"],
            "queued-resources create tpu --node-id=tpu --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 "
            "--spot",
        ),
    ],
)
def test_create_makes_the_call_and_prints_it(cloud, options, call):
    output = cloud("create", "tpu", *options)
    assert " ".join(cloud.calls[0]) == f"compute tpus {call}"
    assert f"+ gcloud compute tpus {call}\n" in output


def test_create_shows_the_error_of_gcloud(cloud):
    cloud.play(creates=["Quota limit 'TPUV3sPerProjectPerZone' has been exceeded"])
    assert "Quota limit" in cloud("create", "tpu", "--type=v3-8", code=1)
    assert cloud.verbs == ["tpu-vm create"]


@pytest.mark.slow
def test_create_waits_in_the_queue(cloud):
    cloud.play(queue=["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    output = cloud("create", "tpu", "--type=v4-16", "--queued", "--poll=0")
    assert re.findall(r"request tpu is (\w+)", output) == ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    cloud.play(queue=["ACCEPTED", "FAILED"])
    assert "error: tpu: the queued request is FAILED" in cloud(
        "create", "tpu", "--type=v4-16", "--queued", "--poll=0", code=1
    )


@pytest.mark.parametrize(
    ("command", "calls"),
    [
        (["create", "tpu", "--type=v3-8"], ["tpu-vm create"]),
        (["create", "tpu", "--type=v3-8", "--queued"], ["queued-resources create"]),
        (["setup", "tpu"], ["tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh"]),
        (["train", "tpu", *TRAIN], ["tpu-vm ssh"]),
        (["status", "tpu"], ["tpu-vm describe", "tpu-vm ssh", "tpu-vm ssh"]),
        (["logs", "tpu"], ["tpu-vm ssh"]),
        (["stop", "tpu"], ["tpu-vm ssh"]),
        (["delete", "tpu"], ["tpu-vm delete"]),
        (["delete", "tpu", "--queued"], ["queued-resources delete"]),
    ],
    ids=lambda value: "-".join(value[:1]),
)
def test_a_dry_run_prints_the_calls_and_makes_none(cloud, command, calls):
    at = command.index("--") if "--" in command else len(command)
    output = cloud(*command[:at], "--dry-run", *command[at:])
    assert re.findall(r"^\+ gcloud compute tpus (\S+ \S+)", output, re.MULTILINE) == calls
    assert cloud.calls == []


def test_a_dry_run_reports_the_errors_of_a_real_run(cloud):
    assert "give the arguments of main.py" in cloud("train", "tpu", "--dry-run", code=2)
    home = ("--", "--config=configs/quickstart.py", "--workdir=/home/me/run")
    assert "is on the disk of the VM" in cloud("train", "tpu", "--dry-run", "--spot", *home, code=2)


def test_setup_installs_one_commit_on_every_worker(cloud, repository):
    (repository / "requirements.txt").write_text("not committed\n")
    output = cloud("setup", "tpu", "--env=HF_TOKEN", env={"HF_TOKEN": "hf_secret"})
    git(repository, "checkout", "requirements.txt")
    sha = git(repository, "rev-parse", "HEAD")
    assert "warning: uncommitted changes in" in output
    assert "hf_secret" not in output + json.dumps(cloud.calls)
    for home in cloud.workers:
        assert (home / "mlm" / "COMMIT").read_text().strip() == sha
        assert (home / "mlm" / "requirements.txt").read_text() == (ROOT / "requirements.txt").read_text()
        assert (home / "mlm-run" / "env").read_text() == 'HF_TOKEN="hf_secret"\n'
        assert (home / "mlm-run" / "env").stat().st_mode & 0o777 == 0o600
        assert (home / "uv").read_text().splitlines()[1].endswith(f"{home}/mlm/requirements.txt jax[tpu]")
        assert f"{home.name}: commit {sha}, jax 0.10" in output
        assert sorted(path.name for path in home.iterdir()) == ["mlm", "mlm-run", "mlm-venv", "uv"]


@pytest.mark.slow
def test_setup_installs_another_commit_but_not_during_a_run(cloud, repository):
    first = git(repository, "rev-parse", "HEAD")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "more")
    cloud("setup", "tpu")
    cloud("setup", "tpu", f"--commit={first}")
    assert (cloud.workers[1] / "mlm" / "COMMIT").read_text().strip() == first
    cloud("train", "tpu", "--no-watch", *TRAIN)
    assert "a run is in progress" in cloud("setup", "tpu", code=1)
    assert (cloud.workers[1] / "mlm" / "COMMIT").read_text().strip() == first


@pytest.mark.slow
def test_train_starts_the_same_command_on_every_worker_once(cloud):
    cloud("setup", "tpu")
    assert "worker-1: started" in cloud("train", "tpu", "--no-watch", *TRAIN)
    assert "worker-1: the run is in progress" in cloud("train", "tpu", "--no-watch", *TRAIN)
    for home in cloud.workers:
        python = home / "mlm-venv" / "bin" / "python"
        python.write_text('#!/bin/sh\npwd; for word; do echo "$word"; done\n')
        done = subprocess.run(["bash", home / "mlm-run" / "command"], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [str(home / "mlm"), "main.py", *TRAIN[1:]]
        assert (home / "systemctl").read_text().count("start --no-block mlm.service") == 1


@pytest.mark.slow
def test_the_service_restarts_only_after_a_preemption(cloud):
    cloud("setup", "tpu")
    cloud("train", "tpu", "--no-watch", *TRAIN)
    unit = (cloud.workers[0] / "mlm-run" / "mlm.service").read_text().splitlines()
    # systemd.service(5): RestartForceExitStatus takes precedence over Restart; main.py exits with 75 after a save.
    assert "Restart=no" in unit
    assert "RestartForceExitStatus=75" in unit
    # SIGTERM goes to main.py only, which has the time to save a checkpoint.
    assert {"KillMode=mixed", "TimeoutStopSec=600"} <= set(unit)
    assert "WantedBy=multi-user.target" in unit
    assert (
        f"enable --quiet --force {cloud.workers[0]}/mlm-run/mlm.service" in (cloud.workers[0] / "systemctl").read_text()
    )


@pytest.mark.parametrize(
    ("active", "result", "end", "state"),
    [
        ("inactive", "success", None, "none"),
        ("active", "success", None, "running"),
        ("activating", "success", "exited 75", "restarting"),
        ("deactivating", "success", None, "stopping"),
        ("inactive", "success", "exited 0", "finished"),
        ("inactive", "success", "exited 75", "stopped"),
        ("failed", "exit-code", "exited 130", "stopped"),
        ("failed", "exit-code", "exited 2", "failed 2"),
        ("failed", "exit-code", "exited 1", "failed 1"),
        ("failed", "signal", "killed KILL", "failed KILL"),
        ("failed", "start-limit-hit", "exited 75", "failed too-many-restarts"),
    ],
)
def test_the_state_of_a_worker(cloud, active, result, end, state):
    home = cloud.workers[0]
    (home / "mlm-run").mkdir()
    (home / "active").write_text(active)
    (home / "result").write_text(result)
    if end is not None:
        (home / "mlm-run" / "exit").write_text(end + "\n")
    environment = {"HOME": str(home), "WORKER": "w", "PATH": f"{FAKES}/worker:{os.environ['PATH']}"}

    def worker(command):
        script = ROOT / "launch" / "tpu_worker.sh"
        return subprocess.run(["bash", script, command], env=environment, capture_output=True, text=True, check=False)

    assert worker("status").stdout == f"worker w no-code {state}\n"
    # At boot an interrupted run starts again; a finished or failed one does not.
    assert (worker("may-start").returncode == 0) == (end in (None, "exited 75", "killed KILL"))


@pytest.mark.slow
def test_status_logs_and_delete(cloud):
    cloud("setup", "tpu")
    for home in cloud.workers:
        (home / "mlm-run" / "log").write_text("".join(f"line {i}\n" for i in range(9)))
    output = cloud("status", "tpu")
    assert "READY\n" in output
    assert re.search(r"^worker worker-1 \w{40} none$", output, re.MULTILINE)
    assert "worker-0: line 8\n" in output
    assert "worker-1: line 7\nworker-1: line 8\n" in cloud("logs", "tpu", "--worker=1", "--lines=2")
    cloud("delete", "tpu")
    assert cloud.calls[-1] == ["compute", "tpus", "tpu-vm", "delete", "tpu", "--quiet"]
    cloud.play(**{"is": QUEUED})
    cloud("delete", "tpu")
    assert cloud.calls[-1][2:] == ["queued-resources", "delete", "tpu", "--force", "--quiet"]


@pytest.mark.slow
def test_workers_at_different_commits_do_not_start(cloud):
    assert "error: tpu: is not set up yet" in cloud("train", "tpu", *TRAIN, code=2)
    cloud("setup", "tpu")
    (cloud.workers[1] / "mlm" / "COMMIT").write_text("another\n")
    assert "at different commits" in cloud("train", "tpu", *TRAIN, code=2)
    assert not (cloud.workers[0] / "mlm-run" / "command").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly", "tpu"], "error: fly: must be one of create"),
        (["create"], "error: create: needs the name of the TPU VM"),
        (["create", "tpu"], "error: --type: missing; create needs it"),
        (["create", "tpu", "--type=v9-8"], "error: --type=v9-8: has no known runtime version"),
        (["create", "tpu", "--tpye=v3-8"], "error: --tpye=v3-8: is no option"),
        (["setup", "tpu", "--commit=nowhere"], "error: --commit=nowhere: no such commit"),
        (["setup", "tpu", "--env=NOT_THERE"], "error: --env=NOT_THERE: not set in your environment"),
        (["stop", "tpu", *TRAIN], "error: stop: takes no arguments of main.py"),
        (["train", "tpu"], "error: --workdir: missing; give the arguments"),
    ],
)
def test_an_error_is_one_line(cloud, words, message):
    assert message in cloud(*words, code=2)
    assert cloud.verbs == []


def test_without_arguments_it_prints_its_usage(cloud):
    assert cloud("help").startswith("launch/tpu_vm.sh COMMAND NAME")
    assert cloud(code=2).startswith("launch/tpu_vm.sh COMMAND NAME")
