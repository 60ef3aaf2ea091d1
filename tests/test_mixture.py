"""Batches of mixtures, and skipped steps."""

import json

import numpy as np
import pytest

from mlm.data import mixture as mixture_lib
from mlm.errors import UserError
from tests.test_stream import DEFAULTS, documents_in, memory_source, rows_of, split, words

SHARDS = split(words(90), 3)


def one(source=None, *, rows=2, skip_steps=(), process_index=0, process_count=1, **kwargs):
    """The batches of a single source."""
    process = {"process_index": process_index, "process_count": process_count}
    stream = rows_of(source or memory_source(SHARDS), batch_rows=rows, **process, **kwargs)
    shape = mixture_lib.BatchShape(0, rows, (DEFAULTS | kwargs)["max_seq_length"], {"text": 1.0})
    return mixture_lib.BatchStream({"text": stream}, shapes=[shape], skip_steps=skip_steps, **process)


WEIGHTS = {"even": 5, "odd": 3, "rare": 0.04}


def mixture(*, rows=8, weights=None, process_index=0, process_count=1, skip_steps=(), **kwargs):
    """Three sources: documents of digits and letters, one or two letters, and dots."""
    weights = weights or WEIGHTS
    texts = [split(words(70), 4), [["xy", "z"] * 40, ["y"] * 50], [["." * n for n in range(1, 9)]]]
    process = {"process_index": process_index, "process_count": process_count}
    streams = {
        name: rows_of(memory_source(part), batch_rows=1, **process, **kwargs)
        for name, part in zip(weights, texts, strict=True)
    }
    shape = mixture_lib.BatchShape(0, rows, (DEFAULTS | kwargs)["max_seq_length"], weights)
    return mixture_lib.BatchStream(streams, shapes=[shape], skip_steps=skip_steps, **process)


def take(stream, count):
    return [next(stream).tolist() for _ in range(count)]


def saved(stream):
    return json.loads(json.dumps(stream.state_dict()))


def test_batches_of_one_source_are_its_rows():
    assert take(one(), 30) == [next(rows).tolist() for rows in [rows_of(memory_source(SHARDS))] for _ in range(30)]


@pytest.mark.parametrize("make", [one, mixture])
@pytest.mark.parametrize(
    ("skip_steps", "skipped"),
    [
        (((4, 4),), {4}),
        (((1, 3),), {1, 2, 3}),
        (((3, 5), (9, 10)), {3, 4, 5, 9, 10}),
        (((9, 10), (3, 5), (5, 6)), {3, 4, 5, 6, 9, 10}),
        ((), set()),
    ],
)
def test_skipped_batches_are_left_out_and_resume_exactly(make, skip_steps, skipped):
    straight = take(make(), 20)
    numbers = [n for n in range(1, 21) if n not in skipped]
    stream = make(skip_steps=skip_steps)
    for step, number in enumerate(numbers[:-2], 1):
        assert next(stream).tolist() == straight[number - 1]
        assert stream.batch_number == number == mixture_lib.batch_of_step(step, skip_steps)
        state = saved(stream)
        assert sum(last - first + 1 for first, last in state["skipped_batches"]) == len(
            [n for n in skipped if n <= number]
        )
        # It resumes exactly before, between and after them.
        again = make(skip_steps=skip_steps)
        again.restore([state])
        assert take(again, 2) == [straight[n - 1] for n in numbers[step : step + 2]]


def staged(packing, *, skip_steps=(), process_index=0, process_count=1):
    """Sources a and b; after 3 steps rows of another length, after 6 steps b only, after 8 steps both again."""
    texts = {"a": split(words(90), 3), "b": split([f".{word}" for word in words(40)], 2)}
    process = {"process_index": process_index, "process_count": process_count}
    streams = {name: rows_of(memory_source(part), packing=packing, **process) for name, part in texts.items()}
    weights = {"a": 2, "b": 1}
    shapes = [
        mixture_lib.BatchShape(0, 3, DEFAULTS["max_seq_length"], weights),
        mixture_lib.BatchShape(3, 2, 7, weights),
        mixture_lib.BatchShape(6, 2, 9, {"b": 1}),
        mixture_lib.BatchShape(8, 3, 12, weights),
    ]
    return mixture_lib.BatchStream(streams, shapes=shapes, skip_steps=skip_steps, **process)


