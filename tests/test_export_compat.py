"""Exported models in transformers 4 and 5: fields of config.json, and files of the tokenizer.

benchmarks/export_compatibility.py loads exported models in other versions of transformers.
"""

import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

from mlm.data.tokenizer import load_tokenizer
from mlm.data.train_tokenizer import train_tokenizer
from mlm.export.fill_mask import encode
from mlm.export.model_card import build_card
from mlm.export.model_directory import export_model
from mlm.models.config import EncoderConfig, default_config
from mlm.models.encoder import MaskedLM
from mlm.models.families import FAMILIES
from mlm.models.hf import weights
from tests.tiny import sentences, tiny_settings

# Version of transformers -> family -> field -> default; "all" has the fields of all families (make_config_fields.py).
CONFIG_FIELDS = json.loads((pathlib.Path(__file__).parent / "golden" / "config_fields.json").read_text())
# The number of tokens that the models below accept.
MAX_TOKENS = 24


def export(folder, tokenizer, *, family, dtype="float32", value=0.0, **fields):
    """Exports a tiny model with one value for all weights; returns its config."""
    config = default_config(family)
    widths = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    first_position = config.max_position_embeddings - config.max_seq_length
    if first_position:
        first_position = tokenizer.pad_id + 1
    ids = {"vocab_size": tokenizer.num_ids, "pad_token_id": tokenizer.pad_id}
    config = config.replace(**widths, **ids, max_position_embeddings=MAX_TOKENS + first_position, **fields)
    shapes = jax.eval_shape(MaskedLM(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    card = build_card(
        tiny_settings("x.jsonl"), title="x", model_type=family, step=0, sequences_per_step=1, tokens_seen=0, hardware=""
    )
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), shapes)
    export_model(
        str(folder), step=0, params=params, config=config, tokenizer=tokenizer, card=card, metrics={}, predictions=[],
        metrics_path=str(folder / "none.jsonl"), dtype=dtype,
    )  # fmt: skip
    return config


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Model directories with a trained tokenizer, by family, and their configs."""
    folder = tmp_path_factory.mktemp("exported")
    found = {}
    for family in FAMILIES:
        tokenizer = train_tokenizer(iter(sentences(40)), vocab_size=320, max_seq_length=999, model_type=family)
        found[family] = folder / family, export(folder / family, tokenizer, family=family)
    return found


@pytest.fixture
def plain_tokenizer(tmp_path):
    """The path of a tokenizer that adds no tokens to a text, without a maximum length, with one extra special token."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<entity>", "the", "cat"]
    model = tokenizers.models.WordLevel({name: id for id, name in enumerate(names)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {f"{role}_token": f"<{role}>" for role in ("pad", "unk", "mask")} | {
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    path = tmp_path / "plain"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=["<entity>"], **special
    ).save_pretrained(path)
    assert read(path / "tokenizer_config.json")["extra_special_tokens"] == ["<entity>"]
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("version", CONFIG_FIELDS)
def test_config_has_each_field_of_the_model_that_a_version_of_transformers_reads(exported, version, family):
    """A field of the class that is not written has its default there, which must be the value of our model."""
    directory, config = exported[family]
    written = read(directory / "config.json")
    known = CONFIG_FIELDS[version]["all"] | CONFIG_FIELDS[version][family]
    absent = {name: value for name, value in known.items() if name not in written}
    assert not set(absent) & {*config.family.fields.values(), "layer_types", "rope_parameters", "dtype", "torch_dtype"}
    assert EncoderConfig.from_hf(written | absent) == config


def test_modernbert_has_rotary_bases_and_layer_pattern_in_both_forms(exported, tmp_path):
    tokenizer = load_tokenizer(str(exported["modernbert"][0]))
    fields = {"global_rope_theta": 20_000.0, "local_rope_theta": 5_000.0, "global_attn_every_n_layers": 2}
    config = export(tmp_path / "model", tokenizer, family="modernbert", **fields)
    written = read(tmp_path / "model" / "config.json")
    assert written.items() >= fields.items()
    assert written["layer_types"] == ["full_attention", "sliding_attention"] * 2
    thetas = {kind: parameters["rope_theta"] for kind, parameters in written["rope_parameters"].items()}
    assert thetas == {"full_attention": 20_000.0, "sliding_attention": 5_000.0}
    newer = {name: value for name, value in written.items() if name not in fields}
    older = {name: value for name, value in written.items() if name not in ("layer_types", "rope_parameters")}
    assert [EncoderConfig.from_hf(form) for form in (written, newer, older)] == [config] * 3


def test_config_has_the_dtype_under_both_names(exported, tmp_path):
    tokenizer = load_tokenizer(str(exported["bert"][0]))
    export(tmp_path / "model", tokenizer, family="bert", dtype="bfloat16")
    written = read(tmp_path / "model" / "config.json")
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")


# The names of the head's bias; a family not listed has one name.
BIAS_NAMES = {
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm"), ("lm_head.bias", "lm_head.decoder.bias")
    ),
    **dict.fromkeys(("bert", "roformer"), ("cls.predictions.bias", "cls.predictions.decoder.bias")),
    "albert": ("predictions.bias", "predictions.decoder.bias"),
}


@pytest.mark.parametrize("family", BIAS_NAMES)
def test_bias_of_the_head_has_both_names(tmp_path, exported, family):
    """transformers 4.48 sets it to zero otherwise, for RoBERTa and its relatives and ALBERT."""
    tokenizer = load_tokenizer(str(exported[family][0]))
    config = export(tmp_path / "model", tokenizer, family=family, value=0.5)
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    for name in BIAS_NAMES[family]:
        np.testing.assert_array_equal(tensors[name], np.full(config.vocab_size, 0.5, np.float32))
    weights.check_tensors(tensors, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_config_has_no_names_that_transformers_4_lacks(exported, family):
    written = read(exported[family][0] / "tokenizer_config.json")
    assert written["tokenizer_class"] != "TokenizersBackend"
    assert "extra_special_tokens" not in written
    # transformers 4 has another default.
    assert written["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize("family", FAMILIES)
def test_model_input_names_are_arguments_of_the_model(exported, family):
    directory, config = exported[family]
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    names = read(directory / "tokenizer_config.json")["model_input_names"]
    assert {"input_ids", "attention_mask"} <= set(names) <= {"input_ids", "attention_mask", "token_type_ids"}
    if config.type_vocab_size < 2:
        assert "token_type_ids" not in names
    assert set(loaded("the cat")) == set(names)


def test_a_tokenizer_trained_for_distilbert_gives_no_token_type_ids():
    options = {"vocab_size": 320, "max_seq_length": 9}
    assert set(train_tokenizer(iter(sentences(40)), model_type="distilbert", **options).hf("a")) == {
        "input_ids",
        "attention_mask",
    }
    assert "token_type_ids" in train_tokenizer(iter(sentences(40)), model_type="bert", **options).hf("a")


def test_a_named_bert_tokenizer_gives_no_token_type_ids_to_a_distilbert_model(exported, tmp_path):
    tokenizer = load_tokenizer(str(exported["bert"][0]))
    export(tmp_path / "model", tokenizer, family="distilbert")
    assert "token_type_ids" not in transformers.AutoTokenizer.from_pretrained(tmp_path / "model")("the cat")


@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_is_to_the_number_of_tokens_that_the_model_accepts(exported, family):
    loaded = transformers.AutoTokenizer.from_pretrained(exported[family][0])
    assert loaded.model_max_length == MAX_TOKENS
    assert len(loaded("the cat " * 40, truncation=True)["input_ids"]) == MAX_TOKENS


@pytest.mark.slow
def test_model_max_length_is_added_if_it_is_missing_and_kept_if_it_is_smaller(plain_tokenizer, tmp_path):
    tokenizer = load_tokenizer(plain_tokenizer)
    assert tokenizer.hf.model_max_length > 1e20
    for length, expected in ((int(1e30), MAX_TOKENS), (MAX_TOKENS + 1, MAX_TOKENS), (7, 7)):
        tokenizer.hf.model_max_length = length
        export(tmp_path / "model", tokenizer, family="bert")
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
        assert loaded.model_max_length == expected
        assert len(loaded("the cat " * 40, truncation=True)["input_ids"]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "bert", "modernbert"])
def test_a_tokenizer_without_post_processor_is_exported_with_that_of_training(
    plain_tokenizer, tmp_path, caplog, family
):
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(plain_tokenizer)
    assert [record.getMessage() for record in caplog.records if "begin and end" in record.getMessage()] == [
        f"the tokenizer {plain_tokenizer} does not add the begin and end tokens of training, <s> and </s>; "
        "the exported one adds them"
    ]
    assert encode(tokenizer, ["the <mask>"], max_seq_length=9) == [[0, 6, 4, 2]]
    export(tmp_path / "model", tokenizer, family=family)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded("the cat <entity>")["input_ids"] == [0, 6, 7, 5, 2]
    assert loaded("the", "cat")["input_ids"] == [0, 6, 2, 7, 2]
    assert "<entity>" in loaded.all_special_tokens
    assert read(tmp_path / "model" / "tokenizer_config.json")["additional_special_tokens"] == ["<entity>"]
    # Nothing changes when the exported tokenizer is loaded and exported again.
    caplog.clear()
    export(tmp_path / "again", load_tokenizer(str(tmp_path / "model")), family=family)
    assert not [record for record in caplog.records if "begin and end" in record.getMessage()]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_post_processor_that_adds_other_tokens_is_replaced(plain_tokenizer, tmp_path):
    path = pathlib.Path(plain_tokenizer) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    backend.save(str(path))
    tokenizer = load_tokenizer(plain_tokenizer)
    export(tmp_path / "model", tokenizer, family="roberta")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model")("the cat")["input_ids"] == [0, 6, 7, 2]
