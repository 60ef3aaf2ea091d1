"""The endless stream of rows: shuffle windows, held-out documents, this process's share, exact resume.

A window is the next `shuffle_buffer_size` documents in the epoch's order of shards. It is permuted by a seed
made of (seed, epoch, window), so a position in the stream is a few numbers: where the window starts, how many
of its documents are used up, and how many tokens of the next. To resume, the window is read and permuted
again, that one document is tokenized again, and its first tokens are left out. No text and no token is ever
saved.

Processes end together because no stream ends: one whose share is used up begins its next epoch, whatever the others
are at. So every process has a batch for every step, and none waits in a collective for one that has stopped. What could
stop a single one is a share too small for a batch. Where a share is the same in every epoch that is told before the
first step, by the first `next`; where shards are dealt in another order each epoch, a small share is followed by
others, and only `_PATIENCE` small ones in a row are an error.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlm.data import packing as packing_lib
from mlm.data import provenance
from mlm.data import reader as reader_lib
from mlm.data import tokenizer as tokenizer_lib
from mlm.data.shard_assignment import Position, ShardSlice, assign_shards, reassign
from mlm.data.sources import source as sources
from mlm.errors import UserError

# Texts are tokenized this many bytes at a time: enough to keep the cores busy, little enough for a quick
# first batch and flat memory.
_CHUNK_BYTES = 2 << 20
# With no shuffling a window is only a unit of reading.
_UNSHUFFLED_WINDOW = 1024
# Epochs in a row in which a share that is another in each may be too small for one batch.
_MAX_SHORT_EPOCHS = 16


@dataclasses.dataclass(frozen=True)
class _Window:
    texts: pa.LargeStringArray
    order: np.ndarray  # int64: the documents kept, permuted
    ends: np.ndarray  # int64: bytes of texts up to and with each of `order`
    places: np.ndarray  # int64 [N, 2]: shard and row of each of `order`
    end: tuple[int, int]  # the reader's place after it


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
        max_failed_shards: how many shards an epoch may do without where the network fails, see reader.py.

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
        max_failed_shards: int = 0,
    ):
        check(packing=packing, max_seq_length=max_seq_length)
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
        self._shuffled = shuffle_buffer_size > 1
        self._batch_rows = batch_rows
        self._held_out = held_out.cast(pa.large_string()) if held_out is not None else None
        self._process_index = process_index
        self._process_count = process_count
        self.units_per_row = packing_lib.units_per_row(packing, max_seq_length=max_seq_length)
        self._units_per_batch = batch_rows * self.units_per_row
        self._short_epochs = 0
        self._losses = reader_lib.ShardFailureBudget(max_failed_shards)
        self._go_on(Position())

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return self.take(self._batch_rows)

    def take(self, rows: int) -> np.ndarray:
        """The next rows, however many."""
        needed = rows * self.units_per_row
        parts, have = [], 0
        self._parts = []
        while have < needed:
            if self._used == len(self._chunk.data):
                self._advance()
                continue
            part = self._chunk.data[self._used : self._used + needed - have]
            places = self._window.places[self._chunk_document :]
            used = self._used, self._used + len(part)
            self._parts.append(provenance.ChunkSlice(self._start.epoch, places, self._chunk.offsets, *used))
            parts.append(part)
            have += len(part)
            self._used += len(part)
            self._epoch_units += len(part)
        return np.concatenate(parts).reshape(rows, self._max_seq_length)

    def documents(self) -> list[provenance.DocumentSpan]:
        """The documents of the last batch, in order."""
        return provenance.documents(self._parts)

    def share(self) -> tuple[ShardSlice, ...]:
        """What this process reads of the epoch it is in (of the lane, after a deal anew), whole."""
        if self._start.pieces is not None:
            return self._start.pieces
        return self._fresh(self._start.epoch, self._process_index, self._process_count)

    def ahead(self) -> tuple[ShardSlice, ...]:
        """`share`, and after a deal anew all that is to come before the next epoch."""
        return sum((lane.pieces for lane in self._start.lanes), self.share())

    @property
    def epoch(self) -> int:
        """The epoch of the last row given; 0 before the first."""
        return self._start.epoch

    @property
    def counters(self) -> dict[str, int]:
        """Over the run so far: documents begun, rows skipped for want of text, documents held out, shards failed.

        Rows skipped and held out count as soon as their window is read.
        """
        position = self._position()
        return {
            "documents": position.begun_documents(),
            "skipped_rows": position.skipped_rows,
            "held_out_documents": position.held_out_documents,
            "failed_shards": position.failed_shards,
        }

    def state_dict(self) -> dict:
        """The state after the last batch: a few numbers and names, for JSON."""
        return self._identity() | self._position().to_json()

    def load_state_dict(self, state: dict) -> None:
        """Goes on right after the batch whose `state_dict()` this is.

        Raises:
            UserError: the state is of another order of the data (seed, shards, packing, processes...).
        """
        self._check_identity(state, self._identity())
        self._go_on(Position.from_json(state))

    def restore(self, states: Sequence[dict]) -> None:
        """Goes on from the states of all processes of a run, by process, also of another number of them.

        dealing.py says what is promised then.

        Raises:
            UserError: as `load_state_dict`, but for the number of processes.
        """
        if len(states) == self._process_count:
            self.load_state_dict(states[self._process_index])
            return
        for old, state in enumerate(states):
            self._check_identity(state, self._identity() | {"process_index": old, "process_count": len(states)})
        position = reassign(
            [Position.from_json(state) for state in states],
            process_index=self._process_index,
            process_count=self._process_count,
            fresh=self._fresh,
        )
        self._go_on(position)

    def _check_identity(self, state: dict, identity: dict) -> None:
        for key, value in identity.items():
            if state[key] != value:
                raise UserError(
                    f"cannot resume the data stream: it was saved with {key}={state[key]!r} and is now "
                    f"{value!r}; restore that, or start in a new work directory"
                )

    def _go_on(self, position: Position) -> None:
        # `document` and `unit` say where to go on in the window; the rest of `_start` is the window's start.
        self._start = position
        self._epoch_units = position.epoch_units
        self._window: _Window | None = None
        self._reader: reader_lib.Reader | None = None
        self._chunk = packing_lib.PackedChunk(np.empty(0, np.int32), np.zeros(1, np.int64))
        self._chunk_document = position.document
        self._used = 0
        self._parts: list[provenance.ChunkSlice] = []

    def _position(self) -> Position:
        document, unit = self._place()
        return dataclasses.replace(self._start, document=document, unit=unit, epoch_units=self._epoch_units)

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
        """Moves on to the next chunk of the window, the next window, or the next lane or epoch."""
        resumed_unit = 0
        if self._window is None:  # the beginning of a lane or an epoch, or the first call after a resume
            pieces = self.share()
            place = {"shard": self._start.shard, "row": self._start.row}
            self._reader = reader_lib.Reader(self._source, pieces, **place, losses=self._losses)
            seen = self._start.window_end is not None
            self._window = self._read_window()
            if seen and self._window is None:
                raise self._changed()
            resumed_unit = self._start.unit
        else:
            self._chunk_document += len(self._chunk.offsets) - 1
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
                shard=window.end[0],
                row=window.end[1],
                window=self._start.window + 1,
                window_end=None,
                document=0,
                unit=0,
                documents=self._start.documents + len(window.order),
            )
            self._window = self._read_window() if self._start.part is None else None
        self._chunk = packing_lib.PackedChunk(self._chunk.data[:0], np.zeros(1, np.int64))
        self._chunk_document = 0
        self._used = 0
        if self._window is None:
            self._end_lane()

    def _changed(self) -> UserError:
        return UserError(
            f"cannot resume the data stream: the data set {self._source.name!r} is not what it was when the "
            "checkpoint was written; restore it, or start in a new work directory"
        )

    def _end_lane(self) -> None:
        if self._start.pieces is None:
            self._check_size()
        parts = self._parts  # the batch under way goes on
        self._go_on(self._start.next_lane())
        self._parts = parts

    def _check_size(self) -> None:
        """UserError where an epoch of this process's share has no batch, and others will not be better."""
        if self._epoch_units >= self._units_per_batch:
            self._short_epochs = 0
            return
        self._short_epochs += 1
        others = self._shuffled and self._source.num_shards >= self._process_count > 1
        if others and self._short_epochs < _MAX_SHORT_EPOCHS:
            return
        counters = self.counters
        lost = f"{counters['skipped_rows']} {'rows that are not UTF-8' if self._source.has_gaps else 'blank rows'}"
        lost += f", {counters['held_out_documents']} held-out documents"
        who = f" for process {self._process_index} of {self._process_count}" if self._process_count > 1 else ""
        if self._epoch_units == 0:
            raise UserError(f"the data set {self._source.name!r} has no documents to train on{who} ({lost})")
        rows = self._epoch_units * self._batch_rows // self._units_per_batch
        raise UserError(
            f"the data set {self._source.name!r} is too small: an epoch has {rows} rows of "
            f"{self._max_seq_length} tokens{who} and a batch needs {self._batch_rows} ({lost}); "
            "lower per_device_train_batch_size or data.max_seq_length, or add data"
        )

    def _fresh(self, epoch: int, process_index: int, process_count: int) -> tuple[ShardSlice, ...]:
        return assign_shards(
            self._source.num_shards,
            seed=self._seed,
            epoch=epoch,
            shuffled=self._shuffled,
            process_index=process_index,
            process_count=process_count,
        )

    def _read_window(self) -> _Window | None:
        reader = self._reader
        reader.exact = self._start.window_end is not None
        texts = reader.take(self._shuffle_buffer_size if self._shuffled else _UNSHUFFLED_WINDOW)
        if reader.failed_shards:
            failed, reader.failed_shards = self._start.failed_shards + reader.failed_shards, 0
            self._start = dataclasses.replace(self._start, pieces=reader.pieces, failed_shards=failed)
        if texts is None:
            return None
        order = np.arange(len(texts))
        if self._shuffled:
            key = (self._seed, 1, self._start.epoch, self._start.window)
            order = np.random.default_rng(key).permutation(len(texts))
        kept = reader_lib.has_text(texts)
        without_text = len(texts) - int(kept.sum())
        skipped_rows = texts.null_count if self._source.has_gaps else without_text
        if self._held_out is not None and len(self._held_out):
            kept &= ~np.asarray(pc.is_in(texts, value_set=self._held_out))
        order = order[kept[order]]
        end = self._reader.shard, self._reader.row
        if self._start.window_end is None:  # a window read again after a resume was counted the first time
            self._start = dataclasses.replace(
                self._start,
                skipped_rows=self._start.skipped_rows + skipped_rows,
                held_out_documents=self._start.held_out_documents + len(texts) - without_text - len(order),
                window_end=end,
            )
        if self._start.part is not None:
            first, step = self._start.part
            order = order[first::step]
        return _Window(
            texts=texts,
            order=order,
            ends=np.cumsum(reader_lib.num_bytes(texts)[order]),
            places=self._reader.places[order],
            end=end,
        )


def check(*, packing: str, max_seq_length: int) -> None:
    """UserError for a packing that is not known, or rows without room for text."""
    if packing not in packing_lib.PACKINGS:
        raise UserError(f"data.packing={packing!r} is not known: choose one of {', '.join(packing_lib.PACKINGS)}")
    if max_seq_length < 3:
        raise UserError(f"data.max_seq_length={max_seq_length} leaves no room between begin and end: set 3 or more")
