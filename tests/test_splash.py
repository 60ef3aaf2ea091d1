"""The flash kernel for TPUs, in interpret mode on a CPU, against plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.ops import splash
from mlm.models.ops.attention import attend

B, L, H, E = 2, 150, 2, 64
# Two documents and padding; one document.
SEGMENT_IDS = np.array([[1] * 70 + [2] * 50 + [0] * 30, [1] * L], np.int32)
POSITIONS = np.sort(np.random.default_rng(1).permuted(np.tile(np.arange(120), (B, 1)), axis=1)[:, :21]).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("isolate", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("positions", [pytest.param(None, marks=pytest.mark.slow), POSITIONS])
def test_matches_plain(monkeypatch, isolate, positions):
    monkeypatch.setattr(splash, "splash_attention", functools.partial(splash.splash_attention, interpret=True))
    draw = np.random.default_rng(0)
    num_queries = L if positions is None else positions.shape[1]
    query, key, value, cotangent = (
        jnp.asarray(draw.normal(size=(B, length, H, E)), jnp.float32) for length in (num_queries, L, L, num_queries)
    )
    # No loss depends on the outputs of padding.
    used = np.ones((B, num_queries), bool) if positions is not None else SEGMENT_IDS > 0
    used_BxQx1x1 = used[:, :, None, None]

    def output_and_gradients(implementation):
        run = functools.partial(
            attend,
            segment_ids_BxK=jnp.asarray(SEGMENT_IDS),
            isolate=isolate,
            query_positions_BxQ=None if positions is None else jnp.asarray(positions),
            implementation=implementation,
        )

        @jax.jit
        def forward_and_backward(query, key, value):
            output, backward = jax.vjp(run, query, key, value)
            return jnp.where(used_BxQx1x1, output, 0), *backward(jnp.where(used_BxQx1x1, cotangent, 0))

        return forward_and_backward(query, key, value)

    for found, expected in zip(output_and_gradients("splash"), output_and_gradients("plain"), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_windows_and_dropout_use_plain():
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.normal(size=(B, L, H, E)), jnp.float32) for _ in range(3))
    dropout = {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
    for options in ({"window": 10}, {"window": 140}, dropout):
        options |= {"segment_ids_BxK": jnp.asarray(SEGMENT_IDS), "isolate": True}
        found, expected = (
            attend(query, key, value, implementation=implementation, **options)
            for implementation in ("splash", "plain")
        )
        np.testing.assert_array_equal(found, expected)
