"""Runs of real processes: which one reads what, and resuming on another number of them."""

import collections
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlm.modes import show_data
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import WorkDir
from tests import fork_server
from tests.test_shard_assignment import of_epoch, units
from tests.test_stream import split, words
from tests.tiny import settings_of, tiny_config, write_corpus

REPO = Path(__file__).parent.parent

READ = """
import json, sys
from mlm.data.sources.source import open_source
from tests.test_stream import rows_of
index, count, files = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
stream = rows_of(open_source(data_files=files), batch_rows=1,
                 process_index=index, process_count=count)
used = []
while stream.epoch == 0:
    next(stream)
    used += [document for document in stream.documents() if document.epoch == 0]
print(json.dumps(used))
"""

TRAIN = """
import json, os, sys
port, index, count, corpus, workdir, last, out = sys.argv[1:]
import jax
if int(count) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
from absl import logging
logging.set_verbosity(logging.INFO)
from mlm.reporting import reporter as report
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, tiny_config
real, rows = report.Reporter.add_step, {}
def update(self, step, metrics, batch, *, wait_seconds):
    rows[step] = batch.tokens.tolist()
    real(self, step, metrics, batch, wait_seconds=wait_seconds)
report.Reporter.add_step = update
config = tiny_config(corpus)
config.num_train_steps = int(last)
config.data.num_eval_samples = 5
train_and_evaluate(settings_of(config), workdir)
open(out, "w").write(json.dumps(rows))
"""


def run_all(code: str, arguments: list[list[str]], *, devices: int = 2) -> list[subprocess.CompletedProcess]:
    """Runs one process per list of arguments at the same time, each with `devices` devices, to the end."""
    env = {
        **os.environ,
        "XLA_FLAGS": fork_server.xla_flags(devices),
        "PYTHONPATH": str(REPO),
    }
    started = [
        fork_server.Process(
            [sys.executable, "-c", code, *own],
            cwd=REPO,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in arguments
    ]
    try:
        return [
            subprocess.CompletedProcess(process.args, process.returncode, *output)
            for process in started
            for output in [process.communicate(timeout=300)]
        ]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_processes_divide_an_epoch(tmp_path):
    shards = split(words(120), 4)
    for n, part in enumerate(shards):
        (tmp_path / f"{n}.txt").write_text("".join(f"{text}\n" for text in part))
    results = run_all(READ, [[str(n), "3", str(tmp_path / "*.txt")] for n in range(3)])
    used = collections.Counter()
    for result in results:
        assert result.returncode == 0, result.stderr
        for epoch, shard, row, begin, end in json.loads(result.stdout):
            used[epoch, shard, row] += end - begin
    assert of_epoch(used, 0) == units(shards)


@pytest.mark.slow
def test_a_run_resumes_on_fewer_and_on_more_processes(tmp_path):
    corpus, workdir = write_corpus(tmp_path), str(tmp_path / "run")
    rows = {}
    for count, devices, last in ((2, 2, 5), (1, 2, 8), (3, 1, 10)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        outs = [str(tmp_path / f"{last}-{n}.json") for n in range(count)]
        results = run_all(
            TRAIN,
            [[port, str(n), str(count), corpus, workdir, str(last), outs[n]] for n in range(count)],
            devices=devices,
        )
        for n, result in enumerate(results):
            assert result.returncode == 0, result.stderr
            assert f"process {n} of {count} reads " in result.stderr
            rows |= {(int(step), n): batch for step, batch in json.loads(Path(outs[n]).read_text()).items()}
    processes = {step: 2 if step <= 5 else 1 if step <= 8 else 3 for step in range(1, 11)}
    assert set(rows) == {(step, n) for step, count in processes.items() for n in range(count)}
    assert {(step > 8, len(batch)) for (step, _), batch in rows.items()} == {(False, 8), (True, 4)}
    # The loss does not rise at a restart.
    losses = [line["train/loss"] for line in read_metrics(f"{workdir}/metrics.jsonl") if "train/loss" in line]
    assert np.diff(losses).max() < 0.2
    assert losses[-1] < losses[0]

    config = tiny_config(corpus)
    config.data.num_eval_samples = 5
    assert WorkDir(workdir).last_topology() == (3, 4)
    used = collections.Counter()
    for (step, process), batch in rows.items():
        data = show_data.replay(settings_of(config), workdir, step=step, process_index=process)
        assert data.tokens_BxL.tolist() == batch
        used.update({(d.epoch, d.shard, d.row) for d in data.documents})
    # Only a document cut by the end of a row or batch is in two steps.
    assert {epoch for epoch, *_ in used} == {0}
    assert max(used.values()) <= 2
    assert sum(number == 2 for number in used.values()) <= len(rows)
