"""README.md and docs/: every command is run by a test, or its section states what it needs."""

import ast
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from mlm.reporting.curves import read_metrics
from mlm.settings import KEYS, MUTABLE_KEYS
from tests import fork_server
from tests.tiny import sentences, write_corpus

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
PROGRAMS = ("python main.py", "python benchmarks/", "pip ", "hf ", "gcloud ", "launch/", "tensorboard --logdir")

# Start of a command -> the test that runs it, with other names and numbers.
TESTED = {
    "pip install -r requirements.txt && python main.py --config=configs/quickstart.py": (
        "tests/test_end_to_end.py::test_quickstart"
    ),
    "pip install -r tests/requirements.txt && python -m pytest": ".ci/run",
    "launch/tpu_vm.sh create": "tests/test_tpu_vm.py::test_create_makes_the_call_and_prints_it",
    "launch/tpu_vm.sh setup": "tests/test_tpu_vm.py::test_setup_installs_one_commit_on_every_worker",
    "launch/tpu_vm.sh train": "tests/test_tpu_vm_train.py::test_train_monitors_until_the_run_is_finished",
    "launch/tpu_vm.sh stop": "tests/test_tpu_vm_train.py::test_stop_saves_and_train_resumes",
    "launch/tpu_vm.sh status": "tests/test_tpu_vm.py::test_status_logs_and_delete",
    "launch/tpu_vm.sh logs": "tests/test_tpu_vm.py::test_status_logs_and_delete",
    "launch/tpu_vm.sh delete": "tests/test_tpu_vm.py::test_status_logs_and_delete",
    "python main.py --mode=export --workdir=runs/mine --sentence_transformers": (
        "tests/test_load.py::test_files_for_sentence_transformers"
    ),
    "python main.py --config=configs/quickstart.py --workdir=runs/mine --config.eval.probes": (
        "tests/test_during_training.py::test_probes_do_not_change_a_run_and_a_resumed_run_has_the_same"
    ),
    "python main.py --config=configs/quickstart.py --workdir=runs/quickstart_longer": (
        "tests/test_init_from.py::test_a_branch_decays_the_learning_rate_from_its_parent_s"
    ),
    "python benchmarks/packing.py": "tests/test_best_fit.py::test_the_table_of_packings",
    "launch/slurm.sh": "tests/test_slurm.py::test_a_job_is_submitted",
    "python main.py --config=... --workdir=/shared/run --multihost": (
        "tests/test_multihost.py::test_two_processes_make_the_steps_of_one_and_save_together_or_not_at_all"
    ),
    "python main.py --config=configs/roberta_base.py --workdir=gs://": (
        "tests/test_gcs_runs.py::test_a_run_in_a_bucket_that_is_killed_and_resumed_equals_an_uninterrupted_local_run"
    ),
}
# Start of a command -> what it needs that tests do not have; its section must contain this word.
NEEDS = {
    "pip install libtpu": "libtpu",
    "pip install torch": "PyTorch",
    "pip download --no-deps": "PyPI",
    "python main.py --mode=embed --model=gt/": "PyPI",
    'pip install -r requirements.txt "jax[cuda13]"': "CUDA",
    "hf ": "hub",
    "gcloud ": "Google",
    "tensorboard --logdir gs://": "Google",
    "python main.py --mode=check --config=configs/roberta_base.py": "Google",
    "python main.py --config=configs/roberta_base.py --workdir=runs/roberta_base": "TPU",
    "python main.py --config=configs/default.py --workdir=runs/my_bert": "hub",
    "python main.py --mode=probe --workdir=runs/quickstart --task=packages.jsonl": "five Python packages",
    "python benchmarks/probe.py --w": "docstrings",
    "python main.py --config=configs/quickstart.py --workdir=runs/probed": "two cores",
    "python main.py --config=configs/quickstart.py --workdir=runs/bbc": "two cores",
    "python main.py --mode=probe --workdir=runs/bbc": "two cores",
    "python main.py --mode=report --workdir=runs/probed": "two cores",
    "python benchmarks/cpu_step.py": "CPU cores",
    "python benchmarks/recipe_sweep.py": "CPU cores",
    "python benchmarks/time_to_loss.py": "CPU cores",
    "python benchmarks/open_shards.py": "MB/s",
    "python benchmarks/data_order.py": "two CPU cores",
    "python benchmarks/tpu_compile.py": "TPU",
    "python benchmarks/gpu_step.py": "NVIDIA",
}

