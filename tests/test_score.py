"""Pseudo-log-likelihoods equal a plain loop; minimal pairs; vectors of texts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from mlm.downstream import tokens
from mlm.downstream.features import encode_texts, extract
from mlm.downstream.score import Scores, _masks, compare_pairs, format_pairs, score
from mlm.errors import UserError
from mlm.models.encoder import MaskedLM
from mlm.modes import embed
from mlm.modes import score as mode
from tests.test_probe import make_model, save

TEXTS = ["the unbelievable cat sees the dog", "cat", "unbelievable unbelievable", "the dog sees the bird " * 6]


@pytest.fixture(scope="module")
def model():
    return make_model()


def plain_loop(model, text):
    """(PLL, PLL-word-l2r), one masked sentence at a time."""
    backend = model.tokenizer.hf.backend_tokenizer
    encoding = backend.encode(text)
    ids, words = [*encoding.ids[:19], 3] if len(encoding.ids) > 20 else encoding.ids, encoding.word_ids
    apply = jax.jit(MaskedLM(model.encoder).apply)
    total = [0.0, 0.0]
    for position in range(1, len(ids) - 1):
        for number in (0, 1):
            masked = list(ids)
            for other in range(position, len(ids) - 1):
                if other == position or (number == 1 and words[other] == words[position]):
                    masked[other] = 4
            logits = apply({"params": model.params}, jnp.array([masked]))
            total[number] += float(jax.nn.log_softmax(logits[0, position])[ids[position]])
    return total


@pytest.mark.slow
def test_scores_equal_a_plain_loop(model, monkeypatch):
    assert model.tokenizer.mask_id == 4
    monkeypatch.setattr(tokens, "_BATCH_TOKENS", 64)
    scores = score(model, TEXTS)
    expected = np.array([plain_loop(model, text) for text in TEXTS])
    np.testing.assert_allclose(scores.pll, expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(scores.pll_word_l2r, expected[:, 1], atol=1e-5)
    assert scores.tokens.tolist() == [8, 1, 6, 18]
    assert scores.num_truncated == 1
    assert scores.pll[1] == scores.pll_word_l2r[1]
    assert abs(scores.pll[2] - scores.pll_word_l2r[2]) > 1e-4
    pll, _ = scores.perplexities()
    assert pll == pytest.approx(np.exp(-expected[:, 0].sum() / 33))


def test_the_last_token_of_a_word_is_masked_once_for_both_scores():
    assert list(_masks([None, 0, 1, 1, 2, None])) == [
        ([1], True, True),
        ([2], True, False),
        ([2, 3], False, True),
        ([3], True, True),
        ([4], True, True),
    ]


def test_ties_are_wrong():
    good = Scores(np.array([-1.0, -2.0, -3.0]), np.array([-1.0, -2.0, -3.0]), np.ones(3, int), 0)
    bad = Scores(np.array([-1.0, -2.5, -2.5]), np.array([-1.5, -2.0 + 1e-6, -3.5]), np.ones(3, int), 0)
    results = compare_pairs(good, bad, ["b", "a", "a"])
    assert [(r.phenomenon, r.pairs, r.pll_accuracy, r.ties) for r in results] == [
        ("a", 2, 0.5, 0),
        ("b", 1, 0.0, 1),
        ("all pairs", 3, pytest.approx(1 / 3), 1),
    ]
    assert results[0].pll_word_l2r_accuracy == 0.5
    assert format_pairs(results).splitlines()[1].split() == ["a", "2", "50.0", "50.0", "0"]


def test_a_model_of_constant_logits_gets_no_pair_right(model):
    constant = make_model()
    head = dict(constant.params["head"])
    head["norm"] = jax.tree.map(np.zeros_like, head["norm"])
    constant.params["head"] = head
    good, bad = score(constant, ["the cat sees", "the dog"]), score(constant, ["the dog sees", "the cat"])
    result = compare_pairs(good, bad, ["x", "x"])[-1]
    assert (result.pll_accuracy, result.pll_word_l2r_accuracy, result.ties) == (0.0, 0.0, 2)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "model", model)


@pytest.mark.slow
def test_the_mode_prints_a_table_or_a_perplexity(directory, model, tmp_path, capsys):
    pairs = [{"good": "the cat sees", "bad": "cat the sees", "phenomenon": name} for name in ("order", "other")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    mode.run(None, None, model=directory, arguments=[str(tmp_path / "pairs.jsonl")], output=str(tmp_path / "out.jsonl"))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["order", "other", "all"]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written[0]["good_pll"] == pytest.approx(score(model, ["the cat sees"]).pll[0], abs=1e-5)

    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    mode.run(None, None, model=directory, arguments=[str(tmp_path / "texts.txt")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 texts, 33 tokens"
    assert float(lines[1].split()[1]) == pytest.approx(score(model, TEXTS).perplexities()[0], abs=1e-3)
    assert lines[2] == "1 texts were cut to 20 tokens"


@pytest.mark.slow
def test_vectors_of_texts(directory, model, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    expected = extract(model, encode_texts(model.tokenizer, TEXTS, max_length=20))
    call = {"model": directory, "arguments": [str(tmp_path / "texts.txt")]}
    embed.run(None, None, output=str(tmp_path / "v.npy"), layer=1, **call)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected[1], atol=1e-5)
    embed.run(None, None, output=str(tmp_path / "v.parquet"), **call)
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet")
    assert table["text"].to_pylist() == [text.strip() for text in TEXTS]
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), expected[-1], atol=1e-5)
    with pytest.raises(UserError, match="--layer=3: the model has layers 1 to 2, and 0 for the embeddings; choose one"):
        embed.run(None, None, output=str(tmp_path / "v.npy"), layer=3, **call)


def test_wrong_files_and_outputs(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "empty.jsonl").write_text('{"good": "a", "bad": " "}\n')
    (tmp_path / "texts.txt").write_text("the cat\n")
    odd, empty, texts = (str(tmp_path / name) for name in ("odd.jsonl", "empty.jsonl", "texts.txt"))

    def message(run, **options):
        with pytest.raises(UserError) as error:
            run(None, None, model="none", **options)
        return str(error.value)

    assert message(mode.run, arguments=[]) == "--mode=score: needs one file, not 0; name it after the flags"
    assert (
        message(mode.run, arguments=[odd])
        == f"{odd}: needs a column text, or good and bad; it has only body; rename them"
    )
    assert message(mode.run, arguments=[empty]).startswith(
        f"{empty}: column 'bad' has 1 empty texts, the first in row 1"
    )
    assert message(mode.run, arguments=[texts], output="a.csv") == "--output=a.csv: must end in .jsonl"
    assert message(mode.run, arguments=[texts], output=f"{odd}/a.jsonl").endswith(
        "cannot be written there; name a file in a directory that exists"
    )
    assert (
        message(embed.run, arguments=[odd], output="v.npy")
        == f"{odd}: has no column text, only body; name the column text"
    )
    assert message(embed.run, arguments=[texts], output="v.txt") == "--output=v.txt: must end in .npy or .parquet"
