# ruff: noqa: E501, messages are one line.
"""Stages of a run: boundaries, schedules, text, and training through them."""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from benchmarks.same_run import differences
from configs import default
from mlm import build, startup
from mlm import stages as stages_lib
from mlm.build import create_mask_rate_schedule
from mlm.data import pipeline
from mlm.errors import UserError
from mlm.hardware import parse_topology
from mlm.load import load_checkpoint
from mlm.modes import check, show_data
from mlm.reporting.curves import read_metrics
from mlm.reporting.reporter import Reporter
from mlm.run.workdir import WorkDir
from mlm.schedules import create_schedule
from mlm.settings import Boundaries, RunSettings
from mlm.stages import Stage, batch_ramp, resolve
from mlm.train import train_and_evaluate
from tests import fork_server
from tests.tiny import sentences, settings_of, staged_config, tiny_settings, write_corpus

REPO = Path(__file__).parent.parent
DEVICES = 4


def settings_with(*stages: dict, **changes) -> RunSettings:
    """100 steps of 4 x 16 tokens per device."""
    changes = {"num_train_steps": 100, "model.overrides.max_position_embeddings": 66} | changes
    return tiny_settings("corpus.jsonl", **changes, stages=stages)


def ends(stages: tuple[Stage, ...]) -> list[int]:
    return [stage.end for stage in stages]


def rates(stages: tuple[Stage, ...]) -> list[float]:
    """The learning rate of every step, if none is skipped."""
    found = []
    for stage in stages:
        schedule = create_schedule(
            stage.settings.optimizer,
            num_train_steps=stage.schedule_end - stage.schedule_start,
            boundaries=stage.boundaries,
            start=stage.schedule_start,
        )
        found += [float(schedule(count)) for count in range(stage.start, stage.end)]
    return found


LONG = {"name": "long", "steps": 0.1, "data.max_seq_length": 32, "per_device_train_batch_size": 2}


def test_a_run_without_stages_is_one_stage():
    settings = settings_with()
    assert resolve(settings, num_devices=DEVICES) == (
        Stage("", 0, 100, settings, 0, 100, Boundaries(0, 100), mask_start=0, mask_end=100),
    )


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((0.85, 0.1, 0.05), [85, 95, 100]),
        ((85, 10, 5), [85, 95, 100]),
        ((0.85, None, 0.05), [85, 95, 100]),
        # 256 tokens per step, then 512, then 256 again.
        (("21760 tokens", "5120 tokens", None), [85, 95, 100]),
        ((0.333, 0.333, 0.334), [33, 67, 100]),
    ],
)
def test_boundaries(steps, expected):
    lengths = (16, 32, 16)
    stages = [
        {"name": f"s{n}", "steps": some, "data.max_seq_length": length}
        for n, (some, length) in enumerate(zip(steps, lengths, strict=True))
    ]
    assert ends(resolve(settings_with(*stages), num_devices=DEVICES)) == expected


def test_a_key_keeps_its_value_in_later_stages():
    stages = resolve(settings_with({"name": "a"}, LONG, {"name": "c", "steps": 5}), num_devices=DEVICES)
    assert [stage.settings.data.max_seq_length for stage in stages] == [16, 32, 32]
    assert [stage.rows_per_device for stage in stages] == [4, 2, 2]
    assert {stage.settings.stages for stage in stages} == {()}


def test_an_extended_run_moves_only_boundaries_ahead():
    fractions = {"name": "a", "steps": 0.5}, {"name": "b", "steps": 0.4}, {"name": "c"}
    old = ends(resolve(settings_with(*fractions), num_devices=1))
    longer = settings_with(*fractions, num_train_steps=200)
    assert [ends(resolve(longer, num_devices=1, earlier=old, step=step)) for step in (20, 50, 60, 90, 95)] == [
        [100, 180, 200],
        [100, 180, 200],
        [50, 180, 200],
        [50, 180, 200],
        [50, 90, 200],
    ]
    shorter = settings_with(*fractions, num_train_steps=50)
    assert ends(resolve(shorter, num_devices=1, earlier=old, step=40)) == [40, 45, 50]


def test_a_stage_without_steps_left_has_no_schedule():
    stages = {"name": "a", "steps": 0.9}, {"name": "b", "optimizer.schedule": "linear"}
    shorter = settings_with(*stages, num_train_steps=50)
    assert ends(found := resolve(shorter, num_devices=1, earlier=[90, 100], step=50)) == [50, 50]
    assert found[1].boundaries == Boundaries(0, 0)


