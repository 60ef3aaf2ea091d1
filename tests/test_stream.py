import collections
import dataclasses
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import logging

from mlm.data import packing, reader, shard_assignment, stream
from mlm.data.sources import docstrings, files
from mlm.data.sources.source import Source, open_source
from mlm.errors import UserError
from mlm.settings import PACKINGS
from tests.letters import Letters

BOS, EOS, PAD = Letters.bos_id, Letters.eos_id, Letters.pad_id


def memory_source(shards, array_rows=3):
    """Shards of texts in memory, read a few rows at a time."""

    def columns(shard, row):
        for start in range(row, len(shards[shard]), array_rows):
            yield pa.array(shards[shard][start : start + array_rows], pa.string())

    return Source("memory", "text", len(shards), columns, str)


def words(count, *, start=0):
    """Distinct documents of one to nine letters and digits."""
    return [f"{n:x}" + "abcdefg"[: n * 7 % 8] for n in range(start, start + count)]


def split(items, parts):
    """Shards of about equal size."""
    return [items[len(items) * n // parts : len(items) * (n + 1) // parts] for n in range(parts)]


DEFAULTS = {
    "seed": 1,
    "max_seq_length": 12,
    "packing": "concatenate",
    "shuffle_buffer_size": 7,
    "batch_rows": 2,
    "held_out": None,
}


def rows_of(source, **kwargs):
    return stream.RowStream(source, Letters(), **DEFAULTS | kwargs)


def take(rows, count):
    return [next(rows).tolist() for _ in range(count)]


def documents_in(batches):
    """The texts of "pad" rows."""
    return ["".join(chr(t) for t in row if t not in (BOS, EOS, PAD)) for batch in batches for row in batch]


def epoch_documents(source, **kwargs):
    """The documents of the first epoch in order."""
    rows = rows_of(source, packing="pad", batch_rows=1, **kwargs)
    found = []
    while True:
        batch = next(rows)
        if rows.epoch:
            return found
        found += documents_in([batch])


def saved(rows):
    """The state as a checkpoint stores it."""
    return json.loads(json.dumps(rows.state_dict()))


def resumed(source, state, **kwargs):
    rows = rows_of(source, **kwargs)
    rows.restore([state] * kwargs.get("process_count", 1))  # Each process reads its own.
    return rows


def assert_resumes_everywhere(source, num_batches, **kwargs):
    """The remaining batches follow from every state, and a run restarted after every batch has the same batches."""
    rows = rows_of(source, **kwargs)
    states = [(saved(rows), rows.counters, rows.epoch)]
    batches = []
    for _ in range(num_batches):
        batches += take(rows, 1)
        states.append((saved(rows), rows.counters, rows.epoch))
    assert rows.epoch >= 1  # The end of an epoch is among them.
    state = states[0][0]
    for n in range(num_batches):
        restarted = resumed(source, state, **kwargs)  # Its state is that of the last restart.
        assert (saved(restarted), restarted.counters, restarted.epoch) == states[n]
        assert take(restarted, 1) == batches[n : n + 1]
        state = saved(restarted)
        assert take(restarted, num_batches - n - 1) == batches[n + 1 :]
        assert (saved(restarted), restarted.counters, restarted.epoch) == states[-1]


def make_source(kind, folder, monkeypatch):
    """A source of three shards of distinct short texts, of any kind that can be opened."""
    shards = split([word if n % 9 else " " for n, word in enumerate(words(50))], 3)
    if kind == "docstrings":
        texts = split([f"{word} is a docstring" for word in words(20)], 3)
        paths = [folder / f"{n}.py" for n in range(3)]
        for path, part in zip(paths, texts, strict=True):
            path.write_text("".join(f'class A:\n    """{text}"""\n' for text in part))
        monkeypatch.setattr(docstrings, "_MIN_CHARACTERS", 1)
        found = [docstrings.Shard(path.name, (str(path),)) for path in paths]
        monkeypatch.setattr(docstrings, "find_shards", lambda: found)
        return open_source(dataset_name="docstrings")
    for n, part in enumerate(shards):
        path = folder / f"{n}.{kind}"
        if kind in ("parquet", "named"):
            pq.write_table(pa.table({"text": part}), folder / f"{n}.parquet", row_group_size=5)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        else:
            header = "text\n" if kind == "csv" else ""
            path.write_text(header + "".join(f"{text}\n" for text in part))
    if kind == "named":
        return open_source(dataset_name=str(folder))
    return open_source(data_files=str(folder / f"*.{kind}"))


@pytest.mark.slow
@pytest.mark.parametrize("how", PACKINGS)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "named", "docstrings"])
def test_every_source_and_packing_resumes_after_every_batch(kind, how, tmp_path, monkeypatch):
    source = make_source(kind, tmp_path, monkeypatch)
    assert source.num_shards == 3
    monkeypatch.setattr(files, "_BLOCK_BYTES", 40)
    row = {"concatenate": 12, "isolate": 12, "pad": 6, "pad_lines": 8, "best_fit": 12}[how]
    held_out = pa.array([words(50)[5]])
    # Two rows of 6 to 12 tokens per batch: an epoch is 13 to 23 batches, a window 1 to 4.
    for interleave in (1, 2):
        options = {"packing": how, "max_seq_length": row, "held_out": held_out, "interleave_shards": interleave}
        assert_resumes_everywhere(source, 27, **options)


