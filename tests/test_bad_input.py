"""Errors and corrupt files that need a run: one clear line, and nothing is lost. test_user_errors.py has the others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mlm.errors import UserError
from mlm.reporting.curves import read_metrics
from mlm.train import train_and_evaluate
from tests import fork_server
from tests.tiny import sentences, settings_of, tiny_config, write_corpus

REPO = Path(__file__).parent.parent
QUICKSTART = "--config=configs/quickstart.py"


def run_main(*flags: str) -> subprocess.CompletedProcess:
    """Runs main.py with flags that are an error."""
    return fork_server.run([sys.executable, "main.py", *flags], cwd=REPO)


@pytest.mark.slow
def test_an_error_after_the_imports_is_one_line(tmp_path):
    result = run_main(QUICKSTART, f"--workdir={tmp_path / 'x'}", "--config.data.data_files=/nowhere/at/all.txt")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "/nowhere/at/all.txt" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.fixture
def config(tmp_path) -> ConfigDict:
    (tmp_path / "data").mkdir()
    return tiny_config(write_corpus(tmp_path / "data"))


@pytest.mark.slow
def test_resuming_with_another_config_names_the_keys(config, tmp_path):
    config.num_train_steps = 1
    train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    config.num_train_steps = 2
    config.optimizer.learning_rate = 1e-3
    config.model.overrides.hidden_size = 32
    config.data.max_seq_length = 12
    with pytest.raises(UserError) as error:
        train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    assert "data.max_seq_length (there 16, here 12)" in str(error.value)
    assert "model.overrides.hidden_size (there 16, here 32)" in str(error.value)
    assert "learning_rate" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.slow
def test_rows_without_text_are_skipped_and_counted(config, tmp_path, caplog):
    texts = sentences(300)
    lines = [json.dumps({"text": text}) for text in texts]
    lines[200:200] = ['{"text": null}', '{"text": ""}', '{"text": 7}', '{"text": "   "}']
    path = tmp_path / "data" / "mixed.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff\xfe"}\n')
    config.data.data_files = str(path)
    config.data.min_shards = 0
    config.num_train_steps = 60
    config.logging_steps = config.eval_steps = config.save_steps = 60
    with caplog.at_level("INFO"):
        train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    line = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert line["data/epoch"] >= 1
    # Five per epoch.
    assert line["data/skipped_documents"] % 5 == 0
    assert line["data/skipped_documents"] >= 5
    assert f"{line['data/skipped_documents']} documents skipped so far" in caplog.text


@pytest.fixture
def trained(config, tmp_path) -> Path:
    """A work directory with the checkpoints of steps 1 and 2 of 3."""
    config.save_steps = 1
    config.num_train_steps = 2
    train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    config.num_train_steps = 3
    return tmp_path / "run"


@pytest.mark.slow
def test_corrupt_work_directories(config, trained, caplog):
    def refuse_damage(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            train_and_evaluate(settings_of(config), str(trained))
        assert "\n" not in str(error.value)

    good = (trained / "config.json").read_bytes()
    for damage in (b"\xff\xfe", b'{"config": 3}', b"{", b'{"config"'):
        (trained / "config.json").write_bytes(damage)
        refuse_damage("is damaged, or not the config of a run")
    (trained / "config.json").unlink()
    refuse_damage("has checkpoints but no config.json")
    (trained / "config.json").write_bytes(good)

    lines = (trained / "metrics.jsonl").read_text()
    (trained / "metrics.jsonl").write_text("garbage\n" + lines)
    refuse_damage("metrics.jsonl, line 1: is not JSON")
    (trained / "metrics.jsonl").write_text(lines)

    # If no checkpoint can be read, this is an error; then the run resumes from the only one that is intact.
    shutil.copytree(trained / "checkpoints", trained / "intact")
    for step in ("1", "2"):
        shutil.rmtree(trained / "checkpoints" / step / "stream")
    refuse_damage("none of the checkpoints up to 2 can be read; they are in .*damaged. restore intact ones")
    assert sorted(path.name for path in (trained / "damaged").iterdir()) == ["1", "2"]
    shutil.copytree(trained / "intact", trained / "checkpoints", dirs_exist_ok=True)
    os.truncate(trained / "checkpoints" / "2" / "loop" / "metadata", 3)
    (trained / "model" / "trainer_state.json").write_text("")
    caplog.clear()
    train_and_evaluate(settings_of(config), str(trained))
    (message,) = [record.getMessage() for record in caplog.records if "is corrupt" in record.getMessage()]
    assert message.startswith("checkpoint 2 is corrupt (")
    assert message.endswith(f"moved to {trained / 'damaged' / '2.1'}")
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["2", "3"]
    assert json.loads((trained / "model" / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.slow
def test_a_tokenizer_from_a_start_that_was_killed_is_not_used(config, tmp_path, monkeypatch):
    config.num_train_steps = 1
    train_and_evaluate(settings_of(config), str(tmp_path / "reference"))
    config.tokenizer.vocab_size = 290
    train_and_evaluate(settings_of(config), str(tmp_path / "other"))
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "other" / "tokenizer", tmp_path / "run" / "tokenizer")
    config.tokenizer.vocab_size = 300
    train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    for name in ("tokenizer/tokenizer.json", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
