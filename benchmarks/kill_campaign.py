"""Is a run that is killed many times identical to an uninterrupted one?

    python benchmarks/kill_campaign.py                               # SIGKILL, at least 20 times; 10 to 20 minutes
    python benchmarks/kill_campaign.py --signal=TERM --kills=8       # SIGTERM: exit code 75, and time to exit

A small run is made without interruption. Then the same command runs in another directory, is killed at random times and
restarted until the run is finished; with fewer than `--kills` kills by then, in yet another directory. The results are
compared: parameters, optimizer and stream state of the last checkpoint bit for bit, metrics.jsonl without perf/*, the
exported model and the tokenizer byte for byte. Nothing partially written may be left over.

The times of kills are drawn in three ways, in turn: soon after a start; between 0.3 and 1.3 times what a start needs to
its first checkpoint; and, for short phases, right after the start of the phase that was hit the least so far. They are
CPU seconds of the process to be killed, so other load on the machine does not matter. The process is stopped (SIGSTOP)
while its phase is determined.

The text is the docstrings of the installed packages. The runs share a compilation cache, as they do by default.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks.same_run import differences
from mlm.reporting.curves import read_metrics
from mlm.run.signals import EXIT_INTERRUPTED

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# In order; a run goes through those from steps to export many times.
PHASES = ("imports", "tokenizer training", "set-up", "compilation", "steps", "evaluation", "save", "export", "end")
# Seconds within which a child must end, or reach a phase.
TIMEOUT = 600
RESUMED = re.compile(r"resuming after step (\d+)")


@dataclasses.dataclass(frozen=True)
class Kill:
    """A killed process.

    Attributes:
      seconds: wall time since its start.
      phase: one of PHASES.
      step: its last logged step.
      latency: seconds from the signal to its end.
    """

    seconds: float
    phase: str
    step: int
    latency: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one work directory.

    Attributes:
      kills: in order.
      seconds: wall time of all starts together.
      replayed: steps made more than once, as far as they were logged.
      differences: from the uninterrupted run.
    """

    kills: list[Kill]
    seconds: float
    replayed: int
    differences: list[str]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The command that is started: flags of main.py without --workdir, and environment variables."""

    flags: tuple[str, ...]
    env: dict[str, str]

    def start(self, workdir: str, log: str) -> subprocess.Popen:
        """Starts the process; its stdout and stderr replace the file `log`."""
        with open(log, "w") as file:
            return subprocess.Popen(
                [sys.executable, "main.py", *self.flags, f"--workdir={workdir}"],
                cwd=REPO,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )


def read_log(log: str) -> str:
    """Returns the text of a log file, which may end within a character."""
    with open(log, encoding="utf-8", errors="replace") as file:
        return file.read()


def detect_phase(workdir: str, log: str, *, eval_steps: int) -> tuple[str, int]:
    """Returns the phase of a process, judged by its files and its log, and the last step in the log.

    `eval_steps` must be a multiple of the run's logging_steps.
    """
    lines = read_log(log).splitlines()
    steps = [int(match[1]) for line in lines if (match := re.search(r"step +(\d+) of \d+   loss", line))]
    resumed = [int(match[1]) for line in lines if (match := RESUMED.search(line))]
    step = (steps or resumed or [0])[-1]
    checkpoints = os.path.join(workdir, "checkpoints")
    # A directory with this name may also be left over from an earlier start.
    if any("evaluation: " in line for line in lines) and os.path.isdir(os.path.join(workdir, "model.tmp")):
        return "export", step
    # Directories left over from an earlier start are removed before the first step.
    if steps and any(".orbax-checkpoint-tmp" in name for name in os.listdir(checkpoints)):
        return "save", step
    if not lines:
        return "imports", step
    if any("five best predictions" in line for line in lines):
        return "end", step
    if not steps:
        if any("each step: " in line for line in lines):
            return "compilation", step
        return ("tokenizer training" if "training a" in lines[-1] else "set-up"), step
    if step % eval_steps == 0 and not any(re.search(rf"step +{step} of \d+   evaluation", line) for line in lines):
        return "evaluation", step
    return "steps", step


def kill(
    process: subprocess.Popen, number: int, current_phase: Callable[[], tuple[str, int]], log: str, start: float
) -> Kill | None:
    """Signals a process and waits for its end; returns None if it had ended by itself. `log` is its log file."""
    seconds = time.monotonic() - start
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGSTOP)
    phase, step = current_phase()
    process.send_signal(number)
    before = time.monotonic()
    process.send_signal(signal.SIGCONT)
    code = process.wait(TIMEOUT)
    latency = time.monotonic() - before
    if code == 0:
        return None  # It was already exiting.
    expected = -number if number == signal.SIGKILL else EXIT_INTERRUPTED
    if code != expected:
        end = read_log(log)[-3000:]
        raise AssertionError(f"exit code {code}, not {expected}, after a signal in phase {phase}, step {step}:\n{end}")
    return Kill(seconds, phase, step, latency)


def kill_times(rng: random.Random, hit: collections.Counter, *, to_checkpoint: float) -> Iterator[float | str]:
    """Yields for each start when to kill it: after so many CPU seconds, or in a phase."""
    while True:
        yield from (rng.uniform(0.05, 0.3) * to_checkpoint for _ in range(2))
        yield rng.uniform(0.3, 1.0) * to_checkpoint
        # The tokenizer is trained once per run.
        if not hit["tokenizer training"]:
            yield "tokenizer training"
        for _ in range(2):
            yield min(("evaluation", "save", "export"), key=lambda phase: hit[phase] + 0.1 * rng.random())
        yield rng.uniform(0.8, 1.3) * to_checkpoint


def campaign(
    trainer: Trainer,
    workdir: str,
    straight: str,
    *,
    number: int,
    plan: Iterator[float | str],
    eval_steps: int,
    rng: random.Random,
    hit: collections.Counter,
) -> Result:
    """Makes a run in `workdir`, with signals as planned, and compares it with the run in `straight`.

    Args:
      trainer: the command.
      workdir: a new work directory.
      straight: the work directory of the uninterrupted run.
      number: the signal.
      plan: when to send it, for each start: CPU seconds or a phase; after its end the run is not interrupted.
      eval_steps: the run's eval_steps.
      rng: draws the times after the start of a phase.
      hit: number of kills by phase; is updated.
    """
    log = workdir + ".log"
    done: list[Kill] = []
    replayed, began = 0, time.monotonic()

    def current_phase() -> tuple[str, int]:
        return detect_phase(workdir, log, eval_steps=eval_steps)

    while True:
        start = time.monotonic()
        process = trainer.start(workdir, log)
        killed = None
        try:
            if (when := next(plan, None)) is not None:
                if isinstance(when, str):
                    await_phase(process, current_phase, when)
                    when = cpu_seconds(process) + rng.uniform(0.0, 0.05 if when in ("save", "evaluation") else 0.2)
                while process.poll() is None and cpu_seconds(process) < when:
                    time.sleep(0.005)
                killed = kill(process, number, current_phase, log, start)
            code = process.wait(TIMEOUT)
        finally:
            process.kill()
        text = read_log(log)
        if (match := RESUMED.search(text)) and done:
            replayed += max(0, done[-1].step - int(match[1]))
        if killed is None:
            if code != 0:
                raise AssertionError(f"exit code {code} by itself:\n{text[-3000:]}")
            break
        if number != signal.SIGKILL and text.count("rerun the same command to resume") != 1:
            raise AssertionError(f"the last line is not the message of a stopped run:\n{text[-3000:]}")
        done.append(killed)
        hit[killed.phase] += 1
        print(f"  {len(done):3d}  after {killed.seconds:5.1f} s, step {killed.step:4d}: {killed.phase}", flush=True)
    return Result(done, time.monotonic() - began, replayed, differences(straight, workdir))


def cpu_seconds(process: subprocess.Popen) -> float:
    """Returns the CPU seconds of a process so far."""
    with open(f"/proc/{process.pid}/stat") as file:
        # The fields follow the process's name, which is in parentheses and may have spaces in it.
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def await_phase(process: subprocess.Popen, current_phase: Callable[[], tuple[str, int]], wanted: str) -> None:
    """Waits for a phase or the end of the process; a phase that occurs once may be over before it is seen."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        phase, _ = current_phase()
        if phase == wanted or (PHASES.index(wanted) < PHASES.index("steps") <= PHASES.index(phase)):
            return
        time.sleep(0.005)


