"""Steps left out, and mixtures."""

import json

import numpy as np
import pytest

from mlm.data import mixture as mixture_lib
from mlm.errors import UserError
from tests.test_stream import memory_source, rows_of, split, words

SHARDS = split(words(90), 3)


def one(source=None, *, rows=2, skip_steps=(), process_index=0, process_count=1, **kwargs):
    """The batches of a single source."""
    share = {"process_index": process_index, "process_count": process_count}
    stream = rows_of(source or memory_source(SHARDS), batch_rows=rows, **share, **kwargs)
    return mixture_lib.BatchStream(
        {"text": stream}, weights={"text": 1.0}, batch_rows=rows, skip_steps=skip_steps, **share
    )


WEIGHTS = {"even": 5, "odd": 3, "rare": 0.04}


def mixture(*, rows=8, weights=None, process_index=0, process_count=1, skip_steps=(), **kwargs):
    """Three sources: documents of digits and letters, one or two letters, and dots."""
    shares = weights or WEIGHTS
    texts = [split(words(70), 4), [["xy", "z"] * 40, ["y"] * 50], [["." * n for n in range(1, 9)]]]
    share = {"process_index": process_index, "process_count": process_count}
    streams = {
        name: rows_of(memory_source(part), batch_rows=1, **share, **kwargs)
        for name, part in zip(shares, texts, strict=True)
    }
    return mixture_lib.BatchStream(streams, weights=shares, batch_rows=rows, skip_steps=skip_steps, **share)


def take(stream, count):
    return [next(stream).tolist() for _ in range(count)]


def saved(stream):
    return json.loads(json.dumps(stream.state_dict()))


def test_one_source_gives_its_own_rows():
    assert take(one(), 30) == [next(rows).tolist() for rows in [rows_of(memory_source(SHARDS))] for _ in range(30)]


@pytest.mark.parametrize("make", [one, mixture])
@pytest.mark.parametrize(
    ("skip_steps", "left_out"),
    [
        (((4, 4),), {4}),
        (((1, 3),), {1, 2, 3}),
        (((3, 5), (9, 10)), {3, 4, 5, 9, 10}),
        (((9, 10), (3, 5), (5, 6)), {3, 4, 5, 6, 9, 10}),
        ((), set()),
    ],
)
def test_steps_left_out(make, skip_steps, left_out):
    straight = take(make(), 20)
    kept = [n for n in range(1, 21) if n not in left_out]
    stream = make(skip_steps=skip_steps)
    for step, number in enumerate(kept[:-2], 1):
        assert next(stream).tolist() == straight[number - 1]
        assert stream.number == number == mixture_lib.batch_of_update(step, skip_steps)
        state = saved(stream)
        assert sum(last - first + 1 for first, last in state["skipped"]) == len([n for n in left_out if n <= number])
        # It resumes exactly, between, before and after them.
        again = make(skip_steps=skip_steps)
        again.load_state_dict(state)
        assert take(again, 2) == [straight[n - 1] for n in kept[step : step + 2]]


def test_steps_left_out_may_change_past_the_checkpoint_only():
    straight = take(one(), 20)
    stream = one(skip_steps=((3, 4),))
    take(stream, 4)  # 1, 2, 5, 6
    state = saved(stream)
    assert (state["batches"], state["skipped"]) == (6, [[3, 4]])
    again = one(skip_steps=((3, 3), (4, 4), (7, 8)))  # the same up to 6
    again.restore([state])
    assert take(again, 2) == straight[8:10]
    for other in ((), ((3, 4), (6, 7)), ((3, 5),), ((2, 4),)):
        with pytest.raises(UserError, match="of the first 6 batches"):
            one(skip_steps=other).load_state_dict(state)


def test_bad_ranges_are_told():
    for bad in ((4, 5), ((4,),), (("a", "b"),), ((4.0, 5.0),)):
        with pytest.raises(UserError, match="pairs of updates"):
            one(skip_steps=bad)
    for bad in ((5, 4), (0, 3)):
        with pytest.raises(UserError, match="is no range of updates"):
            one(skip_steps=(bad,))


