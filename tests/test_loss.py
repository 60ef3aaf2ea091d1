"""masked_cross_entropy against plain NumPy and plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.loss import masked_cross_entropy, training_loss

B, K, V = 3, 5, 11


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (B, K, V)).astype(np.float32)
    labels = rng.integers(0, V, (B, K)).astype(np.int32)
    labels[:, 0] = logits[:, 0].argmax(-1)  # Correct predictions, the first of which has weight 0.
    weights = (rng.random((B, K)) < 0.6).astype(np.float32)
    return logits, labels, weights


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference_loss(logits, labels, weights):
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * weights)


def reference_correct(logits, labels, weights):
    return jnp.sum((jnp.argmax(logits, axis=-1) == labels) * weights)


def test_sums_match_numpy(batch):
    logits, labels, weights = batch
    sums = masked_cross_entropy(*batch)
    losses = -np.take_along_axis(log_softmax(logits), labels[..., None], -1)[..., 0]
    # 2^-24 relative to the largest term, for each of 15 terms.
    np.testing.assert_allclose(sums.loss, losses[weights == 1].sum(), rtol=2e-6)
    assert sums.correct == (logits.argmax(-1) == labels)[weights == 1].sum() > 0
    assert sums.count == weights.sum() < B * K


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_match_plain_jnp(batch, dtype):
    logits, labels, weights = batch
    logits = jnp.asarray(logits, dtype).at[1, 2].set(1.0)  # Ties: the smallest id counts as predicted.
    sums = masked_cross_entropy(logits, labels, weights)
    np.testing.assert_allclose(sums.loss, reference_loss(logits.astype(jnp.float32), labels, weights), rtol=2e-6)
    assert sums.correct == reference_correct(logits, labels, weights)
    grad = jax.grad(lambda x: masked_cross_entropy(x, labels, weights).loss)(logits)
    expected = jax.grad(lambda x: reference_loss(x.astype(jnp.float32), labels, weights))(logits)
    assert grad.dtype == dtype
    np.testing.assert_allclose(
        grad.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=4 * float(jnp.finfo(dtype).eps)
    )


def test_gradient_is_softmax_minus_one_hot_where_the_weight_is_one(batch):
    logits, labels, weights = batch
    grad = jax.grad(lambda x: masked_cross_entropy(x, labels, weights).loss)(jnp.asarray(logits))
    expected = (np.exp(log_softmax(logits)) - np.eye(V)[labels]) * weights[..., None]
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(grad)[weights == 0], 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("keys", [{"z_loss": 0.1}, {"label_smoothing": 0.2}, {"z_loss": 0.05, "label_smoothing": 0.1}])
def test_further_terms_change_the_gradient_and_not_the_reported_loss(batch, keys, dtype):
    logits, labels, weights = batch
    logits = jnp.asarray(logits, dtype)

    def reference(logits):
        logits = logits.astype(jnp.float32)
        smoothing = keys.get("label_smoothing", 0.0)
        target = (1 - smoothing) * jax.nn.one_hot(labels, V) + smoothing / V
        losses = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
        losses += keys.get("z_loss", 0.0) * jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.sum(losses * weights)

    (value, sums), grad = jax.value_and_grad(
        lambda logits: training_loss(logits, labels, weights, **keys), has_aux=True
    )(logits)
    expected, expected_grad = jax.value_and_grad(reference)(logits)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(
        grad.astype(jnp.float32), expected_grad.astype(jnp.float32), rtol=0, atol=8 * float(jnp.finfo(dtype).eps)
    )
    plain = masked_cross_entropy(logits, labels, weights)
    assert jax.tree.leaves(sums) == jax.tree.leaves(plain)
    assert abs(value - plain.loss) > 0.1


@pytest.mark.slow
def test_large_logits_do_not_overflow():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    sums = masked_cross_entropy(logits, jnp.array([[2]]), jnp.ones((1, 1)))
    assert sums.loss == 2e4


def test_sums_are_zero_without_predicted_tokens(batch):
    logits, labels, _ = batch
    value = jax.value_and_grad(lambda x: masked_cross_entropy(x, labels, jnp.zeros((B, K))).loss)
    loss, grad = value(jnp.asarray(logits))
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)
    sums = masked_cross_entropy(logits, labels, np.zeros((B, K), np.float32))
    assert sums.correct == sums.count == 0


def test_nan_is_not_hidden_by_a_weight_of_zero(batch):
    logits, labels, weights = batch
    logits[weights == 0] = np.nan
    assert np.isnan(masked_cross_entropy(logits, labels, weights).loss)


@pytest.mark.slow
def test_sums_of_parts_add_up(batch):
    total = masked_cross_entropy(*batch)
    parts = [masked_cross_entropy(*(array[i : i + 1] for array in batch)) for i in range(B)]
    added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    np.testing.assert_allclose(jax.tree.leaves(added), jax.tree.leaves(total), rtol=1e-6)
