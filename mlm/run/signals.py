"""Stopping on request: SIGTERM, as machines are told that they are taken away, and SIGINT, as a person says it."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from mlm.reporting import progress

# What main.py exits with: EX_TEMPFAIL of sysexits.h, "the user is invited to retry". A launch script starts again.
EXIT_INTERRUPTED = 75
# After a second signal, as a shell says of what SIGINT ended.
EXIT_AT_ONCE = 130
# One Ctrl-C reaches a program under `timeout` twice, from the terminal and from there: so soon after the first signal
# another is the same wish. Nobody reads what the first one says, and means another, in less.
_DUPLICATE_SIGNAL_SECONDS = 1.0


def exit_on_signal() -> None:
    """Has either signal end the process, until an `Interrupt` is entered: there is nothing to lose before that."""

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name}; the same command goes on\n".encode())
        os._exit(EXIT_INTERRUPTED)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


@contextlib.contextmanager
def signal_listener(hear: Callable[[int], None]) -> Iterator[None]:
    """Inside, a thread calls `hear` with the number of every SIGTERM and SIGINT, at once. Enter it on the main thread.

    Python runs a signal's handler only between two of its own instructions, so not while the main thread compiles or
    waits for a device or another host. The thread listens to the descriptor that Python writes a signal's number to.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        with reader:
            while received := reader.recv(1):
                if received[0] in (signal.SIGTERM, signal.SIGINT):
                    hear(received[0])

    threading.Thread(target=listen, name="mlm-interrupt", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # Ends the thread, which closes the other end.


class Interrupted(Exception):  # noqa: N818, it is no error
    """The run was asked to stop, and does; `together` if all its processes do, at the same update."""

    def __init__(self, message: str, *, together: bool = False):
        super().__init__(message)
        self.together = together


class Interrupt:
    """Takes both signals while it is entered, on the main thread. The first one asks; the second one ends the process,
    if it does not come at the same time as the first.

    The second signal must not wait until Python runs its handler: see `hearing`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._deferred = False
        self._first: float | None = None  # When the first signal was heard.

    def __enter__(self) -> "Interrupt":
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        self._hearing = signal_listener(self._hear)
        self._hearing.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hearing.__exit__(None, None, None)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets `requested`; elsewhere it raises `Interrupted` wherever the program is."""
        self._deferred = True
        try:
            # One that came just before.
            self.check()
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted(f"stopped by {self.requested}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self.requested is None
        self.requested = self.requested or signal.Signals(number).name
        # Raised again, it would break off what the program does on its way out.
        if is_first and not self._deferred:
            self.check()

    def _hear(self, number: int) -> None:
        if self._first is None:
            self._first = time.monotonic()
            logging.getLogger("absl").warning("asked to stop; a second signal stops at once")
        elif time.monotonic() - self._first > _DUPLICATE_SIGNAL_SECONDS:
            last_words = b"second signal: stopped at once; the same command goes on from the last checkpoint\n"
            os.write(2, progress.erasing() + last_words)
            os._exit(EXIT_AT_ONCE)
