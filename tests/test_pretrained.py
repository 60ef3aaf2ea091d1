"""Warm starts: files as others write them, other vocabularies, longer rows, no head."""

import json
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mlm import build
from mlm.errors import UserError
from mlm.models.encoder import MaskedLM
from mlm.models.hf import pretrained, weights
from mlm.models.hf.tensor_names import TENSOR_NAMES
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.test_families import CASES, load
from tests.tiny import settings_of, tiny_config, write_corpus

SPECIAL = ["<s>", "<unk>", "</s>", "<pad>", "<mask>"]  # Padding is 3, as in the golden files.


def words(*numbers):
    """A vocabulary of special tokens and the given words, in that order."""
    return {token: i for i, token in enumerate([*SPECIAL, *(f"word{number}" for number in numbers)])}


def write(path, case, *, tensors=None, file="model.safetensors", vocabulary=None, **fields):
    """A model directory with a golden file's config and tensors, or others."""
    golden, _, golden_tensors = load(case)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(json.loads(str(golden["config"])) | fields))
    if file:
        safetensors.numpy.save_file(golden_tensors if tensors is None else tensors, path / file)
    if vocabulary:
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>"
        ).save_pretrained(path)
    return str(path)


def start(path, *, vocabulary=None, **overrides):
    """Opens and fits: the tensors in our names' order, and the config."""
    checkpoint = pretrained.open_checkpoint(path, cache_dir=None)
    config = checkpoint.config.replace(**overrides)
    return pretrained.fit(checkpoint, config, vocabulary=vocabulary or words(*range(56)))


def never():
    raise AssertionError("no new model is needed")


def assert_same(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, actual, wanted)


@pytest.mark.parametrize("case", CASES)
def test_every_family_starts_from_what_transformers_saves(case, tmp_path):
    _, config, tensors = load(case)
    found = start(write(tmp_path / "model", case))
    assert found.config == config
    assert_same(found.params(never), weights.from_hf(tensors, config))


def fresh_params(config):
    shapes = jax.eval_shape(lambda: MaskedLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 7, np.float32), shapes["params"])


@pytest.mark.parametrize("case", CASES)
def test_a_plain_encoder_gets_a_new_head(case, tmp_path, caplog):
    """As `BertModel(...).save_pretrained` has it: no prefix, no head, and a pooler."""
    _, config, tensors = load(case)
    base = TENSOR_NAMES[config.model_type].base
    plain = {name.removeprefix(base): tensor for name, tensor in tensors.items() if name.startswith(base)}
    assert 0 < len(plain) < len(tensors)
    plain["pooler.dense.weight"] = np.zeros((24, 24), np.float32)
    with caplog.at_level("INFO"):
        found = start(write(tmp_path / "model", case, tensors=plain))
    wanted = weights.from_hf(tensors, config)
    assert_same(found.params(lambda: fresh_params(config)), wanted | {"head": fresh_params(config)["head"]})
    assert "has no head for masked language modelling" in caplog.text
    assert f"left out: {base}pooler.dense.weight" in caplog.text


