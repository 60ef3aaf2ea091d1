"""How far a run is, as a line: of the log, and on a terminal one below the log that is written over."""

import dataclasses
import io
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from absl import logging

# Back to the line's begin, and nothing on it.
_ERASE = "\r\x1b[2K"
# Of the live line: as often as an eye can follow, and no more, for the loop's thread draws it.
_SECONDS_BETWEEN = 0.25
# "20:18:10  " of the log.
STAMP = 10


@dataclasses.dataclass(frozen=True)
class Progress:
    """Of the updates since the last line of the log.

    Attributes:
      step, num_train_steps: updates made, and to be made.
      loss: nats a predicted token.
      accuracy: share of them.
      eval_loss: of the newest evaluation; None before the first.
      tokens_per_second: of all devices.
      utilization: share of the devices' peak rate; None where no data sheet gives that (CPU).
      input_wait: share of the time.
      seconds_left: at this speed, without evaluations.
    """

    step: int
    num_train_steps: int
    loss: float
    accuracy: float
    eval_loss: float | None
    tokens_per_second: float
    utilization: float | None
    input_wait: float
    seconds_left: float

    def at(self, step: int, *, eval_loss: float | None) -> "Progress":
        """The same speed and loss at a later step."""
        left = self.seconds_left * (self.num_train_steps - step) / max(self.num_train_steps - self.step, 1)
        return dataclasses.replace(self, step=step, eval_loss=eval_loss, seconds_left=left)

    def line(self, width: int | None = None) -> str:
        """All of it in words; where `width` columns do not hold them, in short, and what then is past it left out."""
        total = self.num_train_steps
        words = [
            f"step {self.step:{len(str(total))}} of {total}",
            f"loss {self.loss:.3f}",
            f"accuracy {100 * self.accuracy:4.1f} %",
            *([] if self.eval_loss is None else [f"evaluation {self.eval_loss:.3f}"]),
            f"{self.tokens_per_second:,.0f} tokens/s",
            *([] if self.utilization is None else [f"{100 * self.utilization:.0f} % of peak"]),
            f"{100 * self.input_wait:.0f} % input wait",
            f"{duration(self.seconds_left)} left",
        ]
        line = "   ".join(words)
        if width is None or len(line) <= width:
            return line
        short = [
            (f"{self.step:{len(str(total))}}/{total}", 0),
            (f"loss {self.loss:.3f}", 0),
            (f"eval {'-' if self.eval_loss is None else f'{self.eval_loss:.3f}'}", 2),
            (f"{_short(self.tokens_per_second)} tok/s", 3),
            ("" if self.utilization is None else f"{100 * self.utilization:.0f}% peak", 4),
            (f"{100 * self.input_wait:.0f}% wait", 5),
            (f"{duration(self.seconds_left).replace(' ', '')} left", 1),
        ]
        return _fitted([part for part in short if part[0]], width)


def evaluation_line(step: int, num_train_steps: int, metrics: Mapping[str, float], *, width: int | None = None) -> str:
    """What an evaluation found, in words; in short where `width` columns do not hold them."""
    loss, unigram, accuracy, perplexity = (
        metrics[f"eval/{name}"] for name in ("loss", "unigram_loss", "accuracy", "perplexity")
    )
    digits = len(str(num_train_steps))
    line = (
        f"step {step:{digits}} of {num_train_steps}   evaluation: loss {loss:.3f} (unigram model {unigram:.3f})   "
        f"accuracy {100 * accuracy:4.1f} %   perplexity {perplexity:.1f}"
    )
    if width is None or len(line) <= width:
        return line
    return f"{step:{digits}}/{num_train_steps}  eval {loss:.3f} (unigram {unigram:.3f})  acc {100 * accuracy:.1f}%"


def _fitted(parts: Sequence[tuple[str, int]], width: int) -> str:
    """Parts in their order, without those that go first (of the highest number) until the rest fits; then cut."""
    gaps = "  " if sum(len(text) + 2 for text, _ in parts) - 2 <= width else " "
    line = gaps.join(text for text, _ in parts)
    if len(line) <= width or len(parts) == 1:
        return line[:width]
    last = max(number for _, number in parts)
    return _fitted([part for part in parts if part[1] != last] or parts[:1], width)


