"""A name, files or a URL -> shards of rows, read as Arrow arrays.

Named data sets are read through streaming `datasets`, files by files.py, docstrings by docstrings.py.
"""

import dataclasses
import functools
import glob
import json
import logging as std_logging
import lzma
import os
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator

import datasets
import datasets.exceptions
import huggingface_hub
import pyarrow as pa

from mlm.data.sources import docstrings, files, retry
from mlm.errors import UserError, one_line

_HUB_TIMEOUT_SECONDS = 10.0
# Of the first question to the hub.
_HUB_TRIES = 3
# Rows of a table read through `datasets`.
_TABLE_ROWS = 256
# What the readers raise on a file that is not what it seems, or ends early.
_READ_ERRORS = (
    ImportError,  # fsspec's, for a kind of URL that needs a package
    pa.ArrowException,
    ValueError,
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    datasets.exceptions.DatasetsError,
    *retry.ERRORS,
)


class ShardLostError(UserError):
    """A shard that the network did not give, however patiently it was asked.

    Who can do without its further rows goes on with another shard; for all others it is a UserError.
    """


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in shards, in a fixed order.

    Attributes:
        name: for messages and the model card.
        text_column: the name of the column.
        num_shards: how many parts can be read without reading the others.
        columns: (shard, first row) -> the arrays of the texts from that row on, whatever their type.
        shard_name: shard -> its name, for messages.
        patience: with the network that the shards come over; None where they do not.
        has_gaps: whether a blank row is what stands between documents, as in a text file, and no document lost.
    """

    name: str
    text_column: str
    num_shards: int
    columns: Callable[[int, int], Iterator[pa.Array | pa.ChunkedArray]]
    shard_name: Callable[[int], str]
    retry_policy: retry.RetryPolicy | None = None
    has_gaps: bool = False

    def read(self, shard: int, *, start_row: int = 0) -> Iterator[pa.LargeStringArray]:
        """The texts of a shard's rows from `start_row` on, null where a row is null, not text or not UTF-8.

        The row number is all the state there is: reading on from it gives exactly the rows after it. The
        saved state of `datasets` counts rows, too, and is no quicker to go on from.

        Over a network, what mends itself within the deadline is not noticed: see network.py. What its clients have
        not mended already is read again from the row where it broke off.

        Raises:
            ShardLostError: the network was bad for longer than that.
            UserError: the rows cannot be read, and will not be.
        """
        name = self.shard_name(shard)
        row = start_row
        columns = self.columns(shard, row)
        retries = retry.Retries(self.retry_policy or retry.RetryPolicy(), name)
        while True:
            try:
                column = next(columns, None)
            except _READ_ERRORS as error:
                if self.retry_policy is None or retry.classify_error(error) is retry.Failure.PERMANENT:
                    raise UserError(f"cannot read {name}: {one_line(error)}; mend it, or leave it out") from None
                try:
                    retries.failed(error)
                except retry.RetriesExhaustedError as gave_up:
                    raise ShardLostError(f"cannot read {name} from row {row} on: {one_line(gave_up)}") from None
                columns = self.columns(shard, row)
                continue
            if column is None:
                return
            retries.succeeded()
            row += len(column)
            yield _as_text(column, column_name=self.text_column, source_name=self.name)


def open_source(
    *,
    dataset_name: str | None,
    dataset_config_name: str | None = None,
    data_files: tuple[str, ...] | list[str] | str | None = None,
    split: str = "train",
    text_column_name: str = "text",
    cache_dir: str = "",
    retry_policy: retry.RetryPolicy | None = None,
) -> Source:
    """Opens the rows to train on; reads no more than the first of them.

    Args:
        dataset_name: "docstrings" (see docstrings.py), a name on the Hugging Face hub, or a local directory.
        dataset_config_name: one of the data set's configurations.
        data_files: a path, glob or URL, or several; they win over `dataset_name`. One file is one shard.
        split: of a named data set.
        text_column_name: the column that holds the documents.
        cache_dir: where `datasets` keeps its files; "" for its own choice.
        patience: with the network; None for the defaults.

    Raises:
        UserError: what does not exist, cannot be read, has no such column or no rows.
    """
    _silence_datasets()
    retry_policy = retry_policy or retry.RetryPolicy()
    if data_files is not None and not (data_files and isinstance(data_files, str | list | tuple)):
        raise UserError(f"data.data_files={data_files!r} names no file: give a path, a glob, a URL or a list of them")
    if isinstance(data_files, str):
        data_files = (data_files,) if data_files else ()
    if data_files:
        source = _open_files(tuple(data_files), text_column=text_column_name, retry_policy=retry_policy)
    elif dataset_name == "docstrings":
        shards = docstrings.find_shards()
        source = Source(
            name="docstrings",
            text_column="text",
            num_shards=len(shards),
            columns=lambda shard, row: _skip_rows(docstrings.read_shard(shards[shard]), row),
            shard_name=lambda shard: shards[shard].name,
        )
    elif dataset_name:
        source = _open_named(
            dataset_name,
            config=dataset_config_name,
            split=split,
            text_column=text_column_name,
            cache_dir=cache_dir,
            retry_policy=retry_policy,
        )
    else:
        raise UserError("no data: set data.dataset_name or data.data_files")
    for shard in range(source.num_shards):
        for texts in source.read(shard):
            if len(texts):
                return source
    raise UserError(f"the data set {source.name!r} is empty: it has no rows; name one that has text")


def _open_files(patterns: tuple[str, ...], *, text_column: str, retry_policy: retry.RetryPolicy) -> Source:
    paths = expand_files(patterns)
    kinds = [files.file_format(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"data.data_files must be of one kind, but {paths[0]!r} is {kinds[0]} and {path!r} is {kind}: "
                "take one kind, or name two sources in data.mixture"
            )
    return Source(
        name=patterns[0] if len(patterns) == 1 else f"{patterns[0]} and {len(patterns) - 1} more",
        text_column=text_column,
        num_shards=len(paths),
        columns=lambda shard, row: files.read_column(
            paths[shard], text_column, start_row=row, retry_policy=retry_policy
        ),
        shard_name=lambda shard: repr(paths[shard]),
        retry_policy=retry_policy if any("://" in path for path in paths) else None,
        has_gaps=kinds[0] == "text",
    )


def expand_files(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Files and URLs as given, globs expanded and sorted. UserError for what is not there."""
    files: list[str] = []
    for pattern in map(os.path.expanduser, patterns):
        if "://" in pattern or os.path.isfile(pattern):
            files.append(pattern)
        elif os.path.isdir(pattern):
            example = os.path.join(pattern, "*.parquet")
            raise UserError(f"data file {pattern!r} is a directory: name its files, for example {example}")
        elif glob.has_magic(pattern):
            matches = [match for match in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(match)]
            if not matches:
                raise UserError(f"no file matches data.data_files={pattern!r}: check the folder and the pattern")
            files += matches
        else:
            raise UserError(f"no data file {pattern!r}: check data.data_files")
    return tuple(file if "://" in file else os.path.abspath(file) for file in files)