# Flags that make a run small.
SMALL = (
    "--config.num_train_steps=6 --config.eval_steps=2 --config.save_steps=2 --config.logging_steps=2 "
    "--config.data.num_eval_samples=30 --config.tokenizer.vocab_size=300 --config.tokenizer.train_documents=200 "
    "--config.model.overrides.hidden_size=16 --config.optimizer.warmup_steps=2 "
    "--config.per_device_train_batch_size=4 --config.checkpoint.keep_checkpoints=3"
)
TASKS = (
    "--config.eval.probes=\"(('topics', 'reviews.jsonl'),)\" --config.eval.pairs=\"(('agreement', 'pairs.jsonl'),)\""
)
TOKENIZER = "--config.tokenizer.vocab_size=300 --config.tokenizer.train_documents=200"
CORPUS = " --config.data.data_files='corpus/*.jsonl'"
# Start of a command -> flags to add and strings to replace. The last test runs these in one folder, in this order.
RUN: dict[str, tuple[str, dict[str, str]]] = {
    "python main.py --mode=explain optimizer.learning_rate": ("", {}),
    "python main.py --mode=explain optimizer.warmup_steps": ("", {}),
    "python main.py --mode=explain optimizer masking loss": ("", {}),
    "python main.py --mode=check --config=configs/quickstart.py --workdir=runs/mine": (SMALL, {}),
    "python main.py --config=configs/quickstart.py --workdir=runs/mine --config.data.data_files='corpus/*.jsonl'": (
        f"{SMALL} {TASKS}",
        {},
    ),
    "python main.py --mode=show_data --workdir=runs/mine --step=1205": ("", {"--step=1205": "--step=3"}),
    "python main.py --mode=export --workdir=runs/mine --step=4": ("", {}),
    "python main.py --mode=export --workdir=runs/mine --average=3": ("", {}),
    "python main.py --mode=fill_mask --workdir=runs/mine": ("", {}),
    "python main.py --mode=probe --workdir=runs/mine --task=": ("--seeds=1", {}),
    "python main.py --mode=score --workdir=runs/mine pairs.jsonl": ("", {}),
    "python main.py --mode=embed --workdir=runs/mine": ("", {}),
    "python main.py --mode=train_tokenizer --config=configs/quickstart.py --output=tokenizers/mine": (TOKENIZER, {}),
    "python main.py --config=configs/quickstart.py --workdir=runs/mine --config.data.data_files='corpus/*.txt'": (
        SMALL.replace(TOKENIZER, ""),
        {"--workdir=runs/mine": "--workdir=runs/b"},
    ),
    "python main.py --mode=train_tokenizer --config=configs/quickstart.py:albert": (TOKENIZER + CORPUS, {}),
    "python main.py --config=configs/quickstart.py:roberta": (SMALL + CORPUS, {}),
    "python main.py --config=configs/quickstart.py --workdir=runs/mine --config.num_train_steps=200": (
        SMALL + CORPUS,
        {"--workdir=runs/mine": "--workdir=runs/small"},
    ),
    "python main.py --config=configs/quickstart.py --workdir=runs/two_stages": (SMALL + CORPUS, {}),
    "python main.py --mode=report --workdir=runs/a --workdir=runs/b": ("", {"--workdir=runs/a": "--workdir=runs/mine"}),
    "tensorboard --logdir runs/quickstart": ("", {}),
}


def sections(page: Path) -> list[str]:
    return re.split(r"^(?=##+ )", page.read_text(), flags=re.MULTILINE)


def commands_of(text: str) -> list[str]:
    """Returns the commands in a page's code blocks, with or without "$ ", and in its inline code."""
    found, inside, block, prose = [], False, [], []
    for line in text.splitlines():
        if line.startswith("```"):
            if inside:
                joined = "\n".join(block).replace("\\\n", " ")
                found += [
                    row.removeprefix("$ ") for row in joined.splitlines() if row.removeprefix("$ ").startswith(PROGRAMS)
                ]
            inside, block = not inside, []
        elif inside:
            block.append(line)
        else:
            prose.append(line)
    inline = [code for code in re.findall(r"`([^`]+)`", " ".join(prose)) if code.startswith(PROGRAMS)]
    inline = [code for code in inline if code.count(" ") >= 2 or code.startswith(("hf", "tensorboard"))]
    return [re.sub(r"\s+", " ", re.sub(r"\s+# .*", "", command)).strip() for command in found + inline]


DOCUMENTED = [
    (page.name, section, command) for page in PAGES for section in sections(page) for command in commands_of(section)
]


def longest_start(command: str, starts) -> str | None:
    """Returns the longest of the strings that a command starts with."""
    return max((start for start in starts if command.startswith(start)), key=len, default=None)


def test_the_pages_have_many_commands():
    assert len({command for _, _, command in DOCUMENTED}) > 35