def _short(number: float) -> str:
    """Three digits: 512, 14.7k, 1.23M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: "2 d 3 h", "4 h 12 min", "3 min 20 s", "12 s"."""
    seconds = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // small} {small_unit}"
    return f"{seconds} s"


def erasing() -> bytes:
    """What to write first where the process ends at once, so that its last words do not stand in a live line."""
    return _ERASE.encode() if os.isatty(2) else b""


class LiveLine:
    """A line at the bottom of the terminal, while this is entered; nothing at all where stderr is none.

    Whatever Python writes to stdout and stderr, the log first of all, takes the line's place; it comes again below that
    with the next `show`.
    """

    def __init__(self, *, wanted: bool = True):
        """`wanted`: of several processes only one may have it."""
        self._stream = sys.stderr
        self.alive = wanted and is_terminal(self._stream)
        self._lock = threading.RLock()  # The log is written to by other threads, too.
        self._drawn = False
        self._within = False  # Something else has begun a line, and has not ended it.
        self._next = 0.0

    def __enter__(self) -> "LiveLine":
        if self.alive:
            self._streams = sys.stdout, sys.stderr
            self._handler = logging.get_absl_handler().python_handler
            self._logged_to = self._handler.stream
            if sys.stdout.isatty():
                sys.stdout = _Above(sys.stdout, self)
            sys.stderr = _Above(sys.stderr, self)
            if is_terminal(self._logged_to):
                self._handler.setStream(_Above(self._logged_to, self))
        return self

    def __exit__(self, *exc: object) -> None:
        if self.alive:
            self.erase()
            self.alive = False
            sys.stdout, sys.stderr = self._streams
            self._handler.setStream(self._logged_to)

    @property
    def width(self) -> int | None:
        """Columns for a line of the log, its time aside; None where it need not fit."""
        return _columns(self._stream) - STAMP if self.alive else None

    def due(self) -> bool:
        """Whether to show something now: not so soon after the last time."""
        return self.alive and time.monotonic() >= self._next

    def show(self, progress: Progress, *, busy: str = "") -> None:
        """Draws the line; `busy` is what the run does instead of updates."""
        if not self.alive:
            return
        # The last columns stay free, also for the "^C" that a terminal shows by itself: it must not go past them.
        columns = _columns(self._stream) - 5
        note = f"  {busy} ..." if busy else ""
        self._draw(progress.line(max(columns - len(note), 1)) + note)
        self._next = time.monotonic() + _SECONDS_BETWEEN

    def say(self, text: str) -> None:
        """Draws a line of other words, where there are no figures yet."""
        if self.alive:
            self._draw(text[: max(_columns(self._stream) - 5, 1)])

    def erase(self) -> None:
        """Leaves no trace of the line."""
        self._draw("")

    def _draw(self, text: str) -> None:
        with self._lock:
            if self._within or not (text or self._drawn):
                return
            self._stream.write(_ERASE + text)
            self._stream.flush()
            self._drawn = bool(text)


class _Above(io.TextIOBase):
    """A stream to the terminal, which erases the live line before it writes."""

    def __init__(self, stream: TextIO, line: LiveLine):
        self._wrapped = stream
        self._line = line

    def write(self, text: str) -> int:
        """Writes in the line's place."""
        with self._line._lock:
            self._line.erase()
            if text:
                self._line._within = not text.endswith("\n")
            return self._wrapped.write(text)

    def flush(self) -> None:
        """As the stream itself."""
        self._wrapped.flush()

    def isatty(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """Of the stream itself."""
        return self._wrapped.fileno()

    @property
    def encoding(self) -> str:
        """Of the stream itself."""
        return self._wrapped.encoding


def is_terminal(stream: Any) -> bool:
    """Whether lines of `stream` can be written over."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns
