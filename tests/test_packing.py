import numpy as np
import pyarrow as pa
import pytest

from mlm.data import packing
from mlm.settings import PACKINGS
from tests.letters import Letters


def pack(texts, how, length=5):
    return packing.pack(pa.array(texts, pa.large_string()), Letters(), packing=how, max_seq_length=length)


def a(text):
    return [ord(letter) for letter in text]


def test_concatenate_adds_begin_and_end_tokens():
    chunk = pack(["abc", "d", "", "ef"], "concatenate")
    assert chunk.data.tolist() == [1, *a("abc"), 2, 1, *a("d"), 2, 1, 2, 1, *a("ef"), 2]
    assert chunk.offsets.tolist() == [0, 5, 8, 10, 14]
    assert chunk.data.dtype == np.int32


def test_isolate_gives_the_units_of_concatenate():
    texts = ["abc", "d", "", "ef"]
    assert pack(texts, "isolate").data.tolist() == pack(texts, "concatenate").data.tolist()
    assert pack(texts, "isolate").offsets.tolist() == pack(texts, "concatenate").offsets.tolist()


def test_pad_truncates_and_fills():
    chunk = pack(["abcdef", "abc", "a", ""], "pad")
    assert chunk.data.tolist() == [
        [1, *a("abc"), 2],
        [1, *a("abc"), 2],
        [1, *a("a"), 2, 0, 0],
        [1, 2, 0, 0, 0],
    ]
    assert chunk.offsets.tolist() == [0, 1, 2, 3, 4]
    assert chunk.data.dtype == np.int32


def test_pad_lines_drops_blank_lines():
    chunk = pack(["a\n\nbc\r\n", "d", "\n \n", " e\n"], "pad_lines")
    expected = [[1, *a("a"), 2, 0, 0], [1, *a("bc"), 2, 0], [1, *a("d"), 2, 0, 0], [1, *a(" e"), 2, 0]]
    assert chunk.data.tolist() == expected
    assert chunk.offsets.tolist() == [0, 2, 3, 3, 4]


def test_pad_lines_of_a_sliced_array():
    texts = pa.array(["x\ny", "a\nb", "c"], pa.large_string()).slice(1)
    chunk = packing.pack(texts, Letters(), packing="pad_lines", max_seq_length=4)
    assert chunk.data[:, 1].tolist() == a("abc")
    assert chunk.offsets.tolist() == [0, 2, 3]


@pytest.mark.parametrize("how", PACKINGS)
def test_no_documents_are_no_units(how):
    chunk = pack([], how)
    assert len(chunk.data) == 0
    assert chunk.offsets.tolist() == [0]


def test_units_per_row():
    assert [packing.units_per_row(how, max_seq_length=7) for how in PACKINGS] == [7, 1, 1, 7, 1]
