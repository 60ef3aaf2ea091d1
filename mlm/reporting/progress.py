"""Progress as a line of the log, and as a live line at the bottom of a terminal."""

import contextlib
import os
import sys
from collections.abc import Mapping

from absl import logging
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

_SECONDS_BETWEEN_DRAWS = 0.25


def step_line(
    step: int, num_train_steps: int, metrics: Mapping[str, float], *, eval_loss: float | None, seconds_left: float
) -> str:
    """Returns the log line of the steps since the last one: `metrics` as in metrics.jsonl."""
    parts = [f"step {step:{len(str(num_train_steps))}} of {num_train_steps}"]
    if "train/loss" in metrics:
        parts += [f"loss {metrics['train/loss']:.3f}", f"accuracy {100 * metrics['train/accuracy']:4.1f} %"]
    if eval_loss is not None:
        parts.append(f"eval loss {eval_loss:.3f}")
    parts.append(f"{metrics['perf/tokens_per_second']:,.0f} tokens/s")
    if "perf/mfu" in metrics:
        parts.append(f"{100 * metrics['perf/mfu']:.0f} % of peak")
    parts.append(f"{100 * metrics['perf/input_wait_fraction']:.0f} % input wait")
    parts.append(f"{duration(seconds_left)} left")
    return "   ".join(parts)


def evaluation_line(step: int, num_train_steps: int, metrics: Mapping[str, float]) -> str:
    """Returns the log line of an evaluation."""
    return (
        f"step {step:{len(str(num_train_steps))}} of {num_train_steps}   evaluation: loss {metrics['eval/loss']:.3f} "
        f"(unigram model {metrics['eval/unigram_loss']:.3f})   accuracy {100 * metrics['eval/accuracy']:4.1f} %   "
        f"perplexity {metrics['eval/perplexity']:.1f}{_tasks(metrics)}"
    )


def _tasks(metrics: Mapping[str, float]) -> str:
    """Returns the accuracies of probes and minimal pairs."""
    parts = [(name.split("/"), value) for name, value in metrics.items() if name.startswith(("probe/", "pairs/"))]
    return "".join(f"   {kind} {name} {100 * value:.1f} %" for (kind, name, _), value in parts)


def live_text(metrics: Mapping[str, float], *, eval_loss: float | None, seconds_left: float) -> str:
    """Returns the text of the live line, the most important first: a narrow terminal cuts off its end."""
    parts = [f"loss {metrics['train/loss']:.3f}"] if "train/loss" in metrics else []
    if eval_loss is not None:
        parts.append(f"eval {eval_loss:.3f}")
    parts.append(f"{tqdm.format_sizeof(metrics['perf/tokens_per_second'])} tok/s")
    parts.append(f"{duration(seconds_left)} left")
    if "perf/mfu" in metrics:
        parts.append(f"{100 * metrics['perf/mfu']:.0f}% peak")
    parts.append(f"{100 * metrics['perf/input_wait_fraction']:.0f}% input wait")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Formats seconds with two units: "2 d 3 h", "4 h 12 min", "3 min 20 s", "12 s"."""
    seconds = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // small} {small_unit}"
    return f"{seconds} s"


class LiveLine:
    """A tqdm bar at the bottom of the terminal, while entered; the log and prints appear above it.

    Without a terminal on stderr it does nothing.

    Attributes:
      enabled: whether there is a terminal to draw on.
    """

    def __init__(self, num_train_steps: int, *, step: int, enabled: bool = True):
        """Starts at `step`; `enabled=False` for all processes but one."""
        self.enabled = enabled and sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
        self._num_train_steps = num_train_steps
        self._step = step
        self._activity = ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "LiveLine":
        if not self.enabled:
            return self
        self._bar = self._stack.enter_context(
            tqdm(
                total=self._num_train_steps,
                initial=self._step,
                file=sys.stderr,
                bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
                mininterval=_SECONDS_BETWEEN_DRAWS,
                miniters=1,
                dynamic_ncols=True,
                leave=False,
            )
        )
        above_line = DummyTqdmFile(sys.stderr)
        handler = logging.get_absl_handler().python_handler
        if handler.stream.isatty():
            self._stack.callback(handler.setStream, handler.stream)
            handler.setStream(above_line)
        if sys.stdout.isatty():
            self._stack.enter_context(contextlib.redirect_stdout(above_line))
        self._stack.enter_context(contextlib.redirect_stderr(above_line))
        return self

    def __exit__(self, *exc: object) -> None:
        self.enabled = False
        self._stack.close()

    def show(self, step: int, text: str, *, activity: str = "") -> None:
        """Draws the line, at most four times a second unless `activity` changes: what the run does instead of steps."""
        if not self.enabled:
            return
        self._bar.set_description_str(f"{activity}: " if activity else "", refresh=False)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        if activity != self._activity:
            self._activity = activity
            self._bar.refresh()
