"""The encoder against transformers' PyTorch model (golden/roberta.npz, made by golden/make_roberta.py); its config."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.errors import UserError
from mlm.models.config import EncoderConfig, default_config
from mlm.models.encoder import MaskedLM
from mlm.models.hf import weights
from mlm.models.ops import attention, dropout

B, L, PAD = 5, 17, 3  # Shape and padding id of the golden file.


@functools.partial(jax.jit, static_argnames=("config", "dtype", "deterministic"))
def apply(params, inputs, *, config, positions=None, dtype=jnp.float32, deterministic=True, key=0):
    return MaskedLM(config, dtype=dtype).apply(
        {"params": params},
        inputs,
        positions_BxK=positions,
        deterministic=deterministic,
        rngs={"dropout": jax.random.key(key, impl="rbg")},  # compiles faster than threefry
    )


@pytest.fixture(autouse=True)
def _no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(pathlib.Path(__file__).parent / "golden" / "roberta.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def config(golden):
    return EncoderConfig.from_hf(json.loads(str(golden["config"])))


@pytest.fixture(scope="module")
def params(golden, config):
    tensors = {name[7:]: tensor for name, tensor in golden.items() if name.startswith("tensor/")}
    return weights.from_hf(tensors, config)


# float32 has 24 bits; three layers lose about five of them.
def assert_close(actual, expected, *, bits=19):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2.0**-bits * np.abs(expected).max())


@pytest.mark.slow
def test_logits_match_pytorch(golden, config, params):
    logits = apply(params, golden["inputs"], config=config)
    assert logits.dtype == jnp.float32
    assert_close(logits, golden["logits"])


@pytest.fixture(scope="module")
def gradients(golden, config, params):
    labels = golden["labels"]
    row, column = np.nonzero(labels >= 0)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        logits = MaskedLM(config).apply({"params": params}, golden["inputs"])
        return -jax.nn.log_softmax(logits)[row, column, labels[row, column]].mean()

    loss, gradients = mean_loss(params)
    assert_close(loss, golden["loss"])
    return gradients


@pytest.mark.slow
def test_gradients_match_pytorch(golden, config, gradients):
    gradients = weights.to_hf(gradients, config)
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Relative to the largest of all: a key's bias does not change the softmax, so its gradient is rounding noise.
        expected = golden[f"gradient/{name}"]
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=2.0**-19 * largest, err_msg=name)


def test_padding_embeddings_get_no_gradient(gradients):
    # In PyTorch because of padding_idx; here because neither attention nor loss reads padding.
    gradient_PxD = gradients["embeddings"]["position"]["embedding"]
    assert np.flatnonzero(np.any(gradient_PxD, axis=1)).tolist() == list(range(PAD + 1, PAD + 1 + L))


def test_head_runs_on_the_given_positions_only(golden, config, params):
    inputs, positions = golden["inputs"], np.array([[0, 16, 3], [10, 2, 2], [4, 5, 6], [16, 0, 1], [0, 0, 0]])
    logits = apply(params, inputs, config=config, positions=positions)
    assert_close(logits, np.take_along_axis(golden["logits"], positions[:, :, None], axis=1))

    all_logits = f"f32[{B},{L},{config.vocab_size}]"
    lower = functools.partial(jax.make_jaxpr(functools.partial(apply, config=config)), params, inputs)
    assert all_logits in str(lower())
    assert all_logits not in str(lower(positions=positions))


@pytest.mark.slow
def test_padding_does_not_change_logits(golden, config, params):
    # Row 1 is eleven tokens, then padding.
    shorter = apply(params, golden["inputs"][1:2, :11], config=config)
    assert_close(shorter, golden["logits"][1:2, :11])


def test_row_of_padding_only_is_finite(config, params):
    assert np.isfinite(apply(params, np.full((B, L), PAD, np.int32), config=config)).all()


def test_dropout_sites_match_transformers(golden, config, params, monkeypatch):
    config = config.replace(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    calls = []

    def record(key, shape, *, rate):
        calls.append((rate, shape))
        return jnp.ones(shape, bool)

    monkeypatch.setattr(dropout, "dropout_keep_mask", record)
    monkeypatch.setattr(attention, "dropout_keep_mask", record)
    jax.eval_shape(lambda: apply(params, golden["inputs"], config=config, deterministic=False))
    hidden, weights_ = (0.25, (B, L, 36)), (0.5, (B, 4, L, L))
    assert calls == [hidden] + [weights_, hidden, hidden] * config.num_hidden_layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_follows_its_key(name, golden, config, params):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    run = functools.partial(apply, params, golden["inputs"], config=config.replace(**{**off, name: 0.5}))
    first, second = run(deterministic=False, key=0), run(deterministic=False, key=1)
    np.testing.assert_array_equal(first, run(deterministic=False, key=0))
    # Without row 4, whose only token may have the same attention with and without dropout.
    assert np.mean(first[:4] != second[:4]) > 0.999
    assert np.mean(first[:4] != golden["logits"][:4]) > 0.999


@pytest.mark.slow
def test_dropout_at_rate_zero_changes_nothing(golden, config, params):
    config = config.replace(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    run = functools.partial(apply, params, golden["inputs"], config=config)
    training, evaluation = (jax.make_jaxpr(functools.partial(run, deterministic=d))() for d in (False, True))
    assert str(training) == str(evaluation)


@pytest.mark.slow
def test_initialization_matches_transformers(golden, config):
    config = config.replace(initializer_range=0.05, num_hidden_layers=1)
    params = jax.jit(MaskedLM(config).init)(jax.random.key(2, impl="rbg"), golden["inputs"])["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    zero_rows = json.loads(str(golden["initial_zero_rows"]))
    for name, tensor in weights.to_hf(params, config).items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name.lower():
            assert (tensor == 1).all(), name
        else:
            rows = np.flatnonzero(~tensor.any(axis=1)).tolist()
            assert rows == zero_rows.get(name, []), name
            values = np.delete(tensor, rows, axis=0)
            # Five standard errors of the mean and the standard deviation of normal draws.
            assert abs(values.mean()) < 5 * 0.05 / values.size**0.5, name
            assert abs(values.std() - 0.05) < 5 * 0.05 / (2 * values.size) ** 0.5, name


@pytest.mark.slow
def test_bfloat16_has_float32_parameters_and_logits(golden, config, params):
    logits = apply(params, golden["inputs"], config=config, dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    # bfloat16 rounds to 2^-9 of a value, about sixty times in a row.
    error = np.std(logits - golden["logits"]) / np.std(golden["logits"])
    assert 2**-12 < error < 2**-9 * 60**0.5

    model = MaskedLM(config, dtype=jnp.bfloat16)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), golden["inputs"]))
    gradients = jax.eval_shape(
        jax.grad(lambda p: apply(p, golden["inputs"], config=config, dtype=jnp.bfloat16).sum()), params
    )
    for tree in (variables, gradients):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}


def test_rows_longer_than_the_positions_are_an_error(config, params):
    assert config.max_seq_length == L
    with pytest.raises(UserError, match=r"max_position_embeddings=21: allows sequences of at most 17 tokens, not 18"):
        apply(params, np.zeros((1, L + 1), np.int32), config=config)


def test_ids_past_the_vocabulary_give_nan(golden, config, params):
    inputs = golden["inputs"].copy()
    inputs[0, 3] = config.vocab_size
    logits = apply(params, inputs, config=config)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1:]).all()


# The config.json of FacebookAI/roberta-base on the hub.
ROBERTA_BASE = {
    "architectures": ["RobertaForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}


def test_config_of_roberta_base():
    config = EncoderConfig.from_hf(ROBERTA_BASE)
    assert config == default_config("roberta").replace(
        layer_norm_eps=1e-5, max_position_embeddings=514, type_vocab_size=1
    )
    assert config.max_seq_length == 512
    assert config.to_hf().items() >= ROBERTA_BASE.items()
    assert EncoderConfig.from_hf(config.to_hf()) == config
    assert len({config, EncoderConfig.from_hf(ROBERTA_BASE)}) == 1  # Hashable, as static arguments of jax.jit must be.


def test_config_defaults_match_transformers(golden):
    theirs = json.loads(str(golden["default_config"]))
    assert EncoderConfig.from_hf(theirs) == default_config("roberta")
    assert EncoderConfig.from_hf({"model_type": "roberta"}) == default_config("roberta")
    ours = default_config("roberta").to_hf()
    del ours["architectures"], ours["dtype"]
    assert {name: theirs[name] for name in ours} == ours


def test_config_to_hf_matches_what_transformers_saves(golden):
    theirs = json.loads(str(golden["config"]))
    ours = EncoderConfig.from_hf(theirs).to_hf()
    assert {name: theirs[name] for name in ours} == ours
    # transformers also writes unsupported features, which are off, and its version.
    assert set(theirs) - set(ours) == {
        "add_cross_attention", "classifier_dropout", "is_decoder", "transformers_version", "use_cache",
    }  # fmt: skip


@pytest.mark.parametrize(
    "extra",
    [
        {"torch_dtype": "float16", "use_cache": False, "_name_or_path": "a/b", "id2label": {"0": "LABEL_0"}},
        {"position_embedding_type": "absolute", "is_decoder": False, "pruned_heads": {}},
        {"position_embedding_type": None, "quantization_config": None},
        {"unknown_1": None, "unknown_2": False, "unknown_3": [], "unknown_4": {}, "unknown_5": ""},
        {"hidden_dropout_prob": 0.1},
    ],
)
def test_config_fields_that_are_ignored(extra):
    assert EncoderConfig.from_hf({**ROBERTA_BASE, **extra}) == EncoderConfig.from_hf(ROBERTA_BASE)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("model_type", "gpt2", "must be one of roberta"),
        ("model_type", None, "must be one of roberta"),
        ("model_type", ["roberta"], "must be one of roberta"),
        ("position_embedding_type", "relative_key", "'absolute'"),
        ("is_decoder", True, "False"),
        ("add_cross_attention", True, "False"),
        ("is_encoder_decoder", True, "False"),
        ("pruned_heads", {"0": [1]}, "{}"),
        ("quantization_config", {"bits": 4}, "None"),
        ("hidden_act", "relu6", "gelu"),
        ("hidden_act", "gelu_python", "gelu"),
        ("tie_word_embeddings", False, "true"),
        ("embedding_size", 128, "unknown"),
        ("global_attn_every_n_layers", 3, "unknown"),
        ("rope_theta", 0, "unknown"),
        ("hidden_size", 770, "multiple of num_attention_heads=12"),
        ("hidden_size", 0, "at least 1"),
        ("hidden_size", -768, "at least 1"),
        ("hidden_size", 768.0, "type int"),
        ("hidden_size", "768", "type int"),
        ("hidden_size", True, "type int"),
        ("num_hidden_layers", 0, "at least 1"),
        ("num_attention_heads", 0, "at least 1"),
        ("vocab_size", None, "type int"),
        ("type_vocab_size", 0, "at least 1"),
        ("hidden_dropout_prob", 1.0, "less than 1"),
        ("hidden_dropout_prob", float("nan"), "less than 1"),
        ("hidden_dropout_prob", "0.1", "type float"),
        ("attention_probs_dropout_prob", -0.1, "at least 0"),
        ("layer_norm_eps", 0.0, "positive"),
        ("layer_norm_eps", False, "type float"),
        ("initializer_range", float("inf"), "finite"),
        ("pad_token_id", None, "type int"),
        ("pad_token_id", 50265, "vocab_size - 1 = 50264"),
        ("pad_token_id", -1, "between 0 and"),
        ("eos_token_id", [2, 3], "type int or null"),
        ("max_position_embeddings", 2, "more than pad_token_id + 1 = 2"),
    ],
)
def test_invalid_config_fields_are_errors_with_their_name(field, value, reason):
    with pytest.raises(UserError) as error:
        EncoderConfig.from_hf({**ROBERTA_BASE, field: value})
    message = str(error.value)
    assert f"model config {field}={value!r}: " in message
    assert reason in message
    assert "\n" not in message


def test_config_without_model_type_is_an_error():
    with pytest.raises(UserError, match="model_type is missing"):
        EncoderConfig.from_hf({"hidden_size": 768})
    with pytest.raises(UserError, match="must be one of roberta"):
        default_config("robert")


def test_replace_suggests_the_nearest_field():
    with pytest.raises(UserError, match="unknown field hiden_size; did you mean hidden_size"):
        default_config("roberta").replace(hiden_size=12)
    with pytest.raises(UserError, match="unknown field xyzzy; known: model_type, vocab_size"):
        default_config("roberta").replace(xyzzy=12)
    with pytest.raises(UserError, match="hidden_size=770"):
        default_config("roberta").replace(hidden_size=770)
