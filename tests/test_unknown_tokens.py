"""A tokenizer that does not know the language of the text."""

import dataclasses

import numpy as np
import pytest
from absl import logging

from mlm.data import pipeline
from mlm.data.train_tokenizer import train_tokenizer
from mlm.errors import UserError
from tests.tiny import sentences, settings_of, tiny_config

ETHIOPIC = "ሰላም ለዓለም ሁሉ ይሁን ዛሬም ነገም"


@pytest.fixture(scope="module")
def english():
    tokenizer = train_tokenizer(
        sentences(200), vocab_size=300, max_seq_length=16, algorithm="wordpiece", model_type="bert", lowercase=False
    )
    tokenizer.name = "english"
    return tokenizer


def open_text(tokenizer, documents, path, **changes):
    path.write_text("\n".join(documents))
    data = settings_of(tiny_config(str(path))).data
    data = dataclasses.replace(data, num_eval_samples=10, packing="pad", **changes)
    return pipeline.open_text(data, pipeline.open_sources(data), tokenizer, seed=0)


def test_another_script_is_refused(english, tmp_path):
    documents = [f"cat {ETHIOPIC}" for _ in range(20)]
    with pytest.raises(
        UserError,
        match=r"^data\.max_unknown_fraction=0\.5: 85\.7% of the evaluation sequences' tokens are unknown to the "
        r"tokenizer 'english', such as 'ሰላም', 'ለዓለም', 'ሁሉ'; choose a tokenizer for the language, or train one$",
    ):
        open_text(english, documents, tmp_path / "a.txt")
    assert len(open_text(english, documents, tmp_path / "a.txt", max_unknown_fraction=0.9).eval_rows_RxL) == 10


def test_nothing_to_predict_is_refused_in_any_case(english, tmp_path):
    with pytest.raises(UserError, match=r"^the tokenizer 'english': the evaluation sequences have unknown and special"):
        open_text(english, [ETHIOPIC] * 20, tmp_path / "a.txt", max_unknown_fraction=1.0)


def test_some_unknown_words_are_a_warning(english, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: warnings.append(message % values))
    open_text(english, ["the cat sees the dog"] * 19 + ["ሰላም"], tmp_path / "a.txt")
    assert warnings == []
    open_text(english, ["the cat sees ሰላም"] * 20, tmp_path / "a.txt")
    assert warnings == [
        "25.0 % of the evaluation sequences' tokens are unknown to the tokenizer english, such as 'ሰላም'"
    ]


def test_unknown_fraction_counts_text_only(english):
    unknown, cat = english.hf.unk_token_id, english.hf.convert_tokens_to_ids("cat")
    rows = np.array([[english.bos_id, unknown, cat, english.eos_id], [english.pad_id] * 4])
    assert english.unknown_fraction(rows) == 0.5
    assert english.unknown_fraction(rows[1:]) == 0.0
