"""Runs of two real processes: the steps of one process, saved and stopped together."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.same_run import differences
from mlm import parallel, steps, train
from mlm.masking import MaskingSpec
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.optimizer import create_optimizer
from mlm.reporting.curves import read_metrics
from mlm.run.checkpoint import Checkpointer, DiskFullError
from mlm.run.signals import EXIT_INTERRUPTED
from mlm.run.storage import LocalStorage
from mlm.schedules import create_schedule
from tests import fork_server
from tests.bad_server import Server, encode
from tests.gcs_server import GcsServer
from tests.test_during_training import metrics_of_a_tiny_model
from tests.tiny import optimizer_settings, sentences, write_corpus

REPO = Path(__file__).parent.parent
CONFIG = """
from tests.tiny import tiny_config


def get_config():
    config = tiny_config({corpus!r})
    config.num_train_steps = 100_000
    config.logging_steps = 1
    config.eval_steps = 10
    config.data.num_eval_samples = 8
    config.model.overrides.num_hidden_layers = 1
    config.model.overrides.hidden_dropout_prob = 0.0
    config.model.overrides.attention_probs_dropout_prob = 0.0
    return config
"""

STAGED_CONFIG = """
from tests.tiny import staged_config


def get_config():
    config = staged_config(*{corpora!r})
    # Long enough to be stopped in its last stage.
    config.num_train_steps = 30
    config.stages = (*config.stages[:2], {{**config.stages[2], "steps": 21}})
    config.logging_steps = 1
    config.save_steps = 4
    config.data.num_eval_samples = 8
    return config
