"""What a person sees of a run under way: metric files and progress lines."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import metric_writers, periodic_actions

from mlm import parallel
from mlm.curves import read_metrics
from mlm.data.prefetch import Batch
from mlm.errors import UserError
from mlm.models.config import EncoderConfig
from mlm.steps import TrainMetrics
from mlm.workdir import WorkDir

# Peak bfloat16 rate of one device, FLOP/s, from the vendors' data sheets, by `jax.Device.device_kind`; the first
# entry whose name occurs in the kind counts. A v2 or v3 device is one core of a chip.
PEAK_FLOPS = {
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,
    "TPU v2": 22.5e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}


class JsonLinesWriter(metric_writers.MetricWriter):
    """Appends scalars to a file, one line a step: {"step": 250, "train/loss": 7.31, ...}.

    Scalars of one step may come in several calls; the line is written when the next step begins or at `flush`, and
    written over when more come after that.
    """

    def __init__(self, path: str, *, last_step: int):
        """Goes on after `last_step`: later lines, of an interrupted run, are dropped, for they will come again."""
        lines = [line for line in read_metrics(path) if line["step"] <= last_step]
        partial = path + ".tmp"
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        os.replace(partial, path)
        self._path = path
        # The last line may be added to, by an evaluation that was cut off.
        self._line: dict[str, Any] = lines[-1] if lines else {}
        # The file's bytes before that line.
        self._start = os.path.getsize(path) - (len(json.dumps(self._line)) + 1 if lines else 0)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds to the line of `step`."""
        if self._line and self._line["step"] != step:
            self.flush()
            self._line, self._start = {}, os.path.getsize(self._path)
        self._line |= {"step": step} | {name: np.asarray(value).item() for name, value in scalars.items()}

    def flush(self) -> None:
        """Writes the line, whole."""
        if self._line:
            with open(self._path, "r+b") as file:
                file.seek(self._start)
                file.write(json.dumps(self._line).encode() + b"\n")
                file.truncate()

    def close(self) -> None:
        """Writes what is left."""
        self.flush()

    def write_summaries(self, *args: Any, **kwargs: Any) -> None:
        """Scalars only; tensorboard has the rest."""

    write_images = write_videos = write_audios = write_texts = write_histograms = write_hparams = write_summaries


def create_writer(workdir: WorkDir, *, last_step: int) -> metric_writers.MetricWriter:
    """Tensorboard, log and `metrics.jsonl` on process 0, the log alone on others."""
    if jax.process_index() > 0:
        return metric_writers.create_default_writer(just_logging=True)
    return metric_writers.MultiWriter(
        [
            metric_writers.create_default_writer(workdir.path),
            JsonLinesWriter(workdir.metrics, last_step=last_step),
        ]
    )


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
    wait_seconds: float = 0.0


