"""The evaluation set, and the documents held out of training because of it."""

import dataclasses
import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlm.data import packing as packing_lib
from mlm.data import reader as reader_lib
from mlm.data.sources.source import Source
from mlm.data.spread import read_units
from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Sequences to evaluate on, and the documents to hold out of training.

    Attributes:
        sequences: int32 [num_sequences, max_seq_length].
        documents: the distinct texts of which a part is in the sequences.
    """

    sequences: np.ndarray
    documents: pa.LargeStringArray


def read_eval_set(
    source: Source,
    tokenizer: Tokenizer,
    *,
    num_sequences: int,
    max_seq_length: int,
    packing: str,
    eval_rows: str,
    allow_fewer: bool = False,
) -> EvalSet:
    """Reads `num_sequences` sequences of the source, the same in every process and run.

    Args:
        source: the documents.
        tokenizer: text to ids.
        num_sequences: how many sequences to read.
        max_seq_length: tokens per sequence.
        packing: one of settings.PACKINGS.
        eval_rows: one of settings.EVAL_ROWS, see spread.py.
        allow_fewer: accept a source that has fewer sequences, but at least one; an incomplete last one is dropped.

    Raises:
        UserError: the source has fewer sequences.
    """
    units_per_row = packing_lib.units_per_row(packing, max_seq_length=max_seq_length)
    parts, documents = [], []
    for texts, part in read_units(
        source,
        num_sequences * units_per_row,
        units_per_row=units_per_row,
        eval_rows=eval_rows,
        is_used=reader_lib.has_text,
        pack=functools.partial(packing_lib.pack, tokenizer=tokenizer, packing=packing, max_seq_length=max_seq_length),
        packs_together=packing == "best_fit",
    ):
        documents.append(texts)
        parts.append(part)
    count = sum(map(len, parts))
    if count < num_sequences * units_per_row and not (allow_fewer and count >= units_per_row):
        raise UserError(
            f"data.num_eval_samples={num_sequences}: the dataset {source.name!r} has only {count // units_per_row} "
            f"sequences of {max_seq_length} tokens; lower it, or add text"
        )
    units = np.concatenate(parts) if parts else np.empty(0, np.int32)
    sequences = units[: count // units_per_row * units_per_row].reshape(-1, max_seq_length)
    texts = pa.concat_arrays(documents) if documents else pa.array([], pa.large_string())
    return EvalSet(sequences, pc.unique(texts))
