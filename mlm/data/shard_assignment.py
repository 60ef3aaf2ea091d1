"""Who reads what: an epoch's rows dealt to the processes, and dealt anew when a run goes on with another number.

Fresh: with at least as many shards as processes, process p of P takes every P-th shard of the epoch's order. With
fewer, a shard is read by several processes, the same one in every epoch, and its rows are dealt among them in turn.

Anew: what the old processes have not used of the epochs they are in is made into *lanes*, a process's documents of one
epoch in one order. A window under way goes on with its own permutation, at its document and token, on one of the new
processes, or where there are more processes than windows its documents are dealt to several; the rows after it and the
shards not begun are dealt like fresh ones. When a process's lanes are done, the next epoch begins for it, dealt fresh.
A restart of a restart deals what is left of the lanes.

Promised: over all processes, every document of the newest epoch that any process had begun comes exactly once, and
those of the older epochs that slower processes were still in come once, too; of a document under way, only the tokens
not used yet. Given up: the order, and of a process that was behind the newest epoch by more than one, the epochs
between (its documents have then come less often than others', as they would have without a restart).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class ShardSlice(NamedTuple):
    """Rows of a shard: those from `start` on, before `end`, that are `first` modulo `step`.

    An `end` other than None is where the network failed: the rows from there on were set aside, see reader.py.
    """

    shard: int
    start: int = 0
    first: int = 0
    step: int = 1
    end: int | None = None


class OpenWindow(NamedTuple):
    """A window under way: where it goes on, and which of its documents (of those left, permuted) are meant."""

    window: int
    document: int  # of those meant
    unit: int
    first: int  # of those left: first, first + step...
    step: int


class WorkItem(NamedTuple):
    """Documents of one epoch that one process is to give after what it is at; with `begun`, of a single window."""

    epoch: int
    pieces: tuple[ShardSlice, ...]
    begun: OpenWindow | None = None


# (epoch, process_index, process_count) -> a process's pieces of an epoch dealt fresh.
InitialAssignment = Callable[[int, int, int], tuple[ShardSlice, ...]]


@dataclasses.dataclass
class Position:
    """Where one process stands in its share; a few numbers and, after a deal anew, what is left of its lanes."""

    epoch: int = 0
    pieces: tuple[ShardSlice, ...] | None = None  # of the lane; None: the process's share of the epoch, dealt fresh
    part: tuple[int, int] | None = None  # (first, step) of the documents meant, where the lane is a single window
    shard: int = 0  # place among the pieces where the window starts
    row: int = 0  # row of that shard where the window starts
    window: int = 0  # windows of the lane before this one
    window_end: tuple[int, int] | None = None  # (shard, row) after the window, once it was read and counted
    document: int = 0  # documents of the window used up, of those left after dropping and in permuted order
    unit: int = 0  # units (tokens, or rows when padding) of the next document used up
    epoch_units: int = 0  # units of the lane used up
    lanes: tuple[WorkItem, ...] = ()  # to do after this one, before the next epoch
    next_epoch: int = 1  # the first epoch to be dealt fresh
    # Counted over the whole run: documents up to the start of the window, the other two with all of it.
    documents: int = 0
    skipped_rows: int = 0
    held_out_documents: int = 0
    failed_shards: int = 0

    def to_json(self) -> dict[str, Any]:
        """Its fields; tuples, which JSON makes lists, are shared and not copied."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "Position":
        """The position in a state, which may hold other things, too."""
        fields = {field.name: state[field.name] for field in dataclasses.fields(cls)}
        pieces, end, part = fields["pieces"], fields["window_end"], fields["part"]
        lanes = tuple(
            WorkItem(epoch, _pieces(rest), begun and OpenWindow(*begun)) for epoch, rest, begun in fields["lanes"]
        )
        return cls(
            **fields
            | {
                "pieces": None if pieces is None else _pieces(pieces),
                "part": None if part is None else tuple(part),
                "window_end": None if end is None else tuple(end),
                "lanes": lanes,
            }
        )

    def begun_documents(self) -> int:
        """Documents begun in the whole run."""
        return self.documents + self.document + (self.unit > 0)

    def next_lane(self) -> "Position":
        """The beginning of what comes after this lane is done."""
        names = ("documents", "skipped_rows", "held_out_documents", "failed_shards")
        counters = {name: getattr(self, name) for name in names}
        if not self.lanes:
            return Position(epoch=self.next_epoch, next_epoch=self.next_epoch + 1, **counters)
        lane = self.lanes[0]
        position = Position(
            epoch=lane.epoch, pieces=lane.pieces, lanes=self.lanes[1:], next_epoch=self.next_epoch, **counters
        )
        if lane.begun is None:
            return position
        begun = lane.begun
        return dataclasses.replace(
            position,
            part=(begun.first, begun.step),
            window=begun.window,
            document=begun.document,
            unit=begun.unit,
            # Any will do: with `part` nothing is read after the window. It says that the window is counted.
            window_end=(len(lane.pieces), 0),
            documents=self.documents - begun.document - (begun.unit > 0),
        )


