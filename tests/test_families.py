"""Every family against transformers' PyTorch model: golden/<case>.npz, made by golden/make_families.py."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.errors import UserError
from mlm.models.config import EncoderConfig, default_config
from mlm.models.encoder import MaskedLM
from mlm.models.families import FAMILIES
from mlm.models.hf import weights
from mlm.models.ops import attention, dropout
from mlm.optimizer import decay_mask

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def slow_except(*quick):
    """All cases, marked slow except the named ones."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@functools.cache
def load(case):
    with np.load(GOLDEN / f"{case}.npz") as file:
        golden = dict(file)
    config = EncoderConfig.from_hf(json.loads(str(golden["config"])))
    tensors = {name[7:]: tensor for name, tensor in golden.items() if name.startswith("tensor/")}
    return golden, config, tensors


def loss_and_logits(params, inputs, token_types, labels, *, config):
    logits = MaskedLM(config).apply({"params": params}, inputs, token_types_BxL=token_types)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, :, None], axis=2)[:, :, 0]
    return -(log_probs * (labels >= 0)).sum() / (labels >= 0).sum(), logits


def arguments(case):
    golden, config, tensors = load(case)
    return weights.from_hf(tensors, config), golden["inputs"], golden.get("token_types"), golden["labels"], config


def test_every_family_has_a_case():
    assert {load(case)[1].model_type for case in CASES} == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_except("camembert"))
