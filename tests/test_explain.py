"""--mode=explain: every key is explained by the comments of configs/default.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import default
from mlm.errors import UserError
from mlm.modes.explain import explain, read_explanations
from mlm.run.workdir import flatten

ROOT = Path(__file__).parent.parent
SOURCE = Path(default.__file__).read_text(encoding="utf-8")
DEFAULTS = flatten(default.get_config().to_dict())


def told(*names, values=None):
    return explain(names, SOURCE, defaults=DEFAULTS, values=values, config="other.py")


def test_every_key_is_explained_once():
    explanations = read_explanations(SOURCE)
    keys = [key for explanation in explanations for key in explanation.keys]
    assert sorted(keys) == sorted(DEFAULTS)
    assert all(len(explanation.text) > 25 for explanation in explanations)


def test_a_comment_is_of_the_keys_up_to_the_next_one_or_of_the_group():
    source = """
def get_config():
    config = ConfigDict()

    # Of the first two,
    # on two lines.
    config.a = 1
    config.b = (
        2,
    )
    # Of the third.
    config.c = 3

    # Of the group.
    config.group = group = ConfigDict()
    group.d = 4
    group.e = 5
    # Of its own.
    group.f = 6
    return config
"""
    assert [(explanation.keys, explanation.text) for explanation in read_explanations(source)] == [
        (("a", "b"), "Of the first two, on two lines."),
        (("c",), "Of the third."),
        (("group.d", "group.e"), "Of the group."),
        (("group.f",), "Of its own."),
    ]


def test_a_key_is_told_with_its_default_and_what_a_config_makes_of_it():
    assert told("data.max_seq_length", values=DEFAULTS | {"data.max_seq_length": 64}) == (
        "data.max_seq_length = 128   (64 in other.py)\n    Tokens in a row, begin and end tokens included."
    )
    text = told("eval_steps")
    assert text.startswith("eval_steps = 500\n")
    assert text.endswith("(said of logging_steps, save_steps, too)")


def test_a_group_and_everything():
    assert told("checkpoint").count(" = ") == sum(key.startswith("checkpoint.") for key in DEFAULTS)
    everything = told()
    assert all(f"{key} = " in everything for key in DEFAULTS)


def test_what_is_not_there_is_asked_back():
    with pytest.raises(
        UserError, match=r"^learning_rate: there is no such key; did you mean optimizer.learning_rate\?$"
    ):
        told("learning_rate")


def run(*words):
    command = [sys.executable, "main.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_line():
    done = run("--mode=explain", "--config=configs/quickstart.py", "optimizer.weight_decay", "seed")
    assert done.returncode == 0, done.stderr
    assert "seed = 42\n" in done.stdout
    assert "optimizer.weight_decay = 0.0   (0.01 in the config)\n" in done.stdout


def test_help_names_every_mode_with_examples():
    done = run("--help")
    for mode in ("check", "explain", "train_tokenizer", "show_data", "export", "fill_mask", "report"):
        assert f"\n    {mode} " in done.stdout
    assert done.stdout.count("\n    python main.py --") >= 5
    assert "--[no]overwrite" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--mode=explain"], ["--mode=explain", "seed"]])
def test_a_reader_that_goes_away_is_no_error(words):
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(
            [sys.executable, "main.py", *words], cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
