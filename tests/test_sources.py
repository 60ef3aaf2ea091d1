import bz2
import functools
import gzip
import http.server
import io
import json
import logging
import lzma
import threading
import time

import aiohttp
import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import zstandard
from gcsfs.retry import HttpError
from google.auth.exceptions import DefaultCredentialsError

from mlm.data.sources import files, retry
from mlm.data.sources.source import ShardUnavailableError, open_source
from mlm.errors import UserError

TEXTS = ["first", 'a "quoted" line', "é 🙂", "", "NA", "12", "last, with a comma"]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def write(path, texts):
    """Writes texts in the format of the file extension."""
    name = path.name
    if ".parquet" in name:
        pq.write_table(
            pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), path, row_group_size=3
        )
        return path
    if ".json" in name:
        data = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()
    elif ".csv" in name:
        sink = pa.BufferOutputStream()
        pa_csv.write_csv(pa.table({"id": range(len(texts)), "text": texts}), sink)
        data = sink.getvalue().to_pybytes()
    else:
        data = "".join(text + "\n" for text in texts).encode()
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return path


def open_files(*paths, **kwargs):
    return open_source(data_files=tuple(map(str, paths)), **kwargs)


def read(source, shard=0, start_row=0):
    return [text for texts in source.read(shard, start_row=start_row) for text in texts.to_pylist()]


ALL_FORMATS = [kind + c for kind in (".txt", ".jsonl", ".json", ".csv") for c in COMPRESS] + [".parquet"]


