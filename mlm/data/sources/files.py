"""One data file -> Arrow arrays of one column, a few megabytes each, without a Python object per row.

Files are not read with `datasets` 5.2.0, because its readers cast every chunk to the columns of the first one, so that
a new key ends the run; quote the texts of a JSON chunk in which one value is a number; accept a truncated zstandard
file; and make a Python string of every line.
"""

import contextlib
import csv
import functools
import importlib.util
import io
import json
import logging
import lzma
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import aiohttp
import fsspec
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from mlm.data.sources import http, retry
from mlm.data.sources.encoding import Utf8Stream
from mlm.errors import UserError

if TYPE_CHECKING:
    from mlm.data.sources.file_parts import FilePart

DEFAULT_RETRY_POLICY = retry.RetryPolicy()
# File extension -> format.
FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
# File extension -> Arrow codec, except for xz, which Arrow does not have.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
# The largest and the smallest block of a file. Large ones need less CPU time, but many files may be open at the same
# time (data.interleave_shards, several sources): the blocks of up to 16 files have 8 MB together.
_BLOCK_BYTES = 4 << 20
_MIN_BLOCK_BYTES = 512 << 10
_OPEN_BLOCK_BYTES = 8 << 20
# Arrow needs each row of a CSV file within one block, and reads 32 blocks ahead. At a larger row the file is read
# again, in blocks 8 times as large.
_CSV_BLOCK_BYTES = 128 << 10
_CSV_MAX_BLOCK_BYTES = 32 << 20
_JSON_PARSE_BYTES = 1 << 20
# Buffer of a local parquet file. Without one, a column's part of a row group is read as a whole.
_PARQUET_BUFFER_BYTES = 256 << 10
_PARQUET_BATCH_ROWS = 256
# Buffer of a sequential HTTP connection.
_HTTP_BUFFER_BYTES = 1 << 20
# A file of a dataset on the hub, as `datasets` names it: (repository, revision, path). A stream that breaks
# continues at the same byte; HfFileSystem would fetch blocks of 5 MB, each only after the previous one is used.
_HUB_FILE = re.compile("hf://datasets/([^/@]+/[^/@]+)@([^/]+)/(.+)")
# URL schemes from which this process has read a file.
_reached_schemes: set[str] = set()
# One entry for each file that is being read in blocks. Their number decides how large the blocks are, never which rows
# come next. Threads may open files: append and pop are atomic.
_open_files: list[None] = []


def file_format(file: str) -> str:
    """Returns "text", "json", "csv" or "parquet" by the file extension; raises UserError for any other extension."""
    stem, compression = split_compression(file)
    found = FORMATS.get(os.path.splitext(stem)[1].lower())
    if found is None:
        raise UserError(
            f"data.data_files={file!r}: unknown format; the name must end with one of {', '.join(FORMATS)}, "
            f"optionally followed by one of {', '.join(COMPRESSIONS)}"
        )
    if found == "parquet" and compression:
        raise UserError(f"data.data_files={file!r}: is a compressed parquet file; decompress it")
    return found


def read_column(
    file: str,
    column: str,
    *,
    part: "FilePart | None" = None,
    start_row: int = 0,
    retry_policy: retry.RetryPolicy = DEFAULT_RETRY_POLICY,
) -> Iterator[pa.Array]:
    """Reads a column from a row on, with values of any type: strings need not be valid UTF-8.

    A text file has one column, "text", whose rows are the lines. Row groups of a parquet file before `start_row`
    are skipped; other formats are read from the start to count their rows.

    Args:
        file: a path or a URL.
        column: name of the column.
        part: the part to read; None for all of the file.
        start_row: the first row to return, counted from the start of the part.
        retry_policy: for http(s) URLs and datasets on the hub; fsspec reads other URLs.

    Raises:
        UserError: the file has no such column.
        OSError, EOFError, ValueError, lzma.LZMAError, pa.ArrowException: the file is missing or corrupt.
        OSError, retry.CLIENT_ERRORS: the network failed.
    """
    kind = file_format(file)
    if kind == "parquet":
        yield from _read_parquet(file, column, part, start_row, retry_policy)
        return
    read_csv = functools.partial(_read_csv, retry_policy=retry_policy)
    readers: dict[str, Callable[..., Iterator[pa.Array]]] = {"text": _read_text, "json": _read_json, "csv": read_csv}
    read = readers[kind]
    _open_files.append(None)
    try:
        with open_file(file, retry_policy) as opened:
            stream: Any = opened
            if part is None:
                arrays = read(Utf8Stream(stream, count_quotes=kind == "csv"), file, column)
            else:  # Of a local file in UTF-8.
                arrays = read(stream.get_stream(part.begin, part.end - part.begin), f"{file} ({part})", column)
            yield from skip_rows(arrays, start_row)
    finally:
        _open_files.pop()


