# ruff: noqa: E501, a message stands as its reader sees it.
"""Every mistake that a user can make, and what it is answered.

A message says what is wrong, with the value, and what to do, on one line. `{world}` is the folder that
`test_user_errors.py` fills with what can be wrong; `...` stands for words of other programs, which change.
"""

import contextlib
import pickle
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import transformers
from ml_collections import ConfigDict

from mlm import build, load, memory, train
from mlm.data import tokenizer
from mlm.data.sources import source as sources
from mlm.hardware import parse_topology
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.models.hf import pretrained
from mlm.modes import check, export, fill_mask, show_data
from mlm.run import checkpoint, gcs, multihost, storage
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.tiny import settings_of

QUICKSTART = "--config=configs/quickstart.py"
COMMAND_LINE = [
    (
        (),
        "no --config=FILE; there are configs/bert_base.py, configs/modernbert_base.py, configs/quickstart.py, configs/roberta_base.py, configs/roberta_large.py, configs/xlm_roberta_base.py",
    ),
    (
        ("--config=configs/quikstart.py",),
        "--config=configs/quikstart.py: there is no such file; did you mean configs/quickstart.py?",
    ),
    (
        ("--config", "configs/quikstart.py"),
        "--config=configs/quikstart.py: there is no such file; did you mean configs/quickstart.py?",
    ),
    ((QUICKSTART,), "no --workdir; name the run's directory, such as --workdir=runs/quickstart"),
    (
        (QUICKSTART, "--workdir={world}/x", "surplus"),
        "'surplus' is not a flag; flags begin with --, their values follow after =",
    ),
    ((QUICKSTART, "--workdr={world}/x"), "Unknown command line flag 'workdr'. Did you mean: workdir ?"),
    (
        (QUICKSTART, "--config.optimizer.learning_rat=1"),
        "--config.optimizer.learning_rat: there is no such key; did you mean optimizer.learning_rate? (see configs/default.py)",
    ),
    (
        (QUICKSTART, "--config.optimiser.learning_rate=1"),
        "--config.optimiser.learning_rate: there is no such key; did you mean optimizer.learning_rate? (see configs/default.py)",
    ),
    (
        (QUICKSTART, "--config.data=3"),
        "--config.data is a group of keys; set one of them: data.cache_dir, data.data_files, data.dataset_config_name, data.dataset_name, data.eval_data_files, data.max_failed_shards, data.max_seq_length, data.mixture, data.network_deadline_seconds, data.network_timeout_seconds, data.num_eval_samples, data.packing, data.prefetch_batches, data.shuffle_buffer_size, data.skip_steps, data.split, data.text_column_name",
    ),
    (
        ("--config=configs/roberta_base.py:bert",),
        "--config=configs/roberta_base.py:bert: get_config() takes no argument; remove the colon and what follows it",
    ),
    ((QUICKSTART, "--config.num_train_steps=many"), "--config.num_train_steps=many must be a whole number"),
    (
        (QUICKSTART, "--config.model.overrides.hidden_size=1.5"),
        "--config.model.overrides.hidden_size=1.5 must be a whole number",
    ),
    ((QUICKSTART, "--config.hub.push_to_hub=perhaps"), "--config.hub.push_to_hub=perhaps must be True or False"),
    (
        (QUICKSTART, "--mode=trian", "--workdir={world}/x"),
        "flag --mode=trian: value should be one of <train|benchmark|check|explain|train_tokenizer|show_data|export|fill_mask|report>",
    ),
    ((QUICKSTART, "--workdir={world}/x", "--num_processes=0"), "flag --num_processes=0: 0 is not a positive integer"),
    (("--config={world}/broken.py", "--workdir={world}/x"), "--config={world}/broken.py: SyntaxError: invalid syntax"),
    (
        ("--config={world}/typo.py", "--workdir={world}/x"),
        '--config={world}/typo.py: AttributeError: Key "learning_rat" does not exist... Did you mean "learning_rate" instead of "learning_rat"?',
    ),
    (
        ("--config={world}/wrong_type.py", "--workdir={world}/x"),
        "--config={world}/wrong_type.py: TypeError: ...num_train_steps...",
    ),
    (
        ("--config={world}/bare.py", "--workdir={world}/x"),
        "the config has no checkpoint.keep_checkpoints, checkpoint.keep_every_steps, data.cache_dir, data.data_files and ... more keys; let its get_config() start from configs/default.py",
    ),
    (("--config={world}/dict.py", "--workdir={world}/x"), "the config's get_config() gives a dict, not a ConfigDict"),
    (
        ("--config={world}/no_function.py", "--workdir={world}/x"),
        "--config={world}/no_function.py: there is no function get_config() in it; write one as configs/quickstart.py has it",
    ),
    (
        (QUICKSTART, "--workdir={world}/x", "--workdir={world}/y"),
        "--workdir is there 2 times; only --mode=report takes several runs",
    ),
    (
        (QUICKSTART, "--mode=train_tokenizer"),
        "--mode=train_tokenizer needs a directory to write to, such as --output=tokenizers/mine",
    ),
    (("--mode=show_data", "--workdir={world}/x"), "--mode=show_data needs the update to show, such as --step=100"),
    (("--mode=export", "--workdir={world}/x"), "--workdir={world}/x: there is no run; name the work directory of one"),
    (("--mode=explain", "learning_rate"), "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
    (("--mode=report",), "no --workdir; name the run's directory, such as --workdir=runs/quickstart"),
    (
        ("--mode=export", "--config={world}/bare.py", "--workdir={world}/x"),
        "the config has no checkpoint.keep_checkpoints, checkpoint.keep_every_steps, data.cache_dir, data.data_files and ... more keys; let its get_config() start from configs/default.py",
    ),
    (("--mode=report", "--workdir={world}/x"), "--workdir={world}/x: there is no run; name the work directory of one"),
    (
        ("--mode=report", "--workdir={world}/x", "--workdir={world}/x/"),
        "--workdir: two of the runs are the same; name each once",
    ),
    (
        ("--mode=report", "--workdir={world}/started"),
        "--workdir={world}/started: no metrics yet; come back after the first evaluation or checkpoint",
    ),
    (
        ("--mode=report", "--workdir={world}/logged", "--output={world}/nowhere/report.html"),
        "--output={world}/nowhere/report.html: cannot be written (No such file or directory); name another file",
    ),
    (
        ("--mode=report", "--workdir={world}/garbled"),
        "{world}/garbled/metrics.jsonl, line 1, is not JSON; mend or remove the line",
    ),
    (
        ("--mode=export", "--workdir={world}/not_a_run"),
        "{world}/not_a_run/config.json: is damaged, or not the config of a run; restore it, or choose another --workdir",
    ),
]

VALUES = [
    ({"num_train_steps": 0}, "num_train_steps=0 must be at least 1"),
    ({"per_device_train_batch_size": -1}, "per_device_train_batch_size=-1 must not be negative"),
    ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1 must be at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
    ({"logging_steps": 0}, "logging_steps=0 must be at least 1"),
    ({"eval_steps": 0}, "eval_steps=0 must be at least 1"),
    ({"save_steps": -5}, "save_steps=-5 must be at least 1"),
    ({"seed": -1}, "seed=-1 must lie between 0 and 2**32 - 1"),
    ({"data.num_eval_samples": 0}, "data.num_eval_samples=0 must be at least 1"),
    ({"data.max_seq_length": 2}, "data.max_seq_length=2 must be at least 3: begin, text, end"),
    (
        {"data.max_seq_length": 19},
        "data.max_seq_length=19 is past the model's positions, which end at 18; lower it, or set --config.model.overrides.max_position_embeddings=21",
    ),
    ({"data.data_files": ""}, "data.data_files='' names no file: give a path, a glob, a URL or a list of them"),
    ({"data.data_files": 5}, "data.data_files=5 names no file: give a path, a glob, a URL or a list of them"),
    ({"data.packing": "tight"}, "data.packing='tight' is not one of concatenate, pad, pad_lines, isolate"),
    ({"data.shuffle_buffer_size": -1}, "data.shuffle_buffer_size=-1 must not be negative"),
    ({"data.prefetch_batches": 0}, "data.prefetch_batches=0 must be at least 1"),
    ({"data.max_failed_shards": -1}, "data.max_failed_shards=-1 must not be negative"),
    ({"data.network_deadline_seconds": -1.0}, "data.network_deadline_seconds=-1.0 must not be negative"),
    ({"data.network_timeout_seconds": 0.0}, "data.network_timeout_seconds=0.0 must be positive"),
    ({"data.skip_steps": (3,)}, "data.skip_steps=(3,) must be pairs of updates, such as ((1200, 1210),)"),
    ({"data.skip_steps": ((5, 2),)}, "data.skip_steps: from 5 to 2 is no range of updates"),
    ({"data.mixture": ("wiki",)}, "data.mixture: 'wiki' is not (name, weight) or (name, weight, {key: value})"),
    ({"data.mixture": (("wiki", 0),)}, "data.mixture: the weight 0 of 'wiki' must be positive"),
    ({"data.mixture": (("wiki", 1), ("wiki", 2))}, "data.mixture: there are two sources named 'wiki'"),
    (
        {"data.mixture": (("wiki", 1, {"weight": 2}),)},
        "data.mixture: 'wiki' sets 'weight', which is not one of dataset_name, dataset_config_name, data_files, eval_data_files, split, text_column_name",
    ),
    (
        {"data.mixture": (("wiki", 1),)},
        "data.mixture names its own files: leave data.data_files and data.eval_data_files at None",
    ),
    (
        {"data.text_column_name": "body"},
        "no column 'body' in '{world}/data/part-0.jsonl': set data.text_column_name to one of: id, text",
    ),
    (
        {"data.text_column_name": "id"},
        "the column 'id' of '{world}/data/part-0.jsonl' holds 0, not text: set data.text_column_name to another",
    ),
    (
        {"data.num_eval_samples": 1000000},
        "the data set '{world}/data/part-*.jsonl' has ... sequences of 16 tokens, fewer than the 1000000 to evaluate on; lower data.num_eval_samples, or add text",
    ),
    (
        {"per_device_train_batch_size": 100000},
        "the data set '{world}/data/part-*.jsonl' is too small: an epoch has ... sequences of 16 tokens and a batch needs 400000 (0 blank rows, ... held-out documents); lower per_device_train_batch_size or data.max_seq_length, or add data",
    ),
    ({"data.data_files": "{world}/data/absent.txt"}, "no data file '{world}/data/absent.txt': check data.data_files"),
    (
        {"data.data_files": "{world}/data/*.csv"},
        "no file matches data.data_files='{world}/data/*.csv': check the folder and the pattern",
    ),
    (
        {"data.data_files": "{world}/data/notes.odt"},
        "cannot tell the kind of the data file '{world}/data/notes.odt': its name must end with one of .txt, .text, .json, .jsonl, .csv, .parquet, or that and one of .gz, .zst, .bz2, .xz",
    ),
    (
        {"data.data_files": "{world}/data/table.parquet.gz"},
        "the data file '{world}/data/table.parquet.gz' is compressed twice: decompress it, parquet has its own",
    ),
    (
        {"data.data_files": "{world}/data/not.parquet"},
        "cannot read '{world}/data/not.parquet': ...; mend it, or leave it out",
    ),
    (
        {"data.data_files": "{world}/data/broken.jsonl"},
        "cannot read '{world}/data/broken.jsonl': Expecting value in the line '{\"text\": '; mend it, or leave it out",
    ),
    (
        {"data.data_files": "{world}/data/empty.txt"},
        "the data set '{world}/data/empty.txt' is empty: it has no rows; name one that has text",
    ),
    (
        {"data.data_files": "{world}/data/blank.txt"},
        "the data set '{world}/data/blank.txt' has 0 sequences of 16 tokens, fewer than the 30 to evaluate on; lower data.num_eval_samples, or add text",
    ),
    (
        {"data.data_files": "{world}/data/short.txt"},
        "the data set '{world}/data/short.txt' has 0 sequences of 16 tokens, fewer than the 30 to evaluate on; lower data.num_eval_samples, or add text",
    ),
    (
        {"data.data_files": "{world}/data/"},
        "data file '{world}/data/' is a directory: name its files, for example {world}/data/*.parquet",
    ),
    (
        {"data.data_files": ("{world}/data/short.txt", "{world}/data/part-0.jsonl")},
        "data.data_files must be of one kind, but '{world}/data/short.txt' is text and '{world}/data/part-0.jsonl' is json: take one kind, or name two sources in data.mixture",
    ),
    ({"data.data_files": None, "data.dataset_name": ""}, "no data: set data.dataset_name or data.data_files"),
    (
        {"data.data_files": None, "data.dataset_name": "/nowhere/data"},
        "no data set directory '/nowhere/data': check data.dataset_name",
    ),
    (
        {"data.data_files": None, "data.dataset_name": "nobody/nothing"},
        "the data set 'nobody/nothing' is not here and HF_HUB_OFFLINE is set: unset it, or name local files",
    ),
    (
        {"data.data_files": None, "data.dataset_name": "{world}/data/folder"},
        "cannot open the data set '{world}/data/folder': ...; check data.dataset_name",
    ),
    (
        {"tokenizer.tokenizer_name": "/nowhere/tokenizer"},
        "no tokenizer directory '/nowhere/tokenizer': check tokenizer.tokenizer_name",
    ),
    (
        {"tokenizer.tokenizer_name": "nobody/no-tokenizer"},
        "the tokenizer 'nobody/no-tokenizer' is not here and HF_HUB_OFFLINE is set: unset it, or name local files",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/data"},
        "no tokenizer in '{world}/data': ...; check tokenizer.tokenizer_name",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/no_mask"},
        "the tokenizer '{world}/tokenizers/no_mask' has no mask token, which masked language modelling needs: choose another, or add one and save it",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/no_end"},
        "the tokenizer '{world}/tokenizers/no_end' has no end token: choose another, or add one and save it",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/one_for_all"},
        "the tokenizer '{world}/tokenizers/one_for_all' pads with a token that means something else: give it a pad token",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/words", "tokenizer.backend": "gigatoken"},
        "tokenizer.backend='gigatoken' cannot do the tokenizer '{world}/tokenizers/words', only byte-level BPE: use tokenizer.backend='auto' or 'tokenizers'",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/words", "model.config_name": "{world}/models/ids_only"},
        "the tokenizer {world}/tokenizers/words pads with id 2, the model's pad_token_id is 1; use the model's own tokenizer",
    ),
    (
        {"tokenizer.use_fast_tokenizer": False, "tokenizer.tokenizer_name": "x"},
        "tokenizer.use_fast_tokenizer=False: only fast tokenizers keep up with a device, and they give the same ids; leave it True",
    ),
    (
        {"tokenizer.backend": "magic"},
        "tokenizer.backend='magic' is not known: choose one of auto, gigatoken, tokenizers",
    ),
    ({"tokenizer.train_documents": 0}, "tokenizer.train_documents=0 must be at least 1"),
    ({"tokenizer.algorithm": "words"}, "tokenizer.algorithm='words' is not one of auto, bpe, wordpiece, unigram"),
    (
        {"tokenizer.lowercase": True},
        'tokenizer.lowercase=True does not go with the bpe tokenizer of roberta models, which has no uncased form; set it to False, or --config.tokenizer.algorithm="wordpiece"',
    ),
    (
        {"tokenizer.vocab_size": 100},
        "tokenizer.vocab_size=100 is too small: 256 bytes and 5 special tokens need at least 261",
    ),
    (
        {"tokenizer.vocab_size": 10, "tokenizer.algorithm": "wordpiece"},
        "tokenizer.vocab_size=10 is too small: the letters of this text, at the beginning of words and in them, and 5 special tokens need at least ...",
    ),
    (
        {"tokenizer.vocab_size": 10, "tokenizer.algorithm": "unigram"},
        "tokenizer.vocab_size=10: no Unigram tokenizer of this size can be trained on this text (...)",
    ),
    ({"export.dtype": "float64"}, "export.dtype='float64' is not one of float32, bfloat16, float16"),
    (
        {"model.model_type": "robertina"},
        "model config: model_type='robertina' will not do; known: roberta, xlm-roberta, camembert, roberta-prelayernorm, bert, distilbert, electra, albert, roformer, modernbert",
    ),
    ({"model.config_name": "/nowhere/model"}, "there is no model directory '/nowhere/model'; check the path"),
    ({"model.model_name_or_path": "/nowhere/model"}, "there is no model directory '/nowhere/model'; check the path"),
    (
        {"model.model_name_or_path": "{world}/data"},
        "the model directory '{world}/data' has no config.json; check the path",
    ),
    (
        {"model.model_name_or_path": "nobody/no-model"},
        "the model 'nobody/no-model' is neither a local directory nor to be had from the hub; check the name and the network, or set model.config_name to a directory with a config.json",
    ),
    (
        {
            "tokenizer.tokenizer_name": "{world}/tokenizers/words",
            "model.model_name_or_path": "{world}/models/other_weights",
        },
        "the tensors are not those of a roberta masked language model; missing: ...roberta...",
    ),
    (
        {"model.config_name": "x", "model.model_name_or_path": "y"},
        "model.config_name and model.model_name_or_path exclude each other; set one",
    ),
    ({"model.config_name": "{world}/models/garbled"}, "{world}/models/garbled/config.json is not JSON; fetch it anew"),
    (
        {"model.config_name": "{world}/models/no_type"},
        "model config: model_type is missing; one of: roberta, xlm-roberta, camembert, roberta-prelayernorm, bert, distilbert, electra, albert, roformer, modernbert",
    ),
    (
        {"model.config_name": "{world}/models/decoder"},
        "model config: is_decoder=True will not do; only False is supported",
    ),
    (
        {"model.config_name": "{world}/models/unknown_field"},
        "model config: moe_experts=4 will not do; the field is unknown, and ignoring it might change the model",
    ),
    (
        {"model.model_name_or_path": "{world}/models/ids_only"},
        "{world}/models/ids_only has neither model.safetensors nor pytorch_model.bin to start from; for its config alone, set model.config_name",
    ),
    (
        {"model.model_name_or_path": "{world}/models/bad_weights"},
        "{world}/models/bad_weights/model.safetensors cannot be read (...); fetch it anew",
    ),
    (
        {"model.model_name_or_path": "{world}/models/pytorch"},
        "{world}/models/pytorch/pytorch_model.bin is PyTorch's own format, and PyTorch is not installed: `pip install torch`, or save the model with transformers' save_pretrained, which writes safetensors",
    ),
    (
        {"model.model_name_or_path": "{world}/models/bad_index"},
        "{world}/models/bad_index/model.safetensors.index.json is not an index of shards; fetch it anew",
    ),
    (
        {"model.model_name_or_path": "{world}/models/lost_shard"},
        "{world}/models/lost_shard/model.safetensors.index.json names model-1-of-2.safetensors, which {world}/models/lost_shard does not have; fetch it anew",
    ),
    ({"model.dtype": "float64"}, "model.dtype='float64' is not one of float32, bfloat16"),
    ({"model.attention": "flash"}, "model.attention='flash' is not one of auto, plain, xla, cudnn"),
    (
        {"model.attention": "cudnn"},
        "model.attention='cudnn' needs an NVIDIA GPU and model.dtype='bfloat16', not cpu and 'float32'; set model.attention='auto'",
    ),
    ({"model.remat": "some"}, "model.remat='some' is not one of auto, none, dots, full"),
    (
        {"model.overrides.vocab_size": 100},
        "the tokenizer trained has ids up to 299, the model's vocab_size is 100; set --config.model.overrides.vocab_size=300",
    ),
    (
        {"model.overrides.num_attention_heads": 3},
        "model config: hidden_size=16 will not do; num_attention_heads=3 must divide it",
    ),
    (
        {"model.overrides.hidden_act": "relu6"},
        "model config: hidden_act='relu6' will not do; known: gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, silu, swish (gelu is the exact one)",
    ),
    (
        {"model.overrides.hidden_dropout_prob": 1.0},
        "model config: hidden_dropout_prob=1.0 will not do; it must be at least 0 and less than 1",
    ),
    (
        {"model.overrides.embedding_size": 8},
        "model config: embedding_size=8 will not do; the family roberta has no such field",
    ),
    ({"model.overrides.hidden_size": 0}, "model config: hidden_size=0 will not do; it must be at least 1"),
    (
        {"model.overrides.max_position_embeddings": 2},
        "model config: max_position_embeddings=2 will not do; pad_token_id=1 and the ids below it take 2 of them",
    ),
    ({"masking.mlm_probability": 0.0}, "masking.mlm_probability=0.0 must lie in (0, 1]"),
    ({"masking.mlm_probability": 1.5}, "masking.mlm_probability=1.5 must lie in (0, 1]"),
    (
        {"masking.mask_replace_prob": 0.95},
        "masking.mask_replace_prob=0.95 and masking.random_replace_prob=0.1 add up to more than 1",
    ),
    (
        {"masking.random_replace_prob": -0.1},
        "masking.mask_replace_prob=0.8 and masking.random_replace_prob=-0.1 must not be negative",
    ),
    (
        {"masking.mask_replace_prob": float("nan")},
        "masking.mask_replace_prob=nan and masking.random_replace_prob=0.1 must not be negative",
    ),
    ({"optimizer.warmup_steps": 9}, "optimizer.warmup_steps=9 must lie between 0 and num_train_steps=8"),
    ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate=0.0 must be positive and finite"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan must be positive and finite"),
    ({"optimizer.schedule": "square"}, "optimizer.schedule='square' is not one of linear, cosine, constant"),
    ({"optimizer.adam_beta2": 1.0}, "optimizer.adam_beta2=1.0 must lie in [0, 1)"),
    ({"optimizer.adam_epsilon": 0.0}, "optimizer.adam_epsilon=0.0 must be positive and finite"),
    ({"optimizer.max_grad_norm": -1.0}, "optimizer.max_grad_norm=-1.0 must be finite and not negative"),
    ({"optimizer.weight_decay": -0.1}, "optimizer.weight_decay=-0.1 must be finite and not negative"),
    ({"optimizer.spike_factor": 0.5}, "optimizer.spike_factor=0.5 must be 0, or more than 1"),
    ({"optimizer.max_skipped_steps": -1}, "optimizer.max_skipped_steps=-1 must not be negative"),
    ({"checkpoint.keep_checkpoints": 0}, "checkpoint.keep_checkpoints=0 must be at least 1"),
    ({"checkpoint.keep_every_steps": -1}, "checkpoint.keep_every_steps=-1 must not be negative"),
    (
        {"report.sentences": ("no hole in it",)},
        "no <mask> in the sentence 'no hole in it'; write it where a word is to be guessed",
    ),
    (
        {"report.sentences": ("<mask> " + "word " * 40,)},
        "the sentence '<mask> word ...' has ... tokens, the model takes 18",
    ),
    (
        {"hub.push_to_hub": True},
        "hub.push_to_hub=True needs a token: run `hf auth login`, set HF_TOKEN, or set --config.hub.push_to_hub=False",
    ),
    (
        {"per_device_train_batch_size": 0},
        "per_device_train_batch_size=0: the memory of a cpu device is unknown, so the largest batch that fits cannot be found; set a number",
    ),
]


