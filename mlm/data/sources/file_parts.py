"""Local files divided into parts, each of which is a shard.

A shuffle window then has documents from all of a file that is sorted by topic, and of several processes each reads its
own parts of a large file instead of all of it. Text and JSON lines are divided at line ends, parquet files at row
groups; compressed files, CSV files, JSON lists and files over a network stay complete.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from mlm.data.sources.encoding import HEAD_BYTES, find_encoding
from mlm.data.sources.files import is_json_list, split_compression

# Smaller parts would take much longer to open than to read.
_MIN_PART_BYTES = 4 << 10
# A file with a longer line at a boundary is not divided there.
_MAX_LINE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class FilePart:
    """Part `number` of `count` parts of a file, from 1 on.

    Attributes:
        begin, end: the bytes, or the row groups of a parquet file, from `begin` up to `end`.
    """

    number: int
    count: int
    begin: int
    end: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"


def divide(files: Sequence[str], *, kind: str, min_shards: int) -> list[tuple[str, FilePart | None]]:
    """Returns file and part of each shard; the part is None for a complete file.

    Args:
        files: paths and URLs.
        kind: their format, see files.py.
        min_shards: files are divided until there are about this many shards.
    """
    divisible = [file for file in files if kind != "csv" and "://" not in file and not split_compression(file)[1]]
    sizes = {file: os.path.getsize(file) for file in divisible}
    part_bytes = max(_MIN_PART_BYTES, sum(sizes.values()) / max(1, min_shards))
    shards: list[tuple[str, FilePart | None]] = []
    for file in files:
        count, boundaries = round(sizes.get(file, 0) / part_bytes), []
        if len(files) < min_shards and count > 1:
            # What is wrong with a file is reported when it is read.
            with contextlib.suppress(OSError, ValueError, pa.ArrowException):
                boundaries = (
                    _row_group_boundaries(file, count) if kind == "parquet" else _line_boundaries(file, kind, count)
                )
        if len(boundaries) <= 2:
            shards.append((file, None))
            continue
        for number in range(1, len(boundaries)):
            shards.append((file, FilePart(number, len(boundaries) - 1, boundaries[number - 1], boundaries[number])))
    return shards


def _row_group_boundaries(file: str, count: int) -> list[int]:
    with pq.ParquetFile(file) as opened:
        groups = opened.num_row_groups
    return sorted({round(number * groups / count) for number in range(count + 1)})


def _line_boundaries(file: str, kind: str, count: int) -> list[int]:
    """Returns the byte offsets of the lines at which parts begin, and the size of the file."""
    with open(file, "rb") as stream:
        size, head = os.fstat(stream.fileno()).st_size, stream.read(HEAD_BYTES)
        if find_encoding(head) != ("utf-8", b"") or (kind == "json" and is_json_list(head)):
            return []
        boundaries = [0]
        for number in range(1, count):
            # From the byte before, which is the end of a line if the next one begins here.
            start = number * size // count - 1
            if start < boundaries[-1]:
                continue
            stream.seek(start)
            if stream.readline(_MAX_LINE_BYTES).endswith(b"\n"):
                boundaries.append(stream.tell())
    return sorted({*boundaries, size})