def test_shapes_can_be_had_without_computing(tmp_path):
    """What a restored run asks for."""
    _, config, tensors = load("bert")
    plain = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    found = start(write(tmp_path / "model", "bert", tensors=plain))
    init = jax.jit(lambda: MaskedLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    shapes = jax.eval_shape(lambda: found.params(init))
    assert jax.tree.structure(shapes) == jax.tree.structure(weights.from_hf(tensors, config))


def test_another_head_is_left_out(tmp_path, caplog):
    _, _, tensors = load("bert")
    other = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    other |= {"classifier.weight": np.zeros((2, 24), np.float32), "classifier.bias": np.zeros(2, np.float32)}
    with caplog.at_level("INFO"):
        found = start(write(tmp_path / "model", "bert", tensors=other))
    assert not found.has_head
    assert "left out: classifier.bias, classifier.weight" in caplog.text


def test_half_a_head_is_listed(tmp_path):
    tensors = load("bert")[2] | {"classifier.weight": np.zeros((2, 24), np.float32)}
    del tensors["cls.predictions.bias"]
    path = write(tmp_path / "model", "bert", tensors=tensors)
    with pytest.raises(UserError, match=r"missing: cls\.predictions\.bias; unexpected: classifier\.weight$"):
        start(path)


def test_names_that_come_from_tensorflow(tmp_path):
    """google-bert/bert-base-uncased has its norms' gamma and beta, and a head that predicts the next sentence."""
    _, config, tensors = load("bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old |= {"cls.seq_relationship.weight": np.zeros((2, 24), np.float32), "bert.pooler.dense.bias": np.zeros(24)}
    assert old.keys() - tensors.keys() != set()
    assert_same(start(write(tmp_path / "model", "bert", tensors=old)).params(never), weights.from_hf(tensors, config))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_taken_as_float32(dtype, tmp_path):
    _, config, tensors = load("roformer")  # With a constant among its tensors.
    half = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    params = start(write(tmp_path / "model", "roformer", tensors=half)).params(never)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert_same(params, weights.from_hf({name: t.astype(np.float32) for name, t in half.items()}, config))


def write_shards(path, tensors, *, absent=()):
    """Two shards and their index."""
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in set(shards) - set(absent):
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if where[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards(tmp_path):
    _, config, tensors = load("distilbert")
    path = tmp_path / "model"
    write(path, "distilbert", file=None)
    write_shards(path, tensors)
    (path / "other.safetensors").write_bytes(b"not for us")
    assert_same(start(str(path)).params(never), weights.from_hf(tensors, config))


def test_files_that_will_not_do(tmp_path):
    _, _, tensors = load("distilbert")
    path = tmp_path / "model"
    name = write(path, "distilbert", file=None)

    def refuse(message):
        with pytest.raises(UserError, match=message) as error:
            start(name)
        assert "\n" not in str(error.value)

    refuse(r"neither model\.safetensors nor pytorch_model\.bin .* model\.config_name")
    write_shards(path, tensors, absent=["model-00002-of-00002.safetensors"])
    refuse(r"index\.json names model-00002-of-00002\.safetensors, which .* does not have")
    (path / "model.safetensors.index.json").write_text("[]")
    refuse("is not an index of shards")
    (path / "model.safetensors").write_bytes(b"\x00" * 100)
    refuse(r"model\.safetensors cannot be read")
    (path / "config.json").write_text("{")
    refuse("is not JSON")


def test_pytorch_files_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = write(tmp_path / "model", "bert", file=None)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"whatever")
    with pytest.raises(UserError, match=r"PyTorch is not installed: `pip install torch`, or .* save_pretrained"):
        start(path)


class FakeTensor:
    """As much of PyTorch's tensor as is used."""

    def __init__(self, array):
        self.array = array

    def is_floating_point(self):
        return self.array.dtype.kind == "f"

    def to(self, dtype):
        return FakeTensor(self.array.astype(dtype))

    def numpy(self):
        return self.array


def test_pytorch_files_are_read_as_weights_only_and_in_shards(tmp_path, monkeypatch):
    _, config, tensors = load("bert")
    tensors = tensors | {"bert.embeddings.position_ids": np.arange(23)[None]}
    calls = []

    def load_file(file, *, map_location, weights_only):
        calls.append((map_location, weights_only))
        number = names.index(os.path.basename(file)) + 1
        return {name: FakeTensor(t) for i, (name, t) in enumerate(sorted(tensors.items())) if i % 2 == number - 1}

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load_file, float32=np.float32))
    path = write(tmp_path / "model", "bert", file=None)
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for name in names:
        (tmp_path / "model" / name).write_bytes(b"")
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}})
    )
    assert_same(start(path).params(never), weights.from_hf(load("bert")[2], config))
    assert calls == [("cpu", True)] * 2