def export_as_another_type(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), dtype="float64")


def export_to_a_file(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), output=str(world / "file"))


def export_to_a_folder_of_something_else(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), output=str(world / "data"))


def export_to_a_url(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), output="gs://bucket/model")


def export_without_checkpoints(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), output=str(world / "out"))


def export_the_mean_of_none(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), average=0, output=str(world / "out"))


def fill_sentences_without_a_model(config: ConfigDict, world: Path) -> None:
    fill_mask.run(settings_of(config), str(world / "started"), arguments=["A <mask>."])


def show_update_0(config: ConfigDict, world: Path) -> None:
    show_data.run(settings_of(config), str(world / "started"), step=0, sequences=1, process=0)


def show_a_run_that_is_not_there(config: ConfigDict, world: Path) -> None:
    show_data.run(settings_of(config), str(world / "x"), step=1, sequences=1, process=0)


def train_a_tokenizer_over_something(config: ConfigDict, world: Path) -> None:
    build.train_tokenizer(settings_of(config), str(world / "data"))


def train_a_tokenizer_on_nothing(config: ConfigDict, world: Path) -> None:
    config.tokenizer.train_documents = 0
    build.train_tokenizer(settings_of(config), str(world / "out"))


def a_machine_without_a_number(config: ConfigDict, world: Path) -> None:
    parse_topology("v3")


