"""Everything a user can get wrong: one clear line, exit code 2, nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mlm.curves import read_metrics
from mlm.errors import UserError
from mlm.train import train_and_evaluate
from mlm.workdir import WorkDir
from tests.tiny import sentences, tiny_config, write_corpus

REPO = Path(__file__).parent.parent
QUICKSTART = "--config=configs/quickstart.py"


def run_main(*flags: str) -> subprocess.CompletedProcess:
    """Runs main.py far enough to refuse its command line."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "main.py", *flags], cwd=REPO, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "no --config=FILE; there are configs/bert_base.py, configs/modernbert_base.py, configs/quickstart.py"),
        (("--config=configs/quikstart.py",), "there is no such file; did you mean configs/quickstart.py?"),
        (("--config", "configs/quikstart.py"), "there is no such file; did you mean configs/quickstart.py?"),
        ((QUICKSTART,), "no --workdir"),
        ((QUICKSTART, "--workdir={tmp}/x", "surplus"), "'surplus' is not a flag"),
        ((QUICKSTART, "--workdr={tmp}/x"), "Unknown command line flag 'workdr'. Did you mean: workdir ?"),
        ((QUICKSTART, "--config.optimizer.learning_rat=1"), "did you mean optimizer.learning_rate?"),
        ((QUICKSTART, "--config.optimiser.learning_rate=1"), "did you mean optimizer.learning_rate?"),
        ((QUICKSTART, "--config.data=3"), "--config.data is a group of keys; set one of them: data.cache_dir, "),
        ((QUICKSTART, "--config.num_train_steps=many"), "--config.num_train_steps=many"),
        ((QUICKSTART, "--config.model.overrides.hidden_size=1.5"), "--config.model.overrides.hidden_size=1.5"),
        ((QUICKSTART, "--config.hub.push_to_hub=perhaps"), "--config.hub.push_to_hub=perhaps"),
        (("--config={tmp}/broken.py", "--workdir={tmp}/x"), "SyntaxError"),
        (("--config={tmp}/typo.py", "--workdir={tmp}/x"), "learning_rat"),
        (("--config={tmp}/wrong_type.py", "--workdir={tmp}/x"), "num_train_steps"),
        (("--config={tmp}/bare.py", "--workdir={tmp}/x"), "let its get_config() start from configs/default.py"),
        (("--config={tmp}/no_function.py", "--workdir={tmp}/x"), "get_config"),
    ],
)
def test_command_line(flags, message, tmp_path):
    start = "from configs import default\n\n\ndef get_config():\n    config = default.get_config()\n"
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "typo.py").write_text(start + "    config.optimizer.learning_rat = 1.0\n    return config\n")
    (tmp_path / "wrong_type.py").write_text(start + "    config.num_train_steps = 'ten'\n    return config\n")
    (tmp_path / "bare.py").write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'seed': 1})\n"
    )
    (tmp_path / "no_function.py").write_text("config = {}\n")
    result = run_main(*(flag.format(tmp=tmp_path) for flag in flags))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_mistake_found_after_the_imports_is_one_line_too(tmp_path):
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


