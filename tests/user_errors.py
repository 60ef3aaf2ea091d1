# ruff: noqa: E501, messages are one line.
"""Tables of user errors and their messages, "<key>=<value>: <what is wrong>; <what to do>".

`tests/test_settings.py` has those of invalid values in a config. `{world}` is the directory of invalid files that
`test_user_errors.py` makes; `...` stands for words of other programs, which change.
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

from mlm import load, memory, train
from mlm.data import tokenizer
from mlm.hardware import parse_topology
from mlm.models.block import Execution
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.models.hf import pretrained
from mlm.modes import check, export, fill_mask, show_data, train_tokenizer
from mlm.run import checkpoint, gcs, multihost, storage
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.tiny import settings_of

QUICKSTART = "--config=configs/quickstart.py"
COMMAND_LINE = [
    ((), "--workdir: missing; name the run's directory, such as --workdir=runs/quickstart"),
    (
        ("--workdir={world}/x",),
        "--config: missing; there are configs/bert_base.py, configs/encoder_base.py, configs/laptop.py, configs/modernbert_base.py, configs/quickstart.py, configs/roberta_base.py, configs/roberta_large.py, configs/xlm_roberta_base.py",
    ),
    (
        ("--config=configs/quikstart.py",),
        "--config=configs/quikstart.py: no such file; did you mean configs/quickstart.py?",
    ),
    (
        ("--config", "configs/quikstart.py"),
        "--config=configs/quikstart.py: no such file; did you mean configs/quickstart.py?",
    ),
    ((QUICKSTART,), "--workdir: missing; name the run's directory, such as --workdir=runs/quickstart"),
    ((QUICKSTART, "--workdir="), "--workdir: is empty; was a variable of the shell not set?"),
    (
        (QUICKSTART, "--workdir={world}/x", "--config.stages=({'name': 'a', 'seed': 3},)"),
        "stages[0].seed=3: cannot change in a stage; keys that can are ...",
    ),
    (
        (QUICKSTART, "--workdir={world}/x", "surplus"),
        "surplus: is not a flag; write flags as --NAME=VALUE",
    ),
    ((QUICKSTART, "--workdr={world}/x"), "--workdr: unknown flag; did you mean --workdir?"),
    (
        (QUICKSTART, "--config.optimizer.learning_rat=1"),
        "--config.optimizer.learning_rat: unknown key; did you mean optimizer.learning_rate?",
    ),
    (
        (QUICKSTART, "--config.optimiser.learning_rate=1"),
        "--config.optimiser.learning_rate: unknown key; did you mean optimizer.learning_rate?",
    ),
    (
        (QUICKSTART, "--config.data=3"),
        "--config.data: is a group of keys; set one of them: data.dataset_name, data.dataset_config_name, data.data_files, data.eval_data_files, data.mixture, data.split, data.text_column_name, data.max_seq_length, data.packing, data.shuffle_buffer_size, data.first_shuffle_buffer_size, data.shuffle_buffer_bytes, data.shuffle_piece_bytes, data.interleave_shards, data.min_shards, data.num_eval_samples, data.eval_rows, data.skip_steps, data.network_deadline_seconds, data.network_timeout_seconds, data.max_failed_shards, data.max_unknown_fraction, data.accept_changed_files, data.prefetch_batches, data.cache_dir",
    ),
    (
        ("--config=configs/roberta_base.py:bert",),
        "--config=configs/roberta_base.py:bert: get_config() takes no argument; remove the colon and what follows it",
    ),
    (
        ("--config.num_train_steps=3", QUICKSTART),
        "--config.num_train_steps=3: comes before --config=configs/quickstart.py; write --config first",
    ),
    ((QUICKSTART, "--config.num_train_steps=many"), "--config.num_train_steps=many: must be a whole number"),
    (
        (QUICKSTART, "--config.model.overrides.hidden_size=1.5"),
        "--config.model.overrides.hidden_size=1.5: must be a whole number",
    ),
    ((QUICKSTART, "--config.hub.push_to_hub=perhaps"), "--config.hub.push_to_hub=perhaps: must be True or False"),
    ((QUICKSTART, "--config.seed=-1", "--workdir={world}/x"), "seed=-1: must lie between 0 and 2**32 - 1"),
    (
        (QUICKSTART, "--mode=trian", "--workdir={world}/x"),
        "--mode=trian: must be one of train, check, explain, benchmark, train_tokenizer, show_data, export, fill_mask, report, probe, score, embed",
    ),
    ((QUICKSTART, "--workdir={world}/x", "--num_processes=0"), "--num_processes=0: 0 is not a positive integer"),
    ((QUICKSTART, "--mode=benchmark", "--steps=many"), "--steps=many: must be a whole number"),
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
        "num_train_steps, per_device_train_batch_size, per_device_eval_batch_size, gradient_accumulation_steps and ... more: missing; let get_config() start from configs/default.py",
    ),
    (
        ("--config={world}/dict.py", "--workdir={world}/x"),
        "--config={world}/dict.py: get_config() returns a dict, not a ConfigDict; start from configs/default.py",
    ),
    (
        ("--config={world}/no_function.py", "--workdir={world}/x"),
        "--config={world}/no_function.py: has no function get_config(); write one as in configs/quickstart.py",
    ),
    (
        (QUICKSTART, "--workdir={world}/x", "--workdir={world}/y"),
        "--workdir: was given 2 times; only --mode=report takes several runs",
    ),
    (
        (QUICKSTART, "--workdir={world}/x", "--topology=v3-8"),
        "--topology: is for --mode=check; --mode=train does not use it",
    ),
    (
        ("--mode=fill_mask", "--model=roberta-base", "A <mask>."),
        "--model: is for --mode=probe, score, embed; --mode=fill_mask does not use it",
    ),
    (
        (QUICKSTART, "--mode=train_tokenizer"),
        "--output: missing; --mode=train_tokenizer needs it, such as --output=tokenizers/mine",
    ),
    (("--mode=show_data", "--workdir={world}/x"), "--step: missing; --mode=show_data needs it, such as --step=100"),
    (("--mode=export", "--workdir={world}/x"), "--workdir={world}/x: contains no run; choose a run's work directory"),
    (("--mode=explain", "learning_rate"), "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
    (("--mode=report",), "--workdir: missing; name the run's directory, such as --workdir=runs/quickstart"),
    *(
        (
            (f"--mode={mode}", QUICKSTART, "--workdir={world}/x", *more),
            f"--config: is not for --mode={mode}, which uses the config of the run; omit it",
        )
        for mode, more in (("export", ()), ("fill_mask", ("A <mask>.",)), ("report", ()), ("probe", ("--task=x",)))
    ),
    (
        ("--mode=check", "--config={world}/bare.py", "--workdir={world}/x"),
        "num_train_steps, per_device_train_batch_size, per_device_eval_batch_size, gradient_accumulation_steps and ... more: missing; let get_config() start from configs/default.py",
    ),
    (("--mode=report", "--workdir={world}/x"), "--workdir={world}/x: contains no run; choose a run's work directory"),
    (
        ("--mode=report", "--workdir={world}/x", "--workdir={world}/x/"),
        "--workdir: the same run is given twice; give each run once",
    ),
    (
        ("--mode=report", "--workdir={world}/started"),
        "--workdir={world}/started: has no metrics yet; try again after the first evaluation or checkpoint",
    ),
    (
        ("--mode=report", "--workdir={world}/logged", "--output={world}/nowhere/report.html"),
        "--output={world}/nowhere/report.html: cannot be written (No such file or directory); name another file",
    ),
    (
        ("--mode=report", "--workdir={world}/garbled"),
        "{world}/garbled/metrics.jsonl, line 1: is not JSON; fix or remove the line",
    ),
    (
        ("--mode=export", "--workdir={world}/not_a_run"),
        "{world}/not_a_run/config.json: is damaged, or not the config of a run; restore it, or choose another --workdir",
    ),
    (
        ("--mode=probe", "--workdir={world}/started"),
        "--task: missing; --mode=probe needs it, such as --task=reviews.jsonl",
    ),
    (
        ("--mode=probe", "--workdir={world}/started", "--model=roberta-base", "--task=a.csv"),
        "--model=roberta-base: excludes --workdir and --step; give one of them",
    ),
    (
        ("--mode=probe", "--task=a.csv"),
        "--workdir: missing; name the run's directory, such as --workdir=runs/quickstart",
    ),
    (
        ("--mode=probe", "--model={world}/models/ids_only", "--task={world}/a.csv"),
        "--task={world}/a.csv: no such file; check the path",
    ),
]

VALUES = [
    (
        {"data.max_seq_length": 19},
        "data.max_seq_length=19: is longer than the model's 18 positions; lower it, or set model.overrides.max_position_embeddings=21",
    ),
    (
        {"data.text_column_name": "body"},
        "data.text_column_name='body': there is no such column in '{world}/data/part-0.jsonl (part 1 of 2)'; set it to one of id, text",
    ),
    (
        {"data.text_column_name": "id"},
        "data.text_column_name='id': the column of '{world}/data/part-0.jsonl (part 1 of 2)' has values such as 0, not text; set it to another column",
    ),
    (
        {"data.num_eval_samples": 1000000},
        "data.num_eval_samples=1000000: the dataset '{world}/data/part-*.jsonl' has only ... sequences of 16 tokens; lower it, or add text",
    ),
    (
        {"per_device_train_batch_size": 100000},
        "the dataset '{world}/data/part-*.jsonl': an epoch has only ... sequences of 16 tokens, and a batch needs 400000 (0 blank rows, ... held-out documents); lower per_device_train_batch_size or data.max_seq_length, or add data",
    ),
    (
        {"data.data_files": "{world}/data/absent.txt"},
        "data.data_files='{world}/data/absent.txt': there is no such file; check the path",
    ),
    (
        {"data.data_files": "{world}/data/*.csv"},
        "data.data_files='{world}/data/*.csv': no file matches; check the directory and the pattern",
    ),
    (
        {"data.data_files": "{world}/data/notes.odt"},
        "data.data_files='{world}/data/notes.odt': unknown format; the name must end with one of .txt, .text, .json, .jsonl, .csv, .parquet, optionally followed by one of .gz, .zst, .bz2, .xz",
    ),
    (
        {"data.data_files": "{world}/data/table.parquet.gz"},
        "data.data_files='{world}/data/table.parquet.gz': is a compressed parquet file; decompress it",
    ),
    (
        {"data.data_files": "{world}/data/not.parquet"},
        "cannot read '{world}/data/not.parquet': ...; fix it or remove it",
    ),
    (
        {"data.data_files": "{world}/data/broken.jsonl"},
        "cannot read '{world}/data/broken.jsonl': Expecting value in the line '{\"text\": '; fix it or remove it",
    ),
    (
        {"data.data_files": "{world}/data/empty.txt"},
        "the dataset '{world}/data/empty.txt': is empty; choose a dataset that has rows",
    ),
    (
        {"data.data_files": "{world}/data/blank.txt"},
        "data.num_eval_samples=30: the dataset '{world}/data/blank.txt' has only 0 sequences of 16 tokens; lower it, or add text",
    ),
    (
        {"data.data_files": "{world}/data/short.txt"},
        "data.num_eval_samples=30: the dataset '{world}/data/short.txt' has only 0 sequences of 16 tokens; lower it, or add text",
    ),
    (
        {"data.data_files": "{world}/data/"},
        "data.data_files='{world}/data/': is a directory; name the files in it, for example {world}/data/*.parquet",
    ),
    (
        {"data.data_files": ("{world}/data/short.txt", "{world}/data/part-0.jsonl")},
        "data.data_files=('{world}/data/short.txt', '{world}/data/part-0.jsonl'): the files must have one format, but '{world}/data/short.txt' is text and '{world}/data/part-0.jsonl' is json; use one format, or two sources in data.mixture",
    ),
    (
        {"data.data_files": None, "data.dataset_name": "/nowhere/data"},
        "data.dataset_name='/nowhere/data': there is no such directory; check the path",
    ),
    (
        {"data.data_files": None, "data.dataset_name": "nobody/nothing"},
        "data.dataset_name='nobody/nothing': is not a local directory, and HF_HUB_OFFLINE is set; unset it, or name local files",
    ),
    (
        {"data.data_files": None, "data.dataset_name": "{world}/data/folder"},
        "data.dataset_name='{world}/data/folder': cannot be opened (...); check the name",
    ),
    (
        {"tokenizer.tokenizer_name": "/nowhere/tokenizer"},
        "the tokenizer '/nowhere/tokenizer': there is no such directory; check tokenizer.tokenizer_name",
    ),
    (
        {"tokenizer.tokenizer_name": "nobody/no-tokenizer"},
        "the tokenizer 'nobody/no-tokenizer': is not a local directory, and HF_HUB_OFFLINE is set; unset it, or name local files",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/data"},
        "the tokenizer '{world}/data': cannot be loaded (...); check tokenizer.tokenizer_name",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/no_mask"},
        "the tokenizer '{world}/tokenizers/no_mask': has no mask token; choose another tokenizer, or add the token and save it",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/no_end"},
        "the tokenizer '{world}/tokenizers/no_end': has no end token; choose another tokenizer, or add the token and save it",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/one_for_all"},
        "the tokenizer '{world}/tokenizers/one_for_all': its padding token is also its begin, end or mask token; choose another tokenizer, or add a padding token and save it",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/words", "tokenizer.backend": "gigatoken"},
        "tokenizer.backend='gigatoken': supports byte-level BPE only, not the tokenizer '{world}/tokenizers/words'; set it to 'auto' or 'tokenizers'",
    ),
    (
        {"tokenizer.tokenizer_name": "{world}/tokenizers/words", "model.config_name": "{world}/models/ids_only"},
        "tokenizer.tokenizer_name='{world}/tokenizers/words': pads with id 2, but the model's pad_token_id is 1; use the model's own tokenizer",
    ),
    (
        {"tokenizer.vocab_size": 10, "tokenizer.algorithm": "wordpiece"},
        "tokenizer.vocab_size=10: must be at least ... for this text: its letters, at the beginning of words and inside them, and 5 special tokens",
    ),
    (
        {"tokenizer.vocab_size": 10, "tokenizer.algorithm": "unigram"},
        "tokenizer.vocab_size=10: no Unigram tokenizer of this size can be trained on this text (...); change it",
    ),
    ({"model.config_name": "/nowhere/model"}, "the model '/nowhere/model': no such directory; check the path"),
    ({"model.model_name_or_path": "/nowhere/model"}, "the model '/nowhere/model': no such directory; check the path"),
    (
        {"model.model_name_or_path": "{world}/data"},
        "the model '{world}/data': has no config.json; check the path",
    ),
    (
        {"model.model_name_or_path": "nobody/no-model"},
        "the model 'nobody/no-model': is not a local directory, and cannot be downloaded from the hub; check the name and the network",
    ),
    (
        {
            "tokenizer.tokenizer_name": "{world}/tokenizers/words",
            "model.model_name_or_path": "{world}/models/other_weights",
        },
        "the tensors do not match the config of the roberta model: missing: ...roberta...; use config and weights of the same model",
    ),
    (
        {"model.config_name": "{world}/models/garbled"},
        "{world}/models/garbled/config.json: is not JSON; download it again",
    ),
    (
        {"model.config_name": "{world}/models/no_type"},
        "model config: model_type is missing; set it to one of roberta, xlm-roberta, camembert, roberta-prelayernorm, bert, distilbert, electra, albert, roformer, modernbert",
    ),
    (
        {"model.config_name": "{world}/models/decoder"},
        "model config is_decoder=True: only False is supported; choose another model",
    ),
    (
        {"model.config_name": "{world}/models/unknown_field"},
        "model config moe_experts=4: unknown field of the family roberta, which may change the model; if not, remove it",
    ),
    (
        {"model.model_name_or_path": "{world}/models/ids_only"},
        "the model '{world}/models/ids_only': has neither model.safetensors nor pytorch_model.bin; to use its config only, set model.config_name",
    ),
    (
        {"model.model_name_or_path": "{world}/models/bad_weights"},
        "{world}/models/bad_weights/model.safetensors: cannot be read (...); download it again",
    ),
    (
        {"model.model_name_or_path": "{world}/models/pytorch"},
        "{world}/models/pytorch/pytorch_model.bin: is in PyTorch's format, and PyTorch is not installed; `pip install torch`, or convert the model to safetensors with transformers' save_pretrained",
    ),
    (
        {"model.model_name_or_path": "{world}/models/bad_index"},
        "{world}/models/bad_index/model.safetensors.index.json: is not a valid shard index; download it again",
    ),
    (
        {"model.model_name_or_path": "{world}/models/lost_shard"},
        "{world}/models/lost_shard/model.safetensors.index.json: lists model-1-of-2.safetensors, which {world}/models/lost_shard does not have; download them",
    ),
    (
        {"model.overrides.vocab_size": 100},
        "model.overrides.vocab_size=100: the tokenizer trained has ids up to 299; set it to 300",
    ),
    (
        {"report.sentences": ("no mask in it",)},
        "sentence 'no mask in it': has no <mask>; write <mask> for each token to predict",
    ),
    (
        {"report.sentences": ("<mask> " + "word " * 40,)},
        "sentence '<mask> word ...': has ... tokens, the model takes at most 18; shorten it",
    ),
    (
        {"hub.push_to_hub": True},
        "hub.push_to_hub=True: needs a token; run `hf auth login`, set HF_TOKEN, or set hub.push_to_hub=False",
    ),
    (
        {"model.attention": "cudnn", "model.dtype": "bfloat16"},
        "model.attention='cudnn': needs an NVIDIA GPU, and jax runs on cpu; set it to 'auto'",
    ),
    ({"model.attention": "splash"}, "model.attention='splash': needs a TPU, and jax runs on cpu; set it to 'auto'"),
    (
        {"per_device_train_batch_size": 0},
        "per_device_train_batch_size=0: the memory of a cpu device is unknown, so the largest batch that fits cannot be found; set a number",
    ),
]


def export_as_another_dtype(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), dtype="float64")


def export_to_a_file(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), output=str(world / "file"))


def export_into_other_files(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), output=str(world / "data"))


def export_to_a_url(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), output="gs://bucket/model")


def export_without_checkpoints(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), output=str(world / "out"))


def export_the_mean_of_none(config: ConfigDict, world: Path) -> None:
    export.run(settings_of(config), str(world / "started"), average=0, output=str(world / "out"))


def fill_mask_without_a_model(config: ConfigDict, world: Path) -> None:
    fill_mask.run(settings_of(config), str(world / "started"), arguments=["A <mask>."])


def show_step_0(config: ConfigDict, world: Path) -> None:
    show_data.run(settings_of(config), str(world / "started"), step=0, sequences=1, process=0)


def show_a_run_that_does_not_exist(config: ConfigDict, world: Path) -> None:
    show_data.run(settings_of(config), str(world / "x"), step=1, sequences=1, process=0)


def train_a_tokenizer_into_other_files(config: ConfigDict, world: Path) -> None:
    train_tokenizer.run(settings_of(config), None, output=str(world / "data"))


def a_machine_without_a_number(config: ConfigDict, world: Path) -> None:
    parse_topology("v3")


def a_machine_with_half_a_device(config: ConfigDict, world: Path) -> None:
    parse_topology("v4-7")


def a_machine_with_part_of_a_host(config: ConfigDict, world: Path) -> None:
    parse_topology("v5e-14")


def a_work_directory_that_is_a_file(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "file"))


def a_work_directory_below_a_file(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "file" / "run"))


def a_work_directory_with_a_glob_in_its_name(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "a[1]"))


def a_read_only_work_directory(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), "/proc/run")


def a_work_directory_at_another_kind_of_url(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), "s3://bucket/run")


def a_work_directory_without_a_path_in_a_bucket(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), "gs://bucket")


def a_work_directory_with_a_glob_in_its_url(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), "gs://bucket/run*")


def a_work_directory_that_is_no_run(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "not_a_run"))


def a_work_directory_without_its_config(config: ConfigDict, world: Path) -> None:
    train_and_evaluate(settings_of(config), str(world / "no_config"))


def another_config(config: ConfigDict, world: Path) -> None:
    config.model.overrides.hidden_size = 32
    config.data.max_seq_length = 12
    train_and_evaluate(settings_of(config), str(world / "started"))


def two_runs_in_one_work_directory(config: ConfigDict, world: Path) -> None:
    holder = WorkDir(str(world / "started"))
    holder.lock()
    try:
        train_and_evaluate(settings_of(config), str(world / "started"))
    finally:
        holder.unlock()


# Failures of machines, disks and servers are mocked.


def a_full_disk_at_the_last_save(config: ConfigDict, world: Path) -> None:
    with train._log_and_retry_later(is_last_try=True):
        raise OSError("checkpoint 8 could not be written: no space left on device")


def a_full_disk_at_an_export(config: ConfigDict, world: Path) -> None:
    with mock.patch.object(export, "load_checkpoint", side_effect=OSError("no space left on device")):
        export.run(settings_of(config), str(world / "started"), output=str(world / "out"))


def a_damaged_model(config: ConfigDict, world: Path) -> None:
    load.load_model(str(world / "models" / "damaged"))


def a_work_directory_that_does_not_move(config: ConfigDict, world: Path) -> None:
    with mock.patch.object(storage.os, "rename", side_effect=OSError(30, "Read-only file system")):
        WorkDir(str(world / "started")).move_aside()


def processes_that_cannot_find_each_other(config: ConfigDict, world: Path) -> None:
    with mock.patch.object(
        multihost.jax.distributed, "initialize", side_effect=ValueError("coordinator_address is None")
    ):
        multihost.start()


FULL_REMAT = mock.Mock(model=mock.Mock(execution=Execution(remat="full")))


def a_model_too_large_for_the_device(config: ConfigDict, world: Path) -> None:
    with (
        mock.patch.object(memory, "_local_memory_bytes", return_value=2**30),
        mock.patch.object(memory, "step_bytes", return_value=None),
    ):
        memory.find_batch_size(FULL_REMAT, length=512, microbatches=1)


def a_model_too_large_for_a_machine(config: ConfigDict, world: Path) -> None:
    with (
        mock.patch.object(memory, "can_compile_for", return_value=True),
        mock.patch.object(memory, "topology_devices", return_value=[]),
        mock.patch.object(memory, "step_bytes", return_value=None),
        mock.patch.object(check, "_for_tpu", return_value=FULL_REMAT),
    ):
        check.find_batch(settings_of(config), None, parse_topology("v3-8"))


def rows_longer_than_the_model(config: ConfigDict, world: Path) -> None:
    model = MaskedLM(EncoderConfig(max_position_embeddings=20))
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 30), jnp.int32)))


def a_pytorch_file_with_code(config: ConfigDict, world: Path) -> None:
    torch = types.SimpleNamespace(load=mock.Mock(side_effect=pickle.UnpicklingError))
    with mock.patch.dict(sys.modules, torch=torch):
        pretrained.load_weights(str(world / "models" / "pytorch"), cache_dir=None)


def a_slow_tokenizer(config: ConfigDict, world: Path) -> None:
    slow = types.SimpleNamespace(is_fast=False)
    with mock.patch.object(transformers.AutoTokenizer, "from_pretrained", return_value=slow):
        tokenizer.load_tokenizer(str(world / "tokenizers" / "words"))


def a_tokenizer_that_is_not_on_the_hub(config: ConfigDict, world: Path) -> None:
    absent = OSError("nobody/none is not a valid model identifier")
    with (
        mock.patch.object(tokenizer, "require_hub"),
        mock.patch.object(transformers.AutoTokenizer, "from_pretrained", side_effect=absent),
    ):
        tokenizer.load_tokenizer("nobody/none")


def a_damaged_tokenizer_of_a_model(config: ConfigDict, world: Path) -> None:
    tokenizer.read_vocabulary(str(world / "tokenizers" / "damaged"))


def a_bucket_that_fails(config: ConfigDict, world: Path) -> None:
    with gcs.GcsStorage._as_user_error(mock.Mock(display_path="gs://bucket/run")):
        raise OSError("gs://bucket/run could not be read (503 Service Unavailable)")


def a_bucket_that_fails_at_the_start_of_a_run(config: ConfigDict, world: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = WorkDir(folder)
        run.display_path = "gs://bucket/run"
        stack.enter_context(mock.patch.object(run, "push", side_effect=OSError("config.json could not be written")))
        settings = settings_of(config)
        run.create(settings, save_tokenizer=lambda path: Path(path).mkdir(), processes=1, rows_per_process=1, step=0)


def a_full_disk_at_the_download_of_a_mirror(config: ConfigDict, world: Path) -> None:
    prefix = types.SimpleNamespace(url="gs://bucket/run")
    with (
        mock.patch.object(gcs, "GcsPrefix", return_value=prefix),
        mock.patch.object(gcs, "exceptions", return_value=(OSError,)),
        mock.patch.object(gcs, "_make_mirror_home", side_effect=OSError("no space left on device")),
    ):
        gcs.GcsStorage("gs://bucket/run")


def unreachable_checkpoints(config: ConfigDict, world: Path) -> None:
    bucket = mock.Mock(checkpoints="gs://bucket/run/checkpoints", exceptions=(OSError,))
    with mock.patch.object(checkpoint.Checkpointer, "_open", side_effect=ConnectionError("reset by peer")):
        checkpoint.Checkpointer(bucket, keep_checkpoints=2)


def a_stored_config_with_an_unknown_value(config: ConfigDict, world: Path) -> None:
    WorkDir(str(world / "old_value")).read_settings()


CALLS = [
    (export_as_another_dtype, "--dtype=float64: must be one of float32, bfloat16, float16"),
    (export_to_a_file, "--output={world}/file: is a file; name a directory"),
    (
        export_into_other_files,
        "--output={world}/data: has files that are not a model's; name another directory",
    ),
    (
        export_to_a_url,
        "--output=gs://bucket/model: URLs are not supported; name a local directory and copy it to the URL",
    ),
    (
        export_without_checkpoints,
        "--workdir={world}/started: has no checkpoints; give the work directory of a run that has some",
    ),
    (export_the_mean_of_none, "--average=0: must be at least 1"),
    (
        fill_mask_without_a_model,
        "{world}/started/model: there is no model, since the run has not evaluated yet; export a checkpoint with --mode=export",
    ),
    (show_step_0, "--step=0: must be at least 1, the first step"),
    (show_a_run_that_does_not_exist, "--workdir={world}/x: contains no run; choose a run's work directory"),
    (
        train_a_tokenizer_into_other_files,
        "--output={world}/data: exists and is not an empty directory; name another directory",
    ),
    (
        a_machine_without_a_number,
        "--topology=v3: unknown machine; use a kind and a number, such as v3-8. The kinds are v2, v3, v4, v5e, v5p, v6e, a100, h100, h200, b200, v5litepod",
    ),
    (
        a_machine_with_half_a_device,
        "--topology=v4-7: the number counts cores, 2 per device; set a positive multiple of 2",
    ),
    (
        a_machine_with_part_of_a_host,
        "--topology=v5e-14: 14 devices do not fill hosts of 4; set a multiple of 4 devices",
    ),
    (
        a_work_directory_that_is_a_file,
        "--workdir={world}/file: {world}/file is a file; choose a directory, which need not exist",
    ),
    (
        a_work_directory_below_a_file,
        "--workdir={world}/file/run: {world}/file is a file; choose a directory, which need not exist",
    ),
    (
        a_work_directory_with_a_glob_in_its_name,
        "--workdir={world}/a[1]: *, ? and [ are not supported in checkpoint paths; choose another path",
    ),
    (a_read_only_work_directory, "--workdir=/proc/run: /proc is not writable (...); choose another"),
    (
        a_work_directory_at_another_kind_of_url,
        "--workdir=s3://bucket/run: is not a supported URL; use gs://BUCKET/PATH, or mount the storage",
    ),
    (
        a_work_directory_without_a_path_in_a_bucket,
        "--workdir=gs://bucket: has no path after the bucket name; use gs://BUCKET/PATH",
    ),
    (
        a_work_directory_with_a_glob_in_its_url,
        "--workdir=gs://bucket/run*: *, ?, [, #, // and .. are not supported in checkpoint paths; choose another path",
    ),
    (
        a_work_directory_that_is_no_run,
        "{world}/not_a_run/config.json: is damaged, or not the config of a run; restore it, or choose another --workdir",
    ),
    (
        a_work_directory_without_its_config,
        "--workdir={world}/no_config: has checkpoints but no config.json; restore it, or choose another",
    ),
    (
        another_config,
        "--workdir={world}/started: holds a run with another config: data.max_seq_length (there 16, here 12); model.overrides.hidden_size (there 16, here 32); use the same values to resume it, choose another --workdir, or start a new run with --overwrite",
    ),
    (
        two_runs_in_one_work_directory,
        "--workdir={world}/started: is in use by another run; wait for it, or choose another",
    ),
    (
        a_full_disk_at_the_last_save,
        "checkpoint 8 could not be written: no space left on device; free or mount the disk, then rerun the same command to resume",
    ),
    (
        a_full_disk_at_an_export,
        "--mode=export: no space left on device; free some space or fix the disk, and export again",
    ),
    (a_damaged_model, "{world}/models/damaged/config.json: is not JSON; export the model again with --mode=export"),
    (
        a_work_directory_that_does_not_move,
        "--overwrite: {world}/started cannot be renamed to {world}/started.old-1 (Read-only file system); choose another --workdir",
    ),
    (
        processes_that_cannot_find_each_other,
        "--multihost: the processes cannot find each other (coordinator_address is None); give each --coordinator_address=HOST:PORT --num_processes=N --process_id=I, or omit --multihost",
    ),
    (
        a_model_too_large_for_the_device,
        "per_device_train_batch_size=0: not even one sequence of 512 tokens fits the 1.0 GiB of a cpu device; lower data.max_seq_length or choose a smaller model",
    ),
    (
        a_model_too_large_for_a_machine,
        "per_device_train_batch_size=0: not even one sequence of 16 tokens fits the 15.8 GiB of a TPU v3 device; lower data.max_seq_length or choose a smaller model",
    ),
    (
        rows_longer_than_the_model,
        "max_position_embeddings=20: allows sequences of at most 18 tokens, not 30; shorten them",
    ),
    (
        a_pytorch_file_with_code,
        "{world}/models/pytorch/pytorch_model.bin: is damaged, or contains code besides tensors; download it again, or convert it to safetensors if you trust it",
    ),
    (
        a_slow_tokenizer,
        "the tokenizer '{world}/tokenizers/words': has no fast version; choose a tokenizer that has one",
    ),
    (
        a_tokenizer_that_is_not_on_the_hub,
        "the tokenizer 'nobody/none': cannot be loaded from the hub (nobody/none is not a valid model identifier); check tokenizer.tokenizer_name, or set it to None to train one",
    ),
    (
        a_damaged_tokenizer_of_a_model,
        "the tokenizer '{world}/tokenizers/damaged': cannot be loaded (...); download it again, or remove it",
    ),
    (
        a_bucket_that_fails,
        "--workdir=gs://bucket/run: gs://bucket/run could not be read (503 Service Unavailable); fix that, then rerun the same command",
    ),
    (
        a_bucket_that_fails_at_the_start_of_a_run,
        "--workdir=gs://bucket/run: config.json could not be written; fix that, then rerun the same command",
    ),
    (
        a_full_disk_at_the_download_of_a_mirror,
        "--workdir=gs://bucket/run: no space left on device; fix that, then rerun the same command",
    ),
    (
        unreachable_checkpoints,
        "gs://bucket/run/checkpoints: cannot be read (reset by peer); fix that, then rerun the same command",
    ),
    (
        a_stored_config_with_an_unknown_value,
        "{world}/old_value/config.json: data.packing='tight': must be one of concatenate, pad, pad_lines, isolate, best_fit",
    ),
]

# Errors of other tests: file -> message, with {} for values -> test.
ELSEWHERE = {
    "mlm/reporting/curves.py": {
        "{}, line {}: has no step; remove the line": "tests/test_user_files.py::test_metrics_without_a_step_are_an_error",
    },
    "mlm/modes/train_tokenizer.py": {
        "--output={}: cannot be created ({}); name another directory": "tests/test_user_files.py::test_an_output_is_not_the_input_and_can_be_written",
    },
    "mlm/modes/score.py": {
        "--output={}: is the file to read; name another": "tests/test_user_files.py::test_an_output_is_not_the_input_and_can_be_written",
        "{}: needs a column text, or good and bad; it has only {}; rename them": "tests/test_score.py::test_wrong_files_and_outputs",
        "--mode={}: needs one file, not {}; name it after the flags": "tests/test_score.py::test_wrong_files_and_outputs",
        "--output={}: must end in {}": "tests/test_score.py::test_wrong_files_and_outputs",
        "--output={}: cannot be written there; name a file in a directory that exists": "tests/test_score.py::test_wrong_files_and_outputs",
    },
    "mlm/modes/embed.py": {
        "{}: has no column text, only {}; name the column text": "tests/test_score.py::test_wrong_files_and_outputs",
        "--layer={}: the model has layers 1 to {}, and 0 for the embeddings; choose one": "tests/test_score.py::test_vectors_of_texts",
    },
    "mlm/downstream/during_training.py": {
        "{}: has labels with a decimal point; use classes: text or whole numbers": "tests/test_during_training.py::test_wrong_files_are_errors_of_one_line",
    },
    "mlm/downstream/tasks.py": {
        "{}: has no column {}, only {}; name the columns good and bad": "tests/test_during_training.py::test_wrong_files_are_errors_of_one_line",
        "{}: its development set contradicts its training set; choose one of {}": "tests/test_tasks.py::test_wrong_tasks_are_errors_of_one_line",
        "{}: must be a file that ends in one of {}, optionally compressed": "tests/test_tasks.py::test_wrong_tasks_are_errors_of_one_line",
        "{}: is not UTF-8; convert it": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: cannot be read ({}); create it again": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: is empty; name a file with examples": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: line {} is not JSON; write one object per line": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        '{}: row {} is not a JSON object; write objects such as {"text": ...}': "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: has no column {}, only {}; name the columns text (and text_b) and label, or tokens and tags": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: row {} of column {} is not text; remove the row, or write text": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: column {} has {} empty texts, the first in row {}; remove them": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: row {} is not a list of words in tokens and a list of as many labels in tags; correct or remove it": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: row {} of column {} has no value; remove or complete it": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: column {} has labels of the types {}; use one type, text or numbers": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: column {} has a value that is not finite; remove its row": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: has other columns or another type of labels than {}; make them equal": "tests/test_tasks.py::test_a_test_file_must_fit",
        "{}: has {} examples; give at least 10": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: column {} has the single value {}; give examples of others": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: the label {} occurs once, and cannot be both learned and held out; add examples, or remove it": "tests/test_tasks.py::test_wrong_files_are_errors_of_one_line",
        "{}: the label {} does not occur in {}; correct or remove it": "tests/test_tasks.py::test_a_test_file_must_fit",
        "{}: unknown task; name a file, one of the GLUE tasks {}, or a dataset on the hub": "tests/test_tasks.py::test_wrong_tasks_are_errors_of_one_line",
        "{}: unknown task ({}); name a file, one of the GLUE tasks {}, or a dataset on the hub": "tests/test_tasks.py::test_wrong_tasks_are_errors_of_one_line",
        "{}: cannot be loaded from the hub ({}); check the name": "tests/test_tasks.py::test_wrong_tasks_are_errors_of_one_line",
    },
    "mlm/downstream/probe.py": {
        "{}: the task has {} training examples; give at most as many": "tests/test_probe.py::test_learning_from_few_examples",
        "{}: is too few for this task; give at least {}": "tests/test_probe.py::test_learning_from_few_examples",
    },
    "mlm/modes/probe.py": {
        "--output={}: is not a file of results; name another with --output": "tests/test_probe.py::test_outputs_that_are_refused",
    },
    "main.py": {
        "--{}: is for --mode={}; --mode={} does not use it": "tests/test_user_errors.py::test_command_line",
        "--workdir: was given {} times; only --mode=report takes several runs": "tests/test_user_errors.py::test_command_line",
    },
    "mlm/data/sources/files.py": {
        "data.data_files={}: {} is a {}; each {} must be an object, {}": "tests/test_misread_files.py::test_json_values_that_are_no_objects",
    },
    "mlm/data/pipeline.py": {
        "{}": "tests/test_pipeline.py::test_an_error_names_the_key_of_the_evaluation_files",
        "data.max_unknown_fraction={}: {} of the evaluation sequences' tokens are unknown to the tokenizer {}, such as {}; choose a tokenizer for the language, or train one": "tests/test_unknown_tokens.py::test_another_script_is_refused",
        "the tokenizer {}: the evaluation sequences have unknown and special tokens only, so there is nothing to predict; choose a tokenizer for the language of the text, or train one": "tests/test_unknown_tokens.py::test_nothing_to_predict_is_refused_in_any_case",
    },
    "mlm/data/tokenizer.py": {
        "the tokenizer {}: does not split text into words, which masking.strategy needs; set that to 'token', or choose another tokenizer": "tests/test_tokenizer.py::test_a_tokenizer_without_words_is_refused_where_they_are_needed",
    },
    "mlm/init_from.py": {
        "checkpoint.init_from={}: {}": "tests/test_init_from.py::test_errors_are_one_line_before_anything_is_written",
        "checkpoint.init_from={}: has no checkpoint {}; choose one of {}": "tests/test_init_from.py::test_errors_are_one_line_before_anything_is_written",
        "num_train_steps={}: the checkpoint of checkpoint.init_from={} has {} steps already; raise it, or choose an earlier checkpoint with @STEP": "tests/test_init_from.py::test_errors_are_one_line_before_anything_is_written",
        "checkpoint.init_from={}: holds a run with another {}: {}; use the same values{}": "tests/test_init_from.py::test_errors_are_one_line_before_anything_is_written",
        "checkpoint.init_from={}: has no checkpoints; wait for its run to save one": "tests/test_init_from.py::test_other_errors",
        "checkpoint.init_from={}: is the run that --overwrite renames; choose another --workdir": "tests/test_init_from.py::test_other_errors",
        "checkpoint.init_from={}: cannot read checkpoint {} ({}); choose another one with @STEP": "tests/test_init_from.py::test_other_errors",
    },
    "mlm/modes/report.py": {
        "--output={}: is a directory; name a file": "tests/test_user_files.py::test_an_output_is_not_the_input_and_can_be_written",
        "--reference={}: no such file; stored curves are {}": "tests/test_report.py::test_a_stored_curve_is_drawn_beside_a_run",
        "--reference={}: is not a stored curve; write one with benchmarks/save_curve.py": "tests/test_report.py::test_a_stored_curve_is_drawn_beside_a_run",
    },
    "mlm/schedules.py": {
        "optimizer.warmup_steps={}: the warm-up of {} steps is over at step {}; set it to {}": "tests/test_schedules.py::test_a_longer_run_moves_only_the_boundaries_ahead",
        "optimizer.decay_steps={}: the decay would begin at step {}, but it has begun at step {}, and {} steps are done; branch a new run from a checkpoint up to step {} with checkpoint.init_from": "tests/test_schedules.py::test_a_longer_run_moves_only_the_boundaries_ahead",
    },
    "mlm/run/gcs.py": {
        "--workdir={}: the run was restarted or removed elsewhere, so this process ends; start one run at a time, or choose another --workdir": "tests/test_gcs.py::test_a_run_that_was_restarted_elsewhere_ends",
        "--workdir={}: {}; {}": "tests/test_gcs.py::test_missing_permissions_and_network_are_errors_of_one_line",
        "--workdir={}: {}": "tests/test_gcs.py::test_missing_credentials_are_an_error_of_one_line",
    },
    "mlm/run/checkpoint.py": {
        "{}/{}: the checkpoint structure does not match the model; use the version of the code that wrote it, or choose another --workdir": "tests/test_checkpoint.py::test_a_checkpoint_of_another_model_is_not_called_corrupt",
        "{}/{}: format_version={} is not supported, this version of the code reads {}; use the version that wrote the checkpoint, or choose another --workdir": "tests/test_checkpoint.py::test_another_format_version_is_refused_in_a_line_that_names_it",
        "{}/{}: cannot be read now ({}); check the network and the permissions, then rerun the same command to resume": "tests/test_gcs.py::test_a_corrupt_checkpoint_is_quarantined_and_an_unreachable_one_is_not",
    },
    "mlm/run/workdir.py": {
        "{}: format_version={} is not supported, this version of the code reads {}; use the version that started the run, or choose another --workdir": "tests/test_workdir.py::test_another_format_version_is_refused_in_a_line_that_names_it",
    },
    "mlm/data/mixture.py": {
        "cannot resume the data stream: the sources are {}, but the checkpoint was saved with {}; restore data.mixture, or choose another --workdir": "tests/test_mixture.py::test_a_mixture_of_other_sources_is_refused",
        "data stream state: format_version={} is not supported, this version of the code reads {}; use the version that wrote the checkpoint, or choose another --workdir": "tests/test_mixture.py::test_a_state_of_another_format_version_is_refused",
        "data.skip_steps: skips {} of the first {} batches, but the run skipped {}; change only what is past batch {}, or remove the checkpoints that are too new": "tests/test_mixture.py::test_skip_steps_may_change_past_the_checkpoint_only",
    },
    "mlm/data/reader.py": {
        "cannot resume the data stream: {}; rerun the same command when the shard can be read": "tests/test_failed_shards.py::test_a_partly_used_window_must_be_read_completely_on_resuming",
        "{}; rerun the same command when the shard can be read (failed shard {}, data.max_failed_shards={})": "tests/test_failed_shards.py::test_a_server_that_stops_answering_ends_the_stream",
    },
    "mlm/data/sources/source.py": {
        "data.text_column_name={}: the column of {} has the type {}, not text; set it to another column": "tests/test_sources.py::test_errors_are_one_line",
        "{}: is not a local directory, and {} cannot be reached ({}); check the network, or name local files": "tests/test_sources.py::test_an_unreachable_hub_is_an_error_within_seconds",
    },
    "mlm/data/stream.py": {
        "data.accept_changed_files=False: {} changed after the checkpoint was saved; restore it, or set the key to True to continue with the new text": "tests/test_stream.py::test_a_file_that_was_edited_after_the_checkpoint",
        "cannot resume the data stream: the dataset {} has changed since the checkpoint was saved; restore it, or choose another --workdir": "tests/test_stream.py::test_data_that_changed_since_the_checkpoint_is_an_error",
        "cannot resume the data stream: {}={}, but the checkpoint was saved with {}; restore the old value, or choose another --workdir": "tests/test_stream.py::test_a_state_of_another_order_is_refused",
        "the dataset {}: has no documents to train on{} ({}); add data": "tests/test_stream.py::test_a_data_set_that_is_too_small_or_empty_is_an_error",
    },
    "mlm/export/hub.py": {
        "hub.push_to_hub=True: the token of {} cannot write to {}; create one with write access at https://huggingface.co/settings/tokens and run `hf auth login`, or set hub.push_to_hub=False": "tests/test_hub.py::test_write_access_of_tokens",
        "hub.push_to_hub=True: cannot check the token ({}); check it with `hf auth whoami`, check the network, or set hub.push_to_hub=False": "tests/test_hub.py::test_missing_or_invalid_tokens_and_unreachable_hubs",
        "hub.hub_model_id={}: cannot create the repository ({}); check the name, the token's rights (`hf auth whoami`) and the network, or set hub.push_to_hub=False": "tests/test_hub.py::test_missing_or_invalid_tokens_and_unreachable_hubs",
        "hub.push_to_hub=True: the run is finished, but uploading the model to {} failed ({}); rerun the same command, or upload it yourself: {}": "tests/test_hub.py::test_a_final_upload_that_fails_is_an_error_with_a_command",
    },
    "mlm/models/config.py": {
        "model config: unknown field {}; {}": "tests/test_models.py::test_replace_suggests_the_nearest_field",
        "model.overrides.{}={}: the family {} has no such field; set it to None": "tests/test_families.py::test_overrides_of_other_families_are_errors_with_family_and_key",
    },
    "mlm/reporting/reporter.py": {
        "optimizer.max_skipped_steps={}: steps {} to {} were skipped, the last one with {}; print its sequences with --mode=show_data --step={}, then resume with a lower optimizer.learning_rate, more optimizer.warmup_steps, optimizer.max_grad_norm=1.0 or data.skip_steps": "tests/test_reporter.py::test_too_many_skipped_steps_in_a_row_end_the_run_also_after_a_restart",
    },
    "mlm/load.py": {
        "{}/model.safetensors: is damaged ({}); export the model again with --mode=export": "tests/test_user_files.py::test_a_truncated_model",
        "--model={}: has no tokenizer; save its tokenizer in the same directory": "tests/test_probe.py::test_models_without_a_tokenizer_or_a_head",
        "--model={}: has no masked-language-model head; choose a model that has one": "tests/test_probe.py::test_models_without_a_tokenizer_or_a_head",
        "--model={}: its tokenizer has {} ids and pads with {}, its model has {} and {}; use the model's own tokenizer": "tests/test_probe.py::test_models_without_a_tokenizer_or_a_head",
        "--step={}: no such checkpoint; choose one of {}": "tests/test_load.py::test_export_errors",
        "--average={}: up to step {} there are only the checkpoints {}; lower it, or keep more with checkpoint.keep_checkpoints or checkpoint.keep_every_steps": "tests/test_load.py::test_export_errors",
        "--workdir={}: cannot read checkpoint {} ({}); choose another --step": "tests/test_load.py::test_export_errors",
    },
    "mlm/modes/fill_mask.py": {
        "--mode=fill_mask: no sentences; pass them after the flags, or one per line on standard input": "tests/test_load.py::test_fill_mask_errors",
    },
    "mlm/modes/check.py": {
        "not ready: {}": "tests/test_check.py::test_every_problem_is_reported_at_once",
    },
    "mlm/command_line.py": {
        # With the words of absl and ml_collections.
        "{}": "tests/test_user_errors.py::test_command_line",
        "{}: must be {}": "tests/test_user_errors.py::test_command_line",
        "--config={}: {}": "tests/test_user_errors.py::test_command_line",
    },
    "mlm/stages.py": {
        "{}={}: the keys must be strings, such as {}": "tests/test_user_files.py::test_values_that_are_too_large_or_of_another_type",
        # A message of settings.py.
        "{}": "tests/test_stages.py::test_invalid_stages_are_an_error_of_one_line",
        "stages has {} of the {} stages that have begun; add the missing ones": "tests/test_stages.py::test_a_branch_may_change_only_stages_that_begin_later",
        "stages[{}] has begun there, with {}={}, and has {} here; change only stages that begin later": "tests/test_stages.py::test_a_branch_may_change_only_stages_that_begin_later",
        "a later stage introduces a length, a source or its weight, for which other evaluation sequences would be held out; change other keys": "tests/test_stages.py::test_a_branch_may_change_only_stages_that_begin_later",
    },
    "mlm/settings.py": {
        "{}={}: {}": "tests/test_settings.py::test_a_wrong_value_is_an_error_that_names_the_key",
    },
    "mlm/modes/show_data.py": {
        "--process={}: step {} had processes 0 to {}; choose one of them": "tests/test_show_data.py::test_errors",
        "--workdir={}: cannot read checkpoint {} ({}); rerun the run's command, which moves it to damaged/": "tests/test_show_data.py::test_errors",
    },
    "mlm/memory.py": {
        "the step does not compile for {}: {}": "tests/test_memory.py::test_a_compiler_out_of_memory_is_no_error_and_other_failures_are",
    },
    "mlm/startup.py": {
        "num_train_steps={}: {} steps are done; set it to at least {}": "tests/test_init_from.py::test_errors_of_a_resumed_run",
        "--workdir={}: cannot be written ({}); free or mount the disk, then rerun the same command": "tests/test_init_from.py::test_errors_of_a_resumed_run",
        "--workdir: another process did not finish reading checkpoint {} within {} minutes, this one: {}; rerun the command on all hosts": "tests/test_devices.py::test_a_process_that_reads_no_checkpoint_ends_the_others",
        "--workdir: none of the checkpoints up to {} can be read; they are in {}; restore intact ones, or start a new run with --overwrite": "tests/test_bad_input.py::test_corrupt_work_directories",
    },
}