@pytest.mark.parametrize(
    ("page", "section", "command"), [pytest.param(*row, id=f"{row[0]}-{row[2]}") for row in DOCUMENTED]
)
def test_every_command_is_run_by_a_test_or_states_what_it_needs(page, section, command):
    if needs := longest_start(command, NEEDS):
        assert NEEDS[needs].lower() in section.lower()
        assert not longest_start(command, {**TESTED, **RUN}) or len(longest_start(command, {**TESTED, **RUN})) < len(
            needs
        )
        return
    tested = longest_start(command, {**TESTED, **RUN})
    assert tested, f"{page}: {command}"
    if tested in TESTED and "::" in TESTED[tested]:
        file, name = TESTED[tested].split("::")
        names = {n.name for n in ast.walk(ast.parse((REPO / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert name in names


def test_every_row_of_the_tables_is_used():
    commands = [command for _, _, command in DOCUMENTED]
    used = {longest_start(command, {**TESTED, **RUN, **NEEDS}) for command in commands}
    assert {*TESTED, *RUN, *NEEDS} - used == set()


def anchors(page: Path) -> set[str]:
    """Returns GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_between_pages_leads_to_a_file_and_a_heading():
    for page in [*PAGES, REPO / "CONTRIBUTING.md"]:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


def test_the_page_on_resuming_lists_the_keys_that_may_change():
    (table,) = re.findall(r"## Which keys may change\n(.*?)\n## ", (REPO / "docs/resume.md").read_text(), re.DOTALL)
    assert [key for key in re.findall(r"`([\w.]+)`", table) if key in KEYS] == list(MUTABLE_KEYS)


@pytest.mark.slow
def test_the_commands_of_the_pages_work_one_after_the_other(tmp_path):
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    for part in range(3):
        (tmp_path / "corpus" / f"part-{part}.txt").write_text("\n".join(sentences(600, seed=1)[part::3]) + "\n")
    reviews = [{"text": text, "label": "river" in text} for text in sentences(60)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    pairs = [{"good": text, "bad": text.replace("the", "cat")} for text in sentences(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "configs").symlink_to(REPO / "configs")
    env = {**os.environ, "XLA_FLAGS": fork_server.xla_flags(1)}
    outputs = {}
    for start, (flags, replaced) in RUN.items():
        command = next(command for _, _, command in DOCUMENTED if longest_start(command, {**TESTED, **RUN}) == start)
        if command.startswith("tensorboard"):
            continue
        for old, new in replaced.items():
            command = command.replace(old, new)
        # The last value of a flag counts.
        words = [sys.executable, str(REPO / "main.py"), *shlex.split(command)[2:], *shlex.split(flags)]
        done = fork_server.run(words, cwd=tmp_path, env=env)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        outputs[start] = done.stderr + done.stdout
    printed = iter(outputs.values())
    assert "optimizer.learning_rate = 5e-05\n" in next(printed)
    assert "optimizer.warmup_steps = 0\n" in next(printed)
    assert next(printed).startswith("masking.strategy = 'token'\n")
    assert next(printed).rstrip().endswith("ready")
    log = next(printed)
    assert "step 6 of 6   evaluation: loss" in log
    assert re.search(r"perplexity \S+   probe topics \d+\.\d %   pairs agreement \d+\.\d %", log)
    assert "step 3: batch 3 of the data" in next(printed)
    assert "exported step 4 to" in next(printed)
    assert "exported steps 2 + 4 + 6 to" in next(printed)
    assert next(printed).count(" %") >= 10
    assert "the scores of all seeds are in runs/mine/results.json" in next(printed)
    assert "all pairs" in next(printed)
    assert "vectors.npy" in next(printed)
    assert "a tokenizer of 300 entries is in tokenizers/mine" in next(printed)
    assert "tokenized by tokenizers/mine" in next(printed)
    assert "in tokenizers/albert; use it with" in next(printed)
    assert "parameters of the roberta encoder" in next(printed)
    assert "step 6 of 6   evaluation: loss" in next(printed)
    assert "model='runs/two_stages/model'" in next(printed)
    assert "the report of mine, b is in report.html" in next(printed)
    assert (tmp_path / "models" / "early" / "model.safetensors").exists()
    assert (tmp_path / "report.html").stat().st_size > 10**6

    described = set(re.findall(r"`([a-z]+/[\w/<>]+)`", (REPO / "docs/metrics.md").read_text()))
    written = {name for line in read_metrics(str(tmp_path / "runs/mine/metrics.jsonl")) for name in line} - {"step"}
    assert {re.sub("/(topics|agreement)/", "/<name>/", name) for name in written} - described == set()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs" / "mine")).Reload()
    tags = events.Tags()
    assert {"custom_scalars__config__", "_hparams_/experiment", "_hparams_/session_start_info"} <= set(
        events.summary_metadata
    )
    assert {"config", "predictions", "eval/loss"} <= {*tags["tensors"]}
