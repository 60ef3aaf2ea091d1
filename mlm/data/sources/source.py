"""A dataset name, files or URLs -> shards of documents, read as Arrow arrays.

Files are read by files.py, those of named datasets too if their format is JSON, CSV or text; other named datasets are
streamed with `datasets`; docstrings are read by docstrings.py.
"""

import dataclasses
import functools
import glob
import json
import logging as std_logging
import lzma
import os
import re
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import huggingface_hub
import pyarrow as pa
from absl import logging

from mlm.data.sources import docstrings, file_parts, files, retry
from mlm.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets

_HUB_TIMEOUT_SECONDS = 10.0
_MAX_HUB_TRIES = 3
# Rows per table read with `datasets`.
_TABLE_ROWS = 256
# What the readers raise for a file that is corrupt, truncated or unreachable.
_READ_ERRORS = (
    ImportError,  # from fsspec, for a URL scheme that needs a package
    pa.ArrowException,
    ValueError,
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    *retry.CLIENT_ERRORS,
)


class ShardUnavailableError(UserError):
    """A shard that could not be read within the network deadline.

    The reader may skip the rest of the shard and continue with another one; if nothing catches it, it ends the run like
    any UserError.
    """


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in shards, in a fixed order.

    Attributes:
        name: for messages and the model card.
        text_column: name of the column with the text.
        num_shards: number of parts that can be read independently.
        columns: (shard, first row) -> the arrays of the column from that row on, of any type.
        shard_name: shard -> its name, for messages.
        retry_policy: for shards that are read over a network; None for local ones.
        read_errors: what `columns` raises besides _READ_ERRORS.
        blank_rows_are_separators: True if blank rows only separate documents, as blank lines of a text file do; False
            if a blank row is a document without text, which is counted as skipped.
    """

    name: str
    text_column: str
    num_shards: int
    columns: Callable[[int, int], Iterator[pa.Array | pa.ChunkedArray]]
    shard_name: Callable[[int], str]
    retry_policy: retry.RetryPolicy | None = None
    read_errors: tuple[type[Exception], ...] = ()
    blank_rows_are_separators: bool = False

    def read(self, shard: int, *, start_row: int = 0) -> Iterator[pa.LargeStringArray]:
        """Reads the texts of a shard from a row on; null for rows that are null, not a string or not UTF-8.

        The row number is the complete state: reading from row n on gives exactly the rows after the first n. (The state
        of a `datasets` stream also counts rows, and does not resume faster.)

        Failures of the network that end within the deadline are invisible: see retry.py. After a failure that the HTTP
        clients do not retry, this function reads again from the row where it happened.

        Raises:
            ShardUnavailableError: the network failed for longer than the deadline.
            UserError: the rows cannot be read, and a retry would not help.
        """
        shard_name = self.shard_name(shard)
        row = start_row
        columns = self.columns(shard, row)
        retries = retry.Retries(self.retry_policy or retry.RetryPolicy(), shard_name)
        while True:
            try:
                column = next(columns, None)
            except (*_READ_ERRORS, *self.read_errors) as error:
                if self.retry_policy is None or retry.classify_error(error) is retry.Failure.PERMANENT:
                    raise UserError(f"cannot read {shard_name}: {one_line(error)}; fix it or remove it") from None
                try:
                    retries.failed(error)
                except retry.RetriesExhaustedError as exhausted:
                    raise ShardUnavailableError(
                        f"cannot read {shard_name} from row {row} on: {one_line(exhausted)}"
                    ) from None
                columns = self.columns(shard, row)
                continue
            if column is None:
                return
            retries.succeeded()
            row += len(column)
            yield _as_text(column, column_name=self.text_column, source_name=self.name)


def open_source(
    *,
    dataset_name: str = "",
    dataset_config_name: str | None = None,
    data_files: tuple[str, ...] | list[str] | str | None = None,
    split: str = "train",
    text_column_name: str = "text",
    cache_dir: str | None = None,
    retry_policy: retry.RetryPolicy = files.DEFAULT_RETRY_POLICY,
    min_shards: int = 0,
) -> Source:
    """Opens documents to train on; reads no further than the first rows, to find out whether there are any.

    Args:
        dataset_name: "docstrings" (see docstrings.py), a dataset on the Hugging Face hub, or a local directory.
        dataset_config_name: configuration of a named dataset.
        data_files: a path, glob or URL, or several; used instead of `dataset_name` if given. One file is one shard, or
            several, see `min_shards`.
        split: split of a named dataset.
        text_column_name: column with the documents.
        cache_dir: cache directory of `datasets`; None for its default.
        retry_policy: for reads over a network.
        min_shards: local files are divided until there are about this many shards, see file_parts.py.

    Raises:
        UserError: the documents do not exist, cannot be read, have no such column or no rows.
    """
    if data_files is not None:
        patterns = (data_files,) if isinstance(data_files, str) else tuple(data_files)
        source = _open_files(patterns, text_column=text_column_name, retry_policy=retry_policy, min_shards=min_shards)
    elif dataset_name == "docstrings":
        shards = docstrings.find_shards()
        source = Source(
            name="docstrings",
            text_column="text",
            num_shards=len(shards),
            columns=lambda shard, row: files.skip_rows(docstrings.read_shard(shards[shard]), row),
            shard_name=lambda shard: shards[shard].name,
        )
    else:
        source = _open_named(
            dataset_name,
            config=dataset_config_name,
            split=split,
            text_column=text_column_name,
            cache_dir=cache_dir,
            retry_policy=retry_policy,
            min_shards=min_shards,
        )
    for shard in range(source.num_shards):
        for texts in source.read(shard):
            if len(texts):
                return source
    raise UserError(f"the dataset {source.name!r}: is empty; choose a dataset that has rows")


def _open_files(
    patterns: tuple[str, ...], *, text_column: str, retry_policy: retry.RetryPolicy, min_shards: int
) -> Source:
    paths = expand_files(patterns)
    formats = [files.file_format(path) for path in paths]
    for path, found in zip(paths, formats, strict=True):
        if found != formats[0]:
            raise UserError(
                f"data.data_files={patterns!r}: the files must have one format, but {paths[0]!r} is {formats[0]} and "
                f"{path!r} is {found}; use one format, or two sources in data.mixture"
            )
    shards = file_parts.divide(paths, kind=formats[0], min_shards=min_shards)

    def columns(shard: int, row: int) -> Iterator[pa.Array]:
        path, part = shards[shard]
        return files.read_column(path, text_column, part=part, start_row=row, retry_policy=retry_policy)

    def shard_name(shard: int) -> str:
        path, part = shards[shard]
        # Without the revision of a dataset on the hub.
        path = re.sub("^(hf://datasets/[^@]+)@[^/]+", r"\1", path)
        return repr(path) if part is None else f"{path!r} ({part})"

    return Source(
        name=patterns[0] if len(patterns) == 1 else f"{patterns[0]} and {len(patterns) - 1} more",
        text_column=text_column,
        num_shards=len(shards),
        columns=columns,
        shard_name=shard_name,
        retry_policy=retry_policy if any("://" in path for path in paths) else None,
        blank_rows_are_separators=formats[0] == "text",
    )


def expand_files(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Returns absolute paths and URLs in the given order, globs expanded and sorted.

    Raises:
        UserError: a path does not exist or is a directory, or a glob matches no file.
    """
    paths: list[str] = []
    for pattern in map(os.path.expanduser, patterns):
        if "://" in pattern or os.path.isfile(pattern):
            paths.append(pattern)
        elif os.path.isdir(pattern):
            example = os.path.join(pattern, "*.parquet")
            raise UserError(f"data.data_files={pattern!r}: is a directory; name the files in it, for example {example}")
        elif glob.has_magic(pattern):
            matches = [match for match in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(match)]
            if not matches:
                raise UserError(f"data.data_files={pattern!r}: no file matches; check the directory and the pattern")
            paths += matches
        else:
            raise UserError(f"data.data_files={pattern!r}: there is no such file; check the path")
    paths = [path if "://" in path else os.path.abspath(path) for path in paths]
    unique = tuple(dict.fromkeys(paths))
    if len(unique) < len(paths):
        repeated = next(path for path in paths if paths.count(path) > 1)
        logging.warning(
            "data.data_files names %d files more than once, such as %s; each is read once",
            sum(paths.count(path) > 1 for path in unique),
            repeated,
        )
    return unique


