"""Products with parameters: the gradients by hand are those of JAX, but for what JAX rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mlm.models.block import _materialize
from mlm.models.ops.dense import Dense, add_bias, decode, product
from mlm.models.ops.gather import embedding_lookup, gather_tokens

DRAW = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(DRAW.normal(size=shape), dtype)


def gradients(function, *arguments):
    """Of the parameters and the inputs, under an output gradient that is not all ones."""
    output, backward = jax.vjp(function, *arguments)
    return output, *backward(jnp.asarray(np.random.default_rng(1).normal(size=output.shape), output.dtype))


def primitives(function, *arguments):
    """Names and operand dtypes of all operations of a function and its gradient."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name, {str(operand.aval.dtype) for operand in equation.invars}
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(lambda *arrays: gradients(function, *arrays))(*arguments).jaxpr))


WAYS = {
    "product": (product, jnp.dot, (draw(2, 5, 6), draw(6, 4))),
    "bias": (add_bias, lambda x, bias: x + bias[None, None], (draw(2, 5, 6), draw(6))),
    "bias of heads": (add_bias, lambda x, bias: x + bias[None, None], (draw(2, 5, 3, 4), draw(3, 4))),
    "decode": (decode, lambda x, table: x @ table.T, (draw(2, 5, 6), draw(9, 6))),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_jaxs(way):
    ours, jaxs, arguments = WAYS[way]
    for found, wanted in zip(gradients(ours, *arguments), gradients(jaxs, *arguments), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_gradients_are_not_rounded(way):
    ours, _, (inputs, parameter) = WAYS[way]
    half = inputs.astype(jnp.bfloat16)
    output, d_inputs, d_parameter = gradients(ours, half, parameter)
    assert d_inputs.dtype == jnp.bfloat16
    assert output.dtype == (jnp.float32 if way == "decode" else jnp.bfloat16)
    # What went in, in float64: the gradient is linear in it. Logits' gradients are rounded, as in training.
    d_output = np.random.default_rng(1).normal(size=output.shape)
    d_output = np.asarray(jnp.asarray(jnp.asarray(d_output, output.dtype), jnp.bfloat16), np.float64)
    rows = np.asarray(half, np.float64).reshape(-1, half.shape[-1])
    exact = {
        "product": lambda: rows.T @ d_output.reshape(-1, d_output.shape[-1]),
        "decode": lambda: d_output.reshape(-1, d_output.shape[-1]).T @ rows,
        "bias": lambda: d_output.sum((0, 1)),
        "bias of heads": lambda: d_output.sum((0, 1)),
    }[way]()
    np.testing.assert_allclose(d_parameter, exact, rtol=1e-5, atol=1e-5)
    assert np.any(np.asarray(d_parameter.astype(jnp.bfloat16), np.float32) != d_parameter)


def test_products_in_bfloat16_have_bfloat16_operands():
    for ours, _, (inputs, parameter) in (WAYS["product"], WAYS["decode"]):
        found = primitives(ours, inputs.astype(jnp.bfloat16), parameter)
        assert [dtypes for name, dtypes in found if name == "dot_general"] == 3 * [{"bfloat16"}]


def test_dense_has_linens_parameters():
    layer = Dense(4, dtype=jnp.float32, kernel_init=jax.nn.initializers.normal(0.1))
    params = layer.init(jax.random.key(0), draw(2, 6))["params"]
    assert jax.tree.map(jnp.shape, params) == {"kernel": (6, 4), "bias": (4,)}
    inputs = draw(3, 6)
    params["bias"] = draw(4)
    np.testing.assert_allclose(
        layer.apply({"params": params}, inputs), inputs @ params["kernel"] + params["bias"][None], rtol=1e-5
    )


def test_what_is_written_has_no_barrier_before_its_gradient():
    names = [name for name, _ in primitives(_materialize, draw(3))]
    assert names.count("optimization_barrier") == 1


# Some places more than once, some never.
PLACES = jnp.asarray([[0, 2, 2], [4, 0, 4]], jnp.int32)


def test_chosen_tokens():
    hidden = draw(2, 5, 6)
    by_jax = lambda hidden: jnp.take_along_axis(hidden, PLACES[..., None], axis=1)  # noqa: E731
    found = gradients(lambda hidden: gather_tokens(hidden, PLACES), hidden)
    for array, wanted in zip(found, gradients(by_jax, hidden), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-6)
    assert not [
        name for name, _ in primitives(lambda hidden: gather_tokens(hidden, PLACES), hidden) if "scatter" in name
    ]
    assert np.isnan(gather_tokens(hidden, PLACES.at[0, 0].set(5))[0, 0]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_entries_of_a_table(dtype):
    table = draw(7, 6)
    found = gradients(lambda table: embedding_lookup(table, PLACES, dtype), table)
    # Rounded before it comes to the table, and not again.
    by_jax = gradients(lambda table: table[PLACES].astype(dtype), table)
    for array, wanted in zip(found, by_jax, strict=True):
        assert array.dtype == wanted.dtype
        np.testing.assert_allclose(array, wanted, rtol=1e-6)
    names = [name for name, _ in primitives(lambda table: embedding_lookup(table, PLACES, dtype), table)]
    assert not [name for name in names if "scatter" in name]
    assert np.isnan(embedding_lookup(table, PLACES.at[0, 0].set(7), jnp.float32)[0, 0]).all()
