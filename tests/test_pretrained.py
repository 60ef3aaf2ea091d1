"""Pretrained weights: files of transformers, other vocabularies, longer rows, no head."""

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
    """A vocabulary of the special tokens and these words, in that order."""
    return {token: i for i, token in enumerate([*SPECIAL, *(f"word{number}" for number in numbers)])}


def write(path, case, *, tensors=None, file="model.safetensors", vocabulary=None, **fields):
    """Writes a model directory with a golden file's config and tensors, or others, and returns its path."""
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


def adapt(path, *, vocabulary=None, **overrides):
    loaded = pretrained.load_weights(path, cache_dir=None)
    config = loaded.config.replace(**overrides)
    return pretrained.adapt_to_config(loaded, config, vocabulary=vocabulary or words(*range(56)))


def never():
    raise AssertionError("the parameters need no initialization")


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_every_family_are_loaded(case, tmp_path):
    _, config, tensors = load(case)
    found = adapt(write(tmp_path / "model", case))
    assert found.config == config
    assert_same(found.params(never), weights.from_hf(tensors, config))


def init_params(config):
    shapes = jax.eval_shape(lambda: MaskedLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 7, np.float32), shapes["params"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_head_of_a_plain_encoder_is_initialized(case, tmp_path, caplog):
    """`BertModel(...).save_pretrained` writes no prefix, no head, and a pooler."""
    _, config, tensors = load(case)
    base = TENSOR_NAMES[config.model_type].base
    plain = {name.removeprefix(base): tensor for name, tensor in tensors.items() if name.startswith(base)}
    assert 0 < len(plain) < len(tensors)
    plain["pooler.dense.weight"] = np.zeros((24, 24), np.float32)
    with caplog.at_level("INFO"):
        found = adapt(write(tmp_path / "model", case, tensors=plain))
    expected = weights.from_hf(tensors, config) | {"head": init_params(config)["head"]}
    assert_same(found.params(lambda: init_params(config)), expected)
    assert "has no masked-language-model head; it is initialized" in caplog.text
    assert f"ignored unused tensors: {base}pooler.dense.weight" in caplog.text


def test_params_can_be_traced(tmp_path):
    """As a resumed run does, which needs shapes only."""
    _, config, tensors = load("bert")
    plain = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    found = adapt(write(tmp_path / "model", "bert", tensors=plain))
    init = jax.jit(lambda: MaskedLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    shapes = jax.eval_shape(lambda: found.params(init))
    assert jax.tree.structure(shapes) == jax.tree.structure(weights.from_hf(tensors, config))


def test_another_head_is_ignored(tmp_path, caplog):
    _, _, tensors = load("bert")
    other = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    other |= {"classifier.weight": np.zeros((2, 24), np.float32), "classifier.bias": np.zeros(2, np.float32)}
    with caplog.at_level("INFO"):
        found = adapt(write(tmp_path / "model", "bert", tensors=other))
    assert not found.has_head
    assert "ignored unused tensors: classifier.bias, classifier.weight" in caplog.text


def test_incomplete_head_is_an_error(tmp_path):
    tensors = load("bert")[2] | {"classifier.weight": np.zeros((2, 24), np.float32)}
    del tensors["cls.predictions.bias"]
    path = write(tmp_path / "model", "bert", tensors=tensors)
    with pytest.raises(UserError, match=r"missing: cls\.predictions\.bias; unexpected: classifier\.weight; use"):
        adapt(path)


def test_tensorflow_names_are_converted(tmp_path):
    """google-bert/bert-base-uncased has gamma and beta of norms, and a next-sentence head."""
    _, config, tensors = load("bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old |= {"cls.seq_relationship.weight": np.zeros((2, 24), np.float32), "bert.pooler.dense.bias": np.zeros(24)}
    assert old.keys() - tensors.keys() != set()
    assert_same(adapt(write(tmp_path / "model", "bert", tensors=old)).params(never), weights.from_hf(tensors, config))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_converted_to_float32(dtype, tmp_path):
    _, config, tensors = load("roformer")  # One of its tensors is a constant.
    half = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    params = adapt(write(tmp_path / "model", "roformer", tensors=half)).params(never)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert_same(params, weights.from_hf({name: t.astype(np.float32) for name, t in half.items()}, config))


def write_shards(path, tensors, *, absent=()):
    """Writes two shards and their index."""
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in set(shards) - set(absent):
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if where[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards_are_loaded(tmp_path):
    _, config, tensors = load("distilbert")
    path = tmp_path / "model"
    write(path, "distilbert", file=None)
    write_shards(path, tensors)
    (path / "other.safetensors").write_bytes(b"unrelated")
    assert_same(adapt(str(path)).params(never), weights.from_hf(tensors, config))


def test_damaged_and_missing_files_are_errors(tmp_path):
    _, _, tensors = load("distilbert")
    path = tmp_path / "model"
    name = write(path, "distilbert", file=None)

    def assert_error(message):
        with pytest.raises(UserError, match=message) as error:
            adapt(name)
        assert "\n" not in str(error.value)

    assert_error(r"the model .*: has neither model\.safetensors nor pytorch_model\.bin; .* model\.config_name")
    write_shards(path, tensors, absent=["model-00002-of-00002.safetensors"])
    assert_error(r"index\.json: lists model-00002-of-00002\.safetensors, which .* does not have; download them")
    (path / "model.safetensors.index.json").write_text("[]")
    assert_error("is not a valid shard index; download it again")
    (path / "model.safetensors").write_bytes(b"\x00" * 100)
    assert_error(r"model\.safetensors: cannot be read")
    (path / "config.json").write_text("{")
    assert_error("is not JSON")


def test_pytorch_files_without_pytorch_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = write(tmp_path / "model", "bert", file=None)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"whatever")
    with pytest.raises(UserError, match=r"PyTorch is not installed; `pip install torch`, or .* save_pretrained"):
        adapt(path)


class FakeTensor:
    """The methods of PyTorch's tensor that are used."""

    def __init__(self, array):
        self.array = array

    def is_floating_point(self):
        return self.array.dtype.kind == "f"

    def to(self, dtype):
        return FakeTensor(self.array.astype(dtype))

    def numpy(self):
        return self.array


def test_pytorch_shards_are_loaded_with_weights_only(tmp_path, monkeypatch):
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
    assert_same(adapt(path).params(never), weights.from_hf(load("bert")[2], config))
    assert calls == [("cpu", True)] * 2


@pytest.mark.parametrize("case", ["bert", "electra", "modernbert", "modernbert_otherwise", "albert", "distilbert"])
def test_embeddings_are_matched_by_token(case, tmp_path, caplog):
    _, config, tensors = load(case)
    old = words(*range(50))  # Ids 55 to 60 are spare rows.
    new = words(49, 1000, 3, *range(1001, 1010), 5)
    path = write(tmp_path / "model", case, vocabulary=old)
    loaded = pretrained.load_weights(path, cache_dir=None)
    assert loaded.vocabulary == old
    assert loaded.has_tokens_of(old)
    assert not loaded.has_tokens_of(new)
    with caplog.at_level("INFO"):
        found = adapt(path, vocabulary=new, vocab_size=len(new))
    assert (
        "vocabulary: 8 of 18 embeddings are pretrained, matched by token; the others start at the mean of its 61"
        in caplog.text
    )

    before, after = weights.from_hf(tensors, config), found.params(never)
    pairs = [(before["embeddings"]["word"]["embedding"], after["embeddings"]["word"]["embedding"])]
    pairs += [(before["head"][name], after["head"][name]) for name in ("bias", "decoder") if name in before["head"]]
    assert len(pairs) == 2
    for old_rows, new_rows in pairs:
        assert len(new_rows) == len(new)
        for token, id in new.items():
            expected = old_rows[old[token]] if token in old else old_rows.mean(axis=0, dtype=np.float64)
            np.testing.assert_array_equal(new_rows[id], np.float32(expected), err_msg=token)


def test_added_tokens_keep_all_other_embeddings(tmp_path):
    _, config, tensors = load("xlm_roberta")
    old = words(*range(50))
    new = old | {"added": 61}
    found = adapt(write(tmp_path / "model", "xlm_roberta", vocabulary=old), vocabulary=new, vocab_size=62)
    before = weights.from_hf(tensors, config)["embeddings"]["word"]["embedding"]
    after = found.params(never)["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(after[:61], before)  # Including spare rows, which have no token.
    np.testing.assert_array_equal(after[61], before.mean(axis=0, dtype=np.float64).astype(np.float32))


def test_embeddings_are_matched_by_id_without_a_tokenizer(tmp_path, caplog):
    _, config, tensors = load("bert")
    with caplog.at_level("INFO"):
        found = adapt(write(tmp_path / "model", "bert"), vocabulary=words(*range(100, 165)), vocab_size=70)
    assert "61 of 70 embeddings are pretrained, matched by id because the checkpoint has no tokenizer" in caplog.text
    before = weights.from_hf(tensors, config)["head"]["bias"]
    after = found.params(never)["head"]["bias"]
    np.testing.assert_array_equal(after, [*before, *[before.mean(dtype=np.float64).astype(np.float32)] * 9])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "first"), [("roberta", 4), ("bert", 0), ("albert", 0)])
def test_longer_rows_repeat_the_position_embeddings(case, first, tmp_path, caplog):
    _, config, tensors = load(case)
    longer = config.max_position_embeddings + 2 * config.max_seq_length - 1
    with caplog.at_level("INFO"):
        found = adapt(write(tmp_path / "model", case), vocabulary=words(*range(92)), max_position_embeddings=longer)
    lengths = 3 * config.max_seq_length - 1, config.max_seq_length
    assert "positions: {}, from the checkpoint's {}, which are repeated".format(*lengths) in caplog.text
    before = weights.from_hf(tensors, config)["embeddings"]["position"]["embedding"]
    after = found.params(never)["embeddings"]["position"]["embedding"]
    np.testing.assert_array_equal(after, np.concatenate([before, before[first:], before[first:-1]]))

    shorter = adapt(write(tmp_path / "model", case), vocabulary=words(*range(92)), max_position_embeddings=10)
    np.testing.assert_array_equal(shorter.params(never)["embeddings"]["position"]["embedding"], before[:10])


@pytest.mark.parametrize("case", ["roformer", "modernbert"])
def test_rotary_embeddings_need_no_adaptation(case, tmp_path):
    _, config, tensors = load(case)
    found = adapt(write(tmp_path / "model", case), max_position_embeddings=100)
    assert found.config.max_seq_length == 100
    assert_same(found.params(never), weights.from_hf(tensors, config))


@pytest.mark.slow
def test_another_pad_token_id_shifts_the_position_embeddings(tmp_path):
    """RoBERTa's first position has the row pad_token_id + 1."""
    _, config, tensors = load("xlm_roberta")
    new = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    path = write(tmp_path / "model", "xlm_roberta", vocabulary=words(*range(50)))
    found = adapt(path, vocabulary=new, vocab_size=5, pad_token_id=1, max_position_embeddings=21)
    before = weights.from_hf(tensors, config)["embeddings"]["position"]["embedding"]
    after = found.params(never)["embeddings"]["position"]["embedding"]
    np.testing.assert_array_equal(after[2:], before[4:])


def test_another_shape_is_an_error(tmp_path):
    path = write(tmp_path / "model", "bert")
    with pytest.raises(UserError, match=r"of the wrong shape: bert\..*\[37, 24\] \(expected \[40, 24\]\)"):
        adapt(path, intermediate_size=40)
    with pytest.raises(UserError, match=r"missing: bert\.encoder\.layer\.3"):
        adapt(path, num_hidden_layers=4)
    with pytest.raises(UserError, match="model_type='gpt2': must be one of"):
        adapt(write(tmp_path / "other", "bert", model_type="gpt2"))


@pytest.mark.slow
def test_run_starts_from_the_model_of_another_run(tmp_path, caplog):
    """With the same tokenizer, and with another one and longer rows."""
    config = tiny_config(write_corpus(tmp_path))
    config.num_train_steps = 4
    train_and_evaluate(settings_of(config), str(tmp_path / "first"))
    exported = safetensors.numpy.load_file(tmp_path / "first" / "model" / "model.safetensors")

    config.model.model_name_or_path = str(tmp_path / "first" / "model")
    run = build.build(settings_of(config), WorkDir(str(tmp_path / "second")))
    expected = weights.from_hf(exported, run.encoder)
    assert_same(run.initial_params(), expected)
    assert len(run.tokenizer.hf) == 300

    vocabulary = [*SPECIAL, ".", "Number", "the", "cat", "dog", "bird", "sees", "likes", "and", "unseen"]
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
    assert "positions: 26, from the checkpoint's 18" in caplog.text
    encoder = json.loads((tmp_path / "third" / "model" / "config.json").read_text())
    assert (encoder["vocab_size"], encoder["pad_token_id"]) == (len(vocabulary), 3)
    assert "matched by token" in caplog.text


def test_pytorch_files_are_downloaded_only_without_safetensors(tmp_path, monkeypatch):
    requested = []

    def snapshot_download(name, *, cache_dir, allow_patterns):
        requested.append((name, cache_dir, [pattern for pattern in allow_patterns if "model" in pattern]))
        return str(tmp_path / name.split("/")[1])

    monkeypatch.setattr(pretrained.huggingface_hub, "snapshot_download", snapshot_download)
    write(tmp_path / "new", "bert")
    assert pretrained.load_weights("somebody/new", cache_dir="there").has_head
    safe = ["model*.safetensors", "model.safetensors.index.json", "*.model"]
    assert requested == [("somebody/new", "there", safe)]

    requested.clear()
    monkeypatch.setitem(sys.modules, "torch", None)
    write(tmp_path / "old", "bert", file=None)
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="PyTorch is not installed"):
        pretrained.load_weights("somebody/old", cache_dir=None)
    assert [patterns for *_, patterns in requested] == [safe, ["pytorch_model*.bin*", "*.model"]]

    requested.clear()
    assert pretrained.load_config("somebody/new", cache_dir=None) == load("bert")[1]
    assert requested == [("somebody/new", None, [])]
