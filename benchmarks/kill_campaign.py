"""Is a run that is killed again and again the run that would have been?

    python benchmarks/kill_campaign.py                               # SIGKILL, at least 20 times; 10 to 20 minutes
    python benchmarks/kill_campaign.py --signal=TERM --kills=8       # SIGTERM: exit code 75, and how long that takes

One small run goes through undisturbed. Then the same command runs in another directory and is killed at random times,
and started again, until it comes to its end; if that is before `--kills`, in yet another directory. What both leave is
compared: parameters, optimizer and stream state of the last checkpoint bit for bit, metrics.jsonl but for perf/*, the
exported model and the tokenizer byte for byte, and that nothing half-written is left.

Times of kills are drawn in three ways, in turn: several soon after their starts; between 0.3 and 1.3 times what a start
takes to its first checkpoint; and, for what is short, within a moment of the beginning of a phase that was hit the
least so far. All are processor seconds of the process that is to be killed: what else the machine does, does not count.
It is stopped (SIGSTOP) before it is looked at which phase it is in.

The text is the docstrings of the installed packages; the compilation cache is shared, as it is by default.
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
# Of a start, in order; the middle ones come again and again.
PHASES = ("imports", "tokenizer training", "set-up", "compilation", "steps", "evaluation", "save", "export", "end")
# Seconds after which a child that does not end, or does not come to a phase, is a failure of its own.
TIMEOUT = 600


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was killed when: seconds after its start, its phase, its last logged update, seconds until it was gone."""

    seconds: float
    phase: str
    step: int
    latency: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one directory.

    Attributes:
      kills: in order.
      seconds: of wall time, all starts together.
      replayed: updates made more than once, as far as the log tells.
      differences: from the undisturbed run, in words; empty if there are none.
    """

    kills: list[Kill]
    seconds: float
    replayed: int
    differences: list[str]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A command to start again and again: flags of main.py but for --workdir, and the environment."""

    flags: tuple[str, ...]
    env: dict[str, str]

    def start(self, workdir: str, log: str) -> subprocess.Popen:
        """Starts it; stdout and stderr go to the file `log`, anew."""
        with open(log, "w") as file:
            return subprocess.Popen(
                [sys.executable, "main.py", *self.flags, f"--workdir={workdir}"],
                cwd=REPO,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )


def phase_of(workdir: str, log: str, *, eval_steps: int) -> tuple[str, int]:
    """The phase in which a process is, as its files and its log tell, and the last update in the log.

    `eval_steps` must be a multiple of the run's logging_steps.
    """
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines()
    steps = [int(match[1]) for line in lines if (match := re.search(r"step +(\d+) of \d+   loss", line))]
    going_on = [int(match[1]) for line in lines if (match := re.search(r"going on after update (\d+)", line))]
    step = (steps or going_on or [0])[-1]
    checkpoints = os.path.join(workdir, "checkpoints")
    # A start before this one may have left such a directory.
    if any("evaluation: " in line for line in lines) and os.path.isdir(os.path.join(workdir, "model.tmp")):
        return "export", step
    # Those that a start has left are removed before the first update.
    if steps and any(".orbax-checkpoint-tmp" in name for name in os.listdir(checkpoints)):
        return "save", step
    if not lines:
        return "imports", step
    if any("five best fillings" in line for line in lines):
        return "end", step
    if not steps:
        if any("an update: " in line for line in lines):
            return "compilation", step
        return ("tokenizer training" if "training a" in lines[-1] else "set-up"), step
    if step % eval_steps == 0 and not any(re.search(rf"step +{step} of \d+   evaluation", line) for line in lines):
        return "evaluation", step
    return "steps", step


