"""Rows of random ids instead of text (`data.dataset_name="synthetic"`), to benchmark the loop without reading text."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import tokenizers

from mlm.data.provenance import DocumentSpan
from mlm.data.shard_assignment import ShardSlice
from mlm.data.sources.source import Source
from mlm.data.tokenizer import Tokenizer
from mlm.settings import SYNTHETIC

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Rows drawn once and then returned in turn: drawing must take no time beside a step.
_POOL_ROWS = 4096


def _no_columns(shard: int, row: int) -> Iterator[pa.Array]:
    return iter(())


SOURCE = Source(
    name=SYNTHETIC, text_column="text", num_shards=1, columns=_no_columns, shard_name=lambda shard: SYNTHETIC
)


def tokenizer(*, vocab_size: int, max_seq_length: int) -> Tokenizer:
    """Returns a tokenizer with RoBERTa's special tokens and one word for every other id."""
    # Imported here: it takes a second, and other datasets do not need this tokenizer.
    import transformers

    words = [*_SPECIAL, *(f"w{number}" for number in range(len(_SPECIAL), vocab_size))]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.BertProcessing(("</s>", 2), ("<s>", 0))
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=max_seq_length,
    )
    return Tokenizer(hf, name=SYNTHETIC, backend="tokenizers")


def draw_rows(count: int, *, length: int, tokenizer: Tokenizer, seed: Sequence[int]) -> np.ndarray:
    """Returns int32 [count, length]: a begin token, random ids that are not special, an end token."""
    ids = np.setdiff1d(np.arange(tokenizer.num_ids, dtype=np.int32), [*tokenizer.special_ids, *tokenizer.unused_ids])
    rows = np.random.default_rng(list(seed)).choice(ids, (count, length))
    rows[:, 0], rows[:, -1] = tokenizer.bos_id, tokenizer.eos_id
    return rows.astype(np.int32)


class SyntheticRows:
    """Endless random rows, with the interface of `RowStream`; the state is the number of rows taken."""

    units_per_row = 1
    epoch = 0

    def __init__(self, tokenizer: Tokenizer, *, seed: int, max_seq_length: int, process_index: int):
        self._tokenizer = tokenizer
        self._seed = seed, 1 + process_index
        self._num_rows = 0
        self._pool = np.empty((0, 0), np.int32)
        self.set_shape(max_seq_length=max_seq_length, batch_rows=1)

    def set_shape(self, *, max_seq_length: int, batch_rows: int) -> None:
        """Continues with rows of another length, as `RowStream.set_shape` does."""
        if self._pool.shape[1] != max_seq_length:
            self._pool = draw_rows(_POOL_ROWS, length=max_seq_length, tokenizer=self._tokenizer, seed=self._seed)

    def take(self, num_rows: int) -> np.ndarray:
        """Returns the next rows, int32 [num_rows, max_seq_length]."""
        indices = np.arange(self._num_rows, self._num_rows + num_rows) % _POOL_ROWS
        self._num_rows += num_rows
        return self._pool[indices]

    @property
    def counters(self) -> dict[str, int]:
        """The counters of a `RowStream`, with every row counted as a document."""
        zeros = dict.fromkeys(("skipped_documents", "held_out_documents", "failed_shards", "tokenizer_differences"), 0)
        return {"documents": self._num_rows} | zeros

    def documents(self) -> list[DocumentSpan]:
        """Returns no documents."""
        return []

    def remaining(self) -> tuple[ShardSlice, ...]:
        """Returns no shards."""
        return ()

    def state_dict(self) -> dict[str, int]:
        """Returns the state after the last row."""
        return {"rows": self._num_rows}

    def restore(self, states: Sequence[Mapping[str, int]]) -> None:
        """Continues from the mean of the states of all processes, which are equal if their number never changed."""
        self._num_rows = sum(state["rows"] for state in states) // len(states)
