"""Reads the documents of a process's shard slices, several slices at once, from any position on.

Up to `interleave_shards` slices are open at the same time. `take` reads from them in turn, in rounds: each open slice
gives an equal part of the documents and bytes still needed, the slice read last comes last in the next round, and a
slice that ends is replaced by the next one. So what `take` returns depends on the position and the documents only, not
on the sizes of the arrays that the source yields. With one open slice the documents come in order.

If the network fails for longer than its deadline (sources/retry.py), the remaining rows of that shard are skipped for
the rest of the epoch, and reading continues with the other ones. Each skip is logged and counted. A process skips at
most `max_failed_shards` shards in an epoch, and at most that many in succession; after that the stream raises a
UserError, once the batches made before it are used.

The row at which a shard failed becomes the `end` of its slice, and slices are part of the saved position. So a resumed
run makes the same batches, even if the shard can be read again; the next epoch reads the complete shard. The window in
which a checkpoint lies must be read completely on resuming: if a shard were skipped there, partly used batches would
change. If it cannot be read, the run does not start, and the checkpoint stays.

Not reproducible: if the network fails after a checkpoint, a resumed run may skip other rows. After a reassignment to
another number of processes, the skipped rows stay skipped for that epoch.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from mlm.data.shard_assignment import START, Cursor, ShardSlice
from mlm.data.sources.source import ShardUnavailableError, Source
from mlm.errors import UserError

# Default size of a window.
MAX_BYTES = 64 << 20
# Slices opened at the same time: opening waits for the network, or seeks a row in a compressed file.
_PARALLEL_SLICES = 8


@dataclasses.dataclass
class ShardFailureBudget:
    """The number of shards that a process may skip, and of its consecutive skips; lives as long as the stream."""

    max_failed_shards: int = 0
    consecutive_failures: int = 0


class _OpenSlice:
    """A shard slice that is being read.

    Attributes:
        index: index of the slice.
        row: row of its shard right after the last document taken.
        texts: rows from `row` on that were read but not taken yet.
        error: why it could not be read; None after the error is handled.
    """

    def __init__(self, source: Source, part: ShardSlice, *, index: int, row: int):
        self.index = index
        self.row = max(row, part.start)
        self.texts = pa.array([], pa.large_string())
        self.error: ShardUnavailableError | None = None
        self._source = source
        self._part = part
        self._arrays: Iterator[pa.LargeStringArray] | None = None

    def read(self) -> None:
        """Reads until there are rows to take; there are none at the end of the slice, or with an `error`."""
        end = self._part.end
        while len(self.texts) == 0 and self.error is None and (end is None or self.row < end):
            if self._arrays is None:
                self._arrays = self._source.read(self._part.shard, start_row=self.row)
            try:
                texts = next(self._arrays, None)
            except ShardUnavailableError as error:
                self.error, self._arrays = error, None
                return
            if texts is None:
                return
            self.texts = texts if end is None else texts.slice(0, end - self.row)

    def advance(self, num_rows: int) -> None:
        """Drops the first rows."""
        self.texts = self.texts.slice(num_rows)
        self.row += num_rows


class Reader:
    """Reads the documents of shard slices.

    Args:
        source: the documents.
        slices: what to read.
        cursor: position to start from.
        interleave_shards: maximum number of open slices.
        max_bytes: `take` returns fewer documents than asked for once they have this many bytes, so memory stays bounded
            when documents are large.
        failure_budget: shards that may be skipped; none by default.

    Attributes:
        slices: what is read; the slice of a skipped shard gets an `end`.
        locations: int64 [N, 2], (shard, row) of each document that `take` returned last.
        failed_shards: number of shards skipped by this reader.
        may_skip: False while every row must be read, and a failing shard is a UserError.
    """

    def __init__(
        self,
        source: Source,
        slices: Sequence[ShardSlice],
        *,
        cursor: Cursor = START,
        interleave_shards: int = 1,
        max_bytes: int = MAX_BYTES,
        failure_budget: ShardFailureBudget | None = None,
    ):
        self.slices = tuple(slices)
        self.locations = np.empty((0, 2), np.int64)
        self.failed_shards = 0
        self.may_skip = True
        self._source = source
        self._interleave_shards = interleave_shards
        self._max_bytes = max_bytes
        self._failure_budget = failure_budget or ShardFailureBudget()
        self._open = deque(self._open_slice(index, row) for index, row in cursor.open_slices)
        self._next_slice = cursor.slice_index
        self._next_row = cursor.row

    @property
    def cursor(self) -> Cursor:
        """The position right after the last document taken."""
        open_slices = tuple((part.index, part.row) for part in self._open)
        # With one open slice, the cursor has the form of format version 1.
        if self._interleave_shards == 1 and open_slices:
            return Cursor(*open_slices[0])
        return Cursor(self._next_slice, self._next_row, open_slices)

    def take(self, num_documents: int) -> pa.LargeStringArray | None:
        """Returns the next `num_documents` texts (null: no text), fewer if they are large; None at the end."""
        parts: list[pa.Array] = []
        locations: list[np.ndarray] = []
        count = size = 0
        while count < num_documents and size < self._max_bytes and self._open_slices():
            num_open = len(self._open)
            documents_each = -(-(num_documents - count) // num_open)
            bytes_each = -(-(self._max_bytes - size) // num_open)
            for _ in range(num_open):
                wanted, room = min(documents_each, num_documents - count), min(bytes_each, self._max_bytes - size)
                if wanted <= 0 or room <= 0:
                    break
                current = self._open.popleft()
                while wanted > 0 and room > 0 and self._read(current):
                    texts, rows, num_bytes_taken = self._take_read(current, wanted, room)
                    if len(texts) == 0:
                        continue
                    parts.append(texts)
                    locations.append(np.stack([np.full_like(rows, self.slices[current.index].shard), rows], axis=1))
                    wanted, room = wanted - len(texts), room - num_bytes_taken
                    count, size = count + len(texts), size + num_bytes_taken
                if wanted <= 0 or room <= 0:  # Otherwise the slice has ended.
                    self._open.append(current)
        if not parts:
            return None
        self.locations = np.concatenate(locations)
        return pa.concat_arrays(parts)

    def _take_read(
        self, current: _OpenSlice, num_documents: int, max_bytes: int
    ) -> tuple[pa.LargeStringArray, np.ndarray, int]:
        """Takes documents that are read already: at least one, unless all of them belong to other processes.

        Returns:
            texts: the documents.
            rows: int64 [N], their rows in the shard.
            num_bytes: their size.
        """
        part = self.slices[current.index]
        before_first = (part.offset - current.row) % part.stride  # Rows of other processes.
        indices = np.arange(before_first, len(current.texts), part.stride)[:num_documents]
        if len(indices) == 0:
            current.advance(len(current.texts))
            return current.texts, indices, 0
        texts = current.texts.slice(0, len(indices)) if part.stride == 1 else current.texts.take(pa.array(indices))
        # A text is taken if the texts before it leave room.
        ends = np.cumsum(num_bytes(texts))
        taken = min(len(texts), int(np.searchsorted(ends, max_bytes)) + 1)
        rows = current.row + indices[:taken]
        current.advance(int(indices[taken - 1]) + 1)
        return texts.slice(0, taken), rows, int(ends[taken - 1])

    def _open_slices(self) -> bool:
        """Opens slices up to the maximum number; returns False at the end of the last slice."""
        while len(self._open) < self._interleave_shards and self._next_slice < len(self.slices):
            self._open.append(self._open_slice(self._next_slice, self._next_row))
            self._next_slice, self._next_row = self._next_slice + 1, 0
        waiting = [part for part in self._open if len(part.texts) == 0]
        if len(waiting) > 1 and (self._source.retry_policy is not None or any(part.row for part in waiting)):
            with ThreadPoolExecutor(_PARALLEL_SLICES, thread_name_prefix="mlm-reader") as pool:
                list(pool.map(_OpenSlice.read, waiting))
            # One failure of the network may concern all of them, but counts once: the others are tried again.
            for part in [part for part in waiting if part.error is not None][1:]:
                part.error = None
        return bool(self._open)

    def _open_slice(self, index: int, row: int) -> _OpenSlice:
        return _OpenSlice(self._source, self.slices[index], index=index, row=row)

    def _read(self, current: _OpenSlice) -> bool:
        """Reads until there are rows to take; returns False at the end of the slice."""
        was_empty = len(current.texts) == 0
        current.read()
        if current.error is not None:
            self._skip_rest_of_shard(current, current.error)
            return False
        if was_empty and len(current.texts):
            self._failure_budget.consecutive_failures = 0
        return len(current.texts) > 0

    def _skip_rest_of_shard(self, current: _OpenSlice, error: ShardUnavailableError) -> None:
        """Ends the slice at its current row, or raises UserError."""
        if not self.may_skip:
            raise UserError(
                f"cannot resume the data stream: {error}; rerun the same command when the shard can be read"
            ) from None
        self._failure_budget.consecutive_failures += 1
        slices = list(self.slices)
        slices[current.index] = slices[current.index]._replace(end=current.row)
        failed = max(self._failure_budget.consecutive_failures, sum(part.end is not None for part in slices))
        allowed = self._failure_budget.max_failed_shards
        if failed > allowed:
            raise UserError(
                f"{error}; rerun the same command when the shard can be read "
                f"(failed shard {failed}, data.max_failed_shards={allowed})"
            ) from None
        logging.warning("%s; skipped for the rest of the epoch (%d of at most %d shards)", error, failed, allowed)
        self.slices = tuple(slices)
        self.failed_shards += 1


def has_text(texts: pa.LargeStringArray) -> np.ndarray:
    """Returns bool [N]: False for null, empty and white space only."""
    return np.asarray(pc.fill_null(pc.greater(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0), False))


def num_bytes(texts: pa.LargeStringArray) -> np.ndarray:
    """Returns int64 [N]: the bytes of each text, 0 for null."""
    if len(texts) == 0:
        return np.empty(0, np.int64)
    sizes = np.diff(np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1])
    return np.where(np.asarray(texts.is_valid()), sizes, 0) if texts.null_count else sizes
