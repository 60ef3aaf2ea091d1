"""The evaluation rows, and the documents that are kept out of training for their sake."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlm.data import packing as packing_lib
from mlm.data import reader as reader_lib
from mlm.data import stream
from mlm.data import tokenizer as tokenizer_lib
from mlm.data.shard_assignment import ShardSlice
from mlm.data.sources import source as sources
from mlm.errors import UserError

_DOCUMENTS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """Rows to evaluate on, and what to keep out of training for their sake.

    Attributes:
        rows: int32 [num_rows, max_seq_length].
        documents: the distinct texts any part of which is in the rows.
    """

    rows: np.ndarray
    documents: pa.LargeStringArray


def read_eval_rows(
    source: sources.Source,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    num_rows: int,
    max_seq_length: int,
    packing: str,
    allow_fewer: bool = False,
) -> EvalRows:
    """The first `num_rows` rows of the source in its own order: the same in every process and every run.

    With `allow_fewer` a source that has fewer gives those, less a last part row.
    """
    stream.check(packing=packing, max_seq_length=max_seq_length)
    units_per_row = packing_lib.units_per_row(packing, max_seq_length=max_seq_length)
    needed, have = num_rows * units_per_row, 0
    parts, documents = [], []
    reader = reader_lib.Reader(source, [ShardSlice(shard) for shard in range(source.num_shards)])
    while have < needed:
        texts = reader.take(_DOCUMENTS_AT_ONCE)
        if texts is None and allow_fewer and have >= units_per_row:
            break
        if texts is None:
            raise UserError(
                f"the data set {source.name!r} has {have // units_per_row} rows of {max_seq_length} tokens, "
                f"fewer than the {num_rows} to evaluate on: lower data.num_eval_samples, or add text"
            )
        texts = texts.filter(pa.array(reader_lib.has_text(texts)))
        units = packing_lib.pack(texts, tokenizer, packing=packing, max_seq_length=max_seq_length)
        parts.append(units.data[: needed - have])
        documents.append(texts.slice(0, int(np.searchsorted(units.offsets[:-1], needed - have))))
        have += len(parts[-1])
    rows = np.concatenate(parts) if parts else np.empty(0, np.int32)
    rows = rows[: have // units_per_row * units_per_row].reshape(-1, max_seq_length)
    texts = pa.concat_arrays(documents) if documents else pa.array([], pa.large_string())
    return EvalRows(rows, pc.unique(texts))
