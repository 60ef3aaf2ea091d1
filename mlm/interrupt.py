"""Stopping on request: SIGTERM, as machines are told that they are taken away, and SIGINT, as a person says it."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

from mlm import terminal

# What main.py exits with: EX_TEMPFAIL of sysexits.h, "the user is invited to retry". A launch script starts again.
EXIT_INTERRUPTED = 75
# After a second signal, as a shell says of what SIGINT ended.
EXIT_AT_ONCE = 130
# One Ctrl-C reaches a program under `timeout` twice, from the terminal and from there: so soon after the first signal
# another is the same wish. Nobody reads what the first one says, and means another, in less.
_SAME_WISH_SECONDS = 1.0


def leave_at_once() -> None:
    """Has either signal end the process, until an `Interrupt` is entered: there is nothing to lose before that."""

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name}; the same command goes on\n".encode())
        os._exit(EXIT_INTERRUPTED)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


class Interrupted(Exception):  # noqa: N818, it is no error
    """The run was asked to stop, and does; `together` if all its processes do, at the same update."""

    def __init__(self, message: str, *, together: bool = False):
        super().__init__(message)
        self.together = together


class Interrupt:
    """Takes both signals while it is entered, on the main thread. The first one asks; the second one ends the process,
    if it does not come at the same time as the first.

    Python runs a signal's handler only between two of its own instructions, so not while the main thread compiles or
    waits for a device. The second signal must not wait for that: a thread of its own hears both at once, through the
    descriptor that Python writes a signal's number to.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._deferred = False

    def __enter__(self) -> "Interrupt":
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._reader,), name="mlm-interrupt", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.close()  # Ends the thread, which closes the other end.

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

    @staticmethod
    def _listen(reader: socket.socket) -> None:
        first: float | None = None
        with reader:
            while received := reader.recv(16):
                if signal.SIGTERM not in received and signal.SIGINT not in received:
                    continue
                if first is None:
                    first = time.monotonic()
                    logging.getLogger("absl").warning("asked to stop; a second signal stops at once")
                elif time.monotonic() - first > _SAME_WISH_SECONDS:
                    last_words = b"second signal: stopped at once; the same command goes on from the last checkpoint\n"
                    os.write(2, terminal.erasing() + last_words)
                    os._exit(EXIT_AT_ONCE)
