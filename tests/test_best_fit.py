"""Packing by best fit: which pieces go into which rows."""

import collections

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pyarrow as pa
import pytest

from benchmarks import packing as packing_benchmark
from mlm.data import best_fit, held_out, packing, spread
from mlm.models.ops.position_ids import segment_ids
from mlm.settings import EVAL_ROWS
from tests.letters import Letters
from tests.test_stream import BOS, EOS, PAD, memory_source, resumed, rows_of, saved, split, words


def pack(texts, length, **options):
    return packing.pack(
        pa.array(texts, pa.large_string()), Letters(), packing="best_fit", max_seq_length=length, **options
    )


def pieces_of(rows):
    """The text of each piece of each row, with "$" for an end token."""
    found = []
    for row in rows:
        tokens = row.tolist()
        while tokens and tokens[-1] == PAD:
            tokens.pop()
        text = "".join("$" if t == EOS else "^" if t == BOS else chr(t) for t in tokens)
        assert text.startswith("^")
        assert PAD not in tokens
        found.append(text[1:].split("^"))
    return found


def test_documents_go_into_the_fullest_row_they_fit():
    # With begin and end token 7, 5, 4, 3 and 3 of 10 tokens: 7 + 3, 5 + 4, and 3 in a third row.
    rows = pieces_of(pack(["abc", "x", "defgh", "y", "kl"], 10).data)
    assert sorted(map(sorted, rows)) == [["abc$", "kl$"], ["defgh$", "x$"], ["y$"]]


def test_long_documents_are_cut_into_full_rows_and_the_rest():
    chunk = pack(["abcdefghij", "kl", "m"], 5)
    assert sorted(map(sorted, pieces_of(chunk.data))) == [["abcd"], ["efgh"], ["ij$"], ["kl$"], ["m$"]]
    assert chunk.segments.num_cut == 1
    assert chunk.data.dtype == np.int32
    assert chunk.offsets.tolist() == [0, 5, 5, 5]


@pytest.mark.slow
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 30), max_size=40),
    length=st.integers(3, 12),
    seed=st.integers(0, 3),
    earlier=st.lists(st.tuples(st.integers(3, 12), st.integers(0, 9)), max_size=2),
)
def test_no_token_is_lost_or_repeated_and_no_document_is_cut_that_fits(sizes, length, seed, earlier):
    texts = [chr(ord("a") + n % 26) * size for n, size in enumerate(sizes)]
    found = collections.defaultdict(list)  # Document -> its pieces.
    used, repacked = 0, []
    for next_length, num_used in [*earlier, (length, 1 << 30)]:
        chunk = pack(texts, next_length, seed=(seed,), repacked=repacked)
        documents, begins, _ = chunk.spans(0, num_used)
        rows = pieces_of(chunk.data[:num_used])
        pieces = [piece for row in rows for piece in row]
        assert begins.tolist() == [number for number, row in enumerate(rows) for _ in row]
        for document, piece in zip(documents.tolist(), pieces, strict=True):
            assert set(piece) <= {"$", *texts[document]}
            found[document].append(piece)
        if not repacked:
            assert chunk.segments.num_cut == sum(size + 2 > next_length for size in sizes)
            for document, size in enumerate(sizes):
                assert size + 2 > next_length or np.count_nonzero(chunk.segments.documents == document) == 1
            # A row is started only if the piece fits into no other one.
            fill = np.sort((chunk.data != PAD).sum(1))
            assert len(fill) < 2 or fill[0] + fill[1] > next_length
        repacked.append((next_length, min(num_used, len(chunk.data))))
        used += len(chunk.data[:num_used])
    for document, text in enumerate(texts):
        assert sum(map(len, found[document])) == len(text) + 1
        assert sum(piece.endswith("$") for piece in found[document]) == 1
    assert used == sum(number for _, number in repacked)


def test_a_document_that_is_cut_for_short_rows_is_joined_again_for_longer_ones():
    chunk = pack(["abcdefghijklmno", "p"], 5)
    assert len(chunk.data) == 5
    assert sorted(map(sorted, pieces_of(pack(["abcdefghijklmno", "p"], 20, repacked=[(5, 0)]).data))) == [
        ["abcdefghijklmno$", "p$"]
    ]


@pytest.mark.parametrize("eval_rows", EVAL_ROWS)
def test_documents_of_eval_sequences_are_exactly_those_held_out(eval_rows, monkeypatch):
    monkeypatch.setattr(spread, "_MAX_SHARDS", 2)
    monkeypatch.setattr(spread, "_BEST_FIT_DOCUMENTS_PER_READ", 5)
    corpus = ["b" * 25, *words(60)]
    source = memory_source(split(corpus, 3))
    for count in (1, 3, 20, 40):
        found = held_out.read_eval_set(
            source, Letters(), num_sequences=count, max_seq_length=12, packing="best_fit", eval_rows=eval_rows
        )
        assert found.sequences.shape == (count, 12)
        pieces = {piece.rstrip("$") for row in pieces_of(found.sequences) for piece in row}
        assert {text for text in corpus if text in pieces} == set(found.documents.to_pylist()) - {"b" * 25}
    assert "b" * 25 in found.documents.to_pylist()
    rows = rows_of(source, packing="best_fit", held_out=found.documents)
    trained = {piece.rstrip("$") for _ in range(40) for row in pieces_of(next(rows)) for piece in row}
    assert rows.epoch >= 2
    assert trained == set(corpus) - set(found.documents.to_pylist())


