"""Cuts long documents into pieces before a shuffle window is permuted, so that a book does not fill a batch."""

import numpy as np
import pyarrow as pa

from mlm.data.reader import has_text, num_bytes
from mlm.settings import MIN_PIECE_BYTES

# Every byte of these is a character by itself in UTF-8.
WHITESPACE = (b" ", b"\n", b"\t", b"\r")


def cut(
    texts: pa.LargeStringArray, is_used_N: np.ndarray, *, max_bytes: int, separators: tuple[bytes, ...] = WHITESPACE
) -> tuple[pa.LargeStringArray, np.ndarray, np.ndarray]:
    """Cuts documents of more than `max_bytes` into about equal pieces, which add up to the document.

    A piece ends before the last separator that keeps it within `max_bytes`, or between characters if there is none.

    Args:
        texts: N documents.
        is_used_N: bool, False for documents that need not be cut.
        max_bytes: maximum size of a piece, at least MIN_PIECE_BYTES.
        separators: bytes before which a document may be cut.

    Returns:
        pieces: P texts, which share the memory of `texts`.
        documents_P: int64, the document of each piece, sorted.
        is_used_P: bool, False also for pieces of white space.
    """
    assert max_bytes >= MIN_PIECE_BYTES, max_bytes
    is_long_N = is_used_N & (num_bytes(texts) > max_bytes)
    if not is_long_N.any():
        return texts, np.arange(len(texts)), is_used_N
    _, offsets_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = memoryview(data_buffer)
    num_pieces_N = np.ones(len(texts), np.int64)
    boundaries: list[int] = []
    for number in np.flatnonzero(is_long_N).tolist():
        cuts = _cuts(data, *offsets[number : number + 2].tolist(), max_bytes=max_bytes, separators=separators)
        num_pieces_N[number] += len(cuts)
        boundaries += cuts
    offsets_P = np.sort(np.concatenate([offsets, np.array(boundaries, np.int64)]))
    pieces = pa.Array.from_buffers(
        pa.large_string(), len(offsets_P) - 1, [None, pa.py_buffer(offsets_P.tobytes()), data_buffer]
    )
    documents_P = np.repeat(np.arange(len(texts)), num_pieces_N)
    is_used_P = is_used_N[documents_P]
    of_long = np.flatnonzero(is_long_N[documents_P])
    is_used_P[of_long] = has_text(pieces.take(pa.array(of_long)))
    return pieces, documents_P, is_used_P


def _cuts(data: memoryview, begin: int, end: int, *, max_bytes: int, separators: tuple[bytes, ...]) -> list[int]:
    """Returns the positions at which data[begin:end] is cut."""
    cuts = []
    while (rest := end - begin) > max_bytes:
        size = -(-rest // -(-rest // max_bytes))
        block = bytes(data[begin + 1 : begin + size + 1])
        found = max(block.rfind(separator) for separator in separators)
        if found >= 0:
            begin += 1 + found
        else:
            begin += size
            while data[begin] & 0xC0 == 0x80:  # Within a character.
                begin -= 1
        cuts.append(begin)
    return cuts
