"""Files that parse although they are not what they seem: from public bug reports of dataset readers."""

import codecs
import gzip
import json
import os

import datasets
import pytest
from absl import logging

from mlm.data.sources import files
from mlm.data.sources.source import open_source
from mlm.errors import UserError

TEXTS = ["Größe: 5 µm", "", "a second line", "日本語のテキスト", "the end"]
ENCODINGS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def read(path, *, start_row=0, **options):
    source = open_source(data_files=str(path), **options)
    return [text for texts in source.read(0, start_row=start_row) for text in texts.to_pylist()]


@pytest.mark.parametrize("with_mark", [True, False])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
def test_other_encodings_are_decoded(tmp_path, name, encoding, with_mark, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_BYTES", 7)
    lines = {
        "a.jsonl": [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS],
        "a.csv": ["text,n", *(f'"{text}",1' for text in TEXTS)],
    }.get(name, TEXTS)
    data = "".join(line + "\n" for line in lines).encode(encoding)
    data = (ENCODINGS[encoding] if with_mark else b"") + data
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(tmp_path / name) == TEXTS
    assert read(tmp_path / name, start_row=3) == TEXTS[3:]


def test_utf_16_that_ends_in_half_a_character(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + "one\ntwo".encode("utf-16-le") + b"x")
    assert read(tmp_path / "a.txt") == ["one", "two\ufffd"]


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text\0\0\0" * 100)
    with pytest.raises(
        UserError, match=r"cannot read '.*a\.txt': 43% of its bytes are NUL; convert it to UTF-8; fix it"
    ):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('text,n\none,1\n"two,2\nthree,3\n', 2),
        # The quotes of later rows close and open it.
        ('text,n\none,1\n"two,2\n"three",3\n"four",4\n', 2),
        ('text,n\n"one,1\n' + "x" * 100 + ",1\n", 1),
    ],
)
def test_a_quote_that_is_never_closed(tmp_path, text, row, monkeypatch):
    (tmp_path / "a.csv").write_text(text)
    for block_bytes in (files._CSV_BLOCK_BYTES, 64):
        monkeypatch.setattr(files, "_CSV_BLOCK_BYTES", block_bytes)
        with pytest.raises(UserError, match=r"cannot read '.*a\.csv': ") as raised:
            read(tmp_path / "a.csv")
        # With blocks shorter than the row, Arrow may notice first.
        if block_bytes > 64:
            assert f"the quote opened in row {row} is never closed" in str(raised.value)


def test_a_quote_within_a_field_is_a_character(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\na 5" disk,1\n"with ""quotes""",2\n')
    assert read(tmp_path / "a.csv") == ['a 5" disk', 'with "quotes"']


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['"a string"', '"another"'], "line 1 is a string; each line must be an object, "),
        (['["a"]', '["b"]'], "line 1 is a list; each line must be an object, "),
        (["5", "6"], "line 1 is a number; each line must be an object, "),
        (['["a", "b"]'], "row 1 is a string; each row must be an object, "),
    ],
)
def test_json_values_that_are_no_objects(tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        read(tmp_path / "a.jsonl")
    path = str(tmp_path / "a.jsonl")
    assert str(raised.value) == f'data.data_files={path!r}: {message}{{"text": "..."}}'


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize("data", [b"one\rtwo\r\rthree", b"one\r\ntwo\r\n\r\nthree\r\n", b"one\ntwo\r\rthree\r"])
def test_every_line_end(tmp_path, data, block_bytes, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_BYTES", block_bytes)
    (tmp_path / "a.txt").write_bytes(data)
    assert read(tmp_path / "a.txt") == ["one", "two", "", "three"]
    # Characters that Unicode calls line separators are text.
    (tmp_path / "a.txt").write_text("one\u2028two\u0085three\x0b\n", newline="")
    assert read(tmp_path / "a.txt") == ["one\u2028two\u0085three\x0b"]


def test_a_file_named_twice_is_read_once(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: warnings.append(message % values))
    source = open_source(data_files=(str(tmp_path / "*.txt"), str(tmp_path / "a.txt"), str(tmp_path / "." / "a.*")))
    assert source.num_shards == 2
    path = os.path.join(tmp_path, "a.txt")
    assert warnings == [f"data.data_files names 1 files more than once, such as {path}; each is read once"]


@pytest.mark.parametrize("with_splits", [True, False])
def test_a_directory_of_save_to_disk(tmp_path, with_splits):
    texts = [f"text number {n}" for n in range(10)]
    saved = datasets.Dataset.from_dict({"n": list(range(10)), "text": texts})
    saved = datasets.DatasetDict({"train": saved, "test": saved.select([0])}) if with_splits else saved
    saved.save_to_disk(str(tmp_path / "saved"), **({"num_shards": {"train": 3, "test": 1}} if with_splits else {}))
    source = open_source(dataset_name=str(tmp_path / "saved"))
    assert source.num_shards == (3 if with_splits else 1)
    found = [[text for array in source.read(shard) for text in array.to_pylist()] for shard in range(source.num_shards)]
    assert [text for shard in found for text in shard] == texts
    assert [text for array in source.read(0, start_row=2) for text in array.to_pylist()] == found[0][2:]
    if with_splits:
        with pytest.raises(UserError, match="it has no split 'validation', only train, test"):
            open_source(dataset_name=str(tmp_path / "saved"), split="validation")
