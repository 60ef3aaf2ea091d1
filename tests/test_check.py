"""--mode=check: what it prints is true, and all problems are reported at once."""

import dataclasses
import itertools
import math
import re
import sys
import time
from collections import namedtuple
from pathlib import Path
from unittest import mock

import jax
import pyarrow as pa
import pytest

from configs import default
from mlm import build, memory
from mlm.data.sources.source import Source
from mlm.errors import UserError
from mlm.hardware import Machine, parse_topology
from mlm.modes import check as check_mode
from mlm.reporting.progress import duration
from mlm.run.workdir import KeyChanges, WorkDir
from mlm.settings import RunSettings
from tests import fork_server
from tests.tiny import settings_of, tiny_config, write_corpus

ROOT = Path(__file__).parent.parent
DEFAULTS = RunSettings.from_dict(default.get_config().to_dict()).flat()


@pytest.fixture
def config(tmp_path):
    (tmp_path / "corpus").mkdir()
    return tiny_config(write_corpus(tmp_path / "corpus"))


def check(config, workdir, machine=None):
    return check_mode.check(settings_of(config), str(workdir), defaults=DEFAULTS, machine=machine, utilization=0.4)


@pytest.mark.slow
def test_the_output_of_a_run_that_is_ready(config, tmp_path, capsys):
    assert check(config, tmp_path / "run", parse_topology("v3-8")) == []
    output = capsys.readouterr().out
    assert not (tmp_path / "run").exists()

    assert re.search(r"^\* num_train_steps +8   \(default 50000\)$", output, re.MULTILINE)
    assert re.search(r"^  seed +42$", output, re.MULTILINE)
    assert len(re.findall(r"^[* ] \w[\w.]+ {2,}\S", output.split("Text\n")[0], re.MULTILINE)) == len(DEFAULTS)

    documents = re.findall(r"^document \d of .*\n  (Number \d+: .*)$", output, re.MULTILINE)
    first = (tmp_path / "corpus" / "part-0.jsonl").read_text().splitlines()[:3]
    assert len(documents) == 3
    assert all(document in line for document, line in zip(documents, first, strict=True))

    # The sequences and masks are those of step 1.
    run = build.build(settings_of(config), WorkDir(str(tmp_path / "run")))
    rows_BxL = next(run.text.batches(process_index=0, process_count=1, batch_rows=32))
    shown = re.findall(r"^row (\d) of step 1 .*\n  (.*)$", output, re.MULTILINE)
    assert shown == [(str(row), " ".join(run.tokenizer.hf.decode(rows_BxL[row]).split())) for row in (0, 1)]
    masked = re.search(r"^row 0 after masking; \[input=label\], (\d+) masked\n  (.*)$", output, re.MULTILINE)
    assert masked[2].count("=") == int(masked[1])
    restored = re.sub(r"\[[^\]=]*=([^\]]*)\]", r"\1", masked[2])
    assert restored == shown[0][1]

    assert "step          32 sequences of 16 tokens: 4 per device x 1 microbatch x 8 devices" in output
    assert "tokens        4,096 in 8 steps" in output
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.initial_params()))
    assert f"parameters    {parameters:,}\n" in output
    assert "machine       v3-8: 8 x TPU v3, on 1 host\n" in output
    assert "shards        6 of" in output


def test_epochs_count_the_corpus(config, tmp_path, capsys):
    check(config, tmp_path / "run", parse_topology("v3-8"))
    output = capsys.readouterr().out
    run = build.build(settings_of(config), WorkDir(str(tmp_path / "run")))
    source = run.text.sources[0].train
    texts = [text for shard in range(source.num_shards) for column in source.read(shard) for text in column.to_pylist()]
    num_tokens = len(run.tokenizer.encode(pa.array(texts, pa.large_string()))[0])
    data = settings_of(config).data
    # Every document has a begin and an end token; with "pad" it is a sequence of 16 tokens.
    joined = num_tokens + 2 * len(texts)
    for packing, tokens in (("concatenate", joined), ("best_fit", joined), ("pad", 16 * len(texts))):
        of_packing = dataclasses.replace(data, packing=packing)
        assert check_mode.tokens_of_epoch(source, run.tokenizer, of_packing, seconds=60) == (tokens, False)
    assert f"epochs        about {4096 / joined:,.2f} of " in output


def test_a_corpus_too_large_to_read_is_estimated(config, tmp_path, monkeypatch):
    run = build.build(settings_of(config), WorkDir(str(tmp_path / "run")))
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    texts = pa.array(["the cat sees the dog."] * 499 + [" "], pa.large_string())
    one_part = len(run.tokenizer.encode(texts.slice(0, 499))[0]) + 2 * 499  # Blank documents are not used.
    data = settings_of(config).data

    def source(parts):
        return Source("s", "text", 10, lambda shard, row: itertools.repeat(texts, parts), str)

    # The clock is read once per part: five parts before the time is up.
    assert check_mode.tokens_of_epoch(source(2), run.tokenizer, data, seconds=5) == (10 * 2 * one_part, False)
    assert check_mode.tokens_of_epoch(source(99), run.tokenizer, data, seconds=5) == (10 * 6 * one_part, True)


