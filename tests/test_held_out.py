import dataclasses

import numpy as np
import pytest

from mlm.data import held_out, spread
from mlm.data.packing import CONCATENATING
from mlm.data.sources.retry import RetryPolicy
from mlm.errors import UserError
from mlm.settings import EVAL_ROWS, PACKINGS
from tests.letters import Letters
from tests.test_stream import BOS, EOS, documents_in, memory_source, rows_of, split, take, words


def read(source, num_sequences, **kwargs):
    kwargs = {"max_seq_length": 6, "packing": "concatenate", "eval_rows": "first"} | kwargs
    return held_out.read_eval_set(source, Letters(), num_sequences=num_sequences, **kwargs)


def test_eval_sequences_are_the_first_of_the_source():
    corpus = ["abc", None, "de", " ", "abc", "fghi", "j", "klm"]
    source = memory_source(split(corpus, 3))
    found = read(source, 3)
    tokens = [t for text in corpus if text and text.strip() for t in [BOS, *map(ord, text), EOS]]
    assert found.sequences.tolist() == np.reshape(tokens[:18], (3, 6)).tolist()
    assert found.sequences.dtype == np.int32
    # "fghi" is in the sequences with its first letters; "abc" twice.
    assert found.documents.to_pylist() == ["abc", "de", "fghi"]
    assert read(source, 2, packing="pad").documents.to_pylist() == ["abc", "de"]
    lines = read(memory_source([["a\nb\nc", "d"]]), 2, packing="pad_lines")
    assert lines.documents.to_pylist() == ["a\nb\nc"]
    assert lines.sequences[:, 1].tolist() == [ord("a"), ord("b")]


def test_spread_eval_sequences_come_from_evenly_spaced_shards():
    # Shard n has documents n.0, n.1, ...
    source = memory_source([[f"{n}.{row}" for row in range(9)] for n in range(200)])
    options = {"packing": "pad", "eval_rows": "spread"}
    assert read(source, 4, **options).documents.to_pylist() == ["24.0", "72.0", "124.0", "172.0"]
    assert read(source, 50, **options).documents.to_pylist() == [f"{n}.0" for n in range(0, 200, 4)]
    assert sorted(read(source, 100, **options).documents.to_pylist(), key=float) == [
        f"{n}.{row}" for n in range(0, 200, 4) for row in range(2)
    ]
    # More than 50 shards have: the shards beside them give the rest.
    found = read(source, 9 * 50 + 100, **options).documents.to_pylist()
    assert len(set(found)) == len(found) == 550
    assert found[450:452] == ["1.0", "1.1"]
    assert {text.split(".")[0] for text in found[450:]} == {str(n) for n in range(1, 200, 4)}
    # Rows of concatenated documents do not cross shards; the last document of each is cut.
    found = read(memory_source([["abc", "de", "fg"], ["hij", "kl"]]), 2, eval_rows="spread")
    assert found.documents.to_pylist() == ["abc", "de", "hij", "kl"]
    assert found.sequences[:, 1].tolist() == [ord("a"), ord("h")]


@pytest.mark.parametrize("how", [how for how in PACKINGS if how != "best_fit"])  # See test_best_fit.py.
def test_spread_eval_sequences_use_every_document_once_if_need_be(how, monkeypatch):
    monkeypatch.setattr(spread, "_MAX_SHARDS", 3)
    monkeypatch.setattr(spread, "_DOCUMENTS_PER_READ", 4)
    shards = [
        words(2),
        [],
        [None, " "],
        words(30, start=100),
        words(1, start=200),
        words(7, start=300),
        words(20, start=400),
    ]
    source = memory_source(shards)
    texts = [text for shard in shards for text in shard if text and text.strip()]
    total = sum(len(text) + 2 for text in texts) // 6 if how in CONCATENATING else len(texts)
    for count in (1, 2, 5, total // 2, total - 1, total):
        found = read(source, count, packing=how, eval_rows="spread")
        assert len(found.sequences) == count
        assert found.documents.to_pylist() == list(dict.fromkeys(found.documents.to_pylist()))
        # A source over a network is read by several threads.
        parallel = dataclasses.replace(source, retry_policy=RetryPolicy())
        assert read(parallel, count, packing=how, eval_rows="spread").sequences.tolist() == found.sequences.tolist()
    assert set(found.documents.to_pylist()) == set(texts)
    with pytest.raises(UserError, match=f"has only {total} sequences"):
        read(source, total + 1, packing=how, eval_rows="spread")


def test_one_shard_gives_its_first_sequences_in_both_ways():
    source = memory_source([words(300)])
    assert read(source, 90).sequences.tolist() == read(source, 90, eval_rows="spread").sequences.tolist()


def test_documents_after_the_last_eval_sequence_are_not_held_out():
    found = read(memory_source([["abcd", "efgh", "ijkl"]]), 2)
    assert found.documents.to_pylist() == ["abcd", "efgh"]


def test_eval_sequences_do_not_depend_on_the_size_of_reads(monkeypatch):
    monkeypatch.setattr(spread, "_DOCUMENTS_PER_READ", 4)
    source = memory_source(split(words(100), 5))
    many = read(source, 40)
    monkeypatch.setattr(spread, "_DOCUMENTS_PER_READ", 1000)
    once = read(source, 40)
    assert many.sequences.tolist() == once.sequences.tolist()
    assert many.documents.to_pylist() == once.documents.to_pylist()


def test_no_eval_sequences():
    found = read(memory_source([["abc"]]), 0)
    assert found.sequences.shape == (0, 6)
    assert len(found.documents) == 0


def test_too_few_eval_sequences_are_an_error():
    with pytest.raises(
        UserError, match=r"data\.num_eval_samples=2: the dataset 'memory' has only 1 sequences of 6 tokens"
    ):
        read(memory_source([["abc", "de"]]), 2)
    with pytest.raises(UserError, match="has only 0 sequences of 6 tokens"):
        read(memory_source([[None]]), 1)


def test_fewer_eval_sequences_are_accepted_with_allow_fewer():
    source = memory_source([["abc", "de"]])  # 9 tokens: one sequence of 6, and an incomplete one that is dropped.
    found = read(source, 2, allow_fewer=True)
    assert found.sequences.tolist() == read(source, 1).sequences.tolist()
    assert found.documents.to_pylist() == ["abc", "de"]
    assert read(source, 2, packing="pad", allow_fewer=True).sequences.shape == (2, 6)
    with pytest.raises(UserError, match="has only 0 sequences of 6 tokens"):
        read(memory_source([["a"]]), 1, allow_fewer=True)


@pytest.mark.parametrize("eval_rows", EVAL_ROWS)
def test_held_out_documents_are_in_no_epoch(eval_rows):
    corpus = words(60)
    source = memory_source(split(corpus + corpus[:9], 4))
    held_out = read(source, 5, eval_rows=eval_rows)
    rows = rows_of(source, packing="pad", held_out=held_out.documents)
    seen = set(documents_in(take(rows, 100)))
    assert rows.epoch >= 2
    assert seen == set(corpus) - set(held_out.documents.to_pylist())
