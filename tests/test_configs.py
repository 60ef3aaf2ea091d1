"""The configs: the reference run's values, and the README's table of flags."""

import re
from pathlib import Path

import pytest

from configs import (
    bert_base,
    default,
    modernbert_base,
    quickstart,
    roberta_base,
    roberta_large,
    xlm_roberta_base,
)
from mlm.data.pipeline import check_mixture
from mlm.run.workdir import flatten

MODULES = [quickstart, roberta_base, bert_base, roberta_large, modernbert_base, xlm_roberta_base]

# Flags of run_mlm_flax_stream.py and of the TrainingArguments it reads, as the issue lists them.
REFERENCE_FLAGS = """model_name_or_path model_type config_name tokenizer_name cache_dir use_fast_tokenizer dtype
dataset_name dataset_config_name train_file validation_file max_seq_length preprocessing_num_workers mlm_probability
pad_to_max_length line_by_line text_column_name shuffle_buffer_size num_train_steps num_eval_samples output_dir
overwrite_output_dir seed per_device_train_batch_size per_device_eval_batch_size learning_rate warmup_steps adam_beta1
adam_beta2 adam_epsilon weight_decay max_grad_norm gradient_accumulation_steps logging_steps eval_steps save_steps
push_to_hub hub_model_id""".split()


def test_reference_run_has_the_values_of_the_reference_command():
    config = flatten(roberta_base.get_config().to_dict())
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
def test_configs_change_values_only(module):
    assert flatten(module.get_config().to_dict()).keys() == flatten(default.get_config().to_dict()).keys()
    assert module.get_config().is_locked


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_say_command_hardware_time_and_score(module):
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
def test_an_update_has_as_many_tokens_as_in_the_paper(module, devices, tokens):
    config = module.get_config()
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * devices
    assert rows * config.data.max_seq_length == tokens
    assert check_mixture(config.data.mixture) or not config.data.mixture


def test_a_page_has_every_flag_of_the_reference_and_a_key_that_exists():
    readme = (Path(__file__).parent.parent / "docs" / "reference_script.md").read_text()
    rows = re.findall(r"^\| (`[a-z_0-9`, ]+`) \| (.+?) \|", readme, flags=re.MULTILINE)
    table = {flag: keys for flags, keys in rows for flag in re.findall(r"`(\w+)`", flags)}
    assert [flag for flag in REFERENCE_FLAGS if flag not in table] == []
    known = flatten(default.get_config().to_dict())
    for keys in table.values():
        if keys == "none" or keys.startswith("`--"):
            continue
        group = ""
        for key in re.findall(r"`([\w.]+)", keys):
            # "`optimizer.adam_beta1`, `.adam_beta2`" shares the group.
            group = key.split(".")[0] if not key.startswith(".") else group
            key = group + key if key.startswith(".") else key
            assert key in known or key == "model.overrides", key
