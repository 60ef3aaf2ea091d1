"""--mode=explain prints the comments of configs/default.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import default
from mlm.errors import UserError
from mlm.modes.explain import explain, read_explanations
from mlm.settings import RunSettings

ROOT = Path(__file__).parent.parent
SOURCE = Path(default.__file__).read_text(encoding="utf-8")
DEFAULTS = RunSettings.from_dict(default.get_config().to_dict()).flat()


def explained(*names, values=None):
    return explain(names, SOURCE, defaults=DEFAULTS, values=values)


def test_every_key_is_explained_once():
    explanations = read_explanations(SOURCE)
    keys = [key for explanation in explanations for key in explanation.keys]
    assert sorted(keys) == sorted([*DEFAULTS, "model.overrides"])
    assert all(len(explanation.text) > 15 for explanation in explanations)


def test_a_comment_explains_the_group_or_the_keys_below_it():
    source = """
def get_config():
    config = ConfigDict()

    # The first two keys,
    # on two lines.
    config.a = 1
    config.b = (
        2,
    )

    config.group = group = ConfigDict()
    # The third key.
    group.c = 3
    # The inner group.
    group.inner = inner = ConfigDict()
    # A key of it.
    inner.d = 4
    return config
"""
    assert [(explanation.keys, explanation.text) for explanation in read_explanations(source)] == [
        (("a", "b"), "The first two keys, on two lines."),
        (("group.c",), "The third key."),
        (("group.inner",), "The inner group."),
        (("group.inner.d",), "A key of it."),
    ]


def test_a_key_is_printed_with_its_value_and_its_default():
    assert explained("data.max_seq_length", values=DEFAULTS | {"data.max_seq_length": 64}) == (
        "data.max_seq_length = 64   (default: 128)\n"
        "    Sequence length in tokens, including the begin and end tokens. 128 as in the reference run."
    )


def test_a_key_that_is_explained_together_with_others_names_them():
    text = explained("model.overrides.global_rope_theta")
    assert text.endswith("\n    (also for model.overrides.local_rope_theta)")


def test_a_key_is_printed_after_the_explanation_of_its_group():
    assert re.fullmatch(
        r"model\.overrides\.\*\n    Fields of the model's .*\n\nmodel\.overrides\.hidden_size = None\n    Width of .*",
        explained("model.overrides.hidden_size"),
        re.DOTALL,
    )


def test_a_group_has_all_of_its_keys_and_no_name_means_all_keys():
    assert explained("checkpoint").count(" = ") == sum(key.startswith("checkpoint.") for key in DEFAULTS)
    everything = explained()
    assert all(f"{key} = " in everything for key in DEFAULTS)


def test_an_unknown_key_is_answered_with_the_nearest_one():
    with pytest.raises(UserError, match=r"^learning_rate: unknown key; did you mean optimizer.learning_rate\?$"):
        explained("learning_rate")


def run(*words):
    command = [sys.executable, "main.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_explain_on_the_command_line():
    done = run("--mode=explain", "--config=configs/quickstart.py", "optimizer.weight_decay", "seed")
    assert done.returncode == 0, done.stderr
    assert "seed = 42\n" in done.stdout
    assert "optimizer.weight_decay = 0.01   (default: 0.0)\n" in done.stdout


def test_help_names_every_mode_with_examples():
    done = run("--help")
    for mode in ("check", "explain", "train_tokenizer", "show_data", "export", "fill_mask", "report"):
        assert f"\n    {mode} " in done.stdout
    assert done.stdout.count("\n    python main.py --") >= 5
    assert "--[no]overwrite" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--mode=explain"], ["--mode=explain", "seed"]])
def test_a_closed_stdout_ends_the_program_with_141_and_no_message(words):
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(
            [sys.executable, "main.py", *words], cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
