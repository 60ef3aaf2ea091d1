"""Which documents a batch is made of."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class DocumentSpan(NamedTuple):
    """What a batch has of a document.

    Attributes:
        epoch, shard, row: which pass over the source, and the document's place in it.
        begin, end: its units of the batch: tokens, rows after each other; or rows when padding.
    """

    epoch: int
    shard: int
    row: int
    begin: int
    end: int


class ChunkSlice(NamedTuple):
    """Consecutive units of one chunk of documents that went into a batch.

    Attributes:
        epoch: which pass over the source.
        places: int64 [N or more, 2], shard and row of each document of the chunk.
        offsets: int64 [N + 1], units of the chunk where its documents begin and end.
        begin, end: units of the chunk.
    """

    epoch: int
    places: np.ndarray
    offsets: np.ndarray
    begin: int
    end: int


def documents(parts: Sequence[ChunkSlice]) -> list[DocumentSpan]:
    """The documents of a batch that is made of these parts, in order."""
    found, before = [], 0
    for part in parts:
        first = int(np.searchsorted(part.offsets, part.begin, side="right")) - 1
        last = int(np.searchsorted(part.offsets, part.end, side="left"))
        units = before + np.clip(part.offsets[first : last + 1], part.begin, part.end) - part.begin
        for n, (begin, end) in enumerate(zip(units[:-1].tolist(), units[1:].tolist(), strict=True), first):
            found.append(DocumentSpan(part.epoch, *part.places[n].tolist(), begin, end))
        before += part.end - part.begin
    return found
