"""The largest batch that fits, by what compiling says."""

import jax
import pytest

from mlm import memory
from mlm.errors import UserError
from mlm.memory import MULTIPLE, largest_batch
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, tiny_config, write_corpus


@pytest.mark.parametrize("per_row", [1, 7, 1000.0, 12345.6])
@pytest.mark.parametrize("fixed", [0, 500, 10_000])
@pytest.mark.parametrize("wobble", [0, 300])
@pytest.mark.parametrize("limit", [7_000, 10_000, 1_000_000, 123_456_789])
def test_the_largest_is_found_in_few_compilations(per_row, fixed, wobble, limit):
    asked = []

    def bytes_of(batch):
        asked.append(batch)
        # What is padded to tiles grows in steps, and never shrinks.
        return fixed + per_row * batch + wobble * (batch // 64)

    found = largest_batch(bytes_of, limit=limit)
    assert found % MULTIPLE == 0
    assert len(set(asked)) == len(asked) <= 12
    if found:
        assert bytes_of(found) <= limit
    if found < memory.LARGEST:
        assert bytes_of(found + MULTIPLE) > limit


@pytest.mark.slow
def test_a_steps_bytes_grow_by_the_row(encoder_step_config):
    sizes = [memory.step_bytes(encoder_step_config, length=16, microbatches=1, batch=batch) for batch in (8, 64)]
    assert sizes[0] < sizes[1] < 8 * sizes[0]


@pytest.mark.slow
def test_a_run_finds_its_batch_and_keeps_it(tmp_path, monkeypatch):
    config = tiny_config(write_corpus(tmp_path))
    config.per_device_train_batch_size = 0
    with pytest.raises(UserError, match=r"a cpu device does not tell its memory; set a number"):
        train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "step_bytes", lambda step_config, *, length, microbatches, batch: batch * length)
        patch.setattr(memory, "_memory", lambda device: 16 * 16 / memory.USABLE + 1)
        config.num_train_steps = 4
        train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    assert WorkDir(str(tmp_path / "run")).read_config()["per_device_train_batch_size"] == 16
    assert WorkDir(str(tmp_path / "run")).last_topology() == (1, 16 * jax.local_device_count())
    # The same command goes on with what was found, whatever would be found now.
    config.num_train_steps = 8
    train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    assert WorkDir(str(tmp_path / "run")).read_config()["per_device_train_batch_size"] == 16