def skip_rows(arrays: Iterable[pa.Array | pa.ChunkedArray], num_rows: int) -> Iterator[pa.Array | pa.ChunkedArray]:
    """Yields consecutive arrays of a column without its first `num_rows` rows."""
    for array in arrays:
        if num_rows < len(array):
            yield array.slice(num_rows)
        num_rows = max(0, num_rows - len(array))


def missing_column_error(file: str, column: str, names: list[str]) -> UserError:
    """Returns the error for a file or dataset that has no such column, only those of `names`."""
    return UserError(
        f"data.text_column_name={column!r}: there is no such column in {file!r}; set it to one of {', '.join(names)}"
    )


def split_compression(file: str) -> tuple[str, str]:
    """Returns the name without the extension of a compression and that extension in lower case; "" if it has none."""
    path = file.split("?", 1)[0] if "://" in file else file
    stem, extension = os.path.splitext(path)
    extension = extension.lower()
    return (stem, extension) if extension in COMPRESSIONS else (path, "")


def _http_address(file: str) -> tuple[str, dict[str, str]] | None:
    """Returns the URL and the headers with which http.py reads a file; None if it does not."""
    if file.lower().startswith(("http://", "https://")):
        return file, {}
    if (match := _HUB_FILE.fullmatch(file)) and not huggingface_hub.constants.HF_HUB_OFFLINE:
        repository, revision, name = match.groups()
        url = huggingface_hub.hf_hub_url(repository, name, repo_type="dataset", revision=revision)
        return url, huggingface_hub.utils.build_hf_headers()
    return None


@contextlib.contextmanager
def open_file(file: str, retry_policy: retry.RetryPolicy = DEFAULT_RETRY_POLICY) -> Iterator[io.IOBase | pa.NativeFile]:
    """Opens a local file or a URL, decompressed."""
    codec = COMPRESSIONS.get(split_compression(file)[1])
    raw: Any
    with contextlib.ExitStack() as stack:
        if address := _http_address(file):
            url, headers = address
            connection = http.HttpStreamFile(url, headers=headers, retry_policy=retry_policy)
            raw = stack.enter_context(io.BufferedReader(connection, _HTTP_BUFFER_BYTES))
        elif "://" in file:
            raw = stack.enter_context(_open_with_fsspec(file, retry_policy))
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
def _open_with_fsspec(file: str, retry_policy: retry.RetryPolicy) -> Iterator[io.IOBase]:
    """Opens a URL of a scheme other than http(s).

    The clients of fsspec have already retried for a while when they raise. Until this process has read a file from the
    scheme, such a failure counts as permanent: there is no network, or there are no credentials.

    Raises:
        retry.PermanentError: the scheme was never reached, or the server refuses.
        ConnectionError: a Google client failed because of the network.
    """
    scheme = file.split("://", 1)[0].lower()
    options, google_errors = _gcsfs_options(retry_policy) if scheme in ("gs", "gcs") else ({}, ())
    network_errors: tuple[type[Exception], ...] = (*google_errors, ConnectionError, TimeoutError, aiohttp.ClientError)
    try:
        with fsspec.open(file, "rb", **options) as raw:
            _reached_schemes.add(scheme)
            yield raw
    except network_errors as error:
        message = " ".join(str(error).split()) or type(error).__name__
        code = str(getattr(error, "code", ""))
        if code.isdigit() and not retry.is_retryable_status(int(code)):
            raise retry.PermanentError(
                f"{message}: check the credentials (gcloud auth application-default login)"
            ) from None
        if scheme not in _reached_schemes:
            raise retry.PermanentError(
                f"{scheme}:// cannot be reached ({message}): check network and credentials"
            ) from None
        if isinstance(error, google_errors):
            raise ConnectionError(message) from None
        raise


def _gcsfs_options(retry_policy: retry.RetryPolicy) -> tuple[dict[str, Any], tuple[type[Exception], ...]]:
    """Returns options that make gcsfs close a silent connection, and those of its exceptions that are not OSErrors."""
    # It logs a traceback for each error that it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    logging.getLogger("google.auth").setLevel(logging.ERROR)
    if importlib.util.find_spec("gcsfs") is None:
        return {}, ()  # fsspec then says how to install it.
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    seconds = retry_policy.timeout_seconds
    return (
        {"requests_timeout": aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)},
        (HttpError, GoogleAuthError),
    )


