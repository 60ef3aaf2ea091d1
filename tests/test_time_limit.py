"""Runs that stop before `max_hours`."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.same_run import differences
from mlm import train
from mlm.run.signals import Interrupted
from mlm.run.time_limit import TimeLimit, process_start
from mlm.train import train_and_evaluate
from tests import fork_server
from tests.test_multihost import Pair, free_port
from tests.tiny import tiny_settings, write_corpus


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_margin_is_twice_the_last_save_evaluation_and_step():
    clock = Clock()
    limit = TimeLimit(1.0, start=0.0, clock=clock)
    clock.now = 4000.0
    assert not limit.is_near()  # A run makes a step after each start.
    clock.now = 100.0
    limit.add_step(save_seconds=None)
    clock.now = 3600 - 2 * (18 + 18) - 0.5  # Nothing is measured yet.
    assert not limit.is_near()
    clock.now += 0.5
    assert limit.is_near()

    clock.now = 200.0
    limit.add_step(save_seconds=None)
    for seconds in (40.0, 20.0):  # An evaluation and its export.
        with limit.evaluation():
            clock.now += seconds
    clock.now = 270.0  # A step of 10 seconds.
    limit.add_step(save_seconds=30.0)
    clock.now = 3600 - 2 * (30 + 60 + 10) - 0.5
    assert not limit.is_near()
    clock.now += 0.5
    assert limit.is_near()
    no_limit = TimeLimit(0.0, start=0.0, clock=clock)
    no_limit.add_step(save_seconds=None)
    assert not no_limit.is_near()


@pytest.mark.slow
def test_the_start_of_a_process_is_known_whenever_it_is_asked_for():
    code = "import time; time.sleep(1.0); from mlm.run.time_limit import process_start; print(process_start())"
    before = time.monotonic()
    found = fork_server.run([sys.executable, "-c", code])
    after = time.monotonic()
    # The system counts hundredths of a second.
    assert before - 0.02 <= float(found.stdout) <= after - 1.0
    assert process_start() == pytest.approx(process_start(), abs=0.02)


@pytest.mark.slow
def test_a_run_stops_before_the_limit_and_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    settings = tiny_settings(write_corpus(tmp_path), num_train_steps=4, max_hours=1.0)
    straight, stopped = str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")
    train_and_evaluate(settings.replace({"max_hours": 0.0}), straight)
    clock, real = Clock(), TimeLimit.add_step

    def add_step(self, **kwargs):
        clock.now += 1000.0
        real(self, save_seconds=10.0)

    monkeypatch.setattr(TimeLimit, "add_step", add_step)
    monkeypatch.setattr(train, "TimeLimit", lambda hours: TimeLimit(hours, start=0.0, clock=clock))
    # After the second step 1,600 s are left, less than two steps of 1,000 s.
    with pytest.raises(Interrupted, match=r"^max_hours=1\.0: stopped after step 2, which is saved$") as interrupted:
        train_and_evaluate(settings, stopped)
    assert interrupted.value.on_all_processes
    assert Path(stopped, "checkpoints", "2").is_dir()
    monkeypatch.undo()
    train_and_evaluate(settings, stopped)
    assert differences(straight, stopped) == []


ONE_OF_TWO = """
import sys, time
from mlm.run import multihost, signals
port, index, corpus, workdir = sys.argv[1:]
multihost.start(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
from mlm import train
from mlm.run.time_limit import TimeLimit
from tests.tiny import tiny_settings
if index == "1":
    train.TimeLimit = lambda hours: TimeLimit(hours, start=time.monotonic() - 3600 * hours)
try:
    train.train_and_evaluate(tiny_settings(corpus, num_train_steps=1000, max_hours=9.0), workdir)
except signals.Interrupted as interrupted:
    print(interrupted, interrupted.on_all_processes, flush=True)
"""


@pytest.mark.slow
def test_two_processes_stop_together_if_the_limit_of_one_is_near(tmp_path):
    corpus, workdir, port = write_corpus(tmp_path), str(tmp_path / "run"), free_port()
    both = Pair([["-c", ONE_OF_TWO, port, str(i), corpus, workdir] for i in range(2)], tmp_path)
    try:
        assert both.wait() == [0, 0], both.log(0) + both.log(1)
    finally:
        both.kill()
    for index in range(2):
        assert both.log(index).splitlines()[-1] == "max_hours=9.0: stopped after step 2, which is saved True"
    assert Path(workdir, "checkpoints", "2").is_dir()
