"""Ragged token ids -> units, which rows are made of.

A unit is the smallest amount that moves from documents to rows: a token where documents are concatenated, a complete
row where documents (or lines) are padded. L units make a row of L tokens in the first case, one unit in the second.

Everything is vectorized over the documents of a chunk, and no state is kept between chunks: the stream joins the units
of successive chunks into rows, and knows its position as (document, unit). best_fit.py packs a chunk by best fit: its
rows count as units of the chunk's first document.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlm.data import best_fit
from mlm.data.tokenizer import Tokenizer

# The packings that cut rows from a sequence of concatenated documents: their rows hold no padding.
CONCATENATING = ("concatenate", "isolate")


@dataclasses.dataclass(frozen=True)
class PackedChunk:
    """The units of some documents, in order.

    Attributes:
        data: int32, U units: [U] tokens (`CONCATENATING`) or [U, L] rows.
        offsets: int64 [N + 1], document n is units offsets[n] to offsets[n + 1].
        segments: where the documents are if rows have parts of several ("best_fit"); else None.
    """

    data: np.ndarray
    offsets: np.ndarray
    segments: best_fit.Segments | None = None

    def spans(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds the documents in the units from `begin` to `end`, in order.

        Returns:
            documents, begins, ends: int64 [S], document documents[s] has units begins[s] to ends[s].
        """
        if self.segments is not None:
            first, last = np.searchsorted(self.segments.rows, [begin, end])
            rows = self.segments.rows[first:last]
            return self.segments.documents[first:last], rows, rows + 1
        first = int(np.searchsorted(self.offsets, begin, side="right")) - 1
        last = int(np.searchsorted(self.offsets, end, side="left"))
        boundaries = np.clip(self.offsets[first : last + 1], begin, end)
        return np.arange(first, last), boundaries[:-1], boundaries[1:]


def units_per_row(packing: str, *, max_seq_length: int) -> int:
    """Returns how many units make one row of `max_seq_length` tokens."""
    return max_seq_length if packing in CONCATENATING else 1


def pack(
    texts: pa.Array,
    tokenizer: Tokenizer,
    *,
    packing: str,
    max_seq_length: int,
    seed: Sequence[int] | None = None,
    repacked: Sequence[tuple[int, int]] = (),
) -> PackedChunk:
    """Tokenizes N documents (strings without nulls) and adds begin and end tokens.

    "concatenate" and "isolate" give `<s> document </s><s> document </s>...`; with "isolate" the model separates the
    documents again by their begin tokens. "pad" gives one row per document and "pad_lines" one per line that is not
    blank, truncated to `max_seq_length` with `</s>` as the last token, or filled up with the padding id. "best_fit" is
    explained in best_fit.py.

    Args:
        texts: the documents.
        tokenizer: text to ids.
        packing: one of settings.PACKINGS.
        max_seq_length: L.
        seed: seed for the order of rows with "best_fit"; None to sort them by their first documents.
        repacked: with "best_fit", (max_seq_length, rows used) for each time that these documents were packed before.
    """
    if packing in CONCATENATING or packing == "best_fit":
        chunk = concatenate(*tokenizer.encode(texts), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        if packing in CONCATENATING:
            return chunk
        rows, segments = best_fit.pack(
            chunk.data,
            chunk.offsets,
            max_seq_length=max_seq_length,
            pad_id=tokenizer.pad_id,
            seed=seed,
            repacked=repacked,
        )
        offsets = np.full(len(texts) + 1, len(rows))
        offsets[0] = 0
        return PackedChunk(rows, offsets, segments)
    if packing == "pad_lines":
        texts, offsets = _split_lines(texts)
    else:
        offsets = np.arange(len(texts) + 1, dtype=np.int64)
    rows = pad(
        *tokenizer.encode(texts),
        max_seq_length=max_seq_length,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    return PackedChunk(rows, offsets)


def concatenate(ids: np.ndarray, offsets: np.ndarray, *, bos_id: int, eos_id: int) -> PackedChunk:
    """Ragged ids [T] with offsets [N + 1] -> T + 2N units: tokens with begin and end tokens around each document."""
    num_documents = len(offsets) - 1
    unit_offsets = offsets + 2 * np.arange(num_documents + 1, dtype=np.int64)
    tokens = np.empty(unit_offsets[-1], np.int32)
    is_text = np.ones(len(tokens), bool)
    is_text[unit_offsets[:-1]] = False
    is_text[unit_offsets[1:] - 1] = False
    tokens[unit_offsets[:-1]] = bos_id
    tokens[unit_offsets[1:] - 1] = eos_id
    tokens[is_text] = ids
    return PackedChunk(tokens, unit_offsets)


def pad(
    ids: np.ndarray, offsets: np.ndarray, *, max_seq_length: int, bos_id: int, eos_id: int, pad_id: int
) -> np.ndarray:
    """Ragged ids [T] with offsets [N + 1] -> int32 [N, max_seq_length], one row per text."""
    lengths = np.minimum(np.diff(offsets), max_seq_length - 2)
    columns = np.arange(max_seq_length, dtype=np.int64)
    rows = np.full((len(lengths), max_seq_length), pad_id, np.int32)
    rows[:, 0] = bos_id
    # Column c of a row holds token c - 1 of its text.
    is_text = (columns >= 1) & (columns <= lengths[:, None])
    source = offsets[:-1, None] + columns - 1
    rows[is_text] = ids[source[is_text]]
    rows[np.arange(len(lengths)), lengths + 1] = eos_id
    return rows


def _split_lines(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Returns the lines that are not blank, and offsets [N + 1] of the documents among them."""
    split = pc.split_pattern(texts, "\n")
    lines = pc.utf8_rtrim(split.flatten(), "\r")
    has_text = np.asarray(pc.greater(pc.binary_length(pc.utf8_trim_whitespace(lines)), 0))
    lines_before = np.concatenate([[0], np.cumsum(has_text)])
    offsets = lines_before[np.asarray(split.offsets) - split.offsets[0].as_py()]
    return lines.filter(pa.array(has_text)), offsets.astype(np.int64)