def a_machine_of_half_a_device(config: ConfigDict, world: Path) -> None:
    parse_topology("v4-7")


def a_machine_of_parts_of_hosts(config: ConfigDict, world: Path) -> None:
    parse_topology("v5e-14")


def a_work_directory_that_is_a_file(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "file"))


def a_work_directory_below_a_file(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "file" / "run"))


def a_work_directory_with_a_glob_in_its_name(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "a[1]"))


def a_work_directory_that_cannot_be_written(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), "/proc/run")


def a_work_directory_at_another_kind_of_url(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), "s3://bucket/run")


def a_work_directory_that_is_a_whole_bucket(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), "gs://bucket")


def a_work_directory_with_a_glob_in_its_url(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), "gs://bucket/run*")


def a_work_directory_of_something_else(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "not_a_run"))


def a_work_directory_that_has_lost_its_config(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "no_config"))


def another_config(config: ConfigDict, world: Path) -> None:
    config.model.overrides.hidden_size = 32
    config.data.max_seq_length = 12
    train_and_evaluate(settings_of(config), str(world / "started"))


def a_run_beside_another(config: ConfigDict, world: Path) -> None:
    holder = WorkDir(str(world / "started"))
    holder.lock()
    try:
        train_and_evaluate(settings_of(config), str(world / "started"))
    finally:
        holder.unlock()


