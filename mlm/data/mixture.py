"""This process's batches: rows of one source or of a weighted mixture, without the skipped batches.

Batches are numbered from 1 in the order of the data. `skip_steps` names batches to skip, so step N is trained on the
N-th batch that is not skipped. A run with `skip_steps` has the same batches in the same order as a run without it,
except the skipped ones. Restarts do not change this.

Each row of a mixture comes from one source. The k-th row of source i (from 0) is due at (k + 1/2) / weight i, and rows
are taken in the order of these times (the Sainte-Lague method), so after any number of rows each source has the
fraction its weight asks for, to within about one row per process. A row counts as `max_seq_length` tokens, padding
included. Nothing is random, and each source has its own windows and epochs. So the state is the sources' states, and
how many rows were taken from each.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlm.data.stream import RowStream
from mlm.data.synthetic import SyntheticRows
from mlm.errors import UserError

# Increase it with every change of what `BatchStream.state_dict` returns.
STREAM_FORMAT_VERSION = 3


class Document(NamedTuple):
    """A document of a batch.

    Attributes:
        source: name of its source.
        epoch: the epoch of that source in which it was read.
        shard, row: its location in the source.
        batch_rows: the rows of the batch that have tokens of it.
    """

    source: str
    epoch: int
    shard: int
    row: int
    batch_rows: tuple[int, ...]


class BatchShape(NamedTuple):
    """The batches of a stage of the run.

    Attributes:
        start: number of steps done before its first batch; skipped batches are not steps.
        batch_rows: rows per batch of this process.
        max_seq_length: tokens per row.
        weights: name -> relative number of rows, for the sources that the stage uses; they need not add up to 1.
    """

    start: int
    batch_rows: int
    max_seq_length: int
    weights: Mapping[str, float]


class BatchStream:
    """An endless iterator of int32 [batch_rows, max_seq_length], C-contiguous.

    A source continues where it last stopped, whichever stage has used it.

    Args:
        streams: name -> rows of a source, in the order in which the sources are evaluated.
        shapes: batch shapes of the stages, in order; the first one starts at step 0, and `streams` have its length.
        skip_steps: (first, last) numbers of batches to skip, both included.
        process_index, process_count: which of the run's processes this is.
    """

    def __init__(
        self,
        streams: Mapping[str, RowStream | SyntheticRows],
        *,
        shapes: Sequence[BatchShape],
        skip_steps: Sequence[tuple[int, int]] = (),
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.streams = dict(streams)
        self._shapes = shapes
        self._set_shape(shapes[0])
        self._skip_steps = skip_steps
        self._process_index = process_index
        self._process_count = process_count
        self._num_batches = 0
        self._topology_history: list[dict[str, int]] = []
        self._append_topology()
        self._rows_per_source = np.zeros(len(self.streams), np.int64)
        self._row_sources = np.empty(0, np.int64)  # For each row of the last batch the index of its source.

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        for shape in self._shapes:
            if shape.start == self._num_steps() > 0:
                self._set_shape(shape)
                self._append_topology()
                self._rows_per_source[:] = 0
        while True:
            batch = self._take()
            self._num_batches += 1
            if not any(first <= self._num_batches <= last for first, last in self._skip_steps):
                return batch

    def _num_steps(self) -> int:
        """Returns the number of batches returned."""
        skipped = _ranges_until(self._skip_steps, self._num_batches)
        return self._num_batches - sum(last - first + 1 for first, last in skipped)

    def _set_shape(self, shape: BatchShape) -> None:
        """Starts a stage."""
        self.batch_rows = shape.batch_rows
        self._weights = np.array([shape.weights.get(name, 0.0) for name in self.streams], np.float64)
        self._used = {name: stream for name, stream in self.streams.items() if name in shape.weights}
        for stream in self.streams.values():
            # A batch of a mixture may need as little as one row of a source.
            batch_rows = shape.batch_rows if len(self._used) == 1 else 1
            stream.set_shape(max_seq_length=shape.max_seq_length, batch_rows=batch_rows)

    def _take(self) -> np.ndarray:
        if len(self._used) == 1:
            (stream,) = self._used.values()
            self._row_sources = np.full(self.batch_rows, np.argmax(self._weights))
            self._rows_per_source[self._row_sources[0]] += self.batch_rows
            return stream.take(self.batch_rows)
        self._row_sources = self._next_row_sources()
        counts = np.bincount(self._row_sources, minlength=len(self.streams))
        self._rows_per_source += counts
        parts = [
            stream.take(count) for stream, count in zip(self.streams.values(), counts.tolist(), strict=True) if count
        ]
        batch = np.empty((self.batch_rows, parts[0].shape[1]), np.int32)
        batch[np.argsort(self._row_sources, kind="stable")] = np.concatenate(parts)
        return batch

    def _next_row_sources(self) -> np.ndarray:
        """Returns int64 [batch_rows]: the index of the source of each of the next rows."""
        rows = self._rows_per_source[:, None] + np.arange(self.batch_rows)
        with np.errstate(divide="ignore"):  # The sources that the stage does not use are never due.
            due = (rows + 0.5) / self._weights[:, None]
        # The sort is stable: of rows due at the same time, that of the first source comes first.
        return np.argsort(due, axis=None, kind="stable")[: self.batch_rows] // self.batch_rows

    @property
    def batch_number(self) -> int:
        """Number of the last batch, skipped ones counted; 0 before the first."""
        return self._num_batches

    @property
    def epoch(self) -> int:
        """Epoch of the last row returned; the smallest one of a mixture's sources."""
        return min(stream.epoch for stream in self._used.values())

    @property
    def counters(self) -> dict[str, int]:
        """Sums of the streams' counters."""
        counters = [stream.counters for stream in self.streams.values()]
        return {name: sum(counts[name] for counts in counters) for name in counters[0]}

    def documents(self) -> list[Document]:
        """Returns the documents of the last batch, by source and in order."""
        documents = []
        for index, (name, stream) in enumerate(self.streams.items()):
            batch_rows = np.flatnonzero(self._row_sources == index)
            if len(batch_rows) == 0:
                continue
            for span in stream.documents():
                first, last = span.begin // stream.units_per_row, (span.end - 1) // stream.units_per_row
                rows = tuple(batch_rows[first : last + 1].tolist())
                documents.append(Document(name, span.epoch, span.shard, span.row, rows))
        return documents

    def state_dict(self) -> dict[str, Any]:
        """Returns the state after the last batch, for JSON.

        `topology_history` has an entry for every change of the processes: after batch `after_batch` the run has had
        `process_count` processes with `batch_rows` rows each. `rows_per_source` counts rows since then, or since the
        start of the stage.
        """
        return {
            "format_version": STREAM_FORMAT_VERSION,
            "batches": self._num_batches,
            "skipped_batches": _ranges_until(self._skip_steps, self._num_batches),
            "topology_history": [*self._topology_history],
            "rows_per_source": dict(zip(self.streams, self._rows_per_source.tolist(), strict=True)),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
        }

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continues after the batch with which these states were saved.

        Args:
            states: the states of all processes that saved them, by process. If this run has another number of
                processes, the work is reassigned, see shard_assignment.py.

        Raises:
            UserError: the states are from another version of the code, or from another order of the data.
        """
        states = [upgrade_state(state) for state in states]
        state = states[self._process_index] if len(states) == self._process_count else states[0]
        if list(state["streams"]) != list(self.streams):
            raise UserError(
                f"cannot resume the data stream: the sources are {', '.join(self.streams)}, but the checkpoint was "
                f"saved with {', '.join(state['streams'])}; restore data.mixture, or choose another --workdir"
            )
        batches, saved = state["batches"], [list(pair) for pair in state["skipped_batches"]]
        if (skipped := _ranges_until(self._skip_steps, batches)) != saved:
            raise UserError(
                f"data.skip_steps: skips {skipped} of the first {batches} batches, but the run skipped {saved}; "
                f"change only what is past batch {batches}, or remove the checkpoints that are too new"
            )
        self._num_batches = batches
        self._set_shape([shape for shape in self._shapes if shape.start < max(1, self._num_steps())][-1])
        self._topology_history = [dict(entry) for entry in state["topology_history"]]
        self._append_topology()
        if len(states) == self._process_count:
            self._rows_per_source = np.array([state["rows_per_source"][name] for name in self.streams], np.int64)
        else:
            self._rows_per_source = np.zeros(len(self.streams), np.int64)
        for name, stream in self.streams.items():
            stream.restore([state["streams"][name] for state in states])

    def _append_topology(self) -> None:
        """Adds an entry to the history if the number of processes or of their rows differs from the last entry."""
        topology = {"process_count": self._process_count, "batch_rows": self.batch_rows}
        last = self._topology_history[-1] if self._topology_history else {}
        if {key: last.get(key) for key in topology} != topology:
            self._topology_history.append({"after_batch": self._num_batches, **topology})


def upgrade_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a saved state in the format of this version of the code.

    Version 2 reads several shards at the same time; version 3 may cut long documents, and pack by best fit.

    Raises:
        UserError: the format is not known.
    """
    version = state.get("format_version", 0)
    if version not in (1, 2, STREAM_FORMAT_VERSION):
        raise UserError(
            f"data stream state: format_version={version} is not supported, this version of the code reads "
            f"{STREAM_FORMAT_VERSION}; use the version that wrote the checkpoint, or choose another --workdir"
        )
    streams = {name: _upgrade_position(position, version) for name, position in state["streams"].items()}
    return {**state, "format_version": STREAM_FORMAT_VERSION, "streams": streams}


