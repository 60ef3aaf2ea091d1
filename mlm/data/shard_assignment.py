"""Assigns the shards of a dataset to processes, and reassigns them when a run resumes on another number of processes.

Every process trains on its own documents. In each epoch the shards (such as files) are divided among the processes:

    4 shards, 2 processes    process 0: shards 0 and 2          process 1: shards 1 and 3
    1 shard,  2 processes    process 0: rows 0, 2, 4, ...       process 1: rows 1, 3, 5, ...

So with at least as many shards as processes, a process reads complete shards: every `process_count`-th one of the
epoch's shard order. With fewer, several processes read the same shard in every epoch, and take its rows in turn.

A run that resumes on the same number of processes continues this *initial assignment*. On another number, each old
process leaves *work items*: documents of one epoch that it had not used yet. They are divided among the new processes
by the same rule. In the example, process 0 has read 7 rows of shard 0, process 1 has read 5 rows of shard 1, and the
run resumes on one process. Its work items are

    shard 0 from row 7 on, shard 2, shard 1 from row 5 on, shard 3

After them it starts the next epoch, with that epoch's initial assignment for one process. A partly used shuffle window
is a work item by itself, an *open window*: it keeps its permutation, and continues at its next document and token. If
there are more processes than open windows, several processes divide the documents of one. A run may be reassigned any
number of times. With data.packing="best_fit" an open window is never divided.

Guaranteed: over all processes, every document of the newest epoch that any process had started is used exactly once,
and so is every document of the older epochs that other processes were still in. If a document was partly used,
only the rest is used.
Not guaranteed: the order of documents. A process that is more than one epoch behind the newest skips what it has not
read of the epochs in between. The documents of such a slow process are used less often than the others' anyway.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Fields of a position that count over the run.
_COUNTERS = (
    "documents_before_window",
    "skipped_documents",
    "held_out_documents",
    "failed_shards",
    "tokenizer_differences",
    "cut_documents",
)


class ShardSlice(NamedTuple):
    """The rows of a shard with start <= row < end and row % stride == offset.

    `end` is None for the end of the shard; otherwise the network failed there, and the rows after it are skipped (see
    reader.py).
    """

    shard: int
    start: int = 0
    offset: int = 0
    stride: int = 1
    end: int | None = None


class Cursor(NamedTuple):
    """A position in the slices of a work item, of which several may be read at the same time.

    Attributes:
        slice_index, row: the first slice that is not open, and the row of its shard to start at.
        open_slices: (slice_index, row) of the open slices, in the order in which they are read next; empty if one slice
            is read at a time, because it can then be given as the first slice that is not open.
    """

    slice_index: int = 0
    row: int = 0
    open_slices: tuple[tuple[int, int], ...] = ()


START = Cursor()


class OpenWindow(NamedTuple):
    """A partly used shuffle window.

    Its documents are the permuted ones at `offset`, `offset + stride`, ...; the first `document` of these are used,
    and the first `unit` units of the next one (see packing.py). `hash` is the hash of all its documents. `repacked` is
    as in `Position`.
    """

    window_index: int
    document: int
    unit: int
    offset: int
    stride: int
    hash: str | None = None
    repacked: tuple[tuple[int, int], ...] = ()


class WorkItem(NamedTuple):
    """Documents of one epoch for one process to read in order; with `open_window`, only those of that window."""

    epoch: int
    slices: tuple[ShardSlice, ...]
    open_window: OpenWindow | None = None


@dataclasses.dataclass
class Position:
    """The position of one process in its stream: a few numbers and, after a reassignment, the work items left.

    Attributes:
        epoch: epoch of the current work item.
        slices: slices of the current work item; None for the epoch's initial assignment.
        window_subset: (offset, stride) of the documents to use if the work item is an open window, else None.
        window_start: where the current window starts.
        window_index: number of windows of the work item before this one; part of the seed of its permutation.
        window_end: where the window ends, once it was read and its rows counted.
        window_hash: hash of the window's documents, once it was read; None in states without it.
        document: index of the window's next document, in permuted order and without the skipped ones.
        unit: index of that document's next unit.
        repacked: with data.packing="best_fit", (max_seq_length, rows used) of the rows that were made of the documents
            from `document` on before the length changed, see best_fit.py; else empty.
        units_used: number of units used since the work item started.
        work_items: what to read after the current work item, before the next epoch.
        next_epoch: the first epoch that starts with its initial assignment.
        documents_before_window: number of documents used in the run before this window.
        skipped_documents, held_out_documents, failed_shards, tokenizer_differences: counts over the run, those of
            this window included.
        cut_documents: number of documents that were longer than a row, with data.packing="best_fit"; else 0.
    """

    epoch: int = 0
    slices: tuple[ShardSlice, ...] | None = None
    window_subset: tuple[int, int] | None = None
    window_start: Cursor = START
    window_index: int = 0
    window_end: Cursor | None = None
    window_hash: str | None = None
    document: int = 0
    unit: int = 0
    repacked: tuple[tuple[int, int], ...] = ()
    units_used: int = 0
    work_items: tuple[WorkItem, ...] = ()
    next_epoch: int = 1
    documents_before_window: int = 0
    skipped_documents: int = 0
    held_out_documents: int = 0
    failed_shards: int = 0
    tokenizer_differences: int = 0
    cut_documents: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the fields by name; JSON turns the tuples into lists."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "Position":
        """Returns the position in `state`, which may have other keys, too."""
        fields = {field.name: state[field.name] for field in dataclasses.fields(cls) if field.name in state}
        fields["window_subset"] = fields["window_subset"] and tuple(fields["window_subset"])
        for name in ("window_start", "window_end"):
            fields[name] = fields[name] and _cursor_from_json(fields[name])
        if fields["slices"] is not None:
            fields["slices"] = _slices_from_json(fields["slices"])
        fields["work_items"] = tuple(
            WorkItem(epoch, _slices_from_json(slices), open_window and _open_window_from_json(open_window))
            for epoch, slices, open_window in fields["work_items"]
        )
        fields["repacked"] = _pairs_from_json(fields.get("repacked", ()))
        return cls(**fields)

    def repack(self, max_seq_length: int) -> "Position":
        """Returns the position for rows of another length than `max_seq_length`, with data.packing="best_fit"."""

        def repacked(part: "Position | OpenWindow") -> dict[str, Any]:
            return {"unit": 0, "repacked": (*part.repacked, (max_seq_length, part.unit))} if part.unit else {}

        items = tuple(
            item._replace(open_window=item.open_window and item.open_window._replace(**repacked(item.open_window)))
            for item in self.work_items
        )
        return dataclasses.replace(self, work_items=items, **repacked(self))

    def num_documents(self) -> int:
        """Returns the number of documents used in the run, a partly used one included."""
        return self.documents_before_window + self.document + (self.unit > 0 or self.repacked != ())

    def next_item(self) -> "Position":
        """Returns the position at the start of the next work item, or of the next epoch if there is none."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        if not self.work_items:
            return Position(epoch=self.next_epoch, next_epoch=self.next_epoch + 1, **counters)
        epoch, slices, window = self.work_items[0]
        position = Position(
            epoch=epoch, slices=slices, work_items=self.work_items[1:], next_epoch=self.next_epoch, **counters
        )
        if window is None:
            return position
        return dataclasses.replace(
            position,
            window_subset=(window.offset, window.stride),
            window_index=window.window_index,
            document=window.document,
            unit=window.unit,
            repacked=window.repacked,
            # Marks the rows of the window as counted. The value does not matter: nothing is read after an open window.
            window_end=Cursor(len(slices)),
            window_hash=window.hash,
            documents_before_window=self.documents_before_window
            - window.document
            - (window.unit > 0 or window.repacked != ()),
        )


