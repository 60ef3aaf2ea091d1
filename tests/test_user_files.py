"""Files of the user are neither replaced nor deleted; unwritable outputs are reported first."""

import json
from pathlib import Path

import pytest

from mlm.downstream import tasks, tokens
from mlm.errors import UserError
from mlm.export import fill_mask, model_directory
from mlm.load import load_model
from mlm.modes import report, score, train_tokenizer
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import WorkDir
from mlm.stages import check as check_stages
from tests.test_workdir import SETTINGS, create
from tests.tiny import tiny_settings


@pytest.mark.parametrize("name", ["model", "metrics.jsonl"])
def test_a_directory_that_is_not_that_of_a_run_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"has {name} but no config.json; restore it, or choose another"):
        WorkDir(str(tmp_path)).resume(SETTINGS)


def test_a_tokenizer_of_the_user_is_kept(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "mine.txt").write_text("a")
    workdir = WorkDir(str(tmp_path))
    create(workdir, workdir.resume(SETTINGS), step=0)
    assert (tmp_path / "tokenizer.old-1" / "mine.txt").read_text() == "a"
    assert not (tmp_path / "tokenizer" / "mine.txt").exists()


def test_overwrite_moves_runs_only(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("a")
    assert WorkDir(str(tmp_path / "run")).move_aside() is None
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_checkpoints_of_other_programs_are_not_exported_models(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 500, "log_history": []}))
    assert not model_directory.is_exported(str(tmp_path))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 5, "tokens_seen": 9, "hardware": "cpu"}))
    assert model_directory.is_exported(str(tmp_path))


def test_an_output_is_not_the_input_and_can_be_written(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"good": "a", "bad": "b"}\n')
    with pytest.raises(UserError, match=r"--output=.*pairs.jsonl: is the file to read; name another"):
        score.check_output(str(path), str(path))
    with pytest.raises(UserError, match=r"--output=/proc/a.jsonl: cannot be written \(.*\); name another file"):
        score.check_output("/proc/a.jsonl", str(path))
    with pytest.raises(UserError, match=r"--output=/proc/a/b: cannot be created \(.*\); name another directory"):
        train_tokenizer.run(SETTINGS, None, output="/proc/a/b")
    with pytest.raises(UserError, match=r"--output=.*: is a directory; name a file"):
        report.run(None, [], output=str(tmp_path), reference=None, defaults={}, key_changes=None)
    assert list(tmp_path.iterdir()) == [path]


def test_lone_surrogates_are_replaced(tiny_tokenizer):
    text = "a \ud83d b"
    found = tokens.encode(tiny_tokenizer, [text], max_length=9)
    assert found.ids == tokens.encode(tiny_tokenizer, ["a ? b"], max_length=9).ids
    (ids,) = fill_mask.encode(tiny_tokenizer, [f"{text} <mask>"], max_seq_length=9)
    assert tiny_tokenizer.mask_id in ids


@pytest.fixture(scope="module")
def tiny_tokenizer():
    from mlm.data.train_tokenizer import train_tokenizer

    return train_tokenizer(iter(["a b c"] * 9), vocab_size=300, max_seq_length=16)


def test_predictions_of_one_evaluation_have_a_blank_after_the_step():
    prediction = fill_mask.MaskPrediction("a <mask>", ((("b", 0.5),),))
    assert fill_mask.compare_predictions({"step 3": [prediction]}).splitlines()[1] == "      step 3   b 50.0 %"
    assert fill_mask.format_predictions([prediction]).splitlines()[1] == "      b 50.0 %"


@pytest.mark.parametrize("line", ["[1, 2]", '{"mine": 1}', '{"step": "3"}'])
def test_metrics_without_a_step_are_an_error(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1: has no step; remove the line"):
        read_metrics(str(path))


def test_damaged_task_files(tmp_path):
    contents = {
        "a.jsonl.xz": b"\xfd7zXZ\x00\x00",
        "b.jsonl.xz": b"no xz file",
        "c.jsonl": b"[" * 200_000,
        "d.jsonl": b'{"text": "a", "label": 0.5}\n{"text": "b", "label": 1' + b"0" * 400 + b"}\n",
    }
    for name, content in contents.items():
        path = tmp_path / name
        Path(path).write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read|is not JSON|a value that is not finite"):
            tasks.open_task(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_steps": 9_999_999_999}, "num_train_steps=9999999999: must be at most 2,147,483,647"),
        ({"data.num_eval_samples": 10**20}, "must be at most 2,147,483,647"),
        (
            {"optimizer.warmup_steps": "1e999 tokens"},
            "optimizer.warmup_steps='1e999 tokens': must be",
        ),
        ({"stages": ({"name": "a", 1: 2},)}, "the keys must be strings, such as"),
    ],
)
def test_values_that_are_too_large_or_of_another_type(changes, message):
    with pytest.raises(UserError) as error:
        check_stages(tiny_settings("*.jsonl", **changes))
    assert message in str(error.value)


def test_a_truncated_model(tmp_path):
    encoder = {"model_type": "roberta", "vocab_size": 300, "hidden_size": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(encoder))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match=r"model.safetensors: is damaged \(.*\); export the model again"):
        load_model(str(tmp_path))
