"""Batches made ahead of the training loop, in a background thread."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from mlm.data import stream as stream_lib


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch, and the stream as it stood right after it.

    Attributes:
        tokens: int32 [batch_rows, max_seq_length], C-contiguous.
        state: the stream's `state_dict()` after this batch: what to save with the model.
        epoch: of the batch's last row.
        counters: the stream's counters after this batch.
    """

    tokens: np.ndarray
    state: dict
    epoch: int
    counters: dict[str, int]


class Prefetcher:
    """Iterates a stream up to `depth` batches ahead. A context manager; closing it ends the thread.

    Attributes:
        wait_seconds: how long the caller has been blocked in `__next__`, cumulative.
    """

    def __init__(self, stream: "stream_lib.RowStream", *, depth: int, interrupted: Callable[[], None] = lambda: None):
        """`interrupted` is called now and then while no batch comes; what it raises ends the waiting."""
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self.wait_seconds = 0.0
        self._stream = stream
        self._depth = depth
        self._interrupted = interrupted
        self._batches: collections.deque[Batch] = collections.deque()
        self._error: BaseException | None = None
        self._closed = False
        # Guards the three fields above; notified at every change of them.
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
        except BaseException as raised:  # whatever it is, it belongs to the caller, who raises it
            error = raised
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch, waited for. Raises what the stream raised, after the batches before that."""
        start = time.perf_counter()
        try:
            with self._changed:
                while not self._changed.wait_for(
                    lambda: self._batches or self._error is not None or self._closed, timeout=0.2
                ):
                    self._interrupted()
                if self._closed:
                    raise ValueError("the prefetcher is closed")
                if not self._batches:
                    raise self._error
                batch = self._batches.popleft()
                self._changed.notify_all()
                return batch
        finally:
            self.wait_seconds += time.perf_counter() - start

    def close(self, *, timeout: float = 10.0) -> None:
        """Ends the thread, or gives up on one that hangs in a read after `timeout` seconds. Idempotent."""
        with self._changed:
            self._closed = True
            self._batches.clear()
            self._changed.notify_all()
        self._thread.join(timeout)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
