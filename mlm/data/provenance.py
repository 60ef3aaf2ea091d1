"""The documents that a batch is made of."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlm.data.packing import PackedChunk


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
        chunk: the units.
        begin, end: units of the chunk: begin <= unit < end.
    """

    epoch: int
    locations: np.ndarray
    chunk: PackedChunk
    begin: int
    end: int


def document_spans(chunk_slices: Sequence[ChunkSlice]) -> list[DocumentSpan]:
    """Returns the documents of a batch that consists of these slices, in order."""
    spans, units_before = [], 0
    for part in chunk_slices:
        documents, begins, ends = part.chunk.spans(part.begin, part.end)
        shift = units_before - part.begin
        for (shard, row), begin, end in zip(
            part.locations[documents].tolist(), (begins + shift).tolist(), (ends + shift).tolist(), strict=True
        ):
            spans.append(DocumentSpan(part.epoch, shard, row, begin, end))
        units_before += part.end - part.begin
    return spans
