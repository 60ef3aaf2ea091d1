"""Long documents are cut into pieces before the permutation of a shuffle window (data.shuffle_piece_bytes)."""

import collections
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest

from mlm.data import held_out, pieces, reader
from mlm.data.sources.source import ShardUnavailableError, Source
from tests.letters import Letters
from tests.test_stream import (
    BOS,
    EOS,
    PAD,
    assert_resumes_everywhere,
    memory_source,
    resumed,
    rows_of,
    saved,
    split,
    words,
)

# Longer than any document, or not.
LONG = "one two three four five six seven eight nine ten eleven twelve"
TEXTS = st.lists(st.one_of(st.none(), st.text(st.sampled_from("a \n\u00e9\u4e2d\U0001f642"), max_size=40)), max_size=8)


def cut(texts, is_used=None, **options):
    column = pa.array(texts, pa.large_string())
    is_used = reader.has_text(column) if is_used is None else np.array(is_used)
    found, documents, is_used = pieces.cut(column, is_used, **{"max_bytes": 16} | options)
    return found.to_pylist(), documents.tolist(), is_used.tolist()


def test_documents_are_cut_before_whitespace_into_about_equal_pieces():
    found, documents, is_used = cut(["short", LONG, "also short"])
    assert found == [
        "short",
        "one two three",
        " four five",
        " six seven",
        " eight nine ten",
        " eleven twelve",
        "also short",
    ]
    assert documents == [0, 1, 1, 1, 1, 1, 2]
    assert all(is_used)
    # Not those that are not used; lines only; a null or empty text beside.
    assert cut([LONG, "a"], [False, True]) == ([LONG, "a"], [0, 1], [False, True])
    lines = "a b c d\ne f g h\ni j k l\r\nm n o p"
    assert cut([None, lines, ""], separators=(b"\n",)) == (
        ["", "a b c d\ne f g h", "\ni j k l\r", "\nm n o p", ""],
        [0, 1, 1, 1, 2],
        [False, True, True, True, False],
    )


def test_texts_without_whitespace_are_cut_between_characters():
    assert cut(["\u4e2d" * 11])[0] == ["\u4e2d" * 3, "\u4e2d" * 4, "\u4e2d" * 4]
    found, _, is_used = cut(["a" + " " * 60 + "b"])
    assert "".join(found) == "a" + " " * 60 + "b"
    assert [text for text, used in zip(found, is_used, strict=True) if used and not text.strip()] == []


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    texts=TEXTS, start=st.integers(0, 3), max_bytes=st.integers(8, 20), newlines=st.booleans(), data=st.data()
)
def test_joined_pieces_are_the_document(texts, start, max_bytes, newlines, data):
    column = pa.array(texts, pa.large_string()).slice(start)
    texts = column.to_pylist()
    is_used = reader.has_text(column) & np.array(
        data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))), bool
    )
    separators = (b"\n",) if newlines else pieces.WHITESPACE
    found, documents, is_used_P = pieces.cut(column, is_used, max_bytes=max_bytes, separators=separators)
    found.validate(full=True)
    joined = collections.defaultdict(str)
    for document, text, used in zip(documents.tolist(), found.to_pylist(), is_used_P.tolist(), strict=True):
        joined[document] += text or ""
        if used:
            assert is_used[document]
            assert text.strip()
            assert len(text.encode()) <= max_bytes
        elif is_used[document]:
            assert not text.strip()
    assert [joined[number] for number in range(len(texts))] == [text or "" for text in texts]


def test_pieces_share_the_memory_of_the_documents():
    column = pa.array([LONG * 100, "a"], pa.large_string())
    found, _, _ = pieces.cut(column, np.array([True, True]), max_bytes=64)
    assert found.buffers()[2].address == column.buffers()[2].address


def test_a_book_does_not_give_consecutive_sequences():
    corpus = ["b" * 3 + " b" * 400, *words(400, start=1 << 12)]
    options = {"shuffle_buffer_size": 1000, "max_seq_length": 20, "batch_rows": 1}

    def longest_run(**more):
        rows = rows_of(memory_source([corpus]), **options, **more)
        is_book = []
        while True:
            row = next(rows)[0]
            if rows.epoch:
                return max(len(list(group)) for value, group in itertools.groupby(is_book) if value)
            is_book.append(np.mean(row == ord("b")) > 0.3)

    assert longest_run() == 41
    assert longest_run(shuffle_piece_bytes=32) <= 4