def test_lines_of_a_document_resume_in_its_middle():
    shards = [["a\nb\nc", "d", "e\n\nf\n \ng\nh\ni"], ["j\nk"]]
    assert_resumes_everywhere(memory_source(shards), 9, packing="pad_lines", batch_rows=3, max_seq_length=4)


@pytest.mark.slow
@pytest.mark.parametrize(("process_count", "interleave_shards"), [(2, 1), (2, 2), (5, 1)])
def test_every_process_resumes(process_count, interleave_shards):
    source = memory_source(split(words(80), 4))
    for process in range(process_count):
        kwargs = {
            "process_index": process,
            "process_count": process_count,
            "interleave_shards": interleave_shards,
            "batch_rows": 1,
        }
        assert_resumes_everywhere(source, 40, **kwargs)


def test_the_state_is_small_and_holds_no_text():
    shards = split([f"document{n}" * 20 for n in range(500)], 16)
    for interleave, max_characters in ((1, 780), (16, 1080)):
        rows = rows_of(memory_source(shards), shuffle_buffer_size=400, interleave_shards=interleave)
        take(rows, 50)
        state = json.dumps(rows.state_dict())
        assert len(state) < max_characters
        assert "document0" not in state


def test_windows_of_the_first_epoch_grow():
    texts = words(60)
    rows = rows_of(
        memory_source([texts]), packing="pad", batch_rows=1, shuffle_buffer_size=20, first_shuffle_buffer_size=3
    )
    first = documents_in(take(rows, 60))
    # 3, 6, 12, 20 documents, and the rest.
    boundaries = [0, 3, 9, 21, 41, 60]
    for start, end in itertools.pairwise(boundaries):
        assert sorted(first[start:end]) == sorted(texts[start:end])
        assert first[start:end] != texts[start:end]
    assert rows.epoch == 0
    second = documents_in(take(rows, 60))
    assert sorted(second[:20]) == sorted(texts[:20])
    assert rows.epoch == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed=2, but the checkpoint was saved with 1"),
        ({"max_seq_length": 13}, "max_seq_length=13, but the checkpoint was saved with 12"),
        ({"packing": "pad"}, "packing='pad', but the checkpoint was saved with 'concatenate'"),
        ({"shuffle_buffer_size": 8}, "shuffle_buffer_size=8, but the checkpoint was saved with 7"),
        ({"first_shuffle_buffer_size": 2}, "first_shuffle_buffer_size=2, but the checkpoint was saved with 0"),
        ({"shuffle_buffer_bytes": 8}, "shuffle_buffer_bytes=8, but the checkpoint was saved with 67108864"),
        ({"shuffle_piece_bytes": 8}, "shuffle_piece_bytes=8, but the checkpoint was saved with 0"),
        ({"interleave_shards": 2}, "interleave_shards=2, but the checkpoint was saved with 1"),
        ({"process_count": 2}, "process_count=2, but the checkpoint was saved with 1"),
    ],
)
def test_a_state_of_another_order_is_refused(change, message):
    source = memory_source([words(50)])
    rows = rows_of(source)
    next(rows)
    with pytest.raises(UserError, match=message):
        resumed(source, saved(rows), **change)
    with pytest.raises(UserError, match="num_shards=2, but the checkpoint was saved with 1"):
        resumed(memory_source(split(words(50), 2)), saved(rows))


