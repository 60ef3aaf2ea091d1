"""Loading and exporting checkpoints, means of checkpoints, and --mode=fill_mask."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from transformers import AutoTokenizer

from mlm import build, load, steps, train
from mlm.errors import UserError
from mlm.export import model_directory
from mlm.export.fill_mask import fill_mask
from mlm.export.model_card import build_card
from mlm.models.encoder import MaskedLM
from mlm.modes import embed, export
from mlm.modes import fill_mask as fill_mask_mode
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests import fork_server
from tests.tiny import settings_of, tiny_config, write_corpus

# Most tests use one run of eight steps.
pytestmark = pytest.mark.slow

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, work directory, copies of exports by step) of 8 steps: checkpoints at 2, 4, 6, 8, evals at 4, 8."""
    config = tiny_config(write_corpus(tmp_path_factory.mktemp("corpus")))
    config.save_steps = 2
    config.checkpoint.keep_checkpoints = 9
    config.tokenizer.algorithm = "wordpiece"
    config.report.sentences = ("Number 7: the [MASK] sees the <mask>.",)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    exports = {}
    real = model_directory.export_model

    def copy(directory, *, step, **kwargs):
        real(directory, step=step, **kwargs)
        exports[step] = shutil.copytree(directory, workdir.parent / f"export{step}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "export_model", copy)
        train_and_evaluate(settings_of(config), str(workdir))
    return config, workdir, exports


@pytest.fixture(autouse=True)
def training_is_not_needed(run, monkeypatch):
    """Neither the data nor the training step is needed."""

    def forbidden(*args, **kwargs):
        raise AssertionError("not needed")

    monkeypatch.setattr(steps, "train_step", forbidden)
    monkeypatch.setattr(build, "build", forbidden)


def tensors_of(directory):
    return safetensors.numpy.load_file(os.path.join(directory, "model.safetensors"))


def test_an_exported_checkpoint_equals_the_runs_own_export(run, tmp_path):
    """Bitwise, for every evaluated step, with card and metrics."""
    config, workdir, exports = run
    for step in (4, None):
        directory = export.run(settings_of(config), str(workdir), step=step, output=str(tmp_path / str(step)))
        own = exports[step or 8]
        assert sorted(os.listdir(directory)) == sorted(os.listdir(own))
        for name in set(os.listdir(own)) - {"curves.png"}:
            assert (Path(directory) / name).read_bytes() == (Path(own) / name).read_bytes(), name


def test_export_without_output_replaces_the_runs_model(run, tmp_path):
    config, workdir, exports = run
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "model")
    # Without an export, the encoder's config comes from the run's config.
    assert export.run(settings_of(config), str(copy), step=6) == str(copy / "model")
    assert json.loads((copy / "model" / "trainer_state.json").read_text())["global_step"] == 6
    assert "not evaluated" in (copy / "model" / "README.md").read_text()
    assert (copy / "model" / "config.json").read_bytes() == (exports[8] / "config.json").read_bytes()
    # A run in progress is not disturbed.
    holder = WorkDir(str(copy))
    holder.lock()
    with pytest.raises(UserError, match="is in use by another run"):
        export.run(settings_of(config), str(copy))
    export.run(settings_of(config), str(copy), output=str(tmp_path / "out"))
    holder.unlock()


def test_the_mean_of_checkpoints(run, tmp_path):
    config, workdir, _ = run

    def leaves(step, average=1):
        loaded = load.load_checkpoint(settings_of(config), WorkDir(str(workdir)), step=step, average=average)
        return jax.tree.leaves(loaded.params)

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
    config, workdir, exports = run
    directory = export.run(settings_of(config), str(workdir), dtype=dtype, output=str(tmp_path / dtype))
    assert json.loads(Path(directory, "config.json").read_text())["dtype"] == dtype
    assert json.loads((exports[8] / "config.json").read_text())["dtype"] == "float32"
    written, exact = tensors_of(directory), tensors_of(exports[8])
    for name, tensor in exact.items():
        assert written[name].dtype == kind
        assert np.array_equal(written[name], tensor.astype(kind))
    # It can be loaded again.
    loaded = load.load_model(directory)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}