def _cursor_from_json(numbers: Sequence[Any]) -> Cursor:
    slice_index, row, open_slices = numbers
    return Cursor(slice_index, row, tuple((index, open_row) for index, open_row in open_slices))


def _open_window_from_json(values: Sequence[Any]) -> OpenWindow:
    window = OpenWindow(*values)
    return window._replace(repacked=_pairs_from_json(window.repacked))


def _pairs_from_json(pairs: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((length, num_used) for length, num_used in pairs)


def _slices_from_json(slices: Sequence[Sequence[int]]) -> tuple[ShardSlice, ...]:
    return tuple(ShardSlice(*numbers) for numbers in slices)


def assign(slices: Sequence[ShardSlice], *, process_index: int = 0, process_count: int = 1) -> tuple[ShardSlice, ...]:
    """Returns the slices of one process; over all processes every row of every slice is assigned once."""
    if len(slices) >= process_count or not slices:
        return tuple(slices[process_index::process_count])
    index, rank, size = _group(len(slices), process_index=process_index, process_count=process_count)
    shared = slices[index]
    return (shared._replace(offset=shared.offset + rank * shared.stride, stride=shared.stride * size),)


def assign_shards(
    num_shards: int, *, seed: int, epoch: int, shuffled: bool, process_index: int, process_count: int
) -> tuple[ShardSlice, ...]:
    """Returns the initial assignment of an epoch to one process."""
    order = range(num_shards)
    if shuffled and num_shards >= process_count:
        order = np.random.default_rng((seed, 0, epoch)).permutation(num_shards).tolist()
    return assign([ShardSlice(shard) for shard in order], process_index=process_index, process_count=process_count)


def reassign(
    positions: Sequence[Position],
    *,
    process_index: int,
    process_count: int,
    initial_assignment: Callable[[int, int, int], tuple[ShardSlice, ...]],
    divides_windows: bool = True,
) -> Position:
    """Returns the position of a new process, given the positions of all processes of the run so far.

    The counters of all old processes go to new process 0, so that their sums over the processes stay correct.

    Args:
        positions: positions of the old processes, by process.
        process_index, process_count: index and number of the new processes.
        initial_assignment: (epoch, process_index, process_count) -> a process's slices at the start of an epoch.
        divides_windows: False if an open window must not be divided, because its documents are packed together.
    """
    newest_epoch = max(position.next_epoch for position in positions) - 1
    open_windows: list[WorkItem] = []
    slices: dict[int, list[ShardSlice]] = {}  # By epoch.
    for old_index, position in enumerate(positions):
        current = position.slices
        if current is None:
            current = initial_assignment(position.epoch, old_index, len(positions))
        items = _remaining_items(position, current)
        if position.next_epoch <= newest_epoch:
            items.append(WorkItem(newest_epoch, initial_assignment(newest_epoch, old_index, len(positions))))
        for item in items:
            if item.open_window is None:
                slices.setdefault(item.epoch, []).extend(item.slices)
            else:
                open_windows.append(item)
    items = _assign_open_windows(
        open_windows, process_index=process_index, process_count=process_count, divides=divides_windows
    )
    for epoch, rest in slices.items():
        if own := assign(rest, process_index=process_index, process_count=process_count):
            items.append(WorkItem(epoch, own))
    # The sort is stable: within an epoch, open windows come first.
    items.sort(key=lambda item: item.epoch)
    counted = positions if process_index == 0 else ()
    return Position(
        work_items=tuple(items),
        next_epoch=newest_epoch + 1,
        documents_before_window=sum(position.num_documents() for position in counted),
        **{name: sum(getattr(position, name) for position in counted) for name in _COUNTERS[1:]},
    ).next_item()


def _assign_open_windows(
    items: Sequence[WorkItem], *, process_index: int, process_count: int, divides: bool
) -> list[WorkItem]:
    """Returns the open windows of one process: the rule of `assign`, with a window's documents instead of rows."""
    if len(items) >= process_count or not items or not divides:
        return list(items[process_index::process_count])
    index, rank, size = _group(len(items), process_index=process_index, process_count=process_count)
    window = items[index].open_window
    assert window is not None
    part = window._replace(
        document=0,
        # The partly used document is the first one left, so it goes to the first process.
        unit=window.unit if rank == 0 else 0,
        offset=window.offset + (window.document + rank) * window.stride,
        stride=window.stride * size,
    )
    return [items[index]._replace(open_window=part)]


def _group(count: int, *, process_index: int, process_count: int) -> tuple[int, int, int]:
    """Returns which of `count` items a process divides with others, its rank among them, and their number.

    There are fewer items than processes: item i goes to the processes i, i + count, i + 2 * count, ...
    """
    index = process_index % count
    return index, process_index // count, len(range(index, process_count, count))


def _remaining_items(position: Position, slices: tuple[ShardSlice, ...]) -> list[WorkItem]:
    """Returns what a process had left to read before its next epoch; `slices` are those of its current work item."""
    items = []
    rest_start = position.window_start
    if position.window_end is not None:
        subset = position.window_subset or (0, 1)
        window = OpenWindow(
            position.window_index,
            position.document,
            position.unit,
            *subset,
            hash=position.window_hash,
            repacked=position.repacked,
        )
        # The slices that were open at the start of the window or opened in it: reading them gives the same window.
        start, end = position.window_start, position.window_end
        num_opened = len(start.open_slices) + end.slice_index - start.slice_index + (end.row > 0)
        items.append(WorkItem(position.epoch, _slices_from(slices, start)[:num_opened], window))
        rest_start = end
    if position.window_subset is None:
        items.append(WorkItem(position.epoch, _slices_from(slices, rest_start)))
    return [*items, *position.work_items]


def _slices_from(slices: tuple[ShardSlice, ...], cursor: Cursor) -> tuple[ShardSlice, ...]:
    """Returns what is left of the slices from a position on, the open ones first."""
    starts = [*cursor.open_slices, (cursor.slice_index, cursor.row)]
    begun = [
        slices[index]._replace(start=max(slices[index].start, row)) for index, row in starts if index < len(slices)
    ]
    return (*begun, *slices[cursor.slice_index + 1 :])