@pytest.mark.parametrize("how", PACKINGS)
def test_data_that_changed_since_the_checkpoint_is_an_error(how):
    text = "a\nb\nc\nd\ne\nf" + "g" * 99
    rows = rows_of(memory_source([[text] * 9]), packing=how, batch_rows=3)
    take(rows, 4)
    for changed in (["a"], [" "], [text] * 6 + ["inserted"] + [text] * 3):
        with pytest.raises(
            UserError, match=r"^data\.accept_changed_files=False: .* changed after the checkpoint was saved"
        ):
            next(resumed(memory_source([changed]), saved(rows), packing=how, batch_rows=3))
    with pytest.raises(UserError, match="dataset 'memory' has changed since"):
        next(resumed(memory_source([[]]), saved(rows), packing=how, batch_rows=3))


@pytest.mark.parametrize("process_count", [1, 2])
def test_a_file_that_was_edited_after_the_checkpoint(tmp_path, process_count, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(words(60)))
    source = open_source(data_files=str(path))
    rows = rows_of(source)
    take(rows, 3)
    state = saved(rows)

    def resume(**options):  # On one process, or reassigned to two.
        continued = rows_of(source, process_count=process_count, **options)
        continued.restore([state])
        return continued

    if process_count == 1:
        assert take(resume(), 5) == take(rows, 5)
    path.write_text("\n".join([*words(300, start=1000), *words(60)]))
    with pytest.raises(UserError, match=r"^data\.accept_changed_files=False: '.*a\.txt' changed after the checkpoint"):
        next(resume())
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: warnings.append(message % values))
    assert len(take(resume(accept_changed_files=True), 40)) == 40
    assert warnings == [f"{str(path)!r} changed after the checkpoint was saved; the run continues with the new text"]
    # The position of a version without hashes is used as it is.
    del state["window_hash"]
    if process_count == 1:
        next(resume())


def test_batches_are_int32_and_contiguous():
    for how in PACKINGS:
        batch = next(rows_of(memory_source([words(50)]), packing=how))
        assert (batch.shape, batch.dtype, batch.flags.c_contiguous) == ((2, 12), np.int32, True)


@pytest.mark.parametrize("num_shards", [1, 4, 7, 16])
@pytest.mark.parametrize("process_count", [1, 2, 3, 8])
@pytest.mark.parametrize(("shuffle_buffer_size", "interleave_shards"), [(0, 1), (10, 1), (10, 3)])
def test_processes_divide_an_epoch_without_overlap(process_count, num_shards, shuffle_buffer_size, interleave_shards):
    corpus = words(160)
    held_out = corpus[:6]
    source = memory_source(split([*corpus, None, " ", corpus[3]], num_shards))
    found = []
    for process in range(process_count):
        found += epoch_documents(
            source,
            shuffle_buffer_size=shuffle_buffer_size,
            interleave_shards=interleave_shards,
            held_out=pa.array(held_out),
            process_index=process,
            process_count=process_count,
        )
    assert sorted(found) == sorted(corpus[6:])


def test_processes_read_only_their_shards():
    read = []

    def columns(shard, row):
        read.append(shard)
        yield pa.array(words(30, start=30 * shard))

    source = Source("counted", "text", 6, columns, str)
    assigned = []
    for process in range(3):
        read.clear()
        epoch_documents(source, process_index=process, process_count=3)
        assigned += set(read[:2])  # Those of the next epoch follow.
    assert sorted(assigned) == list(range(6))


def test_a_window_is_the_source_in_another_order():
    corpus = words(60)
    source = memory_source([corpus])
    found = epoch_documents(source, shuffle_buffer_size=10)
    for start in range(0, 60, 10):
        assert sorted(found[start : start + 10]) == sorted(corpus[start : start + 10])
        assert found[start : start + 10] != corpus[start : start + 10]
    orders = [[corpus[s : s + 10].index(text) for text in found[s : s + 10]] for s in range(0, 60, 10)]
    assert len({tuple(order) for order in orders}) == 6  # Every window has another.
    assert found != epoch_documents(source, shuffle_buffer_size=10, seed=2)
    assert found == epoch_documents(source, shuffle_buffer_size=10)


