"""The documents read before training: those of the evaluation set, and those that train a tokenizer.

With `data.eval_rows="spread"` they come from up to 64 evenly spaced shards, the first documents of each, because one
file often has one topic. With "first" they are the first documents of the source, as in the reference script. Both are
the same in every process and every run.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from mlm.data.packing import PackedChunk
from mlm.data.reader import Reader
from mlm.data.shard_assignment import ShardSlice
from mlm.data.sources.source import Source

_MAX_SHARDS = 64
# Shards opened at the same time if they are read over a network.
_PARALLEL_SHARDS = 8
# Few, so that little is read that is not used. Best fit packs the documents of a read together.
_DOCUMENTS_PER_READ = 32
_BEST_FIT_DOCUMENTS_PER_READ = 256


def read_units(
    source: Source,
    num_units: int,
    *,
    units_per_row: int,
    eval_rows: str,
    is_used: Callable[[pa.LargeStringArray], np.ndarray],
    pack: Callable[[pa.LargeStringArray], PackedChunk],
    packs_together: bool = False,
) -> Iterator[tuple[pa.LargeStringArray, np.ndarray]]:
    """Yields documents with their units (see packing.py) until there are `num_units`, or the source ends.

    Args:
        source: the documents.
        num_units: the number of units to read.
        units_per_row: the units are divided among the shards in multiples of this, unless a shard is short.
        eval_rows: one of settings.EVAL_ROWS.
        is_used: documents -> bool [N], whether to use them.
        pack: the used documents -> their units.
        packs_together: whether the units of a document depend on the documents that are packed with it.
    """
    documents_per_read = _BEST_FIT_DOCUMENTS_PER_READ if packs_together else _DOCUMENTS_PER_READ
    shards = range(source.num_shards)
    stride = -(-len(shards) // _MAX_SHARDS)
    # What a short shard lacks comes from the next shard of the round; what the last ones lack, from the next round,
    # which reads neighboring shards, and in the end from any shard.
    rounds = [shards[first::stride] for first in range(stride)] if eval_rows == "spread" else []
    next_rows = dict.fromkeys(shards, 0)
    count = 0
    for members in [*rounds, None]:
        if members is None:
            targets, parallel = dict.fromkeys(shards, num_units), 1
        else:
            missing_rows = -(-(num_units - count) // units_per_row)
            ends = np.rint(missing_rows * np.arange(len(members) + 1) / len(members)).astype(int).tolist()
            targets = {
                shard: min(num_units, count + end * units_per_row)
                for shard, (start, end) in zip(members, itertools.pairwise(ends), strict=True)
                if end > start
            }
            parallel = _PARALLEL_SHARDS if source.retry_policy is not None else 1
        for shard, reader, texts in _open(
            source, list(targets), next_rows, parallel=parallel, documents_per_read=documents_per_read
        ):
            if count == num_units:
                return
            while texts is not None and count < targets[shard]:
                used = np.flatnonzero(is_used(texts))
                documents = texts.take(pa.array(used))
                chunk = pack(documents)
                units = chunk.data[: targets[shard] - count]
                numbers = np.unique(chunk.spans(0, len(units))[0])
                has_unused = len(numbers) > 0 and numbers[-1] + 1 < len(used)
                next_rows[shard] = int(reader.locations[used[numbers[-1]] if has_unused else -1, 1]) + 1
                count += len(units)
                yield documents.take(pa.array(numbers)), units
                texts = reader.take(documents_per_read) if count < targets[shard] else None


def _open(
    source: Source, shards: Sequence[int], next_rows: Mapping[int, int], *, parallel: int, documents_per_read: int
) -> Iterator[tuple[int, Reader, pa.LargeStringArray | None]]:
    """Yields the shards in order with a reader and its first documents; opens `parallel` of them at the same time."""

    def open_shard(shard: int) -> tuple[int, Reader, pa.LargeStringArray | None]:
        reader = Reader(source, [ShardSlice(shard, start=next_rows[shard])])
        return shard, reader, reader.take(documents_per_read)

    if parallel == 1:
        yield from map(open_shard, shards)
        return
    with ThreadPoolExecutor(parallel, thread_name_prefix="mlm-spread") as pool:
        for start in range(0, len(shards), parallel):
            yield from pool.map(open_shard, shards[start : start + parallel])
