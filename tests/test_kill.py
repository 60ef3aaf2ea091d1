"""Runs that are killed or stopped at any time: a resumed run is bitwise identical to an uninterrupted one."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kill_campaign import Trainer, await_phase, campaign, detect_phase, environment, run_straight
from benchmarks.same_run import differences
from mlm import parallel
from mlm.reporting.curves import read_metrics
from mlm.run.checkpoint import Checkpointer
from mlm.run.signals import EXIT_AT_ONCE, EXIT_INTERRUPTED, Interrupt, Interrupted
from mlm.run.storage import LocalStorage
from tests import fork_server
from tests.bad_server import Server, encode
from tests.tiny import sentences, write_corpus

REPO = Path(__file__).parent.parent
EVAL_STEPS = 12

CONFIG = """
from tests.tiny import tiny_config


def get_config():
    config = tiny_config({corpus!r})
    config.num_train_steps = 48
    config.logging_steps = 3
    config.eval_steps = {eval_steps}
    config.save_steps = 4
    config.model.overrides.hidden_dropout_prob = 0.1
    # Everything that has a state, or that depends on the step number.
    config.masking.mlm_probability = (0.3, 0.15)
    config.optimizer.name = "muon"
    config.optimizer.ema_decay = 0.9
    config.optimizer.schedule = "wsd"
    return config
"""


class ForkedTrainer(Trainer):
    """Starts a fork of a server instead of an interpreter."""

    def start(self, workdir: str, log: str) -> subprocess.Popen:
        command = [sys.executable, "main.py", *self.flags, f"--workdir={workdir}"]
        with open(log, "w") as file:
            return fork_server.Process(
                command, cwd=REPO, env=self.env, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )


def trainer_of(directory: Path, corpus: str, *flags: str, compiles: bool = False) -> Trainer:
    """main.py with a tiny config, written to `directory`; with `compiles`, without programs of other tests."""
    (directory / "config.py").write_text(CONFIG.format(corpus=corpus, eval_steps=EVAL_STEPS))
    env = environment(str(directory)) | {"XLA_FLAGS": fork_server.xla_flags(1)}
    if compiles:
        del env["SAVED_PROGRAMS"]
    else:
        env["JAX_COMPILATION_CACHE_DIR"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
    return ForkedTrainer((f"--config={directory / 'config.py'}", *flags), env)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    directory = tmp_path_factory.mktemp("trainer")
    return trainer_of(directory, write_corpus(directory, documents=3000), compiles=True)


@pytest.fixture(scope="module")
def straight(trainer, tmp_path_factory) -> tuple[str, float]:
    """The work directory of the uninterrupted run, and its CPU seconds to the first checkpoint."""
    workdir = str(tmp_path_factory.mktemp("straight") / "run")
    return workdir, run_straight(trainer, workdir)[1]


@pytest.mark.slow
def test_a_run_killed_at_any_time_is_identical_to_an_uninterrupted_one(trainer, straight, tmp_path):
    # In phases that occur once, in repeated phases, and at fixed times. The later fixed time is last: with a warm
    # compilation cache the run may have ended by then.
    plan = [0.2 * straight[1], "tokenizer training", "save", "evaluation", "export", 0.5 * straight[1]]
    hit = collections.Counter()
    result = campaign(
        trainer,
        str(tmp_path / "run"),
        straight[0],
        number=signal.SIGKILL,
        plan=iter(plan),
        eval_steps=EVAL_STEPS,
        rng=random.Random(0),
        hit=hit,
    )
    assert result.differences == []
    assert len(result.kills) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_is_identical_to_an_uninterrupted_one(trainer, straight, tmp_path, number):
    # `campaign` checks exit codes and last lines.
    plan = ["tokenizer training", "compilation", "evaluation", "steps"] if number == signal.SIGTERM else ["steps"]
    workdir, hit = str(tmp_path / "run"), collections.Counter()
    saved = []

    def planned():
        for phase in plan:
            yield phase
            # This runs when the killed process has ended.
            saved.append(max((int(path.name) for path in Path(workdir).glob("checkpoints/*")), default=0))

    result = campaign(
        trainer,
        workdir,
        straight[0],
        number=number,
        plan=planned(),
        eval_steps=EVAL_STEPS,
        rng=random.Random(0),
        hit=hit,
    )
    assert result.differences == []
    assert len(result.kills) == len(plan)
    assert result.replayed == 0
    for kill, step in zip(result.kills, saved, strict=True):
        assert step >= kill.step
        assert kill.phase in ("tokenizer training", "set-up") or step > 0
        assert kill.latency < 30.0


@pytest.mark.slow
def test_a_signal_stops_a_run_that_waits_for_text(tmp_path):
    server = Server(files={"/text.jsonl": encode("text.jsonl", sentences(300))})
    server.silence_seconds = 600.0
    try:
        flags = ("--config.num_train_steps=100000", "--config.save_steps=100000", "--config.data.prefetch_batches=1")
        trainer = trainer_of(tmp_path, f"{server.url}/text.jsonl", *flags)
        workdir, log = str(tmp_path / "run"), str(tmp_path / "log")
        process = trainer.start(workdir, log)
        try:
            await_phase(process, lambda: detect_phase(workdir, log, eval_steps=EVAL_STEPS), "steps")
            # The next epoch opens the file again.
            server.always["/text.jsonl"] = "hang"
            num_requests = server.count("/text.jsonl")
            while server.count("/text.jsonl") == num_requests and process.poll() is None:
                time.sleep(0.1)
            time.sleep(1.0)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == EXIT_INTERRUPTED, Path(log).read_text()[-3000:]
            assert time.monotonic() - start < 30.0
        finally:
            process.kill()
    finally:
        server.close()
    lines = Path(log).read_text().splitlines()
    assert lines[-1].endswith("; rerun the same command to resume")
    with Checkpointer(LocalStorage(workdir), keep_checkpoints=2) as checkpointer:
        saved = checkpointer.latest_step()
    # Saved after the last step that had a batch.
    assert saved >= read_metrics(f"{workdir}/metrics.jsonl")[-1]["step"]
    assert saved < 100_000


# Runs for long in C code that releases the GIL, as a compilation does: Python handles no signal until it returns.
BUSY = """
import hashlib, sys
from mlm.run.signals import Interrupt, exit_on_signal
exit_on_signal()
print("early", flush=True)
if sys.argv[1] == "early":
    sys.stdin.read()
