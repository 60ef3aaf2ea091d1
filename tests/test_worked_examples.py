"""docs/changing.md: each of its diffs, applied to a copy of the repository, does what the page says."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from mlm.masking import MaskingSpec, mask_tokens

REPO = Path(__file__).parent.parent
PAGE = (REPO / "docs" / "changing.md").read_text()
EXAMPLES = ("The loss", "The masking", "The model")


def hunks(title: str) -> list[tuple[str, str, str]]:
    """(file, text before, text after) of the diffs in the section of that title."""
    (section,) = [part for part in PAGE.split("\n## ") if part.startswith(f"{title}:")]
    found = []
    for diff in re.findall(r"```diff\n(.*?)```", section, re.DOTALL):
        for file, changes in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.DOTALL | re.MULTILINE):
            for hunk in re.split(r"^@@\n", changes, flags=re.MULTILINE)[1:]:
                lines = hunk.splitlines(keepends=True)
                before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
                found.append((file, before, after))
    return found


def apply(title: str, folder: Path) -> None:
    for file, before, after in hunks(title):
        source = (folder / file).read_text()
        assert source.count(before) == 1, f"{file} has not once what docs/changing.md changes:\n{before}"
        (folder / file).write_text(source.replace(before, after))


@pytest.fixture
def copy(tmp_path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("mlm", "configs", "tests"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "main.py", folder)
    return folder


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_diffs_fit_these_files_and_are_in_style(title, copy):
    apply(title, copy)
    files = sorted({str(copy / file) for file, *_ in hunks(title)})
    assert len(files) >= 3
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(REPO / "pyproject.toml"), *files]
        result = subprocess.run(ruff, cwd=copy, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


# What every script begins with: a tiny run of the changed code, and its lines of metrics.
BEGIN = """
import os
os.environ["XLA_FLAGS"] = ""
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from mlm.reporting.curves import read_metrics
from mlm.errors import UserError
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, tiny_config, write_corpus

folder = Path(sys.argv[1])
(folder / "corpus").mkdir()
files = write_corpus(folder / "corpus")

def run(name, **keys):
    config = tiny_config(files)
    config.logging_steps = 1
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    train_and_evaluate(settings_of(config), str(folder / name))
    return read_metrics(str(folder / name / "metrics.jsonl"))
