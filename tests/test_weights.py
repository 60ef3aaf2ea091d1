"""Conversion of parameters from and to PyTorch: golden/roberta.npz, made by golden/make_roberta.py."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mlm.errors import UserError
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.models.hf import weights

GOLDEN = pathlib.Path(__file__).parent / "golden" / "roberta.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture
def config(golden):
    return EncoderConfig.from_hf(json.loads(str(golden["config"])))


@pytest.fixture
def tensors(golden):
    return {name[7:]: tensor for name, tensor in golden.items() if name.startswith("tensor/")}


@pytest.fixture
def params(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: MaskedLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes["params"])


def assert_same_bits(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == np.float32, name
        np.testing.assert_array_equal(actual[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)


def test_the_golden_file_is_small():
    assert GOLDEN.stat().st_size < 1_000_000


def test_conversion_from_pytorch_and_back_is_bitwise_identical(tensors, config):
    assert_same_bits(weights.to_hf(weights.from_hf(tensors, config), config), tensors)


def test_conversion_to_pytorch_and_back_is_bitwise_identical(params, config):
    back = weights.from_hf(weights.to_hf(params, config), config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_names_and_shapes_match_what_pytorch_saves(golden, params, config):
    ours = {name: list(tensor.shape) for name, tensor in weights.to_hf(params, config).items()}
    assert ours == json.loads(str(golden["saved_shapes"]))
    # state_dict() also has the second names of the tied decoder.
    tied = {"lm_head.decoder.weight": [97, 36], "lm_head.decoder.bias": [97]}
    assert {**ours, **tied} == json.loads(str(golden["state_dict_shapes"]))


def test_tensors_survive_a_safetensors_file(tensors, config, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(weights.to_hf(weights.from_hf(tensors, config), config), path)
    assert_same_bits(safetensors.numpy.load_file(path), tensors)


def test_to_hf_makes_no_implicit_transfers(params, config):
    params = jax.device_put(params)
    longer = config.replace(hidden_dropout_prob=0.3)  # A new config, for which nothing is cached.
    with jax.transfer_guard("disallow"):
        assert len(weights.to_hf(params, longer)) == 58


def test_tensors_of_older_versions_are_accepted(tensors, config):
    older = {
        **tensors,
        "lm_head.decoder.weight": tensors["roberta.embeddings.word_embeddings.weight"],
        "lm_head.decoder.bias": tensors["lm_head.bias"],
        "roberta.embeddings.position_ids": np.arange(21)[None],
        "roberta.pooler.dense.weight": np.zeros((36, 36), np.float32),
        "roberta.pooler.dense.bias": np.zeros(36, np.float32),
    }
    jax.tree.map(np.testing.assert_array_equal, weights.from_hf(older, config), weights.from_hf(tensors, config))


def test_half_precision_is_converted_to_float32(tensors, config):
    half = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    assert_same_bits(
        weights.to_hf(weights.from_hf(half, config), config),
        {name: tensor.astype(np.float32) for name, tensor in half.items()},
    )


def test_every_problem_is_listed(tensors, config):
    del tensors["lm_head.bias"]
    tensors["classifier.weight"] = np.zeros(3, np.float32)
    tensors["lm_head.dense.weight"] = np.zeros((36, 35), np.float32)
    tensors["lm_head.dense.bias"] = np.zeros(36, np.int8)
    tensors["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"] + 1
    with pytest.raises(UserError) as error:
        weights.from_hf(tensors, config)
    message = str(error.value)
    for part in (
        "missing: lm_head.bias;",
        "unexpected: classifier.weight;",
        "of the wrong shape: lm_head.dense.weight [36, 35] (expected [36, 36]);",
        "not floating-point: lm_head.dense.bias int8;",
        "different from the tensor they are tied to: lm_head.decoder.weight",
    ):
        assert part in message
    assert "\n" not in message


def test_long_list_is_abbreviated(config):
    with pytest.raises(UserError, match=r"missing: .* and 50 more; use") as error:
        weights.from_hf({}, config)
    assert len(str(error.value)) < 1000


def test_weights_of_another_depth_are_an_error(tensors, config):
    with pytest.raises(UserError, match=r"unexpected: roberta\.encoder\.layer\.2"):
        weights.from_hf(tensors, config.replace(num_hidden_layers=2))
    with pytest.raises(UserError, match=r"missing: roberta\.encoder\.layer\.3"):
        weights.from_hf(tensors, config.replace(num_hidden_layers=4))
