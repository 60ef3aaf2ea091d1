"""Assignment of shards to processes, and reassignment to another number of them."""

import collections
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pytest

from mlm.data import shard_assignment
from mlm.errors import UserError
from tests.test_stream import memory_source, rows_of, split, words


def processes(source, count, **kwargs):
    """The streams of all processes of a run."""
    return [rows_of(source, process_index=n, process_count=count, **kwargs) for n in range(count)]


def step(streams, used, batches):
    """Takes batches from every stream, and counts the units of every (epoch, shard, row) in `used`."""
    for stream in streams:
        for _ in range(batches):
            next(stream)
            for document in stream.documents():
                used[document[:3]] += document.end - document.begin


def resume(source, streams, count, **kwargs):
    """The streams of `count` processes that resume from a checkpoint of these."""
    states = json.loads(json.dumps([stream.state_dict() for stream in streams]))
    resumed = processes(source, count, **kwargs)
    for stream in resumed:
        stream.restore(states)
    return resumed


def counters(streams):
    return sum((collections.Counter(stream.counters) for stream in streams), collections.Counter())


def finish_epoch(streams, used, epoch):
    """Takes batches until every process is past the epoch."""
    for stream in streams:
        while stream.state_dict()["next_epoch"] <= epoch + 1:
            step([stream], used, 1)


def units(shards, held_out=()):
    """(shard, row) -> number of tokens of the document."""
    texts = {(s, r): text for s, shard in enumerate(shards) for r, text in enumerate(shard)}
    return {
        location: len(text) + 2 for location, text in texts.items() if text and text.strip() and text not in held_out
    }


def of_epoch(used, epoch):
    return {key[1:]: number for key, number in used.items() if key[0] == epoch}


def next_epochs(streams):
    return [stream.state_dict()["next_epoch"] for stream in streams]


def incomplete_epochs(streams):
    """The epochs that a reassignment skips for some process."""
    return {epoch for own in next_epochs(streams) for epoch in range(own, max(next_epochs(streams)) - 1)}


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 1), (2, 4), (8, 3), (1, 8), (2, 4, 3), (8, 3, 8, 1)])
@pytest.mark.parametrize("num_shards", [1, 4, 7, 16])
@pytest.mark.parametrize(("shuffle_buffer_size", "interleave_shards"), [(0, 1), (7, 1), (7, 3)])
def test_every_document_of_an_epoch_is_used_once_after_reassignments(
    counts, num_shards, shuffle_buffer_size, interleave_shards
):
    corpus = [*words(160), None, " "]
    shards = split(corpus, num_shards)
    source = memory_source(shards)
    options = {
        "shuffle_buffer_size": shuffle_buffer_size,
        "interleave_shards": interleave_shards,
        "batch_rows": 1,
        "held_out": pa.array(corpus[:5]),
    }
    expected = units(shards, corpus[:5])
    for first in (1, 6):
        used = collections.Counter()
        streams = processes(source, counts[0], **options)
        step(streams, used, first)
        for count in counts[1:]:
            before = counters(streams)
            assert incomplete_epochs(streams) == set()
            streams = resume(source, streams, count, **options)
            assert counters(streams) == before
            step(streams, used, 2)
        # After the work items the next epoch starts with its initial assignment.
        newest = max(next_epochs(streams))
        finish_epoch(streams, used, newest)
        for epoch in range(newest + 1):
            assert of_epoch(used, epoch) == expected


TEXTS = st.one_of(st.none(), st.text(st.sampled_from("ab "), max_size=9))


@pytest.mark.slow
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    shards=st.lists(st.lists(TEXTS, max_size=14), min_size=1, max_size=6),
    array_rows=st.integers(1, 5),
    shuffle_buffer_size=st.integers(0, 9),
    shuffle_buffer_bytes=st.sampled_from([15, 1 << 20]),
    interleave_shards=st.integers(1, 4),
    batch_rows=st.integers(1, 2),
    runs=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=2, max_size=5),
)
def test_repeated_reassignments_after_any_batches_use_no_document_twice(
    shards, array_rows, shuffle_buffer_size, shuffle_buffer_bytes, interleave_shards, batch_rows, runs
):
    """`runs` are (processes, batches). Epochs are complete, except those that a process far behind skips."""
    source = memory_source(shards, array_rows)
    options = {
        "shuffle_buffer_size": shuffle_buffer_size,
        "shuffle_buffer_bytes": shuffle_buffer_bytes,
        "interleave_shards": interleave_shards,
        "batch_rows": batch_rows,
        "max_seq_length": 4,
    }
    expected = units(shards)
    used, incomplete, streams = collections.Counter(), set(), processes(source, runs[0][0], **options)
    try:
        for count, batches in runs:
            if count != len(streams):
                incomplete |= incomplete_epochs(streams)
            streams = resume(source, streams, count, **options)
            step(streams, used, batches)
        newest = max(next_epochs(streams))
        finish_epoch(streams, used, newest)
    except UserError:
        hypothesis.reject()  # Too small for so many processes.
    for epoch in range(newest + 1):
        if epoch in incomplete:
            assert all(number <= expected[location] for location, number in of_epoch(used, epoch).items())
        else:
            assert of_epoch(used, epoch) == expected