def _open_named(
    name: str,
    *,
    config: str | None,
    split: str,
    text_column: str,
    cache_dir: str,
    retry_policy: retry.RetryPolicy,
) -> Source:
    remote = not os.path.isdir(name)
    if remote:
        if is_local_path(name):
            raise UserError(f"no data set directory {name!r}: check data.dataset_name")
        require_hub(f"the data set {name!r}")
        retry.configure_hub_retries(retry_policy)
    load = functools.partial(
        datasets.load_dataset, name, config or None, split=split, streaming=True, cache_dir=cache_dir or None
    )
    retries = retry.Retries(retry_policy, name)
    while True:
        try:
            dataset = load()
            if dataset.info.builder_name == "parquet" and text_column in (dataset.features or ()):
                dataset = load(columns=[text_column])  # leaves the other columns where they are
            break
        except (*_READ_ERRORS, RuntimeError) as error:
            reason = one_line(error)
            try:
                if remote and retry.classify_error(error) is retry.Failure.TRANSIENT:
                    retries.failed(error)
                    continue
            except retry.RetriesExhaustedError as gave_up:
                reason = one_line(gave_up)
            raise UserError(f"cannot open the data set {name!r}: {reason}; check data.dataset_name") from None
    num_shards = dataset.num_shards

    def columns(shard: int) -> Iterator[pa.ChunkedArray]:
        part = dataset.shard(num_shards=num_shards, index=shard).with_format("arrow")
        for table in part.iter(_TABLE_ROWS):
            if text_column not in table.column_names:
                raise files.missing_column(name, text_column, table.column_names)
            yield table.column(text_column)

    return Source(
        name=f"{name}, {config}" if config else name,
        text_column=text_column,
        num_shards=num_shards,
        columns=lambda shard, row: _skip_rows(columns(shard), row),
        shard_name=lambda shard: f"{name!r} (shard {shard} of {num_shards})",
        retry_policy=retry_policy if remote else None,
    )


