"""Activation functions against jax.nn's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.ops.activation import activation
from mlm.settings import ACTIVATIONS

REFERENCES = {
    "gelu_exact": lambda x: x * jax.scipy.stats.norm.cdf(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: jnp.maximum(x, 0),
    "silu": lambda x: x / (1 + jnp.exp(-x)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("save_input", [False, True])
def test_values_and_gradients_match_the_definition(name, save_input):
    values = jnp.linspace(-6.0, 6.0, 1000)
    reference = REFERENCES[ACTIVATIONS[name]]
    function = activation(name, save_input=save_input)
    np.testing.assert_allclose(function(values), reference(values), rtol=0, atol=1e-6)
    gradient, expected = (jax.grad(lambda x, f=f: f(x).sum())(values) for f in (function, reference))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


def test_save_input_saves_the_input_only():
    function = activation("gelu", save_input=True)
    _, backward = jax.vjp(function, jnp.ones(3))
    (saved,) = jax.tree.leaves(backward)
    np.testing.assert_array_equal(saved, jnp.ones(3))
