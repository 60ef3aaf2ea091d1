"""What is saved comes back bit for bit, only whole checkpoints count, and old ones go."""

import functools
import os
import pathlib
import resource
import shutil
import types

import jax
import numpy as np
import pytest

from mlm import parallel, steps
from mlm.errors import UserError
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError, DiskFullError, SaveError, checksums

LOOP = {"step": 3, "interval": {"loss": 0.1 + 0.2, "count": 17.0}, "counts_V": list(range(50))}
STREAM = {"shard": 2, "sources": [{"row": 12345678901}], "remainder": [5, 6, 7], "epoch": 0}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return str(tmp_path / "checkpoints")


def save(checkpointer, step, value=0.0):
    state = parallel.to_global(parallel.replicate({"weight": np.full((2, 3), value, np.float32)}))
    checkpointer.require_room(state)
    checkpointer.save(step, state=state, loop={"step": step}, stream={"row": step})


def test_training_after_a_save_does_not_reach_the_checkpoint(directory, bag_step_config, bag_state, uneven_rows):
    step = parallel.data_parallel(
        functools.partial(steps.train_step, step_config=bag_step_config, axis_name=parallel.AXIS), donate_argnums=(0,)
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


def restore(directory, step):
    like = parallel.global_like({"weight": np.zeros((2, 3), np.float32)})
    with Checkpointer(directory, keep_checkpoints=3) as checkpointer:
        return checkpointer.restore(step, like=like)


def test_those_at_multiples_are_kept_too(directory):
    with Checkpointer(directory, keep_checkpoints=1, keep_every_steps=10) as checkpointer:
        for step in (5, 10, 15, 20, 25, 26):
            save(checkpointer, step)
    assert sorted(map(int, os.listdir(directory))) == [10, 20, 26]


def files_of(directory):
    return sorted(os.path.join(at, name) for at, _, names in os.walk(directory) for name in names)


def test_damage_to_any_file_is_noticed_or_harmless(directory, tmp_path):
    """Every file of a checkpoint, cut short, emptied, gone, and with each of some bits turned."""
    with Checkpointer(directory, keep_checkpoints=1) as checkpointer:
        save(checkpointer, 2, value=1.5)
    whole = restore(directory, 2)
    noticed = 0
    for path in files_of(directory):
        content = pathlib.Path(path).read_bytes()
        turned = [bytes([*content[:at], content[at] ^ 16, *content[at + 1 :]]) for at in range(0, len(content), 37)]
        for damaged in [b"", content[: len(content) // 2], None, *turned]:
            if damaged is None:
                os.remove(path)
            else:
                pathlib.Path(path).write_bytes(damaged)
            try:
                found = restore(directory, 2)
            except CorruptCheckpointError:
                noticed += 1
            else:
                np.testing.assert_array_equal(found.state["weight"], whole.state["weight"])
                assert (found.loop, found.streams) == (whole.loop, whole.streams)
            pathlib.Path(path).write_bytes(content)
    assert noticed > 20
    restore(directory, 2)


def test_a_damaged_checkpoint_moves_aside(directory):
    with Checkpointer(directory, keep_checkpoints=3) as checkpointer:
        for step in (2, 4):
            save(checkpointer, step)
        checkpointer.wait()
        places = [checkpointer.quarantine(4)]
        checkpointer.reload()
        assert checkpointer.latest_step() == 2
        save(checkpointer, 4)
        checkpointer.wait()
        places.append(checkpointer.quarantine(4))
    assert [os.path.basename(place) for place in places] == ["4", "4.1"]
    assert all(os.path.isdir(place) for place in places)


def test_another_state_is_no_damage(directory):
    with Checkpointer(directory, keep_checkpoints=1) as checkpointer:
        save(checkpointer, 2)
        like = parallel.global_like({"other": np.zeros((2, 3), np.float32)})
        with pytest.raises(UserError, match="holds a state of other parts"):
            checkpointer.restore(2, like=like)


@pytest.mark.parametrize("fault", ["full", "gone", "late"])
def test_a_save_that_fails_is_told_and_the_next_one_counts(directory, monkeypatch, fault):
    with Checkpointer(directory, keep_checkpoints=2) as checkpointer:
        save(checkpointer, 2)
        checkpointer.wait()
        if fault == "full":
            with monkeypatch.context() as patch:
                patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3))
                with pytest.raises(DiskFullError, match=r"a checkpoint could not be written .*0 MB are free"):
                    save(checkpointer, 4)
        elif fault == "gone":
            os.rename(directory, directory + ".x")
            with pytest.raises(DiskFullError, match=r"a checkpoint could not be written .*No such file"):
                save(checkpointer, 4)
            os.rename(directory + ".x", directory)
        else:
            # It breaks off in the background.
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
            try:
                save(checkpointer, 4)
                with pytest.raises(SaveError, match="could not be written"):
                    checkpointer.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpointer.latest_step() in (2, None)
        save(checkpointer, 6, value=3.0)
    assert sorted(os.listdir(directory)) == ["2", "6"]  # Nothing half written is left.
    np.testing.assert_array_equal(restore(directory, 6).state["weight"], np.full((2, 3), 3.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_a_checksum_changes_with_every_bit(dtype):
    words = np.zeros(7, dtype)
    seen = {checksums({"a": words})["['a']"]}
    for at in range(words.nbytes):
        for bit in range(8):
            turned = words.copy()
            turned.view(np.uint8)[at] ^= 1 << bit
            (value,) = checksums({"a": turned}).values()
            assert value not in seen
    swapped = np.array([1, 2], dtype)
    assert checksums({"a": swapped}) != checksums({"a": swapped[::-1].copy()})
