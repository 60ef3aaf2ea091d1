"""launch/slurm.sh against fake Slurm programs that record calls, and an srun that starts the processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests import fork_server
from tests.test_multihost import write_config
from tests.tiny import write_corpus

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "launch" / "slurm.sh"
# The output of tests/fakes/slurm/git.
COMMIT = "89abcdef"


class Cluster:
    """A cluster with one job, number 4711."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "state").write_text("RUNNING\n")
        self.environment = os.environ | {
            "CLUSTER": str(folder),
            "XLA_FLAGS": fork_server.xla_flags(2),
            "PATH": f"{ROOT}/tests/fakes/slurm:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def submit(self, *words, code=0):
        done = subprocess.run([SCRIPT, *words], env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def start(self, *arguments, python=sys.executable, tasks=1, commit=COMMIT, **options):
        """Starts the job as Slurm would."""
        environment = {
            "SLURM_JOB_ID": "4711",
            "SLURM_NTASKS": str(tasks),
            "MLM_COMMIT": commit,
            "MLM_PYTHON": str(python),
        }
        (self.folder / "tasks").unlink(missing_ok=True)
        return subprocess.Popen(
            [SCRIPT, "--", *arguments],
            env=self.environment | environment,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )

    @property
    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def tasks(self):
        """Waits until srun has started the processes; returns their ids."""
        deadline = time.monotonic() + 30
        while not (self.folder / "tasks").exists() or not (self.folder / "tasks").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return [int(number) for number in (self.folder / "tasks").read_text().split()]


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    # Ends the processes that a failed test has left, by their process groups.
    if (tmp_path / "tasks").exists():
        for task in cluster.tasks():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(task, signal.SIGKILL)


def program(path, text):
    """Writes an executable that replaces Python."""
    path.write_text("#!/bin/bash\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return path


def test_a_job_is_submitted(cluster):
    words = ["--nodes=2", "--gpus=4", "--time=1:00:00", "--sbatch=--partition=big", "--python=py", "--", "--config=c"]
    output = cluster.submit(*words, "--workdir=/disk/run", "--config.data.data_files=a b")
    assert cluster.calls == [
        f"sbatch --job-name=mlm-run --chdir={ROOT} --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --time=1:00:00 "
        "--signal=TERM@600 --requeue --open-mode=append --output=slurm-%j.log --partition=big "
        f"--export=ALL,MLM_COMMIT={COMMIT},MLM_PYTHON=py {SCRIPT} -- --config=c --workdir=/disk/run "
        "--config.data.data_files=a b"
    ]
    assert "+ 'sbatch' '--job-name=mlm-run'" in output
    assert cluster.submit("--dry-run", *words, "--workdir=/disk/run").startswith("+ 'sbatch'")
    assert len(cluster.calls) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu=4"], "error: --gpu=4: is no option of launch/slurm.sh"),
        (["--gpus=4", "--", "--config=c"], "error: --workdir: missing; give the arguments of main.py: -- --config="),
    ],
)
def test_an_error_is_one_line(cluster, words, message):
    assert message in cluster.submit(*words, code=2)
    assert cluster.calls == []


@pytest.mark.parametrize("code", [0, 1, 2, 75, 130, 137])
def test_only_a_preempted_run_is_requeued(cluster, code):
    python = program(cluster.folder / "python", f"exit {code}")
    job = cluster.start("--config=c", python=python, tasks=2)
    output = job.communicate(timeout=30)[1]
    assert job.returncode == code
    step = f"srun --kill-on-bad-exit=0 --wait=0 {python} main.py --config=c --multihost"
    assert cluster.calls == [step] + ["scontrol requeue 4711"] * (code == 75)
    assert output.startswith("+ 'srun' ")


def test_a_run_with_a_killed_process_is_not_requeued(cluster):
    python = program(cluster.folder / "python", "[[ $SLURM_PROCID == 0 ]] && exit 75\nkill -KILL $$")
    job = cluster.start("--config=c", python=python, tasks=2)
    job.communicate(timeout=30)
    assert job.returncode == 137
    assert len(cluster.calls) == 1


@pytest.mark.slow
def test_the_job_waits_after_the_signal_until_all_processes_have_saved(cluster):
    python = program(
        cluster.folder / "python",
        """
        trap 'sleep $((SLURM_PROCID + 1)).2; touch $CLUSTER/saved-$SLURM_PROCID; exit 75' TERM
        touch $CLUSTER/ready-$SLURM_PROCID
        while true; do sleep 0.05; done
        """,
    )
    job = cluster.start("--config=c", python=python, tasks=2)
    tasks = cluster.tasks()
    while len(list(cluster.folder.glob("ready-*"))) < 2:
        time.sleep(0.02)
    for process in (job.pid, *tasks):
        os.kill(process, signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == 75
    assert len(list(cluster.folder.glob("saved-*"))) == 2
    assert cluster.calls[-1] == "scontrol requeue 4711"


def test_a_cancelled_job_is_not_requeued(cluster):
    (cluster.folder / "state").write_text("COMPLETING\n")
    job = cluster.start("--config=c", python=program(cluster.folder / "python", "exit 75"))
    job.communicate(timeout=30)
    assert job.returncode == 75
    assert not any("requeue" in call for call in cluster.calls)


def test_a_job_refuses_another_commit(cluster):
    job = cluster.start("--config=c", commit="0123")
    assert "the job was submitted at 0123; check that out" in job.communicate(timeout=30)[1]
    assert job.returncode == 2
    assert cluster.calls == []


@pytest.mark.slow
def test_two_processes_find_each_other_are_preempted_and_resume(cluster):
    write_config(cluster.folder, write_corpus(cluster.folder))
    config = cluster.folder / "config.py"
    workdir = cluster.folder / "run"
    arguments = [f"--config={config}", f"--workdir={workdir}", "--config.eval_steps=10000", "--config.save_steps=10000"]
    job = cluster.start(*arguments, tasks=2)
    tasks = cluster.tasks()
    lines = []
    while not re.search(r"step +3 of 100000 ", lines[-1] if lines else ""):
        lines.append(job.stderr.readline())
        assert lines[-1], "".join(lines)
    for process in tasks:
        os.kill(process, signal.SIGTERM)
    output = "".join([*lines, *job.communicate(timeout=120)])
    assert job.returncode == 75, output
    assert cluster.calls[-1] == "scontrol requeue 4711"
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(saved) == 1

    job = cluster.start(*arguments, f"--config.num_train_steps={saved[0] + 5}", tasks=2)
    output = "".join(job.communicate(timeout=180))
    assert job.returncode == 0, output
    assert re.search(rf"resuming after step {saved[0]}\b", output)
    assert "process 1 of 2 reads" in output
    assert not any("requeue" in call for call in cluster.calls[2:])
