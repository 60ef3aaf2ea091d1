"""Every family of encoders against PyTorch's: golden/<case>.npz, made by golden/make_families.py."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models import weights
from mlm.models.config import EncoderConfig, default_config
from mlm.models.encoder import MaskedLM
from mlm.models.families import FAMILIES

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


@functools.cache
def load(case):
    with np.load(GOLDEN / f"{case}.npz") as file:
        golden = dict(file)
    config = EncoderConfig.from_hf(json.loads(str(golden["config"])))
    tensors = {name[7:]: tensor for name, tensor in golden.items() if name.startswith("tensor/")}
    return golden, config, tensors


@functools.partial(jax.jit, static_argnames="config")
def loss_and_logits(params, inputs, token_types, labels, *, config):
    logits = MaskedLM(config).apply({"params": params}, inputs, token_types_BxL=token_types)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, :, None], axis=2)[:, :, 0]
    return -(log_probs * (labels >= 0)).sum() / (labels >= 0).sum(), logits


def arguments(case):
    golden, config, tensors = load(case)
    return weights.from_hf(tensors, config), golden["inputs"], golden.get("token_types"), golden["labels"], config


def test_every_family_has_a_case():
    assert {load(case)[1].model_type for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss_are_those_of_pytorch(case):
    golden, config, _ = load(case)
    params, inputs, token_types, labels, _ = arguments(case)
    loss, logits = loss_and_logits(params, inputs, token_types, labels, config=config)
    # Nothing is ever read from padding.
    is_token = inputs != config.pad_token_id
    wanted = golden["logits"][is_token]
    print(case, np.abs(logits[is_token] - wanted).max() / np.abs(wanted).max())
    np.testing.assert_allclose(logits[is_token], wanted, rtol=0, atol=2.0**-18 * np.abs(wanted).max())
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_pytorch_to_ours_and_back_is_bit_identical(case):
    golden, config, tensors = load(case)
    back = weights.to_hf(weights.from_hf(tensors, config), config)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults(model_type):
    golden = next(golden for golden, config, _ in map(load, CASES) if config.model_type == model_type)
    theirs = json.loads(str(golden["default_config"]))
    ours = default_config(model_type)
    assert EncoderConfig.from_hf(theirs) == ours
    assert EncoderConfig.from_hf({"model_type": model_type}) == ours


@pytest.mark.parametrize("case", CASES)
def test_config(case):
    golden, config, _ = load(case)
    theirs = json.loads(str(golden["config"]))
    ours = config.to_hf()
    assert {name: theirs[name] for name in ours} == ours
    assert EncoderConfig.from_hf(ours) == config
