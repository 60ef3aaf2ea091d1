"""Runs with each ingredient of a recipe: exact resume, evaluation, and what is exported."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from mlm.errors import UserError
from mlm.load import load_checkpoint
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.tiny import tiny_settings, write_corpus

# One run for all: each ingredient changes every step.
RECIPE = {
    "model.overrides.num_hidden_layers": 1,
    "optimizer.name": "muon",
    "optimizer.learning_rate": 0.02,
    "optimizer.adam_learning_rate": 0.01,
    "optimizer.adam_beta1": None,
    "optimizer.adam_beta2": None,
    "optimizer.adam_epsilon": None,
    "optimizer.ema_decay": 0.8,
    "optimizer.schedule": "wsd",
    "optimizer.warmup_steps": f"{2 * 4 * 16 * jax.device_count()} tokens",
    "optimizer.decay_steps": 0.25,
    "masking.strategy": "span",
    "masking.mlm_probability": (0.4, 0.2),
    "loss.z_loss": 1e-3,
    "loss.label_smoothing": 0.1,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """The settings and the work directory of a run of eight steps."""
    workdir = str(tmp_path_factory.mktemp("recipe") / "run")
    settings = tiny_settings(files, **RECIPE)
    train_and_evaluate(settings, workdir)
    return settings, workdir


def comparable(workdir):
    lines = read_metrics(f"{workdir}/metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def tensors(workdir):
    return safetensors.numpy.load_file(f"{workdir}/model/model.safetensors")


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_is_bitwise_equal(run, files, tmp_path):
    settings, workdir = run
    stopped = str(tmp_path / "run")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        # At the export of step 4, after its checkpoint.
        patch.setattr("mlm.train._export", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_and_evaluate(settings, stopped)
    train_and_evaluate(settings, stopped)
    assert comparable(stopped) == comparable(workdir)
    expected = tensors(workdir)
    for name, tensor in tensors(stopped).items():
        np.testing.assert_array_equal(tensor, expected[name])


@pytest.mark.slow
def test_a_run_with_lamb_resumes_from_its_checkpoint_bitwise(files, tmp_path):
    keys = {"optimizer.name": "lamb", "num_train_steps": 6, "save_steps": 3, "eval_steps": 6}
    settings = tiny_settings(files, **{"model.overrides.num_hidden_layers": 1, **keys})
    train_and_evaluate(settings, str(tmp_path / "straight"))
    train_and_evaluate(settings.replace({"num_train_steps": 3}), str(tmp_path / "longer"))
    train_and_evaluate(settings, str(tmp_path / "longer"))
    expected = tensors(tmp_path / "straight")
    for name, tensor in tensors(tmp_path / "longer").items():
        np.testing.assert_array_equal(tensor, expected[name])


@pytest.mark.slow
def test_the_average_is_evaluated_exported_and_loaded(run):
    settings, workdir = run
    *_, last = read_metrics(f"{workdir}/metrics.jsonl")
    assert last["eval/loss"] != last["eval/raw_loss"]
    loaded = load_checkpoint(settings, WorkDir(workdir), step=8)
    exported = tensors(workdir)
    embedding = exported["roberta.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(loaded.params["embeddings"]["word"]["embedding"], embedding)


@pytest.mark.slow
def test_rates_of_masks_are_those_of_the_step(run):
    _, workdir = run
    lines = [line for line in read_metrics(f"{workdir}/metrics.jsonl") if "data/masked_fraction" in line]
    rates = [line["data/masked_fraction"] for line in lines]
    assert len(rates) == 8
    # The next span often does not fit: a row has 16 tokens, and a span up to 10 words.
    for step, rate in enumerate(rates):
        assert 0 < rate <= (0.4 - 0.2 * step / 7) + 0.02
    assert rates[-1] < rates[0]
    # A step predicts some twenty tokens.
    assert 0.65 < np.mean([line["data/mask_replaced_fraction"] for line in lines]) < 0.95
    assert 0.02 < np.mean([line["data/random_replaced_fraction"] for line in lines]) < 0.25


@pytest.mark.slow
def test_the_boundaries_of_the_schedule_are_stored_and_kept(run):
    settings, workdir = run
    with open(f"{workdir}/config.json", encoding="utf-8") as file:
        assert json.load(file)["history"][-1]["borders"] == {"warmup_steps": 2, "decay_start": 6}
    with pytest.raises(
        UserError, match=r"^optimizer\.decay_steps=0\.25: the decay would begin at step 12, but it has b"
    ):
        train_and_evaluate(settings.replace({"num_train_steps": 16}), workdir)
    assert comparable(workdir)[-1]["step"] == 8
