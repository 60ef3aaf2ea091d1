"""A process's share of the documents, one after the other, from any place on."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlm.data import sources

# Documents taken at once end at this many bytes even if they are fewer than asked for: memory stays bounded
# when documents are large.
_MAX_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process reads in an epoch: of each of `shards` the rows first, first + step..."""

    shards: tuple[int, ...]
    first: int = 0
    step: int = 1


def deal(order: np.ndarray, *, process_index: int = 0, process_count: int = 1) -> Share:
    """Deals an epoch's shards to the processes: over all of them every row of every shard once.

    With at least as many shards as processes, process p takes every P-th shard of `order`. With fewer, a
    shard is read by several processes, the same one in every epoch, and its rows are dealt among them.
    """
    num_shards = len(order)
    if num_shards >= process_count:
        return Share(tuple(int(shard) for shard in order[process_index::process_count]))
    shard = process_index % num_shards
    readers = range(shard, process_count, num_shards)
    return Share((shard,), first=readers.index(process_index), step=len(readers))


class Reader:
    """Takes the documents of a share in order.

    Attributes:
        shard, row: the place among the share's shards, and the row there, right after the last document.
    """

    def __init__(self, source: sources.Source, share: Share, *, shard: int = 0, row: int = 0):
        self.shard = shard
        self.row = row
        self._source = source
        self._share = share
        self._arrays: Iterator[pa.LargeStringArray] | None = None
        self._texts = pa.array([], pa.large_string())  # read and not yet taken

    def take(self, num_documents: int) -> pa.LargeStringArray | None:
        """The next `num_documents` texts (null: no text), fewer if they are large; None at the end."""
        step = self._share.step
        parts: list[pa.Array] = []
        count = size = 0
        while count < num_documents and size < _MAX_BYTES and self._fill():
            skipped = (self._share.first - self.row) % step  # rows of other processes before ours
            wanted = np.arange(skipped, len(self._texts), step)[: num_documents - count]
            if len(wanted) == 0:
                self._drop(len(self._texts))
                continue
            mine = self._texts.slice(0, len(wanted)) if step == 1 else self._texts.take(pa.array(wanted))
            ends = np.cumsum(num_bytes(mine))
            # A text is taken if those before it leave room: the same whatever the size of the arrays read.
            taken = min(len(mine), int(np.searchsorted(ends, _MAX_BYTES - size)) + 1)
            parts.append(mine.slice(0, taken))
            count += taken
            size += int(ends[taken - 1])
            self._drop(int(wanted[taken - 1]) + 1)
        return pa.concat_arrays(parts) if parts else None

    def _drop(self, rows: int) -> None:
        self._texts = self._texts.slice(rows)
        self.row += rows

    def _fill(self) -> bool:
        """Reads on until there are rows to take; False at the end of the last shard."""
        while len(self._texts) == 0:
            if self._arrays is None:
                if self.shard == len(self._share.shards):
                    return False
                self._arrays = self._source.read(self._share.shards[self.shard], start_row=self.row)
            texts = next(self._arrays, None)
            if texts is None:
                self.shard, self.row, self._arrays = self.shard + 1, 0, None
            else:
                self._texts = texts
        return True


def has_text(texts: pa.LargeStringArray) -> np.ndarray:
    """bool [N]: neither null, empty nor only white space."""
    return np.asarray(pc.fill_null(pc.greater(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0), False))


def num_bytes(texts: pa.LargeStringArray) -> np.ndarray:
    """int64 [N]: bytes of each text, 0 for null."""
    return np.asarray(pc.fill_null(pc.binary_length(texts), 0))