def write_corpus(folder: str, *, megabytes: float) -> str:
    """Writes the first docstrings to three JSON-lines files; returns their glob."""
    from mlm.data.sources.source import open_source

    source = open_source(dataset_name="docstrings")
    texts, size = [], 0
    for shard in range(source.num_shards):
        for column in source.read(shard):
            texts += [text for text in column.to_pylist() if text]
            size += column.nbytes
        if size > megabytes * 1e6:
            break
    os.makedirs(folder)
    for part in range(3):
        with open(os.path.join(folder, f"part-{part}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[part::3])
    return os.path.join(folder, "part-*.jsonl")


# A small run. The steps between two lines of metrics span a checkpoint, and dropout draws random numbers.
EVAL_STEPS = 60
FLAGS = (
    "--config=configs/quickstart.py",
    "--config.num_train_steps=300",
    "--config.logging_steps=6",
    f"--config.eval_steps={EVAL_STEPS}",
    "--config.save_steps=20",
    "--config.per_device_train_batch_size=16",
    "--config.data.num_eval_samples=512",
    "--config.tokenizer.train_documents=4000",
    "--config.model.overrides.hidden_dropout_prob=0.1",
    "--config.optimizer.schedule=cosine",
    '--config.report.sentences=("A <mask> of numbers.",)',
)


def environment(folder: str) -> dict[str, str]:
    """Returns the environment of the trainer: one device, and caches in `folder`."""
    cache = os.path.join(folder, "cache")
    own = {"XDG_CACHE_HOME": cache, "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, "jax")}
    return {**os.environ, **own, "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"}


def run_straight(trainer: Trainer, workdir: str) -> tuple[float, float]:
    """Runs without interruption; returns its wall time, and its CPU seconds to the first checkpoint."""
    log, start, to_checkpoint = workdir + ".log", time.monotonic(), None
    os.makedirs(os.path.dirname(workdir), exist_ok=True)
    process = trainer.start(workdir, log)
    try:
        checkpoints = os.path.join(workdir, "checkpoints")
        while process.poll() is None:
            names = os.listdir(checkpoints) if os.path.isdir(checkpoints) else ()
            if to_checkpoint is None and any(name.isdecimal() for name in names):
                to_checkpoint = cpu_seconds(process)
            time.sleep(0.02)
    finally:
        process.kill()
    if process.returncode != 0:
        raise AssertionError(f"exit code {process.returncode}:\n{read_log(log)[-3000:]}")
    return time.monotonic() - start, to_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--kills", type=int, default=22, help="number of kills, at least")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of kills")
    parser.add_argument("--folder", help="folder of the work directories; by default a temporary one, which is removed")
    arguments = parser.parse_args()
    number = signal.Signals[f"SIG{arguments.signal}"]
    rng, hit = random.Random(arguments.seed), collections.Counter()

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        files = write_corpus(os.path.join(folder, "corpus"), megabytes=3.0)
        trainer = Trainer((*FLAGS, f"--config.data.data_files={files}"), environment(folder))
        # All directories have the same name, which is in the model card. The first run fills the compilation cache.
        run_straight(trainer, os.path.join(folder, "first", "run"))
        straight = os.path.join(folder, "straight", "run")
        straight_seconds, to_checkpoint = run_straight(trainer, straight)
        found = differences(os.path.join(folder, "first", "run"), straight)
        print(f"uninterrupted: {straight_seconds:.0f} s, {to_checkpoint:.0f} CPU s to a checkpoint", flush=True)
        print(f"two uninterrupted runs differ in: {', '.join(found) or 'nothing'}", flush=True)

        results: list[Result] = []
        while (left := arguments.kills - sum(hit.values())) > 0:
            workdir = os.path.join(folder, f"killed-{len(results)}", "run")
            os.makedirs(os.path.dirname(workdir))
            results.append(
                campaign(
                    trainer,
                    workdir,
                    straight,
                    number=number,
                    plan=itertools.islice(kill_times(rng, hit, to_checkpoint=to_checkpoint), left),
                    eval_steps=EVAL_STEPS,
                    rng=rng,
                    hit=hit,
                )
            )
        report(
            results, hit, straight_seconds=straight_seconds, lines=read_metrics(os.path.join(straight, "metrics.jsonl"))
        )
    if any(result.differences for result in results) or found:
        sys.exit(1)


def report(
    results: list[Result], hit: collections.Counter, *, straight_seconds: float, lines: list[dict[str, Any]]
) -> None:
    """Prints the results; `lines` are the metrics of the uninterrupted run."""
    kills = [kill for result in results for kill in result.kills]
    found = [difference for result in results for difference in result.differences]
    seconds = sum(result.seconds for result in results)
    print(f"\nkills               {len(kills)}: " + ", ".join(f"{hit[name]} {name}" for name in PHASES if hit[name]))
    print(f"restarts            {len(kills)} in {len(results)} finished runs")
    print(f"repeated steps      {sum(result.replayed for result in results)}, of {lines[-1]['step']} a run")
    print(f"differences         {len(found)}" + "".join(f"\n    {difference}" for difference in found))
    print(f"wall time           {seconds / len(results) / straight_seconds:.1f} times that of the uninterrupted run")
    step = np.median([line["perf/step_ms"] for line in lines if "perf/step_ms" in line]) / 1e3
    save = np.median([line["perf/save_ms"] for line in lines if "perf/save_ms" in line]) / 1e3
    print(f"a step              {step:.3f} s; a save pauses training for {save:.3f} s")
    for name in PHASES:
        if gone := [kill.latency for kill in kills if kill.phase == name]:
            print(f"signal to exit      {name}: median {np.median(gone):.2f} s, at most {max(gone):.2f} s")


if __name__ == "__main__":
    main()
