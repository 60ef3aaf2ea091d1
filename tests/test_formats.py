"""Runs that were started by earlier versions of the code: later versions resume them."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.same_run import differences
from configs import compat
from mlm.errors import UserError
from mlm.modes import show_data
from mlm.reporting.curves import read_metrics
from mlm.run.checkpoint import Checkpointer
from mlm.run.storage import LocalStorage
from mlm.run.workdir import KeyChanges, WorkDir
from mlm.settings import KEYS, RunSettings
from mlm.train import train_and_evaluate

# One directory for each format version, made by make_run.py: 4 steps of a run, and its corpus.
STORED = sorted(Path(__file__).parent.glob("golden/run_format_*"))
KEY_CHANGES = KeyChanges(compat.ADDED_KEYS, compat.RENAMED_KEYS, compat.REMOVED_KEYS)
LAST_STEP = 12  # In the second epoch.


@pytest.fixture
def copy(request, tmp_path, monkeypatch) -> str:
    """The work directory of a copy of a stored run; its corpus is in the current directory."""
    shutil.copytree(request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return "run"


every_format = pytest.mark.parametrize("copy", STORED, indirect=True, ids=lambda path: path.name)


def settings_to_resume(workdir: str, key_changes: KeyChanges = KEY_CHANGES) -> RunSettings:
    return WorkDir(workdir, key_changes=key_changes).read_settings().replace({"num_train_steps": LAST_STEP})


def edit_keys(workdir: str, edit) -> None:
    path = Path(workdir, "config.json")
    content = json.loads(path.read_text())
    edit(content["config"])
    path.write_text(json.dumps(content))


@every_format
def test_every_key_of_today_is_in_the_stored_run_or_in_the_tables_of_compat(copy):
    keys = WorkDir(copy, key_changes=KEY_CHANGES).read_config().keys()
    assert sorted(KEYS - keys) == [], "add a new key to ADDED_KEYS in configs/compat.py"
    assert sorted(keys - set(KEYS)) == [], "add a renamed or removed key to the tables in configs/compat.py"


@pytest.mark.slow
@every_format
def test_a_stored_run_resumes_and_equals_an_uninterrupted_run(copy, caplog):
    settings = settings_to_resume(copy)
    with caplog.at_level("INFO"):
        train_and_evaluate(settings, copy, key_changes=KEY_CHANGES)
    assert "resuming after step 4" in caplog.text
    train_and_evaluate(settings, "uninterrupted/run")
    # The stored steps were computed on another machine, so values are close, not equal.
    lines = [read_metrics(f"{workdir}/metrics.jsonl") for workdir in (copy, "uninterrupted/run")]
    for resumed, straight in zip(*lines, strict=True):
        names = {name for name in straight if not name.startswith("perf/")}
        if straight["step"] <= 4:  # The stored run did not have all metrics of today.
            names -= {name for name in names if name.startswith("data/")} - resumed.keys()
        assert resumed.keys() >= names
        for name in names:
            np.testing.assert_allclose(resumed[name], straight[name], rtol=1e-4, err_msg=f"{resumed['step']} {name}")
    saved = []
    for workdir in (copy, "uninterrupted/run"):
        with Checkpointer(LocalStorage(workdir), keep_checkpoints=2) as checkpointer:
            assert checkpointer.latest_step() == LAST_STEP
            params, loop = checkpointer.restore_params(LAST_STEP)
            saved.append((params, loop["counts_V"], checkpointer.streams(LAST_STEP)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), saved[0][0], saved[1][0])
    assert saved[0][1:] == saved[1][1:]  # The same tokens, and the same position in the data.


@pytest.mark.slow
@every_format
def test_a_younger_key_and_a_renamed_key_are_completed_from_the_tables(copy):
    """Two keys of today become keys that did not exist, or had another name, when the stored run was started."""
    settings = settings_to_resume(copy)
    shutil.copytree(copy, "unchanged/run")

    def make_older(keys):
        assert keys.pop("masking.random_replace_prob") == 0.1
        keys["random_seed"] = keys.pop("seed")

    edit_keys(copy, make_older)
    renamed = {**compat.RENAMED_KEYS, "random_seed": "seed"}
    key_changes = KeyChanges({**compat.ADDED_KEYS, "masking.random_replace_prob": 0.1}, renamed, compat.REMOVED_KEYS)
    # The default of new runs is another by now.
    today = settings.replace({"masking.random_replace_prob": 0.2})
    assert settings_to_resume(copy, key_changes) == settings
    train_and_evaluate(today.replace({"num_train_steps": 8}), copy, key_changes=key_changes)
    train_and_evaluate(today, copy, key_changes=key_changes)
    train_and_evaluate(settings.replace({"num_train_steps": 8}), "unchanged/run", key_changes=KEY_CHANGES)
    train_and_evaluate(settings, "unchanged/run", key_changes=KEY_CHANGES)
    assert differences(os.path.abspath("unchanged/run"), os.path.abspath(copy)) == []


@pytest.mark.slow
@every_format
def test_show_data_reads_a_stored_run(copy, capsys):
    settings = WorkDir(copy, key_changes=KEY_CHANGES).read_settings()
    show_data.run(settings, copy, step=3, sequences=1, process=0, key_changes=KEY_CHANGES)
    assert "step 3: batch 3 of the data" in capsys.readouterr().out


@every_format
def test_a_key_that_no_table_has_is_refused_by_its_name(copy):
    settings = settings_to_resume(copy)
    edit_keys(copy, lambda keys: keys.update({"data.unheard_of": 3}))
    with pytest.raises(UserError, match=r"another config: data.unheard_of \(there 3, here 'absent'\);"):
        train_and_evaluate(settings, copy, key_changes=KEY_CHANGES)
    with pytest.raises(UserError, match=r"run/config.json: data.unheard_of=3: unknown key"):
        WorkDir(copy, key_changes=KEY_CHANGES).read_settings()
    edit_keys(copy, lambda keys: keys.pop("data.unheard_of"))
    with pytest.raises(UserError, match=r"another config: masking.mlm_probability \(there 0.15, here 0.3\);"):
        train_and_evaluate(settings.replace({"masking.mlm_probability": 0.3}), copy, key_changes=KEY_CHANGES)
    assert sorted(os.listdir(f"{copy}/checkpoints")) == ["4"]


def test_the_stored_runs_are_small():
    assert STORED
    for directory in STORED:
        assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) < 300_000
