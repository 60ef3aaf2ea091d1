"""Dropout masks: rate, independence, and the same mask forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.ops.dropout import dropout, dropout_keep_mask

SHAPE = (64, 8, 32, 64)  # a million values
SIGMAS = 5


@pytest.fixture(scope="module")
def masks():
    """Masks of two keys with a rate of 0.1, scaled to mean 0 and variance 1."""
    run = jax.jit(lambda key: dropout_keep_mask(key, SHAPE, rate=0.1))
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(2)]
    return [(np.asarray(run(key)).ravel() - 0.9) / 0.3 for key in keys]


def assert_uncorrelated(x, y):
    assert abs(np.mean(x * y)) < SIGMAS / len(x) ** 0.5


def test_rate(masks):
    for mask in masks:
        assert abs(mask.mean()) < SIGMAS / len(mask) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 63, 64, 65, 2048, 16384])
def test_masks_of_different_values_are_uncorrelated(masks, lag):
    assert_uncorrelated(masks[0][lag:], masks[0][:-lag])


def test_sums_of_rows_and_columns_are_binomial(masks):
    grid = masks[0].reshape(-1, SHAPE[-1])
    for axis in (0, 1):
        variance = grid.sum(axis).var() / grid.shape[axis]
        assert abs(variance - 1) < SIGMAS * (2 / grid.shape[1 - axis]) ** 0.5


@pytest.mark.slow
def test_masks_of_different_keys_are_uncorrelated(masks):
    assert_uncorrelated(*masks)
    # Also of keys that differ by 1 in one word.
    data = np.asarray(jax.random.key_data(jax.random.key(1)))
    first = dropout_keep_mask(jax.random.wrap_key_data(data), (2**16,), rate=0.5)
    for step in ((0, 1), (1, 0)):
        other = dropout_keep_mask(jax.random.wrap_key_data(data + np.asarray(step, np.uint32)), (2**16,), rate=0.5)
        assert_uncorrelated(2.0 * np.asarray(first) - 1, 2.0 * np.asarray(other) - 1)


def test_mask_is_the_hash_of_the_index():
    """On every device and in every version, so that a resumed run has the same masks."""
    key = jax.random.key(7)
    first, second = map(int, jax.random.key_data(key))
    mask = np.asarray(dropout_keep_mask(key, (2, 3, 4), rate=0.5)).ravel()
    for index, found in enumerate(mask):
        x = (first + index) % 2**32
        x = (x ^ x >> 17) * 0xED5AD4BB % 2**32 ^ second
        x = (x ^ x >> 11) * 0xAC4C1B51 % 2**32
        x = (x ^ x >> 15) * 0x31848BAB % 2**32
        assert found == ((x ^ x >> 14) >= 2**31)
    assert 0 < mask.sum() < 24


@pytest.mark.slow
def test_values_and_gradient_have_the_same_mask():
    key, values = jax.random.key(3), jnp.linspace(1.0, 2.0, 1000)
    dropped, backward = jax.vjp(lambda x: dropout(x, rate=0.25, key=key), values)
    mask = np.asarray(dropout_keep_mask(key, values.shape, rate=0.25))
    assert 650 < mask.sum() < 850
    np.testing.assert_array_equal(dropped, np.where(mask, values / np.float32(0.75), 0))
    np.testing.assert_array_equal(backward(values)[0], dropped)
    assert dropout(values.astype(jnp.bfloat16), rate=0.25, key=key).dtype == jnp.bfloat16


def test_gradient_matches_jax():
    key, values = jax.random.key(3), jnp.linspace(1.0, 2.0, 1000)
    keep_mask = dropout_keep_mask(key, values.shape, rate=0.25)
    ours = jax.grad(lambda x: jnp.sum(jnp.sin(dropout(x, rate=0.25, key=key))))(values)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.where(keep_mask, x / 0.75, 0.0))))(values)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_rate_zero_or_no_key_changes_nothing():
    values = jnp.arange(5.0)
    assert dropout(values, rate=0.5, key=None) is values
    assert dropout(values, rate=0.0, key=jax.random.key(0)) is values
