"""One data file -> Arrow arrays of one column, a few megabytes at a time, with no Python object a row.

The readers of `datasets` 5.2.0 are not used for files: they cast every chunk to the columns of the first (a
new key ends the run), put quotes around the texts of a later JSON chunk in which one value is a number, take
a zstandard file that was cut short for a whole one, and make a Python string of every line. Named data sets
go through them, see sources.py.
"""

import contextlib
import importlib.util
import io
import json
import logging
import lzma
import os
from collections.abc import Iterator
from typing import Any

import aiohttp
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from mlm.data.sources import http, retry
from mlm.errors import UserError

# Extension -> kind.
KINDS = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
# Extension -> Arrow's codec; xz is not one of them.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_BLOCK_BYTES = 4 << 20
# A row of a CSV file must fit in one block.
_CSV_BLOCK_BYTES = 32 << 20
_JSON_PARSE_BYTES = 1 << 20
_PARQUET_ROWS = 256
# Taken at once from a connection.
_NETWORK_BYTES = 1 << 20
# Schemes of URLs that have given this process a file.
_reached: set[str] = set()
_BOM = b"\xef\xbb\xbf"


def file_format(file: str) -> str:
    """ "text", "json", "csv" or "parquet", by the extension. UserError for another."""
    stem, compression = _split_compression(file)
    kind = KINDS.get(os.path.splitext(stem)[1].lower())
    if kind is None:
        raise UserError(
            f"cannot tell the kind of the data file {file!r}: its name must end with one of "
            f"{', '.join(KINDS)}, or that and one of {', '.join(COMPRESSIONS)}"
        )
    if kind == "parquet" and compression:
        raise UserError(f"the data file {file!r} is compressed twice: decompress it, parquet has its own")
    return kind


def read_column(
    file: str, column: str, *, start_row: int = 0, retry_policy: retry.RetryPolicy | None = None
) -> Iterator[pa.Array]:
    """The values of a column, from `start_row` on, whatever their type: bytes need not be UTF-8.

    A line of a text file is a row of a column "text". Parquet skips the row groups before `start_row` unread;
    the other formats must be read to be counted. `patience` is for http(s) URLs; other URLs are fsspec's.

    Raises:
        UserError: there is no such column.
        OSError, EOFError, ValueError, lzma.LZMAError, pa.ArrowException: what is wrong with the file.
        OSError, those of network.ERRORS: what is wrong with the network.
    """
    kind = file_format(file)
    if kind == "parquet":
        yield from _read_parquet(file, column, start_row, retry_policy)
        return
    read = {"text": _read_text, "json": _read_json, "csv": _read_csv}[kind]
    with _open(file, retry_policy) as stream:
        for values in read(stream, file, column):
            if start_row < len(values):
                yield values.slice(start_row)
            start_row = max(0, start_row - len(values))


def missing_column(file: str, column: str, names: list[str]) -> UserError:
    """What to say when a file or data set has no such column."""
    return UserError(f"no column {column!r} in {file!r}: set data.text_column_name to one of: {', '.join(names)}")


def _split_compression(file: str) -> tuple[str, str]:
    path = file.split("?", 1)[0] if "://" in file else file
    stem, extension = os.path.splitext(path)
    extension = extension.lower()
    return (stem, extension) if extension in COMPRESSIONS else (path, "")


def _is_http(file: str) -> bool:
    return file.lower().startswith(("http://", "https://"))


@contextlib.contextmanager
def _open(file: str, retry_policy: retry.RetryPolicy | None = None) -> Iterator[io.IOBase | pa.NativeFile]:
    """The decompressed bytes of a local file or a URL."""
    codec = COMPRESSIONS.get(_split_compression(file)[1])
    with contextlib.ExitStack() as stack:
        if _is_http(file):
            connection = http.RemoteStream(file, retry_policy=retry_policy or retry.RetryPolicy())
            raw = stack.enter_context(io.BufferedReader(connection, _NETWORK_BYTES))
        elif "://" in file:
            raw = stack.enter_context(_open_elsewhere(file, retry_policy or retry.RetryPolicy()))
        elif codec == "xz":
            raw = stack.enter_context(open(file, "rb"))
        else:
            raw = stack.enter_context(pa.OSFile(file))
        if codec == "xz":
            raw = stack.enter_context(lzma.open(raw))
        elif codec is not None:
            raw = stack.enter_context(pa.CompressedInputStream(raw, codec))
        yield raw