def test_files_for_sentence_transformers(run, tmp_path):
    """The pooling that the files describe gives the vectors of --mode=embed; docs/downstream.md has the library's."""
    config, workdir, _ = run
    directory = Path(
        export.run(settings_of(config), str(workdir), sentence_transformers=True, output=str(tmp_path / "model"))
    )
    assert not Path(workdir, "model", "modules.json").exists()
    modules = json.loads((directory / "modules.json").read_text())
    assert [(module["path"], module["type"].rsplit(".", 1)[1]) for module in modules] == [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
    ]
    pooling = json.loads((directory / "1_Pooling" / "config.json").read_text())
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens"]
    limit = json.loads((directory / "sentence_bert_config.json").read_text())["max_seq_length"]
    texts = ["the cat", "the dog sees the river " * 9]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    embed.run(
        None, None, arguments=[str(tmp_path / "texts.txt")], model=str(directory), output=str(tmp_path / "vectors.npy")
    )
    loaded = load.load_model(str(directory))
    assert pooling["word_embedding_dimension"] == loaded.encoder.hidden_size
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # All cut to the length of the sequences in training, although the model has more positions.
    assert limit == tokenizer.model_max_length == loaded.max_tokens == 16 < loaded.encoder.max_seq_length
    for text, vector in zip(texts, np.load(tmp_path / "vectors.npy"), strict=True):
        ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        states = MaskedLM(loaded.encoder).apply({"params": loaded.params}, np.array([ids]), method="encode")
        np.testing.assert_allclose(vector, np.mean(states[0], axis=0), atol=1e-6)


def test_all_files_have_the_same_permissions(run):
    _, _, exports = run
    assert len({path.stat().st_mode for path in Path(exports[8]).iterdir()}) == 1