"""

# One of two processes; the test itself is the reference, alone on four devices.
TRAIN_ONE_OF_TWO = """
import json, sys
from mlm.run import multihost
port, index, directory, out = sys.argv[1:]
multihost.start(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
from tests.test_multihost import train_save_and_restore
found = train_save_and_restore(directory)
open(out, "w").write(json.dumps(found))
"""


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(directory: Path) -> dict[str, str]:
    """Two devices per process."""
    return {
        **os.environ,
        "XLA_FLAGS": fork_server.xla_flags(2),
        "XDG_CACHE_HOME": str(directory / "cache"),
        "PYTHONPATH": str(REPO),
    }


class Pair:
    """Two processes of one run, and their logs."""

    def __init__(self, commands: list[list[str]], directory: Path):
        self._logs = [directory / f"log-{i}.txt" for i in range(2)]
        self.processes = []
        for command, log in zip(commands, self._logs, strict=True):
            with open(log, "w") as file:
                options = {"cwd": REPO, "env": environment(directory), "stdout": file, "stderr": file}
                self.processes.append(fork_server.Process([sys.executable, *command], **options))

    def log(self, index: int) -> str:
        return self._logs[index].read_text(errors="replace")

    def await_line(self, index: int, text: str) -> None:
        """Waits until a process has logged something."""
        deadline = time.monotonic() + 300
        while text not in self.log(index):
            assert all(process.poll() is None for process in self.processes), self.log(0) + self.log(1)
            assert time.monotonic() < deadline, self.log(index)
            time.sleep(0.05)

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Exit codes."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]

    def end_times(self, seconds: float) -> list[float]:
        """Waits; returns the time at which each ended."""
        deadline, ended = time.monotonic() + seconds, {}
        while len(ended) < len(self.processes):
            for index, process in enumerate(self.processes):
                if index not in ended and process.poll() is not None:
                    ended[index] = time.monotonic()
            assert time.monotonic() < deadline, self.log(0) + self.log(1)
            time.sleep(0.05)
        return [ended[index] for index in range(len(self.processes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def pair(directory: Path, *flags: str, workdir: str, programs: tuple[list[str], ...] = (["main.py"], ["main.py"])):
    """Two processes of main.py; `programs` are the words before their flags."""
    port = free_port()
    commands = [
        [
            *program,
            f"--config={directory / 'config.py'}",
            f"--workdir={workdir}",
            "--multihost",
            f"--coordinator_address=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
            *flags,
        ]
        for i, program in enumerate(programs)
    ]
    started = Pair(commands, directory)
    try:
        yield started
    finally:
        started.kill()


def write_config(directory: Path, corpus: str) -> None:
    (directory / "config.py").write_text(CONFIG.format(corpus=corpus))


def step_config() -> steps.StepConfig:
    """An encoder of one layer without dropout."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 1, "vocab_size": 50}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = EncoderConfig(**options, **sizes, max_position_embeddings=18, pad_token_id=1)
    # Muon, whose work the devices of both processes share.
    optimizer = optimizer_settings(name="muon", adam_learning_rate=0.01, adam_epsilon=1e-3, weight_decay=0.01)
    schedule = create_schedule(optimizer, num_train_steps=100)
    return steps.StepConfig(
        model=MaskedLM(encoder),
        masking=MaskingSpec(
            mlm_probability=0.3,
            mask_replace_prob=0.8,
            random_replace_prob=0.1,
            mask_id=4,
            special_ids=(0, 1, 2, 3, 4),
            num_ids=50,
        ),
        optimizer=create_optimizer(optimizer, schedule, axis_name=parallel.AXIS),
        schedule=schedule,
        seed=7,
        ema_decay=0.9,
    )


def train_save_and_restore(directory: str) -> dict[str, list]:
    """Three steps on this process's part of eight fixed rows; a save while one process has no disk space; a save; two
    more steps from the restored state; probes of another model."""
    config, storage = step_config(), LocalStorage(directory)
    storage.create()
    rows = np.random.default_rng(0).integers(5, 50, (8, 16)).astype(np.int32)
    rows[3, 4:] = rows[6, 1:] = 1
    local_rows = np.split(rows, jax.process_count())[jax.process_index()]
    step = parallel.data_parallel(
        lambda state, tokens: steps.train_step(state, tokens, step_config=config, axis_name=parallel.AXIS)
    )
    init = steps.init_state(config, jax.jit(lambda: steps.init_params(config, length=16))())
    found = {"losses": [], "norms": [], "refused": []}

    def take_step(state):
        state, metrics = step(state, parallel.shard(local_rows, shape=(1,)))
        metrics = parallel.first_replica(metrics)
        found["losses"].append(float(metrics.sums.loss / metrics.sums.count))
        found["norms"].append(float(metrics.grad_norm))
        return state

    state = parallel.replicate(init)
    for _ in range(3):
        state = take_step(state)
    with Checkpointer(storage, keep_checkpoints=1) as checkpointer:
        saved = parallel.to_global(state)
        real = shutil.disk_usage
        if jax.process_index() == jax.process_count() - 1:
            shutil.disk_usage = lambda path: types.SimpleNamespace(free=3)
        try:
            train._prepare_save(checkpointer, saved)
        except DiskFullError as error:
            found["refused"].append(str(error))
        finally:
            shutil.disk_usage = real
        train._prepare_save(checkpointer, saved)
        checkpointer.save(3, state=saved, loop={}, stream={"process": jax.process_index()})
        checkpointer.wait()
        restored = checkpointer.restore(3, like=parallel.global_like(jax.eval_shape(lambda: init)))
    found["streams"] = restored.streams
    found["tasks"] = metrics_of_a_tiny_model()
    state = parallel.from_global(restored.state)
    for _ in range(2):
        state = take_step(state)
    return found


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one_and_save_together_or_not_at_all(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    port, outs = free_port(), [tmp_path / f"{i}.json" for i in range(2)]
    both = Pair(
        [["-c", TRAIN_ONE_OF_TWO, port, str(i), str(tmp_path / "two"), str(outs[i])] for i in range(2)], tmp_path
    )
    try:
        wanted = train_save_and_restore(str(tmp_path / "one"))
        assert both.wait() == [0, 0], both.log(0) + both.log(1)
    finally:
        both.kill()
    found = [json.loads(out.read_text()) for out in outs]
    for own in found:
        np.testing.assert_allclose(own["losses"], wanted["losses"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(own["norms"], wanted["norms"], rtol=1e-5)
        assert own["streams"] == [{"process": 0}, {"process": 1}]
        assert own["tasks"] == wanted["tasks"]
    assert found[0]["losses"] == found[1]["losses"]
    assert len(set(wanted["losses"])) == 5
    assert found[0]["refused"] == ["a checkpoint could not be written by another process"]
    assert "MB free" in found[1]["refused"][0]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, str]:
    """The folder with a config of three stages, and the work directory of an uninterrupted run of two processes."""
    directory = tmp_path_factory.mktemp("straight")
    (directory / "other").mkdir()
    corpora = write_corpus(directory, documents=2000), write_corpus(directory / "other")
    (directory / "config.py").write_text(STAGED_CONFIG.format(corpora=corpora))
    workdir = str(directory / "straight" / "run")
    with pair(directory, workdir=workdir) as both:
        assert both.wait() == [0, 0], both.log(0) + both.log(1)
    return directory, workdir


def killed_at(function: str, step: int) -> list[str]:
    return ["tests/killed.py", function, str(step)]


@pytest.mark.slow
def test_two_processes_killed_stopped_and_resumed_end_as_an_uninterrupted_run(straight):
    """Killed in the first two stages and at both boundaries, stopped in the last stage."""
    directory, straight = straight
    broken = str(directory / "broken" / "run")
    # Files of the run are written once.
    assert len(list(Path(straight).glob("events.out.tfevents.*.v2"))) == 1
    assert sorted(path.name for path in Path(straight).iterdir() if not path.name.startswith(("events", "."))) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model",
        "tokenizer",
    ]
    assert sorted(path.name for path in Path(straight, "checkpoints", "30", "stream").glob("*.json")) == [
        "process_0-of-2.json",
        "process_1-of-2.json",
    ]
    for killed, step, boundary in ((1, 3, 5), (0, 8, 9)):
        programs = [["main.py"], ["main.py"]]
        programs[killed] = killed_at("add_step", step)
        with pair(directory, workdir=broken, programs=tuple(programs)) as both:
            first_end, last_end = sorted(both.end_times(240.0))
            assert last_end - first_end < 60.0
            codes = both.wait()
            assert codes[killed] == -signal.SIGKILL, both.log(killed)
            assert codes[1 - killed] not in (0, EXIT_INTERRUPTED)
            last = "\n".join(both.log(1 - killed).splitlines()[-30:])
            assert re.search("heartbeat|unhealthy|JAX distributed service|failed first|Gloo", last), last
        with pair(directory, workdir=broken, programs=(killed_at("save", boundary),) * 2) as both:
            assert -signal.SIGKILL in both.wait(120.0), both.log(0) + both.log(1)
    with pair(directory, workdir=broken) as both:
        both.await_line(0, "resuming after step ")
        both.await_line(0, "step 17 of 30")
        both.processes[1].send_signal(signal.SIGTERM)
        assert both.wait(60.0) == [EXIT_INTERRUPTED] * 2, both.log(0) + both.log(1)
        lines = [both.log(i).splitlines()[-1] for i in range(2)]
        assert lines[0] == lines[1]
        assert lines[0].endswith("which is saved; rerun the same command to resume")
        step = int(lines[0].split("after step ")[1].split(",")[0])
        assert os.path.isdir(f"{broken}/checkpoints/{step}")
    with pair(directory, workdir=broken) as both:
        assert both.wait() == [0, 0], both.log(0) + both.log(1)
        assert f"resuming after step {step}" in both.log(0)
    assert differences(straight, broken) == []
    assert [line["step"] for line in read_metrics(f"{broken}/metrics.jsonl")] == list(range(1, 31))


@pytest.mark.slow
def test_two_processes_use_one_bucket(straight, tmp_path, monkeypatch):
    directory, straight = straight
    url = "gs://bucket/runs/run"
    with contextlib.closing(GcsServer()) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        with pair(directory, workdir=url) as both:
            both.await_line(0, "step 12 of 30")
            both.kill()
        # The other machines have no mirrors.
        shutil.rmtree(directory / "cache" / "mlm" / "workdirs")
        with pair(directory, workdir=url) as both:
            assert both.wait() == [0, 0], both.log(0) + both.log(1)
            assert "resuming after step" in both.log(0)
        server.download("runs/run", tmp_path / "run")
    assert differences(straight, str(tmp_path / "run")) == []
    assert [line["step"] for line in read_metrics(str(tmp_path / "run" / "metrics.jsonl"))] == list(range(1, 31))


@pytest.mark.slow
def test_a_failing_text_source_of_one_process_ends_both_with_the_cause(tmp_path):
    server = Server(files={f"/part-{i}.jsonl": encode("x.jsonl", sentences(400, seed=i)) for i in range(2)})
    try:
        write_config(tmp_path, [f"{server.url}/part-{i}.jsonl" for i in range(2)])
        flags = ("--config.data.network_deadline_seconds=0.0", "--config.data.max_failed_shards=0")
        flags += ("--config.save_steps=100000", "--config.eval_steps=100000")
        with pair(tmp_path, *flags, workdir=str(tmp_path / "run")) as both:
            both.await_line(0, "step  ")
            server.always["/part-1.jsonl"] = 500
            # Batches read ahead are trained on first, which on a busy machine takes up to a minute.
            first_end, last_end = sorted(both.end_times(240.0))
            assert last_end - first_end < 60.0
            codes = both.wait()
            assert sorted(codes) == [1, 2], both.log(0) + both.log(1)
            first = codes.index(2)
            cause = both.log(first).splitlines()[-1]
            assert cause.startswith("error: ")
            assert "part-1.jsonl" in cause
            message = both.log(1 - first).splitlines()[-1]
            assert message == f"error: process {first} failed first: {cause.removeprefix('error: ')}"
    finally:
        server.close()


@pytest.mark.slow
def test_a_hanging_process_ends_the_run(tmp_path):
    write_config(tmp_path, write_corpus(tmp_path))
    with pair(tmp_path, workdir=str(tmp_path / "run")) as both:
        both.await_line(0, " of 100000   loss")
        both.processes[1].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert both.processes[0].wait(60.0) not in (0, EXIT_INTERRUPTED)
        assert time.monotonic() - start < 60.0
        assert "heartbeat" in "\n".join(both.log(0).splitlines()[-30:])
        both.processes[1].send_signal(signal.SIGCONT)
        assert both.processes[1].wait(60.0) not in (0, EXIT_INTERRUPTED)


# Every process caches what it compiles, so that a second start compiles nothing.
COMPILE = """
import sys
import jax
from mlm import parallel
from mlm.run import multihost
port, index, cache = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
multihost.start(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
assert parallel.any_process(index == "1")
assert jax.process_index() == int(index)
"""


@pytest.mark.slow
def test_every_process_caches_compiled_programs(tmp_path):
    port, caches = free_port(), [tmp_path / f"cache-{i}" for i in range(2)]
    both = Pair([["-c", COMPILE, port, str(i), str(caches[i])] for i in range(2)], tmp_path)
    try:
        assert both.wait() == [0, 0], both.log(0) + both.log(1)
    finally:
        both.kill()
    assert all(list(cache.glob("jit__fun-*")) for cache in caches)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_ends_a_process_that_waits_for_the_others(index):
    code = f"""
from absl import logging
from mlm.run import multihost, signals
signals.exit_on_signal()
logging.use_absl_handler()
logging.set_verbosity("info")
multihost.start(coordinator_address="127.0.0.1:{free_port()}", num_processes=2, process_id={index})
"""
    process = fork_server.Process([sys.executable, "-c", code], cwd=REPO, stderr=subprocess.PIPE, text=True)
    lines = []
    while not lines or "waiting for the other processes at 127.0.0.1:" not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    time.sleep(1)  # From logging the line to waiting.
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == EXIT_INTERRUPTED
    assert "stopped by SIGTERM while waiting for the other processes" in process.stderr.read()