def test_a_passed_stage_keeps_its_end_on_another_number_of_devices():
    # 64 tokens per step and device.
    stages = settings_with({"name": "a", "steps": "10240 tokens"}, {"name": "b"})
    old = resolve(stages, num_devices=4)
    assert ends(old) == [40, 100]
    with pytest.raises(UserError, match="leaves the stage 'b' less than one step"):
        resolve(stages, num_devices=1)
    assert ends(resolve(stages, num_devices=1, earlier=[40, 100], step=41)) == [40, 100]


def test_the_schedule_of_a_finished_stage_stays(monkeypatch):
    decay = {"optimizer.schedule": "wsd", "optimizer.decay_steps": "2560 tokens"}
    settings = settings_with({"name": "a", "steps": 50, **decay}, {"name": "b", "optimizer.schedule": "constant"})
    last = [{"end": stage.end, "borders": stage.boundaries} for stage in resolve(settings, num_devices=4)]
    assert [stage["borders"].decay_start for stage in last] == [40, 50]
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert [stage.boundaries for stage in startup._resume_stages(settings, last, step=60, applied=60)] == [
        stage["borders"] for stage in last
    ]


@pytest.mark.slow
def test_one_schedule_spans_the_stages_and_a_learning_rate_rescales_it():
    base = {"optimizer.schedule": "linear", "optimizer.warmup_steps": 10}
    plain = rates(resolve(settings_with(**base), num_devices=1))
    halved = rates(
        resolve(
            settings_with({"name": "a"}, {"name": "b", "steps": 30, "optimizer.learning_rate": 5e-3}, **base),
            num_devices=1,
        )
    )
    assert halved == plain[:70] + [rate / 2 for rate in plain[70:]]


def test_a_stage_with_a_schedule_starts_its_own():
    decay = {"optimizer.schedule": "wsd", "optimizer.decay_steps": 1.0, "optimizer.end_factor": 0.5}
    base = {"optimizer.schedule": "linear", "optimizer.warmup_steps": 10}
    stages = resolve(
        settings_with({"name": "a"}, {"name": "b", "steps": 20, **decay}, {"name": "c", "steps": 10}, **base),
        num_devices=1,
    )
    found = rates(stages)
    alone = rates(resolve(settings_with(**base, num_train_steps=70), num_devices=1))
    assert found[:70] == alone
    done = np.arange(30) / 30  # No warm-up, and the stage after it continues the decay.
    np.testing.assert_allclose(found[70:], 1e-2 * (1 - 0.5 * np.sqrt(done)), rtol=1e-5)


def test_tokens_of_a_schedule_count_in_every_stage():
    # 64 tokens per step and 40 steps, then 128.
    stages = resolve(
        settings_with(
            {"name": "a", "steps": 40},
            {"name": "b", "data.max_seq_length": 32},
            **{"optimizer.warmup_steps": f"{64 * 40 + 128 * 10} tokens"},
        ),
        num_devices=1,
    )
    assert [stage.boundaries.warmup_steps for stage in stages] == [50, 50]


def test_a_mask_rate_spans_the_stages_up_to_the_next_that_sets_it():
    pair = {"masking.mlm_probability": (0.3, 0.15)}
    stages = resolve(
        settings_with({"name": "a", "steps": 10, **pair}, {"name": "b", "steps": 41}, {"name": "c", **pair}),
        num_devices=1,
    )
    a, b, c = (create_mask_rate_schedule(stage) for stage in stages)
    np.testing.assert_allclose([a(0), a(25), b(25), b(50), c(51), c(99)], [0.3, 0.225, 0.225, 0.15, 0.3, 0.15])


def test_batch_ramp():
    assert batch_ramp((2, 4), duration="600 tokens") == (
        {"name": "batch_2", "steps": "300 tokens", "per_device_train_batch_size": 2},
        {"name": "batch_4", "steps": "300 tokens", "per_device_train_batch_size": 4},
    )
    ramp = batch_ramp((1, 2, 3), duration=10, key="gradient_accumulation_steps")
    stages = resolve(settings_with(*ramp, {"name": "rest", "gradient_accumulation_steps": 4}), num_devices=1)
    assert ends(stages) == [3, 6, 10, 100]
    assert [stage.rows_per_device for stage in stages] == [4, 8, 12, 16]
    assert sum(stage["steps"] for stage in batch_ramp((1, 2), duration=0.25)) == 0.25