def test_a_window_has_equal_parts_of_the_open_shards():
    """The shards have 4 to 40 documents; one that ends is replaced by the next one."""
    shards = [[f"{shard:x}{row:02}" for row in range(size)] for shard, size in enumerate([40, 4, 40, 40, 9, 40])]
    found = epoch_documents(memory_source(shards), shuffle_buffer_size=12, interleave_shards=3)
    assert sorted(found) == sorted(text for shard in shards for text in shard)
    windows = [collections.Counter(text[0] for text in found[start : start + 12]) for start in range(0, 132, 12)]
    assert all(len(window) >= 3 for window in windows[:9])
    assert sum(sorted(window.values()) == [4, 4, 4] for window in windows) >= 5
    # Documents of a shard come in order of the windows.
    for shard in shards:
        assert sorted(shard) == [
            text for w in range(0, 173, 12) for text in sorted(set(shard) & set(found[w : w + 12]))
        ]


@pytest.mark.slow
def test_large_documents_take_no_more_than_their_part_of_a_window():
    """Of 60 bytes a shard of 30-byte texts gives 2 texts or fewer, and all shards move on."""
    shards = [["a" * 30] * 20, ["b"] * 300, ["c" * 3] * 100, ["d"] * 300]
    source = memory_source(shards, array_rows=7)
    part = reader.Reader(source, [shard_assignment.ShardSlice(n) for n in range(4)], interleave_shards=4, max_bytes=60)
    cursors, taken = [], []
    while (texts := part.take(24)) is not None:
        taken.append(collections.Counter(text[0] for text in texts.to_pylist()))
        cursors.append(part.cursor)
    assert sum(taken, collections.Counter()) == {"a": 20, "b": 300, "c": 100, "d": 300}
    assert all(1 <= window["a"] <= 2 and len(window) == 4 for window in taken[:10])
    # Reading again from any position gives the same.
    for n, cursor in enumerate(cursors):
        slices = [shard_assignment.ShardSlice(n) for n in range(4)]
        again = reader.Reader(source, slices, cursor=cursor, interleave_shards=4, max_bytes=60)
        rest = [collections.Counter(text[0] for text in again.take(24).to_pylist()) for _ in taken[n + 1 :]]
        assert rest == taken[n + 1 :]
        assert again.take(24) is None