class Reporter:
    """Collects what updates and evaluations give, and tells it to metric files, log and terminal.

    Attributes:
      tokens_seen: tokens of all updates, padding included, over all processes.
      counts_V: int64, how often each id was trained on by process 0, for the unigram model.
    """

    def __init__(
        self,
        workdir: WorkDir,
        *,
        num_train_steps: int,
        vocab_size: int,
        flops_per_token: float,
        profile: Mapping[str, int],
        restored: Mapping[str, Any] | None,
        step: int,
        pad_id: int | None = None,
    ):
        """Goes on at `step`, from what `to_json` gave then (`restored`).

        With a `pad_id` the share of padding in the rows of process 0 is logged; None for rows that never have any.
        """
        restored = restored or {"interval": {}, "counts_V": [0] * vocab_size, "tokens_seen": 0}
        self.tokens_seen: int = restored["tokens_seen"]
        self.counts_V = np.asarray(restored["counts_V"], np.int64)
        self._interval = Interval(**restored["interval"])
        self._writer = create_writer(workdir, last_step=step)
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
        if profile["num_steps"] and jax.process_index() == 0:
            self._hooks.append(
                periodic_actions.Profile(
                    logdir=workdir.path,
                    num_profile_steps=profile["num_steps"],
                    profile_duration_ms=None,  # Else it goes on for 3 s, however few steps are asked for.
                    first_profile=step + profile["first_step"],
                    every_secs=None,
                )
            )

    def update(self, step: int, metrics: TrainMetrics, batch: Batch, *, wait_seconds: float) -> None:
        """Takes an update that was just dispatched; reads the one before, while the devices work on this one.

        `wait_seconds` is how long batches have been waited for, in all.
        """
        if self._clock is None:
            self._clock, self._waited = time.monotonic(), wait_seconds
        self.settle()
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

    def settle(self) -> None:
        """Waits for the update that is under way, if any.

        Raises:
          UserError: its loss or gradient is not a finite number.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        self._metrics = metrics = parallel.first_replica(metrics)
        if not np.isfinite([metrics.sums.loss, metrics.grad_norm]).all():
            raise UserError(
                f"update {step} went wrong: its loss is {metrics.sums.loss / max(metrics.sums.count, 1.0)}, its "
                f"gradient norm {metrics.grad_norm}. The checkpoints before it are kept; go on from them with a lower "
                "optimizer.learning_rate, more warmup_steps or max_grad_norm=1.0"
            )
        self._interval.loss += float(metrics.sums.loss)
        self._interval.correct += float(metrics.sums.correct)
        self._interval.count += float(metrics.sums.count)
        self._lap()

    def log_updates(self, step: int) -> None:
        """Writes the means since the last line and begins the next interval. Call after `settle`."""
        total, seconds = self._interval, max(self._interval.seconds, 1e-9)
        count = max(total.count, 1.0)
        scalars = {
            "train/loss": total.loss / count,
            "train/accuracy": total.correct / count,
            "train/learning_rate": float(self._metrics.learning_rate),
            "train/grad_norm": float(self._metrics.grad_norm),
            "perf/tokens_per_second": total.tokens / seconds,
            "perf/step_ms": 1e3 * seconds / total.steps,
            "perf/input_wait_fraction": min(1.0, total.wait_seconds / seconds),
        }
        scalars |= {"data/epoch": self._batch.epoch}
        scalars |= {f"data/{name}": number for name, number in self._batch.counters.items()}
        if self._pad_id is not None:
            scalars["data/padding_fraction"] = total.padding / max(total.tokens, 1)
        if peak := peak_flops():
            rate = total.tokens * self._flops_per_token / seconds
            scalars["perf/mfu"] = rate / (peak * jax.device_count())
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            scalars["perf/device_memory_bytes"] = memory["peak_bytes_in_use"]
        self._writer.write_scalars(step, scalars)
        logging.info(
            "step %*d of %d   loss %.3f   accuracy %4.1f %%   %s tokens/s   %s left",
            len(str(self._num_train_steps)),
            step,
            self._num_train_steps,
            scalars["train/loss"],
            100 * scalars["train/accuracy"],
            f"{scalars['perf/tokens_per_second']:,.0f}",
            duration((self._num_train_steps - step) * seconds / total.steps),
        )
        skipped = self._batch.counters["skipped_rows"]
        if skipped > self._told_skipped:
            logging.info("%s rows so far were left out: null, empty, not text or not UTF-8", f"{skipped:,}")
            self._told_skipped = skipped
        self._interval = Interval()

    @contextlib.contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Keeps the time of a block out of the updates' time; `ReportProgress` shows its share."""
        self._lap()
        with self._progress.timed(name, wait_jax_async_dispatch=False):
            yield
        if self._clock is not None:
            self._clock = time.monotonic()

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes an evaluation's metrics, to the disk: the curves are drawn from there next."""
        self._writer.write_scalars(step, metrics)
        self._writer.flush()
        logging.info(
            "step %*d of %d   evaluation: loss %.3f (unigram model %.3f)   accuracy %4.1f %%   perplexity %.1f",
            len(str(self._num_train_steps)),
            step,
            self._num_train_steps,
            metrics["eval/loss"],
            metrics["eval/unigram_loss"],
            100 * metrics["eval/accuracy"],
            metrics["eval/perplexity"],
        )

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps. Call after `settle`; everything reported so far is on disk after it."""
        self._writer.flush()
        return {
            "interval": dataclasses.asdict(self._interval),
            "counts_V": self.counts_V.tolist(),
            "tokens_seen": self.tokens_seen,
        }

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Tells tensorboard the run's configuration."""
        plain = (bool, int, float, str)  # What tensorboard takes.
        self._writer.write_hparams({k: v if isinstance(v, plain) else str(v) for k, v in hparams.items()})

    def flush(self) -> None:
        """Writes to disk what is buffered."""
        self._writer.flush()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.close()

    def _lap(self) -> None:
        now = time.monotonic()
        if self._clock is not None:
            self._interval.seconds += now - self._clock
            self._clock = now


def peak_flops() -> float | None:
    """The peak rate of this run's kind of device, FLOP/s; None where no data sheet gives one (CPU)."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def flops_per_token(config: EncoderConfig, *, length: int, slots: int) -> float:
    """Floating-point operations of forward and backward pass that the objective needs, per token of a row.

    Matrix products only, a multiply-add as two, the backward pass as twice the forward pass; the head on the `slots`
    predicted positions of a row of `length` alone.
    """
    width = config.hidden_size
    layer = 4 * width * width + 2 * width * config.intermediate_size + 2 * length * width
    head = width * width + width * config.vocab_size
    return 6.0 * (config.num_hidden_layers * layer + head * slots / length)


def duration(seconds: float) -> str:
    """Seconds as a person says them: "2 d 3 h", "4 h 12 min", "3 min 20 s", "12 s"."""
    seconds = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // small} {small_unit}"
    return f"{seconds} s"
