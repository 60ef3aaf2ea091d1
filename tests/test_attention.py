"""Implementations of attention, against plain jnp and each other."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.ops.attention import attend
from mlm.models.ops.dropout import dropout_keep_mask

B, L, H, E = 3, 24, 2, 8
# Two documents and padding; one document; padding alone.
SEGMENT_IDS = np.array([[1] * 10 + [2] * 9 + [0] * 5, [1] * 24, [0] * 24], np.int32)
# Windows of 3 and 5 are computed in blocks (of 6 and 10 queries: the second does not divide L), one of 6 in whole rows.
VISIBILITIES = [
    {"isolate": False},
    {"isolate": True},
    {"isolate": False, "window": 3},
    {"isolate": True, "window": 5},
    {"isolate": True, "window": 6},
]


@pytest.fixture(scope="module")
def arrays():
    draw = np.random.default_rng(0)
    return [jnp.asarray(2 * draw.normal(size=(B, L, H, E)), jnp.float32) for _ in range(4)]


def reference_attend(query, key, value, *, isolate, window=None, rate=0.0, dropout_key=None):
    """Attention as in the paper, with dropout of the weights."""
    visible = SEGMENT_IDS[:, None, :] == SEGMENT_IDS[:, :, None] if isolate else SEGMENT_IDS[:, None, :] > 0
    if window is not None:
        visible = visible & (np.abs(np.arange(L)[:, None] - np.arange(L)) <= window)
    scores = jnp.einsum("blhe,bmhe->bhlm", query, key) / np.sqrt(E)
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, np.finfo(np.float32).min))
    if dropout_key is not None:
        weights = jnp.where(dropout_keep_mask(dropout_key, weights.shape, rate=rate), weights / (1 - rate), 0)
    return jnp.einsum("bhlm,bmhe->blhe", weights, value)


def output_and_gradients(function, arrays, **options):
    *inputs, cotangent = arrays

    @jax.jit
    def run(*inputs):
        output, backward = jax.vjp(functools.partial(function, **options), *inputs)

        def without_padding(array):  # No loss depends on its outputs.
            return jnp.where(SEGMENT_IDS[..., None, None] > 0, array, 0).astype(output.dtype)

        return without_padding(output), backward(without_padding(cotangent))

    return jax.tree.leaves(run(*inputs))


def assert_close(actual, expected, *, bits):
    for array, exact in zip(actual, expected, strict=True):
        difference = np.abs(np.asarray(array, np.float32) - np.asarray(exact, np.float32))
        assert difference.max() < 2.0**-bits * np.abs(np.asarray(exact, np.float32)).max()


@pytest.mark.parametrize(
    ("rate", "visibility"),
    [*((0.0, visibility) for visibility in VISIBILITIES), *((0.25, VISIBILITIES[i]) for i in (0, 1, 4))],
)
def test_values_and_gradients_match_plain_jnp(arrays, visibility, rate):
    key = jax.random.key(5) if rate else None
    ours = output_and_gradients(
        attend, arrays, segment_ids_BxK=jnp.asarray(SEGMENT_IDS), dropout_rate=rate, dropout_key=key, **visibility
    )
    assert_close(
        ours, output_and_gradients(reference_attend, arrays, rate=rate, dropout_key=key, **visibility), bits=19
    )


@pytest.mark.slow
@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_xla_matches_plain(arrays, visibility):
    results = [
        output_and_gradients(
            attend, arrays, segment_ids_BxK=jnp.asarray(SEGMENT_IDS), implementation=implementation, **visibility
        )
        for implementation in ("plain", "xla")
    ]
    assert_close(*results, bits=19)


@pytest.mark.slow
def test_implementations_agree_to_bfloat16_rounding(arrays):
    half = [array.astype(jnp.bfloat16) for array in arrays]
    exact = output_and_gradients(
        attend, [x.astype(jnp.float32) for x in half], **VISIBILITIES[1], segment_ids_BxK=SEGMENT_IDS
    )
    for implementation in ("plain", "xla"):
        rounded = output_and_gradients(
            attend, half, **VISIBILITIES[1], segment_ids_BxK=SEGMENT_IDS, implementation=implementation
        )
        assert {array.dtype for array in rounded} == {jnp.dtype(jnp.bfloat16)}
        # Scores of up to 20 are rounded to 2^-9 of themselves.
        assert_close(rounded, exact, bits=4.5)


def test_dropout_always_uses_plain(arrays):
    options = {"segment_ids_BxK": SEGMENT_IDS, "dropout_rate": 0.5, "dropout_key": jax.random.key(1), **VISIBILITIES[0]}
    plain = output_and_gradients(attend, arrays, **options)
    for implementation in ("xla", "cudnn"):
        other = output_and_gradients(attend, arrays, implementation=implementation, **options)
        jax.tree.map(np.testing.assert_array_equal, other, plain)


@pytest.mark.slow
def test_dropout_in_blocks(arrays):
    # One-hot values: the output is the weights. Each is dropped, or divided by 1 - rate.
    rate, options = 0.25, {"segment_ids_BxK": SEGMENT_IDS, "isolate": False, "window": 3}
    query, key, *_ = arrays
    one_hot = jnp.broadcast_to(jnp.eye(L)[None, :, None, :], (B, L, H, L))
    weights = attend(query, key, one_hot, **options)
    dropped, again = (
        attend(query, key, one_hot, dropout_rate=rate, dropout_key=jax.random.key(1), **options) for _ in range(2)
    )
    np.testing.assert_array_equal(dropped, again)
    weights, dropped = (np.asarray(array)[:2] for array in (weights, dropped))
    kept = dropped > 0
    np.testing.assert_allclose(dropped[kept], weights[kept] / (1 - rate), rtol=1e-6)
    # 24 rows x 2 heads x up to 7 keys, twice: four standard deviations are 0.07.
    assert abs(kept[weights > 0].mean() - (1 - rate)) < 0.07
    assert not np.array_equal(kept[0, :, 0], kept[0, :, 1])


@pytest.mark.slow
def test_window_costs_grow_linearly_with_the_row():
    def cost(length: int, window: int | None):
        array = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

        def total(query, key, value):
            segments = jnp.ones((1, length), jnp.int32)
            return jnp.sum(attend(query, key, value, segment_ids_BxK=segments, isolate=True, window=window))

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(array, array, array).lower().compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    flops, temporaries = zip(*(cost(length, 16) for length in (512, 1024, 2048)), strict=True)
    for costs in (flops, temporaries):
        assert costs[1] / costs[0] == pytest.approx(2, rel=0.02)
        assert costs[2] / costs[1] == pytest.approx(2, rel=0.02)
    # All keys instead of 4 * window: 32 times as many.
    full_flops, full_temporaries = cost(2048, None)
    assert full_flops > 25 * flops[2]
    assert full_temporaries > 15 * temporaries[2]


@pytest.mark.parametrize("num_positions", [None, 21])
@pytest.mark.parametrize("length", [128, 127])
@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_arguments_of_cudnn(monkeypatch, visibility, length, num_positions):
    # Lowered for a GPU on a machine without one: jax asks the GPU's libraries for their versions. It refuses odd
    # numbers of queries or keys.
    library = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{library}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{library}.check_compute_capability", lambda capability: True)
    monkeypatch.setattr(f"{library}.is_cuda_compute_capability_equal", lambda capability: False)
    positions = None if num_positions is None else jnp.tile(jnp.arange(num_positions), (4, 1))

    def total(query, key, value, segments):
        output = attend(
            query,
            key,
            value,
            segment_ids_BxK=segments,
            query_positions_BxQ=positions,
            implementation="cudnn",
            **visibility,
        )
        assert output.shape == query.shape
        return jnp.sum(output.astype(jnp.float32))

    query, array = (jax.ShapeDtypeStruct((4, n, 2, 64), jnp.bfloat16) for n in (num_positions or length, length))
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(
        query, array, array, jax.ShapeDtypeStruct((4, length), jnp.int32)
    )
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    # One document per row: only its length. Otherwise a mask, which is added to the scores.
    kernel = "fmhaSoftmax" if visibility == {"isolate": False} else "fmhaScaleBiasSoftmax"
    assert re.findall(r"custom_call @__cudnn\$(\w+)\(", lowered) == [kernel, f"{kernel}Backward"]
