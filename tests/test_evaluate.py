"""Evaluation gives the same metrics for every number of devices and every batch size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm import parallel, steps
from mlm.evaluate import Evaluator, unigram_log_probs
from mlm.loss import masked_cross_entropy

SPECIAL = (0, 1, 2, 3, 4)
ROWS = 21  # not divisible by 4 devices


@pytest.fixture(scope="module")
def rows():
    rows = np.random.default_rng(3).integers(5, 50, (ROWS, 16)).astype(np.int32)
    rows[::3, 5:] = 1
    return rows


@pytest.fixture(scope="module")
def log_probs():
    counts = np.random.default_rng(4).integers(0, 1000, 50)
    return unigram_log_probs(counts, special_ids=SPECIAL)


@pytest.fixture(scope="module")
def eval_step(bag_step_config):
    step = functools.partial(steps.eval_step, step_config=bag_step_config, axis_name=parallel.AXIS)
    return parallel.data_parallel(step)


@pytest.fixture(scope="module")
def expected_metrics(bag_step_config, bag_state, rows, log_probs):
    """The metrics from all rows in one batch on one device."""
    logits, batch = steps.forward(
        bag_step_config,
        bag_state.params,
        jnp.asarray(rows),
        rows_B=jnp.arange(ROWS),
        mask_key=bag_step_config.key(steps.EVAL_MASKS),
    )
    sums = jax.device_get(masked_cross_entropy(logits, batch.labels_BxK, batch.label_weights_BxK))
    labels = np.asarray(batch.labels_BxK)[np.asarray(batch.label_weights_BxK) == 1]
    assert sums.count == len(labels)
    return {
        "eval/loss": sums.loss / sums.count,
        "eval/accuracy": sums.correct / sums.count,
        "eval/perplexity": np.exp(sums.loss / sums.count),
        "eval/unigram_loss": -np.mean([log_probs[label] for label in labels], dtype=np.float64),
    }


@pytest.mark.slow
@pytest.mark.parametrize("per_device_batch_size", [1, 2, 8])
def test_metrics_do_not_depend_on_the_batch_size(
    eval_step, bag_state, rows, log_probs, expected_metrics, per_device_batch_size
):
    evaluator = Evaluator(eval_step, rows, per_device_batch_size=per_device_batch_size, pad_id=1)
    params = parallel.replicate(bag_state.params)
    with jax.transfer_guard("disallow"):
        metrics = evaluator(params, log_probs)
    assert metrics.keys() == expected_metrics.keys()
    # Rounding of a sum of a few hundred float32 numbers.
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    assert metrics["eval/accuracy"] == expected_metrics["eval/accuracy"] > 0  # Counts are exact.
    assert all(type(value) is float for value in metrics.values())
    # A second evaluation gives the same bits.
    assert evaluator(params, log_probs) == metrics


@pytest.mark.slow
def test_each_source_has_its_own_loss(eval_step, bag_step_config, bag_state, rows, log_probs, expected_metrics):
    """Masks do not depend on the split into sources, so a source's loss is that of its rows among all."""
    counts = {"wiki": 6, "a/b": 14, "one": 1}
    evaluator = Evaluator(eval_step, rows, per_device_batch_size=2, pad_id=1, counts=counts)
    metrics = evaluator(parallel.replicate(bag_state.params), log_probs)
    assert metrics.keys() == expected_metrics.keys() | {f"eval/{name}/loss" for name in counts}
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    logits, batch = steps.forward(
        bag_step_config,
        bag_state.params,
        jnp.asarray(rows),
        rows_B=jnp.arange(ROWS),
        mask_key=bag_step_config.key(steps.EVAL_MASKS),
    )
    log_probs_BxKxV = np.asarray(jax.nn.log_softmax(logits), np.float64)
    losses_BxK = -np.take_along_axis(log_probs_BxKxV, np.asarray(batch.labels_BxK)[:, :, None], axis=2)[:, :, 0]
    label_weights_BxK = np.asarray(batch.label_weights_BxK)
    first = 0
    for name, count in counts.items():
        own = slice(first, first + count)
        loss = (losses_BxK[own] * label_weights_BxK[own]).sum() / label_weights_BxK[own].sum()
        np.testing.assert_allclose(metrics[f"eval/{name}/loss"], loss, rtol=1e-5)
        first += count


def test_unigram_log_probs_equal_add_one_smoothing():
    counts = np.array([7, 0, 90, 3, 5])
    log_probs = unigram_log_probs(counts, special_ids=(0, 4))
    assert log_probs.dtype == np.float32
    # One is added to each of the three other counts: 1, 91 and 4 of 96.
    np.testing.assert_allclose(log_probs[1:4], np.log(np.array([1, 91, 4]) / 96), rtol=1e-6)
    np.testing.assert_array_equal(log_probs[[0, 4]], 0)
    np.testing.assert_array_equal(counts, [7, 0, 90, 3, 5])