def kill(process: subprocess.Popen, number: int, looked_at: Callable[[], tuple[str, int]], start: float) -> Kill | None:
    """Signals a process and waits for its end; None if it had ended by itself."""
    seconds = time.monotonic() - start
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGSTOP)
    phase, step = looked_at()
    process.send_signal(number)
    before = time.monotonic()
    process.send_signal(signal.SIGCONT)
    code = process.wait(TIMEOUT)
    latency = time.monotonic() - before
    if code == 0:
        return None  # It had nothing left to do but to go.
    expected = -number if number == signal.SIGKILL else EXIT_INTERRUPTED
    if code != expected:
        raise AssertionError(f"exit code {code}, not {expected}, after a signal in phase {phase}, update {step}")
    return Kill(seconds, phase, step, latency)


def plan_of(rng: random.Random, hit: collections.Counter, *, to_checkpoint: float) -> Iterator[float | str]:
    """When to kill, start by start: processor seconds after it, or a phase in which to."""
    while True:
        yield from (rng.uniform(0.05, 0.3) * to_checkpoint for _ in range(2))
        yield rng.uniform(0.3, 1.0) * to_checkpoint
        # There is but one training of a tokenizer that comes to its end.
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
    """Runs to the end in `workdir`, signalled as planned, and compares with the run in `straight`.

    Args:
      trainer: the command.
      workdir: where it has not run yet.
      straight: where it came to its end undisturbed.
      number: of the signal.
      plan: for each start processor seconds, or a phase; when it is at its end nothing disturbs the run.
      eval_steps: of the run.
      rng: for the moments after the beginning of a phase.
      hit: kills by phase, added to.
    """
    log = workdir + ".log"
    done: list[Kill] = []
    replayed, began = 0, time.monotonic()

    def looked_at() -> tuple[str, int]:
        return phase_of(workdir, log, eval_steps=eval_steps)

    while True:
        start = time.monotonic()
        process = trainer.start(workdir, log)
        killed = None
        try:
            if (when := next(plan, None)) is not None:
                if isinstance(when, str):
                    await_phase(process, looked_at, when)
                    when = used(process) + rng.uniform(0.0, 0.05 if when in ("save", "evaluation") else 0.2)
                while process.poll() is None and used(process) < when:
                    time.sleep(0.005)
                killed = kill(process, number, looked_at, start)
            code = process.wait(TIMEOUT)
        finally:
            process.kill()
        with open(log, encoding="utf-8", errors="replace") as file:
            text = file.read()
        if (match := re.search(r"going on after update (\d+)", text)) and done:
            replayed += max(0, done[-1].step - int(match[1]))
        if killed is None:
            if code != 0:
                raise AssertionError(f"exit code {code} by itself:\n{text[-3000:]}")
            break
        if number != signal.SIGKILL and text.count("rerun the same command to resume") != 1:
            raise AssertionError(f"the last line does not say what happened:\n{text[-3000:]}")
        done.append(killed)
        hit[killed.phase] += 1
        print(f"  {len(done):3d}  after {killed.seconds:5.1f} s, update {killed.step:4d}: {killed.phase}", flush=True)
    return Result(done, time.monotonic() - began, replayed, differences(straight, workdir))