@pytest.mark.parametrize("case", ["bert", "electra", "modernbert", "modernbert_otherwise", "albert", "distilbert"])
def test_another_tokenizer_keeps_the_rows_of_the_tokens_both_have(case, tmp_path, caplog):
    _, config, tensors = load(case)
    old = words(*range(50))  # ids 55 to 60 are spare rows
    new = words(49, 1000, 3, *range(1001, 1010), 5)
    path = write(tmp_path / "model", case, vocabulary=old)
    checkpoint = pretrained.open_checkpoint(path, cache_dir=None)
    assert checkpoint.vocabulary == old
    assert checkpoint.has_tokens_of(old)
    assert not checkpoint.has_tokens_of(new)
    with caplog.at_level("INFO"):
        found = start(path, vocabulary=new, vocab_size=len(new))
    assert "vocabulary: 8 of 18 rows go with their token; the others start at the mean" in caplog.text

    before, after = weights.from_hf(tensors, config), found.params(never)
    pairs = [(before["embeddings"]["word"]["embedding"], after["embeddings"]["word"]["embedding"])]
    pairs += [(before["head"][name], after["head"][name]) for name in ("bias", "decoder") if name in before["head"]]
    assert len(pairs) == 2
    for old_rows, new_rows in pairs:
        assert len(new_rows) == len(new)
        for token, id in new.items():
            wanted = old_rows[old[token]] if token in old else old_rows.mean(axis=0, dtype=np.float64)
            np.testing.assert_array_equal(new_rows[id], np.float32(wanted), err_msg=token)


