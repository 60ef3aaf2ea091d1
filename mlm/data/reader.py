"""A process's share of the documents, one after the other, from any place on.

Where the network fails for longer than its deadline (network.py), the further rows of the shard are set aside for the
rest of the epoch, and reading goes on with the next shard. At most `max_failed_shards` are, in one epoch of one process
and one after the other; past that the stream ends with a UserError, after the batches made before it. Lines in the
log name them, and a counter counts them.

The row where a shard broke off becomes the end of its piece, and pieces are part of the saved position. So a resume
makes the same documents of it, and the same batches, although the shard may well be whole by then; the next
epoch reads it whole. What is read to find the window again in which a checkpoint lies must come whole: setting it aside
would change batches that were half used. If it does not come, the run does not start, and the checkpoint stays.
What no state can promise: where the network will fail after a checkpoint. Dealt anew to another number of processes,
what was set aside stays so for the epoch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from mlm.data.shard_assignment import ShardSlice
from mlm.data.sources import source as sources
from mlm.errors import UserError

# Documents taken at once end at this many bytes even if they are fewer than asked for: memory stays bounded
# when documents are large.
_MAX_BYTES = 64 << 20


@dataclasses.dataclass
class ShardFailureBudget:
    """What a process may do without, over all its epochs, and what it just did."""

    max_failed_shards: int = 0
    in_a_row: int = 0


class Reader:
    """Takes the documents of some pieces in order.

    Attributes:
        shard, row: the place among the pieces, and the row of that shard, right after the last document.
        places: int64 [N, 2], shard of the source and row there of each document last taken.
        pieces: what is read; a shard that is set aside gets an end.
        failed_shards: set aside by this reader.
        exact: whether no shard may be set aside just now.
    """

    def __init__(
        self,
        source: sources.Source,
        pieces: Sequence[ShardSlice],
        *,
        shard: int = 0,
        row: int = 0,
        losses: ShardFailureBudget | None = None,
    ):
        self.shard = shard
        self.row = row
        self.places = np.empty((0, 2), np.int64)
        self._source = source
        self.pieces = tuple(pieces)
        self.failed_shards = 0
        self.exact = False
        self._losses = losses or ShardFailureBudget()
        self._arrays: Iterator[pa.LargeStringArray] | None = None
        self._texts = pa.array([], pa.large_string())  # read and not yet taken

    def take(self, num_documents: int) -> pa.LargeStringArray | None:
        """The next `num_documents` texts (null: no text), fewer if they are large; None at the end."""
        parts: list[pa.Array] = []
        places: list[np.ndarray] = []
        count = size = 0
        while count < num_documents and size < _MAX_BYTES and self._fill():
            piece = self.pieces[self.shard]
            step = piece.step
            skipped = (piece.first - self.row) % step  # rows of other processes before ours
            wanted = np.arange(skipped, len(self._texts), step)[: num_documents - count]
            if len(wanted) == 0:
                self._drop(len(self._texts))
                continue
            mine = self._texts.slice(0, len(wanted)) if step == 1 else self._texts.take(pa.array(wanted))
            ends = np.cumsum(num_bytes(mine))
            # A text is taken if those before it leave room: the same whatever the size of the arrays read.
            taken = min(len(mine), int(np.searchsorted(ends, _MAX_BYTES - size)) + 1)
            parts.append(mine.slice(0, taken))
            rows = self.row + wanted[:taken]
            places.append(np.stack([np.full_like(rows, piece.shard), rows], axis=1))
            count += taken
            size += int(ends[taken - 1])
            self._drop(int(wanted[taken - 1]) + 1)
        if not parts:
            return None
        self.places = np.concatenate(places)
        return pa.concat_arrays(parts)

    def _drop(self, rows: int) -> None:
        self._texts = self._texts.slice(rows)
        self.row += rows

    def _fill(self) -> bool:
        """Reads on until there are rows to take; False at the end of the last shard."""
        while len(self._texts) == 0:
            if self.shard == len(self.pieces):
                return False
            piece = self.pieces[self.shard]
            if self._arrays is None:
                self.row = max(self.row, piece.start)
                self._arrays = self._source.read(piece.shard, start_row=self.row)
            texts = None
            if piece.end is None or self.row < piece.end:
                try:
                    texts = next(self._arrays, None)
                except sources.ShardLostError as lost:
                    self._skip_shard(lost)
            if texts is None:
                self.shard, self.row, self._arrays = self.shard + 1, 0, None
            else:
                self._texts = texts if piece.end is None else texts.slice(0, piece.end - self.row)
                self._losses.in_a_row = 0
        return True

    def _skip_shard(self, lost: sources.ShardLostError) -> None:
        """Ends the piece under way here, or raises UserError."""
        if self.exact:
            raise UserError(f"cannot resume the data stream: {lost}; start again when it can be read") from None
        self._losses.in_a_row += 1
        before, piece, after = self.pieces[: self.shard], self.pieces[self.shard], self.pieces[self.shard + 1 :]
        pieces = (*before, piece._replace(end=self.row), *after)
        failed = max(self._losses.in_a_row, sum(piece.end is not None for piece in pieces))
        allowed = self._losses.max_failed_shards
        if failed > allowed:
            raise UserError(
                f"{lost}; it is number {failed} of the shards to fail and data.max_failed_shards={allowed}: "
                "start again when it can be read"
            ) from None
        logging.warning("%s; it is set aside for the rest of the epoch (%d of at most %d)", lost, failed, allowed)
        self.pieces = pieces
        self.failed_shards += 1


def has_text(texts: pa.LargeStringArray) -> np.ndarray:
    """bool [N]: neither null, empty nor only white space."""
    return np.asarray(pc.fill_null(pc.greater(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0), False))


def num_bytes(texts: pa.LargeStringArray) -> np.ndarray:
    """int64 [N]: bytes of each text, 0 for null."""
    return np.asarray(pc.fill_null(pc.binary_length(texts), 0))