"""


def run_script(copy: Path, script: str) -> None:
    code = BEGIN + textwrap.dedent(script)
    command = [sys.executable, "-c", code, str(copy.parent)]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
def test_the_loss(copy):
    apply("The loss", copy)
    run_script(
        copy,
        """
        from mlm.loss import squared_log_sums

        logits = jax.random.normal(jax.random.key(0), (2, 3, 7)) + 1.0
        weights = jnp.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
        gradient = jax.grad(squared_log_sums)(logits, weights)
        log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        np.testing.assert_allclose(gradient, 2 * log_sum * jax.nn.softmax(logits) * weights[..., None], rtol=1e-5)

        # So much of it that a run of eight updates shows it.
        plain, with_z = run("plain", num_train_steps=40), run("with_z", num_train_steps=40, optimizer__z_loss=1.0)
        assert plain[0]["train/loss"] == with_z[0]["train/loss"]
        assert with_z[0]["train/grad_norm"] > 1.5 * plain[0]["train/grad_norm"]

        from mlm.checkpoint import Checkpointer
        import safetensors.numpy, json
        from mlm.models import weights as hf
        from mlm.models.config import EncoderConfig
        from mlm.models.encoder import MaskedLM

        def mean_squared_log_sum(name):
            place = folder / name / "model"
            config = EncoderConfig.from_hf(json.loads((place / "config.json").read_text()))
            params = hf.from_hf(safetensors.numpy.load_file(place / "model.safetensors"), config)
            tokens = jnp.arange(5, 5 + 3 * 16, dtype=jnp.int32).reshape(3, 16)
            logits = MaskedLM(config).apply({"params": params}, tokens, positions_BxK=jnp.arange(16)[None].repeat(3, 0))
            return float(jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2))

        # At first log Z is log 300 = 5.7.
        assert mean_squared_log_sum("with_z") < 0.7 * mean_squared_log_sum("plain")
        """,
    )


def neighbours(masks: np.ndarray) -> float:
    """The share of hidden tokens whose right neighbour is hidden, too."""
    return float(np.mean(masks[:, 1:][masks[:, :-1]]))


@pytest.mark.slow
def test_the_masking(copy):
    spec = MaskingSpec(
        mlm_probability=0.15, mask_replace_prob=1.0, random_replace_prob=0.0, mask_id=4, special_ids=(4,), num_ids=50
    )
    tokens = np.full((2000, 128), 7, np.int32)
    batch = mask_tokens(tokens, rows_B=np.arange(2000), key=jax.random.key(0), spec=spec)
    hidden = np.asarray(batch.inputs_BxL) == 4
    assert neighbours(hidden) == pytest.approx(0.15, abs=0.01)
    np.save(copy.parent / "hidden.npy", hidden)
    apply("The masking", copy)
    run_script(
        copy,
        """
        from mlm.masking import MaskingSpec, mask_tokens

        def hidden(**change):
            spec = MaskingSpec(
                mlm_probability=0.15, mask_replace_prob=1.0, random_replace_prob=0.0, mask_id=4, special_ids=(4,),
                num_ids=50, **change,
            )
            tokens = jnp.full((2000, 128), 7, jnp.int32)
            batch = mask_tokens(tokens, rows_B=jnp.arange(2000), key=jax.random.key(0), spec=spec)
            return np.asarray(batch.inputs_BxL) == 4

        before = np.load(folder / "hidden.npy")
        assert (hidden() == before).all()
        spans = hidden(span_length=3)
        # The number of every row is what it was.
        assert (spans.sum(axis=1) == before.sum(axis=1)).all()
        share = np.mean(spans[:, 1:][spans[:, :-1]])
        assert 0.67 < share < 0.74, share
        # Every place is as likely as any other.
        np.testing.assert_allclose(spans.mean(axis=0), 0.15, atol=0.04)

        plain, by_span = run("plain"), run("by_span", masking__span_length=3)
        assert plain[0]["train/loss"] != by_span[0]["train/loss"]
        try:
            run("refused", masking__span_length=0)
        except UserError as error:
            assert str(error) == "masking.span_length=0 must be at least 1"
        else:
            raise AssertionError("it was not refused")
        """,
    )


@pytest.mark.slow
def test_the_model(copy):
    apply("The model", copy)
    run_script(
        copy,
        """
        import copy, json
        import safetensors.numpy
        from mlm.models import weights as hf
        from mlm.models.config import EncoderConfig
        from mlm.models.encoder import MaskedLM

        def logits(name, *, scale):
            place = folder / name / "model"
            config = EncoderConfig.from_hf(json.loads((place / "config.json").read_text()))
            tensors = safetensors.numpy.load_file(place / "model.safetensors")
            tensors = {k: v * scale if ".query." in k else v for k, v in tensors.items()}
            params = hf.from_hf(tensors, config)
            tokens = jnp.arange(5, 5 + 3 * 16, dtype=jnp.int32).reshape(3, 16)
            positions = jnp.arange(16)[None].repeat(3, 0)
            return MaskedLM(config).apply({"params": params}, tokens, positions_BxK=positions), tensors

        lines = run("new", model__model_type="roberta-qknorm", num_train_steps=16)
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        assert losses[-1] < losses[0] - 0.3, losses
        run("old", num_train_steps=16)
        changes = {}
        for name in ("new", "old"):
            one, tensors = logits(name, scale=1.0)
            ten, _ = logits(name, scale=10.0)
            changes[name] = float(jnp.max(jnp.abs(ten - one)))
        assert changes["new"] < 1e-5 < 1e-3 < changes["old"], changes
        _, tensors = logits("new", scale=1.0)
        assert tensors["roberta.encoder.layer.1.attention.self.query_norm.weight"].shape == (8,)

        # It starts again from its own model/, and transformers does not take it for another.
        again = run("again", model__model_name_or_path=str(folder / "new" / "model"))
        assert again[0]["train/loss"] < losses[0] - 0.3
        from transformers import AutoConfig
        try:
            AutoConfig.from_pretrained(folder / "new" / "model")
        except ValueError as error:
            assert "roberta-qknorm" in str(error)
        else:
            raise AssertionError("transformers takes it")
        """,
    )
