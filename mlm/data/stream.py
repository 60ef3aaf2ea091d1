"""The endless stream of rows: shuffle windows, held-out documents, this process's share, exact resume.

A window is the next `shuffle_buffer_size` documents in the epoch's order of shards. It is permuted by a seed
made of (seed, epoch, window), so a position in the stream is a few numbers: where the window starts, how many
of its documents are used up, and how many tokens of the next. To resume, the window is read and permuted
again, that one document is tokenized again, and its first tokens are left out. No text and no token is ever
saved.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlm.data import packing as packing_lib
from mlm.data import reader as reader_lib
from mlm.data import sources
from mlm.data import tokenizer as tokenizer_lib
from mlm.errors import UserError

# Texts are tokenized this many bytes at a time: enough to keep the cores busy, little enough for a quick
# first batch and flat memory.
_CHUNK_BYTES = 2 << 20
# With no shuffling a window is only a unit of reading.
_UNSHUFFLED_WINDOW = 1024


@dataclasses.dataclass
class _Position:
    """Where the stream stands; all of it but the counters is in one epoch."""

    epoch: int = 0
    shard: int = 0  # place in the epoch's order of shards where the window starts
    row: int = 0  # row of that shard where the window starts
    window: int = 0  # windows of the epoch before this one
    document: int = 0  # documents of the window used up, of those left after dropping and in permuted order
    unit: int = 0  # units (tokens, or rows when padding) of the next document used up
    epoch_units: int = 0  # units of the epoch used up
    # Counted over the whole run: documents up to the start of the window, the other two with all of it.
    documents: int = 0
    skipped_rows: int = 0
    held_out_documents: int = 0
    counted: bool = False  # whether the window is in these two already


@dataclasses.dataclass(frozen=True)
class _Window:
    texts: pa.LargeStringArray
    order: np.ndarray  # int64: the documents kept, permuted
    ends: np.ndarray  # int64: bytes of texts up to and with each of `order`
    next_shard: int
    next_row: int


class RowStream:
    """This process's rows, without end: an iterator of int32 [batch_rows, max_seq_length], C-contiguous.

    Over all processes one epoch is every document of the source once, less the blank and the held-out ones.
    When the source ends the next epoch starts in a new order, and the row under way goes on into it.

    Args:
        source: the documents.
        tokenizer: its begin, end and pad ids, and `encode`.
        seed: of the order of shards and of the windows.
        max_seq_length: tokens of a row.
        packing: one of packing.PACKINGS.
        shuffle_buffer_size: documents of a window; 0 or 1 for the source's own order.
        batch_rows: rows this process gives at a time.
        held_out: texts dropped wherever they occur.
        process_index, process_count: whose share this is.

    Raises:
        UserError: from `next`, when one epoch has no document or not enough rows for one batch.
    """

    def __init__(
        self,
        source: sources.Source,
        tokenizer: tokenizer_lib.Tokenizer,
        *,
        seed: int,
        max_seq_length: int,
        packing: str,
        shuffle_buffer_size: int,
        batch_rows: int,
        held_out: pa.Array | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        _check(packing=packing, max_seq_length=max_seq_length)
        if seed < 0:
            raise UserError(f"seed={seed} is negative: set 0 or more")
        if batch_rows < 1:
            raise UserError(f"a batch must have at least one row, not {batch_rows}")
        self._source = source
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_seq_length = max_seq_length
        self._packing = packing
        self._shuffle_buffer_size = shuffle_buffer_size
        self._batch_rows = batch_rows
        self._held_out = held_out.cast(pa.large_string()) if held_out is not None else None
        self._process_index = process_index
        self._process_count = process_count
        self._units_per_batch = batch_rows * packing_lib.units_per_row(packing, max_seq_length=max_seq_length)
        self.load_state_dict(self._identity() | dataclasses.asdict(_Position()))

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        parts, have = [], 0
        while have < self._units_per_batch:
            if self._used == len(self._chunk.data):
                self._advance()
                continue
            part = self._chunk.data[self._used : self._used + self._units_per_batch - have]
            parts.append(part)
            have += len(part)
            self._used += len(part)
            self._epoch_units += len(part)
        return np.concatenate(parts).reshape(self._batch_rows, self._max_seq_length)

    @property
    def epoch(self) -> int:
        """The epoch of the last row given; 0 before the first."""
        return self._start.epoch

    @property
    def counters(self) -> dict[str, int]:
        """Over the run so far: documents begun, rows skipped for want of text, documents held out.

        Rows skipped and held out count as soon as their window is read.
        """
        document, unit = self._place()
        return {
            "documents": self._start.documents + document + (unit > 0),
            "skipped_rows": self._start.skipped_rows,
            "held_out_documents": self._start.held_out_documents,
        }

    def state_dict(self) -> dict:
        """The state after the last batch: a few numbers and names, for JSON."""
        document, unit = self._place()
        position = dataclasses.replace(
            self._start, document=document, unit=unit, epoch_units=self._epoch_units
        )
        return self._identity() | dataclasses.asdict(position)

    def load_state_dict(self, state: dict) -> None:
        """Goes on right after the batch whose `state_dict()` this is.

        Raises:
            UserError: the state is of another order of the data (seed, shards, packing, processes...).
        """
        for key, value in self._identity().items():
            if state[key] != value:
                raise UserError(
                    f"cannot resume the data stream: it was saved with {key}={state[key]!r} and is now "
                    f"{value!r}; restore that, or start in a new work directory"
                )
        names = [field.name for field in dataclasses.fields(_Position)]
        # `document` and `unit` say where to go on in the window; the rest of `_start` is the window's start.
        self._start = _Position(**{name: state[name] for name in names})
        self._epoch_units = self._start.epoch_units
        self._window: _Window | None = None
        self._reader: reader_lib.Reader | None = None
        self._chunk = packing_lib.Units(np.empty(0, np.int32), np.zeros(1, np.int64))
        self._chunk_document = self._start.document
        self._used = 0

    def _identity(self) -> dict:
        """What must be the same for a saved position to mean the same."""
        return {
            "seed": self._seed,
            "max_seq_length": self._max_seq_length,
            "packing": self._packing,
            "shuffle_buffer_size": self._shuffle_buffer_size,
            "num_shards": self._source.num_shards,
            "process_index": self._process_index,
            "process_count": self._process_count,
        }

    def _place(self) -> tuple[int, int]:
        """(documents of the window used up, units of the next one used up)."""
        if self._window is None:
            return self._start.document, self._start.unit
        done = int(np.searchsorted(self._chunk.offsets, self._used, side="right")) - 1
        return self._chunk_document + done, self._used - int(self._chunk.offsets[done])

    def _advance(self) -> None:
        """Moves on to the next chunk of the window, the next window, or the next epoch."""
        if self._window is None:  # the first call, or the first after a resume
            self._reader = self._open_reader()
            seen = self._start.counted
            self._window = self._read_window()
            if seen and self._window is None:
                raise self._changed()
            resumed_unit = self._start.unit
        else:
            self._chunk_document += len(self._chunk.offsets) - 1
            resumed_unit = 0
        window = self._window
        if window is not None and self._chunk_document < len(window.order):
            first = self._chunk_document
            before = window.ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(window.ends, before + _CHUNK_BYTES, side="right")))
            texts = window.texts.take(pa.array(window.order[first:last]))
            self._chunk = packing_lib.pack(
                texts, self._tokenizer, packing=self._packing, max_seq_length=self._max_seq_length
            )
            self._used = resumed_unit
            if resumed_unit > len(self._chunk.data):
                raise self._changed()
            return
        if window is not None:
            if self._chunk_document + (resumed_unit > 0) > len(window.order):
                raise self._changed()
            self._start = dataclasses.replace(
                self._start,
                shard=window.next_shard,
                row=window.next_row,
                window=self._start.window + 1,
                document=0,
                unit=0,
                documents=self._start.documents + len(window.order),
                counted=False,
            )
            self._window = self._read_window()
        if self._window is None:
            self._end_epoch()
        self._chunk = packing_lib.Units(self._chunk.data[:0], np.zeros(1, np.int64))
        self._chunk_document = 0
        self._used = 0

    def _changed(self) -> UserError:
        return UserError(
            f"cannot resume the data stream: the data set {self._source.name!r} is not what it was when the "
            "checkpoint was written; restore it, or start in a new work directory"
        )

    def _end_epoch(self) -> None:
        if self._epoch_units < self._units_per_batch:
            counters = self.counters
            lost = (
                f"{counters['skipped_rows']} blank rows, {counters['held_out_documents']} held-out documents"
            )
            who = (
                f" for process {self._process_index} of {self._process_count}"
                if self._process_count > 1
                else ""
            )
            if self._epoch_units == 0:
                raise UserError(
                    f"the data set {self._source.name!r} has no documents to train on{who} ({lost})"
                )
            rows = self._epoch_units * self._batch_rows // self._units_per_batch
            raise UserError(
                f"the data set {self._source.name!r} is too small: an epoch has {rows} rows of "
                f"{self._max_seq_length} tokens{who} and a batch needs {self._batch_rows} ({lost}); "
                "lower per_device_train_batch_size or data.max_seq_length, or add data"
            )
        self._epoch_units = 0
        self._start = dataclasses.replace(
            self._start,
            epoch=self._start.epoch + 1,
            shard=0,
            row=0,
            window=0,
            document=0,
            unit=0,
            epoch_units=0,
        )
        self._reader = self._open_reader()
        self._window = self._read_window()

    def _open_reader(self) -> reader_lib.Reader:
        order = np.arange(self._source.num_shards)
        if self._shuffle_buffer_size > 1:
            order = np.random.default_rng((self._seed, 0, self._start.epoch)).permutation(order)
        share = reader_lib.deal(order, process_index=self._process_index, process_count=self._process_count)
        return reader_lib.Reader(self._source, share, shard=self._start.shard, row=self._start.row)

    def _read_window(self) -> _Window | None:
        shuffled = self._shuffle_buffer_size > 1
        texts = self._reader.take(self._shuffle_buffer_size if shuffled else _UNSHUFFLED_WINDOW)
        if texts is None:
            return None
        order = np.arange(len(texts))
        if shuffled:
            key = (self._seed, 1, self._start.epoch, self._start.window)
            order = np.random.default_rng(key).permutation(len(texts))
        kept = reader_lib.has_text(texts)
        skipped_rows = len(texts) - int(kept.sum())
        if self._held_out is not None and len(self._held_out):
            kept &= ~np.asarray(pc.is_in(texts, value_set=self._held_out))
        order = order[kept[order]]
        if not self._start.counted:  # a window read again after a resume was counted the first time
            self._start = dataclasses.replace(
                self._start,
                skipped_rows=self._start.skipped_rows + skipped_rows,
                held_out_documents=self._start.held_out_documents + len(texts) - skipped_rows - len(order),
                counted=True,
            )
        return _Window(
            texts=texts,
            order=order,
            ends=np.cumsum(reader_lib.num_bytes(texts)[order]),
            next_shard=self._reader.shard,
            next_row=self._reader.row,
        )


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """Rows to evaluate on, and what to keep out of training for their sake.

    Attributes:
        rows: int32 [num_rows, max_seq_length].
        documents: the distinct texts any part of which is in the rows.
    """

    rows: np.ndarray
    documents: pa.LargeStringArray


def read_eval_rows(
    source: sources.Source,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    num_rows: int,
    max_seq_length: int,
    packing: str,
    allow_fewer: bool = False,
) -> EvalRows:
    """The first `num_rows` rows of the source in its own order: the same in every process and every run.

    With `allow_fewer` a source that has fewer gives those, less a last part row.
    """
    _check(packing=packing, max_seq_length=max_seq_length)
    units_per_row = packing_lib.units_per_row(packing, max_seq_length=max_seq_length)
    needed, have = num_rows * units_per_row, 0
    parts, documents = [], []
    reader = reader_lib.Reader(source, reader_lib.deal(np.arange(source.num_shards)))
    while have < needed:
        texts = reader.take(_UNSHUFFLED_WINDOW)
        if texts is None and allow_fewer and have >= units_per_row:
            break
        if texts is None:
            raise UserError(
                f"the data set {source.name!r} has {have // units_per_row} rows of {max_seq_length} tokens, "
                f"fewer than the {num_rows} to evaluate on: lower data.num_eval_samples"
            )
        texts = texts.filter(pa.array(reader_lib.has_text(texts)))
        units = packing_lib.pack(texts, tokenizer, packing=packing, max_seq_length=max_seq_length)
        parts.append(units.data[: needed - have])
        documents.append(texts.slice(0, int(np.searchsorted(units.offsets[:-1], needed - have))))
        have += len(parts[-1])
    rows = np.concatenate(parts) if parts else np.empty(0, np.int32)
    rows = rows[: have // units_per_row * units_per_row].reshape(-1, max_seq_length)
    texts = pa.concat_arrays(documents) if documents else pa.array([], pa.large_string())
    return EvalRows(rows, pc.unique(texts))


def _check(*, packing: str, max_seq_length: int) -> None:
    if packing not in packing_lib.PACKINGS:
        raise UserError(
            f"data.packing={packing!r} is not known: choose one of {', '.join(packing_lib.PACKINGS)}"
        )
    if max_seq_length < 3:
        raise UserError(
            f"data.max_seq_length={max_seq_length} leaves no room between begin and end: set 3 or more"
        )
