"""Steps do not depend on the number of devices and microbatches; how arrays get to the devices and back."""

import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm import parallel, startup, steps
from mlm.errors import UserError
from mlm.loss import masked_cross_entropy
from mlm.run.checkpoint import CorruptCheckpointError


def assert_near(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), actual, expected)


def run_steps(step_config, state, tokens_DxAxBxL, number):
    """Parameters and metrics after each of `number` steps on the same rows, on D devices with A microbatches."""
    devices = jax.devices()[: len(tokens_DxAxBxL)]
    step = jax.pmap(
        functools.partial(steps.train_step, step_config=step_config, axis_name=parallel.AXIS),
        axis_name=parallel.AXIS,
        devices=devices,
        donate_argnums=(0,),
    )
    sharding = jax.NamedSharding(jax.sharding.Mesh(np.array(devices), (parallel.AXIS,)), jax.P(parallel.AXIS))
    state = jax.tree.map(lambda leaf: np.stack([leaf] * len(devices)), jax.device_get(state))
    state, tokens_DxAxBxL = jax.device_put((state, tokens_DxAxBxL), sharding)
    results = []
    for _ in range(number):
        state, metrics = step(state, tokens_DxAxBxL)
        first, *others = jax.device_get(
            [
                jax.tree.map(lambda leaf, i=i: leaf.addressable_data(i), (state.params, metrics))
                for i in range(len(devices))
            ]
        )
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, other, first)
        results.append(jax.tree.map(np.copy, first))
    return results


def test_there_are_four_devices():
    assert jax.local_device_count() == 4


@pytest.mark.slow
def test_one_and_four_devices_make_the_same_steps(encoder_step_config, encoder_state, uneven_rows):
    one = run_steps(encoder_step_config, encoder_state, uneven_rows.reshape(1, 1, 8, 16), 3)
    four = run_steps(encoder_step_config, encoder_state, uneven_rows.reshape(4, 1, 2, 16), 3)
    for (params, metrics), (expected_params, expected_metrics) in zip(four, one, strict=True):
        assert metrics.sums.count == expected_metrics.sums.count
        np.testing.assert_allclose(metrics.sums.loss, expected_metrics.sums.loss, rtol=1e-6)
        np.testing.assert_allclose(metrics.grad_norm, expected_metrics.grad_norm, rtol=1e-5)
        assert_near(params, expected_params)
    # A step moves parameters by up to the learning rate, 10^4 times the tolerance.
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one[0][0], one[2][0])), strict=True)) > 5e-3


@pytest.mark.slow
def test_four_microbatches_make_the_same_steps_as_one_of_four_times_the_rows(bag_step_config, bag_state, uneven_rows):
    one = run_steps(bag_step_config, bag_state, uneven_rows.reshape(1, 1, 8, 16), 3)
    four = run_steps(bag_step_config, bag_state, uneven_rows.reshape(1, 4, 2, 16), 3)
    for (params, metrics), (expected_params, expected_metrics) in zip(four, one, strict=True):
        assert metrics.sums.count == expected_metrics.sums.count
        assert_near(params, expected_params)


@pytest.mark.slow
def test_averaging_the_means_of_devices_would_give_another_gradient(bag_step_config, bag_state, bag_step, uneven_rows):
    """On these rows the common mistake changes the gradient, so the two tests above can detect it."""

    @jax.jit
    def grad(rows_B):
        def loss(params):
            mask_key = jax.random.fold_in(bag_step_config.key(steps.TRAIN_MASKS), 0)
            tokens_BxL = jnp.asarray(uneven_rows)[rows_B]
            logits, batch = steps.forward(bag_step_config, params, tokens_BxL, rows_B=rows_B, mask_key=mask_key)
            sums = masked_cross_entropy(logits, batch.labels_BxK, batch.label_weights_BxK)
            return sums.loss / jnp.maximum(sums.count, 1.0), sums.count

        return jax.grad(loss, has_aux=True)(bag_state.params)

    def norm(tree):
        return np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))

    true, count = grad(jnp.arange(8))
    parts, counts = zip(*(grad(jnp.arange(i, i + 2)) for i in range(0, 8, 2)), strict=True)
    assert len(set(map(float, counts))) == 4

    def average(weights):
        return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *parts)

    fractions = [n / count for n in counts]
    assert norm(jax.tree.map(np.subtract, average(fractions), true)) < 1e-6 * norm(true)
    assert norm(jax.tree.map(np.subtract, average([0.25] * 4), true)) > 0.1 * norm(true)
    # The step reports the norm of the true gradient.
    _, metrics = bag_step(parallel.replicate(bag_state), parallel.shard(uneven_rows, shape=(1,)))
    np.testing.assert_allclose(parallel.first_replica(metrics.grad_norm), norm(true), rtol=1e-5)


