"""Stopping on request: SIGTERM, which machines send before they are taken away, and SIGINT, which Ctrl-C sends."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from mlm.run.time_limit import TimeLimit

# Exit code of main.py: EX_TEMPFAIL of sysexits.h, "the user is invited to retry". The launch scripts restart the run.
EXIT_INTERRUPTED = 75
# Exit code after a second signal: 128 + SIGINT, as a shell reports it.
EXIT_AT_ONCE = 130
# Under `timeout` one Ctrl-C reaches the program twice, from the terminal and from `timeout`. A signal that follows the
# first one this quickly is a duplicate: nobody reads the first message and presses Ctrl-C again in less time.
_DUPLICATE_SIGNAL_SECONDS = 1.0


def exit_on_signal() -> None:
    """Makes both signals end the process, until an `Interrupt` is entered: before that there is nothing to save."""

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name}; rerun the same command to resume\n".encode())
        os._exit(EXIT_INTERRUPTED)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


@contextlib.contextmanager
def signal_listener(callback: Callable[[int], None]) -> Iterator[None]:
    """Inside, a thread calls `callback` with the number of every SIGTERM and SIGINT. Enter it on the main thread.

    Python runs a signal's handler only between two bytecode instructions of the main thread, so not while that compiles
    or waits for a device or another host. The thread reads from the file descriptor that Python writes signal numbers
    to as soon as they arrive.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        with reader:
            while received := reader.recv(1):
                if received[0] in (signal.SIGTERM, signal.SIGINT):
                    callback(received[0])

    threading.Thread(target=listen, name="mlm-signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # Ends the thread, which closes the other end.


class Interrupted(BaseException):
    """The run stops because it was asked to.

    Like KeyboardInterrupt, not an Exception, so that `except Exception` in a library does not catch it.

    Attributes:
      on_all_processes: whether all processes stop, after the same step.
    """

    def __init__(self, message: str, *, on_all_processes: bool = False):
        super().__init__(message)
        self.on_all_processes = on_all_processes


class Interrupt:
    """Handles both signals while it is entered, on the main thread.

    The first signal requests a stop. A second one ends the process at once, even where Python cannot run a signal
    handler (see `signal_listener`), unless it is a duplicate of the first.

    Raises:
      Interrupted: a stop is requested; also instead of the error that a library made of it.

    Attributes:
      requested: name of the signal that requested a stop; None before that.
      time_limit: requests a stop, too, when it is near.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.time_limit: TimeLimit | None = None
        self._is_deferred = False
        self._has_raised = False
        self._first_time: float | None = None

    def __enter__(self) -> "Interrupt":
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        self._listener = signal_listener(self._on_signal)
        self._listener.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._listener.__exit__(None, None, None)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        # Native code that calls Python, such as gigatoken's, raises an error of its own for any exception.
        if self._has_raised and isinstance(error, Exception):
            self.check()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets `requested`; outside it raises `Interrupted` wherever the program is."""
        self._is_deferred = True
        try:
            # A signal may have arrived just before.
            self.check()
            yield
        finally:
            self._is_deferred = False

    @property
    def reason(self) -> str | None:
        """The cause of a requested stop: the name of a signal or "max_hours=12.0"; None if nothing does."""
        if self.requested is None and self.time_limit is not None and self.time_limit.is_near():
            return f"max_hours={self.time_limit.hours}"
        return self.requested

    def check(self) -> None:
        """Raises Interrupted if a stop is requested."""
        if reason := self.reason:
            raise Interrupted(f"stopped by {reason}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self.requested is None
        self.requested = self.requested or signal.Signals(number).name
        # Raising again would interrupt the clean-up after the first exception.
        if is_first and not self._is_deferred:
            self._has_raised = True
            self.check()

    def _on_signal(self, number: int) -> None:
        if self._first_time is None:
            self._first_time = time.monotonic()
            logging.getLogger("absl").warning("stop requested; a second signal stops at once")
        elif time.monotonic() - self._first_time > _DUPLICATE_SIGNAL_SECONDS:
            # On a terminal the message starts below the progress line.
            message = b"second signal: stopped at once; rerun the same command to resume from the last checkpoint\n"
            os.write(2, (b"\n" if os.isatty(2) else b"") + message)
            os._exit(EXIT_AT_ONCE)
