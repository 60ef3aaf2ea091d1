"""Stopping before a time limit, such as that of a Slurm job."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

# Seconds per hour of the limit that are kept for a save or an evaluation that has not happened yet.
_UNKNOWN_SECONDS_PER_HOUR = 18.0


class TimeLimit:
    """Decides when a run must save its last checkpoint so that it is complete before the limit.

    The margin is twice the time that the last save, the last evaluation with its export, and the last step took.
    """

    def __init__(self, hours: float, *, start: float | None = None, clock: Callable[[], float] = time.monotonic):
        """Creates a limit.

        Args:
          hours: the limit after `start`; 0 for none.
          start: time of the clock at the start of the process; None to ask the system.
          clock: seconds.
        """
        self.hours = hours
        self._clock = clock
        self._end = (process_start() if start is None else start) + 3600 * hours
        self._seconds = dict.fromkeys(("save", "evaluation"), _UNKNOWN_SECONDS_PER_HOUR * hours) | {"step": 0.0}
        self._last_step: float | None = None
        self._evaluation_seconds = 0.0  # Since the last step.

    def is_near(self) -> bool:
        """Returns whether the run must stop now; never before its first step, or it would not get any further."""
        if not self.hours or self._last_step is None:
            return False
        return self._clock() >= self._end - 2 * sum(self._seconds.values())

    def add_step(self, *, save_seconds: float | None) -> None:
        """Measures the time since the last call, a step. Call it after each.

        Args:
          save_seconds: how long the last save took, until its checkpoint was complete; None if there was none.
        """
        now = self._clock()
        if self._last_step is not None:
            self._seconds["step"] = now - self._last_step - self._evaluation_seconds
        if self._evaluation_seconds:
            self._seconds["evaluation"] = self._evaluation_seconds
        self._last_step, self._evaluation_seconds = now, 0.0
        if save_seconds is not None:
            self._seconds["save"] = save_seconds

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measures a block, an evaluation or its export."""
        before = self._clock()
        yield
        self._evaluation_seconds += self._clock() - before


def process_start() -> float:
    """Returns when this process was started, in seconds of `time.monotonic`."""
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        # Field 22 counts clock ticks since boot; field 2 is the name in parentheses, which may contain spaces.
        ticks = int(file.read().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age
