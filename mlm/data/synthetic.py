"""Rows of random ids, for `data.dataset_name="synthetic"`: the loop without text, to time all the rest of it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
import transformers

from mlm.data.sources import source as sources
from mlm.data.tokenizer import Tokenizer

NAME = "synthetic"
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# Rows that are drawn at once, and given again and again from a new place: drawing must cost nothing beside a step.
_POOL_ROWS = 4096


def no_text(shard: int, row: int) -> Iterator[pa.Array]:
    """The columns of a source that has no documents."""
    return iter(())


SOURCE = sources.Source(name=NAME, text_column="text", num_shards=1, columns=no_text, shard_name=lambda shard: NAME)


def tokenizer(*, vocab_size: int, max_seq_length: int) -> Tokenizer:
    """RoBERTa's special tokens, and a word for every other id."""
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
    return Tokenizer(hf, name=NAME, backend="tokenizers")


def rows(count: int, *, length: int, ids: Tokenizer, seed: Sequence[int]) -> np.ndarray:
    """int32 [count, length]: a begin token, random ids that are not special, an end token."""
    plain = np.setdiff1d(np.arange(ids.num_ids, dtype=np.int32), [*ids.special_ids, *ids.unused_ids])
    drawn = np.random.default_rng(list(seed)).choice(plain, (count, length))
    drawn[:, 0], drawn[:, -1] = ids.bos_id, ids.eos_id
    return drawn.astype(np.int32)


class SyntheticRows:
    """Takes the place of a `RowStream`: endless, of one epoch, its state the number of rows given."""

    units_per_row = 1
    epoch = 0

    def __init__(self, ids: Tokenizer, *, seed: int, max_seq_length: int, process_index: int):
        self._pool = rows(_POOL_ROWS, length=max_seq_length, ids=ids, seed=(seed, 1 + process_index))
        self._given = 0

    def take(self, count: int) -> np.ndarray:
        """The next rows."""
        places = np.arange(self._given, self._given + count) % _POOL_ROWS
        self._given += count
        return self._pool[places]

    @property
    def counters(self) -> dict[str, int]:
        """Those of a `RowStream`; every row is a document."""
        return {"documents": self._given, "skipped_rows": 0, "held_out_documents": 0, "failed_shards": 0}

    def documents(self) -> list[Any]:
        """None are known by name."""
        return []

    def ahead(self) -> tuple[Any, ...]:
        """No shard has to be read."""
        return ()

    def state_dict(self) -> dict[str, int]:
        """The state after the last row."""
        return {"given": self._given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on right after it."""
        self._given = state["given"]

    def restore(self, states: Sequence[Mapping[str, int]]) -> None:
        """Goes on from the states of all processes; of another number of them, from the mean of their places."""
        self._given = sum(state["given"] for state in states) // len(states)