def _block_bytes() -> int:
    """Returns the size of the next block of a file."""
    return min(_BLOCK_BYTES, max(_MIN_BLOCK_BYTES, _OPEN_BLOCK_BYTES // len(_open_files)))


def _blocks(stream: Utf8Stream, first: bytes) -> Iterator[bytes]:
    """Yields `first` and the rest of a stream in blocks of complete lines; adds a missing line end at the end."""
    parts: list[bytes] = []
    block, first = first, b""
    while block:
        # A \r at the end may be the first half of \r\n.
        cut = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1)) + 1
        rest = block[cut:]
        if cut:
            parts = [b"".join([*parts, block[:cut]])]
            block = b""  # A file that waits for its turn keeps the rows of a block, not the block itself.
            yield parts.pop()
        parts.append(rest)
        block = stream.read(_block_bytes())
    if last := b"".join(parts):
        yield last + b"\n"


def _lines(block: bytes) -> pa.LargeBinaryArray:
    """Returns the lines of a block without their line ends \\n, \\r\\n or \\r, as bytes."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    offsets = np.concatenate([[0], ends])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
    # ascii_rtrim needs the string type but looks at single bytes, so invalid UTF-8 does no harm.
    lines = pa.Array.from_buffers(pa.large_string(), len(ends), buffers)
    return pc.ascii_rtrim(lines, "\n").cast(pa.large_binary())


def _read_text(stream: Utf8Stream, file: str, column: str) -> Iterator[pa.Array]:
    if column != "text":
        raise missing_column_error(file, column, ["text"])
    for block in _blocks(stream, stream.read(_block_bytes())):
        yield _lines(block)


def is_json_list(head: bytes) -> bool:
    """Returns whether a file that starts with `head` is one list of objects, not an object per line."""
    return head.lstrip()[:1] == b"["


def _read_json(stream: Utf8Stream, file: str, column: str) -> Iterator[pa.Array]:
    first = stream.read(_block_bytes())
    if is_json_list(first):
        # A list of objects can only be parsed as one.
        try:
            rows = json.loads(first + stream.read())
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":  # after the first line's list
                raise _row_error(file, column, "line 1", []) from None
            raise
        values = _strings(rows, column)
        _check_column(values, rows, file, column, what="row")
        yield values
        return
    is_first = True
    for block in _blocks(stream, first):
        values = _parse_json_lines(block, column)
        if is_first and values.null_count == len(values):
            _check_column(values, [_load(line) for line in block.splitlines()], file, column, what="line")
        is_first = False
        first = block = b""
        yield values


def _check_column(values: pa.Array, rows: list, file: str, column: str, *, what: str) -> None:
    """Raises UserError if no row has text because there is no such column, or because it has values of another type."""
    if values.null_count < len(values):
        return
    for number, row in enumerate(rows, 1):
        if row is not None and not isinstance(row, dict):
            raise _row_error(file, column, f"{what} {number}", row)
    rows = [row for row in rows if row is not None]
    if rows and not any(column in row for row in rows):
        raise missing_column_error(file, column, sorted({name for row in rows for name in row}))
    for row in rows:
        if not isinstance(row.get(column), str | None):
            raise UserError(
                f"data.text_column_name={column!r}: the column of {file!r} has values such as "
                f"{json.dumps(row[column])[:40]}, not text; set it to another column"
            )


def _row_error(file: str, column: str, row_name: str, row: object) -> UserError:
    found = {str: "string", list: "list", bool: "boolean"}.get(type(row), "number")
    example = json.dumps({column: "..."})
    unit = row_name.split()[0]
    return UserError(f"data.data_files={file!r}: {row_name} is a {found}; each {unit} must be an object, {example}")


def _parse_json_lines(block: bytes, column: str) -> pa.Array:
    parse = pa_json.ParseOptions(explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore")
    # Small parts are parsed in parallel, but an object may not extend over more than two of them.
    for block_size in (_JSON_PARSE_BYTES, len(block)):
        try:
            # Threads cost more than they save in a single part.
            options = pa_json.ReadOptions(block_size=min(block_size, len(block)), use_threads=len(block) > block_size)
            table = pa_json.read_json(pa.BufferReader(block), read_options=options, parse_options=parse)
            return table.column(column).combine_chunks()
        except pa.ArrowInvalid:
            continue
    # There is a value that is not a string, a lone surrogate, or invalid JSON: parse each line by itself.
    return _strings([_load(line) for line in block.splitlines() if line.strip()], column)


def _load(line: bytes) -> object:
    try:
        return json.loads(line) if line.strip() else None
    except UnicodeDecodeError:
        return None
    except json.JSONDecodeError as error:
        # Its line and column numbers are relative to this line.
        raise ValueError(f"{error.msg} in the line {line[:60].decode(errors='replace')!r}") from None


def _strings(rows: list, column: str) -> pa.Array:
    """Returns a column of parsed rows as bytes, null for values that are not strings.

    Bytes, because JSON strings may contain lone surrogates, which UTF-8 cannot encode.
    """
    values = [row.get(column) if isinstance(row, dict) else None for row in rows]
    data = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else None for value in values]
    return pa.array(data, pa.large_binary())


def _read_csv(
    stream: Utf8Stream,
    file: str,
    column: str,
    *,
    retry_policy: retry.RetryPolicy,
    block_bytes: int = _CSV_BLOCK_BYTES,
) -> Iterator[pa.Array]:
    # Every value is text: no conversion of numbers or of "NA", and bytes that are not UTF-8 are kept.
    convert = pa_csv.ConvertOptions(
        include_columns=[column],
        column_types={column: pa.large_binary()},
        check_utf8=False,
        null_values=[],
        strings_can_be_null=False,
    )
    # Several threads would read ahead of the rows that are taken.
    read = pa_csv.ReadOptions(block_size=block_bytes, use_threads=False)
    parse = pa_csv.ParseOptions(newlines_in_values=True)

    def in_larger_blocks(num_rows: int) -> Iterator[pa.Array]:
        with open_file(file, retry_policy) as again:
            larger_bytes = min(8 * block_bytes, _CSV_MAX_BLOCK_BYTES)
            utf8 = Utf8Stream(again, count_quotes=True)
            arrays = _read_csv(utf8, file, column, retry_policy=retry_policy, block_bytes=larger_bytes)
            yield from skip_rows(arrays, num_rows)

    try:
        reader = pa_csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert)
    except KeyError:
        with open_file(file, retry_policy) as again:
            names = pa_csv.open_csv(Utf8Stream(again), read_options=read, parse_options=parse).schema.names
        raise missing_column_error(file, column, names) from None
    except pa.ArrowInvalid as error:
        if "Empty CSV file" in str(error):
            return
        if block_bytes < _CSV_MAX_BLOCK_BYTES:
            yield from in_larger_blocks(0)
            return
        _check_quotes(file, retry_policy)
        raise
    # The last rows are held back: a quote that is never closed makes one row of the rest of the file.
    previous = None
    num_rows = 0
    try:
        for batch in reader:
            if previous is not None:
                num_rows += len(previous)
                yield previous
            previous = batch.column(0)
    except pa.ArrowInvalid:
        if block_bytes < _CSV_MAX_BLOCK_BYTES:
            yield from in_larger_blocks(num_rows)
            return
        _check_quotes(file, retry_policy)
        raise
    if stream.num_quotes % 2:
        _check_quotes(file, retry_policy)
    if previous is not None:
        yield previous


def _check_quotes(file: str, retry_policy: retry.RetryPolicy) -> None:
    """Raises ValueError if a quoted field does not end. A quote within a field that is not quoted is a character."""
    csv.field_size_limit(sys.maxsize)
    row = 0
    with open_file(file, retry_policy) as stream:
        raw: Any = Utf8Stream(stream)
        lines = io.TextIOWrapper(raw, "utf-8", "replace", newline="")
        try:
            for row, _ in enumerate(csv.reader(lines, strict=True), 1):  # noqa: B007
                pass
        except csv.Error:
            # Row 1 is the first one after the header.
            raise ValueError(f"the quote opened in row {row} is never closed") from None


def _read_parquet(
    file: str, column: str, part: "FilePart | None", start_row: int, retry_policy: retry.RetryPolicy
) -> Iterator[pa.Array]:
    raw: Any
    with contextlib.ExitStack() as stack:
        if address := _http_address(file):
            url, headers = address
            connection = http.HttpRangeFile(url, headers=headers, retry_policy=retry_policy)
            raw = stack.enter_context(connection)
        elif "://" in file:
            raw = stack.enter_context(_open_with_fsspec(file, retry_policy))
        else:
            raw = stack.enter_context(pa.OSFile(file))
        # Over a network each read is a request: pre_buffer reads all of a row group in one.
        pre_buffer = "://" in file
        buffer_bytes = 0 if pre_buffer else _PARQUET_BUFFER_BYTES
        reader = stack.enter_context(pq.ParquetFile(raw, pre_buffer=pre_buffer, buffer_size=buffer_bytes))
        if column not in reader.schema_arrow.names:
            raise missing_column_error(file, column, reader.schema_arrow.names)
        for group in range(reader.num_row_groups) if part is None else range(part.begin, part.end):
            num_rows = reader.metadata.row_group(group).num_rows
            if start_row < num_rows:
                batches = reader.iter_batches(_PARQUET_BATCH_ROWS, row_groups=[group], columns=[column])
                yield from skip_rows((batch.column(0) for batch in batches), start_row)
            start_row = max(0, start_row - num_rows)
