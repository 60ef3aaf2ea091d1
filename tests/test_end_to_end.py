"""Complete runs: the files they write, resuming, finishing twice, failing."""

import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoConfig, AutoTokenizer

from configs import quickstart
from mlm import parallel, steps, train
from mlm.data import prefetch
from mlm.errors import UserError
from mlm.reporting import reporter
from mlm.reporting.curves import read_metrics
from mlm.train import train_and_evaluate
from tests import fork_server
from tests.tiny import settings_of, tiny_config, write_corpus

REPO = Path(__file__).parent.parent


# Runs a command and prints its CPU seconds at every new checkpoint in a folder, then those of all of it and its peak
# memory in KiB. In a separate process, because a child's peak memory starts at that of its parent, and the tests hold
# gigabytes.
LAUNCHER = """
import os, resource, subprocess, sys, time
process, checkpoints, seen = subprocess.Popen(sys.argv[2:]), sys.argv[1], set()
while process.poll() is None:
    time.sleep(0.05)
    names = {name for name in os.listdir(checkpoints) if name.isdecimal()} if os.path.isdir(checkpoints) else set()
    for step in names - seen:
        with open(f"/proc/{process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        print("at", step, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), flush=True)
    seen |= names
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(process.returncode)
"""


def run_main(*flags: str, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    """Runs main.py in a new interpreter, on one device; `launcher` are the words before the command."""
    env = {**os.environ, "XLA_FLAGS": fork_server.xla_flags(1), **variables}
    command = [*launcher, sys.executable, "main.py", *flags]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)


def metrics_of(workdir: Path) -> list[dict]:
    """Lines of metrics.jsonl without their timings."""
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in read_metrics(str(workdir / "metrics.jsonl"))
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics and exported models are bitwise identical."""
    assert metrics_of(one) == metrics_of(other)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "trainer_state.json"):
        assert filecmp.cmp(one / "model" / name, other / "model" / name, shallow=False), name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """The work directory of an uninterrupted run of 8 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    train_and_evaluate(settings_of(tiny_config(corpus)), str(workdir))
    return workdir


@pytest.mark.slow
def test_main_trains_exports_and_does_not_train_twice(corpus, tmp_path):
    (tmp_path / "config.py").write_text(
        f"from tests.tiny import tiny_config\n\n\ndef get_config():\n    return tiny_config({corpus!r})\n"
    )
    flags = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}", "--config.logging_steps=2"]
    result = run_main(*flags)
    assert result.returncode == 0, result.stderr
    assert "step 8 of 8" in result.stderr
    assert "evaluation: loss" in result.stderr
    assert "tokens/s" in result.stderr
    assert "left" in result.stderr
    assert "Number 7: the <mask> sees the cat." in result.stdout
    assert "tensorboard --logdir" in result.stdout
    assert "curves.png" in result.stdout
    assert (tmp_path / "run" / "model" / "curves.png").read_bytes().startswith(b"\x89PNG")
    noise = [line for line in result.stderr.splitlines() if "arning" in line or "oneDNN" in line or "I0000" in line]
    assert noise == []
    assert [line["step"] for line in read_metrics(str(tmp_path / "run" / "metrics.jsonl"))] == [2, 4, 6, 8]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    env = {**os.environ, "XLA_FLAGS": fork_server.xla_flags(1)}
    again = fork_server.run([sys.executable, "main.py", *flags], cwd=REPO, env=env)
    assert again.returncode == 0, again.stderr
    assert "nothing to do: all 8 steps are done" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.slow