def test_eval_sequences_of_long_documents_are_of_few_documents():
    """All of a document is held out because of one of its sequences."""
    source = memory_source([[letter * 60 for letter in "abcdefghijkl"]])
    found = held_out.read_eval_set(
        source, Letters(), num_sequences=9, max_seq_length=12, packing="best_fit", eval_rows="first"
    )
    assert len(found.documents) <= 3


def test_the_order_of_rows_has_a_seed():
    texts = words(200)
    first, second = pack(texts, 20, seed=(1,)).data, pack(texts, 20, seed=(2,)).data
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert first.tolist() == pack(texts, 20, seed=(1,)).data.tolist()


def test_attention_does_not_cross_documents():
    chunk = pack(words(100), 16)
    segments = np.asarray(
        jax.jit(segment_ids, static_argnames=("pad_id", "begin_id"))(chunk.data, pad_id=PAD, begin_id=BOS)[0]
    )
    documents, begins, _ = chunk.spans(0, len(chunk.data))
    texts = words(100)
    for row, segment in zip(chunk.data, segments, strict=True):
        assert np.all((segment == 0) == (row == PAD))
    for row in range(len(chunk.data)):
        members = documents[begins == row].tolist()
        for number, document in enumerate(members):
            tokens = chunk.data[row][segments[row] == number + 2]
            assert tokens.tolist() == [BOS, *map(ord, texts[document]), EOS]


@pytest.mark.slow
@pytest.mark.parametrize("process_count", [1, 2])
def test_a_run_resumes_after_every_row_and_change_of_length(process_count, monkeypatch):
    monkeypatch.setattr(best_fit, "CHUNK_BYTES", 60)
    source = memory_source(split([word * (1 + n % 3) for n, word in enumerate(words(36))], 3))
    options = {"packing": "best_fit", "shuffle_buffer_size": 25, "batch_rows": 1, "process_count": process_count}
    for process in range(process_count):
        lengths = [9] * 11 + [16] * 7 + [6] * 90

        def next_row(rows, length):
            rows.set_shape(max_seq_length=length, batch_rows=1)
            return next(rows).tolist(), rows.documents(), rows.counters

        straight = rows_of(source, process_index=process, max_seq_length=9, **options)
        expected = [next_row(straight, length) for length in lengths]
        rows = rows_of(source, process_index=process, max_seq_length=9, **options)
        for number, length in enumerate(lengths):
            assert next_row(rows, length) == expected[number]
            rows = resumed(source, saved(rows), process_index=process, max_seq_length=length, **options)
        assert saved(rows) == saved(straight)
        assert expected[-1][2]["cut_documents"] > 0
    assert straight.epoch >= 1


@pytest.mark.parametrize("counts", [(2, 1, 3), (1, 4, 2)])
def test_every_token_of_an_epoch_is_used_once_after_reassignments_and_changes_of_length(counts, monkeypatch):
    monkeypatch.setattr(best_fit, "CHUNK_BYTES", 80)
    corpus = [word * (1 + n % 3) for n, word in enumerate(words(150))]
    source = memory_source(split(corpus, 4))
    options = {"packing": "best_fit", "batch_rows": 1, "shuffle_buffer_size": 20}
    letters = collections.Counter()

    def step(streams, batches):
        for stream in streams:
            for _ in range(batches):
                row = next(stream)[0]
                if stream.epoch == 0:
                    letters.update(row[(row != BOS) & (row != PAD)].tolist())

    streams, length = [], 9
    for count in counts:
        states = [saved(stream) for stream in streams]
        streams = [
            rows_of(source, process_index=n, process_count=count, max_seq_length=length, **options)
            for n in range(count)
        ]
        for stream in streams:
            if states:
                stream.restore(states)
        step(streams, 3)
        length = 25 - length
        for stream in streams:
            stream.set_shape(max_seq_length=length, batch_rows=1)
        step(streams, 2)
    for stream in streams:
        while stream.epoch == 0:
            step([stream], 1)
    assert letters == collections.Counter([ord(letter) for text in corpus for letter in text] + [EOS] * len(corpus))


def test_the_table_of_packings(tmp_path, capsys):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("word " * (1 + number * 7 % 40))
    packing_benchmark.main([f"--files={tmp_path}/*", "--lengths=16", "--vocab_size=300"])
    isolate, best = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:])
    assert isolate[1] == "isolate"
    assert float(isolate[3][:-1]) > float(best[3][:-1]) == 0
