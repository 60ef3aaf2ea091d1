"""Saved models: any checkpoint as a model directory, means of them, and sentences filled in."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from transformers import AutoTokenizer

from configs import default
from mlm import build, load, steps
from mlm.errors import UserError
from mlm.export import model_directory
from mlm.export.fill_mask import fill_mask
from mlm.export.model_card import build_card
from mlm.models.encoder import MaskedLM
from mlm.modes import export
from mlm.modes import fill_mask as fill_mask_mode
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, tiny_config, write_corpus

# Most look at one run of eight updates.
pytestmark = pytest.mark.slow

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, work directory) of 8 updates: checkpoints at 2, 4, 6 and 8, evaluations at 4 and 8; a WordPiece."""
    config = tiny_config(write_corpus(tmp_path_factory.mktemp("corpus")))
    config.save_steps = 2
    config.checkpoint.keep_checkpoints = 9
    config.tokenizer.algorithm = "wordpiece"
    config.report.sentences = ("Number 7: the [MASK] sees the <mask>.",)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    kept = {}
    real = model_directory.export_model

    def keep(directory, *, step, **kwargs):
        real(directory, step=step, **kwargs)
        kept[step] = shutil.copytree(directory, workdir.parent / f"kept{step}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_directory, "export_model", keep)
        train_and_evaluate(settings_of(config), str(workdir))
    return config, workdir, kept


@pytest.fixture(autouse=True)
def training_compiles_nothing(run, monkeypatch):
    """And reads no text: all that is asked for is there."""

    def forbidden(*args, **kwargs):
        raise AssertionError("not needed for this")

    monkeypatch.setattr(steps, "train_step", forbidden)
    monkeypatch.setattr(build, "build", forbidden)


def tensors_of(directory):
    return safetensors.numpy.load_file(os.path.join(directory, "model.safetensors"))


def test_a_checkpoints_export_is_the_runs_own(run, tmp_path):
    """Bit for bit, of every evaluated step, card and figures included."""
    config, workdir, kept = run
    for step in (4, None):
        directory = export.run(settings_of(config), str(workdir), step=step, output=str(tmp_path / str(step)))
        own = kept[step or 8]
        assert sorted(os.listdir(directory)) == sorted(os.listdir(own))
        for name in set(os.listdir(own)) - {"curves.png"}:
            assert (Path(directory) / name).read_bytes() == (Path(own) / name).read_bytes(), name


def test_without_output_it_is_the_runs_model(run, tmp_path):
    config, workdir, kept = run
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "model")
    # Where no export tells the encoder's config, the run's does.
    assert export.run(settings_of(config), str(copy), step=6) == str(copy / "model")
    assert json.loads((copy / "model" / "trainer_state.json").read_text())["global_step"] == 6
    assert "not evaluated" in (copy / "model" / "README.md").read_text()
    assert (copy / "model" / "config.json").read_bytes() == (kept[8] / "config.json").read_bytes()
    # A run that goes on is not disturbed.
    holder = WorkDir(str(copy))
    holder.lock()
    with pytest.raises(UserError, match="is in use by another run"):
        export.run(settings_of(config), str(copy))
    export.run(settings_of(config), str(copy), output=str(tmp_path / "out"))
    holder.unlock()


def test_the_mean_of_checkpoints(run, tmp_path):
    config, workdir, _ = run
    place = WorkDir(str(workdir))

    def leaves(step, average=1):
        return jax.tree.leaves(load.load_checkpoint(settings_of(config), place, step=step, average=average).params)

    singles = {step: leaves(step) for step in (2, 4, 6, 8)}
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(singles[8], singles[6], strict=True))
    for step, of in ((8, (4, 6, 8)), (6, (4, 6))):
        for n, leaf in enumerate(leaves(step, len(of))):
            mean = np.mean([singles[other][n].astype(np.float64) for other in of], axis=0)
            np.testing.assert_allclose(leaf, mean, rtol=1e-6, atol=1e-9)
            assert leaf.dtype == np.float32
    directory = export.run(settings_of(config), str(workdir), average=3, output=str(tmp_path / "mean"))
    params = load.load_model(directory).params
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), leaves(8, 3), strict=True))
    card = Path(directory, "README.md").read_text()
    assert "mean of the checkpoints 4, 6, 8" in card
    assert "not evaluated" in card


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_weights_of_another_dtype(run, tmp_path, dtype, kind):
    config, workdir, kept = run
    directory = export.run(settings_of(config), str(workdir), dtype=dtype, output=str(tmp_path / dtype))
    assert json.loads(Path(directory, "config.json").read_text())["dtype"] == dtype
    assert json.loads((kept[8] / "config.json").read_text())["dtype"] == "float32"
    written, exact = tensors_of(directory), tensors_of(kept[8])
    for name, tensor in exact.items():
        assert written[name].dtype == kind
        assert np.array_equal(written[name], tensor.astype(kind))
    # It is read again, too.
    saved_model = load.load_model(directory)
    assert {leaf.dtype for leaf in jax.tree.leaves(saved_model.params)} == {np.dtype(np.float32)}