def test_documents_are_numbered_within_their_source(capsys):
    def source(name):
        return Source(name, "text", 1, lambda shard, row: iter([pa.array([f"{name} {n}" for n in "ab"])]), str)

    text = mock.Mock(sources=[mock.Mock(train=source(name)) for name in ("one", "two")])
    check_mode.show_documents(text, count=4)
    documents = re.findall(r"^document (.*)\n  (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert documents == [("1 of one", "one a"), ("1 of two", "two a"), ("2 of one", "one b"), ("2 of two", "two b")]


@pytest.mark.slow
def test_time_to_finish_follows_from_peak_and_utilization(config, tmp_path, capsys):
    config.num_train_steps = 10**9
    check(config, tmp_path / "run", parse_topology("v3-8"))
    line = re.search(r"time +(.*) at 40% of the peak rate, ([\d,]+) tokens/s", capsys.readouterr().out)
    assert line[1] == duration(10**9 * 32 * 16 / float(line[2].replace(",", "")))
    check(config, tmp_path / "run")
    assert "time          unknown: no peak rate of a cpu is known" in capsys.readouterr().out


@pytest.mark.slow
def test_notes(config, tmp_path, capsys):
    sentences = "note          report.sentences are the English defaults"
    config.num_train_steps = 10_000
    assert check(config, tmp_path / "run") == []
    output = capsys.readouterr().out
    assert "note          more than 40 epochs" in output
    assert sentences not in output
    config.num_train_steps = 8
    config.model.overrides.max_position_embeddings = 100
    config.report.sentences = default.get_config().report.sentences
    assert check(config, tmp_path / "run") == []
    output = capsys.readouterr().out
    assert sentences in output
    assert "epochs give" not in output
    # The documentation of Python packages is English.
    assert not check_mode.has_english_sentences(settings_of(default.get_config()), DEFAULTS)


@pytest.mark.parametrize(("model_type", "needed"), [("roberta", 514), ("bert", 512)])
def test_sequences_longer_than_the_model_are_an_error_before_a_tokenizer_is_trained(
    config, tmp_path, monkeypatch, model_type, needed
):
    config.model.model_type = model_type
    config.data.max_seq_length = 512
    config.model.overrides.max_position_embeddings = 500
    monkeypatch.setattr(build.pipeline, "open_tokenizer", lambda *args, **options: pytest.fail("too late"))
    with pytest.raises(UserError, match=rf"max_position_embeddings={needed}$"):
        build.build(settings_of(config), WorkDir(str(tmp_path / "run")))


def test_every_problem_is_reported_at_once(config, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    config.hub.push_to_hub = True
    config.model.overrides.vocab_size = 100
    options = {"defaults": DEFAULTS, "topology": None, "utilization": 0.4, "key_changes": KeyChanges()}
    message = r"^not ready: \(1\) hub.push_to_hub=True: .* \(2\) model.overrides.vocab_size=100: "
    with pytest.raises(UserError, match=message):
        check_mode.run(settings_of(config), str(tmp_path / "run"), **options)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data.data_files": "/nowhere/*.txt"}, "no file matches; check the directory and the pattern"),
        ({"per_device_train_batch_size": 4000}, "batch"),
        ({"tokenizer.tokenizer_name": "/nowhere/tokenizer"}, "/nowhere/tokenizer"),
        ({"model.overrides.vocab_size": 100}, "has ids up to"),
    ],
)
def test_problems(config, tmp_path, changes, problem):
    config.update_from_flattened_dict(changes)
    found = check(config, tmp_path / "run")
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.slow
def test_a_batch_size_that_is_found_when_the_run_starts(config, tmp_path, monkeypatch, capsys):
    config.per_device_train_batch_size = 0
    assert check(config, tmp_path / "run", parse_topology("h100-8")) == []
    output = capsys.readouterr().out
    assert "per_device_train_batch_size=0 is resolved when the run starts; the check uses 8" in output
    assert "step          64 sequences of 16 tokens: 8 per device" in output
    monkeypatch.setattr(memory, "can_compile_for", lambda machine: True)
    monkeypatch.setattr(memory, "find_batch_size", lambda *args, **options: 24)
    assert check(config, tmp_path / "run", parse_topology("v3-8")) == []
    assert "step          192 sequences of 16 tokens: 24 per device" in capsys.readouterr().out


def test_a_disk_and_a_device_that_are_too_small(config, tmp_path, monkeypatch, capsys):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 1000))
    config.checkpoint.keep_every_steps = 4
    found = check(config, tmp_path / "run", Machine("toy", "TPU v3", 1, 1, memory_bytes=1000))
    assert "gradients and optimizer need 0.1 MB per device, a TPU v3 has 0.0 MB" in found[0]
    assert "lower checkpoint.keep_checkpoints" in found[1]
    # keep_checkpoints=2, one that is being written, and those of steps 4 and 8.
    assert "for 5 checkpoints of" in capsys.readouterr().out


def test_another_run_in_the_directory_is_a_problem(config, tmp_path):
    workdir = WorkDir(str(tmp_path / "run"))
    workdir.create(
        settings_of(config), save_tokenizer=lambda path: Path(path).mkdir(), processes=1, rows_per_process=1, step=0
    )
    config.seed = 7
    assert "holds a run with another config: seed" in check(config, tmp_path / "run")[0]


@pytest.mark.slow
def test_the_command_line_prints_ready_or_one_line(config, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        f"from tests import tiny\n\n\ndef get_config():\n    return tiny.tiny_config({config.data.data_files!r})\n"
    )

    def run(*words):
        command = [sys.executable, "main.py", "--mode=check", f"--config={file}", f"--workdir={tmp_path}/run", *words]
        return fork_server.run(command, cwd=ROOT)

    done = run("--topology=v5e-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nready\n")
    done = run("--config.seed=-1")
    assert done.returncode == 2
    assert done.stderr == "error: seed=-1: must lie between 0 and 2**32 - 1\n"
