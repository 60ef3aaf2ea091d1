"""launch/tpu_vm.sh train: starting, monitoring, re-creating a preempted VM, and errors."""

import subprocess

import pytest

from tests.tpu_cloud import FINISHED, ON_DEMAND, QUEUED, READY, SPOT, TRAIN, Cloud, git, make_repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def cloud(tmp_path, repository):
    return Cloud(tmp_path, repository)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ON_DEMAND, SPOT, QUEUED])
@pytest.mark.parametrize("workdir", ["gs://bucket/run", "gs://bucket/runs/it's a b", "/mnt/disk/run"])
def test_a_work_directory_that_outlives_the_vm_is_accepted(cloud, kind, workdir):
    cloud("setup", "tpu")
    cloud.play(**{"is": kind})
    cloud("train", "tpu", "--no-watch", "--", "--config=configs/roberta_base.py", f"--workdir={workdir}")
    for home in cloud.workers:
        (home / "mlm-venv" / "bin" / "python").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
        done = subprocess.run(["bash", home / "mlm-run" / "command"], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"--workdir={workdir}"


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("runs/a", "is on the disk of the VM, which is deleted at a preemption; use gs://BUCKET/PATH"),
        ("/home/me/run", "is on the disk of the VM"),
        ("gs://bucket", "is not a supported URL; use gs://BUCKET/PATH"),
        ("gs://bucket/", "is not a supported URL; use gs://BUCKET/PATH"),
        ("s3://bucket/run", "is not a supported URL; use gs://BUCKET/PATH"),
    ],
)
def test_a_work_directory_that_is_deleted_with_the_vm_is_refused(cloud, workdir, message):
    cloud("setup", "tpu")
    cloud.play(**{"is": SPOT})
    output = cloud("train", "tpu", "--", "--config=configs/roberta_base.py", f"--workdir={workdir}", code=2)
    assert f"error: --workdir={workdir}" in output
    assert message in output


@pytest.mark.slow
def test_a_local_work_directory_is_accepted_on_a_vm_that_is_not_preempted(cloud):
    cloud("setup", "tpu")
    cloud("train", "tpu", "--no-watch", "--", "--config=configs/roberta_base.py", "--workdir=runs/a")


@pytest.mark.slow
def test_train_monitors_until_the_run_is_finished(cloud):
    cloud("setup", "tpu")
    cloud.play(states=[READY, READY, {"vm": "UNREACHABLE"}, READY, FINISHED])
    output = cloud("train", "tpu", "--poll=0", *TRAIN)
    assert "2 running" in output
    assert "tpu is UNREACHABLE; waiting" in output
    assert "the run is finished" in output


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exited 1", "exited 2", "killed SEGV"])
def test_train_ends_after_a_failure_and_does_not_restart(cloud, end):
    cloud("setup", "tpu")
    cloud.play(**{"is": SPOT}, states=[READY, {"vm": "READY", "exits": {"1": end}}])
    (cloud.workers[0] / "mlm-run" / "log").write_text("the cause\n")
    (cloud.workers[1] / "mlm-run" / "log").write_text("it went wrong\n")
    before = len(cloud.verbs)
    output = cloud("train", "tpu", "--poll=0", *TRAIN, code=1)
    assert f"worker-1 {(cloud.workers[1] / 'mlm' / 'COMMIT').read_text().strip()} failed {end.split()[1]}" in output
    assert "worker-1: it went wrong" in output
    assert set(cloud.verbs[before:]) == {"tpu-vm ssh"}
    assert (cloud.workers[1] / "systemctl").read_text().count("start ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["PREEMPTED", "TERMINATED", "GONE"])
def test_a_preempted_spot_vm_is_recreated_at_the_same_commit(cloud, repository, gone):
    cloud("setup", "tpu")
    sha = git(repository, "rev-parse", "HEAD")
    no_capacity = '{"code": 8, "message": "There is no more capacity in the zone \\"z\\"; you can try in another zone"}'
    cloud.play(
        **{"is": SPOT},
        # A worker fails first because the other host is gone, which is no failure of the run.
        states=[READY, {"vm": "READY", "exits": {"0": "exited 1"}}, {"vm": gone}, READY, FINISHED],
        creates=[no_capacity, no_capacity],
    )
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "later")
    before = len(cloud.verbs)
    output = cloud("train", "tpu", "--poll=0", "--zone=z", *TRAIN)
    assert "no TPU is available now" in output
    verbs = cloud.verbs[before:]
    at = verbs.index("tpu-vm create")
    assert verbs[at - 1] == ("tpu-vm ssh" if gone == "GONE" else "tpu-vm delete")
    # setup is ssh, scp, ssh; start is two.
    assert verbs[at : at + 8] == ["tpu-vm create"] * 3 + ["tpu-vm ssh", "tpu-vm scp"] + ["tpu-vm ssh"] * 3
    create = next(call for call in cloud.calls if call[3] == "create")
    assert create[5:] == ["--accelerator-type=v4-16", "--version=tpu-ubuntu2204-base", "--spot", "--zone=z"]
    for home in cloud.workers:
        assert (home / "mlm" / "COMMIT").read_text().strip() == sha
        assert "--workdir=gs://bucket/run" in (home / "mlm-run" / "command").read_text()


