"""Attention's forms: by hand against autodiff, and against jax.nn.dot_product_attention."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.ops.attention import attend
from mlm.models.ops.dropout import kept

B, L, H, E = 3, 24, 2, 8
# Two documents and padding; one document; padding alone.
SEGMENTS = np.array([[1] * 10 + [2] * 9 + [0] * 5, [1] * 24, [0] * 24], np.int32)
VIEWS = [{"isolate": False}, {"isolate": True}, {"isolate": False, "window": 3}, {"isolate": True, "window": 5}]


@pytest.fixture(scope="module")
def arrays():
    draw = np.random.default_rng(0)
    return [jnp.asarray(2 * draw.normal(size=(B, L, H, E)), jnp.float32) for _ in range(4)]


def by_hand(query, key, value, *, isolate, window=None, rate=0.0, dropout_key=None):
    """Attention as it is written in the paper, dropped weights and all."""
    visible = SEGMENTS[:, None, :] == SEGMENTS[:, :, None] if isolate else SEGMENTS[:, None, :] > 0
    if window is not None:
        visible = visible & (np.abs(np.arange(L)[:, None] - np.arange(L)) <= window)
    scores = jnp.einsum("blhe,bmhe->bhlm", query, key) / np.sqrt(E)
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, np.finfo(np.float32).min))
    if dropout_key is not None:
        weights = jnp.where(kept(dropout_key, weights.shape, rate=rate), weights / (1 - rate), 0)
    return jnp.einsum("bhlm,bmhe->blhe", weights, value)


def output_and_gradients(function, arrays, **options):
    *inputs, cotangent = arrays

    @jax.jit
    def run(*inputs):
        output, backward = jax.vjp(functools.partial(function, **options), *inputs)
        # No loss depends on what padding sees.
        return output, backward(jnp.where(SEGMENTS[..., None, None] > 0, cotangent, 0).astype(output.dtype))

    return jax.tree.leaves(run(*inputs))


def assert_near(actual, wanted, *, bits):
    for array, exact in zip(actual, wanted, strict=True):
        difference = np.abs(np.asarray(array, np.float32) - np.asarray(exact, np.float32))
        assert difference.max() < 2.0**-bits * np.abs(np.asarray(exact, np.float32)).max()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_plain_form_and_its_gradient(arrays, view, rate):
    key = jax.random.key(5) if rate else None
    ours = output_and_gradients(
        attend, arrays, segments_BxM=jnp.asarray(SEGMENTS), dropout_rate=rate, dropout_key=key, **view
    )
    assert_near(ours, output_and_gradients(by_hand, arrays, rate=rate, dropout_key=key, **view), bits=19)


@pytest.mark.parametrize("view", VIEWS)
def test_xla_equals_plain(arrays, view):
    forms = [
        output_and_gradients(attend, arrays, segments_BxM=jnp.asarray(SEGMENTS), implementation=form, **view)
        for form in ("plain", "xla")
    ]
    assert_near(*forms, bits=19)


def test_forms_are_equal_to_bfloat16_rounding(arrays):
    half = [array.astype(jnp.bfloat16) for array in arrays]
    exact = output_and_gradients(attend, [x.astype(jnp.float32) for x in half], **VIEWS[1], segments_BxM=SEGMENTS)
    for form in ("plain", "xla"):
        rounded = output_and_gradients(attend, half, **VIEWS[1], segments_BxM=SEGMENTS, implementation=form)
        assert {array.dtype for array in rounded} == {jnp.dtype(jnp.bfloat16)}
        # Scores of up to 20 are rounded to 2^-9 of themselves.
        assert_near(rounded, exact, bits=4.5)


def test_dropped_weights_are_the_plain_forms(arrays):
    options = {"segments_BxM": SEGMENTS, "dropout_rate": 0.5, "dropout_key": jax.random.key(1), **VIEWS[0]}
    plain = output_and_gradients(attend, arrays, **options)
    for form in ("xla", "cudnn"):
        other = output_and_gradients(attend, arrays, implementation=form, **options)
        jax.tree.map(np.testing.assert_array_equal, other, plain)


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_handed_to_cudnn(monkeypatch, view):
    # Compiled for a GPU as far as it goes on a machine that has none: jax asks the GPU's libraries for their versions.
    library = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{library}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{library}.check_compute_capability", lambda capability: True)
    monkeypatch.setattr(f"{library}.is_cuda_compute_capability_equal", lambda capability: False)

    def total(query, key, value, segments):
        output = attend(query, key, value, segments_BxM=segments, implementation="cudnn", **view)
        return jnp.sum(output.astype(jnp.float32))

    array = jax.ShapeDtypeStruct((4, 128, 2, 64), jnp.bfloat16)
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(
        array, array, array, jax.ShapeDtypeStruct((4, 128), jnp.int32)
    )
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    # One document a row: of each the length. Otherwise a mask, which is added to the scores.
    kernel = "fmhaSoftmax" if view == {"isolate": False} else "fmhaScaleBiasSoftmax"
    assert re.findall(r"custom_call @__cudnn\$(\w+)\(", lowered) == [kernel, f"{kernel}Backward"]
