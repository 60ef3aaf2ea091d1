"""Runs with a work directory in a bucket, killed and resumed on machines that have no files of them."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.kill_campaign import Trainer
from benchmarks.same_run import differences
from mlm.reporting.curves import read_metrics
from mlm.run.signals import EXIT_INTERRUPTED
from tests import fork_server
from tests.gcs_server import GcsServer
from tests.test_kill import trainer_of
from tests.tiny import write_corpus

REPO = Path(__file__).parent.parent
URL = "gs://bucket/runs/run"
CHECKPOINTS = "runs/run/checkpoints/"


@pytest.fixture
def server(monkeypatch):
    server = GcsServer()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


def delete_mirrors(directory: Path) -> None:
    """Makes this another machine: nothing of the run stays but compiled programs."""
    shutil.rmtree(directory / "cache" / "mlm" / "workdirs")


def run(trainer: Trainer, *flags: str, code: int = 0) -> str:
    """Runs main.py with other flags; returns stdout and stderr."""
    done = fork_server.run([sys.executable, "main.py", *flags], cwd=REPO, env=trainer.env)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def await_kill(process: subprocess.Popen, log: Path, reached) -> None:
    """Kills the process as soon as `reached()`."""
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_and_resumed_equals_an_uninterrupted_local_run(server, tmp_path):
    trainer = trainer_of(tmp_path, write_corpus(tmp_path, documents=3000), "--config.num_train_steps=36")
    straight, log = tmp_path / "straight" / "run", tmp_path / "log"
    straight.parent.mkdir()
    assert trainer.start(str(straight), str(log)).wait(300) == 0, log.read_text()[-3000:]

    def uploads(name):
        return [other for method, other in server.asked if method == "POST" and other.startswith(name)]

    def third_save_is_in_progress():
        # Its arrays are being written, and it is not marked as complete yet.
        return len({name.split("/")[3] for name in uploads(CHECKPOINTS)}) == 3

    for reached in (
        lambda: uploads("runs/run/config.json"),
        third_save_is_in_progress,
        third_save_is_in_progress,
        lambda: uploads("runs/run/model/model.safetensors"),
    ):
        server.asked.clear()
        await_kill(trainer.start(URL, str(log)), log, reached)
        delete_mirrors(tmp_path)
    process = trainer.start(URL, str(log))
    while "of 36   loss" not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # As before a preemption.
    assert process.wait(60) == EXIT_INTERRUPTED
    saved = int(re.search(r"after step (\d+), which is saved", log.read_text())[1])
    assert f"{CHECKPOINTS}{saved}/commit_success.txt" in server.names(CHECKPOINTS)
    delete_mirrors(tmp_path)
    assert trainer.start(URL, str(log)).wait(300) == 0, log.read_text()[-3000:]
    found = tmp_path / "found" / "run"
    server.download("runs/run", found)
    assert differences(str(straight), str(found)) == []
    starts = [start["step"] for start in json.loads((found / "config.json").read_text())["history"]]
    assert starts[:2] == [0, 0]
    assert starts[2] < starts[3] < starts[4] < starts[5] == saved
    # No mirror is left.
    assert [path.name for path in (tmp_path / "cache" / "mlm" / "workdirs").iterdir()] == [".lock"]


@pytest.mark.slow
def test_every_mode_accepts_a_run_in_a_bucket(server, tmp_path):
    trainer = trainer_of(tmp_path, write_corpus(tmp_path, documents=600))
    short = ("--config.num_train_steps=8", "--config.eval_steps=4")
    assert "contains no run" in run(trainer, "--mode=report", f"--workdir={URL}", code=2)
    checked = run(trainer, "--mode=check", *trainer.flags, *short, f"--workdir={URL}")
    assert "\nready\n" in checked
    assert server.names() == []
    written = run(trainer, *trainer.flags, *short, f"--workdir={URL}")
    assert f"Model      {URL}/model\n" in written
    assert f"gcloud storage cp --recursive {URL}/model ." in written
    assert f"all 8 steps are done; the model is in {URL}/model" in run(
        trainer, *trainer.flags, *short, f"--workdir={URL}"
    )

    assert "Number 3: the <mask>" in run(trainer, "--mode=fill_mask", f"--workdir={URL}", "Number 3: the <mask>.")
    assert "Number 3: the <mask>" in run(
        trainer, "--mode=fill_mask", "--step=4", f"--workdir={URL}", "Number 3: the <mask>."
    )
    run(trainer, "--mode=report", f"--workdir={URL}", f"--output={tmp_path / 'report.html'}")
    assert URL in (tmp_path / "report.html").read_text()
    run(trainer, "--mode=show_data", "--step=3", f"--workdir={URL}")
    before = server.read("runs/run/model/model.safetensors")
    run(trainer, "--mode=export", "--step=4", f"--workdir={URL}")
    assert json.loads(server.read("runs/run/model/trainer_state.json"))["global_step"] == 4
    assert server.read("runs/run/model/model.safetensors") != before
    run(trainer, "--mode=export", "--step=8", f"--workdir={URL}", f"--output={tmp_path / 'out'}")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert "URLs are not supported" in run(
        trainer, "--mode=export", f"--workdir={URL}", "--output=gs://bucket/model", code=2
    )

    other = run(trainer, *trainer.flags, *short, "--config.seed=7", f"--workdir={URL}", code=2)
    assert f"--workdir={URL}: holds a run with another config: seed (there 42, here 7)" in other
    run(trainer, *trainer.flags, *short, "--config.seed=7", f"--workdir={URL}", "--overwrite")
    assert json.loads(server.read("runs/run.old-1/config.json"))["config"]["seed"] == 42
    assert "runs/run.old-1/checkpoints/8/commit_success.txt" in server.names()
    assert json.loads(server.read("runs/run/config.json"))["config"]["seed"] == 7


@pytest.mark.slow
def test_refused_uploads_are_repeated_later(server, tmp_path):
    trainer = trainer_of(tmp_path, write_corpus(tmp_path, documents=3000), "--config.num_train_steps=24")
    log = tmp_path / "log"
    process = trainer.start(URL, str(log))
    refused = []

    def refuse(method, name):
        # The first ten uploads after the first save began.
        if method == "POST" and len(refused) < 10 and any(CHECKPOINTS in name for _, name in server.asked):
            refused.append(name)
            return 403
        return None

    server.refuse = refuse
    assert process.wait(300) == 0, log.read_text()[-3000:]
    assert len(refused) == 10
    assert "training continues; the next save, export or upload tries again" in log.read_text()
    server.download("runs/run", tmp_path / "run")
    logged = [line["step"] for line in read_metrics(str(tmp_path / "run" / "metrics.jsonl"))]
    assert logged == [*range(3, 25, 3)]
    assert (tmp_path / "run" / "checkpoints" / "24" / "commit_success.txt").exists()


@pytest.mark.slow
def test_of_two_runs_in_one_work_directory_the_older_one_ends(server, tmp_path):
    trainer = trainer_of(tmp_path, write_corpus(tmp_path, documents=3000), "--config.num_train_steps=36")
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    older = trainer.start(URL, str(logs[0]))
    try:
        while CHECKPOINTS + "4/commit_success.txt" not in server.names(CHECKPOINTS):
            assert older.poll() is None, logs[0].read_text()[-3000:]
            time.sleep(0.05)
        older.send_signal(signal.SIGSTOP)  # A machine that seems to be gone.
        newer = trainer.start(URL, str(logs[1]))
        while len(json.loads(server.read("runs/run/config.json"))["history"]) == 1:
            assert newer.poll() is None, logs[1].read_text()[-3000:]
            time.sleep(0.05)
        older.send_signal(signal.SIGCONT)
        assert older.wait(300) == 2, logs[0].read_text()[-3000:]
        assert newer.wait(300) == 0, logs[1].read_text()[-3000:]
    finally:
        older.kill()
    last_line = logs[0].read_text().splitlines()[-1]
    assert last_line.startswith(f"error: --workdir={URL}: the run was restarted or removed elsewhere")
    server.download("runs/run", tmp_path / "run")
    lines = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [*range(3, 37, 3)]
