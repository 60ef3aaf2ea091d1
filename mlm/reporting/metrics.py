"""Sums of metrics and timings over steps, and the scalars logged from them. Uses no devices, files or clocks."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlm.data.prefetch import Batch
from mlm.data.tokenizer import without_word_starts
from mlm.masking import MaskCounts
from mlm.steps import TrainMetrics


@dataclasses.dataclass
class Interval:
    """Sums over the steps since the last log line.

    Attributes:
      loss, correct, predicted: of the steps that were not skipped; `predicted` counts tokens.
      mask_counts: of all steps, by the names of `MaskCounts`.
      seconds: time of the steps, without pauses.
      part_seconds: parts of `seconds`: input_wait, transfer (of batches to the devices) and device.
      pause_seconds: time of evaluations, saves and so on, by name.
    """

    loss: float = 0.0
    correct: float = 0.0
    predicted: float = 0.0
    mask_counts: dict[str, float] = dataclasses.field(
        default_factory=lambda: {field.name: 0.0 for field in dataclasses.fields(MaskCounts)}
    )
    steps: int = 0
    tokens: int = 0
    padding: int = 0
    unknown: int = 0
    seconds: float = 0.0
    part_seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"input_wait": 0.0, "transfer": 0.0, "device": 0.0}
    )
    pause_seconds: dict[str, float] = dataclasses.field(default_factory=dict)


class MetricsAccumulator:
    """Accumulates metrics and timings. Its state is in every checkpoint, so a resumed run logs the same lines.

    Attributes:
      interval: sums since the last log line.
      counts_V: int64, how often each token id was trained on by this process, for the unigram model.
      tokens_seen: tokens of all steps and processes, padding included.
      seconds: time in the training loop, pauses included; steps repeated after a restart count once.
      skipped_steps, consecutive_skipped_steps: all steps skipped so far, and those since the last one that was not.
      eval_loss: loss of the newest evaluation; None before the first.
      peak_tokens_per_second: rate of all devices at 100 % utilization; None if unknown.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_processes: int = 1,
        pad_id: int | None = None,
        unknown_id: int | None = None,
        state: Mapping[str, Any] | None = None,
    ):
        """Starts from `state`, which `to_json` returned, or from zero.

        Args:
          vocab_size: number of token ids.
          num_processes: processes of the run, each with as many tokens per step as this one.
          pad_id: the padding id, to log the fraction of padding; None if sequences are never padded.
          unknown_id: the id of the unknown token, to log its fraction of the tokens that are no padding; None if there
            is none.
          state: JSON state.
        """
        state = dict(state or {})
        self.interval = Interval(**state.get("interval", {}))
        self.counts_V = np.array(state.get("counts_V", [0] * vocab_size), np.int64)
        self.tokens_seen: int = state.get("tokens_seen", 0)
        self.seconds: float = state.get("seconds", 0.0)
        self.skipped_steps: int = state.get("skipped_steps", 0)
        self.consecutive_skipped_steps: int = state.get("consecutive_skipped_steps", 0)
        self.eval_loss: float | None = state.get("eval_loss")
        self._num_processes = num_processes
        self._pad_id = pad_id
        self._unknown_id = unknown_id
        self.peak_tokens_per_second: float | None = None
        self._newest: tuple[TrainMetrics, Batch] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the state."""
        return {
            "interval": dataclasses.asdict(self.interval),
            "counts_V": self.counts_V.tolist(),
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "skipped_steps": self.skipped_steps,
            "consecutive_skipped_steps": self.consecutive_skipped_steps,
            "eval_loss": self.eval_loss if self.eval_loss is not None and math.isfinite(self.eval_loss) else None,
        }

    def add_step(self, metrics: TrainMetrics, batch: Batch) -> None:
        """Adds the metrics of a step, fetched to the host, and its batch."""
        interval = self.interval
        if metrics.skipped:
            self.skipped_steps += 1
            self.consecutive_skipped_steps += 1
        else:
            self.consecutive_skipped_steps = 0
            interval.loss += float(metrics.sums.loss)
            interval.correct += float(metrics.sums.correct)
            interval.predicted += float(metrics.sums.count)
        for name in interval.mask_counts:
            interval.mask_counts[name] += float(getattr(metrics.mask_counts, name))
        counts_V = np.bincount(without_word_starts(batch.tokens).ravel(), minlength=len(self.counts_V))
        tokens = batch.tokens.size * self._num_processes
        self.counts_V += counts_V
        self.tokens_seen += tokens
        interval.tokens += tokens
        interval.steps += 1
        if self._pad_id is not None:
            interval.padding += int(counts_V[self._pad_id]) * self._num_processes
        if self._unknown_id is not None:
            interval.unknown += int(counts_V[self._unknown_id]) * self._num_processes
        self._newest = metrics, batch

    def add_seconds(self, seconds: float) -> None:
        """Adds time of the steps."""
        self.seconds += seconds
        self.interval.seconds += seconds

    def add_part(self, name: str, seconds: float) -> None:
        """Records how much of the steps' time was input_wait, transfer or device; the rest is the host's."""
        self.interval.part_seconds[name] += seconds

    def add_pause(self, name: str, seconds: float) -> None:
        """Adds time in which training paused, such as that of an evaluation."""
        self.seconds += seconds
        pauses = self.interval.pause_seconds
        pauses[name] = pauses.get(name, 0.0) + seconds

    @property
    def has_scalars(self) -> bool:
        """Whether there are metrics: none before the first step of an interval, or after a resume."""
        return self._newest is not None and self.interval.steps > 0

    def scalars(self) -> dict[str, float]:
        """Returns the metrics of the interval. Call only if `has_scalars`."""
        assert self._newest is not None
        metrics, batch = self._newest
        interval, seconds = self.interval, max(self.interval.seconds, 1e-9)
        tokens_per_second = interval.tokens / seconds
        scalars: dict[str, float] = {
            "train/learning_rate": float(metrics.learning_rate),
            "train/skipped_steps": self.skipped_steps,
            "data/tokens": self.tokens_seen,
            "data/epoch": batch.epoch,
            "perf/hours": self.seconds / 3600,
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_ms": 1e3 * seconds / interval.steps,
            "perf/input_wait_fraction": min(1.0, interval.part_seconds["input_wait"] / seconds),
        }
        if interval.predicted:  # Zero if all steps were skipped.
            scalars["train/loss"] = interval.loss / interval.predicted
            scalars["train/accuracy"] = interval.correct / interval.predicted
        if np.isfinite(metrics.grad_norm):
            scalars["train/grad_norm"] = float(metrics.grad_norm)
        masks = interval.mask_counts
        scalars["data/masked_fraction"] = masks["predicted"] / max(masks["maskable"], 1.0)
        for name in ("mask_replaced", "random_replaced"):
            scalars[f"data/{name}_fraction"] = masks[name] / max(masks["predicted"], 1.0)
        if self._pad_id is not None:
            scalars["data/padding_fraction"] = interval.padding / max(interval.tokens, 1)
        if self._unknown_id is not None:
            scalars["data/unknown_fraction"] = interval.unknown / max(interval.tokens - interval.padding, 1)
        if self.peak_tokens_per_second is not None:
            scalars["perf/mfu"] = tokens_per_second / self.peak_tokens_per_second
        host_seconds = max(0.0, seconds - sum(interval.part_seconds.values()))
        parts = interval.part_seconds | {"host": host_seconds}
        scalars |= {f"perf/{name}_ms": 1e3 * part / interval.steps for name, part in parts.items()}
        scalars |= {f"perf/{name}_ms": 1e3 * pause for name, pause in interval.pause_seconds.items()}
        return scalars | {f"data/{name}": count for name, count in batch.counters.items()}

    def start_interval(self) -> None:
        """Starts the next interval, after a log line."""
        self.interval = Interval()