def _open_named(
    name: str,
    *,
    config: str | None,
    split: str,
    text_column: str,
    cache_dir: str | None,
    retry_policy: retry.RetryPolicy,
    min_shards: int,
) -> Source:
    # Imported here: it takes a second, and files and docstrings do not need it.
    import datasets
    import datasets.exceptions

    _silence_datasets()
    remote = not os.path.isdir(name)
    if remote:
        if is_local_path(name):
            raise UserError(f"data.dataset_name={name!r}: there is no such directory; check the path")
        require_hub(f"data.dataset_name={name!r}")
        retry.configure_hub_retries(retry_policy)
    build = functools.partial(datasets.load_dataset_builder, name, config or None, cache_dir=cache_dir or None)
    is_saved_to_disk = _is_saved_to_disk(name)
    paths: tuple[str, ...] = ()
    retries = retry.Retries(retry_policy, name)
    while True:
        try:
            if is_saved_to_disk:
                dataset = _load_from_disk(name, split=split)
                break
            builder = build()
            if paths := _plain_files(builder, split=split, text_column=text_column):
                break
            dataset = builder.as_streaming_dataset(split=split)
            if builder.name == "parquet" and text_column in (dataset.features or ()):
                # Other columns are not read.
                dataset = build(columns=[text_column]).as_streaming_dataset(split=split)
            break
        except (*_READ_ERRORS, datasets.exceptions.DatasetsError, RuntimeError) as error:
            reason = one_line(error)
            try:
                if remote and retry.classify_error(error) is retry.Failure.TRANSIENT:
                    retries.failed(error)
                    continue
            except retry.RetriesExhaustedError as exhausted:
                reason = one_line(exhausted)
            raise UserError(f"data.dataset_name={name!r}: cannot be opened ({reason}); check the name") from None
    shown_name = f"{name}, {config}" if config else name
    if paths:
        source = _open_files(paths, text_column=text_column, retry_policy=retry_policy, min_shards=min_shards)
        return dataclasses.replace(source, name=shown_name)
    num_shards = dataset.num_shards

    def columns(shard: int) -> Iterator[pa.ChunkedArray]:
        part = dataset.shard(num_shards=num_shards, index=shard).with_format("arrow")
        for table in part.iter(_TABLE_ROWS):
            if text_column not in table.column_names:
                raise files.missing_column_error(name, text_column, table.column_names)
            yield table.column(text_column)

    return Source(
        name=shown_name,
        text_column=text_column,
        num_shards=num_shards,
        columns=lambda shard, row: files.skip_rows(columns(shard), row),
        shard_name=lambda shard: f"{name!r} (shard {shard} of {num_shards})",
        retry_policy=retry_policy if remote else None,
        read_errors=(datasets.exceptions.DatasetsError,),
    )


