"""Ragged token ids -> units: tokens of an endless run to be cut in rows, or whole rows.

Everything is vectorised over the documents of a chunk; nothing is carried from one chunk to the next. A row
that is not full at a chunk's end is the stream's business, which knows it as a position (document, unit).
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlm.data import tokenizer as tokenizer_lib

PACKINGS = ("concatenate", "pad", "pad_lines", "isolate")
# Those whose documents run on over row borders: their rows hold no padding.
CONCATENATING = ("concatenate", "isolate")


@dataclasses.dataclass(frozen=True)
class PackedChunk:
    """What some documents come to, in order.

    Attributes:
        data: int32 [U] tokens (RUN_ON) or [U, L] rows ("pad", "pad_lines"), U the number of units.
        offsets: int64 [N + 1]; document n is units offsets[n] to offsets[n + 1].
    """

    data: np.ndarray
    offsets: np.ndarray


def units_per_row(packing: str, *, max_seq_length: int) -> int:
    """How many units make one row of `max_seq_length` tokens."""
    return max_seq_length if packing in CONCATENATING else 1


def pack(texts: pa.Array, tokenizer: "tokenizer_lib.Tokenizer", *, packing: str, max_seq_length: int) -> PackedChunk:
    """Tokenizes N documents (strings without nulls) and lays begin and end tokens around them.

    "concatenate" gives `<s> document </s>` runs, and so does "isolate": the model finds the documents again by
    their begin tokens (mlm/models/encoder.py). "pad" gives a row a document and "pad_lines" a row for every line
    that is not blank, each cut to `max_seq_length` with `</s>` kept last, or filled up with the pad id.
    """
    if packing in CONCATENATING:
        return concatenate(*tokenizer.encode(texts), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    if packing == "pad_lines":
        texts, offsets = _lines(texts)
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
    """Ragged ids [T] with offsets [N + 1] -> Units of T + 2N tokens, begin and end tokens in place."""
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
    """Ragged ids [T] with offsets [N + 1] -> int32 [N, max_seq_length], a text a row."""
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


def _lines(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The lines of documents that are not blank, and offsets [N + 1] of the documents among them."""
    split = pc.split_pattern(texts, "\n")
    lines = pc.utf8_rtrim(split.flatten(), "\r")
    blank = pc.utf8_trim_whitespace(lines)
    kept = np.asarray(pc.greater(pc.binary_length(blank), 0))
    before = np.concatenate([[0], np.cumsum(kept)])
    offsets = before[np.asarray(split.offsets) - split.offsets[0].as_py()]
    return lines.filter(pa.array(kept)), offsets.astype(np.int64)
