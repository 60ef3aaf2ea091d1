# ruff: noqa: E501, a message stands as its reader sees it.
import dataclasses
import glob
import importlib
import json
import os
import subprocess
import sys

import pytest

from configs import default
from mlm import settings as settings_lib
from mlm.errors import UserError
from mlm.models import config as model_config
from mlm.settings import (
    KEYS,
    MUTABLE_KEYS,
    OPTIMIZERS,
    SCHEDULES,
    MixtureEntry,
    ModelOverrides,
    OptimizerSettings,
    RunSettings,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def valid() -> dict:
    """A valid config: the defaults of configs/default.py, except for what the cases below build on."""
    return merged(default.get_config().to_dict(), VALID)


def merged(nested: dict, changes: dict) -> dict:
    return nested | {
        key: merged(nested[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }


VALID = {
    "seed": 0,
    "num_train_steps": 8,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "logging_steps": 2,
    "eval_steps": 4,
    "save_steps": 4,
    "max_hours": 0.0,
    "stages": (),
    "data": {
        "dataset_name": "docstrings",
        "dataset_config_name": None,
        "data_files": None,
        "eval_data_files": None,
        "mixture": (),
        "split": "train",
        "text_column_name": "text",
        "max_seq_length": 16,
        "packing": "concatenate",
        "shuffle_buffer_size": 100,
        "num_eval_samples": 30,
        "skip_steps": (),
        "network_deadline_seconds": 300.0,
        "network_timeout_seconds": 30.0,
        "max_failed_shards": 8,
        "prefetch_batches": 4,
        "cache_dir": None,
    },
    "tokenizer": {
        "tokenizer_name": None,
        "use_fast_tokenizer": True,
        "algorithm": "auto",
        "lowercase": False,
        "vocab_size": 300,
        "train_documents": 100,
        "backend": "auto",
    },
    "model": {
        "model_type": "roberta",
        "config_name": None,
        "model_name_or_path": None,
        "dtype": "float32",
        "attention": "auto",
        "remat": "auto",
        "overrides": {field.name: None for field in dataclasses.fields(ModelOverrides)},
    },
    "masking": {
        "strategy": "token",
        "mlm_probability": 0.15,
        "mask_replace_prob": 0.8,
        "random_replace_prob": 0.1,
        "eval_strategy": "token",
        "eval_mlm_probability": 0.15,
        "eval_mask_replace_prob": 0.8,
        "eval_random_replace_prob": 0.1,
    },
    "loss": {"z_loss": 0.0, "label_smoothing": 0.0},
    "optimizer": {
        **{field.name: None for field in dataclasses.fields(OptimizerSettings)},
        "name": "adamw",
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "schedule": "linear",
        "weight_decay": 0.0,
        "layer_decay": 1.0,
        "ema_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_skipped_steps": 10,
        "spike_factor": 0.0,
    },
    "checkpoint": {"keep_checkpoints": 2, "keep_every_steps": 0, "init_from": None, "init_mode": None},
    "export": {"dtype": "float32"},
    "hub": {"push_to_hub": False, "hub_model_id": None, "private": False, "license": None, "languages": ()},
    "profile": {"first_step": 10, "num_steps": 0},
    "report": {"sentences": ("The <mask> is here.",)},
}


def changed(changes: dict) -> dict:
    nested = valid()
    for key, value in changes.items():
        *groups, name = key.split(".")
        group = nested
        for part in groups:
            group = group.setdefault(part, {})
        group[name] = value
    return nested


DURATION = "must be a number of steps, a fraction of the run in (0, 1), or a string such as '3e9 tokens'"
WRONG = [
    # RunSettings' own keys.
    ({"seed": -1}, "seed=-1: must lie between 0 and 2**32 - 1"),
    ({"seed": 2**32}, "seed=4294967296: must lie between 0 and 2**32 - 1"),
    ({"num_train_steps": 0}, "num_train_steps=0: must be at least 1"),
    ({"per_device_train_batch_size": -1}, "per_device_train_batch_size=-1: must not be negative"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0: must be at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: must be at least 1"),
    ({"logging_steps": 0}, "logging_steps=0: must be at least 1"),
    ({"eval_steps": 0}, "eval_steps=0: must be at least 1"),
    ({"save_steps": -5}, "save_steps=-5: must be at least 1"),
    ({"max_hours": -1}, "max_hours=-1.0: must be a number of hours, or 0 for no limit"),
    # data
    ({"data.dataset_name": ""}, "data.dataset_name='': there is no data; set it, or data.data_files"),
    (
        {"data.data_files": ""},
        "data.data_files='': no files given; set a path, a glob, a URL, a list of these, or None",
    ),
    (
        {"data.eval_data_files": ()},
        "data.eval_data_files=(): no files given; set a path, a glob, a URL, a list of these, or None",
    ),
    ({"data.data_files": 5}, "data.data_files=5: must be a string or a list of strings or None"),
    ({"data.data_files": ("a.txt", 5)}, "data.data_files=('a.txt', 5): must be a string or a list of strings or None"),
    ({"data.max_seq_length": 2}, "data.max_seq_length=2: must be at least 3: a begin token, text and an end token"),
    ({"data.packing": "tight"}, "data.packing='tight': must be one of concatenate, pad, pad_lines, isolate, best_fit"),
    ({"data.eval_rows": "last"}, "data.eval_rows='last': must be one of spread, first"),
    ({"data.shuffle_buffer_size": -1}, "data.shuffle_buffer_size=-1: must not be negative"),
    ({"data.shuffle_buffer_bytes": 0}, "data.shuffle_buffer_bytes=0: must be at least 1"),
    ({"data.interleave_shards": 0}, "data.interleave_shards=0: must be at least 1"),
    ({"data.shuffle_piece_bytes": 7}, "data.shuffle_piece_bytes=7: must be 0, or at least 8"),
    ({"data.num_eval_samples": 0}, "data.num_eval_samples=0: must be at least 1"),
    ({"data.prefetch_batches": 0}, "data.prefetch_batches=0: must be at least 1"),
    ({"data.max_failed_shards": -1}, "data.max_failed_shards=-1: must not be negative"),
    ({"data.network_deadline_seconds": -1.0}, "data.network_deadline_seconds=-1.0: must not be negative"),
    ({"data.network_deadline_seconds": float("nan")}, "data.network_deadline_seconds=nan: must not be negative"),
    ({"data.network_timeout_seconds": 0}, "data.network_timeout_seconds=0.0: must be positive"),
    ({"data.skip_steps": (3,)}, "data.skip_steps[0]=3: must be a pair of steps, such as (1200, 1210)"),
    ({"data.skip_steps": 3}, "data.skip_steps=3: must be a list"),
    ({"data.skip_steps": ((1, True),)}, "data.skip_steps[0]=(1, True): must be a pair of steps, such as (1200, 1210)"),
    (
        {"data.skip_steps": ((1, 2), (5, 2))},
        "data.skip_steps[1]=(5, 2): must be (first, last) with 1 <= first <= last",
    ),
    ({"data.skip_steps": ((0, 2),)}, "data.skip_steps[0]=(0, 2): must be (first, last) with 1 <= first <= last"),
    (
        {"data.mixture": ("wiki",)},
        "data.mixture[0]='wiki': must be (name, weight) or (name, weight, {key: value})",
    ),
    (
        {"data.mixture": (("wiki", True),)},
        "data.mixture[0]=('wiki', True): must be (name, weight) or (name, weight, {key: value})",
    ),
    (
        {"data.mixture": (("wiki", 1, {}, 2),)},
        "data.mixture[0]=('wiki', 1, {}, 2): must be (name, weight) or (name, weight, {key: value})",
    ),
    ({"data.mixture": (("wiki", 0),)}, "data.mixture[0]=('wiki', 0): the weight must be positive and finite"),
    (
        {"data.mixture": (("wiki", 1), ("wiki", 2))},
        "data.mixture[1]=('wiki', 2): the name 'wiki' is not unique; rename one",
    ),
    (
        {"data.mixture": (("wiki", 1, {"weight": 2}),)},
        "data.mixture[0].weight=2: unknown key; must be one of dataset_name, dataset_config_name, data_files, eval_data_files, split, text_column_name",
    ),
    ({"data.mixture": (("wiki", 1, {"split": 2}),)}, "data.mixture[0].split=2: must be a string"),
    (
        {"data.mixture": (("wiki", 1, {"data_files": 5}),)},
        "data.mixture[0].data_files=5: no files given; set a path, a glob, a URL, a list of these, or None",
    ),
    (
        {"data.mixture": (("wiki", 1, {"dataset_name": ""}),)},
        "data.mixture[0]=('wiki', 1, {'dataset_name': ''}): there is no data; its name must be that of a dataset, or it needs data_files",
    ),
    (
        {"data.mixture": (("wiki", 1),), "data.data_files": "a.txt"},
        "data.data_files='a.txt': the sources of data.mixture have their own files; set it to None",
    ),
    (
        {"data.mixture": (("wiki", 1),), "data.eval_data_files": "a.txt"},
        "data.eval_data_files='a.txt': the sources of data.mixture have their own files; set it to None",
    ),
    # tokenizer
    (
        {"tokenizer.use_fast_tokenizer": False},
        "tokenizer.use_fast_tokenizer=False: slow tokenizers are not supported; set it to True",
    ),
    ({"tokenizer.algorithm": "words"}, "tokenizer.algorithm='words': must be one of auto, bpe, wordpiece, unigram"),
    ({"tokenizer.backend": "magic"}, "tokenizer.backend='magic': must be one of auto, gigatoken, tokenizers"),
    ({"tokenizer.train_documents": 0}, "tokenizer.train_documents=0: must be at least 1"),
    ({"tokenizer.vocab_size": 5}, "tokenizer.vocab_size=5: must be at least 6"),
    (
        {"tokenizer.vocab_size": 100},
        "tokenizer.vocab_size=100: must be at least 261 for bpe: 256 bytes and 5 special tokens",
    ),
    (
        {"tokenizer.lowercase": True},
        "tokenizer.lowercase=True: the bpe tokenizer of roberta models has no lowercase form; set it to False, or tokenizer.algorithm='wordpiece'",
    ),
    (
        {"tokenizer.lowercase": True, "model.model_type": "camembert"},
        "tokenizer.lowercase=True: the unigram tokenizer of camembert models has no lowercase form; set it to False, or tokenizer.algorithm='wordpiece'",
    ),
    (
        {"tokenizer.lowercase": True, "tokenizer.algorithm": "bpe", "model.config_name": "x"},
        "tokenizer.lowercase=True: the bpe tokenizer has no lowercase form; set it to False, or tokenizer.algorithm='wordpiece'",
    ),
    # model
    (
        {"model.model_type": "robertina"},
        "model.model_type='robertina': must be one of roberta, xlm-roberta, camembert, roberta-prelayernorm, bert, distilbert, electra, albert, roformer, modernbert",
    ),
    (
        {"model.config_name": "x", "model.model_name_or_path": "y"},
        "model.model_name_or_path='y': cannot be combined with model.config_name='x'; set one of them to None",
    ),
    ({"model.dtype": "float64"}, "model.dtype='float64': must be one of float32, bfloat16"),
    ({"model.attention": "flash"}, "model.attention='flash': must be one of auto, plain, xla, cudnn, splash"),
    ({"model.remat": "some"}, "model.remat='some': must be one of auto, none, dots, full"),
    (
        {"model.attention": "cudnn"},
        "model.attention='cudnn': needs model.dtype='bfloat16', not 'float32'; set that, or model.attention='auto'",
    ),
    # model.overrides
    ({"model.overrides.hidden_size": 0}, "model.overrides.hidden_size=0: must be at least 1"),
    ({"model.overrides.hidden_size": 16.0}, "model.overrides.hidden_size=16.0: must be a whole number or None"),
    (
        {"model.overrides.hidden_dropout_prob": 1.0},
        "model.overrides.hidden_dropout_prob=1.0: must be at least 0 and less than 1",
    ),
    (
        {"model.overrides.mlp_dropout": -0.5, "model.model_type": "modernbert"},
        "model.overrides.mlp_dropout=-0.5: must be at least 0 and less than 1",
    ),
    ({"model.overrides.layer_norm_eps": 0.0}, "model.overrides.layer_norm_eps=0.0: must be positive and finite"),
    (
        {"model.overrides.initializer_range": float("inf")},
        "model.overrides.initializer_range=inf: must be positive and finite",
    ),
    (
        {"model.overrides.hidden_act": "relu6"},
        "model.overrides.hidden_act='relu6': must be one of gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, silu, swish",
    ),
    (
        {"model.overrides.embedding_size": 8},
        "model.overrides.embedding_size=8: the family roberta has no such field; set it to None (--config=configs/quickstart.py:roberta sets all fields for this family)",
    ),
    (
        {"model.overrides.type_vocab_size": 1, "model.model_type": "modernbert"},
        "model.overrides.type_vocab_size=1: the family modernbert has no such field; set it to None (--config=configs/quickstart.py:modernbert sets all fields for this family)",
    ),
    (
        {"model.overrides.tie_word_embeddings": False},
        "model.overrides.tie_word_embeddings=False: the family roberta always ties the decoder to the word embeddings; set it to None",
    ),
    (
        {"model.overrides.hidden_size": 16},
        "model.overrides.hidden_size=16: must be a multiple of num_attention_heads=12; change one of them",
    ),
    (
        {
            "model.overrides.hidden_size": 16,
            "model.overrides.num_attention_heads": 3,
            "model.model_name_or_path": "some/model",
        },
        "model.overrides.hidden_size=16: must be a multiple of num_attention_heads=3; change one of them",
    ),
    (
        {"model.overrides.hidden_size": 36, "model.model_type": "modernbert"},
        "model.overrides.num_attention_heads=12: rotary positions need heads of an even width, not 3; change it, or model.overrides.hidden_size",
    ),
    (
        {"model.overrides.num_hidden_groups": 13, "model.model_type": "albert"},
        "model.overrides.num_hidden_groups=13: must be at most num_hidden_layers=12",
    ),
    # masking
    ({"masking.mlm_probability": 0.0}, "masking.mlm_probability=0.0: must lie in (0, 1]"),
    ({"masking.mlm_probability": 1.5}, "masking.mlm_probability=1.5: must lie in (0, 1]"),
    ({"masking.random_replace_prob": -0.1}, "masking.random_replace_prob=-0.1: must lie in [0, 1]"),
    ({"masking.mask_replace_prob": float("nan")}, "masking.mask_replace_prob=nan: must lie in [0, 1]"),
    ({"masking.mlm_probability": (0.3, 0.0)}, "masking.mlm_probability=(0.3, 0.0): must lie in (0, 1]"),
    (
        {"masking.mlm_probability": (0.3, 0.2, 0.1)},
        "masking.mlm_probability=(0.3, 0.2, 0.1): must be a number or a pair of numbers",
    ),
    ({"masking.mlm_probability": "0.3"}, "masking.mlm_probability='0.3': must be a number or a pair of numbers"),
    ({"masking.eval_mlm_probability": 1.5}, "masking.eval_mlm_probability=1.5: must lie in (0, 1]"),
    ({"masking.eval_random_replace_prob": 2.0}, "masking.eval_random_replace_prob=2.0: must lie in [0, 1]"),
    ({"masking.strategy": "words"}, "masking.strategy='words': must be one of token, whole_word, span"),
    ({"masking.eval_strategy": "words"}, "masking.eval_strategy='words': must be one of token, whole_word, span"),
    (
        {"masking.strategy": "span", "tokenizer.backend": "gigatoken"},
        "masking.strategy='span': gigatoken does not find words; set tokenizer.backend='auto'",
    ),
    (
        {"masking.eval_strategy": "whole_word", "data.dataset_name": "synthetic"},
        "masking.eval_strategy='whole_word': random token ids are not words; set it to 'token', or use text",
    ),
    # loss
    ({"loss.z_loss": -1e-4}, "loss.z_loss=-0.0001: must be finite and not negative"),
    ({"loss.label_smoothing": 1.0}, "loss.label_smoothing=1.0: must lie in [0, 1)"),
    (
        {"masking.mask_replace_prob": 0.95},
        "masking.mask_replace_prob=0.95: together with masking.random_replace_prob=0.1 it exceeds 1; lower either",
    ),
    # optimizer
    ({"optimizer.learning_rate": -1}, "optimizer.learning_rate=-1.0: must be positive and finite"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan: must be positive and finite"),
    ({"optimizer.warmup_steps": -1}, f"optimizer.warmup_steps=-1: {DURATION}"),
    ({"optimizer.warmup_steps": 1.5}, f"optimizer.warmup_steps=1.5: {DURATION}"),
    ({"optimizer.warmup_steps": None}, f"optimizer.warmup_steps=None: {DURATION}"),
    ({"optimizer.schedule": "wsd", "optimizer.decay_steps": "3e9"}, f"optimizer.decay_steps='3e9': {DURATION}"),
    (
        {"optimizer.schedule": "wsd", "optimizer.decay_steps": 5, "optimizer.warmup_steps": 4},
        "optimizer.decay_steps=5: with 4 warm-up steps it is longer than num_train_steps=8; lower one of them",
    ),
    (
        {"optimizer.decay_steps": 5},
        "optimizer.decay_steps=5: optimizer.schedule='linear' does not use it; set it to None",
    ),
    (
        {"optimizer.schedule": "wsd", "optimizer.decay_shape": "sqrt"},
        "optimizer.decay_shape='sqrt': must be one of linear, 1-sqrt, cosine",
    ),
    ({"optimizer.end_factor": 2.0}, "optimizer.end_factor=2.0: must lie in [0, 1]"),
    (
        {"optimizer.schedule": "wsdd"},
        "optimizer.schedule='wsdd': must be one of linear, cosine, constant, inverse_sqrt, wsd",
    ),
    (
        {"optimizer.name": "sgd"},
        "optimizer.name='sgd': must be one of adamw, stable_adamw, lamb, lion, adafactor, muon",
    ),
    (
        {"optimizer.name": "lion", "optimizer.adam_beta2": 0.98},
        "optimizer.adam_beta2=0.98: optimizer.name='lion' does not use it; set it to None",
    ),
    (
        {"optimizer.name": "lion", "optimizer.adam_beta2": 0.98, "optimizer.muon_momentum": 0.9},
        "optimizer.adam_beta2=0.98, optimizer.muon_momentum=0.9: optimizer.name='lion' does not use them; set them to None",
    ),
    (
        {"optimizer.muon_momentum": 0.9},
        "optimizer.muon_momentum=0.9: optimizer.name='adamw' does not use it; set it to None",
    ),
    (
        {"optimizer.name": "muon", "optimizer.muon_scale": "none"},
        "optimizer.muon_scale='none': must be one of spectral, rms",
    ),
    ({"optimizer.name": "muon", "optimizer.muon_iterations": 0}, "optimizer.muon_iterations=0: must be at least 1"),
    ({"optimizer.layer_decay": 0.0}, "optimizer.layer_decay=0.0: must lie in (0, 1]"),
    ({"optimizer.ema_decay": 1.0}, "optimizer.ema_decay=1.0: must lie in [0, 1)"),
    ({"optimizer.adam_beta1": -0.1}, "optimizer.adam_beta1=-0.1: must lie in [0, 1)"),
    ({"optimizer.adam_beta2": 1.0}, "optimizer.adam_beta2=1.0: must lie in [0, 1)"),
    ({"optimizer.adam_epsilon": 0.0}, "optimizer.adam_epsilon=0.0: must be positive and finite"),
    ({"optimizer.weight_decay": -0.1}, "optimizer.weight_decay=-0.1: must be finite and not negative"),
    ({"optimizer.max_grad_norm": float("inf")}, "optimizer.max_grad_norm=inf: must be finite and not negative"),
    ({"optimizer.max_skipped_steps": -1}, "optimizer.max_skipped_steps=-1: must not be negative"),
    ({"optimizer.spike_factor": 0.5}, "optimizer.spike_factor=0.5: must be 0 or more than 1"),
    # The others.
    ({"checkpoint.keep_checkpoints": 0}, "checkpoint.keep_checkpoints=0: must be at least 1"),
    ({"checkpoint.keep_every_steps": -1}, "checkpoint.keep_every_steps=-1: must not be negative"),
    ({"checkpoint.init_mode": "branch"}, "checkpoint.init_mode='branch': needs checkpoint.init_from; set that, too"),
    (
        {"checkpoint.init_from": "runs/a", "checkpoint.init_mode": "fork"},
        "checkpoint.init_mode='fork': must be one of branch, restart",
    ),
    ({"export.dtype": "float64"}, "export.dtype='float64': must be one of float32, bfloat16, float16"),
    ({"hub.languages": "en"}, "hub.languages='en': must be a list of strings"),
    ({"profile.first_step": -1}, "profile.first_step=-1: must not be negative"),
    ({"profile.num_steps": -1}, "profile.num_steps=-1: must not be negative"),
    ({"report.sentences": "One <mask>."}, "report.sentences='One <mask>.': must be a list of strings"),
    # Across groups.
    ({"optimizer.warmup_steps": 9}, "optimizer.warmup_steps=9: must be at most num_train_steps=8"),
    (
        {"data.max_seq_length": 512},
        "data.max_seq_length=512: is longer than the model's 510 positions; lower it, or set model.overrides.max_position_embeddings=514",
    ),
    (
        {"data.max_seq_length": 21, "model.model_type": "bert", "model.overrides.max_position_embeddings": 20},
        "data.max_seq_length=21: is longer than the model's 20 positions; lower it, or set model.overrides.max_position_embeddings=21",
    ),
    (
        {"data.max_seq_length": 21, "model.config_name": "x", "model.overrides.max_position_embeddings": 20},
        "data.max_seq_length=21: is longer than the model's 20 positions; lower it, or set model.overrides.max_position_embeddings=21",
    ),
    # Types.
    ({"num_train_steps": "many"}, "num_train_steps='many': must be a whole number"),
    ({"num_train_steps": 8.0}, "num_train_steps=8.0: must be a whole number"),
    ({"num_train_steps": True}, "num_train_steps=True: must be a whole number"),
    ({"num_train_steps": None}, "num_train_steps=None: must be a whole number"),
    ({"optimizer.learning_rate": "1e-3"}, "optimizer.learning_rate='1e-3': must be a number"),
    ({"optimizer.learning_rate": True}, "optimizer.learning_rate=True: must be a number"),
    ({"hub.push_to_hub": 1}, "hub.push_to_hub=1: must be True or False"),
    ({"data.split": None}, "data.split=None: must be a string"),
    ({"data.cache_dir": 3}, "data.cache_dir=3: must be a string or None"),
    (
        {"eval.probes": ["topics", "topics.jsonl"]},
        "eval.probes=['topics', 'topics.jsonl']: must be pairs of a name and a file, such as (('topics', 'topics.jsonl'),)",
    ),
    (
        {"eval.pairs": (("a/b", "b.jsonl"),)},
        "eval.pairs=(('a/b', 'b.jsonl'),): the name 'a/b' may have letters, digits and _.- only; rename it",
    ),
    (
        {"eval.pairs": (("a", "b.jsonl"), ("a", "c.jsonl"))},
        "eval.pairs=(('a', 'b.jsonl'), ('a', 'c.jsonl')): the name 'a' is used twice; rename one",
    ),
    # Keys.
    ({"optimizer.learning_rat": 0.1}, "optimizer.learning_rat=0.1: unknown key; did you mean optimizer.learning_rate?"),
    ({"optimiser.schedule": "linear"}, "optimiser.schedule='linear': unknown key; did you mean optimizer.schedule?"),
    ({"seed": {"low": 1}}, "seed.low=1: unknown key; did you mean seed?"),
    (
        {"checkpoint": 3},
        "checkpoint=3: is a group of keys; set one of them: checkpoint.keep_checkpoints, checkpoint.keep_every_steps, "
        "checkpoint.init_from, checkpoint.init_mode",
    ),
    (
        {"checkpoint": {}},
        "checkpoint.keep_checkpoints, checkpoint.keep_every_steps, checkpoint.init_from, checkpoint.init_mode: missing; let get_config() start from configs/default.py",
    ),
    (
        {"masking": {}, "profile": {}, "export": {}},
        "masking.strategy, masking.mlm_probability, masking.mask_replace_prob, masking.random_replace_prob and 8 more: missing; let get_config() start from configs/default.py",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_a_wrong_value_is_an_error_that_names_the_key(changes, message):
    with pytest.raises(UserError) as error:
        RunSettings.from_dict(changed(changes))
    assert str(error.value) == message


RIGHT = [
    {},
    {"per_device_train_batch_size": 0},
    {"optimizer.warmup_steps": 8},
    {"optimizer.warmup_steps": 0.06, "optimizer.schedule": "wsd", "optimizer.decay_steps": "3e9 tokens"},
    {"masking.mlm_probability": [0.3, 1]},
    {"data.network_deadline_seconds": 0},
    {"data.data_files": "a.txt", "data.dataset_name": ""},
    {"data.mixture": (("wiki", 1), ("own", 0.5, {"data_files": ["a.txt"], "dataset_config_name": None}))},
    {"masking.mask_replace_prob": 0.9, "masking.random_replace_prob": 0.1},
    {"model.attention": "cudnn", "model.dtype": "bfloat16"},
    {"tokenizer.lowercase": True, "model.model_type": "albert"},
    {"tokenizer.lowercase": True, "tokenizer.algorithm": "wordpiece"},
    # Not trained here, or of a family that is not known yet.
    {"tokenizer.lowercase": True, "tokenizer.tokenizer_name": "x"},
    {"tokenizer.lowercase": True, "model.config_name": "x"},
    {"tokenizer.vocab_size": 100, "model.config_name": "x"},
    {"tokenizer.vocab_size": 100, "data.dataset_name": "synthetic"},
    {"model.overrides.embedding_size": 8, "model.config_name": "x"},
    {"model.overrides.tie_word_embeddings": False, "model.model_type": "modernbert"},
    {"model.overrides.tie_word_embeddings": True},
    {"data.max_seq_length": 511},  # Fits if the tokenizer pads with id 0.
    {"data.max_seq_length": 4096, "model.config_name": "x"},
    {"data.max_seq_length": 8192, "model.model_type": "modernbert"},
]


@pytest.mark.parametrize("changes", RIGHT, ids=str)
def test_a_right_value_survives_json(changes):
    settings = RunSettings.from_dict(changed(changes))
    assert RunSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_lists_become_tuples_and_whole_numbers_floats():
    mixture = [["wiki", 2], ["own", 0.5, {"data_files": ["a.txt", "b.txt"]}]]
    settings = RunSettings.from_dict(
        changed({"data.mixture": mixture, "data.skip_steps": [[1, 2]], "optimizer.learning_rate": 1})
    )
    assert settings.data.mixture == (("wiki", 2), ("own", 0.5, {"data_files": ("a.txt", "b.txt")}))
    assert settings.data.mixture_entries == (
        MixtureEntry("wiki", 2.0, {}),
        MixtureEntry("own", 0.5, {"data_files": ("a.txt", "b.txt")}),
    )
    assert settings.data.skip_steps == ((1, 2),)
    assert type(settings.optimizer.learning_rate) is float


def test_replaced_fields_are_checked():
    settings = RunSettings.from_dict(valid())
    assert dataclasses.replace(settings, num_train_steps=100).num_train_steps == 100
    with pytest.raises(UserError, match=r"optimizer\.schedule='square'"):
        dataclasses.replace(settings.optimizer, schedule="square")


def test_optional_keys_take_none():
    nullable = {
        "data.dataset_config_name", "data.data_files", "data.eval_data_files", "data.cache_dir",
        "tokenizer.tokenizer_name", "model.config_name", "model.model_name_or_path", "hub.hub_model_id", "hub.license",
        "checkpoint.init_from", "checkpoint.init_mode",
    }  # fmt: skip
    nullable |= {key for key in KEYS if key.startswith("model.overrides.")}
    # None stands for a default that depends on other keys.
    resolved = {f"optimizer.{key}" for table in (OPTIMIZERS, SCHEDULES) for keys in table.values() for key in keys}
    resolved |= {f"masking.eval_{name}" for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob")}
    for key in KEYS:
        if key in resolved:
            continue
        if key in nullable:
            assert RunSettings.from_dict(changed({key: None})).flat()[key] is None
        else:
            with pytest.raises(UserError, match=f"^{key}=None: must be "):
                RunSettings.from_dict(changed({key: None}))


def test_flat_keys_are_those_of_the_default_config():
    nested = default.get_config().to_dict()
    flat = RunSettings.from_dict(nested).flat()
    assert tuple(flat) == KEYS
    assert flat["seed"] == 42
    assert flat["model.overrides.hidden_size"] is None
    assert flat["optimizer.max_skipped_steps"] == nested["optimizer"]["max_skipped_steps"]


def test_mutable_keys_are_keys_and_leave_out_what_defines_the_steps():
    assert len({*MUTABLE_KEYS}) == len(MUTABLE_KEYS)
    assert {*MUTABLE_KEYS} <= {*KEYS}
    fixed = {key for key in KEYS if key.startswith("optimizer.")} - {*MUTABLE_KEYS}
    assert {"optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_epsilon"} <= fixed


@pytest.mark.parametrize(
    "path", sorted(path for path in glob.glob("configs/[a-z]*.py", root_dir=ROOT) if path != "configs/compat.py")
)
def test_every_config_is_accepted(path):
    module = importlib.import_module(path[: -len(".py")].replace("/", "."))
    RunSettings.from_dict(module.get_config().to_dict())


def test_tables_cover_every_family():
    families = [family for families in settings_lib.ALGORITHM_FAMILIES.values() for family in families]
    assert sorted(families) == sorted(settings_lib.FAMILIES)
    for model_type in settings_lib.FAMILIES:
        settings = RunSettings.from_dict(changed({"model.model_type": model_type}))
        expected = model_config.default_config(model_type)
        for name in settings_lib._HF_DEFAULTS:
            assert settings.model.config_field(name) == getattr(expected, name)


def test_importing_needs_no_jax_and_under_a_tenth_of_a_second():
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "import mlm.settings\n"
        "print(time.process_time() - start)\n"
        "assert not {'jax', 'numpy', 'ml_collections'} & {*sys.modules}, 'imported'\n"
    )

    def seconds() -> float:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        return float(done.stdout)

    # The first run may compile bytecode, and other programs may slow down a few.
    assert any(seconds() < 0.1 for _ in range(10))
