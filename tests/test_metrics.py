"""Sums of metrics and timings; tests/test_reporter.py tests them with the log lines of a run."""

import json

import numpy as np

from mlm.data.prefetch import Batch
from mlm.loss import LossSums
from mlm.masking import MaskCounts
from mlm.reporting.metrics import MetricsAccumulator
from mlm.steps import TrainMetrics


def add_step(accumulator, *, skipped=False, seconds=1.0):
    """Adds a step with a loss of 8 and one of 4 predictions correct."""
    metrics = TrainMetrics(
        LossSums(32.0, 1.0, 4.0),
        MaskCounts(maskable=10.0, predicted=4.0, mask_replaced=3.0, random_replaced=1.0),
        grad_norm=2.0,
        learning_rate=0.5,
        skipped=float(skipped),
    )
    accumulator.add_step(metrics, Batch(np.array([[1, 1, 3]], np.int32), {}, 0, {"documents": 5}))
    accumulator.add_seconds(seconds)


def test_scalars_are_means_over_the_steps_of_the_interval():
    accumulator = MetricsAccumulator(vocab_size=4, num_processes=2, pad_id=3, unknown_id=1)
    accumulator.peak_tokens_per_second = 12.0
    add_step(accumulator)
    accumulator.start_interval()
    add_step(accumulator, seconds=2.0)
    add_step(accumulator, skipped=True, seconds=2.0)
    accumulator.add_part("input_wait", 1.0)
    accumulator.add_part("device", 2.0)
    accumulator.add_pause("save", 3.0)
    assert accumulator.scalars() == {
        "train/loss": 8.0,
        "train/accuracy": 0.25,
        "train/learning_rate": 0.5,
        "train/grad_norm": 2.0,
        "train/skipped_steps": 1,
        "data/tokens": 18,
        "data/epoch": 0,
        "data/masked_fraction": 0.4,
        "data/mask_replaced_fraction": 0.75,
        "data/random_replaced_fraction": 0.25,
        "data/padding_fraction": 1 / 3,
        "data/unknown_fraction": 1.0,
        "data/documents": 5,
        "perf/hours": 8 / 3600,
        "perf/tokens_per_second": 3.0,
        "perf/mfu": 0.25,
        "perf/step_ms": 2000.0,
        "perf/input_wait_fraction": 0.25,
        "perf/input_wait_ms": 500.0,
        "perf/transfer_ms": 0.0,
        "perf/device_ms": 1000.0,
        "perf/host_ms": 500.0,
        "perf/save_ms": 3000.0,
    }


def test_an_interval_without_an_applied_step_has_no_loss():
    accumulator = MetricsAccumulator(vocab_size=4)
    add_step(accumulator, skipped=True)
    assert not {"train/loss", "train/accuracy", "perf/mfu", "data/padding_fraction"} & accumulator.scalars().keys()


def test_an_accumulator_continues_from_its_json_state():
    accumulator = MetricsAccumulator(vocab_size=4)
    add_step(accumulator)
    accumulator.add_pause("save", 3.0)
    state = json.loads(json.dumps(accumulator.to_json()))
    resumed = MetricsAccumulator(vocab_size=4, state=state)
    assert resumed.to_json() == state
    add_step(accumulator, skipped=True)
    add_step(resumed, skipped=True)
    assert resumed.scalars() == accumulator.scalars()
    assert resumed.to_json() == accumulator.to_json()
