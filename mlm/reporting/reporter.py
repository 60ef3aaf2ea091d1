"""What a person sees of a run under way: metric files and progress lines."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import periodic_actions

from mlm import parallel
from mlm.data.prefetch import Batch
from mlm.errors import UserError
from mlm.hardware import find_device
from mlm.reporting import writers
from mlm.reporting.progress import LiveLine, Progress, evaluation_line
from mlm.run.workdir import WorkDir
from mlm.settings import ProfileSettings
from mlm.steps import TrainMetrics

# Fewer say little about speed.
_MIN_RATE_WINDOW_SECONDS = 1.0


@dataclasses.dataclass
class Interval:
    """Sums over the updates since the last line of metrics. It is saved with every checkpoint, so that a line is the
    same with or without an interruption before it, but for its timings.
    """

    loss: float = 0.0
    correct: float = 0.0
    count: float = 0.0
    steps: int = 0
    tokens: int = 0
    padding: int = 0
    seconds: float = 0.0
    # Of those: waiting for a batch, sending it to the devices, waiting for them; the rest is the host's own work.
    wait_seconds: float = 0.0
    transfer_seconds: float = 0.0
    device_seconds: float = 0.0
    # In which updates waited for something else, by its name.
    apart_seconds: dict[str, float] = dataclasses.field(default_factory=dict)


class Reporter:
    """Collects what updates and evaluations give, and tells it to metric files, log and terminal.

    Attributes:
      tokens_seen: tokens of all updates, padding included, over all processes.
      skipped: updates skipped so far.
      counts_V: int64, how often each id was trained on by process 0, for the unigram model.
    """

    def __init__(
        self,
        workdir: WorkDir,
        *,
        num_train_steps: int,
        vocab_size: int,
        flops_per_token: float,
        profile: ProfileSettings,
        max_skipped_steps: int,
        restored: Mapping[str, Any] | None,
        step: int,
        pad_id: int | None = None,
    ):
        """Goes on at `step`, from what `to_json` gave then (`restored`).

        With a `pad_id` the share of padding in the rows of process 0 is logged; None for rows that never have any.
        """
        restored = {
            "interval": {},
            "counts_V": [0] * vocab_size,
            "tokens_seen": 0,
            "hours": 0.0,
            "skipped": [0, 0],
            "eval_loss": None,  # Younger than some checkpoints.
        } | dict(restored or {})
        self.tokens_seen: int = restored["tokens_seen"]
        self.skipped, self._skipped_in_a_row = restored["skipped"]
        self._max_skipped_steps = max_skipped_steps
        # Of the loop, before this start and since `_began`.
        self._hours_before: float = restored["hours"]
        self._began: float | None = None
        self.counts_V = np.asarray(restored["counts_V"], np.int64)
        self._interval = Interval(**restored["interval"])
        self._eval_loss: float | None = restored["eval_loss"]
        # Until the interval is long enough to tell anything, the live line has the figures of the one before.
        self._told: Progress | None = None
        self._step = step
        self._live = LiveLine(wanted=jax.process_index() == 0)
        self._logdir = workdir.path
        self._writer = writers.create_writer(workdir, last_step=step)
        self._num_train_steps = num_train_steps
        self._flops_per_token = flops_per_token
        self._pad_id = pad_id
        self._pending: tuple[int, TrainMetrics] | None = None
        self._metrics: TrainMetrics | None = None
        # Both begin with the first update: until it was dispatched the loop was compiling.
        self._clock: float | None = None
        self._waited = 0.0
        self._told_skipped = 0
        self._progress = periodic_actions.ReportProgress(num_train_steps=num_train_steps, every_secs=60.0)
        self._hooks = [self._progress]
        if profile.num_steps and jax.process_index() == 0:
            self._hooks.append(
                periodic_actions.Profile(
                    logdir=workdir.path,
                    num_profile_steps=profile.num_steps,
                    profile_duration_ms=None,  # Else it goes on for 3 s, however few steps are asked for.
                    first_profile=step + profile.first_step,
                    every_secs=None,
                )
            )

    def update(self, step: int, metrics: TrainMetrics, batch: Batch, *, wait_seconds: float) -> None:
        """Takes an update that was just dispatched; reads the one before, while the devices work on this one.

        `wait_seconds` is how long batches have been waited for, in all.
        """
        if self._clock is None:
            self._clock, self._waited = time.monotonic(), wait_seconds
            self._began = self._clock
        self.wait_for_pending_step()
        self._pending = (step, metrics)
        self._interval.steps += 1
        self._interval.tokens += batch.tokens.size * jax.process_count()
        self.tokens_seen += batch.tokens.size * jax.process_count()
        self._batch = batch
        self._interval.wait_seconds += wait_seconds - self._waited
        self._waited = wait_seconds
        counts_V = np.bincount(batch.tokens.ravel(), minlength=len(self.counts_V))
        self.counts_V += counts_V
        if self._pad_id is not None:
            self._interval.padding += int(counts_V[self._pad_id]) * jax.process_count()
        for hook in self._hooks:
            hook(step)

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """Inside, a batch is sent to the devices; for the first update the step is compiled next."""
        if self._clock is None:
            self._live.say("compiling the step ...")
        start = time.monotonic()
        yield
        if self._clock is not None:
            self._interval.transfer_seconds += time.monotonic() - start

    def wait_for_pending_step(self) -> None:
        """Waits for the update that is under way, if any.

        Raises:
          UserError: it was skipped, as were so many before it that the run cannot mend itself.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        start = time.monotonic()
        self._metrics = metrics = parallel.first_replica(metrics)
        self._interval.device_seconds += time.monotonic() - start
        if metrics.skipped:
            self._tell_skipped(step, metrics)
        else:
            self._skipped_in_a_row = 0
            self._interval.loss += float(metrics.sums.loss)
            self._interval.correct += float(metrics.sums.correct)
            self._interval.count += float(metrics.sums.count)
        self._update_clock()
        self._step = step
        if self._live.due():
            self._show()

    def _tell_skipped(self, step: int, metrics: TrainMetrics) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        found = (
            f"its loss is {metrics.sums.loss / max(metrics.sums.count, 1.0):.4g} over {metrics.sums.count:.0f} tokens, "
            f"its gradient norm {metrics.grad_norm:.4g}"
        )
        if self._skipped_in_a_row <= self._max_skipped_steps:
            logging.warning("update %d was skipped: %s", step, found)
            return
        raise UserError(
            f"updates {step - self._skipped_in_a_row + 1} to {step} went wrong and were skipped; of the last one "
            f"{found}. See its rows with --mode=show_data --step={step}. Checkpoints before it are kept: go on from "
            "them with a lower optimizer.learning_rate, more warmup_steps, max_grad_norm=1.0, or data.skip_steps"
        )

    def log_updates(self, step: int) -> None:
        """Writes the means since the last line and begins the next interval. Call after `settle`."""
        total, seconds = self._interval, max(self._interval.seconds, 1e-9)
        self._told = now = self._progress_at(step)
        scalars: dict[str, float] = {}
        if total.count:  # Else all were skipped.
            scalars |= {"train/loss": total.loss / total.count, "train/accuracy": total.correct / total.count}
        if np.isfinite(self._metrics.grad_norm):
            scalars["train/grad_norm"] = float(self._metrics.grad_norm)
        scalars |= {
            "train/learning_rate": float(self._metrics.learning_rate),
            "train/skipped_updates": self.skipped,
            "data/tokens": self.tokens_seen,
            "perf/hours": self._hours(),
            "perf/tokens_per_second": now.tokens_per_second,
            "perf/step_ms": 1e3 * seconds / total.steps,
            "perf/input_wait_fraction": now.input_wait,
        }
        parts = {"input_wait": total.wait_seconds, "transfer": total.transfer_seconds, "device": total.device_seconds}
        parts["host"] = max(0.0, seconds - sum(parts.values()))
        scalars |= {f"perf/{name}_ms": 1e3 * part / total.steps for name, part in parts.items()}
        scalars |= {f"perf/{name}_ms": 1e3 * apart for name, apart in total.apart_seconds.items()}
        scalars |= {"data/epoch": self._batch.epoch}
        scalars |= {f"data/{name}": number for name, number in self._batch.counters.items()}
        if self._pad_id is not None:
            scalars["data/padding_fraction"] = total.padding / max(total.tokens, 1)
        if now.utilization is not None:
            scalars["perf/mfu"] = now.utilization
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            scalars["perf/device_memory_bytes"] = memory["peak_bytes_in_use"]
        with writers.tolerant():
            self._writer.write_scalars(step, scalars)
        logging.info("%s", now.line(self._live.width))
        skipped = self._batch.counters["skipped_documents"]
        # Every epoch has the same ones again.
        if skipped > 2 * self._told_skipped:
            logging.info("%s rows so far were left out: null, empty, not text or not UTF-8", f"{skipped:,}")
            self._told_skipped = skipped
        self._interval = Interval()
        self._show()

    def _progress_at(self, step: int) -> Progress:
        """What is known at a step that is settled, of the updates since the last line."""
        total, seconds = self._interval, max(self._interval.seconds, 1e-9)
        peak = peak_flops()
        return Progress(
            step=step,
            num_train_steps=self._num_train_steps,
            loss=total.loss / max(total.count, 1.0),
            accuracy=total.correct / max(total.count, 1.0),
            eval_loss=self._eval_loss,
            tokens_per_second=total.tokens / seconds,
            utilization=total.tokens * self._flops_per_token / seconds / (peak * jax.device_count()) if peak else None,
            input_wait=min(1.0, total.wait_seconds / seconds),
            seconds_left=(self._num_train_steps - step) * seconds / max(total.steps, 1),
        )

    def _show(self, *, busy: str = "") -> None:
        """Draws the live line, where there is a terminal: of numbers that are on the host already."""
        if not self._live.alive or self._clock is None:
            return
        told = self._told
        if told is None or self._interval.seconds > _MIN_RATE_WINDOW_SECONDS:
            told = self._progress_at(self._step)
        self._live.show(told.at(self._step, eval_loss=self._eval_loss), busy=busy)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Keeps the time of a block out of the updates' time, and logs it as perf/<name>_ms."""
        self._update_clock()
        self._show(busy=name)
        start = time.monotonic()
        with self._progress.timed(name, wait_jax_async_dispatch=False):
            yield
        if self._clock is not None:
            self._clock = time.monotonic()
            pauses = self._interval.apart_seconds
            pauses[name] = pauses.get(name, 0.0) + self._clock - start
        self._show()

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes an evaluation's metrics, to the disk: the curves are drawn from there next."""
        self._eval_loss = float(metrics["eval/loss"])
        with writers.tolerant():
            self._writer.write_scalars(step, metrics)
        self.flush()
        logging.info("%s", evaluation_line(step, self._num_train_steps, metrics, width=self._live.width))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps. Call after `settle`; everything reported so far is on disk after it."""
        self.flush()
        return {
            "interval": dataclasses.asdict(self._interval),
            "counts_V": self.counts_V.tolist(),
            "tokens_seen": self.tokens_seen,
            "hours": self._hours(),
            "skipped": [self.skipped, self._skipped_in_a_row],
            "eval_loss": self._eval_loss,
        }

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Tells tensorboard the configuration of a run that begins; what is None is none of its columns."""
        plain = (bool, int, float, str)  # What tensorboard takes.
        told = {
            key: value if isinstance(value, plain) else str(value)
            for key, value in hparams.items()
            if value not in (None, (), []) and not key.startswith(writers.NO_HPARAMS)
        }
        if jax.process_index() == 0:
            writers.lay_out(self._logdir, told)
        self._writer.write_hparams(told)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Shows tensorboard texts, in Markdown."""
        with writers.tolerant():
            self._writer.write_texts(step, texts)

    def flush(self) -> None:
        """Writes to disk what is buffered."""
        with writers.tolerant():
            self._writer.flush()

    def __enter__(self) -> "Reporter":
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(*exc)
        with writers.tolerant():
            self._writer.close()

    def _hours(self) -> float:
        """In the loop, pauses included; what was done again after a restart counts once."""
        return self._hours_before + (0.0 if self._began is None else (time.monotonic() - self._began) / 3600)

    def _update_clock(self) -> None:
        now = time.monotonic()
        if self._clock is not None:
            self._interval.seconds += now - self._clock
            self._clock = now


def peak_flops() -> float | None:
    """Peak FLOP/s of this run's devices; None where no data sheet gives it (CPU)."""
    device = find_device(jax.devices()[0].device_kind)
    return None if device is None else device.peak_flops
