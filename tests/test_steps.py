"""One update, many updates, and where their randomness comes from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm import parallel, steps

# At this learning rate and epsilon AdamW without momentum is plain gradient descent, to one part in 10^6.
GRADIENT_DESCENT = {
    "schedule": lambda count: 1e6,
    "adam_beta1": 0.0,
    "adam_beta2": 0.0,
    "adam_epsilon": 1e6,
    "weight_decay": 0.0,
}


@functools.cache  # Compiled once for all tests that have the task.
def train_step(task):
    return parallel.data_parallel(functools.partial(steps.train_step, task=task, axis_name=parallel.AXIS))


def init(task):
    return steps.init_state(task, steps.init_params(task, length=16))


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))


def test_golden_first_update(encoder_task, encoder_state, uneven_rows):
    """A number that moves here moves every run: find out why before writing the new one down."""
    step = train_step(encoder_task)
    state, metrics = step(parallel.replicate(encoder_state), parallel.shard(uneven_rows, shape=(1,)))
    metrics = parallel.first_replica(metrics)
    params = jax.tree.leaves(parallel.first_replica(state.params))
    assert metrics.sums.count == 21
    assert metrics.sums.correct == 0
    assert metrics.learning_rate == np.float32(0.01)
    # Processors differ in the order of sums and in their exponentials: a few units of float32's 6e-8.
    np.testing.assert_allclose(metrics.sums.loss / 21, 0, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, 0, rtol=1e-5)
    np.testing.assert_allclose(sum(np.abs(leaf).sum() for leaf in params), 0, rtol=1e-5)
    assert parallel.first_replica(state.step) == 1


def losses_on_repeated_tokens(task, state):
    """Thirty updates on eight rows, each of which repeats a token of its own."""
    rows = np.repeat(np.arange(10, 18, dtype=np.int32)[:, None], 16, axis=1)
    tokens, step, state = parallel.shard(rows, shape=(1,)), train_step(task), parallel.replicate(state)
    losses = []
    for _ in range(30):
        state, metrics = step(state, tokens)
        sums = parallel.first_replica(metrics.sums)
        losses.append(sums.loss / sums.count)
    assert parallel.first_replica(state.step) == 30
    return losses


def test_the_encoder_learns_which_tokens_occur(encoder_task, encoder_state):
    losses = losses_on_repeated_tokens(encoder_task, encoder_state)
    assert abs(losses[0] - np.log(50)) < 0.1  # An even guess over the vocabulary.
    assert losses[-1] < np.log(8) + 0.1  # An even guess over the eight tokens.


def test_context_is_learned(make_task):
    task = make_task()
    assert losses_on_repeated_tokens(task, init(task))[-1] < np.log(8) / 2


def test_the_same_seed_gives_the_same_bits_another_does_not(make_task, uneven_rows):
    def run(seed):
        task = make_task(seed=seed, dropout=0.2)
        step, state = train_step(task), parallel.replicate(init(task))
        losses = []
        for _ in range(3):
            state, metrics = step(state, parallel.shard(uneven_rows, shape=(1,)))
            losses.append(parallel.first_replica(metrics.sums.loss))
        return losses, parallel.first_replica(state)

    first, again, other = run(1), run(1), run(2)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not set(first[0]) & set(other[0])
    # The first step's masks too, not the parameters alone.
    batch = [
        steps.forward(
            task, init(task).params, uneven_rows, rows_B=jnp.arange(8), mask_key=task.key(steps.TRAIN_MASKS)
        )[1]
        for task in (make_task(seed=1), make_task(seed=2))
    ]
    assert (batch[0].inputs_BxL != batch[1].inputs_BxL).any()


def test_random_streams_differ(make_task):
    task = make_task()
    keys = [task.key(stream) for stream in (steps.INIT, steps.TRAIN_MASKS, steps.EVAL_MASKS, steps.DROPOUT)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_differs_by_device_pass_and_step_and_by_nothing_else(make_task, dropout):
    # Every token is masked: masks have nothing random. All rows but one are padding and count for nothing.
    task = make_task(dropout=dropout, masking={"mlm_probability": 1.0, "mask_token_share": 1.0})
    step, state = train_step(task), init(task)

    def loss(place, updates=0):
        rows = np.ones((8, 16), np.int32)
        rows[place] = np.arange(10, 26)
        moved = parallel.replicate(dataclasses.replace(state, step=jnp.int32(updates)))
        # 4 devices, 2 passes of 1 row.
        _, metrics = step(moved, parallel.shard(rows, shape=(2,)))
        metrics = parallel.first_replica(metrics)
        assert metrics.sums.count == 16
        return float(metrics.sums.loss)

    losses = [loss(place) for place in range(8)] + [loss(0, updates=1)]
    assert losses == [loss(place) for place in range(8)] + [loss(0, updates=1)]
    assert len(set(losses)) == (9 if dropout else 1)


def test_masks_change_with_the_step(make_task, uneven_rows):
    task = make_task()
    step, state = train_step(task), init(task)
    counts = []
    for updates in range(4):
        moved = parallel.replicate(dataclasses.replace(state, step=jnp.int32(updates)))
        _, metrics = step(moved, parallel.shard(uneven_rows, shape=(1,)))
        counts.append(float(parallel.first_replica(metrics.sums.loss)))
    assert len(set(counts)) == 4


def test_clipping_comes_after_the_division(make_task, uneven_rows):
    free = make_task(optimizer=GRADIENT_DESCENT | {"max_grad_norm": 0.0})
    state = init(free)
    tokens = parallel.shard(uneven_rows, shape=(1,))

    def update(task):
        new, metrics = train_step(task)(parallel.replicate(steps.init_state(task, state.params)), tokens)
        delta = jax.tree.map(np.subtract, parallel.first_replica(new.params), state.params)
        return norm(delta), parallel.first_replica(metrics.grad_norm)

    # Without clipping the update's norm is the gradient's.
    length, grad_norm = update(free)
    np.testing.assert_allclose(length, grad_norm, rtol=1e-4)
    # A limit over the mean's norm, under the sum's: to clip the sum would make the update 10 times too short.
    loose = 2.0 * grad_norm
    length, reported = update(make_task(optimizer=GRADIENT_DESCENT | {"max_grad_norm": loose}))
    np.testing.assert_allclose(length, grad_norm, rtol=1e-4)
    # A limit under it: the update has this norm, and the metric is of before.
    length, reported = update(make_task(optimizer=GRADIENT_DESCENT | {"max_grad_norm": grad_norm / 4}))
    np.testing.assert_allclose(length, grad_norm / 4, rtol=1e-4)
    assert reported == grad_norm


def test_a_batch_of_padding_changes_nothing_but_the_step(make_task):
    task = make_task(optimizer={"weight_decay": 0.0})
    state = init(task)
    new, metrics = train_step(task)(
        parallel.replicate(state), parallel.shard(np.ones((8, 16), np.int32), shape=(1,))
    )
    jax.tree.map(np.testing.assert_array_equal, parallel.first_replica(new.params), state.params)
    metrics = parallel.first_replica(metrics)
    assert metrics.sums.count == metrics.sums.loss == metrics.grad_norm == 0