@contextlib.contextmanager
def _open_elsewhere(file: str, retry_policy: retry.RetryPolicy) -> Iterator[io.IOBase]:
    """A file at a URL that is fsspec's to read.

    Its clients have tried for a while when they raise. Where none of their files could ever be read, that is final:
    no network, or no credentials.

    Raises:
        network.RefusedError: that, or what will not be given.
        ConnectionError: what a Google client says of the network.
    """
    scheme = file.split("://", 1)[0].lower()
    options, of_google = _google(retry_policy) if scheme in ("gs", "gcs") else ({}, ())
    try:
        with fsspec.open(file, "rb", **options) as raw:
            _reached.add(scheme)
            yield raw
    except (*of_google, ConnectionError, TimeoutError, aiohttp.ClientError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        code = getattr(error, "code", None)
        if str(code).isdigit() and not retry.is_retryable_status(int(code)):
            raise retry.RefusedError(f"{told}: check the credentials (gcloud auth application-default login)") from None
        if scheme not in _reached:
            raise retry.RefusedError(f"{scheme}:// cannot be reached ({told}): check network and credentials") from None
        if isinstance(error, of_google):
            raise ConnectionError(told) from None
        raise


def _google(retry_policy: retry.RetryPolicy) -> tuple[dict[str, Any], tuple[type[Exception], ...]]:
    """Options of gcsfs that have it give up a silent connection, and what it raises that is no OSError."""
    # It logs a traceback for each error that it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    logging.getLogger("google.auth").setLevel(logging.ERROR)
    if importlib.util.find_spec("gcsfs") is None:
        return {}, ()  # fsspec says so.
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    seconds = retry_policy.timeout_seconds
    return (
        {"requests_timeout": aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)},
        (HttpError, GoogleAuthError),
    )


def _blocks(stream: io.IOBase | pa.NativeFile, first: bytes) -> Iterator[bytes]:
    """`first` and then a stream's bytes, cut after line ends, the last one added where it is missing."""
    parts: list[bytes] = []
    block = first
    while block:
        cut = block.rfind(b"\n") + 1
        if cut:
            yield b"".join([*parts, block[:cut]])
            parts = []
        parts.append(block[cut:])
        block = stream.read(_BLOCK_BYTES)
    if last := b"".join(parts):
        yield last + b"\n"