def used(process: subprocess.Popen) -> float:
    """Processor seconds of a process so far."""
    with open(f"/proc/{process.pid}/stat") as file:
        # After the name, which may have spaces in it, and closes with the last parenthesis.
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def await_phase(process: subprocess.Popen, looked_at: Callable[[], tuple[str, int]], wanted: str) -> None:
    """Waits for a phase, or for the end of a process. One that comes once may be over before it is seen."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        phase, _ = looked_at()
        if phase == wanted or (PHASES.index(wanted) < PHASES.index("steps") <= PHASES.index(phase)):
            return
        time.sleep(0.005)


def write_corpus(folder: str, *, megabytes: float) -> str:
    """The head of the docstrings in three JSON-lines files; returns their glob."""
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


# Small enough to start often. Lines of metrics begin and end between checkpoints, and dropout has keys of its own.
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
    """Of the trainer: one device, and caches of its own."""
    cache = os.path.join(folder, "cache")
    own = {"XDG_CACHE_HOME": cache, "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, "jax")}
    return {**os.environ, **own, "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"}


def run_straight(trainer: Trainer, workdir: str) -> tuple[float, float]:
    """Runs undisturbed; returns the seconds it took, and processor seconds to its first checkpoint."""
    log, start, to_checkpoint = workdir + ".log", time.monotonic(), None
    os.makedirs(os.path.dirname(workdir), exist_ok=True)
    process = trainer.start(workdir, log)
    try:
        checkpoints = os.path.join(workdir, "checkpoints")
        while process.poll() is None:
            names = os.listdir(checkpoints) if os.path.isdir(checkpoints) else ()
            if to_checkpoint is None and any(name.isdecimal() for name in names):
                to_checkpoint = used(process)
            time.sleep(0.02)
    finally:
        process.kill()
    if process.returncode != 0:
        with open(log, encoding="utf-8", errors="replace") as file:
            raise AssertionError(f"exit code {process.returncode}:\n{file.read()[-3000:]}")
    return time.monotonic() - start, to_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--kills", type=int, default=22, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    parser.add_argument("--folder", help="work directories, kept; a temporary one, removed, if not given")
    arguments = parser.parse_args()
    number = signal.Signals[f"SIG{arguments.signal}"]
    rng, hit = random.Random(arguments.seed), collections.Counter()

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        files = write_corpus(os.path.join(folder, "corpus"), megabytes=3.0)
        trainer = Trainer((*FLAGS, f"--config.data.data_files={files}"), environment(folder))
        # Of the same name, for it stands in the model's card. The first one fills the compilation cache.
        run_straight(trainer, os.path.join(folder, "first", "run"))
        straight = os.path.join(folder, "straight", "run")
        whole_seconds, to_checkpoint = run_straight(trainer, straight)
        found = differences(os.path.join(folder, "first", "run"), straight)
        print(f"undisturbed: {whole_seconds:.0f} s, {to_checkpoint:.0f} processor s to a checkpoint", flush=True)
        print(f"two undisturbed runs differ in: {', '.join(found) or 'nothing'}", flush=True)

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
                    plan=itertools.islice(plan_of(rng, hit, to_checkpoint=to_checkpoint), left),
                    eval_steps=EVAL_STEPS,
                    rng=rng,
                    hit=hit,
                )
            )
        report(results, hit, whole_seconds=whole_seconds, lines=read_metrics(os.path.join(straight, "metrics.jsonl")))
    if any(result.differences for result in results) or found:
        sys.exit(1)


def report(
    results: list[Result], hit: collections.Counter, *, whole_seconds: float, lines: list[dict[str, Any]]
) -> None:
    """Prints the figures; `lines` are the undisturbed run's metrics."""
    kills = [kill for result in results for kill in result.kills]
    found = [difference for result in results for difference in result.differences]
    seconds = sum(result.seconds for result in results)
    print(f"\nkills               {len(kills)}: " + ", ".join(f"{hit[name]} {name}" for name in PHASES if hit[name]))
    print(f"restarts            {len(kills)} in {len(results)} runs, each to its end")
    print(f"updates made again  {sum(result.replayed for result in results)}, of {lines[-1]['step']} a run")
    print(f"differences         {len(found)}" + "".join(f"\n    {difference}" for difference in found))
    print(f"wall time           {seconds / len(results) / whole_seconds:.1f} times the undisturbed run's")
    step = np.median([line["perf/step_ms"] for line in lines if "perf/step_ms" in line]) / 1e3
    save = np.median([line["perf/save_ms"] for line in lines if "perf/save_ms" in line]) / 1e3
    print(f"an update           {step:.3f} s; the pause for a save {save:.3f} s")
    for name in PHASES:
        if gone := [kill.latency for kill in kills if kill.phase == name]:
            print(f"signal to exit      {name}: median {np.median(gone):.2f} s, at most {max(gone):.2f} s")


if __name__ == "__main__":
    main()