def test_shares_hold():
    """Within one row, and so to far under 1 % over a million tokens, in every process and at any time."""
    for process in range(2):
        stream = mixture(process_index=process, process_count=2, rows=32, packing="pad")
        weights = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
        for n in range(1, 60):
            next(stream)
            assert np.abs(np.array(stream.state_dict()["rows"]) - weights * 32 * n).max() <= 1
    rows = np.bincount(mixture(rows=1_000_000 // 12)._next_sources())
    assert np.abs(rows / rows.sum() / weights - 1).max() < 0.01


def test_rows_of_a_mixture_are_those_of_its_sources():
    stream, alone = mixture(), mixture().streams
    for _ in range(40):
        batch = next(stream)
        for n, rows in enumerate(alone.values()):
            for row in batch[stream._sources == n]:
                assert row.tolist() == rows.take(1)[0].tolist()
    assert stream.epoch == min(rows.epoch for rows in stream.streams.values())


def test_a_mixture_does_not_depend_on_how_many_rows_come_at_once():
    once, often = mixture(rows=40), mixture(rows=8)
    assert np.concatenate(take(often, 20)).tolist() == np.concatenate(take(once, 4)).tolist()


@pytest.mark.parametrize("process_count", [1, 2])
def test_a_mixture_resumes_after_every_batch(process_count):
    share = {"process_index": process_count - 1, "process_count": process_count}
    straight = mixture(**share)
    states, expected, counters = [saved(straight)], [], []
    for _ in range(40):
        expected += take(straight, 1)
        states.append(saved(straight))
        counters.append(straight.counters)
    state = states[0]
    for n in range(40):
        again = mixture(**share)
        again.load_state_dict(state)
        assert take(again, 1) == expected[n : n + 1]
        state = saved(again)
        assert (state, again.counters) == (states[n + 1], counters[n])
    assert len(json.dumps(state)) < 2500


def test_a_mixture_goes_on_with_another_number_of_processes():
    streams = [mixture(process_index=n, process_count=2) for n in range(2)]
    for stream in streams:
        take(stream, 3)
    states = [saved(stream) for stream in streams]
    anew = [mixture(process_index=n, process_count=3) for n in range(3)]
    for stream in anew:
        stream.restore(states)
        take(stream, 2)
        assert stream.number == 5
        assert stream.state_dict()["runs"] == [[0, 2, 8], [3, 3, 8]]
        assert sum(stream.state_dict()["rows"]) == 16
    # A source at a time, dealing's own tests hold.
    for name, stream in anew[1].streams.items():
        alone = mixture(process_index=1, process_count=3).streams[name]
        alone.restore([state["streams"][name] for state in states])
        alone.take(anew[1].state_dict()["rows"][list(WEIGHTS).index(name)] or 1)
        assert alone.epoch == stream.epoch


def test_a_mixture_of_other_sources_is_refused():
    state = saved(mixture())
    with pytest.raises(UserError, match="with the sources even, odd, rare, and now there are a, b, c"):
        mixture(weights={"a": 1, "b": 1, "c": 1}).load_state_dict(state)


def test_documents_of_a_batch():
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


def test_documents_that_run_over_rows():
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
    for places, tokens in seen:
        order += [place for place in places if place not in order]
        letters = "".join(corpus[row] for _, row in places)
        assert set(map(chr, tokens)) - {"\x01", "\x02"} <= set(letters)
        for _, row in places[1:-1]:
            assert set(corpus[row]) <= set(map(chr, tokens))
    assert order == [(n // 4, n % 4) for n in range(len(order))]
    assert seen[0][0] == [(0, 0)]
    assert [places for places, _ in seen[1:5]] == [[(0, 0)], [(0, 1), (0, 2)], [(0, 2), (0, 3)], [(0, 3), (1, 0)]]