def test_logits_loss_and_gradients_match_pytorch(case):
    golden, config, _ = load(case)
    *arrays, _ = arguments(case)
    compute = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True), static_argnames="config")
    (loss, logits), gradient = compute(*arrays, config=config)
    # Outputs of padding are not used.
    is_token = golden["inputs"] != config.pad_token_id
    expected = golden["logits"][is_token]
    # float32 has 24 bits; a few layers lose up to seven of them.
    np.testing.assert_allclose(logits[is_token], expected, rtol=0, atol=2.0**-16 * np.abs(expected).max())
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)
    gradients = weights.to_hf(gradient, config)
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    shown = [name.removeprefix("gradient/") for name in golden if name.startswith("gradient/")]
    assert len(shown) > 5
    for name in shown:
        expected = golden[f"gradient/{name}"]
        np.testing.assert_allclose(gradients[name], expected, rtol=0, atol=2.0**-15 * largest, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_match_pytorch(case):
    """state_dict() also has the second names of tied tensors."""
    golden, config, tensors = load(case)
    state_dict = {name: tuple(shape) for name, shape in json.loads(str(golden["state_dict_shapes"])).items()}
    assert {name: tensor.shape for name, tensor in tensors.items()}.items() <= state_dict.items()
    assert weights.tensor_shapes(config).items() <= state_dict.items()
    assert state_dict.keys() - tensors.keys() == weights.tied_tensors(config).keys()


@pytest.mark.parametrize("case", CASES)
def test_conversion_from_pytorch_and_back_is_bitwise_identical(case):
    _, config, tensors = load(case)
    back = weights.to_hf(weights.from_hf(tensors, config), config)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_match_transformers(model_type):
    golden = next(golden for golden, config, _ in map(load, CASES) if config.model_type == model_type)
    expected = default_config(model_type)
    assert EncoderConfig.from_hf(json.loads(str(golden["default_config"]))) == expected
    assert EncoderConfig.from_hf({"model_type": model_type}) == expected


def test_hub_configs_are_read():
    """Fields without meaning, other names and the fields of transformers 4 in google-bert/bert-base-multilingual-cased,
    albert/albert-base-v2 and answerdotai/ModernBERT-base."""
    bert = {"model_type": "bert", "vocab_size": 119547, "directionality": "bidi", "pooler_fc_size": 768}
    assert EncoderConfig.from_hf(bert) == default_config("bert").replace(vocab_size=119547)
    albert = {"model_type": "albert", "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    albert |= {"attention_probs_dropout_prob": 0, "down_scale_factor": 1, "gap_size": 0, "net_structure_type": 0}
    assert EncoderConfig.from_hf(albert).embedding_width == 128
    modern = {"model_type": "modernbert", "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0}
    modern |= {"local_rope_theta": 10000.0, "layer_norm_eps": 1e-5, "position_embedding_type": "absolute"}
    modern |= {"classifier_pooling": "mean", "sparse_prediction": True, "sparse_pred_ignore_index": -100}
    assert EncoderConfig.from_hf(modern) == default_config("modernbert")
    assert EncoderConfig.from_hf(modern | {"global_rope_theta": 80000.0}).layers[21].rope_theta == 80000.0


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "bert",
            {"embedding_size": 3},
            "model config embedding_size=3: unknown field of the family bert, which may change the model",
        ),
        (
            "bert",
            {"tie_word_embeddings": False},
            "tie_word_embeddings=False: the family bert supports true only; set it to true",
        ),
        ("bert", {"hidden_act": "mish"}, "hidden_act='mish': must be one of gelu, gelu_new"),
        (
            "distilbert",
            {"sinusoidal_pos_embds": True},
            "sinusoidal_pos_embds=True: only False is supported; choose another model",
        ),
        ("distilbert", {"type_vocab_size": 2}, "type_vocab_size=2: unknown field"),
        ("distilbert", {"hidden_size": 12}, "hidden_size=12: unknown field"),
        ("albert", {"num_hidden_groups": 13}, "num_hidden_groups=13: must be at most num_hidden_layers=12"),
        ("albert", {"inner_group_num": None}, "inner_group_num=None: the family albert needs a value; set it"),
        (
            "roformer",
            {"num_attention_heads": 768},
            "num_attention_heads=768: rotary embeddings need an even head size, not 1",
        ),
        ("roformer", {"rotary_value": 1}, "rotary_value=1: must be of type bool"),
        ("modernbert", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob=0.1: unknown field"),
        ("modernbert", {"rope_scaling": {"type": "linear"}}, "rope_scaling="),
        ("modernbert", {"layer_types": ["sliding_attention"]}, "layer_types="),
        ("modernbert", {"layer_types": ["full_attention", "conv"]}, "layer_types="),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters.full_attention",
        ),
        ("modernbert", {"rope_parameters": {"full_attention": {"factor": 2.0}}}, "rope_parameters.full_attention"),
        ("modernbert", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters="),
        ("modernbert", {"local_attention": 0}, "local_attention=0: must be at least 1"),
        ("modernbert", {"classifier_activation": None}, "classifier_activation=None"),
        ("deberta-v2", {}, "model_type='deberta-v2': must be one of roberta, xlm-roberta, camembert"),
    ],
)
def test_unsupported_fields_are_errors_with_their_name(model_type, fields, message):
    with pytest.raises(UserError, match=message) as error:
        EncoderConfig.from_hf({"model_type": model_type} | fields)
    assert "\n" not in str(error.value)


def test_overrides_of_other_families_are_errors_with_family_and_key():
    message = r"^model\.overrides\.local_attention=128: the family roberta has no such field; set it to None$"
    with pytest.raises(UserError, match=message):
        default_config("roberta").replace(local_attention=128)
    with pytest.raises(
        UserError, match=r"model\.overrides\.type_vocab_size=2: the family modernbert has no such field"
    ):
        default_config("modernbert").replace(type_vocab_size=2)
    assert default_config("modernbert").replace(type_vocab_size=0, hidden_dropout_prob=0.0).max_seq_length == 8192


@pytest.mark.parametrize("case", CASES)
def test_weight_decay_applies_to_matrices_only(case):
    _, config, tensors = load(case)
    flat = jax.tree_util.tree_leaves_with_path(decay_mask(weights.from_hf(tensors, config)))
    assert {path[-1].key for path, decayed in flat if decayed} - {"decoder"} == {"kernel", "weight", "embedding"}
    assert {path[-1].key for path, decayed in flat if not decayed} <= {"bias", "scale"}


def test_layers_of_modernbert_albert_and_distilbert():
    modern = default_config("modernbert").layers
    assert [i for i, layer in enumerate(modern) if layer.window is None] == [0, 3, 6, 9, 12, 15, 18, 21]
    assert {(layer.window, layer.rope_theta) for layer in modern} == {(None, 160_000.0), (64, 10_000.0)}
    assert [layer.attention_norm for layer in modern] == [False] + [True] * 21
    albert = default_config("albert").replace(num_hidden_layers=5, num_hidden_groups=2, inner_group_num=2)
    assert [layer.block for layer in albert.layers] == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3]
    assert [layer.block for layer in default_config("distilbert").layers] == [0, 1, 2, 3, 4, 5]