def _skip_rows(columns: Iterator[pa.Array | pa.ChunkedArray], start_row: int) -> Iterator[pa.Array | pa.ChunkedArray]:
    for column in columns:
        if start_row < len(column):
            yield column.slice(start_row)
        start_row = max(0, start_row - len(column))


def _as_text(column: pa.Array | pa.ChunkedArray, *, column_name: str, source_name: str) -> pa.LargeStringArray:
    """Any column of texts -> large strings, null where there is no text. UserError for another type."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column.type, pa.BaseExtensionType) and column.type.extension_name == "arrow.json":
        return _strings_of_json(column.storage)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.large_string())
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    if not (is_text or is_bytes):
        raise UserError(
            f"the column {column_name!r} of {source_name!r} holds {kind}, not text: "
            "set data.text_column_name to another"
        )
    return _valid_utf8(column.cast(pa.large_binary()))


def _valid_utf8(column: pa.LargeBinaryArray) -> pa.LargeStringArray:
    """The rows that are UTF-8, the others null. Halves what does not hold until the rows are found."""
    try:
        return column.cast(pa.large_string())
    except pa.ArrowInvalid:
        if len(column) == 1:
            return pa.nulls(1, pa.large_string())
        half = len(column) // 2
        return pa.concat_arrays([_valid_utf8(column.slice(0, half)), _valid_utf8(column.slice(half))])


def _strings_of_json(column: pa.Array) -> pa.LargeStringArray:
    """The strings of a column of mixed types, which `datasets` gives as JSON; null for all else.

    By row, for it is rare.
    """
    values = (json.loads(value) if value is not None else None for value in column.to_pylist())
    return pa.array([value if isinstance(value, str) else None for value in values], pa.large_string())


def is_local_path(name: str) -> bool:
    """Whether a name that is no directory can only have meant one."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def require_hub(what: str) -> None:
    """UserError, within seconds, if the Hugging Face hub cannot be reached: its own retries take minutes.

    A connection that breaks off is tried again, one that is refused is not.
    """
    endpoint = huggingface_hub.constants.ENDPOINT
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"{what} is not here and HF_HUB_OFFLINE is set: unset it, or name local files")
    request = urllib.request.Request(endpoint, method="HEAD")
    for tries in range(1, _HUB_TRIES + 1):
        try:
            urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS).close()
            return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                return  # it answers; the hub's own client knows other certificates
            if isinstance(reason, ConnectionResetError | TimeoutError) and tries < _HUB_TRIES:
                time.sleep(tries / 2)
                continue
            raise UserError(
                f"{what} is not here and needs the network, but {endpoint} cannot be reached "
                f"({one_line(reason)}): check the network, or name local files"
            ) from None


def _silence_datasets() -> None:
    """No progress bars, and no second telling of an error we tell ourselves."""
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(std_logging.CRITICAL)
    huggingface_hub.utils.disable_progress_bars()