def _plain_files(builder: "datasets.DatasetBuilder", *, split: str, text_column: str) -> tuple[str, ...]:
    """Returns the JSON, CSV or text files of a split, if files.py reads them as `datasets` would.

    `datasets` itself casts every chunk of a file to the columns of the first one: a column that is null first and text
    later ends the run, and values of several types change the texts beside them. files.py reads one column only. The
    files are the shards of `datasets`, in its order, with the same rows: saved positions keep their meaning.

    Returns:
        The paths, hf://datasets/... for those on the hub; () if the files have another format, several formats, or
        options in the dataset's README.md.
    """
    if builder.name not in ("json", "csv", "text") or (builder.name == "text" and text_column != "text"):
        return ()
    own = {"name", "version", "data_dir", "data_files", "description", "features"}
    defaults = vars(type(builder.config)())
    if any(value != defaults.get(field) for field, value in vars(builder.config).items() if field not in own):
        return ()
    paths_of_split = dict(builder.config.data_files)
    if split not in paths_of_split:
        return ()
    paths = tuple(map(str, paths_of_split[split]))
    try:
        return paths if len({files.file_format(path) for path in paths}) == 1 else ()
    except UserError:  # an archive, for example
        return ()


def _is_saved_to_disk(name: str) -> bool:
    """Returns whether `name` is a directory written by `save_to_disk()` of `datasets`."""
    return any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json"))