@pytest.mark.slow
def test_a_vm_that_was_preempted_while_not_monitored_is_recreated(cloud):
    cloud.play(states=[{"vm": "GONE"}, {"vm": "GONE"}, READY, FINISHED])
    (cloud.folder / "scenario.json").write_text(
        (cloud.folder / "scenario.json").read_text().replace(f'"is": "{ON_DEMAND}"', '"is": null')
    )
    cloud("train", "tpu", "--poll=0", "--type=v4-16", "--spot", *TRAIN)
    assert cloud.verbs[0] == "tpu-vm create"
    assert "--workdir=gs://bucket/run" in (cloud.workers[1] / "mlm-run" / "command").read_text()


@pytest.mark.slow
def test_train_waits_for_a_vm_that_is_not_ready_yet(cloud):
    cloud("setup", "tpu")
    cloud.play(states=[{"vm": "STARTING"}, {"vm": "STARTING"}, READY, READY, FINISHED])
    output = cloud("train", "tpu", "--poll=0", *TRAIN)
    assert "tpu is STARTING; waiting" in output
    assert "worker-1: started" in output


@pytest.mark.slow
def test_a_preempted_queued_vm_is_queued_again(cloud):
    cloud("setup", "tpu")
    cloud.play(
        **{"is": QUEUED}, states=[READY, {"vm": "GONE"}, READY, FINISHED], queue=["WAITING_FOR_RESOURCES", "ACTIVE"]
    )
    before = len(cloud.calls)
    cloud("train", "tpu", "--poll=0", *TRAIN)
    calls = [" ".join(call[2:]) for call in cloud.calls[before:] if call[2] == "queued-resources"]
    assert calls[:2] == [
        "queued-resources delete tpu --force --quiet",
        "queued-resources create tpu --node-id=tpu --accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base "
        "--spot",
    ]
    assert [call.split()[1] for call in calls[2:]] == ["describe", "describe"]


@pytest.mark.slow
def test_an_error_that_waiting_cannot_fix_ends_the_monitoring(cloud):
    cloud("setup", "tpu")
    cloud.play(**{"is": SPOT}, states=[READY, {"vm": "GONE"}], creates=["PERMISSION_DENIED: you may not"])
    assert "error: tpu: cannot be re-created; see the error above" in cloud("train", "tpu", "--poll=0", *TRAIN, code=1)


@pytest.mark.slow
def test_a_vm_that_is_not_preemptible_is_not_recreated(cloud):
    cloud("setup", "tpu")
    cloud.play(states=[READY, {"vm": "TERMINATED"}])
    before = len(cloud.verbs)
    assert "error: tpu: is TERMINATED; re-create it" in cloud("train", "tpu", "--poll=0", *TRAIN, code=1)
    assert set(cloud.verbs[before:]) == {"tpu-vm ssh"}


@pytest.mark.slow
def test_stop_saves_and_train_resumes(cloud):
    cloud("setup", "tpu")
    cloud("train", "tpu", "--no-watch", *TRAIN)
    assert "worker-1: stopped" in cloud("stop", "tpu")
    assert "disable --quiet mlm.service" in (cloud.workers[1] / "systemctl").read_text()
    cloud.play(states=[READY, {"vm": "READY", "exits": {"0": "exited 75", "1": "exited 75"}}])
    assert "the run was stopped; train resumes it" in cloud("train", "tpu", "--poll=0", *TRAIN)