@pytest.fixture
def tree():
    return {
        "step": np.int32(7),
        "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
        "counts": np.arange(5),
    }


def test_replicate_and_first_replica_are_inverses(tree):
    stacked = parallel.replicate(tree)
    for leaf, original in zip(jax.tree.leaves(stacked), jax.tree.leaves(tree), strict=True):
        assert leaf.shape == (4, *np.shape(original))
        assert [shard.device for shard in leaf.addressable_shards] == jax.local_devices()
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data[0], original)
    jax.tree.map(np.testing.assert_array_equal, parallel.first_replica(stacked), tree)
    # The arrays may be on a device, too.
    on_device = jax.tree.map(jnp.asarray, tree)
    jax.tree.map(np.testing.assert_array_equal, parallel.first_replica(parallel.replicate(on_device)), tree)


def test_global_arrays_are_complete_on_the_first_device_and_convert_back(tree):
    stacked = parallel.replicate(tree)
    global_tree = parallel.to_global(stacked)
    for leaf, original in zip(jax.tree.leaves(global_tree), jax.tree.leaves(tree), strict=True):
        assert leaf.is_fully_replicated
        assert [shard.device for shard in leaf.addressable_shards] == jax.local_devices()[:1]
        np.testing.assert_array_equal(leaf, original)
    back = parallel.from_global(global_tree)
    assert jax.tree.map(lambda leaf: leaf.sharding, back) == jax.tree.map(lambda leaf: leaf.sharding, stacked)
    jax.tree.map(np.testing.assert_array_equal, back, stacked)
    like = parallel.global_like(jax.tree.map(jnp.asarray, tree))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), like) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), global_tree
    )


def test_shard_assigns_rows_to_devices_in_order():
    rows = np.arange(24 * 3).reshape(24, 3)
    assert parallel.shard(rows).shape == (4, 6, 3)
    sharded = parallel.shard(rows, shape=(2,))
    assert sharded.shape == (4, 2, 3, 3)
    for device, shard in zip(jax.local_devices(), sharded.addressable_shards, strict=True):
        assert shard.device == device
    np.testing.assert_array_equal(np.asarray(sharded).reshape(24, 3), rows)
    assert parallel.shard(np.arange(8)).shape == (4, 2)


def test_data_parallel_uses_every_device_and_donates():
    def step(state, rows):
        index = jax.lax.axis_index(parallel.AXIS)
        return state + jax.lax.psum(rows.sum(), parallel.AXIS), index

    state = parallel.replicate(np.zeros(1000, np.float32))
    rows = parallel.shard(np.arange(8, dtype=np.float32))
    new, index = parallel.data_parallel(step, donate_argnums=(0,))(state, rows)
    np.testing.assert_array_equal(new, np.full((4, 1000), 28.0))
    np.testing.assert_array_equal(index, range(4))
    assert state.is_deleted()
    assert not rows.is_deleted()


def test_a_step_compiled_in_the_background_is_not_compiled_again(caplog):
    state, rows = parallel.replicate(np.ones(3, np.float32)), parallel.shard(np.arange(8, dtype=np.float32))
    ahead = parallel.data_parallel(lambda state, rows: state + jax.lax.psum(rows.sum(), parallel.AXIS))
    plain = parallel.data_parallel(lambda state, rows: state - jax.lax.psum(rows.sum(), parallel.AXIS))
    with jax.log_compiles():  # In this thread.
        ahead.compile_in_background(state, rows)
        np.testing.assert_array_equal(ahead(state, rows), np.full((4, 3), 29.0))
        assert "XLA compilation" not in caplog.text
        plain(state, rows)
        assert caplog.text.count("XLA compilation") == 1
        plain.compiled(state, rows)
    assert caplog.text.count("XLA compilation") == 1


