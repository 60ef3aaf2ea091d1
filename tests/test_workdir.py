"""The work directory: history, resuming, key changes, locks, and moving an old run aside."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlm.errors import UserError
from mlm.run.workdir import KeyChanges, WorkDir
from mlm.settings import RunSettings
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, tiny_config, write_corpus

REPO = Path(__file__).parent.parent
SETTINGS = settings_of(tiny_config("*.jsonl"))


def save_tokenizer(directory: str) -> None:
    os.makedirs(directory)
    Path(directory, "tokenizer.json").write_text("{}")


def create(workdir: WorkDir, settings: RunSettings, *, step: int, processes: int = 1, rows: int = 8) -> dict:
    return workdir.create(
        settings, save_tokenizer=save_tokenizer, processes=processes, rows_per_process=rows, step=step
    )


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "runs" / "run")


@pytest.fixture
def workdir(path) -> WorkDir:
    return WorkDir(path)


def test_the_history_has_every_start_and_the_changed_keys(workdir):
    assert create(workdir, SETTINGS, step=0) == {}
    # JSON turns tuples into lists, which is no change.
    assert create(workdir, SETTINGS, step=4) == {}
    later = SETTINGS.replace({"num_train_steps": 20, "optimizer.learning_rate": 5e-4})
    changed = {"num_train_steps": [8, 20], "optimizer.learning_rate": [1e-2, 5e-4]}
    assert create(workdir, later, step=7, processes=2, rows=4) == changed

    content = json.loads(Path(workdir.config).read_text())
    assert content["format_version"] == 1
    assert content["config"]["num_train_steps"] == 20
    history = content["history"]
    assert [entry["step"] for entry in history] == [0, 4, 7]
    assert [entry["event"] for entry in history] == ["start", "restart", "restart"]
    assert [entry["changed"] for entry in history] == [{}, {}, changed]
    assert [(entry["processes"], entry["rows_per_process"]) for entry in history] == [(1, 8), (1, 8), (2, 4)]
    times = [datetime.datetime.fromisoformat(entry["time"]) for entry in history]
    assert times == sorted(times)
    assert all(time.tzinfo is not None for time in times)
    assert workdir.last_topology() == (2, 4)
    assert workdir.read_settings() == later
    assert sorted(os.listdir(workdir.path)) == ["checkpoints", "config.json", "tokenizer"]


def test_mutable_keys_may_change_and_each_other_key_is_named(workdir):
    assert workdir.resume(SETTINGS) is SETTINGS
    create(workdir, SETTINGS, step=0)
    changed = SETTINGS.replace({"num_train_steps": 20, "optimizer.learning_rate": 1.0})
    assert workdir.resume(changed) == changed
    with pytest.raises(UserError, match=r"config: seed \(there 42, here 2\); use the same .*--overwrite$"):
        workdir.resume(SETTINGS.replace({"seed": 2}))
    # Of the optimizer's keys only those that leave its state valid may change.
    with pytest.raises(UserError, match=r"config: optimizer.adam_beta2 \(there 0.999, here 0.98\);"):
        workdir.resume(SETTINGS.replace({"optimizer.adam_beta2": 0.98}))


def test_an_automatic_batch_size_stays_the_one_that_was_found(workdir):
    create(workdir, SETTINGS, step=0)
    assert workdir.resume(SETTINGS.replace({"per_device_train_batch_size": 0})) == SETTINGS


def edit_config(workdir: WorkDir, edit) -> None:
    content = json.loads(Path(workdir.config).read_text())
    edit(content)
    Path(workdir.config).write_text(json.dumps(content))


def test_a_key_younger_than_the_run_keeps_the_earlier_behavior(path):
    create(WorkDir(path), SETTINGS, step=0)
    edit_config(WorkDir(path), lambda content: content["config"].pop("tokenizer.algorithm"))
    with pytest.raises(UserError, match=r"config: tokenizer.algorithm \(there 'absent', here 'auto'\);"):
        WorkDir(path).resume(SETTINGS)

    earlier = SETTINGS.replace({"tokenizer.algorithm": "bpe"})
    changes = {"added": {"tokenizer.algorithm": "bpe"}}
    for step in (4, 8):  # The second start must not mistake the default of new runs for a change.
        workdir = WorkDir(path, key_changes=KeyChanges(**changes))
        assert workdir.read_settings() == earlier
        resumed = workdir.resume(SETTINGS)
        assert resumed == earlier
        assert create(workdir, resumed, step=step) == {}
    # The user's own choice is not replaced.
    workdir = WorkDir(path, key_changes=KeyChanges(**changes, given=["tokenizer.algorithm"]))
    with pytest.raises(UserError, match=r"config: tokenizer.algorithm \(there 'bpe', here 'auto'\);"):
        workdir.resume(SETTINGS)
    assert workdir.resume(earlier) == earlier


def test_a_mutable_key_younger_than_the_run_may_be_set(path):
    create(WorkDir(path), SETTINGS, step=0)
    edit_config(WorkDir(path), lambda content: content["config"].pop("optimizer.max_grad_norm"))
    changes = {"added": {"optimizer.max_grad_norm": 2.0}}
    chosen = SETTINGS.replace({"optimizer.max_grad_norm": 5.0})
    workdir = WorkDir(path, key_changes=KeyChanges(**changes, given=["optimizer.max_grad_norm"]))
    assert workdir.resume(chosen) == chosen
    assert create(workdir, chosen, step=4) == {"optimizer.max_grad_norm": [2.0, 5.0]}
    assert WorkDir(path, key_changes=KeyChanges(**changes)).resume(chosen) == chosen


def test_a_renamed_key_is_mapped_and_a_removed_key_is_dropped_at_its_remaining_value(path):
    create(WorkDir(path), SETTINGS, step=0)

    def make_older(content):
        content["config"]["old_seed"] = content["config"].pop("seed")
        content["config"]["model.scan_layers"] = False

    edit_config(WorkDir(path), make_older)
    with pytest.raises(UserError, match=r"config: model.scan_layers .*; old_seed \(there 42, here 'absent'\); seed "):
        WorkDir(path).resume(SETTINGS)
    with pytest.raises(UserError, match=r"config.json: .*: unknown key"):
        WorkDir(path).read_settings()
    changes = KeyChanges(renamed={"old_seed": "seed"}, removed={"model.scan_layers": False})
    workdir = WorkDir(path, key_changes=changes)
    assert workdir.read_settings() == workdir.resume(SETTINGS) == SETTINGS
    with pytest.raises(UserError, match=r"config: seed \(there 42, here 7\)"):
        workdir.resume(SETTINGS.replace({"seed": 7}))
    changes = KeyChanges(renamed={"old_seed": "seed"}, removed={"model.scan_layers": True})
    with pytest.raises(UserError, match=r"config: model.scan_layers \(there False, here 'absent'\)"):
        WorkDir(path, key_changes=changes).resume(SETTINGS)


@pytest.mark.parametrize("version", [None, 2])
def test_another_format_version_is_refused_in_a_line_that_names_it(path, version):
    create(WorkDir(path), SETTINGS, step=0)

    def set_version(content):
        content["format_version"] = version
        if version is None:  # A run from before there were versions.
            del content["format_version"]

    edit_config(WorkDir(path), set_version)
    for read in (lambda: WorkDir(path).resume(SETTINGS), WorkDir(path).read_settings, WorkDir(path).last_topology):
        with pytest.raises(UserError, match=rf"config.json: format_version={version or 0} is not supported"):
            read()


def test_a_config_that_could_not_be_written_leaves_the_old_one(workdir, monkeypatch):
    create(workdir, SETTINGS, step=0)
    before = Path(workdir.config).read_bytes()

    def fail(*args, **options):
        args[1].write('{"half')
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", fail)
        with pytest.raises(OSError, match="disk full"):
            create(workdir, SETTINGS, step=1)
    assert Path(workdir.config).read_bytes() == before
    create(workdir, SETTINGS, step=2)
    assert not os.path.exists(workdir.config + ".tmp")


def test_moving_aside_keeps_everything_and_takes_an_unused_name(workdir):
    assert workdir.move_aside() is None
    os.makedirs(workdir.path)
    assert workdir.move_aside() is None  # Nothing in it.
    moved = []
    for seed in range(3):
        create(workdir, SETTINGS.replace({"seed": seed}), step=seed)
        moved.append(workdir.move_aside())
        assert not os.path.exists(workdir.path)
    assert moved == [f"{workdir.path}.old-{number}" for number in (1, 2, 3)]
    assert [WorkDir(path).read_config()["seed"] for path in moved] == [0, 1, 2]
    # A dangling link is a used name as well.
    os.rename(moved[1], workdir.path + ".elsewhere")
    os.symlink("/nowhere", moved[1])
    create(workdir, SETTINGS, step=0)
    assert workdir.move_aside() == f"{workdir.path}.old-4"


def test_a_run_in_progress_is_not_moved(workdir):
    create(workdir, SETTINGS, step=0)
    hold = (
        "import sys; from mlm.run.workdir import WorkDir; "
        "w = WorkDir(sys.argv[1]); w.lock(); print(1, flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, workdir.path], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(UserError, match="is in use by another run"):
            workdir.move_aside()
        assert os.path.exists(workdir.config)
        # The lock ends with its process, even after a kill.
        holder.kill()
        holder.wait()
        assert workdir.move_aside() == f"{workdir.path}.old-1"
    finally:
        holder.kill()
        holder.communicate()


def test_a_read_only_directory_can_still_be_read(tmp_path):
    workdir = WorkDir("/proc/run")
    assert workdir.last_topology() is None
    with pytest.raises(UserError, match=r"--workdir=/proc/run: /proc is not writable"):
        workdir.lock()


@pytest.mark.slow
def test_overwriting_starts_a_new_run_beside_the_old_one(tmp_path):
    config = tiny_config(write_corpus(tmp_path))
    config.num_train_steps = 1
    run, old = tmp_path / "run", tmp_path / "run.old-1"
    train_and_evaluate(settings_of(config), str(run), overwrite=True)  # There is nothing to move.
    assert not old.exists()
    files = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config.seed = 7
    with pytest.raises(UserError, match=r"seed .*--overwrite"):
        train_and_evaluate(settings_of(config), str(run))
    train_and_evaluate(settings_of(config), str(run), overwrite=True)
    assert {path.relative_to(old): path.read_bytes() for path in old.rglob("*") if path.is_file()} == files
    history = json.loads((run / "config.json").read_text())["history"]
    assert [entry["event"] for entry in history] == ["start"]
    assert (run / "model" / "model.safetensors").read_bytes() != files[Path("model/model.safetensors")]