with Interrupt() as interrupt, interrupt.deferred():
    print("entered", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", int(sys.argv[1]))
    print(interrupt.requested, flush=True)
"""


def start_busy(argument: str) -> subprocess.Popen:
    process = fork_server.Process(
        [sys.executable, "-c", BUSY, argument],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "early\n"
    if argument != "early":
        assert process.stdout.readline() == "entered\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once_whatever_the_main_thread_does(first):
    process = start_busy(str(10**9))
    try:
        process.send_signal(first)
        assert "a second signal stops at once" in process.stderr.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)  # Sooner it would count as a duplicate.
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EXIT_AT_ONCE
        assert time.monotonic() - start < 5.0
        assert process.stderr.read().startswith("second signal: stopped at once")
    finally:
        process.kill()


@pytest.mark.slow
def test_the_first_signal_waits_for_the_main_thread():
    process = start_busy(str(10**6))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "SIGINT\n")


@pytest.mark.slow
def test_a_duplicate_signal_is_ignored():
    process = start_busy(str(10**6))
    # Under `timeout` a Ctrl-C arrives twice.
    process.send_signal(signal.SIGINT)
    assert "a second signal stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "SIGINT\n", "")


def test_a_second_signal_does_not_interrupt_the_clean_up_after_the_first():
    with Interrupt() as interrupt:
        with pytest.raises(Interrupted, match="stopped by SIGINT"):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested == "SIGINT"


def test_before_training_one_signal_ends_the_process():
    process = start_busy("early")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert errors == "stopped by SIGTERM; rerun the same command to resume\n"


def test_signals_raise_only_outside_deferred_and_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Interrupt(), pytest.raises(Interrupted, match="stopped by SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
    with Interrupt() as interrupt:
        with interrupt.deferred():
            signal.raise_signal(signal.SIGINT)
            assert interrupt.requested == "SIGINT"
        with pytest.raises(Interrupted), interrupt.deferred():
            raise AssertionError("must not be entered")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_an_error_that_a_library_made_of_a_stop_is_a_stop():
    def convert() -> None:  # As native code does that calls Python.
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise TypeError("input must be an array of strings") from None

    with pytest.raises(Interrupted, match="stopped by SIGTERM"), Interrupt():
        convert()

    def stop_and_fail() -> None:
        with Interrupt() as interrupt, interrupt.deferred():
            signal.raise_signal(signal.SIGTERM)
            raise TypeError("the checkpoint cannot be written")

    # An error of the last save is not hidden.
    with pytest.raises(TypeError, match="cannot be written"):
        stop_and_fail()


@pytest.mark.parametrize(("is_interrupted", "code"), [(True, EXIT_AT_ONCE), (False, 1)])
def test_an_error_that_a_library_made_of_ctrl_c_ends_a_mode_without_a_traceback(is_interrupted, code):
    program = f"""
import signal
from mlm import command_line

def convert():
    try:
        if {is_interrupted}:
            signal.raise_signal(signal.SIGINT)
    finally:
        raise TypeError("input must be an array of strings")

command_line.run(convert)
"""
    done = fork_server.run([sys.executable, "-c", program], cwd=REPO)
    assert done.returncode == code
    assert ("TypeError" in done.stderr) is not is_interrupted


def make_run(run: Path, *, weight: float = 1.0, row: int = 5, loss: float = 2.0, seconds: float = 1.0) -> None:
    """Writes what `differences` compares."""
    for name in ("model", "tokenizer", "checkpoints"):
        (run / name).mkdir(parents=True)
        (run / name / "file").write_text(name)
    (run / "checkpoints" / "file").unlink()
    (run / "model" / "curves.png").write_text(str(seconds))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "train/loss": loss, "perf/step_ms": seconds}) + "\n")
    state = parallel.to_global(parallel.replicate({"weight": np.full(3, weight, np.float32)}))
    loop = {"counts_V": [1], "tokens_seen": 2, "skipped_steps": 0, "evaluated": True, "seconds": seconds}
    loop["interval"] = {"loss": loss, "seconds": seconds, "pause_seconds": {"save": seconds}}
    with Checkpointer(LocalStorage(str(run)), keep_checkpoints=1) as checkpointer:
        checkpointer.save(4, state=state, loop=loop, stream={"row": row})


def test_differences_are_found_and_timings_are_ignored(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seconds=7.0)
    assert differences(str(tmp_path / "a"), str(tmp_path / "b")) == []
    make_run(tmp_path / "c", weight=np.nextafter(np.float32(1.0), np.float32(2.0)), row=6, loss=3.0)
    (tmp_path / "c" / "model" / "file").write_text("nodel")
    (tmp_path / "c" / "model.old").mkdir()
    (tmp_path / "c" / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    assert sorted(differences(str(tmp_path / "a"), str(tmp_path / "c"))) == [
        "checkpoint 4: ['weight']",
        "checkpoint 4: loop",
        "checkpoint 4: stream",
        "checkpoints/5.orbax-checkpoint-tmp is left over",
        "metrics.jsonl, steps [4]",
        "model.old is left over",
        "model/file",
    ]
