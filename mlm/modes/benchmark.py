"""--mode=benchmark: prints the time per step in the training loop, by part, and of the training step alone."""

import functools
import os
import tempfile
import time

import jax
import numpy as np
from absl import logging

from mlm import build, memory, parallel
from mlm import steps as steps_lib
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings
from mlm.stages import settings_of_stages
from mlm.train import train_and_evaluate

# Parts of the time per step in the loop; they add up to it.
_PARTS = {
    "input_wait": "waiting for a batch",
    "transfer": "copying it to the devices",
    "device": "waiting for the devices",
    "host": "other work of the host",
}
# Pauses between steps -> the key that says how often.
_PAUSES = {"evaluation": "eval_steps", "save": "save_steps", "export": "eval_steps"}


def run(settings: RunSettings, workdir: None, *, steps: int) -> None:
    """Prints milliseconds per step in the training loop, by part, and of the training step alone on one batch.

    Both are timed over `steps` steps, after as many untimed ones, in one process. The step alone is timed before and
    after the loop: its mean is compared, and the difference is the uncertainty of the ratio. All files are temporary.
    """
    settings = settings_of_stages(settings)[0]  # The first stage.
    # One log line after each half; the pauses for evaluation, checkpoint and export are between them, timed apart.
    settings = settings.replace(
        {
            "hub.push_to_hub": False,
            "checkpoint.init_from": None,
            "checkpoint.init_mode": None,
            "num_train_steps": 2 * steps,
            "stages": (),
            # The schedule of the run may be longer than these steps; a constant rate costs the same.
            "optimizer.warmup_steps": 0,
            "optimizer.schedule": "constant",
            "optimizer.decay_steps": None,
            "optimizer.decay_shape": None,
            "optimizer.end_factor": None,
            "logging_steps": steps,
            "eval_steps": steps,
            "save_steps": steps,
        }
    )
    if settings.per_device_train_batch_size == 0:
        found = memory.find_batch_size(
            _build(settings).step_config,
            length=settings.data.max_seq_length,
            microbatches=settings.gradient_accumulation_steps,
        )
        settings = settings.replace({"per_device_train_batch_size": found})
    alone = [_step_ms(settings, num_steps=steps)]
    with tempfile.TemporaryDirectory(prefix="mlm-benchmark") as directory:
        train_and_evaluate(settings, os.path.join(directory, "run"))
        line = read_metrics(os.path.join(directory, "run", "metrics.jsonl"))[-1]
    alone.append(_step_ms(settings, num_steps=steps))
    mean = sum(alone) / 2

    total = line["perf/step_ms"]
    print(f"\ntime per step         {total:10.2f} ms   {line['perf/tokens_per_second']:,.0f} tokens/s")
    for part, meaning in _PARTS.items():
        print(f"  {meaning:<28}{line[f'perf/{part}_ms']:10.2f} ms   {line[f'perf/{part}_ms'] / total:6.1%}")
    for name, key in _PAUSES.items():
        print(f"every {key:<13} {name:<12}{line[f'perf/{name}_ms']:8.0f} ms")
    print(f"training step alone   {mean:10.2f} ms   (before and after: {alone[0]:.2f}, {alone[1]:.2f})")
    print(f"loop / step alone     {total / mean:10.3f}      (± {abs(alone[1] - alone[0]) / (2 * mean):.3f})")


def _build(settings: RunSettings) -> build.Components:
    with tempfile.TemporaryDirectory(prefix="mlm-benchmark") as directory:
        return build.build(settings, WorkDir(directory))


def _step_ms(settings: RunSettings, *, num_steps: int) -> float:
    """Returns the mean milliseconds per training step, run repeatedly on one on-device batch."""
    components = _build(settings)
    logging.info("timing the training step alone")
    train_step = functools.partial(steps_lib.train_step, step_config=components.step_config, axis_name=parallel.AXIS)
    step = parallel.data_parallel(train_step, donate_argnums=(0,))
    state = parallel.replicate(components.initial_state())
    tokens = parallel.shard(np.asarray(next(components.stream)), shape=(settings.gradient_accumulation_steps,))
    times = []
    for _ in range(2):  # The first half is the warm-up.
        start = time.monotonic()
        for _ in range(num_steps):
            state, metrics = step(state, tokens)
        jax.block_until_ready(metrics)
        times.append(1e3 * (time.monotonic() - start) / num_steps)
    return times[-1]