# What needs a machine, a disk or a server of its own: these are played.


def a_disk_without_room_at_the_last_save(config: ConfigDict, world: Path) -> None:
    with train._log_and_retry_later(is_last_try=True):
        raise OSError("checkpoint 8 could not be written: no space left on device")


def a_disk_without_room_for_an_export(config: ConfigDict, world: Path) -> None:
    with mock.patch.object(export, "load_checkpoint", side_effect=OSError("no space left on device")):
        export.run(settings_of(config), str(world / "started"), output=str(world / "out"))


def a_model_that_is_damaged(config: ConfigDict, world: Path) -> None:
    load.load_model(str(world / "models" / "damaged"))


def a_work_directory_that_cannot_be_moved(config: ConfigDict, world: Path) -> None:
    with mock.patch.object(storage.os, "rename", side_effect=OSError(30, "Read-only file system")):
        WorkDir(str(world / "started")).move_aside()


def processes_that_do_not_meet(config: ConfigDict, world: Path) -> None:
    with mock.patch.object(
        multihost.jax.distributed, "initialize", side_effect=ValueError("coordinator_address is None")
    ):
        multihost.start()


def a_batch_that_never_fits(config: ConfigDict, world: Path) -> None:
    with (
        mock.patch.object(memory, "_local_memory_bytes", return_value=2**30),
        mock.patch.object(memory, "step_bytes", return_value=None),
    ):
        memory.find_batch_size(None, length=512, microbatches=1)