WRONG = [
    ((3,), 'stages[0]=3: must be a dict such as {"name": "extend", "steps": 0.1, "data.max_seq_length": 512}'),
    (({"steps": 3},), "stages[0].name=None: must be a string of letters, digits, '_', '-' and '.'"),
    (({"name": "a"}, {"name": "a", "steps": 1}), "stages[1].name='a': is the name of two stages; rename one"),
    (
        ({"name": "a", "steps": 1.5},),
        "stages[0].steps=1.5: must be a number of steps, a fraction of the run in (0, 1], or a string such as '3e9 tokens'",
    ),
    (({"name": "a"}, {"name": "b"}), "stages=('a', 'b'): only one stage may leave out its steps; set the others"),
    (
        ({"name": "a", "steps": 50}, {"name": "b", "steps": 40}),
        "stages=('a', 'b'): their steps add up to 90, and num_train_steps=100; change one of them, or leave out the steps of one stage, which then has the rest",
    ),
    (
        ({"name": "a", "steps": 100}, {"name": "b"}),
        "stages[1].steps=None: leaves the stage 'b' less than one step of num_train_steps=100; change the steps of the stages",
    ),
    (
        ({"name": "a", "data.max_seq_len": 32},),
        "stages[0].data.max_seq_len: unknown key; did you mean data.max_seq_length?",
    ),
    (
        ({"name": "a", "model.dtype": "bfloat16"},),
        f"stages[0].model.dtype='bfloat16': cannot change in a stage; keys that can are {', '.join(stages_lib.STAGE_KEYS)}",
    ),
    (
        ({"name": "a", "optimizer.decay_steps": 0.1},),
        "stages[0].optimizer.decay_steps=0.1: belongs to a schedule, and this stage continues that of the stage before; set optimizer.schedule in this stage, too",
    ),
    (
        ({"name": "a"}, {"name": "b", "steps": 5, "optimizer.schedule": "linear", "optimizer.warmup_steps": 6}),
        "stages[1].optimizer.warmup_steps=6: must be at most the 5 steps of its schedule",
    ),
    (
        ({"name": "a", "data.max_seq_length": 128},),
        "stages[0].data.max_seq_length=128: is longer than the model's 64 positions; lower it, or set model.overrides.max_position_embeddings=130",
    ),
    (
        ({"name": "a", "per_device_train_batch_size": 0},),
        "stages[0].per_device_train_batch_size=0: cannot be found for several stages; set a number",
    ),
    (({"name": "a", "data.mixture": ()},), "stages[0].data.mixture=(): must have at least one source"),
    (
        ({"name": "a", "data.mixture": (("text", 1, {"data_files": "other.jsonl"}),)},),
        "stages[0].data.mixture=(('text', 1, {'data_files': 'other.jsonl'}),): the source 'text' has other options in an earlier stage; rename it",
    ),
    (({"name": "a", "masking.mlm_probability": 2.0},), "stages[0].masking.mlm_probability=2.0: must lie in (0, 1]"),
]


@pytest.mark.parametrize(("stages", "message"), WRONG)
def test_invalid_stages_are_an_error_of_one_line(stages, message):
    with pytest.raises(UserError) as error:
        stages_lib.check(settings_with(*stages))
    assert str(error.value) == message


def test_only_the_steps_of_stages_may_change():
    before = ({"name": "a", "steps": 0.5}, {"name": "b", "data.max_seq_length": 32})
    assert stages_lib.may_change(
        "stages", before, ({"name": "a", "steps": 3}, {"name": "b", "data.max_seq_length": 32})
    )
    assert not stages_lib.may_change("stages", before, ({"name": "a"}, {"name": "b", "data.max_seq_length": 64}))
    assert not stages_lib.may_change("stages", before, before[:1])
    assert stages_lib.may_change("num_train_steps", 1, 2)
    assert not stages_lib.may_change("seed", 1, 2)