@pytest.mark.parametrize("packing", ["concatenate", "pad", "pad_lines", "best_fit"])
@pytest.mark.parametrize("skip_steps", [(), ((4, 5), (8, 8))])
def test_stages_resume_after_every_batch(packing, skip_steps):
    straight = take(staged(packing, skip_steps=skip_steps), 12)
    # Skipped batches do not move the boundaries.
    assert [np.shape(batch) for batch in straight] == 3 * [(3, 12)] + 3 * [(2, 7)] + 2 * [(2, 9)] + 4 * [(3, 12)]
    for steps in range(1, 12):
        stream = staged(packing, skip_steps=skip_steps)
        take(stream, steps)
        again = staged(packing, skip_steps=skip_steps)
        again.restore([saved(stream)])
        assert take(again, 12 - steps) == straight[steps:]


def test_a_source_continues_where_it_stopped_in_rows_of_any_length():
    stream, tokens, alone = staged("concatenate"), {"a": [], "b": []}, staged("concatenate").streams
    for _ in range(12):
        batch = next(stream)
        for index, name in enumerate(tokens):
            tokens[name] += batch[stream._row_sources == index].ravel().tolist()
    for name, found in tokens.items():
        expected = alone[name].take(-(-len(found) // 12)).ravel()
        assert found == expected[: len(found)].tolist()


def test_documents_that_are_padded_are_neither_lost_nor_repeated_at_a_boundary():
    documents = []
    for batch in take(staged("pad"), 12):
        documents += documents_in([batch])
    alone = staged("pad").streams
    expected = documents_in([alone["a"].take(90)]) + documents_in([alone["b"].take(40)])
    assert len(documents) == len(set(documents)) == 3 * 3 + 5 * 2 + 4 * 3
    assert {document[:5] for document in documents} <= {document[:5] for document in expected}


def test_skip_steps_may_change_past_the_checkpoint_only():
    straight = take(one(), 20)
    stream = one(skip_steps=((3, 4),))
    take(stream, 4)  # 1, 2, 5, 6
    state = saved(stream)
    assert (state["batches"], state["skipped_batches"]) == (6, [[3, 4]])
    again = one(skip_steps=((3, 3), (4, 4), (7, 8)))  # The same batches up to 6.
    again.restore([state])
    assert take(again, 2) == straight[8:10]
    for other in ((), ((3, 4), (6, 7)), ((3, 5),), ((2, 4),)):
        with pytest.raises(UserError, match="of the first 6 batches"):
            one(skip_steps=other).restore([state])


@pytest.mark.slow
def test_each_source_has_the_fraction_of_the_rows_that_its_weight_asks_for():
    """Within one row, in every process and at any time; so to far under 1 % over a million tokens."""
    for process in range(2):
        stream = mixture(process_index=process, process_count=2, rows=32, packing="pad")
        weights = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
        for n in range(1, 60):
            next(stream)
            assert np.abs(np.array(list(stream.state_dict()["rows_per_source"].values())) - weights * 32 * n).max() <= 1
    rows = np.bincount(mixture(rows=1_000_000 // 12)._next_row_sources())
    assert np.abs(rows / rows.sum() / weights - 1).max() < 0.01


def test_rows_of_a_mixture_are_those_of_its_sources():
    stream, alone = mixture(), mixture().streams
    for _ in range(40):
        batch = next(stream)
        for n, rows in enumerate(alone.values()):
            for row in batch[stream._row_sources == n]:
                assert row.tolist() == rows.take(1)[0].tolist()
    assert stream.epoch == min(rows.epoch for rows in stream.streams.values())


def test_rows_of_a_mixture_do_not_depend_on_the_batch_size():
    once, often = mixture(rows=40), mixture(rows=8)
    assert np.concatenate(take(often, 20)).tolist() == np.concatenate(take(once, 4)).tolist()


@pytest.mark.parametrize("process_count", [1, 2])
def test_a_mixture_resumes_after_every_batch(process_count):
    process = {"process_index": process_count - 1, "process_count": process_count}
    straight = mixture(**process)
    states, expected, counters = [saved(straight)], [], []
    for _ in range(40):
        expected += take(straight, 1)
        states.append(saved(straight))
        counters.append(straight.counters)
    state = states[0]
    for n in range(40):
        again = mixture(**process)
        again.restore([state] * process_count)  # Each process reads its own.
        assert take(again, 1) == expected[n : n + 1]
        state = saved(again)
        assert (state, again.counters) == (states[n + 1], counters[n])
    assert len(json.dumps(state)) < 2500


def test_a_mixture_resumes_on_another_number_of_processes():
    streams = [mixture(process_index=n, process_count=2) for n in range(2)]
    for stream in streams:
        take(stream, 3)
    states = [saved(stream) for stream in streams]
    resumed = [mixture(process_index=n, process_count=3) for n in range(3)]
    for stream in resumed:
        stream.restore(states)
        take(stream, 2)
        assert stream.batch_number == 5
        assert stream.state_dict()["topology_history"] == [
            {"after_batch": 0, "process_count": 2, "batch_rows": 8},
            {"after_batch": 3, "process_count": 3, "batch_rows": 8},
        ]
        assert sum(stream.state_dict()["rows_per_source"].values()) == 16
    # Each source is reassigned by itself, as in test_shard_assignment.
    for name, stream in resumed[1].streams.items():
        alone = mixture(process_index=1, process_count=3).streams[name]
        alone.restore([state["streams"][name] for state in states])
        alone.take(resumed[1].state_dict()["rows_per_source"][name] or 1)
        assert alone.epoch == stream.epoch


def test_a_mixture_of_other_sources_is_refused():
    state = saved(mixture())
    with pytest.raises(UserError, match="the sources are a, b, c, but the checkpoint was saved with even, odd, rare"):
        mixture(weights={"a": 1, "b": 1, "c": 1}).restore([state])


@pytest.mark.parametrize("found", [None, 0, 4])
def test_a_state_of_another_format_version_is_refused(found):
    state = saved(one())
    if found is None:
        del state["format_version"]
    else:
        state["format_version"] = found
    with pytest.raises(UserError) as error:
        one().restore([state])
    assert str(error.value) == (
        f"data stream state: format_version={found or 0} is not supported, this version of the code reads "
        f"{mixture_lib.STREAM_FORMAT_VERSION}; use the version that wrote the checkpoint, or choose another --workdir"
    )


def test_the_format_of_the_state():
    """Runs under way have such states: whoever changes it raises STREAM_FORMAT_VERSION and maps the older format."""
    source = memory_source(split(words(40), 3))
    streams = [one(source, rows=1, process_index=n, process_count=2) for n in range(2)]
    for stream in streams:
        take(stream, 3)
    resumed = one(source, rows=1, skip_steps=((4, 4),))
    resumed.restore([saved(stream) for stream in streams])
    take(resumed, 1)
    assert saved(resumed) == {
        "format_version": 3,
        "batches": 5,
        "skipped_batches": [[4, 4]],
        "topology_history": [
            {"after_batch": 0, "process_count": 2, "batch_rows": 1},
            {"after_batch": 3, "process_count": 1, "batch_rows": 1},
        ],
        "rows_per_source": {"text": 2},
        "streams": {
            "text": {
                "seed": 1,
                "max_seq_length": 12,
                "packing": "concatenate",
                "shuffle_buffer_size": 7,
                "shuffle_buffer_bytes": 1 << 26,
                "shuffle_piece_bytes": 0,
                "first_shuffle_buffer_size": 0,
                "interleave_shards": 1,
                "num_shards": 3,
                "process_index": 0,
                "process_count": 1,
                "epoch": 0,
                "slices": [[1, 0, 0, 1, None]],
                "window_subset": [0, 1],
                "window_start": [0, 0, []],
                "window_index": 0,
                "window_end": [1, 0, []],
                "window_hash": "219e1d2f",
                "document": 6,
                "unit": 9,
                "repacked": [],
                "units_used": 12,
                "work_items": [[0, [[0, 7, 0, 1, None], [2, 0, 0, 1, None], [1, 7, 0, 1, None]], None]],
                "next_epoch": 1,
                "documents_before_window": 7,
                "skipped_documents": 0,
                "held_out_documents": 0,
                "failed_shards": 0,
                "tokenizer_differences": 0,
                "cut_documents": 0,
            }
        },
    }


def test_a_state_of_format_version_1_continues_in_the_same_order():
    source = memory_source(split(words(40), 3))
    for num_batches in range(12):
        stream = one(source)
        take(stream, num_batches)
        state = saved(stream)
        state["format_version"] = 1
        position = state["streams"]["text"]
        for name in ("shuffle_buffer_bytes", "interleave_shards"):
            del position[name]
        position["slice_index"], position["row"], _ = position.pop("window_start")
        position["window_end"] = position["window_end"] and position["window_end"][:2]
        del position["repacked"], position["cut_documents"], position["shuffle_piece_bytes"]
        del position["first_shuffle_buffer_size"]
        resumed = one(source)
        resumed.restore([state])
        assert take(resumed, 8) == take(stream, 8)


def test_a_state_from_before_windows_grew_is_restored():
    source = memory_source([words(50)])
    stream = one(source)
    take(stream, 2)
    state = saved(stream)
    del state["streams"]["text"]["first_shuffle_buffer_size"]
    resumed = one(source)
    resumed.restore([state])
    assert take(resumed, 3) == take(stream, 3)


def test_documents_of_a_batch_are_those_of_its_rows():
    texts = {"even": split(words(70), 4), "odd": [["xy", "z"] * 40, ["y"] * 50]}
    stream = mixture(packing="pad")
    for _ in range(20):
        batch = next(stream)
        found = {}
        for document in stream.documents():
            if document.source in texts:
                (row,) = document.batch_rows
                found[row] = texts[document.source][document.shard][document.row]
        for row, text in found.items():
            assert [chr(t) for t in batch[row] if t > 2] == list(text)
        assert len(found) >= 7


def test_documents_that_span_several_rows():
    corpus = ["abcdefghij", "k", "lm", "nopqrstu"]
    stream = one(memory_source([corpus]), rows=2, max_seq_length=6, shuffle_buffer_size=0)
    seen = []
    for _ in range(30):
        batch = next(stream)
        rows = [[], []]
        for document in stream.documents():
            for row in document.batch_rows:
                rows[row].append((document.epoch, document.row))
        seen += [(rows[n], batch[n].tolist()) for n in range(2)]
    # The letters of a row's documents, and no others, are in the row; documents follow each other.
    order = []
    for documents, tokens in seen:
        order += [document for document in documents if document not in order]
        letters = "".join(corpus[row] for _, row in documents)
        assert set(map(chr, tokens)) - {"\x01", "\x02"} <= set(letters)
        for _, row in documents[1:-1]:
            assert set(corpus[row]) <= set(map(chr, tokens))
    assert order == [(n // 4, n % 4) for n in range(len(order))]
    assert seen[0][0] == [(0, 0)]
    assert [documents for documents, _ in seen[1:5]] == [[(0, 0)], [(0, 1), (0, 2)], [(0, 2), (0, 3)], [(0, 3), (1, 0)]]