def _pieces(lists: Sequence[Sequence[int]]) -> tuple[ShardSlice, ...]:
    return tuple(ShardSlice(*numbers) for numbers in lists)


def assign(pieces: Sequence[ShardSlice], *, process_index: int = 0, process_count: int = 1) -> tuple[ShardSlice, ...]:
    """One process's part of the pieces: over all processes every row of every piece once."""
    count = len(pieces)
    if count >= process_count:
        return tuple(pieces[process_index::process_count])
    if count == 0:
        return ()
    piece = pieces[process_index % count]
    readers = range(process_index % count, process_count, count)
    turn = readers.index(process_index)
    return (piece._replace(first=piece.first + turn * piece.step, step=piece.step * len(readers)),)


def assign_shards(
    num_shards: int, *, seed: int, epoch: int, shuffled: bool, process_index: int, process_count: int
) -> tuple[ShardSlice, ...]:
    """A process's share of a fresh epoch."""
    order = range(num_shards)
    if shuffled and num_shards >= process_count:
        order = np.random.default_rng((seed, 0, epoch)).permutation(num_shards).tolist()
    return assign([ShardSlice(shard) for shard in order], process_index=process_index, process_count=process_count)


def reassign(
    positions: Sequence[Position], *, process_index: int, process_count: int, fresh: InitialAssignment
) -> Position:
    """The position of a process of a run that goes on from the positions of another number of processes.

    The counters of all go to process 0, so that their sums stay right.
    """
    newest = max(position.next_epoch for position in positions) - 1
    begun: list[WorkItem] = []
    rest: dict[int, list[ShardSlice]] = {}
    for old, position in enumerate(positions):
        for lane in _left(position, old=old, old_count=len(positions), newest=newest, fresh=fresh):
            if lane.begun is None:
                rest.setdefault(lane.epoch, []).extend(lane.pieces)
            else:
                begun.append(lane)
    lanes = _deal_windows(begun, process_index=process_index, process_count=process_count)
    for epoch, pieces in rest.items():
        if own := assign(pieces, process_index=process_index, process_count=process_count):
            lanes.append(WorkItem(epoch, own))
    counters = {}
    if process_index == 0:
        counters = {
            "documents": sum(position.begun_documents() for position in positions),
            "skipped_rows": sum(position.skipped_rows for position in positions),
            "held_out_documents": sum(position.held_out_documents for position in positions),
            "failed_shards": sum(position.failed_shards for position in positions),
        }
    # Stable: within an epoch, windows under way come first.
    lanes.sort(key=lambda lane: lane.epoch)
    return Position(lanes=tuple(lanes), next_epoch=newest + 1, **counters).next_lane()


def _deal_windows(lanes: Sequence[WorkItem], *, process_index: int, process_count: int) -> list[WorkItem]:
    """One process's part of the windows under way: the same rule as `deal`, with documents for rows."""
    count = len(lanes)
    if count >= process_count or count == 0:
        return list(lanes[process_index::process_count])
    lane = lanes[process_index % count]
    readers = range(process_index % count, process_count, count)
    turn = readers.index(process_index)
    begun = lane.begun
    first = begun.first + (begun.document + turn) * begun.step
    # The document under way is the first one.
    begun = OpenWindow(begun.window, 0, begun.unit if turn == 0 else 0, first, begun.step * len(readers))
    return [lane._replace(begun=begun)]


def _left(position: Position, *, old: int, old_count: int, newest: int, fresh: InitialAssignment) -> list[WorkItem]:
    """What a process had still to do up to the epoch `newest`."""
    lanes = []
    pieces = position.pieces if position.pieces is not None else fresh(position.epoch, old, old_count)
    shard, row = position.shard, position.row
    if position.window_end is not None:
        last, last_row = position.window_end
        window = _from(pieces, shard, row)[: last - shard + (last_row > 0)]
        begun = OpenWindow(position.window, position.document, position.unit, *(position.part or (0, 1)))
        lanes.append(WorkItem(position.epoch, window, begun))
        shard, row = last, last_row
    if position.part is None:
        lanes.append(WorkItem(position.epoch, _from(pieces, shard, row)))
    lanes += position.lanes
    if position.next_epoch <= newest:
        lanes.append(WorkItem(newest, fresh(newest, old, old_count)))
    return lanes


def _from(pieces: tuple[ShardSlice, ...], shard: int, row: int) -> tuple[ShardSlice, ...]:
    """The rows from a place on."""
    pieces = pieces[shard:]
    if not pieces:
        return ()
    return (pieces[0]._replace(start=max(pieces[0].start, row)), *pieces[1:])
