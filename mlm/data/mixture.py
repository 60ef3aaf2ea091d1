"""This process's batches: rows of one source, or of several in fixed shares, less those that are left out.

Batches are numbered from 1 as the data gives them. `skip_steps` names some to leave out, so the batch of update N is
the N-th of the others: the batches of a run without `skip_steps` less the named ones, whatever its restarts.

A row of a mixture is of one source. Source i's k-th row (from 0) is due at (k + 1/2) / weight i, and rows come in the
order of their times (Sainte-Lague's method): of any number of rows each source has its share to within about one row
a process. A row counts as `max_seq_length` tokens, padding included. Nothing is random, and each source has its own
windows and epochs, so the state is the sources' states and how many rows each has given.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlm.data.stream import RowStream
from mlm.errors import UserError


class Document(NamedTuple):
    """A document of a batch: which pass over which source, its place there, and the rows of the batch it is in."""

    source: str
    epoch: int
    shard: int
    row: int
    batch_rows: tuple[int, ...]


class BatchStream:
    """An iterator without end of int32 [batch_rows, max_seq_length], C-contiguous.

    Args:
        streams: name -> the rows of a source, in the order of their evaluation.
        weights: name -> share of the rows; they need not add up to 1.
        batch_rows: rows this process gives at a time.
        skip_steps: (first, last) numbers of batches to leave out, both included.
        process_index, process_count: whose share this is.
    """

    def __init__(
        self,
        streams: Mapping[str, RowStream],
        *,
        weights: Mapping[str, float],
        batch_rows: int,
        skip_steps: Sequence[Sequence[int]] = (),
        process_index: int = 0,
        process_count: int = 1,
    ):
        check_ranges(skip_steps)
        self.streams = dict(streams)
        self.batch_rows = batch_rows
        self._weights = np.array([weights[name] for name in self.streams], np.float64)
        self._skip_steps = [tuple(both) for both in skip_steps]
        self._process_index = process_index
        self._process_count = process_count
        self._batches = 0
        self._runs = [[0, process_count, batch_rows]]
        self._given = np.zeros(len(self.streams), np.int64)
        self._sources = np.empty(0, np.int64)  # of the rows of the last batch

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        while True:
            batch = self._take()
            self._batches += 1
            if not any(first <= self._batches <= last for first, last in self._skip_steps):
                return batch

    def _take(self) -> np.ndarray:
        if len(self.streams) == 1:
            (stream,) = self.streams.values()
            self._sources = np.zeros(self.batch_rows, np.int64)
            self._given += self.batch_rows
            return stream.take(self.batch_rows)
        self._sources = self._next_sources()
        counts = np.bincount(self._sources, minlength=len(self.streams))
        self._given += counts
        parts = [
            stream.take(count) for stream, count in zip(self.streams.values(), counts.tolist(), strict=True) if count
        ]
        batch = np.empty((self.batch_rows, parts[0].shape[1]), np.int32)
        batch[np.argsort(self._sources, kind="stable")] = np.concatenate(parts)
        return batch

    def _next_sources(self) -> np.ndarray:
        """int64 [batch_rows]: the source of each of the next rows."""
        rows = self._given[:, None] + np.arange(self.batch_rows)
        due = (rows + 0.5) / self._weights[:, None]
        # Stable: of rows due at the same time, that of the first source comes first.
        return np.argsort(due, axis=None, kind="stable")[: self.batch_rows] // self.batch_rows

    @property
    def number(self) -> int:
        """The number of the last batch; those left out have one, too. 0 before the first."""
        return self._batches

    @property
    def epoch(self) -> int:
        """Of the last row given; the least of a mixture's sources."""
        return min(stream.epoch for stream in self.streams.values())

    @property
    def counters(self) -> dict[str, int]:
        """The streams' counters, added up."""
        parts = [stream.counters for stream in self.streams.values()]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def documents(self) -> list[Document]:
        """The documents of the last batch, by source and in order."""
        found = []
        for n, (name, stream) in enumerate(self.streams.items()):
            batch_rows = np.flatnonzero(self._sources == n)
            if len(batch_rows) == 0:
                continue
            for used in stream.documents():
                first, last = used.begin // stream.units_per_row, (used.end - 1) // stream.units_per_row
                rows = tuple(batch_rows[first : last + 1].tolist())
                found.append(Document(name, used.epoch, used.shard, used.row, rows))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch, for JSON.

        `runs` tells the run's history: from after which batch on it had how many processes with how many rows each.
        """
        return {
            "batches": self._batches,
            "skipped": _up_to(self._skip_steps, self._batches),
            "runs": self._runs,
            "rows": self._given.tolist(),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on right after the batch whose `state_dict()` this is."""
        self._load(state, rows=state["rows"])
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from the states of all processes of a run, also of another number of them: see dealing.py.

        Raises:
            UserError: the states are of another order of the data.
        """
        same = len(states) == self._process_count
        self._load(states[0], rows=states[self._process_index]["rows"] if same else [0] * len(self.streams))
        for name, stream in self.streams.items():
            stream.restore([state["streams"][name] for state in states])

    def _load(self, state: Mapping[str, Any], *, rows: Sequence[int]) -> None:
        if list(state["streams"]) != list(self.streams):
            raise UserError(
                f"cannot resume the data stream: it was saved with the sources {', '.join(state['streams'])}, and "
                f"now there are {', '.join(self.streams)}; restore them, or start in a new work directory"
            )
        batches = state["batches"]
        if (now := _up_to(self._skip_steps, batches)) != [list(both) for both in state["skipped"]]:
            raise UserError(
                f"data.skip_steps leaves out {now} of the first {batches} batches, but the checkpoint's run left out "
                f"{state['skipped']}: change it only past {batches}, or remove the checkpoints that are too new"
            )
        self._batches = batches
        self._given = np.array(rows, np.int64)
        self._runs = [list(run) for run in state["runs"]]
        layout = [self._process_count, self.batch_rows]
        if self._runs[-1][1:] != layout:
            self._runs.append([batches, *layout])


def check_ranges(skip_steps: Sequence[Sequence[int]]) -> None:
    """UserError unless these are pairs of numbers, first <= last."""
    for both in skip_steps:
        if not isinstance(both, tuple | list) or [type(number) for number in both] != [int, int]:
            raise UserError(f"data.skip_steps={skip_steps!r} must be pairs of updates, such as ((1200, 1210),)")
        if not 1 <= both[0] <= both[1]:
            raise UserError(f"data.skip_steps: from {both[0]} to {both[1]} is no range of updates")


def batch_of_update(step: int, skip_steps: Sequence[Sequence[int]]) -> int:
    """The number of the batch that update `step` is trained on."""
    for first, last in _up_to(skip_steps, None):
        if first <= step:
            step += last - first + 1
    return step


def _up_to(skip_steps: Sequence[Sequence[int]], end: int | None) -> list[list[int]]:
    """The ranges up to `end`, in order, those that touch made one: the same for the same batches."""
    ranges: list[list[int]] = []
    for first, last in sorted(skip_steps):
        last = last if end is None else min(last, end)
        if ranges and first <= ranges[-1][1] + 1:
            ranges[-1][1] = max(ranges[-1][1], last)
        elif first <= last:
            ranges.append([first, last])
    return ranges
