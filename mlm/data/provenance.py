"""The documents that a batch is made of."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class DocumentSpan(NamedTuple):
    """The part of a batch that comes from one document.

    Attributes:
        epoch: the epoch in which the document was read.
        shard, row: the document's location in the source.
        begin, end: units of the batch (see packing.py): begin <= unit < end, counted over all its rows.
    """

    epoch: int
    shard: int
    row: int
    begin: int
    end: int


class ChunkSlice(NamedTuple):
    """Consecutive units of one chunk of documents that went into a batch.

    Attributes:
        epoch: the epoch in which the chunk was read.
        locations: int64 [N, 2], (shard, row) of each document of the chunk.
        offsets: int64 [N + 1], document n of the chunk is units offsets[n] to offsets[n + 1].
        begin, end: units of the chunk: begin <= unit < end.
    """

    epoch: int
    locations: np.ndarray
    offsets: np.ndarray
    begin: int
    end: int


def document_spans(chunk_slices: Sequence[ChunkSlice]) -> list[DocumentSpan]:
    """Returns the documents of a batch that consists of these slices, in order."""
    spans, units_before = [], 0
    for part in chunk_slices:
        first = int(np.searchsorted(part.offsets, part.begin, side="right")) - 1
        last = int(np.searchsorted(part.offsets, part.end, side="left"))
        borders = units_before + np.clip(part.offsets[first : last + 1], part.begin, part.end) - part.begin
        for n, (begin, end) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True), first):
            shard, row = part.locations[n].tolist()
            spans.append(DocumentSpan(part.epoch, shard, row, begin, end))
        units_before += part.end - part.begin
    return spans
