"""Metrics of a run: lines of metrics.jsonl, means over intervals, skipped steps, curves."""

import dataclasses
import json
import struct
import time
import types

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from mlm import parallel
from mlm.data.prefetch import Batch
from mlm.errors import UserError
from mlm.loss import LossSums
from mlm.masking import MaskCounts
from mlm.reporting import reporter as reporter_lib
from mlm.reporting import writers
from mlm.reporting.curves import draw_curves, read_metrics
from mlm.reporting.progress import duration
from mlm.reporting.reporter import Reporter
from mlm.reporting.without_keras import metric_writers
from mlm.reporting.writers import JsonLinesWriter, create_writer
from mlm.run.workdir import WorkDir
from mlm.settings import ProfileSettings
from mlm.steps import TrainMetrics


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "metrics.jsonl")


def test_metrics_jsonl_has_one_line_per_step(path):
    writer = JsonLinesWriter(path, last_step=0)
    writer.write_scalars(2, {"a": np.float32(0.5), "n": np.int64(3)})
    writer.write_scalars(2, {"b": jnp.float32(1.5)})
    writer.write_scalars(4, {"a": 2.125})
    writer.flush()
    writer.flush()
    # Scalars of a step whose line is on disk: first a shorter line than before, then a longer one.
    writer.write_scalars(4, {"a": 1})
    writer.flush()
    assert read_metrics(path)[1:] == [{"step": 4, "a": 1}]
    writer.write_scalars(4, {"b": 0.25})
    writer.write_scalars(6, {"a": 0})
    writer.close()
    assert read_metrics(path) == [
        {"step": 2, "a": 0.5, "n": 3, "b": 1.5},
        {"step": 4, "a": 1, "b": 0.25},
        {"step": 6, "a": 0},
    ]


@pytest.mark.slow
def test_metrics_jsonl_is_strict_json(path):
    writer = JsonLinesWriter(path, last_step=0)
    writer.write_scalars(2, {"a": float("nan"), "b": np.float32("inf"), "c": 1.5})
    writer.flush()
    # The line is read again after a restart, and written again with more scalars.
    writer = JsonLinesWriter(path, last_step=2)
    writer.write_scalars(2, {"d": -np.inf})
    writer.close()

    def refuse(constant):
        raise AssertionError(constant)

    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line, parse_constant=refuse) for line in file]
    assert lines == [{"step": 2, "a": None, "b": None, "c": 1.5, "d": None}]
    draw_curves(path, path + ".png", title="A line without a number")


@pytest.mark.slow
def test_tensorboard_shows_every_step_once_after_a_restart(tmp_path):
    workdir = WorkDir(str(tmp_path))
    for last_step, steps in ((0, range(2, 15, 2)), (6, range(8, 15, 2)), (12, range(14, 17, 2))):
        time.sleep(1.0)  # Names of files have the second of the start.
        writer = create_writer(workdir, last_step=last_step)
        for step in steps:
            writer.write_scalars(step, {"train/loss": float(100 * last_step + step)})
        writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    shown = [
        (event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in events.Tensors("train/loss")
    ]
    assert shown == [(2, 2), (4, 4), (6, 6), (8, 608), (10, 610), (12, 612), (14, 1214), (16, 1216)]


def write_lines(path, steps, rest=""):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, "old": True}) + "\n" for step in steps)
        file.write(rest)


@pytest.mark.parametrize("last_step", [0, 1, 4, 5, 6, 7])
def test_a_resumed_run_writes_no_step_twice(path, last_step):
    write_lines(path, [2, 4, 6], rest='{"step": 8, "old": tr')
    writer = JsonLinesWriter(path, last_step=last_step)
    old_steps = [step for step in (2, 4, 6) if step <= last_step]
    # They are on disk before anything new is written.
    assert [line["step"] for line in read_metrics(path)] == old_steps
    for step in range(max(last_step, 1), 10):
        if step % 2 == 0:
            writer.write_scalars(step, {"new": True})
    writer.close()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "old" in line] == old_steps
    # The line of last_step is added to; earlier ones do not change.
    assert [line["step"] for line in lines if "new" in line] == [s for s in (2, 4, 6, 8) if s >= last_step]


def test_a_last_line_that_was_cut_off_is_ignored(path):
    assert read_metrics(path) == []
    write_lines(path, [1, 2], rest='{"step": 3, "o')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