# Dropout in transformers: the embeddings, then attention weights and outputs of each layer.
DROPOUT_SITES = {
    "distilbert": ["hidden", "attention", "hidden"],
    "albert": ["hidden", "attention", "hidden"],
    "modernbert": ["embedding", "attention", "attention", "mlp"],
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_dropout_sites_match_transformers(model_type, monkeypatch):
    _, config, _ = load(model_type.replace("-", "_"))
    rates = {"hidden": 0.25, "attention": 0.5, "embedding": 0.125, "mlp": 0.375}
    fields = ["attention_probs_dropout_prob", *sorted({*FAMILIES[model_type].dropout_fields.values()})]
    config = config.replace(**{field: rates[field.split("_")[0]] for field in fields})
    calls = []

    def record(key, shape, *, rate):
        calls.append(rate)
        return jnp.ones(shape, bool)

    monkeypatch.setattr(dropout, "dropout_keep_mask", record)
    monkeypatch.setattr(attention, "dropout_keep_mask", record)
    model = MaskedLM(config)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    jax.eval_shape(lambda: model.init(keys, jnp.zeros((1, 5), jnp.int32), deterministic=False))
    first, *layer = DROPOUT_SITES.get(model_type, ["hidden", "attention", "hidden", "hidden"])
    assert calls == [rates[first]] + [rates[kind] for kind in layer] * len(config.layers)


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_except("electra"))
def test_initialization_matches_transformers(case):
    golden, config, _ = load(case)
    if case == "roberta":  # tests/test_models.py has this test for its golden file.
        return
    params = jax.jit(MaskedLM(config).init)(jax.random.key(2, impl="rbg"), golden["inputs"])["params"]
    zero_rows, deviation = (json.loads(str(golden[f"initial_{name}"])) for name in ("zero_rows", "deviation"))
    for name, tensor in weights.to_hf(params, config).items():
        if name not in deviation:  # Vectors, and a constant.
            assert tensor.ndim == 2 or (tensor == (0 if name.endswith("bias") else 1)).all(), name
            continue
        rows = np.flatnonzero(~tensor.any(axis=1)).tolist()
        assert rows == zero_rows[name], name
        values = np.delete(tensor, rows, axis=0)
        # Two independent samples: five standard errors of a standard deviation, for each of them.
        assert abs(values.std() / deviation[name] - 1) < 10 / (2 * values.size) ** 0.5, name
        if config.initializer_cutoff_factor:
            # Truncation at 2 standard deviations reduces the standard deviation to 0.88 of it.
            assert np.abs(values).max() <= 2 * values.std() / 0.8, name


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_except("modernbert"))
def test_isolated_document_has_the_same_logits_as_alone(case):
    _, config, tensors = load(case)
    params, begin, pad = weights.from_hf(tensors, config), 1, config.pad_token_id
    draw = np.random.default_rng(0)
    parts = [[*draw.integers(4, 60, 4)], *([begin, *draw.integers(4, 60, length)] for length in (3, 1, 6))]
    rows = np.full((5, 17), pad, np.int32)
    for row, part in enumerate([[*itertools.chain(*parts)], *parts]):
        rows[row, : len(part)] = part

    logits = jax.jit(
        lambda begin_id: MaskedLM(config, begin_id=begin_id).apply({"params": params}, rows), static_argnums=0
    )
    isolated, concatenated = logits(begin), logits(None)
    start = 0
    for row, part in enumerate(parts, start=1):
        alone = isolated[row, : len(part)]
        atol = 1e-5 * np.abs(alone).max()
        np.testing.assert_allclose(isolated[0, start : start + len(part)], alone, rtol=0, atol=atol)
        np.testing.assert_allclose(concatenated[row, : len(part)], alone, rtol=0, atol=atol)
        start += len(part)
    # Without isolation documents see each other, so the test can fail.
    assert np.abs(concatenated[0] - isolated[0]).max() > 1e-2 * np.abs(isolated).max()


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case):
    golden, config, _ = load(case)
    expected = json.loads(str(golden["config"]))
    written = config.to_hf()
    assert {name: expected[name] for name in written} == written
    assert EncoderConfig.from_hf(written) == config
