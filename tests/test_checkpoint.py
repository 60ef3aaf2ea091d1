"""Checkpoints are restored bit for bit, only complete ones count, and old ones are deleted."""

import functools
import os
import pathlib
import resource
import shutil
import types
from unittest import mock

import jax
import numpy as np
import pytest

from mlm import parallel, steps
from mlm.errors import UserError
from mlm.run import checkpoint
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError, DiskFullError, SaveError, checksums
from mlm.run.storage import LocalStorage

LOOP = {"step": 3, "interval": {"loss": 0.1 + 0.2, "count": 17.0}, "counts_V": list(range(50))}
STREAM = {"shard": 2, "sources": [{"row": 12345678901}], "remainder": [5, 6, 7], "epoch": 0}


@pytest.fixture
def storage(tmp_path):
    storage = LocalStorage(str(tmp_path))
    storage.create()
    return storage


def save(checkpointer, step, value=0.0):
    state = parallel.to_global(parallel.replicate({"weight": np.full((2, 3), value, np.float32)}))
    checkpointer.check_space(state)
    checkpointer.save(step, state=state, loop={"step": step}, stream={"row": step})


@pytest.mark.slow
def test_training_during_a_save_does_not_change_the_checkpoint(storage, bag_step_config, bag_state, uneven_rows):
    step = parallel.data_parallel(
        functools.partial(steps.train_step, step_config=bag_step_config, axis_name=parallel.AXIS), donate_argnums=(0,)
    )
    tokens = parallel.shard(uneven_rows, shape=(1,))
    state, _ = step(parallel.replicate(bag_state), tokens)
    saved = jax.tree.map(np.copy, parallel.first_replica(state))
    with Checkpointer(storage, keep_checkpoints=2) as checkpointer:
        checkpointer.save(1, state=parallel.to_global(state), loop=LOOP, stream=STREAM)
        for _ in range(3):  # During the save, donating the buffers that are saved.
            state, _ = step(state, tokens)

    like = parallel.global_like(jax.eval_shape(lambda: bag_state))
    with Checkpointer(storage, keep_checkpoints=2) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored = checkpointer.restore(1, like=like)
    assert restored.step == 1
    assert restored.loop == LOOP
    assert restored.streams == [STREAM]
    assert jax.tree.structure(restored.state) == jax.tree.structure(bag_state)
    jax.tree.map(np.testing.assert_array_equal, restored.state, saved)
    stacked = parallel.from_global(restored.state)
    assert jax.tree.map(lambda leaf: leaf.dtype, stacked) == jax.tree.map(lambda leaf: leaf.dtype, saved)
    # A step from the restored state is bitwise equal.
    again, _ = step(stacked, tokens)
    once, _ = step(parallel.replicate(saved), tokens)
    jax.tree.map(np.testing.assert_array_equal, parallel.first_replica(again), parallel.first_replica(once))


def test_a_checkpoint_can_be_restored_on_another_number_of_devices(storage):
    with Checkpointer(storage, keep_checkpoints=1) as checkpointer:
        save(checkpointer, 4, value=2.5)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"weight": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=one)}
    with Checkpointer(storage, keep_checkpoints=1) as checkpointer:
        weight = checkpointer.restore(4, like=like).state["weight"]
    assert weight.sharding == one
    np.testing.assert_array_equal(weight, np.full((2, 3), 2.5))


def test_the_newest_checkpoints_are_kept(storage):
    with Checkpointer(storage, keep_checkpoints=2) as checkpointer:
        for step in (1, 5, 6, 20):
            save(checkpointer, step, value=step)
        checkpointer.wait()
        assert sorted(os.listdir(storage.checkpoints)) == ["20", "6"]
        assert checkpointer.latest_step() == 20


def test_a_partial_checkpoint_is_ignored(storage):
    with Checkpointer(storage, keep_checkpoints=3) as checkpointer:
        save(checkpointer, 2)
        save(checkpointer, 4)
    # Orbax writes to a directory of such a name and renames it at the end; a crash leaves it.
    os.rename(os.path.join(storage.checkpoints, "4"), os.path.join(storage.checkpoints, "4.orbax-checkpoint-tmp-0"))
    with Checkpointer(storage, keep_checkpoints=3) as checkpointer:
        assert checkpointer.latest_step() == 2
        save(checkpointer, 4, value=7.0)  # The resumed run reaches the step again.
    like = parallel.global_like({"weight": np.zeros((2, 3), np.float32)})
    with Checkpointer(storage, keep_checkpoints=3) as checkpointer:
        assert checkpointer.latest_step() == 4
        np.testing.assert_array_equal(checkpointer.restore(4, like=like).state["weight"], np.full((2, 3), 7.0))


def test_opening_a_missing_or_empty_directory_creates_nothing(tmp_path):
    storage = LocalStorage(str(tmp_path / "run"))
    with Checkpointer(storage, keep_checkpoints=1) as checkpointer:
        assert checkpointer.latest_step() is None
    assert os.listdir(tmp_path) == []
    storage.create()
    with Checkpointer(storage, keep_checkpoints=1) as checkpointer:
        assert checkpointer.latest_step() is None
    assert os.listdir(storage.checkpoints) == []


def restore(storage, step):
    like = parallel.global_like({"weight": np.zeros((2, 3), np.float32)})
    with Checkpointer(storage, keep_checkpoints=3) as checkpointer:
        return checkpointer.restore(step, like=like)


