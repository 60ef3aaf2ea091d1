"""The endless stream of rows of one source: shuffle windows, held-out documents, exact resume.

A window is the next `shuffle_buffer_size` documents of `interleave_shards` shards, in the epoch's order of shards (see
reader.py), permuted by a seed made of (seed, epoch, window). Before that, long documents are cut into pieces (see
pieces.py), which then count as documents. So a position in the stream is a few numbers: where the window starts in each
of its shards, how many of its documents are used, and how many tokens of the next document. To resume, the window is
read and permuted again, that document is tokenized again, and its first tokens are skipped. No text or token is saved.

No stream ends, so all processes make the same number of steps: a process that has used all documents assigned to it
starts its next epoch, whatever the others do. So every process has a batch for every step, and none waits in a
collective for one that has stopped. The exception is an assignment that is too small for one batch, which is an error.
If the assignment is the same in every epoch, the first `next` raises it, before the first step; if the assignment
changes with the epoch, only `_MAX_SHORT_EPOCHS` small ones in succession are an error.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from mlm.data import best_fit, pieces, provenance
from mlm.data import packing as packing_lib
from mlm.data import reader as reader_lib
from mlm.data.shard_assignment import Cursor, Position, ShardSlice, assign_shards, reassign
from mlm.data.sources.source import Source
from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError
from mlm.settings import PACKINGS

# Texts are tokenized this many bytes at a time: enough to keep all cores busy, but few enough for a quick first batch
# and constant memory.
_CHUNK_BYTES = 2 << 20
# Documents read at once if they are not shuffled.
_UNSHUFFLED_WINDOW = 1024
# Epochs in succession in which an assignment that changes with the epoch may be too small for one batch.
_MAX_SHORT_EPOCHS = 16

# The tokenizer's two backends are compared on one document of this many bytes of text: less than 1 % of the time.
_COMPARED_EVERY_BYTES = 16 << 20
# Number of changed files that an error names.
_MAX_NAMED_SHARDS = 3

_EMPTY_CHUNK = packing_lib.PackedChunk(np.empty(0, np.int32), np.zeros(1, np.int64))


@dataclasses.dataclass(frozen=True)
class _Window:
    """Documents read at once.

    Attributes:
        texts: as read, long ones cut into pieces.
        order: int64 [N], indices into `texts` of the documents to use, permuted.
        byte_ends: int64 [N], bytes of the documents in `order` up to and including each.
        locations: int64 [N, 2], (shard, row) of the documents in `order`.
        end: the reader's position after the window.
    """

    texts: pa.LargeStringArray
    order: np.ndarray
    byte_ends: np.ndarray
    locations: np.ndarray
    end: Cursor


class RowStream:
    """This process's rows of one source: an endless iterator of int32 [batch_rows, max_seq_length], C-contiguous.

    Over all processes one epoch is every document of the source once, except blank and held-out ones. When the source
    ends, the next epoch starts in a new order, and a row that is not full is continued with it.

    Args:
        source: the documents.
        tokenizer: text to ids; also gives the begin, end and padding ids.
        seed: seed for the shard order and the window permutations.
        max_seq_length: tokens per row.
        packing: one of settings.PACKINGS.
        shuffle_buffer_size: documents per window; 0 or 1 for the source's own order, which ignores
            `first_shuffle_buffer_size`, `shuffle_piece_bytes` and `interleave_shards`.
        first_shuffle_buffer_size: documents of the first window of the first epoch; every later one has twice as many,
            up to `shuffle_buffer_size`. 0 for `shuffle_buffer_size`.
        shuffle_buffer_bytes: a window ends early with the document that reaches so many bytes.
        shuffle_piece_bytes: longer documents of a window are cut into pieces before they are permuted; 0 for complete
            documents.
        interleave_shards: number of shards that a window reads from at the same time.
        batch_rows: rows that `next` returns.
        held_out: texts dropped wherever they occur.
        process_index, process_count: index of this process, and number of processes that divide the source.
        max_failed_shards: number of shards that may be skipped if the network fails, see reader.py.
        accept_changed_files: True to resume although the documents of the window have changed.

    Raises:
        UserError: from `next`, if one epoch has no document or not enough rows for one batch.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seed: int,
        max_seq_length: int,
        packing: str,
        shuffle_buffer_size: int,
        batch_rows: int,
        first_shuffle_buffer_size: int = 0,
        shuffle_buffer_bytes: int = reader_lib.MAX_BYTES,
        shuffle_piece_bytes: int = 0,
        interleave_shards: int = 1,
        held_out: pa.Array | None = None,
        process_index: int = 0,
        process_count: int = 1,
        max_failed_shards: int = 0,
        accept_changed_files: bool = False,
    ):
        assert packing in PACKINGS, packing
        assert max_seq_length >= 3, max_seq_length
        assert batch_rows >= 1, batch_rows
        self._source = source
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_seq_length = max_seq_length
        self._packing = packing
        self._shuffle_buffer_size = shuffle_buffer_size
        self._is_shuffled = shuffle_buffer_size > 1
        self._first_shuffle_buffer_size = first_shuffle_buffer_size if self._is_shuffled else 0
        self._shuffle_buffer_bytes = shuffle_buffer_bytes
        # With "pad" a document is one row, however long.
        self._shuffle_piece_bytes = shuffle_piece_bytes if self._is_shuffled and packing != "pad" else 0
        self._interleave_shards = interleave_shards if self._is_shuffled else 1
        self._batch_rows = batch_rows
        self._held_out = held_out.cast(pa.large_string()) if held_out is not None else None
        self._process_index = process_index
        self._process_count = process_count
        self._accept_changed_files = accept_changed_files
        self.units_per_row = packing_lib.units_per_row(packing, max_seq_length=max_seq_length)
        self._short_epochs = 0
        self._failure_budget = reader_lib.ShardFailureBudget(max_failed_shards)
        self._batch_slices: list[provenance.ChunkSlice] = []
        self._seek(Position())

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return self.take(self._batch_rows)

    def take(self, num_rows: int) -> np.ndarray:
        """Returns the next rows, int32 [num_rows, max_seq_length]."""
        needed = num_rows * self.units_per_row
        parts, count = [], 0
        self._batch_slices = []
        while count < needed:
            begin = self._chunk_unit
            if begin == len(self._chunk.data):
                self._advance()
                continue
            part = self._chunk.data[begin : begin + needed - count]
            self._batch_slices.append(
                provenance.ChunkSlice(
                    self._start.epoch, self._chunk_locations, self._chunk, begin=begin, end=begin + len(part)
                )
            )
            parts.append(part)
            count += len(part)
            self._chunk_unit += len(part)
            self._units_used += len(part)
        return np.concatenate(parts).reshape(num_rows, self._max_seq_length)

    def set_shape(self, *, max_seq_length: int, batch_rows: int) -> None:
        """Continues with rows of another length: the rest of an unfinished document begins the next row.

        Args:
            max_seq_length: tokens per row.
            batch_rows: rows that `next` returns.
        """
        is_repacked = max_seq_length != self._max_seq_length and self._packing not in packing_lib.CONCATENATING
        old_length, self._max_seq_length, self._batch_rows = self._max_seq_length, max_seq_length, batch_rows
        self.units_per_row = packing_lib.units_per_row(self._packing, max_seq_length=max_seq_length)
        if is_repacked:
            position = self._position()
            self._seek(position.repack(old_length) if self._packing == "best_fit" else position)

    def documents(self) -> list[provenance.DocumentSpan]:
        """Returns the documents of the last batch, in order."""
        return provenance.document_spans(self._batch_slices)

    def assignment(self) -> tuple[ShardSlice, ...]:
        """Returns the slices of the current work item: of the epoch's initial assignment, or after a reassignment."""
        if self._start.slices is not None:
            return self._start.slices
        return self._initial_assignment(self._start.epoch, self._process_index, self._process_count)

    def remaining(self) -> tuple[ShardSlice, ...]:
        """Returns the slices of the current work item and of all others before the next epoch."""
        return sum((item.slices for item in self._start.work_items), self.assignment())

    @property
    def epoch(self) -> int:
        """Epoch of the last row returned; 0 before the first."""
        return self._start.epoch

    @property
    def counters(self) -> dict[str, int]:
        """Counts over the run so far: documents used, rows without text, held-out documents, and so on.

        All but the documents used are counted as soon as their window is read. With packing="best_fit", cut documents
        are counted when their chunk (see best_fit.py) is packed, documents used after its last row.
        """
        position = self._position()
        counters = {
            "documents": position.num_documents(),
            "skipped_documents": position.skipped_documents,
            "held_out_documents": position.held_out_documents,
            "failed_shards": position.failed_shards,
            "tokenizer_differences": position.tokenizer_differences,
        }
        return counters | ({"cut_documents": position.cut_documents} if self._packing == "best_fit" else {})

    def state_dict(self) -> dict[str, Any]:
        """Returns the state after the last batch, for JSON: a few numbers and names."""
        return self._identity() | self._position().to_json()

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Continues after the batch with which these states were saved.

        Args:
            states: the states of all processes that saved them, by process. If this run has another number of
                processes, the work is reassigned, see shard_assignment.py.

        Raises:
            UserError: the states are from another order of the data (seed, shards, packing...).
        """
        if len(states) == self._process_count:
            state = states[self._process_index]
            self._check_identity(state, self._identity())
            self._seek(Position.from_json(state))
            return
        for index, state in enumerate(states):
            self._check_identity(state, self._identity() | {"process_index": index, "process_count": len(states)})
        position = reassign(
            [Position.from_json(state) for state in states],
            process_index=self._process_index,
            process_count=self._process_count,
            initial_assignment=self._initial_assignment,
            divides_windows=self._packing != "best_fit",
        )
        self._seek(position)

    def _identity(self) -> dict[str, Any]:
        """Returns what must be the same for a saved position to have the same meaning."""
        return {
            "seed": self._seed,
            "max_seq_length": self._max_seq_length,
            "packing": self._packing,
            "shuffle_buffer_size": self._shuffle_buffer_size,
            "first_shuffle_buffer_size": self._first_shuffle_buffer_size,
            "shuffle_buffer_bytes": self._shuffle_buffer_bytes,
            "shuffle_piece_bytes": self._shuffle_piece_bytes,
            "interleave_shards": self._interleave_shards,
            "num_shards": self._source.num_shards,
            "process_index": self._process_index,
            "process_count": self._process_count,
        }

    def _check_identity(self, state: dict[str, Any], identity: dict[str, Any]) -> None:
        for key, value in identity.items():
            if state[key] != value:
                raise UserError(
                    f"cannot resume the data stream: {key}={value!r}, but the checkpoint was saved with "
                    f"{state[key]!r}; restore the old value, or choose another --workdir"
                )

    def _seek(self, position: Position) -> None:
        """Sets the position from which `_advance` reads."""
        # Where the current window starts; after a resume `document` and `unit` say how much of the window is used.
        self._start = position
        self._units_used = position.units_used
        self._window: _Window | None = None
        self._reader = reader_lib.Reader(
            self._source,
            self.assignment(),
            cursor=position.window_start,
            interleave_shards=self._interleave_shards,
            max_bytes=self._shuffle_buffer_bytes,
            failure_budget=self._failure_budget,
        )
        self._chunk = _EMPTY_CHUNK
        self._chunk_locations = np.empty((0, 2), np.int64)
        self._chunk_start = position.document  # Index in the window of the chunk's first document.
        self._repacked = position.repacked  # For the chunk.
        self._chunk_unit = 0  # Number of units of the chunk that are used.

    def _position(self) -> Position:
        """Returns the position after the last row returned."""
        if self._window is None:
            return self._start
        done = int(np.searchsorted(self._chunk.offsets, self._chunk_unit, side="right")) - 1
        return dataclasses.replace(
            self._start,
            document=self._chunk_start + done,
            unit=self._chunk_unit - int(self._chunk.offsets[done]),
            repacked=self._repacked if done == 0 else (),
            units_used=self._units_used,
        )

    def _advance(self) -> None:
        """Moves to the next chunk of the window, else to the next window, else to the next work item or epoch."""
        first_unit = 0
        if self._window is None:  # A work item starts, or a resumed run.
            first_unit = self._start.unit
            self._window = self._read_window()
        else:
            self._chunk_start += len(self._chunk.offsets) - 1
            self._repacked = ()
        window = self._window
        if window is not None and self._chunk_start < len(window.order):
            self._pack_chunk(window, first_unit)
            return
        self._chunk, self._chunk_unit = _EMPTY_CHUNK, 0
        if window is not None:
            if self._chunk_start + (first_unit > 0) > len(window.order) and not self._accept_changed_files:
                raise self._source_changed_error()
            self._start = dataclasses.replace(
                self._start,
                window_start=window.end,
                window_index=self._start.window_index + 1,
                window_end=None,
                window_hash=None,
                document=0,
                unit=0,
                repacked=(),
                documents_before_window=self._start.documents_before_window + len(window.order),
            )
            # A work item with a window_subset has a single window.
            self._window = self._read_window() if self._start.window_subset is None else None
        self._chunk_start = 0
        if self._window is None:
            self._finish_item()

    def _read_window(self) -> _Window | None:
        """Reads, filters and permutes the next documents; returns None at the end of the work item."""
        reader = self._reader
        # A resumed run reads a window again: its rows are counted already, and it must have the same documents.
        was_read_before = self._start.window_end is not None
        reader.may_skip = not was_read_before
        texts = reader.take(self._window_size())
        if reader.failed_shards:
            failed_shards = self._start.failed_shards + reader.failed_shards
            reader.failed_shards = 0
            self._start = dataclasses.replace(self._start, slices=reader.slices, failed_shards=failed_shards)
        if texts is None:
            if was_read_before and not self._accept_changed_files:
                raise self._source_changed_error()
            return None
        window_hash = _hash(texts)
        if self._start.window_hash not in (None, window_hash):
            self._report_changed_documents()
        is_used = reader_lib.has_text(texts)
        num_blank = len(texts) - int(is_used.sum())
        if self._held_out is not None and len(self._held_out):
            is_used &= ~np.asarray(pc.is_in(texts, value_set=self._held_out))
        num_held_out = len(texts) - num_blank - int(is_used.sum())
        skipped_documents = texts.null_count if self._source.blank_rows_are_separators else num_blank
        locations = reader.locations
        if self._shuffle_piece_bytes:
            separators = (b"\n",) if self._packing == "pad_lines" else pieces.WHITESPACE
            texts, documents, is_used = pieces.cut(
                texts, is_used, max_bytes=self._shuffle_piece_bytes, separators=separators
            )
            locations = locations[documents]
        order = np.arange(len(texts))
        if self._is_shuffled:
            key = (self._seed, 1, self._start.epoch, self._start.window_index)
            order = np.random.default_rng(key).permutation(len(texts))
        order = order[is_used[order]]
        end = reader.cursor
        if not was_read_before:
            self._start = dataclasses.replace(
                self._start,
                skipped_documents=self._start.skipped_documents + skipped_documents,
                held_out_documents=self._start.held_out_documents + num_held_out,
                tokenizer_differences=self._start.tokenizer_differences + self._count_differences(texts, order),
                window_end=end,
                window_hash=window_hash,
            )
        if self._start.window_subset is not None:
            offset, stride = self._start.window_subset
            order = order[offset::stride]
        byte_ends = np.cumsum(reader_lib.num_bytes(texts)[order])
        return _Window(texts=texts, order=order, byte_ends=byte_ends, locations=locations[order], end=end)

    def _window_size(self) -> int:
        """Returns the number of documents of the window that starts here."""
        if not self._is_shuffled:
            return _UNSHUFFLED_WINDOW
        size, first = self._shuffle_buffer_size, self._first_shuffle_buffer_size
        if not first or self._start.epoch:
            return size
        # No window has 2^30 documents.
        return min(size, first << min(self._start.window_index, 30))

    def _count_differences(self, texts: pa.LargeStringArray, order: np.ndarray) -> int:
        """Compares the tokenizer's backends on some documents of the window, in the first window on at least one."""
        window_index, num_bytes = self._start.window_index, int(reader_lib.num_bytes(texts).sum())
        before, after = (-(-index * num_bytes // _COMPARED_EVERY_BYTES) for index in (window_index, window_index + 1))
        if after == before or len(order) == 0:
            return 0
        return self._tokenizer.count_differences(texts.take(order[:: -(-len(order) // (after - before))]))

    def _pack_chunk(self, window: _Window, first_unit: int) -> None:
        """Tokenizes and packs documents of the window from `_chunk_start` on, and skips the first units."""
        first = self._chunk_start
        bytes_before = window.byte_ends[first - 1] if first else 0
        chunk_bytes = best_fit.CHUNK_BYTES if self._packing == "best_fit" else _CHUNK_BYTES
        last = max(first + 1, int(np.searchsorted(window.byte_ends, bytes_before + chunk_bytes, side="right")))
        texts = window.texts.take(pa.array(window.order[first:last]))
        start = self._start
        self._chunk = packing_lib.pack(
            texts,
            self._tokenizer,
            packing=self._packing,
            max_seq_length=self._max_seq_length,
            seed=(self._seed, 2, start.epoch, start.window_index, first),
            repacked=self._repacked,
        )
        if self._chunk.segments is not None and first_unit == 0 and not self._repacked:
            self._start = dataclasses.replace(start, cut_documents=start.cut_documents + self._chunk.segments.num_cut)
        self._chunk_locations = window.locations[first:last]
        self._chunk_unit = first_unit
        if first_unit > len(self._chunk.data):
            if not self._accept_changed_files:
                raise self._source_changed_error()
            self._chunk_unit = len(self._chunk.data)

    def _finish_item(self) -> None:
        """Moves to the next work item or epoch."""
        if self._start.slices is None:
            self._check_epoch_size()
        self._seek(self._start.next_item())

    def _check_epoch_size(self) -> None:
        """Raises UserError if this process's epoch has no complete batch and later epochs will not have more."""
        num_rows = self._units_used // self.units_per_row
        if num_rows >= self._batch_rows:
            self._short_epochs = 0
            return
        self._short_epochs += 1
        changes_with_epoch = self._is_shuffled and self._source.num_shards >= self._process_count > 1
        if changes_with_epoch and self._short_epochs < _MAX_SHORT_EPOCHS:
            return
        counters = self.counters
        kind = "rows that are not UTF-8" if self._source.blank_rows_are_separators else "blank rows"
        skipped = f"{counters['skipped_documents']} {kind}, {counters['held_out_documents']} held-out documents"
        who = f" for process {self._process_index} of {self._process_count}" if self._process_count > 1 else ""
        if self._units_used == 0:
            raise UserError(
                f"the dataset {self._source.name!r}: has no documents to train on{who} ({skipped}); add data"
            )
        raise UserError(
            f"the dataset {self._source.name!r}: an epoch has only {num_rows} sequences of {self._max_seq_length} "
            f"tokens{who}, and a batch needs {self._batch_rows} ({skipped}); lower per_device_train_batch_size or "
            "data.max_seq_length, or add data"
        )

    def _initial_assignment(self, epoch: int, process_index: int, process_count: int) -> tuple[ShardSlice, ...]:
        return assign_shards(
            self._source.num_shards,
            seed=self._seed,
            epoch=epoch,
            shuffled=self._is_shuffled,
            process_index=process_index,
            process_count=process_count,
        )

    def _report_changed_documents(self) -> None:
        """Raises UserError, or logs a warning, because the window that was just read is not the saved one."""
        shards = list(dict.fromkeys(self._reader.locations[:, 0].tolist()))
        names = ", ".join(self._source.shard_name(shard) for shard in shards[:_MAX_NAMED_SHARDS])
        if len(shards) > _MAX_NAMED_SHARDS:
            names += f" or {len(shards) - _MAX_NAMED_SHARDS} more"
        if self._accept_changed_files:
            logging.warning("%s changed after the checkpoint was saved; the run continues with the new text", names)
            return
        raise UserError(
            f"data.accept_changed_files=False: {names} changed after the checkpoint was saved; restore it, or set the "
            "key to True to continue with the new text"
        )

    def _source_changed_error(self) -> UserError:
        return UserError(
            f"cannot resume the data stream: the dataset {self._source.name!r} has changed since the checkpoint was "
            "saved; restore it, or choose another --workdir"
        )


def _hash(texts: pa.LargeStringArray) -> str:
    """Returns a hash of the texts and where each begins; null counts as empty."""
    checksum = zlib.crc32(reader_lib.num_bytes(texts).astype(np.int64).tobytes())
    _, offsets, data = (present := texts.drop_null()).buffers()
    if len(present) and data is not None:
        ends = np.frombuffer(offsets, np.int64)[present.offset : present.offset + len(present) + 1]
        checksum = zlib.crc32(memoryview(data)[ends[0] : ends[-1]], checksum)
    return f"{checksum:08x}"