class Clock:
    """Replaces the module `time` in `reporter`."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(reporter_lib, "time", clock)
    return clock


@pytest.fixture
def make_reporter(tmp_path, monkeypatch, clock):
    # CLU tests its TensorBoard writer itself.
    monkeypatch.setattr(metric_writers, "SummaryWriter", lambda logdir: metric_writers.MultiWriter([]))
    workdir = WorkDir(str(tmp_path))

    def make(restored=None, step=0, pad_id=None, max_skipped_steps=2):
        return Reporter(
            workdir,
            num_train_steps=100,
            vocab_size=10,
            profile=ProfileSettings(first_step=1, num_steps=0),
            max_skipped_steps=max_skipped_steps,
            restored=restored,
            step=step,
            pad_id=pad_id,
        )

    return make


# For step n: loss sum, predicted tokens, time until it is done, and the part of it spent waiting for its batch.
LOSSES = {1: 30.0, 2: 10.0, 3: 64.0, 4: 50.0, 5: 24.0}
COUNTS = {1: 10.0, 2: 2.0, 3: 16.0, 4: 25.0, 5: 4.0}
SECONDS = {1: 1.0, 2: 2.0, 3: 5.0, 4: 1.0, 5: 1.0}
WAITS = {1: 0.0, 2: 0.0, 3: 0.75, 4: 0.5, 5: 0.0}


def fake(step, loss=None, grad_norm=1.0, skipped=False):
    metrics = TrainMetrics(
        sums=LossSums(np.float32(LOSSES[step] if loss is None else loss), np.float32(step), np.float32(COUNTS[step])),
        mask_counts=MaskCounts(*(np.float32(count) for count in (20, 8, 4, 2))),
        grad_norm=np.float32(grad_norm * step),
        learning_rate=np.float32(step / 8),
        skipped=np.float32(skipped),
    )
    tokens = np.array([[step, step, 9]], np.int32)
    return parallel.replicate(metrics), Batch(tokens, {}, 0, {"skipped_documents": 7})


def run(reporter, clock, steps, *, since=1, log=()):
    """Reports steps; waits accumulate from step `since`, the first one of the process."""
    for step in steps:
        # The wait for the first batch, 7 s here, ends before the first step and is not counted.
        reporter.add_step(step, *fake(step), wait_seconds=7 + sum(WAITS[i] for i in range(since + 1, step + 1)))
        clock.now += SECONDS[step]
        if step in log:
            reporter.wait_for_pending_step()
            reporter.log_steps(step)


EXPECTED = [
    {
        "step": 3,
        "train/loss": 104 / 28,
        "train/accuracy": 6 / 28,
        "train/learning_rate": 3 / 8,
        "train/grad_norm": 3.0,
        "train/skipped_steps": 0,
        "data/tokens": 9,
        "perf/hours": 8 / 3600,
        "perf/tokens_per_second": 9 / 8,
        "perf/step_ms": 8000 / 3,
        "perf/input_wait_ms": 750 / 3,
        "perf/transfer_ms": 0.0,
        "perf/device_ms": 0.0,
        "perf/host_ms": 7250 / 3,
        "data/epoch": 0,
        "data/masked_fraction": 0.4,
        "data/mask_replaced_fraction": 0.5,
        "data/random_replaced_fraction": 0.25,
        "data/skipped_documents": 7,
        "perf/input_wait_fraction": 0.75 / 8,
    },
    {
        "step": 5,
        "train/loss": 74 / 29,
        "train/accuracy": 9 / 29,
        "train/learning_rate": 5 / 8,
        "train/grad_norm": 5.0,
        "train/skipped_steps": 0,
        "data/tokens": 15,
        "perf/hours": 10 / 3600,
        "perf/tokens_per_second": 6 / 2,
        "perf/step_ms": 2000 / 2,
        "perf/input_wait_ms": 500 / 2,
        "perf/transfer_ms": 0.0,
        "perf/device_ms": 0.0,
        "perf/host_ms": 1500 / 2,
        "data/epoch": 0,
        "data/masked_fraction": 0.4,
        "data/mask_replaced_fraction": 0.5,
        "data/random_replaced_fraction": 0.25,
        "data/skipped_documents": 7,
        "perf/input_wait_fraction": 0.5 / 2,
    },
]


WAITING = ("perf/input_wait_fraction", "perf/input_wait_ms", "perf/host_ms")


def without_waits(lines):
    """Lines without the wait for batches, which every process measures from its first step on; sums rounded."""
    return [{name: round(value, 12) for name, value in line.items() if name not in WAITING} for line in lines]


class TerminalLine:
    """The live line of a run in a terminal."""

    enabled = True

    def __init__(self, *args, **kwargs):
        self.texts = []

    def show(self, step, text, *, activity=""):
        self.texts.append(text)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def test_a_pause_before_the_first_step_of_an_interval_is_shown(make_reporter, clock, monkeypatch):
    monkeypatch.setattr(reporter_lib, "LiveLine", TerminalLine)
    with make_reporter() as reporter:
        reporter.add_step(1, *fake(1), wait_seconds=0)
        with reporter.timed("compilation"):
            clock.now += 5
        assert set(reporter._live.texts) == {""}
        reporter.wait_for_pending_step()
        reporter.log_steps(1)
        shown = reporter._live.texts[-1]
        assert shown
        clock.now += 5
        with reporter.timed("save"):
            clock.now += 5
        assert reporter._live.texts[-1] == shown


def test_lines_hold_means_over_their_interval(make_reporter, clock, path):
    with make_reporter() as reporter:
        run(reporter, clock, range(1, 6), log=(3, 5))
        np.testing.assert_array_equal(reporter.accumulator.counts_V, [0, 2, 2, 2, 2, 2, 0, 0, 0, 5])
    # Exact: few and small numbers.
    assert read_metrics(path) == EXPECTED


def test_skipped_documents_are_logged_each_time_their_number_has_doubled(make_reporter, clock, caplog):
    reporter = make_reporter()
    with caplog.at_level("INFO"):
        for counted in (0, 7, 7, 12, 14, 15, 29, 31):
            metrics, batch = fake(1)
            reporter.add_step(
                1, metrics, dataclasses.replace(batch, counters={"skipped_documents": counted}), wait_seconds=0
            )
            clock.now += 1.0
            reporter.wait_for_pending_step()
            reporter.log_steps(1)
    messages = [record.getMessage() for record in caplog.records if "documents skipped" in record.getMessage()]
    assert [message.split()[0] for message in messages] == ["7", "15", "31"]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_logs_the_same_lines(make_reporter, clock, path, stop):
    with make_reporter() as reporter:
        run(reporter, clock, range(1, stop + 1), log=(3, 5))
        reporter.wait_for_pending_step()
        saved = json.loads(json.dumps(reporter.to_json()))
        assert read_metrics(path) == [line for line in EXPECTED if line["step"] <= stop]
        run(reporter, clock, range(stop + 1, 6), log=(3, 5))  # Lost by a crash.
    clock.now += 1000
    with make_reporter(restored={"step": stop, **saved}, step=stop) as reporter:
        run(reporter, clock, range(stop + 1, 6), since=stop + 1, log=(3, 5))
        np.testing.assert_array_equal(reporter.accumulator.counts_V, [0, 2, 2, 2, 2, 2, 0, 0, 0, 5])
    assert without_waits(read_metrics(path)) == without_waits(EXPECTED)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_the_fraction_of_padding_is_over_the_interval(make_reporter, clock, path, stop):
    """The tokens of step n are n, n, 9: with padding id 3, one interval has 2 of 9, the other none."""
    with make_reporter(pad_id=3) as reporter:
        run(reporter, clock, range(1, stop + 1), log=(3, 5))
        reporter.wait_for_pending_step()
        saved = json.loads(json.dumps(reporter.to_json()))
    with make_reporter(restored={"step": stop, **saved}, step=stop, pad_id=3) as reporter:
        run(reporter, clock, range(stop + 1, 6), since=stop + 1, log=(3, 5))
    fractions = [2 / 9, 0.0]
    expected = [{**line, "data/padding_fraction": f} for line, f in zip(EXPECTED, fractions, strict=True)]
    assert without_waits(read_metrics(path)) == without_waits(expected)


def test_an_evaluation_joins_the_line_of_its_step_and_its_time_is_not_that_of_the_steps(make_reporter, clock, path):
    evaluation = {"eval/loss": 3.0, "eval/unigram_loss": 6.0, "eval/accuracy": 0.25, "eval/perplexity": 20.0}
    with make_reporter() as reporter:
        run(reporter, clock, range(1, 3))
        reporter.wait_for_pending_step()
        clock.now += 1  # Counts as time of the steps.
        with reporter.timed("evaluation"):
            clock.now += 500
            reporter.log_evaluation(2, evaluation)
        assert read_metrics(path) == [{"step": 2, **evaluation}]  # Flushed: the curves are drawn from the file.
        run(reporter, clock, range(3, 4), since=1, log=(3,))
        with reporter.timed("evaluation"):
            reporter.log_evaluation(3, evaluation)
    timings = {
        "perf/tokens_per_second": 1.0,
        "perf/step_ms": 3000.0,
        "perf/host_ms": 8250 / 3,
        "perf/input_wait_fraction": 0.75 / 9,
        "perf/evaluation_ms": 500e3,
        "perf/hours": 509 / 3600,
    }
    assert read_metrics(path) == [{"step": 2, **evaluation}, {**EXPECTED[0], **timings, **evaluation}]


def test_skipped_steps_are_counted_and_not_part_of_the_means(make_reporter, path):
    def add_step(step, **faults):
        reporter.add_step(step, *fake(step, **faults), wait_seconds=0.0)

    with make_reporter() as reporter:
        add_step(1)
        add_step(2, loss=np.nan, grad_norm=np.nan, skipped=True)
        add_step(3, loss=np.inf, skipped=True)
        add_step(4)
        add_step(5, grad_norm=np.inf, skipped=True)
        reporter.wait_for_pending_step()
        reporter.log_steps(5)
    (line,) = read_metrics(path)
    assert (line["train/loss"], line["train/accuracy"]) == (80 / 35, 5 / 35)
    assert line["train/skipped_steps"] == 3
    assert "train/grad_norm" not in line  # JSON has no infinity.


def test_too_many_skipped_steps_in_a_row_end_the_run_also_after_a_restart(make_reporter):
    faults = {"loss": np.nan, "skipped": True}
    with make_reporter() as reporter:
        reporter.add_step(1, *fake(1, **faults), wait_seconds=0.0)
        reporter.wait_for_pending_step()
        saved = json.loads(json.dumps(reporter.to_json()))
    with make_reporter(restored=saved, step=1) as reporter:
        for step in (2, 3):
            reporter.add_step(step, *fake(step, **faults), wait_seconds=0.0)
        # Found when the next step has been dispatched.
        with pytest.raises(UserError, match=r"=2: steps 1 to 3 were skipped, .* --mode=show_data --step=3") as raised:
            reporter.add_step(4, *fake(4), wait_seconds=0.0)
        assert "\n" not in str(raised.value)


def test_a_full_disk_loses_no_line(make_reporter, clock, path, monkeypatch):
    with make_reporter() as reporter:
        with monkeypatch.context() as patch:
            patch.setattr(writers.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
            run(reporter, clock, range(1, 4), log=(3,))
            reporter.writer.flush()
        run(reporter, clock, range(4, 6), log=(5,))
    assert [line["step"] for line in read_metrics(path)] == [3, 5]


@pytest.mark.parametrize(
    ("seconds", "formatted"),
    [
        (0.2, "0 s"),
        (12, "12 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (4 * 3600 + 12 * 60 + 59, "4 h 12 min"),
        (2 * 86400 + 3 * 3600 + 1800, "2 d 3 h"),
    ],
)
def test_durations_have_two_units(seconds, formatted):
    assert duration(seconds) == formatted


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v3", 61.5e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
    ],
)
def test_the_peak_rate_is_looked_up_by_the_kind_of_device(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert reporter_lib.peak_flops() == peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines", [[], EXPECTED, [line | {"eval/loss": 1.0, "eval/unigram_loss": 2.0} for line in EXPECTED]]
)
def test_the_picture_of_the_curves_has_four_labeled_plots(path, tmp_path, monkeypatch, lines):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k),
    )
    draw_curves(path, str(tmp_path / "curves.png"), title="a run, 5 steps")
    content = (tmp_path / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1100, 770)
    (figure,) = figures
    assert [(axis.get_title(), axis.get_ylabel()) for axis in figure.axes] == [
        ("Loss", "nats per predicted token"),
        ("Accuracy", "% of predicted tokens"),
        ("Learning rate", ""),
        ("Throughput", "tokens per second"),
    ]
    assert [axis.get_xlabel() for axis in figure.axes[2:]] == ["steps", "steps"]
    names = [[line.get_label() for line in axis.get_lines()] for axis in figure.axes]
    evaluated = any("eval/loss" in line for line in lines)
    assert names[0] == (["train"] if lines else []) + (["evaluation", "unigram model"] if evaluated else [])
    if lines:
        x, y = figure.axes[1].get_lines()[0].get_data()
        np.testing.assert_array_equal(x, [3, 5])
        np.testing.assert_allclose(y, [100 * 6 / 28, 100 * 9 / 29])  # In percent.


@pytest.mark.slow
def test_a_title_with_characters_that_the_font_lacks_logs_no_warning(path, tmp_path, recwarn):
    draw_curves(path, str(tmp_path / "curves.png"), title="実験, 5 steps")
    assert [str(warning.message) for warning in recwarn] == []
