"""The configs: values of the reference run, families of the quickstart, values given on the command line."""

import dataclasses
import json
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from configs import (
    bert_base,
    default,
    encoder_base,
    laptop,
    modernbert_base,
    quickstart,
    roberta_base,
    roberta_large,
    xlm_roberta_base,
)
from mlm.models.families import FAMILIES
from mlm.reporting.curves import read_metrics
from mlm.settings import RunSettings
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, write_corpus

REPO = Path(__file__).parent.parent
MODULES = [quickstart, laptop, encoder_base, roberta_base, bert_base, roberta_large, modernbert_base, xlm_roberta_base]

# Flags of run_mlm_flax_stream.py and of the TrainingArguments it reads, as the issue lists them.
REFERENCE_FLAGS = """model_name_or_path model_type config_name tokenizer_name cache_dir use_fast_tokenizer dtype
dataset_name dataset_config_name train_file validation_file max_seq_length preprocessing_num_workers mlm_probability
pad_to_max_length line_by_line text_column_name shuffle_buffer_size num_train_steps num_eval_samples output_dir
overwrite_output_dir seed per_device_train_batch_size per_device_eval_batch_size learning_rate warmup_steps adam_beta1
adam_beta2 adam_epsilon weight_decay max_grad_norm gradient_accumulation_steps logging_steps eval_steps save_steps
push_to_hub hub_model_id""".split()


def test_reference_run_has_the_values_of_the_reference_command():
    config = settings_of(roberta_base.get_config()).flat()
    assert {
        "num_train_steps": 10_000,
        "per_device_train_batch_size": 128,
        "per_device_eval_batch_size": 128,
        "gradient_accumulation_steps": 1,
        "logging_steps": 250,
        "eval_steps": 1_000,
        "save_steps": 1_000,
        "seed": 42,
        "data.dataset_name": "allenai/c4",
        "data.dataset_config_name": "en",
        "data.max_seq_length": 128,
        "data.shuffle_buffer_size": 10_000,
        "data.interleave_shards": 1,
        "data.shuffle_piece_bytes": 0,
        "data.num_eval_samples": 5_000,
        "data.packing": "concatenate",
        "masking.mlm_probability": 0.15,
        "masking.mask_replace_prob": 0.8,
        "masking.random_replace_prob": 0.1,
        "optimizer.learning_rate": 3e-4,
        "optimizer.warmup_steps": 1_000,
        "optimizer.schedule": "linear",
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.98,
        "optimizer.adam_epsilon": 1e-8,
        "optimizer.weight_decay": 0.0,
        "hub.push_to_hub": True,
    }.items() <= config.items()


@pytest.mark.parametrize("module", MODULES)
def test_a_config_has_the_keys_of_the_defaults_and_is_locked(module):
    assert settings_of(module.get_config()).flat().keys() == settings_of(default.get_config()).flat().keys()
    assert module.get_config().is_locked


@pytest.mark.parametrize("module", MODULES)
def test_a_docstring_states_command_hardware_time_and_score(module):
    assert [word for word in ("Command:", "Hardware:", "Time:", "Expected:") if word not in module.__doc__] == []


@pytest.mark.parametrize(
    ("module", "devices", "tokens"),
    [
        (bert_base, 8, 256 * 512),
        (roberta_large, 32, 8192 * 512),
        (modernbert_base, 8, 4608 * 1024),
        (xlm_roberta_base, 32, 8192 * 512),
    ],
)
def test_a_step_has_as_many_tokens_as_in_the_paper(module, devices, tokens):
    config = module.get_config()
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * devices
    assert rows * config.data.max_seq_length == tokens
    assert RunSettings.from_dict(config.to_dict())


def test_the_page_of_reference_flags_lists_every_flag_with_a_key_that_exists():
    page = (REPO / "docs" / "reference_script.md").read_text()
    rows = re.findall(r"^\| (`[a-z_0-9`, ]+`) \| (.+?) \|", page, flags=re.MULTILINE)
    table = {flag: keys for flags, keys in rows for flag in re.findall(r"`(\w+)`", flags)}
    assert [flag for flag in REFERENCE_FLAGS if flag not in table] == []
    known = settings_of(default.get_config()).flat()
    for keys in table.values():
        if keys == "none" or keys.startswith("`--"):
            continue
        group = ""
        for key in re.findall(r"`([\w.]+)", keys):
            # "`optimizer.adam_beta1`, `.adam_beta2`" shares the group.
            group = key.split(".")[0] if not key.startswith(".") else group
            key = group + key if key.startswith(".") else key
            assert key in known or key == "model.overrides", key


def test_the_families_of_the_quickstart_differ_in_the_model_only():
    values = {family: settings_of(quickstart.get_config(family)).flat() for family in FAMILIES}
    assert values["modernbert"] == settings_of(quickstart.get_config()).flat()
    for family in FAMILIES:
        differing = {key for key in values[family] if values[family][key] != values["roberta"][key]}
        assert all(key.startswith("model.") for key in differing)
        assert values[family]["model.model_type"] == family


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_quickstart_trains_every_family(family, tmp_path):
    config = quickstart.get_config(family)
    config.num_train_steps = config.eval_steps = config.save_steps = 20
    config.logging_steps = 2
    config.optimizer.warmup_steps = 1
    config.per_device_train_batch_size = 2
    config.data.data_files = write_corpus(tmp_path)
    config.data.num_eval_samples = 16
    config.tokenizer.vocab_size = 300
    config.tokenizer.train_documents = 200
    config.model.overrides.num_hidden_layers = 1
    train_and_evaluate(settings_of(config), str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == family
    lines = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-3:]) < losses[0] - 1.5


PARSE = "import json, main, sys; main.parse_flags(sys.argv); json.dump(main.FLAGS.config.to_dict(), sys.stdout)"


def parse(*words: str) -> dict:
    """Returns the config that main.py makes of the command line, with full keys."""
    command = [sys.executable, "-c", PARSE, *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {".".join(path): value for path, value in traverse_util.flatten_dict(json.loads(done.stdout)).items()}


def optional_keys(settings: type = RunSettings, prefix: str = "") -> dict[str, type]:
    """Returns the keys that may be None, with the type of their other values."""
    found = {}
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(field.type):
            found |= optional_keys(field.type, f"{prefix}{field.name}.")
        elif types.NoneType in typing.get_args(field.type):
            found[prefix + field.name] = typing.get_args(field.type)[0]
    return found


@pytest.mark.slow
def test_none_on_the_command_line_resets_any_optional_key(tmp_path):
    optional = optional_keys()
    assert {"model.config_name", "model.overrides.type_vocab_size", "data.data_files"} <= optional.keys()
    assert set(optional.values()) == {str, int, float, bool}
    values = {key: kind("1") for key, kind in optional.items()}
    lines = [f"    config.{key} = {value!r}" for key, value in values.items()]
    (tmp_path / "all.py").write_text(
        "\n".join(["from configs import default", "def get_config():", "    config = default.get_config()"])
        + "\n"
        + "\n".join([*lines, "    return config"])
    )
    config = f"--config={tmp_path / 'all.py'}"
    assert values.items() <= parse(config).items()
    reset = parse(config, *(f"--config.{key}=None" for key in optional))
    assert {key for key in optional if reset[key] is not None} == set()


def test_the_quickstart_takes_a_family_after_a_colon():
    config = parse("--config=configs/quickstart.py:roberta", "--config.num_train_steps=3")
    assert config["model.model_type"] == "roberta"
    assert config["model.overrides.local_attention"] is None
    assert config["num_train_steps"] == 3