def refuse(config: ConfigDict, tmp_path: Path, message: str) -> None:
    """Expects a UserError of one line with `message` in it, and no work directory."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        train_and_evaluate(config, str(tmp_path / "run"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_train_steps", 0, "num_train_steps=0 must be at least 1"),
        ("per_device_train_batch_size", -1, "per_device_train_batch_size=-1 must not be negative"),
        ("per_device_eval_batch_size", -1, "per_device_eval_batch_size=-1 must be at least 1"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps=0 must be at least 1"),
        ("logging_steps", 0, "logging_steps=0"),
        ("eval_steps", 0, "eval_steps=0"),
        ("save_steps", -5, "save_steps=-5"),
        ("data.num_eval_samples", 0, "data.num_eval_samples=0"),
        ("data.max_seq_length", 2, "data.max_seq_length=2 must be at least 3"),
        ("data.max_seq_length", 19, "data.max_seq_length=19 is past the model's positions, which end at 18"),
        ("seed", -1, "seed=-1 must lie between 0 and 2**32 - 1"),
        ("data.data_files", "", "data.data_files='' names no file"),
        ("data.data_files", 5, "data.data_files=5 names no file"),
        ("masking.mask_token_share", float("nan"), "must not be negative"),
        ("data.packing", "tight", "data.packing='tight' is not one of concatenate"),
        ("data.shuffle_buffer_size", -1, "data.shuffle_buffer_size=-1"),
        ("data.prefetch_batches", 0, "data.prefetch_batches=0"),
        ("data.max_failed_shards", -1, "data.max_failed_shards=-1 must not be negative"),
        ("data.network_deadline_seconds", -1.0, "data.network_deadline_seconds=-1.0 must not be negative"),
        ("data.network_timeout_seconds", 0.0, "data.network_timeout_seconds=0.0 must be positive"),
        ("data.text_column_name", "body", "id"),
        ("data.num_eval_samples", 10**6, "data.num_eval_samples"),
        ("per_device_train_batch_size", 10**5, "per_device_train_batch_size"),
        ("tokenizer.tokenizer_name", "/nowhere/tokenizer", "/nowhere/tokenizer"),
        ("tokenizer.backend", "magic", "tokenizer.backend='magic'"),
        ("tokenizer.train_documents", 0, "tokenizer.train_documents=0"),
        ("tokenizer.algorithm", "words", "tokenizer.algorithm='words' is not one of auto, bpe, wordpiece, unigram"),
        ("tokenizer.lowercase", True, "tokenizer.lowercase=True does not go with the bpe tokenizer of roberta models"),
        ("export.dtype", "float64", "export.dtype='float64' is not one of float32, bfloat16, float16"),
        ("model.model_type", "robertina", "robertina"),
        ("model.config_name", "/nowhere/model", "/nowhere/model"),
        ("model.model_name_or_path", "/nowhere/model", "/nowhere/model"),
        ("model.dtype", "float64", "model.dtype='float64' is not one of float32, bfloat16"),
        ("model.attention", "flash", "model.attention='flash' is not one of auto, plain, xla, cudnn"),
        ("model.attention", "cudnn", "model.attention='cudnn' needs an NVIDIA GPU"),
        ("model.remat", "some", "model.remat='some' is not one of auto, none, dots, full"),
        ("model.overrides.vocab_size", 100, "set --config.model.overrides.vocab_size="),
        ("model.overrides.num_attention_heads", 3, "num_attention_heads"),
        ("model.overrides.hidden_act", "relu6", "relu6"),
        ("masking.mlm_probability", 0.0, "masking.mlm_probability=0.0 must lie in (0, 1]"),
        ("masking.mlm_probability", 1.5, "masking.mlm_probability=1.5"),
        ("masking.mask_token_share", 0.95, "add up to more than 1"),
        ("masking.random_token_share", -0.1, "must not be negative"),
        ("optimizer.warmup_steps", 9, "optimizer.warmup_steps=9 must lie between 0 and num_train_steps=8"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate=0.0 must be positive"),
        ("optimizer.schedule", "square", "optimizer.schedule='square'"),
        ("optimizer.adam_beta2", 1.0, "optimizer.adam_beta2=1.0"),
        ("optimizer.adam_epsilon", 0.0, "optimizer.adam_epsilon=0.0"),
        ("optimizer.max_grad_norm", -1.0, "optimizer.max_grad_norm=-1.0"),
        ("checkpoint.keep_checkpoints", 0, "checkpoint.keep_checkpoints=0"),
        ("report.sentences", ("no hole in it",), "no <mask> in the sentence"),
    ],
)
def test_values(config, tmp_path, key, value, message):
    config.update_from_flattened_dict({key: value})
    refuse(config, tmp_path, message)


def test_files(config, tmp_path):
    data = tmp_path / "data"
    (data / "empty.txt").write_text("")
    (data / "blank.txt").write_text("\n\n  \n")
    (data / "short.txt").write_text("Only this.\n")
    (data / "not.parquet").write_text("this is no parquet")
    (data / "notes.odt").write_text("x")
    for files, message in [
        (str(data / "absent.txt"), "absent.txt"),
        (str(data / "*.csv"), "*.csv"),
        (str(data / "notes.odt"), "notes.odt"),
        (str(data / "not.parquet"), "not.parquet"),
        (str(data / "empty.txt"), "empty"),
        (str(data / "blank.txt"), "blank.txt"),
        (str(data / "short.txt"), "data.num_eval_samples"),
        ([str(data / "short.txt"), str(data / "part-0.jsonl")], "one kind"),
    ]:
        config.data.data_files = files
        refuse(config, tmp_path, message)


def test_names_that_need_a_network_that_is_not_there(config, tmp_path):
    config.data.data_files = None
    config.data.dataset_name = "nobody/nothing"
    refuse(config, tmp_path, "nobody/nothing")
    config.data.dataset_name = "docstrings"
    config.tokenizer.tokenizer_name = "nobody/no-tokenizer"
    refuse(config, tmp_path, "nobody/no-tokenizer")
    config.model.config_name = "nobody/no-model"
    refuse(config, tmp_path, "nobody/no-model")


def test_pushing_without_a_token(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config.hub.push_to_hub = True
    refuse(config, tmp_path, "hub.push_to_hub")


def test_tokenizer_without_a_mask_token(config, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "data" / "no_mask")
    config.tokenizer.tokenizer_name = str(tmp_path / "data" / "no_mask")
    refuse(config, tmp_path, "no mask token")


def test_work_directories(config, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir, message in [(tmp_path / "file", "is a file"), (tmp_path / "file" / "run", "is a file")]:
        with pytest.raises(UserError, match=message):
            train_and_evaluate(config, str(workdir))
    with pytest.raises(UserError, match="is not writable"):
        train_and_evaluate(config, "/proc/run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="not a run's config"):
        train_and_evaluate(config, str(tmp_path / "other"))


@pytest.mark.slow
def test_resuming_with_another_config_names_the_keys(config, tmp_path):
    config.num_train_steps = 1
    train_and_evaluate(config, str(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    config.num_train_steps = 2
    config.optimizer.learning_rate = 1e-3
    config.model.overrides.hidden_size = 32
    config.data.max_seq_length = 12
    with pytest.raises(UserError) as error:
        train_and_evaluate(config, str(tmp_path / "run"))
    assert "data.max_seq_length (there 16, here 12)" in str(error.value)
    assert "model.overrides.hidden_size (there 16, here 32)" in str(error.value)
    assert "learning_rate" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_rows_without_text_are_skipped_and_counted(config, tmp_path, caplog):
    texts = sentences(300)
    lines = [json.dumps({"text": text}) for text in texts]
    lines[200:200] = ['{"text": null}', '{"text": ""}', '{"text": 7}', '{"text": "   "}']
    path = tmp_path / "data" / "mixed.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff\xfe"}\n')
    config.data.data_files = str(path)
    config.num_train_steps = 60
    config.logging_steps = config.eval_steps = config.save_steps = 60
    with caplog.at_level("INFO"):
        train_and_evaluate(config, str(tmp_path / "run"))
    line = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert line["data/epoch"] >= 1
    # Five of them a pass over the file.
    assert line["data/skipped_rows"] % 5 == 0
    assert line["data/skipped_rows"] >= 5
    assert f"{line['data/skipped_rows']} rows so far were left out" in caplog.text


def test_work_directories_that_cannot_hold_checkpoints(config, tmp_path):
    for workdir, message in [("gs://bucket/run", "URLs are not supported"), (f"{tmp_path}/a[1]", "cannot hold")]:
        with pytest.raises(UserError, match=message):
            train_and_evaluate(config, workdir)
    assert not (tmp_path / "a[1]").exists()


def test_two_runs_in_one_work_directory(config, tmp_path):
    (tmp_path / "run").mkdir()
    holder = WorkDir(str(tmp_path / "run"))
    holder.lock()
    with pytest.raises(UserError, match="is in use by another run"):
        train_and_evaluate(config, str(tmp_path / "run"))
    holder.unlock()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.fixture
def trained(config, tmp_path) -> Path:
    """A work directory with the checkpoints of updates 1 and 2, the run not at its end."""
    config.save_steps = 1
    config.num_train_steps = 2
    train_and_evaluate(config, str(tmp_path / "run"))
    config.num_train_steps = 3
    return tmp_path / "run"


@pytest.mark.slow
def test_damaged_work_directories(config, trained, caplog):
    def refuse_damage(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            train_and_evaluate(config, str(trained))
        assert "\n" not in str(error.value)

    good = (trained / "config.json").read_bytes()
    for damage in (b"\xff\xfe", b'{"config": 3}', b"{", b'{"config"'):
        (trained / "config.json").write_bytes(damage)
        refuse_damage("is damaged or not a run's config")
    (trained / "config.json").unlink()
    refuse_damage("has checkpoints but no config.json")
    (trained / "config.json").write_bytes(good)

    lines = (trained / "metrics.jsonl").read_text()
    (trained / "metrics.jsonl").write_text("garbage\n" + lines)
    refuse_damage("metrics.jsonl, line 1, is not JSON")
    (trained / "metrics.jsonl").write_text(lines)

    # All are damaged, then one is whole: that one is gone on from.
    shutil.copytree(trained / "checkpoints", trained / "whole")
    for step in ("1", "2"):
        shutil.rmtree(trained / "checkpoints" / step / "stream")
    refuse_damage("none of the checkpoints up to 2 can be read; they are in .*damaged. Put whole ones back")
    assert sorted(path.name for path in (trained / "damaged").iterdir()) == ["1", "2"]
    shutil.copytree(trained / "whole", trained / "checkpoints", dirs_exist_ok=True)
    os.truncate(trained / "checkpoints" / "2" / "loop" / "metadata", 3)
    (trained / "model" / "trainer_state.json").write_text("")
    caplog.clear()
    train_and_evaluate(config, str(trained))
    (told,) = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert told.startswith("checkpoint 2 is damaged (")
    assert told.endswith(f"moved to {trained / 'damaged' / '2.1'}")
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["2", "3"]
    assert json.loads((trained / "model" / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.slow
def test_a_tokenizer_left_by_a_start_that_was_killed_is_not_used(config, tmp_path, monkeypatch):
    config.num_train_steps = 1
    train_and_evaluate(config, str(tmp_path / "straight"))
    config.tokenizer.vocab_size = 290
    train_and_evaluate(config, str(tmp_path / "other"))
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "other" / "tokenizer", tmp_path / "run" / "tokenizer")
    config.tokenizer.vocab_size = 300
    train_and_evaluate(config, str(tmp_path / "run"))
    for name in ("tokenizer/tokenizer.json", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
