"""Batches made ahead of the training loop, in a background thread."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mlm.data.mixture import BatchStream

# Time between calls of `on_wait`.
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch, and the state of the stream right after it.

    Attributes:
        tokens: int32 [batch_rows, max_seq_length], C-contiguous.
        state: the stream's `state_dict()` after this batch, to be saved with the model.
        epoch: epoch of the batch's last row.
        counters: the stream's counters after this batch.
    """

    tokens: np.ndarray
    state: dict[str, Any]
    epoch: int
    counters: dict[str, int]


class Prefetcher:
    """Iterates a stream up to `depth` batches ahead. A context manager; closing it stops the thread.

    Attributes:
        wait_seconds: how long the caller has been blocked in `__next__` so far.
    """

    def __init__(self, stream: BatchStream, *, depth: int, on_wait: Callable[[], None] = lambda: None):
        """Starts the thread.

        Args:
            stream: used by the thread only, from here on.
            depth: number of batches to have ready.
            on_wait: called several times a second while `__next__` waits; an exception it raises ends the wait.
        """
        assert depth >= 1, depth
        self.wait_seconds = 0.0
        self._stream = stream
        self._depth = depth
        self._on_wait = on_wait
        self._batches: collections.deque[Batch] = collections.deque()
        self._error: BaseException | None = None
        self._closed = False
        # Guards the three fields above, and is notified of their changes.
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._produce, name="mlm-prefetch", daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        try:
            for tokens in self._stream:
                batch = Batch(tokens, self._stream.state_dict(), self._stream.epoch, self._stream.counters)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._batches) < self._depth)
                    if self._closed:
                        return
                    self._batches.append(batch)
                    self._changed.notify_all()
            error: BaseException = StopIteration()
        except BaseException as raised:  # Raised again in the caller's thread, whatever it is.
            error = raised
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Waits for the next batch. Raises what the stream raised, after the batches before it."""
        start = time.perf_counter()
        try:
            with self._changed:
                while not self._changed.wait_for(
                    lambda: self._batches or self._error is not None or self._closed, timeout=_POLL_SECONDS
                ):
                    self._on_wait()
                if self._closed:
                    raise ValueError("the prefetcher is closed")
                if not self._batches:
                    assert self._error is not None
                    raise self._error
                batch = self._batches.popleft()
                self._changed.notify_all()
                return batch
        finally:
            self.wait_seconds += time.perf_counter() - start

    def close(self, *, timeout: float = 10.0) -> None:
        """Stops the thread, or abandons it if it hangs in a read for longer than `timeout` seconds. Idempotent."""
        with self._changed:
            self._closed = True
            self._batches.clear()
            self._changed.notify_all()
        self._thread.join(timeout)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
