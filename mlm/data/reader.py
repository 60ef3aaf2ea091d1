"""Reads the documents of a process's shard slices in order, from any row on.

If the network fails for longer than its deadline (sources/retry.py), the remaining rows of that shard are skipped for
the rest of the epoch, and reading continues with the next shard. Each skip is logged and counted. A process skips at
most `max_failed_shards` shards in an epoch, and at most that many in succession; after that the stream raises a
UserError, once the batches made before it are used.

The row at which a shard failed becomes the `end` of its slice, and slices are part of the saved position. So a resumed
run makes the same batches, even if the shard can be read again; the next epoch reads the complete shard. The window in
which a checkpoint lies must be read completely on resuming: if a shard were skipped there, batches that are half used
would change. If it cannot be read, the run does not start, and the checkpoint stays.

Not reproducible: where the network fails after a checkpoint. After a reassignment to another number of processes, the
skipped rows stay skipped for that epoch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from mlm.data.shard_assignment import ShardSlice
from mlm.data.sources.source import ShardUnavailableError, Source
from mlm.errors import UserError

# `take` returns fewer documents than asked for once they have this many bytes: memory stays bounded when documents are
# large.
_MAX_BYTES = 64 << 20


@dataclasses.dataclass
class ShardFailureBudget:
    """The number of shards a process may skip, and of consecutive skips so far; kept as long as the stream."""

    max_failed_shards: int = 0
    consecutive_failures: int = 0


class Reader:
    """Reads the documents of shard slices in order.

    Attributes:
        slices: what is read; the slice of a skipped shard gets an `end`.
        slice_index, row: index of the current slice, and the row of its shard right after the last document.
        locations: int64 [N, 2], (shard, row) of each document that `take` returned last.
        failed_shards: number of shards skipped by this reader.
        may_skip: False while every row must be read, and a failing shard is a UserError.
    """

    def __init__(
        self,
        source: Source,
        slices: Sequence[ShardSlice],
        *,
        slice_index: int = 0,
        row: int = 0,
        failure_budget: ShardFailureBudget | None = None,
    ):
        self.slices = tuple(slices)
        self.slice_index = slice_index
        self.row = row
        self.locations = np.empty((0, 2), np.int64)
        self.failed_shards = 0
        self.may_skip = True
        self._source = source
        self._failure_budget = failure_budget or ShardFailureBudget()
        self._arrays: Iterator[pa.LargeStringArray] | None = None
        self._texts = pa.array([], pa.large_string())  # Read, and not taken yet.

    def take(self, num_documents: int) -> pa.LargeStringArray | None:
        """Returns the next `num_documents` texts (null: no text), fewer if they are large; None at the end."""
        parts: list[pa.Array] = []
        locations: list[np.ndarray] = []
        count = size = 0
        while count < num_documents and size < _MAX_BYTES and self._fill():
            current = self.slices[self.slice_index]
            before_first = (current.offset - self.row) % current.stride  # Rows of other processes.
            indices = np.arange(before_first, len(self._texts), current.stride)[: num_documents - count]
            if len(indices) == 0:
                self._advance(len(self._texts))
                continue
            texts = self._texts.slice(0, len(indices)) if current.stride == 1 else self._texts.take(pa.array(indices))
            ends = np.cumsum(num_bytes(texts))
            # A text is taken if those before it leave room, so the result does not depend on the sizes of the arrays
            # that the source yields.
            taken = min(len(texts), int(np.searchsorted(ends, _MAX_BYTES - size)) + 1)
            parts.append(texts.slice(0, taken))
            rows = self.row + indices[:taken]
            locations.append(np.stack([np.full_like(rows, current.shard), rows], axis=1))
            count += taken
            size += int(ends[taken - 1])
            self._advance(int(indices[taken - 1]) + 1)
        if not parts:
            return None
        self.locations = np.concatenate(locations)
        return pa.concat_arrays(parts)

    def _advance(self, num_rows: int) -> None:
        self._texts = self._texts.slice(num_rows)
        self.row += num_rows

    def _fill(self) -> bool:
        """Reads until there are rows to take; returns False at the end of the last slice."""
        while len(self._texts) == 0:
            if self.slice_index == len(self.slices):
                return False
            current = self.slices[self.slice_index]
            if self._arrays is None:
                self.row = max(self.row, current.start)
                self._arrays = self._source.read(current.shard, start_row=self.row)
            texts = None
            if current.end is None or self.row < current.end:
                try:
                    texts = next(self._arrays, None)
                except ShardUnavailableError as error:
                    self._skip_rest_of_shard(error)
            if texts is None:
                self.slice_index, self.row, self._arrays = self.slice_index + 1, 0, None
            else:
                self._texts = texts if current.end is None else texts.slice(0, current.end - self.row)
                self._failure_budget.consecutive_failures = 0
        return True

    def _skip_rest_of_shard(self, error: ShardUnavailableError) -> None:
        """Ends the current slice at the current row, or raises UserError."""
        if not self.may_skip:
            raise UserError(
                f"cannot resume the data stream: {error}; run the same command when it can be read"
            ) from None
        self._failure_budget.consecutive_failures += 1
        slices = list(self.slices)
        slices[self.slice_index] = slices[self.slice_index]._replace(end=self.row)
        failed = max(self._failure_budget.consecutive_failures, sum(part.end is not None for part in slices))
        allowed = self._failure_budget.max_failed_shards
        if failed > allowed:
            raise UserError(
                f"{error}; run the same command when it can be read "
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
    return np.asarray(pc.fill_null(pc.binary_length(texts), 0))