def test_files_of_a_work_directory(finished):
    assert {path.name for path in finished.iterdir() if not path.name.startswith(("events.out.tfevents", "."))} == {
        "config.json",
        "tokenizer",
        "checkpoints",
        "metrics.jsonl",
        "model",
    }
    # TensorBoard's layout of charts, the start of the run, and its scalars and texts.
    assert sorted(path.suffix for path in finished.glob("events.out.tfevents.*")) == [".layout", ".start", ".v2"]
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir()) == [4, 8]
    assert {path.name for path in (finished / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "curves.png",
        "trainer_state.json",
    }


@pytest.mark.slow
def test_metrics_have_the_documented_names_at_the_configured_steps(finished):
    lines = {line["step"]: set(line) for line in read_metrics(str(finished / "metrics.jsonl"))}
    train = {"train/loss", "train/accuracy", "train/learning_rate", "train/grad_norm", "train/skipped_steps"}
    train |= {"data/epoch", "data/documents", "data/skipped_documents", "data/held_out_documents", "data/failed_shards"}
    train |= {"data/tokenizer_differences"}
    train |= {f"data/{name}_fraction" for name in ("masked", "mask_replaced", "random_replaced")}
    train |= {"data/tokens", "perf/tokens_per_second", "perf/step_ms", "perf/input_wait_fraction", "perf/hours"}
    train |= {f"perf/{part}_ms" for part in ("input_wait", "transfer", "device", "host")} | {"perf/step_memory_bytes"}
    evaluation = {"eval/loss", "eval/accuracy", "eval/perplexity", "eval/unigram_loss"}
    pauses = {"perf/evaluation_ms", "perf/save_ms", "perf/export_ms"}
    assert {step: names - {"step", "perf/device_memory_bytes"} for step, names in lines.items()} == {
        3: train,
        4: evaluation,
        6: train | pauses,
        8: train | evaluation,
    }


@pytest.mark.slow
def test_the_exported_directory_loads_and_has_the_trained_weights(finished):
    config = AutoConfig.from_pretrained(finished / "model")
    assert config.model_type == "roberta"
    assert config.architectures == ["RobertaForMaskedLM"]
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert tokenizer.mask_token == "<mask>"
    original = AutoTokenizer.from_pretrained(finished / "tokenizer")
    assert tokenizer("the cat")["input_ids"] == original("the cat")["input_ids"]
    tensors = safetensors.numpy.load_file(finished / "model" / "model.safetensors")
    assert tensors["roberta.embeddings.word_embeddings.weight"].shape == (config.vocab_size, 16)
    # The output bias starts at 0.
    assert np.abs(tensors["lm_head.bias"]).max() > 1e-3
    card = (finished / "model" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "![" in card
    assert json.loads((finished / "model" / "trainer_state.json").read_text())["global_step"] == 8


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_is_identical(corpus, finished, tmp_path):
    # 5 is no multiple of logging_steps (3), eval_steps or save_steps (4): it is evaluated and saved as the last step,
    # and the resumed run continues the interval of the metrics in its middle.
    config = tiny_config(corpus)
    config.num_train_steps = 5
    train_and_evaluate(settings_of(config), str(tmp_path))
    train_and_evaluate(settings_of(tiny_config(corpus)), str(tmp_path))
    lines = [line for line in metrics_of(tmp_path) if line["step"] != 5]
    straight = metrics_of(finished)
    # The line at 5 divides the interval 4 to 6.
    assert [line for line in lines if line["step"] != 6] == [line for line in straight if line["step"] != 6]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "trainer_state.json"):
        assert filecmp.cmp(tmp_path / "model" / name, finished / "model" / name, shallow=False), name


@pytest.mark.slow
def test_a_run_that_crashes_again_and_again_is_identical(corpus, finished, tmp_path, monkeypatch):
    """Before the first checkpoint, twice after it, before the last checkpoint, and between that and the export."""
    add_step, export_model = reporter.Reporter.add_step, train.export_model
    for crash_at in (2, 5, 7, 8, "export"):

        def crash_after_step(self, step, *args, crash_at=crash_at, **kwargs):
            add_step(self, step, *args, **kwargs)
            if step == crash_at:
                raise RuntimeError("pulled the plug")

        def crash_before_export(directory, *, step, crash_at=crash_at, **kwargs):
            if step == 8 and crash_at == "export":
                raise RuntimeError("pulled the plug")
            export_model(directory, step=step, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(reporter.Reporter, "add_step", crash_after_step)
            patch.setattr(train, "export_model", crash_before_export)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                train_and_evaluate(settings_of(tiny_config(corpus)), str(tmp_path))
        saved = max((int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]")), default=0)
        assert saved == {2: 0, 5: 4, 7: 4, 8: 4, "export": 8}[crash_at]
    train_and_evaluate(settings_of(tiny_config(corpus)), str(tmp_path))
    assert_same_run(tmp_path, finished)


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run_and_keep_the_checkpoint(corpus, tmp_path, monkeypatch):
    real = parallel.first_replica

    def with_nan_losses(tree):
        tree = real(tree)
        if isinstance(tree, steps.TrainMetrics):
            with_nan_losses.steps += 1
            if with_nan_losses.steps in (2, 5, 6):
                return tree.replace(sums=tree.sums.replace(loss=np.float32("nan")), skipped=np.float32(1))
        return tree

    with_nan_losses.steps = 0
    monkeypatch.setattr(parallel, "first_replica", with_nan_losses)
    config = tiny_config(corpus)
    config.optimizer.max_skipped_steps = 1
    with pytest.raises(UserError, match=r"steps 5 to 6 were skipped, .* loss nan"):
        train_and_evaluate(settings_of(config), str(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert json.loads((tmp_path / "model" / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.slow
def test_data_that_ends_early_ends_the_run_with_a_checkpoint(corpus, finished, tmp_path, monkeypatch):
    real = prefetch.Prefetcher.__next__

    def broken(self):
        broken.batches += 1
        if broken.batches == 7:
            raise UserError("the network is gone")
        return real(self)

    broken.batches = 0
    with monkeypatch.context() as patch:
        patch.setattr(prefetch.Prefetcher, "__next__", broken)
        with pytest.raises(UserError, match="the network is gone"):
            train_and_evaluate(settings_of(tiny_config(corpus)), str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    train_and_evaluate(settings_of(tiny_config(corpus)), str(tmp_path))
    assert_same_run(tmp_path, finished)


@pytest.mark.slow
def test_quickstart(tmp_path):
    """The README's first command keeps its promises on loss, time and memory, as far as its first steps show."""
    steps, saves = 200, 50
    flags = ("--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", f"--config.num_train_steps={steps}")
    flags += (f"--config.eval_steps={steps}", f"--config.save_steps={saves}", "--config.checkpoint.keep_checkpoints=9")
    launcher = (sys.executable, "-c", LAUNCHER, str(tmp_path / "run" / "checkpoints"))
    result = run_main(*flags, launcher=launcher, XLA_FLAGS="", JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert result.returncode == 0, result.stderr
    *_, last = result.stdout.splitlines()
    at = {int(step): float(seconds) for step, seconds in re.findall(r"^at (\d+) (.+)$", result.stdout, re.MULTILINE)}
    seconds, kibibytes = map(float, last.split())
    assert "warn" not in result.stderr.lower()
    # Five minutes of two cores, in CPU time, so that other work on the machine does not count. The other steps take as
    # long as those between the first and the third checkpoint, of which the command makes fewer.
    remaining_steps = quickstart.get_config().num_train_steps - steps
    all_seconds = seconds + remaining_steps * (at[3 * saves] - at[saves]) / (2 * saves)
    assert all_seconds < 2 * 300
    assert kibibytes < 3 * 2**20
    line = read_metrics(str(tmp_path / "run" / "metrics.jsonl"))[-1]
    print(f"{all_seconds:.0f} s, {kibibytes:.0f} KiB, {line}")
    assert line["eval/loss"] < line["eval/unigram_loss"] - 0.7