def test_a_process_more_than_one_epoch_behind_skips_the_epochs_between():
    # Process 0 has 60 documents per epoch and process 1 has 2: it is 4 epochs ahead when 0 is in its first.
    shards = [words(60), ["ab", "cd"]]
    source = memory_source(shards)
    options = {"shuffle_buffer_size": 0, "batch_rows": 1, "max_seq_length": 4}
    used = collections.Counter()
    streams = processes(source, 2, **options)
    step(streams, used, 9)
    assert [stream.epoch for stream in streams] == [0, 4]
    streams = resume(source, streams, 1, **options)
    finish_epoch(streams, used, 4)
    large, small = ({key: n for key, n in units(shards).items() if key[0] == s} for s in (0, 1))
    assert of_epoch(used, 0) == of_epoch(used, 4) == large | small
    for epoch in (1, 2, 3):
        assert of_epoch(used, epoch) == small


def test_states_after_a_reassignment_are_small_and_resume_exactly():
    shards = split(words(200), 16)
    source = memory_source(shards)
    streams = processes(source, 8, batch_rows=1)
    step(streams, collections.Counter(), 5)
    streams = resume(source, streams, 3, batch_rows=1)
    for _ in range(60):  # Past the last work item.
        state = json.loads(json.dumps(streams[1].state_dict()))
        assert len(json.dumps(state)) < 1400
        again = rows_of(source, batch_rows=1, process_index=1, process_count=3)
        again.restore([{}, state, {}])
        batches = [next(streams[1]).tolist() for _ in range(2)]
        assert [next(again).tolist() for _ in range(2)] == batches
        assert again.state_dict() == streams[1].state_dict()
    assert streams[1].state_dict()["slices"] is None
    assert len(json.dumps(streams[1].state_dict())) < 700


def test_reassigning_states_of_another_order_is_refused():
    source = memory_source([words(50)])
    streams = processes(source, 2)
    step(streams, collections.Counter(), 1)
    states = [stream.state_dict() for stream in streams]
    with pytest.raises(UserError, match="seed=2, but the checkpoint was saved with 1"):
        rows_of(source, seed=2).restore(states)
    with pytest.raises(UserError, match="process_index=0, but the checkpoint was saved with 1"):
        rows_of(source).restore(states[::-1])


def test_every_process_has_a_batch_for_every_step():
    """Also with an assignment of 2 documents beside one of 400."""
    source = memory_source([words(400), ["ab", "cd"]])
    streams = processes(source, 2, shuffle_buffer_size=0, batch_rows=2, max_seq_length=4)
    for _ in range(50):
        assert [next(stream).shape for stream in streams] == [(2, 4), (2, 4)]
    assert [stream.epoch for stream in streams] == [0, 49]


def test_an_assignment_too_small_for_a_batch_is_accepted_if_the_next_epochs_differ():
    shards = [words(30), [], ["a"], words(30, start=30), [], []]
    source = memory_source(shards)
    streams = processes(source, 3, batch_rows=4, seed=4)
    used = collections.Counter()
    step(streams, used, 30)
    finish_epoch(streams, used, 2)
    for epoch in range(3):
        assert of_epoch(used, epoch) == units(shards)
    # Without shuffling it is the same in every epoch, and the first batch is an error.
    with pytest.raises(UserError, match="no documents to train on for process 1 of 3"):
        next(rows_of(source, shuffle_buffer_size=0, process_index=1, process_count=3))


def test_assign_gives_every_row_to_one_process():
    slices = [shard_assignment.ShardSlice(shard, start=2) for shard in range(5)]
    for count in (1, 2, 3, 5, 8, 13):
        assigned = [shard_assignment.assign(slices, process_index=n, process_count=count) for n in range(count)]
        rows = [
            (part.shard, row)
            for part in itertools.chain(*assigned)
            for row in range(part.start, 40)
            if row % part.stride == part.offset
        ]
        assert sorted(rows) == [(shard, row) for shard in range(5) for row in range(2, 40)]
    assert shard_assignment.assign([], process_index=1, process_count=2) == ()


def test_the_examples_of_the_module_docstring():
    def shards(process_index, process_count):
        slices = shard_assignment.assign_shards(
            4, seed=0, epoch=0, shuffled=False, process_index=process_index, process_count=process_count
        )
        return [(part.shard, part.start, part.offset, part.stride) for part in slices]

    assert shards(0, 2) == [(0, 0, 0, 1), (2, 0, 0, 1)]
    assert shards(1, 2) == [(1, 0, 0, 1), (3, 0, 0, 1)]
    assert shards(5, 8) == [(1, 0, 1, 2)]

    positions = [shard_assignment.Position(window_start=shard_assignment.Cursor(0, row)) for row in (7, 5)]
    position = shard_assignment.reassign(
        positions,
        process_index=0,
        process_count=1,
        initial_assignment=lambda epoch, index, count: shard_assignment.assign_shards(
            4, seed=0, epoch=epoch, shuffled=False, process_index=index, process_count=count
        ),
    )
    assert (position.epoch, position.next_epoch, position.work_items) == (0, 1, ())
    assert [(part.shard, part.start) for part in position.slices] == [(0, 7), (2, 0), (1, 5), (3, 0)]
