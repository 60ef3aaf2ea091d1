import numpy as np
import pyarrow as pa
import pytest

from mlm.data import packing
from tests.letters import Letters


def pack(texts, how, length=5):
    return packing.pack(pa.array(texts, pa.large_string()), Letters(), packing=how, max_seq_length=length)


def a(text):
    return [ord(letter) for letter in text]


def test_concatenate():
    units = pack(["abc", "d", "", "ef"], "concatenate")
    assert units.data.tolist() == [1, *a("abc"), 2, 1, *a("d"), 2, 1, 2, 1, *a("ef"), 2]
    assert units.offsets.tolist() == [0, 5, 8, 10, 14]
    assert units.data.dtype == np.int32


def test_isolate_gives_the_units_of_concatenate():
    texts = ["abc", "d", "", "ef"]
    assert pack(texts, "isolate").data.tolist() == pack(texts, "concatenate").data.tolist()
    assert pack(texts, "isolate").offsets.tolist() == pack(texts, "concatenate").offsets.tolist()


def test_pad_cuts_and_fills():
    units = pack(["abcdef", "abc", "a", ""], "pad")
    assert units.data.tolist() == [
        [1, *a("abc"), 2],
        [1, *a("abc"), 2],
        [1, *a("a"), 2, 0, 0],
        [1, 2, 0, 0, 0],
    ]
    assert units.offsets.tolist() == [0, 1, 2, 3, 4]
    assert units.data.dtype == np.int32


def test_pad_lines_drops_blank_lines():
    units = pack(["a\n\nbc\r\n", "d", "\n \n", " e\n"], "pad_lines")
    expected = [[1, *a("a"), 2, 0, 0], [1, *a("bc"), 2, 0], [1, *a("d"), 2, 0, 0], [1, *a(" e"), 2, 0]]
    assert units.data.tolist() == expected
    assert units.offsets.tolist() == [0, 2, 3, 3, 4]


def test_pad_lines_of_a_part_of_an_array():
    texts = pa.array(["x\ny", "a\nb", "c"], pa.large_string()).slice(1)
    units = packing.pack(texts, Letters(), packing="pad_lines", max_seq_length=4)
    assert units.data[:, 1].tolist() == a("abc")
    assert units.offsets.tolist() == [0, 2, 3]


@pytest.mark.parametrize("how", packing.PACKINGS)
def test_no_documents(how):
    units = pack([], how)
    assert len(units.data) == 0
    assert units.offsets.tolist() == [0]


def test_units_per_row():
    assert [packing.units_per_row(how, max_seq_length=7) for how in packing.PACKINGS] == [7, 1, 1, 7]
