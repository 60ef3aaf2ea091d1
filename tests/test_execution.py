"""How layers are computed changes no model: remat, scan, and what is compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from mlm import build
from mlm.models.config import default_config
from mlm.models.encoder import MaskedLM
from mlm.models.execution import REMATS, Execution, _repeats
from tests.tiny import settings_of

PLAIN = Execution()
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
FAMILIES = {
    "roberta": {},
    "albert": {"embedding_size": 8},
    "modernbert": {"num_hidden_layers": 7, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}
INPUTS = np.random.default_rng(0).integers(3, 40, (2, 12)).astype(np.int32)


@functools.cache
def config_of(family, dropout=0.0):
    config = default_config(family).replace(**SHAPE | FAMILIES[family])
    rates = [field.name for field in dataclasses.fields(config) if field.name.endswith(("_dropout_prob", "_dropout"))]
    known = [name for name in rates if getattr(config, name) is not None and name in config.to_hf()]
    return config.replace(**dict.fromkeys(known, dropout))


@functools.cache
def params_of(family):
    return jax.jit(MaskedLM(config_of(family)).init)(jax.random.key(0), INPUTS)["params"]


def gradients(family, execution, *, dropout=0.0, key=0):
    model = MaskedLM(config_of(family, dropout), execution=execution)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = model.apply(
            {"params": params}, INPUTS, deterministic=False, rngs={"dropout": jax.random.key(key, impl="rbg")}
        )
        return jnp.mean(jnp.square(logits))

    return jax.device_get(loss(params_of(family)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("remat", REMATS)
def test_the_same_loss_and_gradients(family, remat):
    wanted, wanted_gradients = gradients(family, PLAIN)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted_gradients))
    for scan in (False, True):
        if (remat, scan) == ("none", False):
            continue
        found, found_gradients = gradients(family, Execution(remat=remat, scan_layers=scan))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest)
        jax.tree.map(near, found_gradients, wanted_gradients)


def test_parameters_begin_the_same_and_have_the_same_names():
    for execution in (Execution(remat="dots"), Execution(remat="full", scan_layers=True)):
        model = MaskedLM(config_of("roberta"), execution=execution)
        params = jax.jit(model.init)(jax.random.key(0), INPUTS)["params"]
        jax.tree.map(np.testing.assert_array_equal, params, params_of("roberta"))


@pytest.mark.slow
def test_dropout_of_a_scanned_layer_follows_its_key_and_differs_by_layer():
    scanned = Execution(scan_layers=True)
    first, again, other = (gradients("roberta", scanned, dropout=0.5, key=key)[0] for key in (0, 0, 1))
    assert first == again != other
    # Full rematerialization drops the same again: else the gradient would be another function's.
    full = gradients("roberta", Execution(remat="full", scan_layers=True), dropout=0.5)
    unrolled = gradients("roberta", Execution(remat="full"), dropout=0.5)
    for found in (full, unrolled):
        np.testing.assert_allclose(found[0], first, rtol=1e-5)


def test_a_scan_is_traced_once_for_all_layers():
    def products(layers, execution):
        model = MaskedLM(config_of("roberta").replace(num_hidden_layers=layers), execution=execution)
        params = jax.eval_shape(model.init, jax.random.key(0), INPUTS)["params"]
        return str(jax.make_jaxpr(lambda p: model.apply({"params": p}, INPUTS))(params)).count("dot_general")

    scanned = Execution(scan_layers=True)
    assert products(3, scanned) == products(12, scanned)
    assert products(12, PLAIN) == products(3, PLAIN) + 9 * 8  # Three of heads, two of attention, three others.


def test_what_repeats_itself():
    assert _repeats(config_of("roberta").layers) == (0, 1)
    # The first layer has no norm before attention; then two local ones and a global one.
    assert _repeats(config_of("modernbert").layers) == (1, 3)
    assert _repeats(config_of("roberta").replace(num_hidden_layers=1).layers) == (0, 1)


@pytest.mark.parametrize(
    ("backend", "dtype", "expected"),
    [
        ("cpu", "float32", Execution(attention="plain", remat="none")),
        ("tpu", "bfloat16", Execution(attention="plain", remat="dots")),
        ("gpu", "float32", Execution(attention="plain", remat="dots")),
        ("gpu", "bfloat16", Execution(attention="cudnn", remat="dots")),
    ],
)
def test_auto_is_by_device(backend, dtype, expected):
    config = default.get_config()
    config.model.dtype = dtype
    assert build.open_execution(settings_of(config), backend=backend) == expected
    config.model.attention, config.model.remat, config.model.scan_layers = "xla", "full", True
    assert build.open_execution(settings_of(config), backend=backend) == Execution("xla", "full", True)
