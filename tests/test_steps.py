"""Training steps: golden numbers, learning, randomness, clipping, and steps that are skipped."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm import parallel, steps

# Ids of the tiny vocabulary in conftest.py.
PAD, MASK = 1, 4
# With this learning rate and epsilon, AdamW without momentum is plain gradient descent to one part in 10^6.
GRADIENT_DESCENT = {"learning_rate": 1e6, "adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1e6}


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))


@pytest.mark.slow
def test_golden_first_step(encoder_step, encoder_state, uneven_rows):
    """A change of these numbers changes every run: find its cause before updating them."""
    state, metrics = encoder_step(parallel.replicate(encoder_state), parallel.shard(uneven_rows, shape=(1,)))
    metrics = parallel.first_replica(metrics)
    params = jax.tree.leaves(parallel.first_replica(state.params))
    assert metrics.sums.count == 21
    assert metrics.sums.correct == 0
    assert metrics.learning_rate == np.float32(0.01)
    # Processors differ in summation order and exponentials, by a few units of float32's 6e-8.
    np.testing.assert_allclose(metrics.sums.loss, 82.037895, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, 1.511894, rtol=1e-5)
    np.testing.assert_allclose(sum(np.abs(leaf).sum(dtype=float) for leaf in params), 122.619872, rtol=1e-5)
    assert parallel.first_replica(state.step) == 1


def losses_on_repeated_tokens(step, state):
    """Losses of thirty steps on eight rows, each of which repeats one token."""
    rows = np.repeat(np.arange(10, 18, dtype=np.int32)[:, None], 16, axis=1)
    tokens, state = parallel.shard(rows, shape=(1,)), parallel.replicate(state)
    losses = []
    for _ in range(30):
        state, metrics = step(state, tokens)
        sums = parallel.first_replica(metrics.sums)
        losses.append(sums.loss / sums.count)
    assert parallel.first_replica(state.step) == 30
    return losses


@pytest.mark.slow
def test_the_encoder_learns_which_tokens_occur(encoder_step, encoder_state):
    losses = losses_on_repeated_tokens(encoder_step, encoder_state)
    assert abs(losses[0] - np.log(50)) < 0.1  # A uniform guess over the vocabulary.
    assert losses[-1] < np.log(8) + 0.1  # A uniform guess over the eight tokens.


@pytest.mark.slow
def test_the_bag_of_tokens_learns_from_context(bag_step, bag_state):
    assert losses_on_repeated_tokens(bag_step, bag_state)[-1] < np.log(8) / 2


@pytest.mark.slow
def test_results_are_bitwise_equal_for_one_seed_and_differ_for_another(
    bag_step_config, bag_step, bag_state, init, train_step, uneven_rows
):
    other = dataclasses.replace(bag_step_config, seed=1)

    def run(step):
        state = parallel.replicate(bag_state)
        losses = []
        for _ in range(3):
            state, metrics = step(state, parallel.shard(uneven_rows, shape=(1,)))
            losses.append(float(parallel.first_replica(metrics.sums.loss)))
        return losses, parallel.first_replica(state)

    first = run(bag_step)
    jax.tree.map(np.testing.assert_array_equal, run(bag_step), first)
    # Masks differ between the three steps and between seeds, although the initial parameters are the same.
    assert len({*first[0], *run(train_step(other))[0]}) == 6
    jax.tree.map(np.testing.assert_array_equal, init(bag_step_config), bag_state)
    assert (init(other).params["word"]["embedding"] != bag_state.params["word"]["embedding"]).all()


def test_random_streams_differ(bag_step_config):
    keys = [bag_step_config.key(stream) for stream in (steps.INIT, steps.TRAIN_MASKS, steps.EVAL_MASKS, steps.DROPOUT)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 4


def test_masks_depend_on_the_step_number_only(bag_step, bag_state, uneven_rows):
    def loss(step):
        state = parallel.replicate(dataclasses.replace(bag_state, step=np.int32(step)))
        return float(parallel.first_replica(bag_step(state, parallel.shard(uneven_rows, shape=(1,)))[1].sums.loss))

    assert len({loss(step) for step in range(4)}) == 4
    assert loss(2) == loss(2)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_masks_differ_between_devices_microbatches_and_steps_only(make_step_config, init, train_step, dropout):
    # All tokens are masked, so masks are not random. All rows but one are padding, which is never predicted.
    step_config = make_step_config(dropout=dropout, masking={"mlm_probability": 1.0, "mask_replace_prob": 1.0})
    step, state = train_step(step_config), init(step_config)

    def loss(row, step_number=0):
        rows = np.ones((8, 16), np.int32)
        rows[row] = np.arange(10, 26)
        moved = parallel.replicate(dataclasses.replace(state, step=np.int32(step_number)))
        # 4 devices, 2 microbatches of 1 row.
        _, metrics = step(moved, parallel.shard(rows, shape=(2,)))
        metrics = parallel.first_replica(metrics)
        assert metrics.sums.count == 16
        return float(metrics.sums.loss)

    losses = [loss(row) for row in range(8)] + [loss(0, step_number=1)]
    assert losses == [loss(row) for row in range(8)] + [loss(0, step_number=1)]
    # Differences are above, or without dropout below, the rounding of sums taken in another order.
    gaps = np.diff(np.sort(losses)) / losses[0]
    assert gaps.min() > 1e-5 if dropout else gaps.max() < 1e-6


@pytest.mark.slow
def test_clipping_comes_after_the_division(make_step_config, bag_step, bag_state, train_step, uneven_rows):
    tokens = parallel.shard(uneven_rows, shape=(1,))
    metrics = parallel.first_replica(bag_step(parallel.replicate(bag_state), tokens)[1])
    assert metrics.sums.count > 10

    def update_norm(max_grad_norm):
        step_config = make_step_config(optimizer=GRADIENT_DESCENT | {"max_grad_norm": float(max_grad_norm)})
        state = steps.init_state(step_config, bag_state.params)
        new, after = train_step(step_config)(parallel.replicate(state), tokens)
        assert parallel.first_replica(after.grad_norm) == metrics.grad_norm  # The norm before clipping.
        return norm(jax.tree.map(np.subtract, parallel.first_replica(new.params), state.params))

    # A limit between the norms of the mean and of the sum: clipping the sum would shorten the update.
    np.testing.assert_allclose(update_norm(2.0 * metrics.grad_norm), metrics.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(update_norm(0.25 * metrics.grad_norm), 0.25 * metrics.grad_norm, rtol=1e-4)


def test_a_batch_of_padding_changes_the_step_number_only(bag_step, bag_state):
    padding = parallel.shard(np.ones((8, 16), np.int32), shape=(1,))
    new, metrics = bag_step(parallel.replicate(bag_state), padding)
    jax.tree.map(np.testing.assert_array_equal, parallel.first_replica(new.params), bag_state.params)
    metrics = parallel.first_replica(metrics)
    assert metrics.sums.count == metrics.sums.loss == metrics.grad_norm == 0
    assert parallel.first_replica(new.step) == 1


def one_step(step, state, rows):
    """The next state and the metrics, unstacked."""
    new, metrics = step(parallel.replicate(state), parallel.shard(rows, shape=(1,)))
    return parallel.first_replica(new), parallel.first_replica(metrics)


def assert_skipped(new, metrics, old):
    """Checks that the step number changed and nothing else did, bitwise."""
    assert metrics.skipped == 1.0
    jax.tree.map(np.testing.assert_array_equal, new, dataclasses.replace(old, step=old.step + 1))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_step_with_a_loss_that_is_not_finite_is_skipped(bag_step, bag_state, uneven_rows, value):
    params = {**bag_state.params, "Dense_0": {**bag_state.params["Dense_0"]}}
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"].at[7].set(value)
    broken = dataclasses.replace(bag_state, params=params)
    new, metrics = one_step(bag_step, broken, uneven_rows)
    assert not np.isfinite(metrics.sums.loss)
    assert_skipped(new, metrics, broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_one_bad_row_on_one_device_skips_the_step_on_all_devices_and_the_next_step_is_applied(
    make_step_config, bag_step, bag_state, train_step, uneven_rows, monkeypatch, broken
):
    real = steps.training_loss

    def poisoned(logits, labels, label_weights, **terms):
        loss, sums = real(logits, labels, label_weights, **terms)
        bad = jnp.any((labels == 49) & (label_weights > 0))
        if broken == "loss":
            return loss, sums.replace(loss=jnp.where(bad, jnp.nan, sums.loss))
        # The square root has no derivative at 0.
        return loss + jnp.sqrt(jnp.where(bad, 0.0 * jnp.sum(logits), 1.0)), sums

    good, bad = np.where(uneven_rows == 49, 48, uneven_rows), uneven_rows.copy()
    bad[1] = 49  # On the first device.
    with monkeypatch.context() as patch:
        patch.setattr(steps, "training_loss", poisoned)
        step = train_step(make_step_config(masking={"mlm_probability": 0.3}))
        skipped, metrics = one_step(step, bag_state, bad)
        assert np.isfinite(metrics.sums.loss) == (broken == "gradient")
        assert np.isfinite(metrics.grad_norm) == (broken == "loss")
        assert_skipped(skipped, metrics, bag_state)
        after, metrics = one_step(step, skipped, good)
    assert metrics.skipped == 0.0
    expected, _ = one_step(bag_step, dataclasses.replace(bag_state, step=np.int32(1)), good)
    # A different program, so equal up to rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, expected)
    assert after.update_stats.num_applied == 1


@pytest.mark.slow
def test_spikes_are_skipped_only_with_a_spike_factor(bag_step_config, bag_step, bag_state, train_step, uneven_rows):
    norm = one_step(bag_step, bag_state, uneven_rows)[1].grad_norm
    spike_step = train_step(dataclasses.replace(bag_step_config, spike_factor=3.0))

    def after(step, *, num_applied, mean):
        stats = steps.UpdateStats(num_applied=jnp.int32(num_applied), mean_grad_norm=jnp.float32(mean))
        state = dataclasses.replace(bag_state, update_stats=stats)
        return state, *one_step(step, state, uneven_rows)

    # Below the factor; before 100 steps were applied; without a factor.
    for step, num_applied, mean in (
        (spike_step, 100, norm / 2),
        (spike_step, 99, norm / 4),
        (bag_step, 100, norm / 1000),
    ):
        _, new, metrics = after(step, num_applied=num_applied, mean=mean)
        assert metrics.skipped == 0.0
        assert new.update_stats.num_applied == num_applied + 1
        np.testing.assert_allclose(new.update_stats.mean_grad_norm, mean + (norm - mean) / 100, rtol=1e-5)
    old, new, metrics = after(spike_step, num_applied=100, mean=norm / 4)
    assert_skipped(new, metrics, old)
    # The running mean starts with the first norm.
    _, new, _ = after(spike_step, num_applied=0, mean=0.0)
    np.testing.assert_allclose(new.update_stats.mean_grad_norm, norm, rtol=1e-5)


@pytest.mark.parametrize("empty", ["padding", "special tokens"])
def test_a_step_is_applied_when_two_of_four_devices_have_no_token_to_predict(
    encoder_step, encoder_state, uneven_rows, empty
):
    rows = uneven_rows.copy()
    rows[4:] = PAD
    if empty == "special tokens":
        rows[4:, :3] = (0, 2, MASK)
    new, metrics = one_step(encoder_step, encoder_state, rows)
    assert metrics.skipped == 0.0
    assert metrics.sums.count > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, metrics)))


def test_a_batch_without_tokens_to_predict_is_a_skipped_step(bag_step, bag_state):
    new, metrics = one_step(bag_step, bag_state, np.full((8, 16), PAD, np.int32))
    assert_skipped(new, metrics, bag_state)


@pytest.mark.slow
def test_the_moving_average_follows_the_parameters_and_not_the_skipped_steps(
    bag_step_config, init, train_step, uneven_rows
):
    config = dataclasses.replace(bag_step_config, ema_decay=0.9)
    step, state = train_step(config), init(config)
    expected = jax.tree.map(np.asarray, state.params)
    for number, decay in enumerate((1 / 10, 2 / 11, 3 / 12)):
        new, _ = one_step(step, state, uneven_rows)
        params = jax.tree.map(np.asarray, new.params)
        expected = jax.tree.map(lambda mean, param, d=decay: d * mean + (1 - d) * param, expected, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.ema_params, expected)
        assert new.update_stats.num_applied == number + 1
        assert new.eval_params is new.ema_params
        state, metrics = one_step(step, new, np.full((8, 16), PAD, np.int32))
        assert_skipped(state, metrics, new)
    late = dataclasses.replace(state, update_stats=state.update_stats.replace(num_applied=np.int32(1000)))
    new, _ = one_step(step, late, uneven_rows)
    expected = jax.tree.map(lambda mean, param: 0.9 * mean + 0.1 * param, late.ema_params, new.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.ema_params, expected)


@pytest.mark.slow
def test_the_rate_of_predicted_tokens_follows_the_step_number(bag_step_config, bag_state, train_step):
    rates = dataclasses.replace(
        bag_step_config,
        masking=dataclasses.replace(bag_step_config.masking, mlm_probability=1.0),
        mask_rate=lambda step: jnp.where(step < 5, 0.25, 1.0),
    )
    step = train_step(rates)
    rows = np.full((8, 16), 20, np.int32)
    for number, rate in ((0, 0.25), (5, 1.0)):
        _, metrics = one_step(step, dataclasses.replace(bag_state, step=np.int32(number)), rows)
        assert metrics.mask_counts.predicted == metrics.sums.count == rate * rows.size
        assert metrics.mask_counts.maskable == rows.size


def test_evaluation_has_its_own_masking(bag_step_config, bag_state):
    config = dataclasses.replace(
        bag_step_config, eval_masking=dataclasses.replace(bag_step_config.masking, mlm_probability=0.5)
    )
    rows = np.full((2, 16), 20, np.int32)
    for step_config, num_predicted in ((bag_step_config, 5), (config, 8)):
        key = step_config.key(steps.EVAL_MASKS)
        forward = functools.partial(steps.forward, step_config, rows_B=np.arange(2), mask_key=key)
        _, batch = jax.eval_shape(forward, bag_state.params, rows)
        assert batch.label_weights_BxK.shape == (2, num_predicted)