@pytest.mark.slow
def test_checkpoints_at_multiples_of_keep_every_steps_are_kept_too(storage):
    with Checkpointer(storage, keep_checkpoints=1, keep_every_steps=10) as checkpointer:
        for step in (5, 10, 15, 20, 25, 26):
            save(checkpointer, step)
    assert sorted(map(int, os.listdir(storage.checkpoints))) == [10, 20, 26]


def files_of(storage):
    return sorted(os.path.join(at, name) for at, _, names in os.walk(storage.checkpoints) for name in names)


@pytest.mark.slow
def test_damage_to_any_file_is_detected_or_harmless(storage):
    """Every file of a checkpoint is truncated, emptied, deleted, and has some of its bits flipped."""
    with Checkpointer(storage, keep_checkpoints=1) as checkpointer:
        save(checkpointer, 2, value=1.5)
    intact = restore(storage, 2)
    detected = 0
    for path in files_of(storage):
        content = pathlib.Path(path).read_bytes()
        flipped = [bytes([*content[:at], content[at] ^ 16, *content[at + 1 :]]) for at in range(0, len(content), 37)]
        for damaged in [b"", content[: len(content) // 2], None, *flipped]:
            if damaged is None:
                os.remove(path)
            else:
                pathlib.Path(path).write_bytes(damaged)
            try:
                found = restore(storage, 2)
            except CorruptCheckpointError:
                detected += 1
            else:
                np.testing.assert_array_equal(found.state["weight"], intact.state["weight"])
                assert (found.loop, found.streams) == (intact.loop, intact.streams)
            pathlib.Path(path).write_bytes(content)
    assert detected > 20
    restore(storage, 2)


def test_a_corrupt_checkpoint_is_quarantined(storage):
    with Checkpointer(storage, keep_checkpoints=3) as checkpointer:
        for step in (2, 4):
            save(checkpointer, step)
        checkpointer.wait()
        paths = [checkpointer.quarantine(4)]
        checkpointer.reload()
        assert checkpointer.latest_step() == 2
        save(checkpointer, 4)
        checkpointer.wait()
        paths.append(checkpointer.quarantine(4))
    assert paths == [os.path.join(storage.damaged, name) for name in ("4", "4.1")]
    assert all(os.path.isdir(path) for path in paths)


def test_a_checkpoint_of_another_model_is_not_called_corrupt(storage):
    with Checkpointer(storage, keep_checkpoints=1) as checkpointer:
        save(checkpointer, 2)
        like = parallel.global_like({"other": np.zeros((2, 3), np.float32)})
        with pytest.raises(UserError, match=r"checkpoints/2: the checkpoint structure does not match the model"):
            checkpointer.restore(2, like=like)


@pytest.mark.parametrize("fault", ["full", "gone", "late"])
def test_a_failed_save_is_reported_and_the_next_one_succeeds(storage, monkeypatch, fault):
    with Checkpointer(storage, keep_checkpoints=2) as checkpointer:
        save(checkpointer, 2)
        checkpointer.wait()
        if fault == "full":
            with monkeypatch.context() as patch:
                patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3))
                with pytest.raises(DiskFullError, match=r"a checkpoint could not be written .*has 0 MB free"):
                    save(checkpointer, 4)
        elif fault == "gone":
            os.rename(storage.checkpoints, storage.checkpoints + ".x")
            with pytest.raises(DiskFullError, match=r"a checkpoint could not be written .*No such file"):
                save(checkpointer, 4)
            os.rename(storage.checkpoints + ".x", storage.checkpoints)
        else:
            # It fails in the background.
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
    assert sorted(os.listdir(storage.checkpoints)) == ["2", "6"]  # No partial checkpoint is left.
    np.testing.assert_array_equal(restore(storage, 6).state["weight"], np.full((2, 3), 3.0))


def test_of_several_processes_one_that_fails_to_save_does_not_wait_for_the_others(storage, monkeypatch):
    with Checkpointer(storage, keep_checkpoints=1) as checkpointer:
        save(checkpointer, 2)
        checkpointer.wait()
        manager = checkpointer._manager
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        # Opening a manager is a collective operation.
        monkeypatch.setattr(checkpointer, "_open", lambda: pytest.fail("waits for the other processes"))
        with monkeypatch.context() as patch:
            patch.setattr(manager, "check_for_errors", mock.Mock(side_effect=OSError("upload failed")))
            with pytest.raises(SaveError, match=r"a checkpoint could not be written \(upload failed\)"):
                checkpointer.check()
            patch.setattr(manager, "wait_until_finished", mock.Mock(side_effect=OSError("upload failed")))
            with pytest.raises(SaveError, match=r"a checkpoint could not be written \(upload failed\)"):
                save(checkpointer, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_a_checksum_changes_with_every_bit(dtype):
    words = np.zeros(7, dtype)
    seen = {checksums({"a": words})["['a']"]}
    for at in range(words.nbytes):
        for bit in range(8):
            flipped = words.copy()
            flipped.view(np.uint8)[at] ^= 1 << bit
            (value,) = checksums({"a": flipped}).values()
            assert value not in seen
    swapped = np.array([1, 2], dtype)
    assert checksums({"a": swapped}) != checksums({"a": swapped[::-1].copy()})


def test_another_format_version_is_refused_in_a_line_that_names_it(storage, monkeypatch):
    with Checkpointer(storage, keep_checkpoints=1) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT_VERSION", 2)
            save(checkpointer, 2)
            checkpointer.wait()
        with pytest.raises(UserError, match=r"checkpoints/2: format_version=2 is not supported, .* reads 1;"):
            restore(storage, 2)
        with pytest.raises(UserError, match="format_version=2 is not supported"):
            checkpointer.restore_params(2)