def _load_from_disk(directory: str, *, split: str) -> "datasets.IterableDataset":
    """Returns a dataset written by `save_to_disk()`, with a shard for each of its files."""
    import datasets  # Imported here: see _open_named.

    found = datasets.load_from_disk(directory)
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"it has no split {split!r}, only {', '.join(found)}")
        found = found[split]
    return found.to_iterable_dataset(num_shards=max(1, len(found.cache_files)))


def _as_text(column: pa.Array | pa.ChunkedArray, *, column_name: str, source_name: str) -> pa.LargeStringArray:
    """Converts a column to large strings, null for rows without valid text; raises UserError for a non-text type."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column.type, pa.BaseExtensionType) and column.type.extension_name == "arrow.json":
        return _strings_of_json(column.storage)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    arrow_type = column.type
    if pa.types.is_null(arrow_type):
        return pa.nulls(len(column), pa.large_string())
    is_text = pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)
    is_bytes = pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type)
    is_view = pa.types.is_string_view(arrow_type) or pa.types.is_binary_view(arrow_type)
    if not (is_text or is_bytes or is_view):
        raise UserError(
            f"data.text_column_name={column_name!r}: the column of {source_name!r} has the type {arrow_type}, not "
            "text; set it to another column"
        )
    return _valid_utf8(column.cast(pa.large_binary()))


def _valid_utf8(column: pa.LargeBinaryArray) -> pa.LargeStringArray:
    """Converts bytes to strings, null for rows that are not UTF-8, which are found by bisection."""
    try:
        return column.cast(pa.large_string())
    except pa.ArrowInvalid:
        if len(column) == 1:
            return pa.nulls(1, pa.large_string())
        half = len(column) // 2
        return pa.concat_arrays([_valid_utf8(column.slice(0, half)), _valid_utf8(column.slice(half))])


def _strings_of_json(column: pa.Array) -> pa.LargeStringArray:
    """Converts a column of mixed types, which `datasets` returns as JSON, to strings; null for other values."""
    values = (json.loads(value) if value is not None else None for value in column.to_pylist())
    return pa.array([value if isinstance(value, str) else None for value in values], pa.large_string())


def is_local_path(name: str) -> bool:
    """Returns whether a name must be a local path, because no hub repository can have it."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def require_hub(what: str) -> None:
    """Raises UserError within seconds if the Hugging Face hub cannot be reached; its client would retry for minutes.

    A connection that is reset or times out is retried, one that is refused is not.

    Args:
        what: the beginning of the message, such as "data.dataset_name='c4'".
    """
    endpoint = huggingface_hub.constants.ENDPOINT
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"{what}: is not a local directory, and HF_HUB_OFFLINE is set; unset it, or name local files")
    request = urllib.request.Request(endpoint, method="HEAD")
    for tries in range(1, _MAX_HUB_TRIES + 1):
        try:
            urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS).close()
            return
        except urllib.error.HTTPError:
            return  # It can be reached.
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                return  # It can be reached; the hub's client has other certificates.
            if isinstance(reason, ConnectionResetError | TimeoutError) and tries < _MAX_HUB_TRIES:
                time.sleep(tries / 2)
                continue
            raise UserError(
                f"{what}: is not a local directory, and {endpoint} cannot be reached ({one_line(reason)}); "
                "check the network, or name local files"
            ) from None


def _silence_datasets() -> None:
    """Disables progress bars, and log lines about errors that become a UserError here."""
    import datasets  # Imported here: see _open_named.

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(std_logging.CRITICAL)
    huggingface_hub.utils.disable_progress_bars()