def test_added_tokens_keep_all_rows(tmp_path):
    _, config, tensors = load("xlm_roberta")
    old = words(*range(50))
    new = old | {"added": 61}
    found = start(write(tmp_path / "model", "xlm_roberta", vocabulary=old), vocabulary=new, vocab_size=62)
    before = weights.from_hf(tensors, config)["embeddings"]["word"]["embedding"]
    after = found.params(never)["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(after[:61], before)  # Spare rows, which no token of either has, too.
    np.testing.assert_array_equal(after[61], before.mean(axis=0, dtype=np.float64).astype(np.float32))


def test_without_a_tokenizer_rows_go_by_their_id(tmp_path, caplog):
    _, config, tensors = load("bert")
    with caplog.at_level("INFO"):
        found = start(write(tmp_path / "model", "bert"), vocabulary=words(*range(100, 165)), vocab_size=70)
    assert "61 of 70 rows go with their id, for the checkpoint has no tokenizer" in caplog.text
    before = weights.from_hf(tensors, config)["head"]["bias"]
    after = found.params(never)["head"]["bias"]
    np.testing.assert_array_equal(after, [*before, *[before.mean(dtype=np.float64).astype(np.float32)] * 9])


@pytest.mark.parametrize(("case", "first"), [("roberta", 4), ("bert", 0), ("albert", 0)])
def test_longer_rows_repeat_the_positions(case, first, tmp_path, caplog):
    _, config, tensors = load(case)
    longer = config.max_position_embeddings + 2 * config.max_seq_length - 1
    with caplog.at_level("INFO"):
        found = start(write(tmp_path / "model", case), vocabulary=words(*range(92)), max_position_embeddings=longer)
    lengths = 3 * config.max_seq_length - 1, config.max_seq_length
    assert "rows of up to {} tokens, of the checkpoint's {}, which are repeated".format(*lengths) in caplog.text
    before = weights.from_hf(tensors, config)["embeddings"]["position"]["embedding"]
    after = found.params(never)["embeddings"]["position"]["embedding"]
    np.testing.assert_array_equal(after, np.concatenate([before, before[first:], before[first:-1]]))

    shorter = start(write(tmp_path / "model", case), vocabulary=words(*range(92)), max_position_embeddings=10)
    np.testing.assert_array_equal(shorter.params(never)["embeddings"]["position"]["embedding"], before[:10])


@pytest.mark.parametrize("case", ["roformer", "modernbert"])
def test_rotary_positions_have_no_rows(case, tmp_path):
    _, config, tensors = load(case)
    found = start(write(tmp_path / "model", case), max_position_embeddings=100)
    assert found.config.max_seq_length == 100
    assert_same(found.params(never), weights.from_hf(tensors, config))


def test_other_padding_moves_the_positions(tmp_path):
    """RoBERTa's first position is the row after padding's id."""
    _, config, tensors = load("xlm_roberta")
    new = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    path = write(tmp_path / "model", "xlm_roberta", vocabulary=words(*range(50)))
    found = start(path, vocabulary=new, vocab_size=5, pad_token_id=1, max_position_embeddings=21)
    before = weights.from_hf(tensors, config)["embeddings"]["position"]["embedding"]
    after = found.params(never)["embeddings"]["position"]["embedding"]
    np.testing.assert_array_equal(after[2:], before[4:])


def test_another_shape_is_refused(tmp_path):
    path = write(tmp_path / "model", "bert")
    with pytest.raises(UserError, match=r"of the wrong shape: bert\..*\[37, 24\] \(wanted \[40, 24\]\)"):
        start(path, intermediate_size=40)
    with pytest.raises(UserError, match=r"missing: bert\.encoder\.layer\.3"):
        start(path, num_hidden_layers=4)
    with pytest.raises(UserError, match="model_type='gpt2' will not do"):
        start(write(tmp_path / "other", "bert", model_type="gpt2"))


@pytest.mark.slow
def test_a_run_starts_from_the_model_of_another(tmp_path, caplog):
    """The same tokenizer: the same model. Another one and longer rows: what both have, and training goes on."""
    config = tiny_config(write_corpus(tmp_path))
    config.num_train_steps = 4
    train_and_evaluate(settings_of(config), str(tmp_path / "first"))
    exported = safetensors.numpy.load_file(tmp_path / "first" / "model" / "model.safetensors")

    config.model.model_name_or_path = str(tmp_path / "first" / "model")
    run = build.build(settings_of(config), WorkDir(str(tmp_path / "second")))
    wanted = weights.from_hf(exported, run.encoder)
    assert_same(run.initial_params(), wanted)
    assert len(run.tokenizer.hf) == 300

    vocabulary = [*SPECIAL, ".", "Number", "the", "cat", "dog", "bird", "sees", "likes", "and", "unheard-of"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "words")
    config.tokenizer.tokenizer_name = str(tmp_path / "words")
    config.model.overrides.max_position_embeddings = 30
    config.data.max_seq_length = 24
    with caplog.at_level("INFO"):
        train_and_evaluate(settings_of(config), str(tmp_path / "third"))
    assert "positions: rows of up to 26 tokens, of the checkpoint's 18" in caplog.text
    encoder = json.loads((tmp_path / "third" / "model" / "config.json").read_text())
    assert (encoder["vocab_size"], encoder["pad_token_id"]) == (len(vocabulary), 3)
    assert "go with their token" in caplog.text


def test_the_hub_is_asked_for_pytorch_files_only_where_there_is_nothing_else(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, *, cache_dir, allow_patterns):
        asked.append((name, cache_dir, [pattern for pattern in allow_patterns if "model" in pattern]))
        return str(tmp_path / name.split("/")[1])

    monkeypatch.setattr(pretrained.huggingface_hub, "snapshot_download", snapshot_download)
    write(tmp_path / "new", "bert")
    assert pretrained.open_checkpoint("somebody/new", cache_dir="there").has_head
    safe = ["model*.safetensors", "model.safetensors.index.json", "*.model"]
    assert asked == [("somebody/new", "there", safe)]

    asked.clear()
    monkeypatch.setitem(sys.modules, "torch", None)
    write(tmp_path / "old", "bert", file=None)
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="PyTorch is not installed"):
        pretrained.open_checkpoint("somebody/old", cache_dir=None)
    assert [patterns for *_, patterns in asked] == [safe, ["pytorch_model*.bin*", "*.model"]]

    asked.clear()
    assert pretrained.open_config("somebody/new", cache_dir=None) == load("bert")[1]
    assert asked == [("somebody/new", None, [])]
