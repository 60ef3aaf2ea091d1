"""Masks of dropout: how often, how independent, and the same forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.ops.dropout import dropout, kept

SHAPE = (64, 8, 32, 64)  # a million values
SIGMAS = 5


@pytest.fixture(scope="module")
def masks():
    """Under two keys, zero mean and unit variance for a rate of 0.1."""
    run = jax.jit(lambda key: kept(key, SHAPE, rate=0.1))
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(2)]
    return [(np.asarray(run(key)).ravel() - 0.9) / 0.3 for key in keys]


def assert_uncorrelated(x, y):
    assert abs(np.mean(x * y)) < SIGMAS / len(x) ** 0.5


def test_the_share_that_is_dropped(masks):
    for mask in masks:
        assert abs(mask.mean()) < SIGMAS / len(mask) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 63, 64, 65, 2048, 16384])
def test_values_are_dropped_independently(masks, lag):
    assert_uncorrelated(masks[0][lag:], masks[0][:-lag])


def test_rows_and_columns_have_binomial_numbers(masks):
    grid = masks[0].reshape(-1, SHAPE[-1])
    for axis in (0, 1):
        variance = grid.sum(axis).var() / grid.shape[axis]
        assert abs(variance - 1) < SIGMAS * (2 / grid.shape[1 - axis]) ** 0.5


def test_keys_give_other_masks(masks):
    assert_uncorrelated(*masks)
    # Also those that lie next to each other, in either word.
    data = np.asarray(jax.random.key_data(jax.random.key(1)))
    first = kept(jax.random.wrap_key_data(data), (2**16,), rate=0.5)
    for step in ((0, 1), (1, 0)):
        other = kept(jax.random.wrap_key_data(data + np.asarray(step, np.uint32)), (2**16,), rate=0.5)
        assert_uncorrelated(2.0 * np.asarray(first) - 1, 2.0 * np.asarray(other) - 1)


def test_a_mask_is_the_hash_of_places_in_order():
    """On every device and in every version: a run that goes on must drop what it would have dropped."""
    key = jax.random.key(7)
    first, second = map(int, jax.random.key_data(key))
    mask = np.asarray(kept(key, (2, 3, 4), rate=0.5)).ravel()
    for place, found in enumerate(mask):
        x = (first + place) % 2**32
        x = (x ^ x >> 17) * 0xED5AD4BB % 2**32 ^ second
        x = (x ^ x >> 11) * 0xAC4C1B51 % 2**32
        x = (x ^ x >> 15) * 0x31848BAB % 2**32
        assert found == ((x ^ x >> 14) >= 2**31)
    assert 0 < mask.sum() < 24


def test_the_gradient_is_dropped_like_the_values():
    key, values = jax.random.key(3), jnp.linspace(1.0, 2.0, 1000)
    dropped, backward = jax.vjp(lambda x: dropout(x, rate=0.25, key=key), values)
    mask = np.asarray(kept(key, values.shape, rate=0.25))
    assert 650 < mask.sum() < 850
    np.testing.assert_array_equal(dropped, np.where(mask, values / np.float32(0.75), 0))
    np.testing.assert_array_equal(backward(values)[0], dropped)
    assert dropout(values.astype(jnp.bfloat16), rate=0.25, key=key).dtype == jnp.bfloat16


def test_rate_zero_and_no_key_change_nothing():
    values = jnp.arange(5.0)
    assert dropout(values, rate=0.5, key=None) is values
    assert dropout(values, rate=0.0, key=jax.random.key(0)) is values
