"""The loss's sums against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.loss import masked_cross_entropy

B, K, V = 3, 5, 11


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (B, K, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, K)).astype(np.int32)
    targets[:, 0] = logits[:, 0].argmax(-1)  # These are right, the first of them not in use.
    weights = (rng.random((B, K)) < 0.6).astype(np.float32)
    return logits, targets, weights


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_sums_are_those_of_numpy(batch):
    logits, targets, weights = batch
    sums = masked_cross_entropy(*batch)
    losses = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    # 2^-24 relative to the largest term, for each of 15 terms.
    np.testing.assert_allclose(sums.loss, losses[weights == 1].sum(), rtol=2e-6)
    assert sums.correct == (logits.argmax(-1) == targets)[weights == 1].sum() > 0
    assert sums.count == weights.sum() < B * K


def test_gradient_is_softmax_minus_target_where_in_use(batch):
    logits, targets, weights = batch
    grad = jax.grad(lambda x: masked_cross_entropy(x, targets, weights).loss)(jnp.asarray(logits))
    expected = (np.exp(log_softmax(logits)) - np.eye(V)[targets]) * weights[..., None]
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(grad)[weights == 0], 0)


def test_large_logits_do_not_overflow():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    sums = masked_cross_entropy(logits, jnp.array([[2]]), jnp.ones((1, 1)))
    assert sums.loss == 2e4


def test_no_slot_in_use_gives_zeros(batch):
    logits, targets, _ = batch
    value = jax.value_and_grad(lambda x: masked_cross_entropy(x, targets, jnp.zeros((B, K))).loss)
    loss, grad = value(jnp.asarray(logits))
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)
    sums = masked_cross_entropy(logits, targets, np.zeros((B, K), np.float32))
    assert sums.correct == sums.count == 0


def test_nan_is_not_hidden_by_a_weight_of_zero(batch):
    logits, targets, weights = batch
    logits[weights == 0] = np.nan
    assert np.isnan(masked_cross_entropy(logits, targets, weights).loss)


def test_sums_of_parts_add_up(batch):
    whole = masked_cross_entropy(*batch)
    parts = [masked_cross_entropy(*(array[i : i + 1] for array in batch)) for i in range(B)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    np.testing.assert_allclose(jax.tree.leaves(total), jax.tree.leaves(whole), rtol=1e-6)
