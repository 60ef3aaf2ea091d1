"""Matrix products and lookups: gradients match those of JAX, but are not rounded to bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mlm.models.block import _materialize
from mlm.models.ops.dense import Dense, add_bias, matmul, qkv_projection, tied_logits
from mlm.models.ops.gather import embedding_lookup, gather_tokens, sorted_sum, word_lookup

DRAW = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(DRAW.normal(size=shape), dtype)


def gradients(function, *arguments):
    """Output and gradients, for an output gradient that is not all ones."""
    output, backward = jax.vjp(function, *arguments)
    return output, *backward(jnp.asarray(np.random.default_rng(1).normal(size=output.shape), output.dtype))


def primitives(function, *arguments):
    """Names and operand dtypes of the operations of a function and its gradient."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name, {str(operand.aval.dtype) for operand in equation.invars}
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(lambda *arrays: gradients(function, *arrays))(*arguments).jaxpr))


OPS = {
    "matmul": (matmul, jnp.dot, (draw(2, 5, 6), draw(6, 4))),
    "bias": (add_bias, lambda x, bias: x + bias[None, None], (draw(2, 5, 6), draw(6))),
    "bias of heads": (add_bias, lambda x, bias: x + bias[None, None], (draw(2, 5, 3, 4), draw(3, 4))),
    "tied_logits": (tied_logits, lambda x, table: x @ table.T, (draw(2, 5, 6), draw(9, 6))),
}