def a_batch_that_never_fits_a_machine(config: ConfigDict, world: Path) -> None:
    with (
        mock.patch.object(memory, "can_compile_for", return_value=True),
        mock.patch.object(memory, "topology_devices", return_value=[]),
        mock.patch.object(memory, "step_bytes", return_value=None),
        mock.patch.object(check, "_for_tpu", return_value=None),
    ):
        check.find_batch(settings_of(config), None, parse_topology("v3-8"))


def rows_past_the_positions(config: ConfigDict, world: Path) -> None:
    model = MaskedLM(EncoderConfig(max_position_embeddings=20))
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 30), jnp.int32)))


def a_pytorch_file_that_could_run_anything(config: ConfigDict, world: Path) -> None:
    torch = types.SimpleNamespace(load=mock.Mock(side_effect=pickle.UnpicklingError))
    with mock.patch.dict(sys.modules, torch=torch):
        pretrained.open_checkpoint(str(world / "models" / "pytorch"), cache_dir=None)


def a_slow_tokenizer(config: ConfigDict, world: Path) -> None:
    slow = types.SimpleNamespace(is_fast=False)
    with mock.patch.object(transformers.AutoTokenizer, "from_pretrained", return_value=slow):
        tokenizer.load_tokenizer(str(world / "tokenizers" / "words"))


