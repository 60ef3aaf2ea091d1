"""Packs complete documents into rows by best fit (Ding et al., 2024, arXiv:2404.10830).

A document that fits into a row is never cut. Longer ones are first cut into segments that fill a row, and the rest.
Then the segments, the longest first, go into the fullest row in which they fit, else into a new one: best-fit
decreasing. A segment begins with the begin token, so the model isolates it like a document; what is left of a row is
padding.

Each chunk of documents is packed by itself. Its rows are permuted, because best fit returns rows of long documents
first. So a position in the data is the first document of a chunk and the number of its rows that are used. If the row
length changes in between, neighboring segments in the unused rows are joined and packed again.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# Bytes of text that are packed together; the order of the rows depends on it. Larger chunks have less padding, because
# the last rows of a chunk are not full.
CHUNK_BYTES = 2 << 20


@dataclasses.dataclass(frozen=True)
class Segments:
    """Parts of documents, sorted by row.

    Attributes:
        rows: int64 [P], sorted.
        documents: int64 [P], the number of the document.
        begins, ends: int64 [P], token range in the chunk; without the begin token, which every segment gets.
        num_cut: number of documents that were cut.
    """

    rows: np.ndarray
    documents: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    num_cut: int


def pack(
    tokens: np.ndarray,
    offsets: np.ndarray,
    *,
    max_seq_length: int,
    pad_id: int,
    seed: Sequence[int] | None,
    repacked: Sequence[tuple[int, int]] = (),
) -> tuple[np.ndarray, Segments]:
    """Packs N documents.

    Args:
        tokens: int32 [T], the documents one after the other, with begin and end tokens.
        offsets: int64 [N + 1], document n is tokens offsets[n] to offsets[n + 1].
        max_seq_length: L, tokens per row.
        pad_id: fills the rows.
        seed: seed for the order of the rows; None to sort them by their first documents.
        repacked: (max_seq_length, rows used) for each time that these documents were packed before.

    Returns:
        rows_RxL: int32.
        segments: what is in them.
    """
    # Without their begin tokens.
    documents, begins, ends = np.arange(len(offsets) - 1), offsets[:-1] + 1, offsets[1:]
    for length, num_used in repacked:
        segments = _assign_rows(documents, begins, ends, max_seq_length=length, seed=seed)
        documents, begins, ends = _join(segments, first_row=num_used)
    segments = _assign_rows(documents, begins, ends, max_seq_length=max_seq_length, seed=seed)
    return _fill_rows(tokens, segments, max_seq_length=max_seq_length, pad_id=pad_id), segments


def _assign_rows(
    documents: np.ndarray, begins: np.ndarray, ends: np.ndarray, *, max_seq_length: int, seed: Sequence[int] | None
) -> Segments:
    """Cuts parts of documents that are too long for a row, and chooses a row for each segment."""
    room = max_seq_length - 1  # Without the begin token.
    counts = -(-(ends - begins) // room)
    ends = np.repeat(ends, counts)
    number = np.arange(len(ends)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(begins, counts) + number * room
    documents = np.repeat(documents, counts)
    ends = np.minimum(begins + room, ends)
    sizes = ends - begins + 1
    longest_first = np.argsort(-sizes, kind="stable")
    rows, num_rows = _best_fit(sizes[longest_first], max_seq_length)
    if seed is not None:
        new_row = np.random.default_rng(seed).permutation(num_rows)
    else:
        first_document = np.full(num_rows, np.iinfo(np.int64).max)
        np.minimum.at(first_document, rows, documents[longest_first])
        new_row = np.argsort(np.argsort(first_document, kind="stable"))
    rows = new_row[rows]
    by_row = np.argsort(rows, kind="stable")
    order = longest_first[by_row]
    return Segments(rows[by_row], documents[order], begins[order], ends[order], num_cut=int((counts > 1).sum()))


def _best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Puts sizes, sorted from `capacity` downwards, into bins; returns the bin of each, and the number of bins."""
    num_bins = int(np.searchsorted(-sizes, -capacity, side="right"))
    bins = list(range(num_bins))
    bins_by_room: list[list[int]] = [[] for _ in range(capacity)]
    has_bins = 0  # Bit r is set if a bin has room for r.
    for size in sizes[num_bins:].tolist():
        if fitting := has_bins >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                has_bins ^= 1 << room
        else:
            room, chosen = capacity, num_bins
            num_bins += 1
        bins.append(chosen)
        bins_by_room[room - size].append(chosen)
        has_bins |= 1 << (room - size)
    return np.array(bins, np.int64), num_bins


def _join(segments: Segments, *, first_row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joins neighboring segments in the rows from `first_row` on; returns their documents, begins and ends."""
    left = np.flatnonzero(segments.rows >= first_row)
    left = left[np.argsort(segments.begins[left])]
    documents, begins, ends = segments.documents[left], segments.begins[left], segments.ends[left]
    # Between two documents there is a begin token.
    is_boundary = np.concatenate([[True], begins[1:] != ends[:-1], [True]])
    is_first, is_last = is_boundary[: len(left)], is_boundary[1:][: len(left)]
    return documents[is_first], begins[is_first], ends[is_last]


def _fill_rows(tokens: np.ndarray, segments: Segments, *, max_seq_length: int, pad_id: int) -> np.ndarray:
    """Returns int32 [R, L], the rows."""
    num_rows = int(segments.rows[-1]) + 1 if len(segments.rows) else 0
    filled = np.full(num_rows * max_seq_length, pad_id, np.int32)
    sizes = segments.ends - segments.begins + 1
    sizes_before = np.cumsum(sizes) - sizes
    first_of_row = np.searchsorted(segments.rows, np.arange(num_rows))
    starts = segments.rows * max_seq_length + sizes_before - sizes_before[first_of_row][segments.rows]
    # Token t of all segments, begin tokens included, goes to where its segment starts plus its number in the segment.
    number = np.arange(sizes.sum()) - np.repeat(sizes_before, sizes)
    filled[np.repeat(starts, sizes) + number] = tokens[np.repeat(segments.begins - 1, sizes) + number]
    if len(starts):
        filled[starts] = tokens[0]  # The begin token; the token before a later segment of a document is another one.
    return filled.reshape(num_rows, max_seq_length)