@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients_match_jax(op):
    ours, reference, arguments = OPS[op]
    for found, expected in zip(gradients(ours, *arguments), gradients(reference, *arguments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_parameters_are_not_rounded(op):
    ours, _, (inputs, parameter) = OPS[op]
    half = inputs.astype(jnp.bfloat16)
    output, d_inputs, d_parameter = gradients(ours, half, parameter)
    assert d_inputs.dtype == jnp.bfloat16
    assert output.dtype == (jnp.float32 if op == "tied_logits" else jnp.bfloat16)
    # The exact gradient in float64. Gradients of logits are rounded to bfloat16 first, as in training.
    d_output = np.random.default_rng(1).normal(size=output.shape)
    d_output = np.asarray(jnp.asarray(jnp.asarray(d_output, output.dtype), jnp.bfloat16), np.float64)
    rows = np.asarray(half, np.float64).reshape(-1, half.shape[-1])
    exact = {
        "matmul": lambda: rows.T @ d_output.reshape(-1, d_output.shape[-1]),
        "tied_logits": lambda: d_output.reshape(-1, d_output.shape[-1]).T @ rows,
        "bias": lambda: d_output.sum((0, 1)),
        "bias of heads": lambda: d_output.sum((0, 1)),
    }[op]()
    np.testing.assert_allclose(d_parameter, exact, rtol=1e-5, atol=1e-5)
    assert np.any(np.asarray(d_parameter.astype(jnp.bfloat16), np.float32) != d_parameter)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_projections", [1, 2, 3])
def test_qkv_projection_matches_plain_jnp(dtype, num_projections):
    hidden, weight = draw(2, 5, 6, dtype=dtype), draw(num_projections, 4, 3, 6)
    cotangents = [draw(2, 5, 4, 3, dtype=dtype) for _ in range(num_projections)]

    def reference(hidden, weight):
        return [jnp.einsum("BLD,HED->BLHE", hidden.astype(jnp.float32), w) for w in weight]

    outputs, backward = jax.vjp(qkv_projection, hidden, weight)
    reference_outputs, reference_backward = jax.vjp(reference, hidden, weight)
    found = [*outputs, *backward(cotangents)]
    exact = [*reference_outputs, *reference_backward([x.astype(jnp.float32) for x in cotangents])]
    assert {array.dtype for array in outputs} == {jnp.dtype(dtype)}
    assert found[-1].dtype == jnp.float32  # The weight's gradient.
    for array, expected in zip(found, exact, strict=True):
        atol = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
        np.testing.assert_allclose(array.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=atol)


def test_products_in_bfloat16_have_bfloat16_operands():
    for ours, _, (inputs, parameter) in (OPS["matmul"], OPS["tied_logits"]):
        found = primitives(ours, inputs.astype(jnp.bfloat16), parameter)
        assert [dtypes for name, dtypes in found if name == "dot_general"] == 3 * [{"bfloat16"}]


@pytest.mark.slow
def test_dense_has_the_parameters_of_linen():
    layer = Dense(4, dtype=jnp.float32, kernel_init=jax.nn.initializers.normal(0.1))
    params = layer.init(jax.random.key(0), draw(2, 6))["params"]
    assert jax.tree.map(jnp.shape, params) == {"kernel": (6, 4), "bias": (4,)}
    inputs = draw(3, 6)
    params["bias"] = draw(4)
    np.testing.assert_allclose(
        layer.apply({"params": params}, inputs), inputs @ params["kernel"] + params["bias"][None], rtol=1e-5
    )


def test_gradient_of_materialize_has_no_barrier():
    names = [name for name, _ in primitives(_materialize, draw(3))]
    assert names.count("optimization_barrier") == 1


# Some positions more than once, some never.
POSITIONS = jnp.asarray([[0, 2, 2], [4, 0, 4]], jnp.int32)


@pytest.mark.slow
def test_gather_tokens_matches_jax():
    hidden = draw(2, 5, 6)
    reference = lambda hidden: jnp.take_along_axis(hidden, POSITIONS[..., None], axis=1)  # noqa: E731
    found = gradients(lambda hidden: gather_tokens(hidden, POSITIONS), hidden)
    for array, expected in zip(found, gradients(reference, hidden), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-6)
    assert not [
        name for name, _ in primitives(lambda hidden: gather_tokens(hidden, POSITIONS), hidden) if "scatter" in name
    ]
    assert np.isnan(gather_tokens(hidden, POSITIONS.at[0, 0].set(5))[0, 0]).all()


@pytest.mark.parametrize("lookup", [embedding_lookup, word_lookup])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lookups_match_jax(lookup, dtype):
    table = draw(7, 6)
    found = gradients(lambda table: lookup(table, POSITIONS, dtype), table)
    expected = gradients(lambda table: table[POSITIONS].astype(dtype), table)
    for array, exact in zip(found, expected, strict=True):
        assert array.dtype == exact.dtype
        np.testing.assert_allclose(array, exact, rtol=1e-6)
    if lookup is embedding_lookup:
        names = [name for name, _ in primitives(lambda table: lookup(table, POSITIONS, dtype), table)]
        assert not [name for name in names if "scatter" in name]
    assert np.isnan(lookup(table, POSITIONS.at[0, 0].set(7), jnp.float32)[0, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ids",
    [
        np.random.default_rng(0).zipf(1.3, 1000) % 50,  # few ids fill several groups each
        np.random.default_rng(0).permutation(500),  # none twice
        np.full(100, 3),
        np.repeat(np.arange(4), 16),  # ids change exactly between groups
        np.array([7]),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sorted_sum(ids, dtype):
    # On GPUs the gradient of the word embeddings; it runs anywhere.
    rows = draw(len(ids), 6, dtype=dtype)
    exact = np.zeros((500, 6))
    np.add.at(exact, ids, np.asarray(rows, np.float64))
    for group_size in (16, 128):
        summed = jax.jit(functools.partial(sorted_sum, table_size=500, group_size=group_size))
        found = summed(jnp.asarray(ids, jnp.int32), rows)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_only_gpus_sort():
    ids, table = jnp.zeros((2, 3), jnp.int32), jnp.zeros((5, 4))

    def total(table):
        return word_lookup(table, ids, jnp.bfloat16).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total)).trace(table)
    for platform, sorts in (("cpu", False), ("tpu", False), ("cuda", True)):
        assert ("stablehlo.sort" in traced.lower(lowering_platforms=(platform,)).as_text()) == sorts