def a_tokenizer_that_the_hub_does_not_have(config: ConfigDict, world: Path) -> None:
    absent = OSError("nobody/none is not a valid model identifier")
    with (
        mock.patch.object(sources, "require_hub"),
        mock.patch.object(transformers.AutoTokenizer, "from_pretrained", side_effect=absent),
    ):
        tokenizer.load_tokenizer("nobody/none")


def a_damaged_tokenizer_beside_weights(config: ConfigDict, world: Path) -> None:
    tokenizer.read_vocabulary(str(world / "tokenizers" / "damaged"))


def a_bucket_that_fails(config: ConfigDict, world: Path) -> None:
    storage = types.SimpleNamespace(display_path="gs://bucket/run")
    with gcs.GcsStorage._as_user_error(storage):
        raise OSError("gs://bucket/run could not be read (503 Service Unavailable)")


def a_bucket_that_does_not_take_the_start_of_a_run(config: ConfigDict, world: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = WorkDir(folder)
        run.display_path = "gs://bucket/run"
        stack.enter_context(mock.patch.object(run, "push", side_effect=OSError("config.json could not be written")))
        settings = settings_of(config)
        run.create(settings, save_tokenizer=lambda path: Path(path).mkdir(), processes=1, rows_per_process=1, step=0)


def a_disk_without_room_for_a_mirror(config: ConfigDict, world: Path) -> None:
    prefix = types.SimpleNamespace(url="gs://bucket/run")
    with (
        mock.patch.object(gcs, "GcsPrefix", return_value=prefix),
        mock.patch.object(gcs, "_make_mirror_home", side_effect=OSError("no space left on device")),
    ):
        gcs.GcsStorage("gs://bucket/run")


def checkpoints_that_are_out_of_reach(config: ConfigDict, world: Path) -> None:
    storage = types.SimpleNamespace(checkpoints="gs://bucket/run/checkpoints", exceptions=(OSError,))
    with mock.patch.object(checkpoint.Checkpointer, "_open", side_effect=ConnectionError("reset by peer")):
        checkpoint.Checkpointer(storage, keep_checkpoints=2)


CALLS = [
    (export_as_another_type, "--dtype=float64 is not one of float32, bfloat16, float16"),
    (export_to_a_file, "--output={world}/file: there is a file; name a directory, or one that can be made"),
    (
        export_to_a_folder_of_something_else,
        "--output={world}/data: there is something else than a model; name another directory",
    ),
    (export_to_a_url, "--output=gs://bucket/model: URLs are not supported; name a directory here and copy it there"),
    (
        export_without_checkpoints,
        "{world}/started has no checkpoints; name the work directory of a run that has saved one",
    ),
    (export_the_mean_of_none, "--average=0 must be at least 1"),
    (
        fill_sentences_without_a_model,
        "there is no model in {world}/started/model: the run has not evaluated yet; --mode=export makes one of a checkpoint",
    ),
    (show_update_0, "--step=0: updates are numbered from 1"),
    (show_a_run_that_is_not_there, "--workdir={world}/x: there is no run; name the work directory of one"),
    (train_a_tokenizer_over_something, "--output={world}/data: there is something already; name another directory"),
    (train_a_tokenizer_on_nothing, "tokenizer.train_documents=0 must be at least 1"),
    (
        a_machine_without_a_number,
        "--topology=v3: unknown machine; set a kind and a number, such as v3-8. The kinds are v2, v3, v4, v5e, v5p, v6e, a100, h100, h200, b200, v5litepod",
    ),
    (
        a_machine_of_half_a_device,
        "--topology=v4-7: the number counts cores, 2 per device; set a positive multiple of 2",
    ),
    (a_machine_of_parts_of_hosts, "--topology=v5e-14: 14 devices do not fill hosts of 4; set a multiple of 4 devices"),
    (
        a_work_directory_that_is_a_file,
        "--workdir={world}/file: {world}/file is a file; name a directory, which may be new",
    ),
    (
        a_work_directory_below_a_file,
        "--workdir={world}/file/run: {world}/file is a file; name a directory, which may be new",
    ),
    (
        a_work_directory_with_a_glob_in_its_name,
        "--workdir={world}/a[1]: *, ? and [ are not supported in checkpoint paths; choose another path",
    ),
    (a_work_directory_that_cannot_be_written, "--workdir=/proc/run: /proc is not writable (...); choose another"),
    (
        a_work_directory_at_another_kind_of_url,
        "--workdir=s3://bucket/run: is no supported URL; use gs://BUCKET/PATH, or mount the storage",
    ),
    (
        a_work_directory_that_is_a_whole_bucket,
        "--workdir=gs://bucket: names no path in a bucket; use gs://BUCKET/PATH",
    ),
    (
        a_work_directory_with_a_glob_in_its_url,
        "--workdir=gs://bucket/run*: *, ?, [, #, // and .. are not supported in checkpoint paths; choose another path",
    ),
    (
        a_work_directory_of_something_else,
        "{world}/not_a_run/config.json: is damaged, or not the config of a run; restore it, or choose another --workdir",
    ),
    (
        a_work_directory_that_has_lost_its_config,
        "--workdir={world}/no_config: has checkpoints but no config.json; restore it, or choose another",
    ),
    (
        another_config,
        "--workdir={world}/started: holds a run with another config: data.max_seq_length (there 16, here 12); model.overrides.hidden_size (there 16, here 32); use the same values to resume it, choose another --workdir, or start a new run with --overwrite",
    ),
    (a_run_beside_another, "--workdir={world}/started: is in use by another run; wait for it, or choose another"),
    (
        a_disk_without_room_at_the_last_save,
        "checkpoint 8 could not be written: no space left on device; make room, or mount it again: the same command goes on",
    ),
    (a_disk_without_room_for_an_export, "no space left on device; make room, or mend that, and export again"),
    (a_model_that_is_damaged, "{world}/models/damaged/config.json is not JSON; --mode=export writes it anew"),
    (
        a_work_directory_that_cannot_be_moved,
        "--overwrite: {world}/started cannot be renamed to {world}/started.old-1 (Read-only file system); choose another --workdir",
    ),
    (
        processes_that_do_not_meet,
        "--multihost: the processes cannot find each other (coordinator_address is None); give each --coordinator_address=HOST:PORT --num_processes=N --process_id=I, or omit --multihost",
    ),
    (
        a_batch_that_never_fits,
        "per_device_train_batch_size=0: not even one sequence of 512 tokens fits the 1.0 GiB of a cpu device; lower data.max_seq_length, set model.remat='full', or choose a smaller model",
    ),
    (
        a_batch_that_never_fits_a_machine,
        "per_device_train_batch_size=0: not even one sequence of 16 tokens fits the 15.8 GiB of a TPU v3 device; lower data.max_seq_length, set model.remat='full', or choose a smaller model",
    ),
    (
        rows_past_the_positions,
        "rows of 30 tokens are too long for a model of max_position_embeddings=20, which takes at most 18",
    ),
    (
        a_pytorch_file_that_could_run_anything,
        "{world}/models/pytorch/pytorch_model.bin is damaged, or holds more than tensors, which could run anything; fetch it anew, or save the model as safetensors where it can be trusted",
    ),
    (a_slow_tokenizer, "the tokenizer '{world}/tokenizers/words' has no fast version: choose one that has"),
    (
        a_tokenizer_that_the_hub_does_not_have,
        "no tokenizer 'nobody/none' on the hub: nobody/none is not a valid model identifier; check tokenizer.tokenizer_name, or leave it empty to train one",
    ),
    (
        a_damaged_tokenizer_beside_weights,
        "the tokenizer in '{world}/tokenizers/damaged' cannot be read (...); fetch it anew, or remove it",
    ),
    (
        a_bucket_that_fails,
        "--workdir=gs://bucket/run: gs://bucket/run could not be read (503 Service Unavailable); fix that, then rerun the same command",
    ),
    (
        a_bucket_that_does_not_take_the_start_of_a_run,
        "--workdir=gs://bucket/run: config.json could not be written; fix that, then rerun the same command",
    ),
    (
        a_disk_without_room_for_a_mirror,
        "--workdir=gs://bucket/run: no space left on device; fix that, then rerun the same command",
    ),
    (
        checkpoints_that_are_out_of_reach,
        "gs://bucket/run/checkpoints: cannot be read (reset by peer); fix that, then rerun the same command",
    ),
]

# What a table cannot cause: file -> the message, {} for what is filled in -> the test that has it.
ELSEWHERE = {
    "main.py": {
        # The words of the flags' parser and of a config file, as they come; and all problems of --mode=check.
        "{}": "tests/test_user_errors.py::test_command_line",
    },
    "mlm/run/gcs.py": {
        "--workdir={}: the run was restarted or removed elsewhere, so this process ends; start one run at a time, or choose another --workdir": "tests/test_gcs_runs.py::test_of_two_runs_in_one_work_directory_the_older_one_ends",
    },
    "mlm/run/workdir.py": {
        "{}: format_version={} is not supported, this version of the code reads {}; use the version that started the run, or choose another --workdir": "tests/test_workdir.py::test_another_format_version_is_refused_in_a_line_that_names_it",
        "{}/config.json: {}": "tests/test_workdir.py::test_a_renamed_key_is_mapped_and_a_removed_key_is_dropped_at_its_remaining_value",
    },
    "mlm/run/checkpoint.py": {
        "{}/{}: the checkpoint structure does not match the model; use the version of the code that wrote it, or choose another --workdir": "tests/test_checkpoint.py::test_a_checkpoint_of_another_model_is_not_called_corrupt",
        "{}/{}: cannot be read now ({}); check the network and the permissions, then rerun the same command to resume": "tests/test_gcs.py::test_a_corrupt_checkpoint_is_quarantined_and_an_unreachable_one_is_not",
        "{}/{}: format_version={} is not supported, this version of the code reads {}; use the version that wrote the checkpoint, or choose another --workdir": "tests/test_checkpoint.py::test_another_format_version_is_refused_in_a_line_that_names_it",
    },
    "mlm/data/mixture.py": {
        "cannot resume the data stream: the sources are {}, but the checkpoint was saved with {}; restore data.mixture, or choose another --workdir": "tests/test_mixture.py::test_a_mixture_of_other_sources_is_refused",
        "data stream state: format_version={} is not supported, this version of the code reads {}; use the version that wrote the checkpoint, or choose another --workdir": "tests/test_mixture.py::test_a_state_of_another_format_version_is_refused",
        "data.skip_steps: skips {} of the first {} batches, but the run skipped {}; change only what is past batch {}, or remove the checkpoints that are too new": "tests/test_mixture.py::test_skip_steps_may_change_past_the_checkpoint_only",
    },
    "mlm/data/reader.py": {
        "cannot resume the data stream: {}; run the same command when it can be read": "tests/test_quarantine.py::test_a_partly_used_window_must_be_read_completely_on_resuming",
        "{}; run the same command when it can be read (failed shard {}, data.max_failed_shards={})": "tests/test_quarantine.py::test_a_server_that_stops_answering_ends_the_stream",
    },
    "mlm/data/sources/source.py": {
        "{} is not here and needs the network, but {} cannot be reached ({}): check the network, or name local files": "tests/test_sources.py::test_a_hub_that_cannot_be_reached_is_told_at_once",
    },
    "mlm/data/stream.py": {
        "cannot resume the data stream: the data set {} has changed since the checkpoint was saved; restore it, or choose another --workdir": "tests/test_stream.py::test_data_that_changed_since_the_checkpoint_is_an_error",
        "cannot resume the data stream: {}={}, but the checkpoint was saved with {}; restore the old value, or choose another --workdir": "tests/test_stream.py::test_a_state_of_another_order_is_refused",
        "the data set {} has no documents to train on{} ({})": "tests/test_stream.py::test_a_data_set_that_is_too_small_or_empty_is_an_error",
    },
    "mlm/export/hub.py": {
        "hub.push_to_hub=True: the token of {} may only read, not write to {}; make one with write access at https://huggingface.co/settings/tokens and run `hf auth login`, or set --config.hub.push_to_hub=False": "tests/test_hub.py::test_a_token_that_may_not_write_is_found_out",
        "hub.push_to_hub=True: the hub does not say whose token this is ({}); check it with `hf auth whoami`, and the network, or set --config.hub.push_to_hub=False": "tests/test_hub.py::test_tokens_and_hubs_that_are_not_there",
        "hub.hub_model_id={}: the repository cannot be made ({}); check the name, the token's rights (`hf auth whoami`) and the network, or set --config.hub.push_to_hub=False": "tests/test_hub.py::test_tokens_and_hubs_that_are_not_there",
        "the run is finished, but pushing it to {} failed ({}); run the same command again, or push by hand: {}": "tests/test_hub.py::test_a_push_that_fails_to_the_end_is_an_error_with_the_command",
    },
    "mlm/models/config.py": {
        "model config: there is no field {}; {}": "tests/test_models.py::test_replace_names_the_nearest_field",
    },
    "mlm/reporting/reporter.py": {
        "updates {} to {} went wrong and were skipped; of the last one {}. See its rows with --mode=show_data --step={}. Checkpoints before it are kept: go on from them with a lower optimizer.learning_rate, more warmup_steps, max_grad_norm=1.0, or data.skip_steps": "tests/test_report.py::test_too_many_skipped_in_a_row_end_the_run_by_their_names_also_after_going_on",
    },
    "mlm/load.py": {
        "no sentence; write some after the flags, or send lines to standard input": "tests/test_load.py::test_sentences_that_cannot_be_filled_in",
        "--step={}: there is no such checkpoint; there are {}": "tests/test_load.py::test_what_cannot_be_exported",
        "--average={}: up to update {} there are only the checkpoints {}; checkpoint.keep_checkpoints and checkpoint.keep_every_steps keep more": "tests/test_load.py::test_what_cannot_be_exported",
        "checkpoint {} in {} cannot be read ({}); choose another --step": "tests/test_load.py::test_what_cannot_be_exported",
    },
    "mlm/modes/show_data.py": {
        "--process={}: update {} had processes 0 to {}": "tests/test_show_data.py::test_what_cannot_be_shown_is_told",
    },
    "mlm/memory.py": {
        "the step does not compile for {}: {}": "tests/test_memory.py::test_a_compiler_out_of_memory_is_no_error_and_other_failures_are",
    },
    "mlm/train.py": {
        "none of the checkpoints up to {} can be read; they are in {}. Put whole ones back, or start anew with --overwrite": "tests/test_bad_input.py::test_damaged_work_directories",
    },
}
