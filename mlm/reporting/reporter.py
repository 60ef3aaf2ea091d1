"""Reports a run: steps and evaluations to the metric files, the log and the terminal."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging

from mlm import parallel
from mlm.data.prefetch import Batch
from mlm.errors import UserError
from mlm.hardware import find_device
from mlm.reporting import writers
from mlm.reporting.metrics import MetricsAccumulator
from mlm.reporting.progress import LiveLine, evaluation_line, live_text, step_line
from mlm.reporting.without_keras import periodic_actions
from mlm.run.workdir import WorkDir
from mlm.settings import ProfileSettings
from mlm.steps import TrainMetrics

# The live line shows the previous interval's metrics until the current interval is this long.
_MIN_RATE_WINDOW_SECONDS = 1.0


class Reporter:
    """Joins the accumulator, the writers and the progress lines for the training loop.

    Attributes:
      accumulator: sums over steps.
      writer: metrics.jsonl and TensorBoard.
      step_memory_bytes: memory of the stage's compiled step on one device; None until it is known.
    """

    def __init__(
        self,
        workdir: WorkDir,
        *,
        num_train_steps: int,
        vocab_size: int,
        profile: ProfileSettings,
        max_skipped_steps: int,
        restored: Mapping[str, Any] | None,
        step: int,
        pad_id: int | None = None,
        unknown_id: int | None = None,
    ):
        """Resumes after `step` from `restored`, which `to_json` returned then.

        Args:
          workdir: where metrics are written.
          num_train_steps: steps of the run.
          vocab_size: number of token ids.
          profile: the steps to trace.
          max_skipped_steps: how many steps in a row may be skipped.
          restored: state of the accumulator; None for a new run.
          step: steps done.
          pad_id: the padding id, to log the fraction of padding; None if sequences are never padded.
          unknown_id: the id of the unknown token, to log its fraction; None if there is none.
        """
        self.accumulator = MetricsAccumulator(
            vocab_size=vocab_size,
            num_processes=jax.process_count(),
            pad_id=pad_id,
            unknown_id=unknown_id,
            state=restored,
        )
        self.writer = writers.create_writer(workdir, last_step=step)
        self.step_memory_bytes: int | None = None
        self._logdir = workdir.path
        self._live = LiveLine(num_train_steps, step=step, enabled=jax.process_index() == 0)
        self._num_train_steps = num_train_steps
        self._max_skipped_steps = max_skipped_steps
        self._step = step
        self._stage: str | None = None
        self._pending: tuple[int, TrainMetrics, Batch] | None = None
        # The clock and the wait time start with the first step, because the loop compiles before it.
        self._clock: float | None = None
        self._wait_seconds = 0.0
        self._logged: dict[str, float] = {}  # The scalars of the last log line.
        self._logged_skipped_documents = 0
        self._progress = periodic_actions.ReportProgress(num_train_steps=num_train_steps, every_secs=60.0)
        self._hooks: list[periodic_actions.PeriodicAction] = [self._progress]
        if profile.num_steps and jax.process_index() == 0:
            self._hooks.append(
                periodic_actions.Profile(
                    logdir=workdir.path,
                    num_profile_steps=profile.num_steps,
                    profile_duration_ms=None,  # The default traces for 3 s, however few steps are asked for.
                    first_profile=step + profile.first_step,
                    every_secs=None,
                )
            )

    @contextlib.contextmanager
    def dispatch(self, *, stage: str, flops_per_token: float) -> Iterator[None]:
        """Surrounds the dispatch of a step. The first one of a later stage compiles, which is a pause.

        Args:
          stage: name of the step's stage.
          flops_per_token: operations of a training step per token in that stage.
        """
        if stage == self._stage:
            yield
            return
        self._stage = stage
        if (peak := peak_flops()) is not None:
            self.accumulator.peak_tokens_per_second = peak * jax.device_count() / flops_per_token
        if self._clock is None:
            self._show(activity="compiling the step")
            yield
            return
        with self.timed("compilation"):
            yield

    def add_step(self, step: int, metrics: TrainMetrics, batch: Batch, *, wait_seconds: float) -> None:
        """Takes a step that was just dispatched; reads the step before it while the devices work on this one.

        Args:
          step: number of the step.
          metrics: its metrics, on the devices.
          batch: its batch.
          wait_seconds: time that the loop has waited for batches, cumulative.
        """
        if self._clock is None:
            self._clock, self._wait_seconds = time.monotonic(), wait_seconds
        self.wait_for_pending_step()
        self._pending = step, metrics, batch
        self.accumulator.add_part("input_wait", wait_seconds - self._wait_seconds)
        self._wait_seconds = wait_seconds
        for hook in self._hooks:
            hook(step)

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """Times a block that sends a batch to the devices."""
        start = time.monotonic()
        yield
        if self._clock is not None:
            self.accumulator.add_part("transfer", time.monotonic() - start)

    def wait_for_pending_step(self) -> None:
        """Waits for the step that was dispatched last, if any.

        Raises:
          UserError: it was skipped, after too many others.
        """
        if self._pending is None:
            return
        (self._step, metrics, batch), self._pending = self._pending, None
        start = time.monotonic()
        metrics = parallel.first_replica(metrics)
        self.accumulator.add_part("device", time.monotonic() - start)
        self.accumulator.add_step(metrics, batch)
        self.accumulator.add_seconds(self._update_clock())
        if metrics.skipped:
            self._report_skipped(metrics)
        self._show()

    def _report_skipped(self, metrics: TrainMetrics) -> None:
        step, count = self._step, self.accumulator.consecutive_skipped_steps
        tokens = float(metrics.sums.count)
        finding = (
            f"loss {float(metrics.sums.loss) / max(tokens, 1.0):.4g} over {tokens:.0f} tokens, "
            f"gradient norm {metrics.grad_norm:.4g}"
        )
        if count <= self._max_skipped_steps:
            logging.warning("step %d was skipped: %s", step, finding)
            return
        raise UserError(
            f"optimizer.max_skipped_steps={self._max_skipped_steps}: steps {step - count + 1} to {step} were skipped, "
            f"the last one with {finding}; print its sequences with --mode=show_data --step={step}, then resume with a "
            "lower optimizer.learning_rate, more optimizer.warmup_steps, optimizer.max_grad_norm=1.0 or data.skip_steps"
        )

    def log_steps(self, step: int) -> None:
        """Logs the means since the last log line. Call after `wait_for_pending_step`."""
        self._logged = scalars = self.accumulator.scalars()
        if self.step_memory_bytes is not None:
            scalars["perf/step_memory_bytes"] = self.step_memory_bytes
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            scalars["perf/device_memory_bytes"] = memory["peak_bytes_in_use"]
        self.writer.write_scalars(step, scalars)
        logging.info("%s", step_line(step, self._num_train_steps, scalars, **self._eval_loss_and_time_left(scalars)))
        skipped = int(scalars["data/skipped_documents"])
        # Every epoch skips the same ones again.
        if skipped > 2 * self._logged_skipped_documents:
            logging.info("%s documents skipped so far: null, empty, not text or not UTF-8", f"{skipped:,}")
            self._logged_skipped_documents = skipped
        self.accumulator.start_interval()
        self._show()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Keeps the time of a block out of the steps' time, and logs it as perf/<name>_ms."""
        self.accumulator.add_seconds(self._update_clock())
        self._show(activity=name)
        with self._progress.timed(name, wait_jax_async_dispatch=False):
            yield
        self.accumulator.add_pause(name, self._update_clock())
        self._show()

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of an evaluation, and flushes: the curves are drawn from the file."""
        self.accumulator.eval_loss = float(metrics["eval/loss"])
        self.writer.write_scalars(step, metrics)
        self.writer.flush()
        logging.info("%s", evaluation_line(step, self._num_train_steps, metrics))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes the config of a new run, with dotted keys, to TensorBoard."""
        if jax.process_index() == 0:
            writers.write_config(self.writer, self._logdir, config)

    def to_json(self) -> dict[str, Any]:
        """Returns what a checkpoint stores, and flushes. Call after `wait_for_pending_step`."""
        self.writer.flush()
        return self.accumulator.to_json()

    def __enter__(self) -> "Reporter":
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(*exc)
        self.writer.close()

    def _eval_loss_and_time_left(self, scalars: Mapping[str, float]) -> dict[str, Any]:
        seconds_left = (self._num_train_steps - self._step) * scalars["perf/step_ms"] / 1e3
        return {"eval_loss": self.accumulator.eval_loss, "seconds_left": seconds_left}

    def _show(self, *, activity: str = "") -> None:
        """Draws the live line. It reads nothing from the devices."""
        if not self._live.enabled:
            return
        text = ""
        scalars = self._logged
        is_long = self.accumulator.interval.seconds > _MIN_RATE_WINDOW_SECONDS
        if self.accumulator.has_scalars and (is_long or not scalars):
            scalars = self.accumulator.scalars()
        if scalars:
            text = live_text(scalars, **self._eval_loss_and_time_left(scalars))
        self._live.show(self._step, text, activity=activity)

    def _update_clock(self) -> float:
        """Returns the seconds since the last call; 0 before the first step."""
        if self._clock is None:
            return 0.0
        before, self._clock = self._clock, time.monotonic()
        return self._clock - before


def peak_flops() -> float | None:
    """Returns the peak FLOP/s of one device; None if it is unknown, as for a CPU."""
    device = find_device(jax.devices()[0].device_kind)
    return None if device is None else device.peak_flops