def _upgrade_position(position: Mapping[str, Any], version: int) -> Mapping[str, Any]:
    """Upgrades a source's position from an earlier format version. Version 1 read one shard at a time."""
    if "packing" not in position:  # A position in synthetic rows.
        return position
    # The first states of version 3 lack this key.
    position = {"first_shuffle_buffer_size": 0, **position}
    if version == STREAM_FORMAT_VERSION:
        return position
    position["shuffle_piece_bytes"] = 0
    if version == 2:
        return position
    rest = {name: value for name, value in position.items() if name not in ("slice_index", "row", "window_end")}
    end = position["window_end"]
    return rest | {
        "shuffle_buffer_bytes": 64 << 20,
        "interleave_shards": 1,
        "window_start": [position["slice_index"], position["row"], []],
        "window_end": end and [*end, []],
    }


def batch_of_step(step: int, skip_steps: Sequence[tuple[int, int]]) -> int:
    """Returns the number of the batch that `step` is trained on."""
    for first, last in _ranges_until(skip_steps, None):
        if first <= step:
            step += last - first + 1
    return step


def _ranges_until(skip_steps: Sequence[tuple[int, int]], end: int | None) -> list[list[int]]:
    """Returns the ranges cut off after `end`, sorted and merged: equal lists mean equal skipped batches."""
    ranges: list[list[int]] = []
    for first, last in sorted(skip_steps):
        last = last if end is None else min(last, end)
        if ranges and first <= ranges[-1][1] + 1:
            ranges[-1][1] = max(ranges[-1][1], last)
        elif first <= last:
            ranges.append([first, last])
    return ranges