def test_a_branch_may_change_only_stages_that_begin_later():
    first, decay = {"name": "a", "steps": 50}, {"name": "c", "masking.mlm_probability": 0.1}
    settings = settings_with(first, LONG, decay)
    old = [stage.to_json() for stage in resolve(settings, num_devices=1)]
    assert [len(stages_lib.started_stages(old, step=step)) for step in (0, 1, 50, 51, 60, 61)] == [1, 1, 1, 2, 2, 3]

    def check(*stages: dict, num_begun: int, parent: RunSettings = settings) -> None:
        stages_lib.check_branch(settings_with(*stages), parent, num_begun=num_begun)

    check(first, LONG, decay | {"masking.mlm_probability": 0.2}, {"name": "d", "steps": 2}, num_begun=2)
    check(first, {**LONG, "name": "b", "steps": 20}, num_begun=2)
    check(first, decay, num_begun=1, parent=settings_with())
    with pytest.raises(
        UserError, match=r"^stages\[2\] has begun there, with masking.mlm_probability=0.1, and has 0.2 here; "
    ):
        check(first, LONG, decay | {"masking.mlm_probability": 0.2}, num_begun=3)
    with pytest.raises(UserError, match=r"^stages has 1 of the 2 stages that have begun; add the missing ones$"):
        check(first, num_begun=2)
    for stages in ((first, LONG), (first, decay | {"data.mixture": (("other", 1, {"dataset_name": "docstrings"}),)})):
        with pytest.raises(UserError, match=r"^a later stage introduces a length, a source or its weight"):
            check(*stages, num_begun=1, parent=settings_with())
    # The parent has no stages, or others; a boundary that has been passed stays.
    longer = settings_with(first, {"name": "b", "steps": 100}, {"name": "c"}, num_train_steps=200)
    assert ends(resolve(longer, num_devices=1, earlier=[100], step=80)) == [80, 150, 200]
    assert ends(resolve(longer, num_devices=1, earlier=[30, 90], step=80)) == [30, 150, 200]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("corpus")
    other = directory / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in sentences(200)))
    return write_corpus(directory), str(other)


@pytest.fixture(scope="module")
def settings(corpora) -> RunSettings:
    return settings_of(staged_config(*corpora))


@pytest.mark.slow
def test_evaluation_sequences_of_all_stages_are_held_out(settings, corpora):
    data = [stage.data for stage in stages_lib.settings_of_stages(settings)]
    sources = pipeline.open_sources(*data)
    assert [(source.name, source.weight) for source in sources] == [("text", 1.0), ("other", 0.25)]
    tokenizer = pipeline.open_tokenizer(settings, sources, saved_tokenizer=None, model_type="modernbert")
    alone = pipeline.open_text(data[0], sources[:1], tokenizer, seed=0)
    text = pipeline.open_text(data[0], sources, tokenizer, seed=0, later_stages=data[1:])
    # The sequences of eval/loss are those of a run without stages.
    np.testing.assert_array_equal(text.eval_rows_RxL, alone.eval_rows_RxL)
    assert [(rows.name, rows.rows_RxL.shape, rows.first_stage) for rows in text.extra_eval_rows] == [
        ("other", (8, 16), 0),
        ("length_32", (15, 32), 1),
    ]
    held_out = "".join(text.held_out.to_pylist())
    for rows_RxL in (text.eval_rows_RxL, *(rows.rows_RxL for rows in text.extra_eval_rows)):
        for row_L in rows_RxL:
            parts = tokenizer.decode(row_L).replace("[CLS]", "").split("[SEP]")
            assert [part for part in parts if part not in held_out] == []
    shapes = [build.batch_shape(stage, batch_rows=4) for stage in resolve(settings, num_devices=1)]
    batches = text.batches(process_index=0, process_count=1, batch_rows=4, shapes=shapes)
    trained = "".join(tokenizer.decode(next(batches).ravel()) for _ in range(400))
    assert min(stream.epoch for stream in batches.streams.values()) >= 1
    assert not [document for document in text.held_out.to_pylist() if document in trained]


def test_the_steps_of_a_resumed_run_may_change(settings, tmp_path):
    workdir = WorkDir(str(tmp_path / "run"))
    stages = resolve(settings, num_devices=1)
    workdir.create(
        settings, save_tokenizer=lambda path: Path(path).mkdir(), processes=1, rows_per_process=4, stages=stages, step=0
    )
    assert [stage["end"] for stage in workdir.last_stages()] == [5, 9, 12]
    first, extend, decay = settings.stages
    longer = settings.replace({"stages": (first, extend, decay | {"steps": 9}), "num_train_steps": 18})
    assert WorkDir(str(tmp_path / "run")).resume(longer) == longer
    assert [stage.end for stage in stages_lib.stages_at_last_start(longer, workdir.last_stages())] == [5, 9, 18]
    other = settings.replace({"stages": (first, extend | {"data.max_seq_length": 24}, decay)})
    with pytest.raises(UserError, match=r"holds a run with another config: stages \("):
        WorkDir(str(tmp_path / "run")).resume(other)


@pytest.fixture(scope="module")
def tokens() -> dict[int, np.ndarray]:
    """The sequences of each step of `straight`."""
    return {}


@pytest.fixture(scope="module")
def straight(settings, tokens, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("straight") / "run"
    add_step = Reporter.add_step

    def add(self, step, metrics, batch, **kwargs):
        tokens[step] = batch.tokens
        add_step(self, step, metrics, batch, **kwargs)

    with mock.patch.object(Reporter, "add_step", add):
        train_and_evaluate(settings, str(workdir))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5, 6, 10])
