"""The evaluation set, and the documents held out of training because of it."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlm.data import packing as packing_lib
from mlm.data import reader as reader_lib
from mlm.data.shard_assignment import ShardSlice
from mlm.data.sources.source import Source
from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError

_DOCUMENTS_PER_READ = 1024


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
    allow_fewer: bool = False,
) -> EvalSet:
    """Reads the first `num_sequences` sequences of the source in its own order, the same in every process and run.

    Args:
        source: the documents.
        tokenizer: text to ids.
        num_sequences: how many sequences to read.
        max_seq_length: tokens per sequence.
        packing: one of settings.PACKINGS.
        allow_fewer: accept a source that has fewer sequences, but at least one; an incomplete last one is dropped.

    Raises:
        UserError: the source has fewer sequences.
    """
    units_per_row = packing_lib.units_per_row(packing, max_seq_length=max_seq_length)
    needed, count = num_sequences * units_per_row, 0
    parts, documents = [], []
    reader = reader_lib.Reader(source, [ShardSlice(shard) for shard in range(source.num_shards)])
    while count < needed:
        texts = reader.take(_DOCUMENTS_PER_READ)
        if texts is None:
            if allow_fewer and count >= units_per_row:
                break
            raise UserError(
                f"data.num_eval_samples={num_sequences}: the dataset {source.name!r} has only {count // units_per_row} "
                f"sequences of {max_seq_length} tokens; lower it, or add text"
            )
        texts = texts.filter(pa.array(reader_lib.has_text(texts)))
        chunk = packing_lib.pack(texts, tokenizer, packing=packing, max_seq_length=max_seq_length)
        parts.append(chunk.data[: needed - count])
        documents.append(texts.slice(0, int(np.searchsorted(chunk.offsets[:-1], needed - count))))
        count += len(parts[-1])
    units = np.concatenate(parts) if parts else np.empty(0, np.int32)
    sequences = units[: count // units_per_row * units_per_row].reshape(-1, max_seq_length)
    texts = pa.concat_arrays(documents) if documents else pa.array([], pa.large_string())
    return EvalSet(sequences, pc.unique(texts))