def test_windows_without_long_documents_have_the_order_of_complete_documents():
    source = memory_source(split(words(60), 3))
    rows, cut_rows = rows_of(source), rows_of(source, shuffle_piece_bytes=16)
    for _ in range(30):
        np.testing.assert_array_equal(next(rows), next(cut_rows))


LONG_AND_SHORT = [word if n % 4 else " ".join([word] * 6) for n, word in enumerate(words(40))]


@pytest.mark.parametrize(("how", "process_count"), [("isolate", 1), ("pad_lines", 2), ("best_fit", 2)])
def test_streams_resume_after_every_batch(how, process_count):
    source = memory_source(split(LONG_AND_SHORT[:20], 3))
    num_batches = {"pad_lines": 20}.get(how, 19) // process_count + 3
    for process in range(process_count):
        options = {"packing": how, "interleave_shards": 2, "shuffle_piece_bytes": 16, "max_seq_length": 14}
        assert_resumes_everywhere(source, num_batches, process_index=process, process_count=process_count, **options)


@pytest.mark.parametrize("counts", [(2, 1, 3), (1, 4, 2)])
@pytest.mark.parametrize("how", ["concatenate", "best_fit"])
def test_every_piece_of_an_epoch_is_used_once_after_reassignments(counts, how):
    source = memory_source(split(LONG_AND_SHORT * 4, 4))
    options = {"packing": how, "interleave_shards": 2, "shuffle_piece_bytes": 16, "batch_rows": 1}
    letters, streams = collections.Counter(), []

    def step(stream):
        row = next(stream)[0]
        if stream.epoch == 0:
            letters.update(row[(row != BOS) & (row != EOS) & (row != PAD)].tolist())
            locations.update((document.shard, document.row) for document in stream.documents())

    locations = set()
    for count in counts:
        states = [saved(stream) for stream in streams]
        streams = [rows_of(source, process_index=n, process_count=count, **options) for n in range(count)]
        for stream in streams:
            if states:
                stream.restore(states)
            for _ in range(3):
                step(stream)
    for stream in streams:
        while stream.epoch == 0:
            step(stream)
    # The row in which an epoch ends belongs to the next one.
    expected = collections.Counter(ord(letter) for text in LONG_AND_SHORT * 4 for letter in text)
    missing = expected - letters
    assert letters - expected == collections.Counter()
    assert sum(missing.values()) <= (12 * counts[-1] if how == "concatenate" else 0)
    assert len(locations) >= 160 - 2 * counts[-1]


@pytest.mark.parametrize("eval_rows", ["spread", "first"])
def test_no_piece_of_an_eval_document_is_trained_on(eval_rows):
    corpus = [" ".join([chr(0x100 + n)] * (30 if n % 3 == 0 else 2)) for n in range(60)]
    source = memory_source(split(corpus, 4))
    eval_set = held_out.read_eval_set(
        source, Letters(), num_sequences=6, max_seq_length=12, packing="isolate", eval_rows=eval_rows
    )
    rows = rows_of(source, packing="isolate", held_out=eval_set.documents, shuffle_piece_bytes=16)
    trained = set()
    while rows.epoch < 3:
        trained |= set(np.unique(next(rows)).tolist())
    evaluated = {ord(text[0]) for text in eval_set.documents.to_pylist()}
    assert len(evaluated) >= 2
    assert trained - {BOS, EOS, ord(" ")} == {ord(text[0]) for text in corpus} - evaluated


@pytest.mark.slow
def test_a_shard_that_fails_in_the_middle_of_a_window_is_skipped_and_resumed():
    shards, broken = split(LONG_AND_SHORT, 3), [True]

    def columns(shard, row):
        for number, text in enumerate(shards[shard][row:], row):
            if shard == 1 and number == 5 and broken[0]:
                raise ShardUnavailableError("cannot read shard 1")
            yield pa.array([text])

    source = Source("failing", "text", 3, columns, str)
    options = {"shuffle_piece_bytes": 16, "interleave_shards": 2, "max_failed_shards": 1, "batch_rows": 1}
    rows, states, batches = rows_of(source, **options), [], []
    while not rows.epoch:
        states.append(saved(rows))
        batches.append(next(rows).tolist())
    broken[0] = False
    num_failed = 0
    for number, state in enumerate(states):
        if state["failed_shards"]:
            num_failed += 1
            again = resumed(source, state, **options)
            assert [next(again).tolist() for _ in batches[number:]] == batches[number:]
    assert 5 < num_failed < len(states)