def test_sequences_of_any_stage_are_recomputed(settings, straight, tokens, step):
    data = show_data.replay(settings, str(straight), step=step)
    np.testing.assert_array_equal(data.tokens_BxL, tokens[step])
    assert data.masked.inputs_BxL.shape[1] == (16 if step <= 5 else 32)


@pytest.mark.slow
def test_a_checkpoint_is_loaded_with_the_model_of_its_stage(settings, straight):
    workdir = WorkDir(str(straight))
    loaded = [load_checkpoint(settings, workdir, step=step).encoder for step in (5, 9)]
    assert [encoder.global_rope_theta for encoder in loaded] == [160_000.0, 500.0]


@pytest.mark.slow
def test_check_prints_a_table_of_the_stages(settings, tmp_path, capsys):
    defaults = RunSettings.from_dict(default.get_config().to_dict()).flat()
    found = check.check(
        settings, str(tmp_path / "run"), defaults=defaults, machine=parse_topology("h100-8"), utilization=0.4
    )
    assert found == []
    table = [line.split() for line in capsys.readouterr().out.strip().splitlines()[-4:]]
    assert [row[:5] for row in table] == [
        ["stage", "steps", "tokens", "hours", "memory"],
        ["pretrain", "1", "to", "5", "2,560"],
        ["extend", "6", "to", "9", "2,048"],
        ["decay", "10", "to", "12", "1,536"],
    ]


@pytest.mark.slow
def test_metrics_and_files_of_a_run_in_stages(settings, straight):
    lines = {line["step"]: line for line in read_metrics(str(straight / "metrics.jsonl"))}
    # A stage ends with a log line, an evaluation and a checkpoint.
    assert sorted(lines) == [3, 5, 6, 9, 12]
    assert [step for step, line in lines.items() if "eval/loss" in line] == [5, 9, 12]
    assert [step for step, line in lines.items() if "eval/length_32/loss" in line] == [9, 12]
    assert all("eval/other/loss" in lines[step] for step in (5, 9, 12))
    assert {int(path.name) for path in (straight / "checkpoints").iterdir()} == {5, 9, 11, 12}
    rows = jax.device_count() * 4, jax.device_count() * 2
    # Each stage has its own: the second one has fewer tokens per microbatch.
    memory = [lines[step]["perf/step_memory_bytes"] for step in (5, 9, 12)]
    assert memory[0] != memory[1]
    assert min(memory) > 0
    assert lines[12]["data/tokens"] == 5 * rows[0] * 16 + 7 * rows[1] * 32
    assert [round(lines[step]["train/learning_rate"], 6) for step in (9, 12)] == [
        0.01,
        round(0.01 * (1 - (2 / 3) ** 0.5), 6),
    ]
    config = json.loads((straight / "model" / "config.json").read_text())
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 500.0
    assert json.loads((straight / "model" / "tokenizer_config.json").read_text())["model_max_length"] == 32
    card = (straight / "model" / "README.md").read_text()
    assert "pretrain (steps 1 to 5), extend (steps 6 to 9), decay (steps 10 to 12)" in card
    history = json.loads((straight / "config.json").read_text())["history"]
    assert [(stage["name"], stage["end"]) for stage in history[0]["stages"]] == [
        ("pretrain", 5),
        ("extend", 9),
        ("decay", 12),
    ]


# In every stage and at every boundary. tests/test_multihost.py does the same with two processes.
KILLS = [("add_step", 3), ("save", 5), ("add_step", 8), ("save", 9), ("add_step", 11)]


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_stage_and_at_every_boundary_resumes_exactly(corpora, tmp_path):
    config, log = tmp_path / "config.py", tmp_path / "log.txt"
    call = f"staged_config({corpora[0]!r}, {corpora[1]!r})"
    config.write_text(f"from tests.tiny import staged_config\n\n\ndef get_config():\n    return {call}\n")

    def run(workdir: Path, *program: str) -> int:
        command = [sys.executable, *program, f"--config={config}", f"--workdir={workdir}"]
        with open(log, "w") as file:
            env = {**os.environ, "PYTHONPATH": str(REPO)}
            with fork_server.Process(command, cwd=REPO, env=env, stdout=file, stderr=file) as process:
                return process.wait(300)

    straight, killed = tmp_path / "straight" / "run", tmp_path / "killed" / "run"
    assert run(straight, "main.py") == 0, log.read_text()
    for function, step in KILLS:
        assert run(killed, "tests/killed.py", function, str(step)) == -signal.SIGKILL, log.read_text()
    assert run(killed, "main.py") == 0, log.read_text()
    assert differences(str(straight), str(killed)) == []
