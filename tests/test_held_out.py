import numpy as np
import pytest

from mlm.data import held_out
from mlm.errors import UserError
from tests.letters import Letters
from tests.test_stream import BOS, EOS, documents_in, memory_source, rows_of, split, take, words


def head(source, num_rows, **kwargs):
    kwargs = {"max_seq_length": 6, "packing": "concatenate"} | kwargs
    return held_out.read_eval_rows(source, Letters(), num_rows=num_rows, **kwargs)


def test_eval_rows_are_the_head_of_the_source():
    corpus = ["abc", None, "de", " ", "abc", "fghi", "j", "klm"]
    source = memory_source(split(corpus, 3))
    found = head(source, 3)
    tokens = [t for text in corpus if text and text.strip() for t in [BOS, *map(ord, text), EOS]]
    assert found.rows.tolist() == np.reshape(tokens[:18], (3, 6)).tolist()
    assert found.rows.dtype == np.int32
    # "fghi" is in the rows with its first letters; "abc" twice.
    assert found.documents.to_pylist() == ["abc", "de", "fghi"]
    assert head(source, 2, packing="pad").documents.to_pylist() == ["abc", "de"]
    lines = head(memory_source([["a\nb\nc", "d"]]), 2, packing="pad_lines")
    assert lines.documents.to_pylist() == ["a\nb\nc"]
    assert lines.rows[:, 1].tolist() == [ord("a"), ord("b")]


def test_eval_rows_end_where_a_document_does():
    found = head(memory_source([["abcd", "efgh", "ijkl"]]), 2)
    assert found.documents.to_pylist() == ["abcd", "efgh"]


def test_eval_rows_over_many_reads(monkeypatch):
    monkeypatch.setattr(held_out, "_DOCUMENTS_AT_ONCE", 4)
    source = memory_source(split(words(100), 5))
    many = head(source, 40)
    monkeypatch.setattr(held_out, "_DOCUMENTS_AT_ONCE", 1000)
    once = head(source, 40)
    assert many.rows.tolist() == once.rows.tolist()
    assert many.documents.to_pylist() == once.documents.to_pylist()


def test_no_eval_rows():
    found = head(memory_source([["abc"]]), 0)
    assert found.rows.shape == (0, 6)
    assert len(found.documents) == 0


def test_too_few_eval_rows_are_told():
    with pytest.raises(UserError, match="'memory' has 1 rows of 6 tokens, fewer than the 2 to evaluate on"):
        head(memory_source([["abc", "de"]]), 2)
    with pytest.raises(UserError, match="has 0 rows of 6 tokens"):
        head(memory_source([[None]]), 1)


def test_fewer_eval_rows_where_that_is_allowed():
    source = memory_source([["abc", "de"]])  # 9 tokens: one row of 6, and a part row that is left out
    found = head(source, 2, allow_fewer=True)
    assert found.rows.tolist() == head(source, 1).rows.tolist()
    assert found.documents.to_pylist() == ["abc", "de"]
    assert head(source, 2, packing="pad", allow_fewer=True).rows.shape == (2, 6)
    with pytest.raises(UserError, match="has 0 rows of 6 tokens"):
        head(memory_source([["a"]]), 1, allow_fewer=True)


def test_held_out_documents_never_come_in_any_epoch():
    corpus = words(60)
    source = memory_source(split(corpus + corpus[:9], 4))
    held_out = head(source, 5)
    rows = rows_of(source, packing="pad", held_out=held_out.documents)
    seen = set(documents_in(take(rows, 100)))
    assert rows.epoch >= 2
    assert seen == set(corpus) - set(held_out.documents.to_pylist())
