"""Files divided into shards: together the parts have the rows of the file, in order."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.data.reader import Reader
from mlm.data.shard_assignment import assign_shards
from mlm.data.sources import file_parts
from mlm.data.sources.source import Source, open_source
from mlm.errors import UserError

TEXTS = [f"document {i} " + "long " * (i * 7 % 50) for i in range(3000)]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(file_parts, "_MIN_PART_BYTES", 1)


def rows(source: Source, shard: int, start_row: int = 0) -> list[str | None]:
    return [text for texts in source.read(shard, start_row=start_row) for text in texts.to_pylist()]


def all_rows(source: Source) -> list[str | None]:
    return [text for shard in range(source.num_shards) for text in rows(source, shard)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_parts_have_the_rows_of_the_file(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=100)
    elif name.endswith("jsonl"):
        write_jsonl(path, TEXTS)
    else:
        path.write_text("\n".join(TEXTS))  # No line end at the end.
    source = open_source(data_files=str(path), min_shards=8)
    assert source.num_shards == 8
    assert all_rows(source) == TEXTS
    # Parts are about as large as each other, and readable from every row.
    sizes = [sum(map(len, rows(source, shard))) for shard in range(source.num_shards)]
    assert max(sizes) < 1.5 * min(sizes)
    last = rows(source, source.num_shards - 1)
    assert [rows(source, source.num_shards - 1, start)[:1] for start in (1, 5)] == [[last[1]], [last[5]]]
    assert source.shard_name(1) == f"{str(path)!r} (part 2 of {source.num_shards})"


@pytest.mark.slow
@given(
    lines=st.lists(st.text("ab\u00e9\U0001f600 ", max_size=30), max_size=60),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    is_ended=st.booleans(),
    min_shards=st.integers(1, 40),
)
def test_no_line_is_lost_or_repeated(tmp_path_factory, lines, end, is_ended, min_shards):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes((end.join([*lines, "last"]) + (end if is_ended else "")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_parts, "_MIN_PART_BYTES", 1)
        source = open_source(data_files=str(path), min_shards=min_shards)
        assert all_rows(source) == all_rows(open_source(data_files=str(path)))
        assert source.num_shards <= max(1, min_shards + 1)


def test_files_that_stay_complete(tmp_path, small_parts):
    text = "".join(f"{text}\n" for text in TEXTS)
    (tmp_path / "utf16.txt").write_bytes(text.encode("utf-16"))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.csv").write_text("text\n" + text)
    (tmp_path / "list.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "line.txt").write_text(text.replace("\n", " "))
    (tmp_path / "zeros.txt").write_bytes(bytes(1000))
    for path in sorted(tmp_path.iterdir()):
        kind = {".csv": "csv", ".json": "json"}.get(path.suffix, "text")
        assert file_parts.divide([str(path)], kind=kind, min_shards=8) == [(str(path), None)], path
    assert file_parts.divide(["http://host/a.txt"], kind="text", min_shards=8) == [("http://host/a.txt", None)]


def test_many_files_and_small_ones_are_not_divided(tmp_path):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", TEXTS) for i in range(3)]
    assert file_parts.divide(paths, kind="json", min_shards=3) == [(path, None) for path in paths]
    small = write_jsonl(tmp_path / "small.jsonl", TEXTS[:20])
    assert file_parts.divide([small], kind="json", min_shards=100) == [(small, None)]
    # In proportion to their sizes.
    shards = file_parts.divide([paths[0], small], kind="json", min_shards=10)
    assert [path for path, _ in shards] == [paths[0]] * 10 + [small]


def test_a_window_has_documents_from_all_of_a_file_and_processes_read_different_parts(tmp_path):
    source = open_source(data_files=write_jsonl(tmp_path / "a.jsonl", TEXTS), min_shards=8)
    found = []
    for process in range(2):
        slices = assign_shards(8, seed=0, epoch=0, shuffled=True, process_index=process, process_count=2)
        assert [(part.offset, part.stride) for part in slices] == [(0, 1)] * 4
        reader = Reader(source, slices, interleave_shards=16)
        window = reader.take(100).to_pylist()
        numbers = [TEXTS.index(text) for text in window]
        assert max(numbers) - min(numbers) > 1000
        found.append(set(window))
    assert not found[0] & found[1]


def test_an_error_names_the_part(tmp_path, small_parts):
    lines = [json.dumps({"text": "a"})] * 50 + ["7" * 13] * 50
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    source = open_source(data_files=str(tmp_path / "a.jsonl"), min_shards=4)
    with pytest.raises(UserError, match=r"a\.jsonl \(part 3 of 4\)': line 1 is a number; each line must be an object"):
        all_rows(source)
