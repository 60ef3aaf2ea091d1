"""Texts as token ids of limited length, and sequences of unequal length as batches of few shapes."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tqdm import tqdm

from mlm.data.tokenizer import Tokenizer, text_only

# Tokens in a batch: enough for full use of a CPU's cores, and little memory.
_BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N sequences of token ids, with begin and end tokens.

    Attributes:
      ids: N lists.
      types: N lists of token types: 1 for the second text of a pair.
      encodings: N encodings of `tokenizers`, which also know words and offsets.
      num_truncated: number of sequences that were cut to the limit.
    """

    ids: list[list[int]]
    types: list[list[int]]
    encodings: list[tokenizers.Encoding]
    num_truncated: int

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: Tokenizer, texts: Sequence[str] | Sequence[tuple[str, str]], *, max_length: int) -> Sequences:
    """Encodes texts, or pairs of texts in the tokenizer's form for pairs; longer ones are cut to `max_length` tokens.

    Names of special tokens in a text are text, as in training. Of a pair, the longer text is cut.
    """
    backend = text_only(tokenizer.hf.backend_tokenizer)
    backend.enable_truncation(max_length, strategy="longest_first")
    encoded = backend.encode_batch([_valid(text) for text in texts])
    return Sequences(
        ids=[encoding.ids for encoding in encoded],
        types=[encoding.type_ids for encoding in encoded],
        encodings=encoded,
        num_truncated=sum(bool(encoding.overflowing) for encoding in encoded),
    )


def _valid(text: Any) -> Any:
    """Replaces lone surrogates, which JSON may have and UTF-8 has not, in a text or in a pair of texts."""
    if isinstance(text, str):
        return text.encode("utf-8", "replace").decode()
    return tuple(map(_valid, text))


def batches(
    lengths: Sequence[int], *, max_length: int, rows_multiple: int = 1
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields (numbers of sequences, rows of the batch, length) for batches of sequences of similar length.

    Lengths are rounded by `_rounded`, and each length has a fixed number of rows, so that few shapes are compiled.

    Args:
      lengths: number of tokens of each sequence.
      max_length: the model's limit.
      rows_multiple: the number of rows is a multiple of this, the number of devices.
    """
    rounded = np.array([_rounded(int(length), max_length) for length in lengths], int)
    for length in np.unique(rounded)[::-1].tolist():  # The longest first: an error for lack of memory comes at once.
        rows = max(1, _BATCH_TOKENS // length // rows_multiple) * rows_multiple
        numbers = np.flatnonzero(rounded == length)
        for start in range(0, len(numbers), rows):
            yield numbers[start : start + rows], rows, length


def padded_length(lengths: Iterable[int], *, max_length: int) -> int:
    """Returns the length of a batch of all sequences, a multiple of 8 up to the limit."""
    return min(-(-max(lengths) // 8) * 8, max_length)


def _rounded(length: int, max_length: int) -> int:
    """Returns the next of 16, 32, 48, 64, 96, 128, 192, ...: at most a third is padding, from 32 tokens on."""
    size = max(16, 1 << (length - 1).bit_length())  # A power of 2.
    if size > 32 and length <= size * 3 // 4:
        size = size * 3 // 4
    return min(size, max_length)


def padded(rows: Iterable[Sequence[int]], *, shape: tuple[int, int], value: int) -> np.ndarray:
    """Returns int32 [shape]: the rows, then `value`."""
    array = np.full(shape, value, np.int32)
    for number, row in enumerate(rows):
        array[number, : len(row)] = row
    return array


def progress_bar(total: int, label: str) -> tqdm:
    """Returns a bar on stderr that disappears at the end; nothing is shown unless stderr is a terminal."""
    return tqdm(total=total, desc=label, leave=False, disable=None)