def test_export_errors(run, tmp_path):
    config, workdir, _ = run
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for options, message in [
        ({"step": 5}, r"--step=5: no such checkpoint; choose one of 2, 4, 6, 8"),
        ({"average": 5}, r"--average=5: up to step 8 there are only the checkpoints 2, 4, 6, 8"),
        ({"average": 2, "step": 2}, r"--average=2: up to step 2 there are only the checkpoints 2"),
        ({"average": 0}, "at least 1"),
        ({"dtype": "float8"}, "--dtype=float8: must be one of float32, bfloat16, float16"),
        ({"output": str(tmp_path / "other")}, "has files that are not a model's"),
        ({"output": str(tmp_path / "file")}, "is a file; name a directory"),
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
        with pytest.raises(UserError, match=rf"cannot read checkpoint {step} .* choose another --step"):
            export.run(settings_of(config), str(copy), step=step, output=str(tmp_path / "out"))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoints"):
        export.run(settings_of(config), str(copy))


class PulledPlugError(Exception):
    """The process is killed here."""


@pytest.mark.parametrize("point", range(6))
def test_an_interrupted_export_leaves_the_old_or_the_new_model(run, tmp_path, monkeypatch, point):
    """Wherever it is interrupted; and the next export succeeds."""
    config, workdir, exports = run
    target = tmp_path / "model"
    shutil.copytree(exports[4], target)
    loaded = load.load_checkpoint(settings_of(config), WorkDir(str(workdir)), step=8)
    card = build_card(
        settings_of(config),
        title="x",
        model_type="roberta",
        step=8,
        sequences_per_step=1,
        tokens_seen=loaded.tokens_seen,
        hardware="",
    )

    def write(metrics):
        model_directory.export_model(
            str(target), step=8, params=loaded.params, config=loaded.encoder, card=card, metrics=metrics,
            tokenizer=loaded.tokenizer, predictions=[], metrics_path=str(workdir / "metrics.jsonl"),
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
        # load_model finds the old model.
        assert load.load_model(str(target)).params.keys() == loaded.params.keys()
    model_directory.recover(str(target))
    step = json.loads((target / "trainer_state.json").read_text())["global_step"]
    assert step == (8 if point == 4 else 4)
    assert tensors_of(target).keys() == tensors_of(exports[step]).keys()
    assert all(np.array_equal(a, tensors_of(exports[step])[n]) for n, a in tensors_of(target).items())
    write({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert json.loads((target / "trainer_state.json").read_text())["global_step"] == 8


def ask(config, workdir, *sentences, lines="", step=None, monkeypatch=None):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        fill_mask_mode.run(settings_of(config), str(workdir), arguments=sentences, step=step)
    return out.getvalue().splitlines()


def test_candidates_are_the_five_most_probable_tokens_of_every_mask(run):
    """Computed with logits of one unpadded sentence; both names of the mask token are accepted."""
    config, workdir, exports = run
    sentences = ["Number 7: the <mask> sees the [MASK].", "The <mask> hears.", "Number 7: the [MASK] sees the <mask>."]
    loaded = load.load_model(str(exports[8]))
    tokenizer = AutoTokenizer.from_pretrained(exports[8])
    model = MaskedLM(loaded.encoder)
    apply = jax.jit(lambda row, at: model.apply({"params": loaded.params}, row, positions_BxK=at)[0])
    predictions = fill_mask(model, loaded.params, loaded.tokenizer, sentences)
    for sentence, prediction in zip(sentences, predictions, strict=True):
        ids = tokenizer(sentence.replace("<mask>", "[MASK]"))["input_ids"]
        positions = [position for position, id in enumerate(ids) if id == tokenizer.mask_token_id]
        assert len(positions) == len(prediction.candidates) == sentence.lower().count("mask")
        row, at = np.array([ids], np.int32), np.array([positions], np.int32)
        for candidates, probs in zip(prediction.candidates, jax.nn.softmax(apply(row, at)), strict=True):
            best = np.argsort(-probs)[:5]
            assert [word for word, _ in candidates] == [tokenizer.decode([id]) for id in best]
            np.testing.assert_allclose([prob for _, prob in candidates], probs[best], rtol=1e-4)
    assert predictions[0].candidates == predictions[2].candidates

    lines = ask(config, workdir, *sentences)
    assert [line.strip() for line in lines if not line.startswith("      ")] == sentences
    assert len(lines) == 3 + 5
    assert all(line.count(" %") == 5 for line in lines if line.startswith("      "))


def test_sentences_from_standard_input_and_models_from_checkpoints(run):
    config, workdir, _ = run
    sentences = [f"Number {n}: the <mask> sees." for n in range(fill_mask_mode._BATCH_SIZE + 3)]
    lines = ask(config, workdir, lines="\n\n".join(sentences))
    assert [line.strip() for line in lines[::2]] == sentences
    # The number of sentences in a batch does not matter.
    assert ask(config, workdir, *sentences[:2]) == lines[:4]
    assert ask(config, workdir, sentences[0], step=8) == lines[:2]
    assert ask(config, workdir, sentences[0], step=2) != lines[:2]


def test_fill_mask_errors(run, tmp_path):
    config, workdir, _ = run
    for sentence, message in [
        ("no mask", "has no <mask>"),
        ("<mask> " * 40, "the model takes at most 19"),
    ]:
        with pytest.raises(UserError, match=message):
            ask(config, workdir, sentence)
    with pytest.raises(UserError, match="--mode=fill_mask: no sentences; pass them after the flags"):
        ask(config, workdir, lines="\n \n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/model: there is no model, since the run has not evaluated yet"):
        ask(config, tmp_path / "empty", "<mask>")


def test_the_command_line_needs_no_config(run, tmp_path):
    """It uses the config of the work directory, and the CPU."""
    _, workdir, _ = run
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}

    def main(*flags, lines="", workdir=workdir):
        command = [sys.executable, "main.py", f"--workdir={workdir}", *flags]
        return fork_server.run(command, cwd=REPO, env=env, input=lines)

    result = main("--mode=export", "--average=2", "--dtype=bfloat16", f"--output={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert f"exported steps 6 + 8 to {tmp_path / 'out'}" in result.stderr
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {np.dtype(ml_dtypes.bfloat16)}
    one = main("--mode=fill_mask", "--step=4", "Number 7: the <mask> sees.", "The <mask>.")
    assert one.returncode == 0, one.stderr
    assert main("--mode=fill_mask", "--step=4", lines="Number 7: the <mask> sees.\nThe <mask>.\n").stdout == one.stdout
    shown = main("--mode=show_data", "--step=3")
    assert shown.returncode == 0, shown.stderr
    for flags, message in [
        (["--mode=export", "--step=5"], "choose one of 2, 4, 6, 8"),
        (["--mode=fill_mask", "no mask"], "has no <mask>"),
    ]:
        result = main(*flags)
        assert result.returncode == 2
        assert message in result.stderr.splitlines()[-1]
    result = main("--mode=export", workdir=tmp_path / "none")
    assert result.returncode == 2
    assert "contains no run; choose" in result.stderr
    assert not (tmp_path / "none").exists()


def test_train_tokenizer_on_the_command_line(tmp_path):
    corpus = write_corpus(tmp_path)
    (tmp_path / "config.py").write_text(
        f"from tests.tiny import tiny_config\n\n\ndef get_config():\n    return tiny_config({corpus!r})\n"
    )
    flags = ["--mode=train_tokenizer", f"--config={tmp_path / 'config.py'}", "--config.model.model_type=bert"]

    def main(*more):
        command = [sys.executable, "main.py", *flags, *more]
        return fork_server.run(command, cwd=REPO)

    result = main(f"--output={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert f"--config.tokenizer.tokenizer_name={tmp_path / 'out'}" in result.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens([0, 4]) == ["[PAD]", "[MASK]"]
    for more, message in [
        ([], "--output: missing; --mode=train_tokenizer needs it"),
        ([f"--output={tmp_path / 'out'}"], "exists and is not an empty directory; name another directory"),
    ]:
        result = main(*more)
        assert result.returncode == 2
        assert message in result.stderr.splitlines()[-1]


def test_the_settings_of_a_run_are_read_from_its_work_directory(run):
    config, workdir, _ = run
    assert WorkDir(str(workdir)).read_settings() == settings_of(config)
