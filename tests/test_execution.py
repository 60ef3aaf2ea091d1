"""`Execution` changes speed and memory, and results by rounding only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from mlm import build
from mlm.models.block import Execution
from mlm.models.config import default_config
from mlm.models.encoder import MaskedLM
from mlm.settings import REMATS
from tests.tiny import settings_of

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
FAMILIES = {
    "roberta": {},
    "albert": {"embedding_size": 8},
    "modernbert": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
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


def loss_of(family, execution, *, dropout):
    """(parameters, seed of the dropout) -> loss."""
    model = MaskedLM(config_of(family, dropout), execution=execution)

    def loss(params, seed=0):
        key = jax.random.key(seed, impl="rbg")
        logits = model.apply({"params": params}, INPUTS, deterministic=False, rngs={"dropout": key})
        return jnp.mean(jnp.square(logits))

    return loss


def loss_and_gradients(family, execution, *, dropout):
    return jax.device_get(jax.jit(jax.value_and_grad(loss_of(family, execution, dropout=dropout)))(params_of(family)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_remat_changes_neither_loss_nor_gradients(family):
    dropout = 0.5  # What is computed again includes the masks.
    expected, expected_gradients = loss_and_gradients(family, Execution(remat="none"), dropout=dropout)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest)
    for remat in REMATS[1:]:
        found, gradients = loss_and_gradients(family, Execution(remat=remat), dropout=dropout)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        jax.tree.map(assert_close, gradients, expected_gradients)


@pytest.mark.slow
def test_dropout_follows_its_key_in_rematerialized_layers():
    loss = jax.jit(loss_of("roberta", Execution(remat="full"), dropout=0.5))
    first, again, other = (loss(params_of("roberta"), seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMATS[1:])
def test_parameters_do_not_depend_on_remat(remat):
    model = MaskedLM(config_of("roberta"), execution=Execution(remat=remat))
    params = jax.jit(model.init)(jax.random.key(0), INPUTS)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, params_of("roberta"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_full_remat_recomputes_the_matrix_products_of_every_layer(family):
    def num_products(remat):
        model = MaskedLM(config_of(family), execution=Execution(remat=remat))
        gradient = jax.make_jaxpr(jax.grad(lambda params: model.apply({"params": params}, INPUTS).sum()))
        return str(gradient(params_of(family))).count("dot_general")

    assert num_products("full") >= num_products("none") + 2 * 7


@pytest.mark.parametrize(
    ("backend", "dtype", "length", "expected"),
    [
        ("cpu", "float32", 1_024, Execution(attention="plain", remat="none")),
        ("tpu", "bfloat16", 1_023, Execution(attention="plain", remat="dots")),
        ("tpu", "bfloat16", 1_024, Execution(attention="splash", remat="dots")),
        ("gpu", "float32", 1_024, Execution(attention="plain", remat="dots")),
        ("gpu", "bfloat16", 128, Execution(attention="cudnn", remat="dots")),
    ],
)
def test_auto_depends_on_device_and_length(backend, dtype, length, expected):
    config = default.get_config()
    config.model.model_type = "modernbert"
    config.model.dtype = dtype
    config.data.max_seq_length = length
    assert build.resolve_execution(settings_of(config), backend=backend) == expected
    config.model.attention, config.model.remat = "xla", "full"
    assert build.resolve_execution(settings_of(config), backend=backend) == Execution("xla", "full")