def test_every_epoch_has_its_own_order_of_windows_and_shards():
    corpus = words(40)
    rows = rows_of(memory_source(split(corpus, 8)), packing="pad", batch_rows=40, shuffle_buffer_size=5)
    epochs = [documents_in(take(rows, 1)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(corpus) for epoch in epochs)
    shard_orders = [tuple(dict.fromkeys(corpus.index(text) // 5 for text in epoch)) for epoch in epochs]
    assert len(set(shard_orders)) == 3


@pytest.mark.parametrize("size", [0, 1])
def test_no_shuffling_is_the_order_of_the_source(size):
    corpus = words(40)
    assert epoch_documents(memory_source(split(corpus, 4)), shuffle_buffer_size=size) == corpus


def test_an_incomplete_row_at_the_end_of_an_epoch_is_continued_with_the_next_epoch():
    corpus = ["abc", "de", "fghi"]
    source = memory_source([corpus])
    rows = rows_of(source, shuffle_buffer_size=0, max_seq_length=4, batch_rows=1)
    tokens = [t for text in corpus for t in [BOS, *map(ord, text), EOS]]  # 15 tokens: no multiple of 4.
    batches, epochs = [], []
    for _ in range(15):
        batches += take(rows, 1)
        epochs.append(rows.epoch)
    assert np.ravel(batches).tolist() == tokens * 4
    # The epoch is that of the row's last token.
    assert epochs == [(4 * n + 3) // 15 for n in range(15)]


def test_counters_of_documents_blank_rows_and_held_out_documents():
    corpus = [None, "", " \n\t\u3000", "held", *words(20), "held", "\u00a0"]
    source = memory_source(split(corpus, 2))
    rows = rows_of(source, packing="pad", batch_rows=5, held_out=pa.array(["held", "absent"]))
    names = ["documents", "skipped_documents", "held_out_documents", "failed_shards", "tokenizer_differences"]
    assert rows.counters == dict.fromkeys(names, 0)
    for n in range(1, 5):
        next(rows)
        assert rows.counters["documents"] == 5 * n
    assert rows.epoch == 0
    assert list(rows.counters.values()) == [20, 4, 2, 0, 0]
    take(rows, 4)
    assert rows.epoch == 1
    assert list(rows.counters.values()) == [40, 8, 4, 0, 0]


def test_blank_lines_between_documents_of_a_text_file_are_not_counted_as_skipped():
    corpus = ["", " ", None, "held", *words(20)]
    source = dataclasses.replace(memory_source(split(corpus, 2)), blank_rows_are_separators=True)
    rows = rows_of(source, packing="pad", batch_rows=5, held_out=pa.array(["held"]))
    for _ in range(4):
        next(rows)
    assert list(rows.counters.values()) == [20, 1, 1, 0, 0]


def test_backends_are_compared_on_documents_of_all_windows(monkeypatch):
    """The numbers of compared documents follow the bytes, and a resumed run counts the same."""

    class Differing(Letters):
        def __init__(self):
            self.compared = []

        def count_differences(self, texts):
            self.compared += texts.to_pylist()
            return sum(text.startswith("1") for text in texts.to_pylist())

    source = memory_source([[f"{n:07}" for n in range(20)], [f"1{n:06}" for n in range(20)]])
    options = DEFAULTS | {"shuffle_buffer_size": 10, "max_seq_length": 9, "batch_rows": 5, "seed": 3}
    for every_bytes, num_compared in [(35, 8), (70, 4), (140, 2), (1 << 30, 1)]:
        monkeypatch.setattr(stream, "_COMPARED_EVERY_BYTES", every_bytes)
        tokenizer = Differing()
        rows = stream.RowStream(source, tokenizer, **options)
        states = [saved(rows)]
        for _ in range(8):
            next(rows)
            states.append(saved(rows))
        assert rows.epoch == 0
        assert len(set(tokenizer.compared)) == len(tokenizer.compared) == num_compared
        assert rows.counters["tokenizer_differences"] == sum(text[0] == "1" for text in tokenizer.compared)
        for n, state in enumerate(states[:-1]):
            again = stream.RowStream(source, Differing(), **options)
            again.restore([state])
            take(again, 8 - n)
            assert again.counters == rows.counters


@pytest.mark.parametrize("how", PACKINGS)
def test_rows_do_not_depend_on_the_sizes_of_arrays_and_chunks(how, monkeypatch):
    shards = split(words(70), 3)
    options = [{"packing": how, "interleave_shards": interleave} for interleave in (1, 2)]
    expected = [take(rows_of(memory_source(shards), **option), 30) for option in options]
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 1)
    assert [take(rows_of(memory_source(shards, array_rows=100), **option), 30) for option in options] == expected


@pytest.mark.slow
@pytest.mark.parametrize("how", ["concatenate", "pad", "pad_lines"])
def test_windows_of_large_documents_end_early(how):
    corpus = [word * (30 if n % 4 == 0 else 1) for n, word in enumerate(words(40))]
    for array_rows, interleave in ((1, 1), (100, 2)):
        source = memory_source(split(corpus, 3), array_rows)
        num_batches = 130 if how in packing.CONCATENATING else 30
        options = {"shuffle_buffer_bytes": 40, "interleave_shards": interleave}
        assert_resumes_everywhere(source, num_batches, packing=how, batch_rows=3, **options)
        found = epoch_documents(source, max_seq_length=400, **options)
        assert sorted(found) == sorted(corpus)
    texts = reader.Reader(source, [shard_assignment.ShardSlice(n) for n in range(3)], max_bytes=40).take(1000)
    assert sum(map(len, texts.to_pylist()[:-1])) < 40


@pytest.mark.slow
def test_documents_of_ten_megabytes_and_of_one_letter():
    corpus = ["x" * (10 << 20), "y", "z" * 3, "u"]
    source = Source("large", "text", 1, lambda shard, row: iter([pa.array(corpus[row:])]), str)
    rows = rows_of(source, shuffle_buffer_size=0, max_seq_length=1024, batch_rows=1024)

    class Bytes(Letters):
        def encode(self, texts):
            return np.frombuffer(texts.buffers()[2], np.uint8).astype(np.int32), np.array(
                np.frombuffer(texts.buffers()[1], np.int64)[: len(texts) + 1]
            )

    rows._tokenizer = Bytes()
    tokens = np.concatenate([next(rows).ravel() for _ in range(11)])
    tail = [t for text in corpus[1:] for t in [BOS, *map(ord, text), EOS]]
    assert tokens[: 1 + (10 << 20)].tolist() == [BOS] + [ord("x")] * (10 << 20)
    assert tokens[1 + (10 << 20) :][: 1 + len(tail)].tolist() == [EOS, *tail]


def test_a_data_set_that_is_too_small_or_empty_is_an_error():
    source = memory_source([["abc", "d", None]])
    with pytest.raises(UserError, match=r"an epoch has only 2 sequences of 4 tokens, and a batch needs 3 "):
        next(rows_of(source, max_seq_length=4, batch_rows=3))
    with pytest.raises(UserError, match=r"1 sequences of 4 tokens for process 1 of 2, and a batch needs 2 "):
        next(rows_of(source, max_seq_length=4, batch_rows=2, packing="pad", process_index=1, process_count=2))
    with pytest.raises(UserError, match=r"has no documents to train on \(1 blank rows, 2 held-out documents\)"):
        next(rows_of(source, held_out=pa.array(["d", "abc"])))
    with pytest.raises(UserError, match="'memory': has no documents"):
        next(rows_of(memory_source([[]])))


def test_a_data_set_with_exactly_one_batch_per_epoch_is_enough():
    rows = rows_of(memory_source([["abc", "d"]]), max_seq_length=4, batch_rows=2, shuffle_buffer_size=0)
    take(rows, 20)
    assert rows.epoch == 19


TEXTS = st.one_of(st.none(), st.text(st.sampled_from("ab \n"), max_size=12))


@pytest.mark.slow
@hypothesis.settings(max_examples=120, deadline=None, derandomize=True)
@hypothesis.given(
    shards=st.lists(st.lists(TEXTS, max_size=12), min_size=1, max_size=5),
    array_rows=st.integers(1, 5),
    how=st.sampled_from(PACKINGS),
    shuffle_buffer_size=st.integers(0, 9),
    first_shuffle_buffer_size=st.sampled_from([0, 2]),
    shuffle_buffer_bytes=st.sampled_from([9, 1 << 20]),
    shuffle_piece_bytes=st.sampled_from([0, 8]),
    interleave_shards=st.integers(1, 4),
    batch_rows=st.integers(1, 3),
    process_count=st.integers(1, 4),
    kills=st.lists(st.integers(0, 6), max_size=4),
    data=st.data(),
)
def test_restarts_after_any_batches_change_nothing(
    shards,
    array_rows,
    how,
    shuffle_buffer_size,
    first_shuffle_buffer_size,
    shuffle_buffer_bytes,
    shuffle_piece_bytes,
    interleave_shards,
    batch_rows,
    process_count,
    kills,
    data,
):
    """`kills` are numbers of batches between restarts."""
    source = memory_source(shards, array_rows)
    kwargs = {
        "seed": data.draw(st.integers(0, 3)),
        "packing": how,
        "max_seq_length": 4,
        "shuffle_buffer_size": shuffle_buffer_size,
        "first_shuffle_buffer_size": first_shuffle_buffer_size,
        "shuffle_buffer_bytes": shuffle_buffer_bytes,
        "shuffle_piece_bytes": shuffle_piece_bytes,
        "interleave_shards": interleave_shards,
        "batch_rows": batch_rows,
        "held_out": pa.array(["a", "ab"]),
        "process_index": data.draw(st.integers(0, process_count - 1)),
        "process_count": process_count,
    }
    straight = rows_of(source, **kwargs)
    try:
        expected = take(straight, sum(kills) + 3)
    except UserError:
        hypothesis.reject()
    rows, found = rows_of(source, **kwargs), []
    for kill in kills:
        found += take(rows, kill)
        rows = resumed(source, saved(rows), **kwargs)
    found += take(rows, 3)
    assert found == expected
    assert rows.counters == straight.counters
    assert saved(rows) == saved(straight)