def test_every_process_caches_a_step_compiled_in_the_background(monkeypatch):
    process_ids = []

    class Lowered:
        def compile(self):
            process_ids.append(parallel.distributed_state().process_id)

    monkeypatch.setattr(jax, "process_index", lambda: 3)
    step = parallel.data_parallel(lambda rows: rows)
    monkeypatch.setattr(step, "_run", types.SimpleNamespace(lower=lambda rows: Lowered()))
    step.compile_in_background(None)
    step._compilation.join()
    # jax writes the cache in process 0.
    assert process_ids == [0]
    assert parallel.distributed_state().process_id == 3
    parallel.distributed_state().process_id = 0


def test_an_error_of_the_compiler_in_the_background_is_raised_by_the_step():
    step = parallel.data_parallel(
        lambda rows: jax.ffi.ffi_call("missing", jax.ShapeDtypeStruct((2,), np.float32))(rows)
    )
    rows = parallel.shard(np.arange(8, dtype=np.float32))
    step.compile_in_background(rows)
    with pytest.raises(jax.errors.JaxRuntimeError, match="missing"):
        step(rows)


def test_a_process_that_reads_no_checkpoint_ends_the_others(monkeypatch):
    wait = mock.Mock(side_effect=jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"))
    client = types.SimpleNamespace(wait_at_barrier=wait)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel, "distributed_state", lambda: types.SimpleNamespace(client=client))
    components = types.SimpleNamespace(initial_state=lambda: jnp.zeros(2))
    checkpointer = types.SimpleNamespace(
        latest_step=lambda: 5, restore=mock.Mock(side_effect=CorruptCheckpointError("OSError: gone"))
    )
    message = r"^--workdir: another process did not .* checkpoint 5 within 30 minutes, this one: OSError: gone; rerun"
    with pytest.raises(UserError, match=message):
        startup._restore(components, checkpointer, None)
    assert wait.call_args.kwargs == {"timeout_in_ms": 30 * 60 * 1000}


@pytest.mark.slow
def test_over_mesh_and_pmap_compile_the_same_step(bag_step_config, bag_state, bag_step, uneven_rows):
    step = functools.partial(steps.train_step, step_config=bag_step_config, axis_name=parallel.AXIS)
    state, tokens = parallel.replicate(bag_state), parallel.shard(uneven_rows, shape=(1,))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state, tokens))
    ahead_of_time = parallel.over_mesh(step, jax.local_devices()).lower(*shapes).compile()
    jax.tree.map(np.testing.assert_array_equal, ahead_of_time(state, tokens), bag_step(state, tokens))


@pytest.mark.slow
def test_the_training_step_compiles_once_donates_its_state_and_makes_no_implicit_transfer(
    bag_step_config, bag_state, uneven_rows
):
    traces = 0

    def step(*args):
        nonlocal traces
        traces += 1
        return steps.train_step(*args, step_config=bag_step_config, axis_name=parallel.AXIS)

    step = parallel.data_parallel(step, donate_argnums=(0,))
    state = parallel.replicate(bag_state)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            new, metrics = step(state, parallel.shard(uneven_rows, shape=(1,)))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            parallel.first_replica(metrics)
            # A state restored from a checkpoint has the same kind of arrays.
            state = parallel.from_global(parallel.to_global(new))
    assert state.step.shape == (4,)
    assert traces == 1


def test_broadcasting_from_one_process_to_itself_returns_the_array():
    counts = np.arange(3)
    assert parallel.broadcast_from_first(counts) is counts


def test_the_private_jax_api_was_tried_with_this_version():
    """With another version: is there a public name by now for what `parallel.distributed_state` returns? If not, run
    tests/test_multihost.py and add the version here."""
    assert jax.__version__ in ("0.10.2",)
    assert [name for name in dir(jax.distributed) if name[0] != "_"] == ["initialize", "is_initialized", "shutdown"]
    state = parallel.distributed_state()
    assert state.client is None  # This is the only process.
    assert state.process_id == 0
