# ruff: noqa: E501, messages are one line.
"""Runs that start from a checkpoint of another run."""

import hashlib
import json
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.same_run import differences, read_state, read_streams, untimed
from configs import default
from mlm import train
from mlm.errors import UserError
from mlm.init_from import restart, split_step
from mlm.optimizer import create_optimizer
from mlm.reporting.curves import read_metrics
from mlm.reporting.reporter import Reporter
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError
from mlm.run.workdir import WorkDir
from mlm.settings import OptimizerSettings
from mlm.steps import TrainState, UpdateStats
from mlm.train import train_and_evaluate
from tests.gcs_server import GcsServer
from tests.test_multihost import Pair, free_port
from tests.tiny import tiny_settings, write_corpus


def files(directory: Path) -> dict[str, tuple[str, int]]:
    """Path -> hash and time of change of every file."""
    return {
        str(path.relative_to(directory)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def batches_of(workdir: Path, step: int) -> int:
    [state] = read_streams(str(workdir), step)
    return state["item"]["batches"]


def lines_after(workdir: Path, step: int) -> list[dict]:
    return [untimed(line) for line in read_metrics(str(workdir / "metrics.jsonl")) if line["step"] > step]


def assert_equal_after(step: int, parent: Path, branch: Path) -> None:
    """Asserts that two finished runs are equal but for the metrics up to `step`."""
    found = [line for line in differences(str(parent), str(branch)) if not line.startswith("metrics.jsonl")]
    assert [line for line in found if line != "model/README.md"] == []
    assert lines_after(parent, step) == lines_after(branch, step) != []


def parent_of(workdir: Path) -> dict:
    return json.loads((workdir / "config.json").read_text())["parent"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def parent(corpus, tmp_path_factory) -> Path:
    """A finished run of 8 steps with checkpoints 4 and 8."""
    workdir = tmp_path_factory.mktemp("parent") / "run"
    train_and_evaluate(tiny_settings(corpus), str(workdir))
    return workdir


@pytest.mark.slow
def test_a_branch_equals_its_parent_also_if_killed_before_and_after_its_first_checkpoint(corpus, tmp_path, monkeypatch):
    parent, branch = tmp_path / "a" / "run", tmp_path / "b" / "run"
    train_and_evaluate(tiny_settings(corpus, num_train_steps=4), str(parent))
    before = files(parent)
    settings = tiny_settings(corpus, **{"checkpoint.init_from": str(parent)})

    def start_and_stop_at(owner, name):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(KeyboardInterrupt):
                train_and_evaluate(settings, str(branch))

    start_and_stop_at(Checkpointer, "save")
    assert files(parent) == before
    assert parent_of(branch) == {"path": str(parent), "step": 4, "mode": "branch", "format_version": 1}

    train_and_evaluate(tiny_settings(corpus), str(parent))  # Its newest checkpoint is now 8.
    before = files(parent)
    start_and_stop_at(Reporter, "add_step")
    assert files(parent) == before
    assert parent_of(branch)["step"] == 4

    # It has a checkpoint, so the parent is no longer needed, but another one is refused.
    moved = parent.rename(tmp_path / "moved")
    train_and_evaluate(settings, str(branch))
    assert_equal_after(4, moved, branch)
    assert [line["step"] for line in lines_after(branch, 0)] == [6, 8]
    with pytest.raises(UserError, match=r"holds a run with another config: checkpoint\.init_from"):
        train_and_evaluate(settings.replace({"checkpoint.init_from": "elsewhere"}), str(branch))


@pytest.mark.slow
def test_a_branch_decays_the_learning_rate_from_its_parent_s(corpus, parent, tmp_path):
    changes = {"checkpoint.init_from": f"{parent}@4", "logging_steps": 1}
    changes |= {"optimizer.schedule": "wsd", "optimizer.decay_steps": 2, "optimizer.decay_shape": "linear"}
    train_and_evaluate(tiny_settings(corpus, **changes, num_train_steps=7), str(tmp_path / "run"))
    rates = [line["train/learning_rate"] for line in read_metrics(str(tmp_path / "run" / "metrics.jsonl"))]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.005], rtol=1e-6)


@pytest.mark.slow
def test_a_branch_may_have_other_later_stages(corpus, parent, tmp_path):
    decay = {"optimizer.schedule": "wsd", "optimizer.decay_steps": 1.0, "masking.mlm_probability": 0.3}
    settings = tiny_settings(corpus, stages=({"name": "pretrain", "steps": 4}, {"name": "decay", **decay}))
    train_and_evaluate(settings, str(tmp_path / "straight" / "run"))
    branch = settings.replace({"checkpoint.init_from": f"{parent}@4"})
    train_and_evaluate(branch, str(tmp_path / "branch" / "run"))
    # But for the metrics, which the parent does not log at the boundary.
    found = differences(str(tmp_path / "straight" / "run"), str(tmp_path / "branch" / "run"))
    assert [line.split(",")[0] for line in found] == ["metrics.jsonl"]
    long = (*branch.stages, {"name": "long", "steps": 1, "data.max_seq_length": 18})
    for stages, message in (
        (long, "a later stage introduces a length, a source or its weight"),
        (branch.stages[1:], r"stages\[0\] has begun there, with masking.mlm_probability=0.15, and has 0.3 here"),
    ):
        with pytest.raises(UserError, match=rf"^checkpoint\.init_from='{parent}@4': {message}.*; change "):
            train_and_evaluate(branch.replace({"stages": stages}), str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_restart_has_parameters_and_moments_of_its_parent_and_begins_at_step_0(corpus, parent, tmp_path, monkeypatch):
    before = files(parent)
    changes = {"checkpoint.init_from": str(parent), "checkpoint.init_mode": "restart", "seed": 7, "save_steps": 1}
    changes |= {"optimizer.warmup_steps": 2, "data.packing": "pad", "num_train_steps": 2}
    train_and_evaluate(tiny_settings(corpus, **changes), str(tmp_path / "run"))
    assert files(parent) == before
    assert parent_of(tmp_path / "run") == {"path": str(parent), "step": 8, "mode": "restart", "format_version": 1}
    old, new = read_state(str(parent), 8), read_state(str(tmp_path / "run"), 1)
    # The rate of the first step is 0.
    for name in (name for name in old if name.startswith("params")):
        np.testing.assert_array_equal(old[name], new[name])
    counts = {name: int(value) for name, value in new.items() if value.ndim == 0 and value.dtype == np.int32}
    assert sorted(counts.values()) == [1, 1, 1, 9]  # Step, applied steps and schedule; Adam's bias correction.
    assert batches_of(tmp_path / "run", 1) == 1
    assert files(tmp_path / "run" / "tokenizer").keys() == files(parent / "tokenizer").keys()

    resumed = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "add_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_and_evaluate(tiny_settings(corpus, **changes), str(resumed))
    assert [path.name for path in (resumed / "checkpoints").iterdir()] == ["0"]
    train_and_evaluate(tiny_settings(corpus, **changes), str(resumed))
    expected, actual = read_state(str(tmp_path / "run"), 2), read_state(str(resumed), 2)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, actual[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "stable_adamw", "lamb", "lion", "adafactor", "muon"])
def test_a_restart_resets_the_schedule_of_every_optimizer_and_no_moments(name):
    params = {"layer_0": {"query_key_value": {"kernel": jnp.ones((4, 4))}}, "bias": jnp.ones(4)}
    settings = OptimizerSettings(**default.get_config().optimizer.to_dict() | {"name": name, "learning_rate": 0.01})
    optimizer = create_optimizer(settings, lambda count: 0.1)
    opt_state = optimizer.init(params)
    for _ in range(3):
        _, opt_state = optimizer.update(params, opt_state, params)
    three = jnp.int32(3)
    state = restart(TrainState(three, params, opt_state, UpdateStats(three, jnp.float32(2.0))))
    assert (int(state.step), int(state.update_stats.num_applied)) == (0, 0)

    def schedules(tree):
        return [
            node
            for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
            if isinstance(node, optax.ScaleByScheduleState)
        ]

    assert [int(node.count) for node in schedules(opt_state)] == [3] * len(schedules(opt_state)) != []
    assert {int(node.count) for node in schedules(state.opt_state)} == {0}
    differing = [
        not np.array_equal(one, other)
        for one, other in zip(jax.tree.leaves(opt_state), jax.tree.leaves(state.opt_state), strict=True)
    ]
    assert sum(differing) == len(schedules(opt_state))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint.init_from": "{parent}/none"}, "checkpoint.init_from='{parent}/none': contains no run; choose a run's work directory"),
        ({"checkpoint.init_from": "{parent}@5"}, "checkpoint.init_from='{parent}@5': has no checkpoint 5; choose one of 4, 8"),
        ({}, "num_train_steps=8: the checkpoint of checkpoint.init_from='{parent}' has 8 steps already; raise it, or choose an earlier checkpoint with @STEP"),
        ({"model.overrides.hidden_size": 32}, "checkpoint.init_from='{parent}': holds a run with another model: model.overrides.hidden_size (there 16, here 32); use the same values"),
        ({"model.model_name_or_path": "roberta-base"}, "checkpoint.init_from='{parent}': holds a run with another model: model.model_name_or_path (there None, here 'roberta-base'); use the same values"),
        ({"tokenizer.tokenizer_name": "roberta-base"}, "checkpoint.init_from='{parent}': holds a run with another tokenizer: tokenizer.tokenizer_name (there None, here 'roberta-base'); use the same values"),
        ({"tokenizer.vocab_size": 290, "checkpoint.init_mode": "restart"}, "checkpoint.init_from='{parent}': holds a run with another tokenizer: tokenizer.vocab_size (there 300, here 290); use the same values"),
        ({"optimizer.name": "lamb", "checkpoint.init_mode": "restart"}, "checkpoint.init_from='{parent}': holds a run with another optimizer: optimizer.name (there 'adamw', here 'lamb'); use the same values"),
        ({"seed": 7}, "checkpoint.init_from='{parent}': holds a run with another config: seed (there 42, here 7); use the same values, or checkpoint.init_mode='restart'"),
    ],
)  # fmt: skip
def test_errors_are_one_line_before_anything_is_written(corpus, parent, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(train.Run, "__init__", None)
    changes = {"checkpoint.init_from": "{parent}"} | changes
    changes = {key: value.format(parent=parent) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UserError) as error:
        train_and_evaluate(tiny_settings(corpus, **changes), str(tmp_path / "run"))
    assert str(error.value) == message.format(parent=parent)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_errors(corpus, parent, tmp_path, monkeypatch):
    settings = tiny_settings(corpus, **{"checkpoint.init_from": str(parent)})
    with pytest.raises(UserError, match="is the run that --overwrite renames; choose another --workdir"):
        train_and_evaluate(settings, str(parent), overwrite=True)
    settings = tiny_settings(corpus, **{"checkpoint.init_from": f"{parent}@4"})
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "restore", mock.Mock(side_effect=CorruptCheckpointError("a checksum")))
        with pytest.raises(UserError, match=r"cannot read checkpoint 4 \(a checksum\); choose another one with @STEP$"):
            train_and_evaluate(settings, str(tmp_path / "run"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((parent / "config.json").read_bytes())
    settings = tiny_settings(corpus, **{"checkpoint.init_from": str(empty)})
    with pytest.raises(UserError, match="has no checkpoints; wait for its run to save one"):
        train_and_evaluate(settings, str(tmp_path / "run"))
    (run := tmp_path / "run").mkdir()
    (run / "config.json").write_bytes((parent / "config.json").read_bytes())
    with pytest.raises(UserError, match="has no checkpoints; wait for its run to save one"):
        train_and_evaluate(settings, str(run), overwrite=True)
    assert sorted(tmp_path.iterdir()) == [empty, run]  # Nothing was renamed.
    assert split_step("runs/a@b@12") == ("runs/a@b", 12)
    assert split_step("runs/a@b") == ("runs/a@b", None)


@pytest.mark.slow
def test_errors_of_a_resumed_run(corpus, parent, tmp_path, monkeypatch):
    shutil.copytree(parent, run := tmp_path / "run")
    shutil.rmtree(run / "model")  # As if it had been stopped before its last evaluation.
    before = files(run)
    with pytest.raises(UserError, match=r"^num_train_steps=6: 8 steps are done; set it to at least 8$"):
        train_and_evaluate(tiny_settings(corpus, num_train_steps=6), str(run))
    monkeypatch.setattr(WorkDir, "create", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"^--workdir=.*/run: cannot be written .*No space left on device\); free or "):
        train_and_evaluate(tiny_settings(corpus), str(run))
    assert files(run) | {".lock": None} == before | {".lock": None}


@pytest.mark.slow
def test_a_parent_in_a_bucket(corpus, tmp_path, monkeypatch):
    server = GcsServer()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parent, branch = "gs://bucket/runs/run", tmp_path / "run"
    try:
        train_and_evaluate(tiny_settings(corpus), parent)
        server.asked.clear()
        train_and_evaluate(tiny_settings(corpus, **{"checkpoint.init_from": f"{parent}@4"}), str(branch))
        assert {method for method, name in server.asked} == {"GET"}
    finally:
        server.close()
    assert parent_of(branch)["path"] == parent
    straight = tmp_path / "straight" / "run"
    train_and_evaluate(tiny_settings(corpus), str(straight))
    assert_equal_after(4, straight, branch)


ONE_OF_TWO = """
import sys
from mlm.run import multihost
port, index, corpus, parent, branch = sys.argv[1:]
multihost.start(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
from mlm.train import train_and_evaluate
from tests.tiny import tiny_settings
train_and_evaluate(tiny_settings(corpus), parent)
train_and_evaluate(tiny_settings(corpus, **{"checkpoint.init_from": parent + "@4"}), branch)
again = {"checkpoint.init_from": parent, "checkpoint.init_mode": "restart", "num_train_steps": 2}
train_and_evaluate(tiny_settings(corpus, **again), branch + "2")
"""


@pytest.mark.slow
def test_a_branch_of_two_processes_equals_its_parent(corpus, tmp_path):
    parent, branch, port = tmp_path / "a" / "run", tmp_path / "b" / "run", free_port()
    both = Pair([["-c", ONE_OF_TWO, port, str(i), corpus, str(parent), str(branch)] for i in range(2)], tmp_path)
    try:
        assert both.wait() == [0, 0], both.log(0) + both.log(1)
    finally:
        both.kill()
    assert_equal_after(4, parent, branch)
    assert parent_of(tmp_path / "b" / "run2")["step"] == 8