@pytest.mark.parametrize("extension", ALL_FORMATS)
def test_every_format_is_read_from_every_row(tmp_path, extension, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_BYTES", 16)  # Several blocks, and rows longer than one.
    source = open_files(write(tmp_path / f"a{extension}", TEXTS))
    assert source.num_shards == 1
    for start in range(len(TEXTS) + 2):
        assert read(source, start_row=start) == TEXTS[start:]


def test_csv_rows_that_are_larger_than_a_block_are_read(tmp_path):
    texts = [f"{n} " * (200_000 if n in (30, 61) else 9_000) for n in range(64)]
    source = open_files(write(tmp_path / "a.csv", texts))
    assert read(source) == texts
    assert read(source, start_row=29) == texts[29:]


def test_a_csv_file_is_read_again_with_the_same_retry_policy(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", ["a " * 200_000])
    policies, real = [], files.open_file

    def open_file(file, policy):
        policies.append(policy)
        return real(file, policy)

    monkeypatch.setattr(files, "open_file", open_file)
    policy = retry.RetryPolicy(deadline_seconds=7.0)
    assert sum(map(len, files.read_column(str(path), "text", retry_policy=policy))) == 1
    assert len(policies) > 1
    assert set(policies) == {policy}


def test_columns_of_a_csv_file_in_utf_16_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,one\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"one of id, body$"):
        list(files.read_column(str(tmp_path / "a.csv"), "text"))


def test_a_file_is_a_shard_and_globs_are_sorted(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", [name])
    by_glob = open_files(tmp_path / "*.txt")
    assert [read(by_glob, shard) for shard in range(by_glob.num_shards)] == [["a"], ["b"], ["c"]]
    listed = open_files(tmp_path / "c.txt", tmp_path / "a.txt")
    assert [read(listed, shard) for shard in range(listed.num_shards)] == [["c"], ["a"]]


def test_a_shard_reads_only_its_own_file(tmp_path):
    paths = [write(tmp_path / f"{n}.parquet", [str(n)]) for n in range(3)]
    source = open_files(*paths)
    paths[0].unlink()
    paths[2].write_bytes(b"broken")
    assert read(source, 1) == ["1"]


def break_parquet(path, column):
    """Overwrites a column of the first row group."""
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(column)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


def test_other_columns_of_parquet_are_not_read(tmp_path):
    break_parquet(write(tmp_path / "a.parquet", TEXTS), 0)
    assert read(open_files(tmp_path / "a.parquet")) == TEXTS
    assert read(open_source(dataset_name=str(tmp_path))) == TEXTS


def test_earlier_row_groups_of_parquet_are_not_read(tmp_path):
    path = write(tmp_path / "a.parquet", [f"text number {n}" for n in range(9)])
    source = open_files(path)
    break_parquet(path, 1)
    assert read(source, start_row=3) == [f"text number {n}" for n in range(3, 9)]
    with pytest.raises(UserError, match="cannot read"):
        read(source, start_row=2)


def utf8_or_not(values):
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"one\nt\xffwo\n\nthree", ["one", None, "", "three"]),
        ("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n", ["one", "two"]),
        ("a.csv", b'text,n\none,1\n"t\xffwo",2\n,3\n', ["one", None, ""]),
        ("a.csv", b'n,text\n1,"one\ntwo"\n', ["one\ntwo"]),
        ("a.jsonl", b'{"text":"one"}\n{"text":"t\xffwo"}\n{"text":null}\n', ["one", None, None]),
        (
            "a.jsonl",
            b'{"text":"a"}\n{"text":5}\n{"text":["x"]}\n{"n":1}\n{"text":"b"}',
            ["a", None, None, None, "b"],
        ),
        (
            "a.jsonl",
            b'{"text":"a"}\n{"text":"\\ud800"}\n{"text":"\\ud83d\\ude42"}\n',
            ["a", None, "\U0001f642"],
        ),
        ("a.json", b' [\n {"text": "a"},\n {"text": 1},\n {"n": 1}\n]\n', ["a", None, None]),
        ("a.jsonl", b'\xef\xbb\xbf{"text":"a"}\n\n{"text":"b"}\n', ["a", "b"]),
    ],
)
def test_rows_without_valid_text_are_null(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert read(open_files(tmp_path / name)) == expected


@pytest.mark.parametrize(
    "column",
    [
        utf8_or_not([b"one", b"t\xffwo", None, "é".encode()]),
        pa.array([b"one", b"t\xffwo", None, "é".encode()], pa.binary()),
        pa.array([b"one", b"t\xffwo", None, "é".encode()], pa.large_binary()),
        pa.array(["one", None, None, "é"], pa.large_string()),
        pa.array(["one", None, None, "é"]).dictionary_encode(),
    ],
)
def test_parquet_columns_of_every_text_type(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(open_files(tmp_path / "a.parquet")) == ["one", None, None, "é"]


def test_json_blocks_may_differ_in_keys_and_types(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_BYTES", 64)
    rows = [{"text": f"text {n}"} for n in range(20)]
    rows += [{"text": 5}, {"text": "five"}, {"more": 1, "text": "more"}, {"text": None}, {"text": {"a": 1}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [row["text"] if isinstance(row["text"], str) else None for row in rows]
    assert read(open_files(tmp_path / "a.jsonl")) == expected


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_of_several_members(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression](b"one\ntw") + COMPRESS[compression](b"o\nthree\n"))
    assert read(open_files(path)) == ["one", "two", "three"]


@pytest.mark.slow
def test_documents_larger_than_a_block(tmp_path):
    texts = ["x" * (10 << 20), "y", "z" * (5 << 20)]
    for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet"):
        assert read(open_files(write(tmp_path / name, texts))) == texts


def test_blocks_are_smaller_if_more_files_are_open(tmp_path, monkeypatch):
    for name, size in (("_BLOCK_BYTES", 4000), ("_MIN_BLOCK_BYTES", 500), ("_OPEN_BLOCK_BYTES", 16_000)):
        monkeypatch.setattr(files, name, size)
    source = open_files(*(write(tmp_path / f"{n:02}.txt", [f"{row:099}" for row in range(200)]) for n in range(40)))
    opened = [source.read(shard) for shard in range(40)]
    num_rows = [len(next(texts)) for texts in opened]
    assert num_rows[:4] == [40] * 4
    assert (num_rows[15], num_rows[-1]) == (10, 5)
    del opened[1:]
    assert [len(texts) for texts in opened[0]] == [40] * 4
    assert files._open_files == []


def named_dataset(folder):
    """Writes a local dataset for `datasets`: two configurations, one of them with two splits."""
    write(folder / "en-train.parquet", TEXTS)
    write(folder / "en-test.parquet", ["test"])
    write(folder / "de-train.parquet", ["eins"])
    folder.joinpath("README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: en-train.parquet}\n"
        "  - {split: test, path: en-test.parquet}\n- config_name: de\n  data_files: de-train.parquet\n---\n"
    )
    return str(folder)


def test_a_named_dataset_is_read_from_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr("mlm.data.sources.source._TABLE_ROWS", 2)
    name = named_dataset(tmp_path)
    source = open_source(dataset_name=name, dataset_config_name="en")
    for start in range(len(TEXTS) + 2):
        assert read(source, start_row=start) == TEXTS[start:]
    assert read(open_source(dataset_name=name, dataset_config_name="en", split="test")) == ["test"]


def test_columns_of_mixed_types_of_a_named_dataset(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text":"a \\"b\\""}\n{"text":5}\n{"text":null}\n')
    assert read(open_source(dataset_name=str(tmp_path))) == ['a "b"', None, None]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # Another column is null first and a string later; a struct gains a field; a list is empty first.
        (['{"text":"a","x":null}', '{"text":"b","x":"s"}'], ["a", "b"]),
        (['{"text":"a","x":{"y":1}}', '{"text":"b","x":{"y":1,"z":2}}'], ["a", "b"]),
        (['{"text":"a","x":[]}', '{"text":"b","x":["s"]}'], ["a", "b"]),
        # One value of the text column is a number.
        (['{"text":"A \\"quoted\\" sentence."}', '{"text":42}', '{"text":"42"}'], ['A "quoted" sentence.', None, "42"]),
    ],
)
def test_json_of_a_directory_may_change_its_columns(tmp_path, lines, expected, monkeypatch):
    monkeypatch.setattr("mlm.data.sources.files._BLOCK_BYTES", 1)  # Each line is a block.
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = open_source(dataset_name=str(tmp_path))
    assert source.name == str(tmp_path)
    for start in range(len(expected) + 1):
        assert read(source, start_row=start) == expected[start:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("jsonl", '{"text":"a"}\n\n{"text":null}\n{"text":"c","n":1}\n'),
        ("json", '[{"text":"a"},\n {"text":"b"}]'),
        ("csv", 'n,text\n1,a\n\n2,"two\nlines"\n3,\n'),
        ("txt", "a\n\n b\r\nc\u2028d\n"),
    ],
)
def test_plain_files_of_a_named_dataset_have_the_shards_and_rows_of_datasets(tmp_path, name, content):
    """Positions that were saved when `datasets` read them keep their meaning."""
    for part in ("b", "a"):
        (tmp_path / f"{part}.{name}").write_text(content.replace("a", part), newline="")
    source = open_source(dataset_name=str(tmp_path))
    streamed = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    assert source.num_shards == streamed.num_shards == 2
    for shard in range(2):
        rows = [row["text"] for row in streamed.shard(2, shard)]
        assert [text or None for text in read(source, shard)] == [text or None for text in rows]


def test_options_in_the_readme_of_a_directory_are_used(tmp_path):
    (tmp_path / "a.csv").write_text("text;n\none, two;1\n")
    options = "configs:\n- config_name: default\n  data_files: a.csv\n  sep: ';'\n"
    (tmp_path / "README.md").write_text(f"---\n{options}---\n")
    assert read(open_source(dataset_name=str(tmp_path))) == ["one, two"]


@pytest.mark.slow
def test_docstrings_are_read_without_a_network():
    source = open_source(dataset_name="docstrings")
    assert source.name == "docstrings"
    assert source.num_shards > 20
    assert all(read(source, shard) == read(source, shard) for shard in range(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_files": "none.txt"}, "data.data_files='none.txt': there is no such file"),
        ({"data_files": "*.none.txt"}, "data.data_files='\\*.none.txt': no file matches"),
        ({"data_files": "a.doc"}, "'.*a.doc'.*one of .txt, .text, .json, .jsonl, .csv, .parquet"),
        ({"data_files": "a.parquet.gz"}, "is a compressed parquet file"),
        ({"data_files": "."}, "is a directory"),
        ({"data_files": ("a.txt", "a.csv")}, "must have one format, but '.*a.txt' is text and '.*a.csv' is csv"),
        (
            {"data_files": "a.csv", "text_column_name": "body"},
            "'body': .* in '.*a.csv'; .* one of id, text$",
        ),
        (
            {"data_files": "a.parquet", "text_column_name": "body"},
            "text_column_name='body': .* one of id, text$",
        ),
        (
            {"data_files": "a.jsonl", "text_column_name": "body"},
            "text_column_name='body': .* one of id, text$",
        ),
        (
            {"data_files": "list.json", "text_column_name": "body"},
            "text_column_name='body': .* one of id, text$",
        ),
        (
            {"data_files": "a.txt", "text_column_name": "body"},
            "'body': .* in '.*a.txt'; .* one of text$",
        ),
        (
            {"data_files": "a.parquet", "text_column_name": "id"},
            "'id': the column of .* has the type int64, not text",
        ),
        (
            {"data_files": "a.jsonl", "text_column_name": "id"},
            "'id': the column of .* has values such as 0, not text",
        ),
        ({"data_files": "empty.txt"}, "'empty.txt': is empty"),
        ({"data_files": "empty.jsonl"}, "'empty.jsonl': is empty"),
        ({"data_files": "empty.csv"}, "'empty.csv': is empty"),
        ({"data_files": "empty.parquet"}, "'empty.parquet': is empty"),
        ({"data_files": "broken.jsonl"}, "cannot read '.*broken.jsonl'"),
        ({"data_files": "broken.parquet"}, "cannot read '.*broken.parquet'"),
        ({"data_files": "broken.csv"}, "cannot read '.*broken.csv'.*Expected 2 columns"),
        ({"dataset_name": "./none"}, "data.dataset_name='./none': there is no such directory"),
        ({"dataset_name": "named"}, "data.dataset_name='named': cannot be opened .*'en'.*'de'"),
        ({"dataset_name": "named", "dataset_config_name": "fr"}, "'named'.*'fr'.*'en'.*'de'"),
        (
            {"dataset_name": "named", "dataset_config_name": "en", "split": "dev"},
            "'named'.*dev.*'train'.*'test'",
        ),
        (
            {"dataset_name": "named", "dataset_config_name": "en", "text_column_name": "body"},
            "text_column_name='body': .* in 'named'; set it to one of id, text$",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for extension in (".txt", ".csv", ".jsonl", ".parquet"):
        write(tmp_path / f"a{extension}", ["one", "two"])
    for name in ("a.doc", "a.parquet.gz", "empty.txt", "empty.jsonl", "empty.csv"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "list.json").write_text('[{"id": 1, "text": "a"}]')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text":\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 or not")
    (tmp_path / "broken.csv").write_text("id,text\n1,a\n1,2,3,4\n")
    write(tmp_path / "empty.parquet", [])
    (tmp_path / "named").mkdir()
    named_dataset(tmp_path / "named")
    with pytest.raises(UserError, match=message) as error:
        open_source(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_truncated_and_wrong_compressed_files_are_errors(tmp_path, kind, compression):
    path = write(tmp_path / f"a{kind}{compression}", [f"line {n * n}" for n in range(500)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"cannot read '.*a{kind}{compression}'"):
        read(open_files(path))
    path.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match=f"cannot read '.*a{kind}{compression}'"):
        open_files(path)


def test_an_unreachable_hub_is_an_error_within_seconds(monkeypatch):
    # Nothing listens on port 9 of this machine. The hub client's own retries would take 23 seconds.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"dataset_name='no/such': is not a local directory, and http.* cannot be reached"
    ):
        open_source(dataset_name="no/such")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'no/such': is not a local directory, and HF_HUB_OFFLINE is set"):
        open_source(dataset_name="no/such")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and byte ranges of them."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if "Range" not in self.headers:
            super().do_GET()
            return
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}")
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.end_headers()
        self.wfile.write(data[first : last + 1])


@pytest.fixture
def url(tmp_path):
    """The URL of a server of tmp_path."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: QuietHandler(*arguments, directory=str(tmp_path))
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.zst", "a.csv.xz", "a.json.bz2", "a.parquet"])
def test_a_url_is_read_from_any_row(tmp_path, url, name):
    write(tmp_path / name, TEXTS)
    source = open_files(f"{url}/{name}?download=true")
    assert read(source) == TEXTS
    assert read(source, start_row=3) == TEXTS[3:]


def test_a_url_that_does_not_exist_is_an_error(tmp_path, url):
    with pytest.raises(UserError, match=f"cannot read '{url}/none.txt'.*not found"):
        open_files(f"{url}/none.txt")


@pytest.fixture
def bucket(monkeypatch):
    """Sets the outcome of opening a file in a bucket: an exception or its bytes. No bucket was reached before."""
    monkeypatch.setattr(files, "_reached_schemes", set())

    def set_answer(answer):
        def open_it(file, mode, **options):
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer)

        monkeypatch.setattr(files.fsspec, "open", open_it)
        return functools.partial(
            open_source,
            data_files="gs://bucket/a.jsonl",
            retry_policy=retry.RetryPolicy(deadline_seconds=0.2, first_wait_seconds=0.05),
        )

    return set_answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (aiohttp.ClientConnectionError("no such host"), r"gs:// cannot be reached \(no such host\): check network and"),
        (TimeoutError(), r"gs:// cannot be reached \(TimeoutError\): check network and credentials"),
        (DefaultCredentialsError("none found"), r"gs:// cannot be reached \(none found\): check network and"),
        (HttpError({"code": 503, "message": "busy"}), r"gs:// cannot be reached \(busy, 503\)"),
        (HttpError({"code": 401, "message": "Anonymous caller"}), r"Anonymous caller, 401: check the credentials"),
    ],
)
def test_a_bucket_that_was_never_reached_is_not_retried(bucket, answer, message):
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^cannot read 'gs://bucket/a.jsonl': {message}") as error:
        bucket(answer)()
    assert not isinstance(error.value, ShardUnavailableError)
    assert time.monotonic() - start < 5.0
    # gcsfs would log a traceback for each of its errors.
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.CRITICAL)


def test_a_bucket_that_was_reached_is_retried(bucket):
    source = bucket(b'{"text": "one"}\n')()
    assert read(source) == ["one"]
    bucket(HttpError({"code": 503, "message": "busy"}))
    with pytest.raises(ShardUnavailableError, match=r"from row 0 on: .*busy, 503 \(tried \d+ times"):
        read(source)
    bucket(HttpError({"code": 401, "message": "expired"}))
    with pytest.raises(UserError, match="expired, 401: check the credentials"):
        read(source)


def test_blank_lines_separate_documents_in_text_files_only(tmp_path):
    for name, data in (("a.txt", "one\n\ntwo\n"), ("a.jsonl", '{"text": "one"}\n')):
        (tmp_path / name).write_text(data)
    assert [open_files(tmp_path / name).blank_rows_are_separators for name in ("a.txt", "a.jsonl")] == [True, False]
