"""What is saved comes back bit for bit, only whole checkpoints count, and old ones go."""

import functools
import os

import jax
import numpy as np
import pytest

from mlm import parallel, steps
from mlm.checkpoint import Checkpointer

LOOP = {"step": 3, "interval": {"loss": 0.1 + 0.2, "count": 17.0}, "counts_V": list(range(50))}
STREAM = {"shard": 2, "sources": [{"row": 12345678901}], "remainder": [5, 6, 7], "epoch": 0}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return str(tmp_path / "checkpoints")


def save(checkpointer, step, value=0.0):
    state = parallel.to_global(parallel.replicate({"weight": np.full((2, 3), value, np.float32)}))
    checkpointer.save(step, state=state, loop={"step": step}, stream={"row": step})


def test_training_after_a_save_does_not_reach_the_checkpoint(directory, bag_task, bag_state, uneven_rows):
    step = parallel.data_parallel(
        functools.partial(steps.train_step, task=bag_task, axis_name=parallel.AXIS), donate_argnums=(0,)
    )
    tokens = parallel.shard(uneven_rows, shape=(1,))
    state, _ = step(parallel.replicate(bag_state), tokens)
    saved = jax.tree.map(np.copy, parallel.first_replica(state))
    with Checkpointer(directory, keep_checkpoints=2) as checkpointer:
        checkpointer.save(1, state=parallel.to_global(state), loop=LOOP, stream=STREAM)
        for _ in range(3):  # While it is written, donating what was saved.
            state, _ = step(state, tokens)

    like = parallel.global_like(jax.eval_shape(lambda: bag_state))
    with Checkpointer(directory, keep_checkpoints=2) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored = checkpointer.restore(1, like=like)
    assert restored.step == 1
    assert restored.loop == LOOP
    assert restored.streams == [STREAM]
    assert jax.tree.structure(restored.state) == jax.tree.structure(bag_state)
    jax.tree.map(np.testing.assert_array_equal, restored.state, saved)
    stacked = parallel.from_global(restored.state)
    assert jax.tree.map(lambda leaf: leaf.dtype, stacked) == jax.tree.map(lambda leaf: leaf.dtype, saved)
    # And it trains on, bit for bit.
    again, _ = step(stacked, tokens)
    once, _ = step(parallel.replicate(saved), tokens)
    jax.tree.map(np.testing.assert_array_equal, parallel.first_replica(again), parallel.first_replica(once))


def test_another_number_of_devices_may_go_on(directory):
    with Checkpointer(directory, keep_checkpoints=1) as checkpointer:
        save(checkpointer, 4, value=2.5)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"weight": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=one)}
    with Checkpointer(directory, keep_checkpoints=1) as checkpointer:
        weight = checkpointer.restore(4, like=like).state["weight"]
    assert weight.sharding == one
    np.testing.assert_array_equal(weight, np.full((2, 3), 2.5))


def test_the_newest_are_kept(directory):
    with Checkpointer(directory, keep_checkpoints=2) as checkpointer:
        for step in (1, 5, 6, 20):
            save(checkpointer, step, value=step)
        checkpointer.wait()
        assert sorted(os.listdir(directory)) == ["20", "6"]
        assert checkpointer.latest_step() == 20


def test_a_checkpoint_half_written_does_not_count(directory):
    with Checkpointer(directory, keep_checkpoints=3) as checkpointer:
        save(checkpointer, 2)
        save(checkpointer, 4)
    # Orbax writes under such a name and renames in the end. A crash leaves it.
    os.rename(os.path.join(directory, "4"), os.path.join(directory, "4.orbax-checkpoint-tmp-0"))
    with Checkpointer(directory, keep_checkpoints=3) as checkpointer:
        assert checkpointer.latest_step() == 2
        save(checkpointer, 4, value=7.0)  # The run comes by again.
    like = parallel.global_like({"weight": np.zeros((2, 3), np.float32)})
    with Checkpointer(directory, keep_checkpoints=3) as checkpointer:
        assert checkpointer.latest_step() == 4
        np.testing.assert_array_equal(checkpointer.restore(4, like=like).state["weight"], np.full((2, 3), 7.0))


def test_without_a_directory_there_is_no_checkpoint_and_none_is_made(tmp_path):
    with Checkpointer(str(tmp_path / "run" / "checkpoints"), keep_checkpoints=1) as checkpointer:
        assert checkpointer.latest_step() is None
    assert os.listdir(tmp_path) == []
    (tmp_path / "empty").mkdir()
    with Checkpointer(str(tmp_path / "empty"), keep_checkpoints=1) as checkpointer:
        assert checkpointer.latest_step() is None
    assert os.listdir(tmp_path / "empty") == []
