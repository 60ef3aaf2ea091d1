"""The work directory keeps a history, and a run that is to be overwritten."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlm.errors import UserError
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, tiny_config, write_corpus

REPO = Path(__file__).parent.parent


def save_tokenizer(directory: str) -> None:
    os.makedirs(directory)
    Path(directory, "tokenizer.json").write_text("{}")


def create(place: WorkDir, config: dict, *, step: int, processes: int = 1, rows: int = 8) -> dict:
    return place.create(config, save_tokenizer=save_tokenizer, processes=processes, rows_per_process=rows, step=step)


@pytest.fixture
def place(tmp_path) -> WorkDir:
    return WorkDir(str(tmp_path / "runs" / "run"))


CONFIG = {"seed": 1, "num_train_steps": 10, "optimizer": {"learning_rate": 1e-3}, "data": {"mixture": (("a", 1.0),)}}


def test_the_history_tells_of_every_start_and_of_what_changed(place):
    assert create(place, CONFIG, step=0) == {}
    # What JSON makes of a tuple is no change.
    assert create(place, CONFIG, step=4) == {}
    later = CONFIG | {"num_train_steps": 20, "optimizer": {"learning_rate": 5e-4}}
    changed = {"num_train_steps": [10, 20], "optimizer.learning_rate": [1e-3, 5e-4]}
    assert create(place, later, step=7, processes=2, rows=4) == changed
    # A key that is younger than the run.
    assert create(place, later | {"young": 3}, step=9) == {"young": [None, 3]}

    content = json.loads(Path(place.config).read_text())
    assert content["config"]["num_train_steps"] == 20
    history = content["history"]
    assert [entry["step"] for entry in history] == [0, 4, 7, 9]
    assert [entry["event"] for entry in history] == ["start", "restart", "restart", "restart"]
    assert [entry["changed"] for entry in history] == [{}, {}, changed, {"young": [None, 3]}]
    assert [(entry["processes"], entry["rows_per_process"]) for entry in history] == [(1, 8), (1, 8), (2, 4), (1, 8)]
    times = [datetime.datetime.fromisoformat(entry["time"]) for entry in history]
    assert times == sorted(times)
    assert all(time.tzinfo is not None for time in times)
    assert place.last_topology() == (1, 8)
    assert sorted(os.listdir(place.path)) == ["checkpoints", "config.json", "tokenizer"]


def test_what_may_change_goes_on_and_what_may_not_is_named(place):
    create(place, CONFIG, step=0)
    place.check_same_run(CONFIG | {"num_train_steps": 20, "optimizer": {"learning_rate": 1.0, "warmup_steps": 3}})
    with pytest.raises(UserError, match=r"seed \(there 1, here 2\).*--overwrite to start anew"):
        place.check_same_run(CONFIG | {"seed": 2})


def test_a_config_that_was_not_written_whole_does_not_take_the_old_ones_place(place):
    create(place, CONFIG, step=0)
    before = Path(place.config).read_bytes()
    with pytest.raises(TypeError):
        create(place, CONFIG | {"seed": object()}, step=1)
    assert Path(place.config).read_bytes() == before
    create(place, CONFIG, step=2)
    assert not os.path.exists(place.config + ".tmp")


def test_moving_aside_keeps_everything_and_never_takes_a_name(place):
    assert place.move_aside() is None
    os.makedirs(place.path)
    assert place.move_aside() is None  # Nothing in it.
    moved = []
    for step in range(3):
        create(place, CONFIG | {"seed": step}, step=step)
        moved.append(place.move_aside())
        assert not os.path.exists(place.path)
    assert moved == [f"{place.path}.old-{number}" for number in (1, 2, 3)]
    seeds = [WorkDir(path).read_config()["seed"] for path in moved]
    assert seeds == [0, 1, 2]
    # One whose number is missing in between is filled, a link that leads nowhere is a name, too.
    os.rename(moved[1], place.path + ".elsewhere")
    os.symlink("/nowhere", moved[1])
    create(place, CONFIG, step=0)
    assert place.move_aside() == f"{place.path}.old-4"


def test_a_run_under_way_is_not_moved(place):
    create(place, CONFIG, step=0)
    hold = "import sys; from mlm.run.workdir import WorkDir; w = WorkDir(sys.argv[1]); w.lock(); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, place.path], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(UserError, match="is in use by another run"):
            place.move_aside()
        assert os.path.exists(place.config)
        # However it ends, its lock is no obstacle.
        holder.kill()
        holder.wait()
        assert place.move_aside() == f"{place.path}.old-1"
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.slow
def test_overwriting_starts_anew_beside_the_old_run(tmp_path):
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