def test_files_may_be_read_by_those_who_may_read_the_others(run):
    _, _, kept = run
    assert len({path.stat().st_mode for path in Path(kept[8]).iterdir()}) == 1


def test_what_cannot_be_exported(run, tmp_path):
    config, workdir, _ = run
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for options, message in [
        ({"step": 5}, r"--step=5: there is no such checkpoint; there are 2, 4, 6, 8"),
        ({"average": 5}, r"--average=5: up to update 8 there are only the checkpoints 2, 4, 6, 8"),
        ({"average": 2, "step": 2}, r"--average=2: up to update 2 there are only the checkpoints 2"),
        ({"average": 0}, "at least 1"),
        ({"dtype": "float8"}, "--dtype=float8 is not one of float32, bfloat16, float16"),
        ({"output": str(tmp_path / "other")}, "something else than a model"),
        ({"output": str(tmp_path / "file")}, "there is a file"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            export.run(settings_of(config), str(workdir), **{"output": str(tmp_path / "out")} | options)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]
    copy = shutil.copytree(workdir, tmp_path / "run")
    victim = next(path for path in (copy / "checkpoints" / "8" / "state" / "d").iterdir())
    victim.write_bytes(victim.read_bytes()[:-50])
    shutil.rmtree(copy / "checkpoints" / "6" / "state")
    for step in (6, 8):
        with pytest.raises(UserError, match=rf"checkpoint {step} in .* cannot be read .* choose another --step"):
            export.run(settings_of(config), str(copy), step=step, output=str(tmp_path / "out"))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoints"):
        export.run(settings_of(config), str(copy))


class PulledPlugError(Exception):
    """Nothing after it happens."""


@pytest.mark.parametrize("point", range(6))
def test_an_export_that_is_cut_off_leaves_the_old_model_or_the_new_one(run, tmp_path, monkeypatch, point):
    """At any of its steps; and the next one finds a way."""
    config, workdir, kept = run
    target = tmp_path / "model"
    shutil.copytree(kept[4], target)
    saved_model = load.load_checkpoint(settings_of(config), WorkDir(str(workdir)), step=8)
    card = build_card(
        settings_of(config),
        title="x",
        model_type="roberta",
        step=8,
        sequences_per_step=1,
        tokens_seen=saved_model.tokens_seen,
        hardware="",
    )

    def write(metrics):
        model_directory.export_model(
            str(target), step=8, params=saved_model.params, config=saved_model.encoder, card=card, metrics=metrics,
            tokenizer=saved_model.tokenizer, predictions=[], metrics_path=str(workdir / "metrics.jsonl"),
        )  # fmt: skip

    points = [("safetensors", None), ("draw_curves", None), ("rename", 1), ("rename", 2), ("rename", 3), ("sync", None)]
    name, count = points[point]
    calls = []

    def cut(*args, real=os.rename, **kwargs):
        calls.append(args)
        if count is None or len(calls) == count:
            raise PulledPlugError
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        if name == "safetensors":
            patch.setattr(safetensors.numpy, "save_file", cut)
        elif name == "draw_curves":
            patch.setattr(model_directory, "draw_curves", cut)
        elif name == "rename":
            patch.setattr(os, "rename", cut)
        else:
            patch.setattr(model_directory, "sync", cut)
        with contextlib.suppress(PulledPlugError):
            write({})
    if not target.exists():
        assert point == 3
        # A reader of ours finds it all the same.
        assert load.load_model(str(target)).params.keys() == saved_model.params.keys()
    model_directory.recover(str(target))
    step = json.loads((target / "trainer_state.json").read_text())["global_step"]
    assert step == (8 if point == 4 else 4)
    assert tensors_of(target).keys() == tensors_of(kept[step]).keys()
    assert all(np.array_equal(a, tensors_of(kept[step])[n]) for n, a in tensors_of(target).items())
    write({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert json.loads((target / "trainer_state.json").read_text())["global_step"] == 8


def ask(config, workdir, *sentences, lines="", step=None, monkeypatch=None):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        fill_mask_mode.run(settings_of(config), str(workdir), arguments=sentences, step=step)
    return out.getvalue().splitlines()


def test_every_mask_of_a_sentence_is_filled_in(run):
    """With the five likeliest words, by the logits of the whole row; either name of the mask will do."""
    config, workdir, kept = run
    sentences = ["Number 7: the <mask> sees the [MASK].", "The <mask> hears.", "Number 7: the [MASK] sees the <mask>."]
    saved_model = load.load_model(str(kept[8]))
    tokenizer = AutoTokenizer.from_pretrained(kept[8])
    model = MaskedLM(saved_model.encoder)
    apply = jax.jit(lambda row, at: model.apply({"params": saved_model.params}, row, positions_BxK=at)[0])
    predictions = fill_mask(model, saved_model.params, saved_model.tokenizer, sentences)
    for sentence, filling in zip(sentences, predictions, strict=True):
        ids = tokenizer(sentence.replace("<mask>", "[MASK]"))["input_ids"]
        places = [place for place, id in enumerate(ids) if id == tokenizer.mask_token_id]
        assert len(places) == len(filling.candidates) == sentence.lower().count("mask")
        row, at = np.array([ids], np.int32), np.array([places], np.int32)
        for candidates, probs in zip(filling.candidates, jax.nn.softmax(apply(row, at)), strict=True):
            best = np.argsort(-probs)[:5]
            assert [word for word, _ in candidates] == [tokenizer.decode([id]) for id in best]
            np.testing.assert_allclose([prob for _, prob in candidates], probs[best], rtol=1e-4)
    assert predictions[0].candidates == predictions[2].candidates

    lines = ask(config, workdir, *sentences)
    assert [line.strip() for line in lines if not line.startswith("      ")] == sentences
    assert len(lines) == 3 + 5
    assert all(line.count(" %") == 5 for line in lines if line.startswith("      "))


def test_sentences_come_from_standard_input_and_from_checkpoints(run):
    config, workdir, _ = run
    sentences = [f"Number {n}: the <mask> sees." for n in range(load._SENTENCES_AT_ONCE + 3)]
    lines = ask(config, workdir, lines="\n\n".join(sentences))
    assert [line.strip() for line in lines[::2]] == sentences
    # As few at once as many.
    assert ask(config, workdir, *sentences[:2]) == lines[:4]
    assert ask(config, workdir, sentences[0], step=8) == lines[:2]
    assert ask(config, workdir, sentences[0], step=2) != lines[:2]


def test_sentences_that_cannot_be_filled_in(run, tmp_path):
    config, workdir, _ = run
    for sentence, message in [
        ("nothing to guess", "has no <mask>"),
        ("<mask> " * 40, "the model takes at most 19"),
    ]:
        with pytest.raises(UserError, match=message):
            ask(config, workdir, sentence)
    with pytest.raises(UserError, match="no sentence; write some after the flags"):
        ask(config, workdir, lines="\n \n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no model in .*empty/model: the run has not evaluated yet"):
        ask(config, tmp_path / "empty", "<mask>")


def test_the_command_line_needs_no_config(run, tmp_path):
    """It stands in the work directory; and the device is the CPU whatever else there is."""
    _, workdir, _ = run
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}

    def main(*flags, lines="", workdir=workdir):
        command = [sys.executable, "main.py", f"--workdir={workdir}", *flags]
        return subprocess.run(command, cwd=REPO, env=env, input=lines, capture_output=True, text=True, timeout=300)

    result = main("--mode=export", "--average=2", "--dtype=bfloat16", f"--output={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert f"exported update 6 + 8 to {tmp_path / 'out'}" in result.stderr
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {np.dtype(ml_dtypes.bfloat16)}
    one = main("--mode=fill_mask", "--step=4", "Number 7: the <mask> sees.", "The <mask>.")
    assert one.returncode == 0, one.stderr
    assert main("--mode=fill_mask", "--step=4", lines="Number 7: the <mask> sees.\nThe <mask>.\n").stdout == one.stdout
    shown = main("--mode=show_data", "--step=3")
    assert shown.returncode == 0, shown.stderr
    for flags, message in [
        (["--mode=export", "--step=5"], "there are 2, 4, 6, 8"),
        (["--mode=fill_mask", "no hole"], "has no <mask>"),
    ]:
        result = main(*flags)
        assert result.returncode == 2
        assert message in result.stderr.splitlines()[-1]
    result = main("--mode=export", workdir=tmp_path / "none")
    assert result.returncode == 2
    assert "there is no run; name the work directory of one" in result.stderr
    assert not (tmp_path / "none").exists()


def test_the_command_line_trains_a_tokenizer_and_nothing_else(tmp_path):
    corpus = write_corpus(tmp_path)
    (tmp_path / "config.py").write_text(
        f"from tests.tiny import tiny_config\n\n\ndef get_config():\n    return tiny_config({corpus!r})\n"
    )
    flags = ["--mode=train_tokenizer", f"--config={tmp_path / 'config.py'}", "--config.model.model_type=bert"]

    def main(*more):
        command = [sys.executable, "main.py", *flags, *more]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)

    result = main(f"--output={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert f"--config.tokenizer.tokenizer_name={tmp_path / 'out'}" in result.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens([0, 4]) == ["[PAD]", "[MASK]"]
    for more, message in [
        ([], "--output: missing; --mode=train_tokenizer needs it"),
        ([f"--output={tmp_path / 'out'}"], "is not empty; name another directory"),
    ]:
        result = main(*more)
        assert result.returncode == 2
        assert message in result.stderr.splitlines()[-1]


def test_newer_keys_of_an_older_run_have_their_defaults(run, tmp_path):
    config, workdir, _ = run
    defaults = settings_of(default.get_config())
    assert WorkDir(str(workdir)).read_settings(defaults=defaults) == settings_of(config)
    copy = tmp_path / "run"
    copy.mkdir()
    content = json.loads((workdir / "config.json").read_text())
    del content["config"]["export"], content["config"]["hub"]["license"]
    (copy / "config.json").write_text(json.dumps(content))
    assert WorkDir(str(copy)).read_settings(defaults=defaults).export.dtype == "float32"
