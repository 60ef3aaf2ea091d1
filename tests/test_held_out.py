import numpy as np
import pytest

from mlm.data import held_out
from mlm.errors import UserError
from tests.letters import Letters
from tests.test_stream import BOS, EOS, documents_in, memory_source, rows_of, split, take, words


def read(source, num_sequences, **kwargs):
    kwargs = {"max_seq_length": 6, "packing": "concatenate"} | kwargs
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


def test_documents_after_the_last_eval_sequence_are_not_held_out():
    found = read(memory_source([["abcd", "efgh", "ijkl"]]), 2)
    assert found.documents.to_pylist() == ["abcd", "efgh"]


def test_eval_sequences_do_not_depend_on_the_size_of_reads(monkeypatch):
    monkeypatch.setattr(held_out, "_DOCUMENTS_PER_READ", 4)
    source = memory_source(split(words(100), 5))
    many = read(source, 40)
    monkeypatch.setattr(held_out, "_DOCUMENTS_PER_READ", 1000)
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


def test_held_out_documents_are_in_no_epoch():
    corpus = words(60)
    source = memory_source(split(corpus + corpus[:9], 4))
    held_out = read(source, 5)
    rows = rows_of(source, packing="pad", held_out=held_out.documents)
    seen = set(documents_in(take(rows, 100)))
    assert rows.epoch >= 2
    assert seen == set(corpus) - set(held_out.documents.to_pylist())