def _lines(block: bytes) -> pa.LargeBinaryArray:
    """The lines of a block without their ends, as bytes."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    offsets = np.concatenate([[0], ends])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
    # The trimming looks at single bytes, so the type may say "string" of what is not UTF-8.
    lines = pa.Array.from_buffers(pa.large_string(), len(ends), buffers)
    return pc.ascii_rtrim(lines, "\r\n").cast(pa.large_binary())


def _read_text(stream: io.IOBase | pa.NativeFile, file: str, column: str) -> Iterator[pa.Array]:
    if column != "text":
        raise missing_column(file, column, ["text"])
    first = stream.read(_BLOCK_BYTES).removeprefix(_BOM)
    for block in _blocks(stream, first):
        yield _lines(block)


def _read_json(stream: io.IOBase | pa.NativeFile, file: str, column: str) -> Iterator[pa.Array]:
    first = stream.read(_BLOCK_BYTES).removeprefix(_BOM)
    if first.lstrip()[:1] == b"[":
        # One list of objects: such a file cannot be read in parts.
        rows = json.loads(first + stream.read())
        values = _strings(rows, column)
        _check_column(values, rows, file, column)
        yield values
        return
    for n, block in enumerate(_blocks(stream, first)):
        values = _parse_json_lines(block, column)
        if n == 0 and values.null_count == len(values):
            _check_column(values, [_load(line) for line in block.splitlines()], file, column)
        yield values


def _check_column(values: pa.Array, rows: list, file: str, column: str) -> None:
    """UserError if a block holds no text because there is no such column, or it holds something else."""
    if values.null_count < len(values):
        return
    rows = [row for row in rows if isinstance(row, dict)]
    if rows and not any(column in row for row in rows):
        raise missing_column(file, column, sorted({name for row in rows for name in row}))
    for row in rows:
        if not isinstance(row.get(column), str | None):
            raise UserError(
                f"the column {column!r} of {file!r} holds {json.dumps(row[column])[:40]}, not text: "
                "set data.text_column_name to another"
            )


def _parse_json_lines(block: bytes, column: str) -> pa.Array:
    parse = pa_json.ParseOptions(explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore")
    # Small parts are parsed in parallel, but an object must lie within two of them.
    for block_size in (_JSON_PARSE_BYTES, len(block)):
        try:
            options = pa_json.ReadOptions(block_size=min(block_size, len(block)))
            table = pa_json.read_json(pa.BufferReader(block), read_options=options, parse_options=parse)
            return table.column(column).combine_chunks()
        except pa.ArrowInvalid:
            continue
    # A value that is no string, a lone surrogate, or a broken file: by line, to find out which.
    return _strings([_load(line) for line in block.splitlines() if line.strip()], column)


def _load(line: bytes) -> object:
    try:
        return json.loads(line) if line.strip() else None
    except UnicodeDecodeError:
        return None
    except json.JSONDecodeError as error:
        # It counts lines and columns from the begin of this one.
        raise ValueError(f"{error.msg} in the line {line[:60].decode(errors='replace')!r}") from None


def _strings(rows: list, column: str) -> pa.Array:
    """A column of parsed rows as bytes, null for what is no string.

    Bytes, because JSON can spell lone surrogates, which are not UTF-8.
    """
    values = [row.get(column) if isinstance(row, dict) else None for row in rows]
    data = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else None for value in values]
    return pa.array(data, pa.large_binary())


def _read_csv(stream: io.IOBase | pa.NativeFile, file: str, column: str) -> Iterator[pa.Array]:
    # Every value as it is written: no guess at numbers, "NA" is a word, bytes may be anything.
    convert = pa_csv.ConvertOptions(
        include_columns=[column],
        column_types={column: pa.large_binary()},
        check_utf8=False,
        null_values=[],
        strings_can_be_null=False,
    )
    # Threads would read ahead.
    read = pa_csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False)
    parse = pa_csv.ParseOptions(newlines_in_values=True)
    try:
        reader = pa_csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert)
    except KeyError:
        with _open(file) as again:
            names = pa_csv.open_csv(again, read_options=read, parse_options=parse).schema.names
        raise missing_column(file, column, names) from None
    except pa.ArrowInvalid as error:
        if "Empty CSV file" in str(error):
            return
        raise
    for batch in reader:
        yield batch.column(0)


def _read_parquet(file: str, column: str, start_row: int, retry_policy: retry.RetryPolicy | None) -> Iterator[pa.Array]:
    with contextlib.ExitStack() as stack:
        if _is_http(file):
            raw = stack.enter_context(http.RemoteParts(file, retry_policy=retry_policy or retry.RetryPolicy()))
        elif "://" in file:
            raw = stack.enter_context(_open_elsewhere(file, retry_policy or retry.RetryPolicy()))
        else:
            raw = stack.enter_context(pa.OSFile(file))
        # One read for the pieces of a row group, where a read is a request.
        reader = stack.enter_context(pq.ParquetFile(raw, pre_buffer="://" in file))
        if column not in reader.schema_arrow.names:
            raise missing_column(file, column, reader.schema_arrow.names)
        for group in range(reader.num_row_groups):
            num_rows = reader.metadata.row_group(group).num_rows
            if start_row >= num_rows:
                start_row -= num_rows
                continue
            for batch in reader.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[column]):
                if start_row < len(batch):
                    yield batch.column(0).slice(start_row)
                start_row = max(0, start_row - len(batch))
