"""docs/changing.md: each of its diffs, applied to a copy of the repository, does what the page states."""

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
from tests import fork_server

REPO = Path(__file__).parent.parent
PAGE = (REPO / "docs" / "changing.md").read_text()
EXAMPLES = ("The loss", "The masking", "The optimizer", "The model")


def hunks(title: str) -> list[tuple[str, str, str]]:
    """Returns (file, text before, text after) for each hunk of the section with that title."""
    (section,) = [part for part in PAGE.split("\n## ") if part.startswith(f"{title}:")]
    found = []
    for diff in re.findall(r"```diff\n(.*?)```", section, re.DOTALL):
        for file, changes in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.DOTALL | re.MULTILINE):
            for hunk in re.split(r"^@@\n", changes, flags=re.MULTILINE)[1:]:
                lines = hunk.splitlines(keepends=True)
                before, after = ("".join(line[1:] for line in lines if line[0] in marks) for marks in (" -", " +"))
                found.append((file, before, after))
    return found


def apply(title: str, folder: Path) -> None:
    for file, before, after in hunks(title):
        source = (folder / file).read_text()
        assert source.count(before) == 1, (
            f"{file} does not contain exactly once what docs/changing.md changes:\n{before}"
        )
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
def test_the_diffs_apply_to_these_files_and_pass_ruff(title, copy):
    apply(title, copy)
    files = sorted({str(copy / file) for file, *_ in hunks(title)})
    assert len(files) >= 3
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(REPO / "pyproject.toml"), *files]
        result = subprocess.run(ruff, cwd=copy, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


# The start of every script: `run` makes a tiny run with the changed code and returns its lines of metrics.
BEGIN = """
import json
import os
os.environ["XLA_FLAGS"] = ""
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import safetensors.numpy
from mlm.errors import UserError
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.models.hf import weights
from mlm.reporting.curves import read_metrics
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, tiny_config, write_corpus

folder = Path(sys.argv[1])
(folder / "corpus").mkdir()
files = write_corpus(folder / "corpus")

def run(name, **keys):
    config = tiny_config(files)
    config.logging_steps = 1
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    config.eval_steps = config.save_steps = config.num_train_steps  # Each evaluation draws curves.
    train_and_evaluate(settings_of(config), str(folder / name))
    return read_metrics(str(folder / name / "metrics.jsonl"))

def logits_of(name, *, query_scale=1.0):
    path = folder / name / "model"
    config = EncoderConfig.from_hf(json.loads((path / "config.json").read_text()))
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    tensors = {key: tensor * query_scale if ".query." in key else tensor for key, tensor in tensors.items()}
    tokens = jnp.arange(5, 5 + 3 * 16, dtype=jnp.int32).reshape(3, 16)
    positions = jnp.arange(16)[None].repeat(3, 0)
    params = weights.from_hf(tensors, config)
    return MaskedLM(config).apply({"params": params}, tokens, positions_BxK=positions), tensors
"""


def run_script(copy: Path, script: str) -> None:
    code = BEGIN + textwrap.dedent(script)
    command = [sys.executable, "-c", code, str(copy.parent)]
    result = fork_server.run(command, cwd=copy)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
def test_the_loss(copy):
    apply("The loss", copy)
    run_script(
        copy,
        """
        from mlm.loss import z_loss

        logits = jax.random.normal(jax.random.key(0), (2, 3, 7)) + 1.0
        label_weights = jnp.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
        gradient = jax.grad(z_loss)(logits, label_weights)
        log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        np.testing.assert_allclose(gradient, 2 * log_z * jax.nn.softmax(logits) * label_weights[..., None], rtol=1e-5)

        # A large weight shows an effect within 40 steps.
        plain = run("plain", num_train_steps=40)
        with_z = run("with_z", num_train_steps=40, optimizer__z_loss_weight=1.0)
        assert plain[0]["train/loss"] == with_z[0]["train/loss"]
        assert with_z[0]["train/grad_norm"] > 1.5 * plain[0]["train/grad_norm"]

        def mean_squared_log_z(name):
            return float(jnp.mean(jax.nn.logsumexp(logits_of(name)[0], axis=-1) ** 2))

        # At the start log Z is log 300 = 5.7.
        assert mean_squared_log_z("with_z") < 0.7 * mean_squared_log_z("plain")
        """,
    )


def neighbor_rate(masked: np.ndarray) -> float:
    """Returns the fraction of masked tokens whose right neighbor is masked."""
    return float(np.mean(masked[:, 1:][masked[:, :-1]]))


@pytest.mark.slow
def test_the_masking(copy):
    spec = MaskingSpec(
        mlm_probability=0.15, mask_replace_prob=1.0, random_replace_prob=0.0, mask_id=4, special_ids=(4,), num_ids=50
    )
    tokens = np.full((2000, 128), 7, np.int32)
    batch = mask_tokens(tokens, rows_B=np.arange(2000), key=jax.random.key(0), spec=spec)
    masked = np.asarray(batch.inputs_BxL) == 4
    assert neighbor_rate(masked) == pytest.approx(0.15, abs=0.01)
    np.save(copy.parent / "masked.npy", masked)
    apply("The masking", copy)
    run_script(
        copy,
        """
        from mlm.masking import MaskingSpec, mask_tokens

        def masked(**change):
            spec = MaskingSpec(
                mlm_probability=0.15, mask_replace_prob=1.0, random_replace_prob=0.0, mask_id=4, special_ids=(4,),
                num_ids=50, **change,
            )
            tokens = jnp.full((2000, 128), 7, jnp.int32)
            batch = mask_tokens(tokens, rows_B=jnp.arange(2000), key=jax.random.key(0), spec=spec)
            return np.asarray(batch.inputs_BxL) == 4

        before = np.load(folder / "masked.npy")
        assert (masked() == before).all()
        spans = masked(span_length=3)
        # Every sequence has as many masked tokens as before.
        assert (spans.sum(axis=1) == before.sum(axis=1)).all()
        neighbor_rate = np.mean(spans[:, 1:][spans[:, :-1]])
        assert 0.67 < neighbor_rate < 0.74, neighbor_rate
        # All positions are equally likely.
        np.testing.assert_allclose(spans.mean(axis=0), 0.15, atol=0.04)

        plain, by_span = run("plain"), run("by_span", masking__span_length=3)
        assert plain[0]["train/loss"] != by_span[0]["train/loss"]
        try:
            run("refused", masking__span_length=0)
        except UserError as error:
            assert str(error) == "masking.span_length=0: must be at least 1"
        else:
            raise AssertionError("no error was raised")
        """,
    )


@pytest.mark.slow
def test_the_optimizer(copy):
    apply("The optimizer", copy)
    run_script(
        copy,
        """
        import optax
        from mlm.optimizer import create_optimizer
        from tests.tiny import optimizer_settings

        params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        grads = {"a": {"kernel": jnp.array([[1.0, -2.0, 0.0], [3.0, 0.5, -0.1]]), "bias": jnp.ones(3)}}
        sizes = {}
        for name in ("adamw", "lion"):
            optimizer = create_optimizer(optimizer_settings(name=name), optax.constant_schedule(0.01))
            state = optimizer.init(params)
            sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
        assert sizes["adamw"] == 2 * sizes["lion"]
        changes, _ = optimizer.update(grads, state, params)
        np.testing.assert_allclose(changes["a"]["kernel"], -0.01 * np.sign(grads["a"]["kernel"]), rtol=1e-6)

        def losses(name, **keys):
            return [line["train/loss"] for line in run(name, num_train_steps=40, **keys) if "train/loss" in line]

        plain = losses("plain")
        lion = losses("lion", optimizer__name="lion", optimizer__learning_rate=2e-3)
        assert lion[0] == plain[0] and lion[-1] < lion[0] - 0.5, lion
        for keys, message in (
            ({"optimizer__name": "sgd"}, "optimizer.name='sgd': must be one of adamw, lion"),
            # A resumed run cannot change its optimizer.
            ({"num_train_steps": 50}, "optimizer.name"),
        ):
            try:
                run("lion", **keys)
            except UserError as error:
                assert message in str(error)
            else:
                raise AssertionError("no error was raised")
        """,
    )


@pytest.mark.slow
def test_the_model(copy):
    apply("The model", copy)
    run_script(
        copy,
        """
        lines = run("new", model__model_type="roberta-qknorm", num_train_steps=16)
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        assert losses[-1] < losses[0] - 0.3, losses
        run("old", num_train_steps=16)
        changes = {}
        for name in ("new", "old"):
            changes[name] = float(jnp.max(jnp.abs(logits_of(name, query_scale=10.0)[0] - logits_of(name)[0])))
        assert changes["new"] < 1e-5 < 1e-3 < changes["old"], changes
        tensors = logits_of("new")[1]
        assert tensors["roberta.encoder.layer.1.attention.self.query_norm.weight"].shape == (8,)

        # A new run starts from its model/. transformers does not load it as another model.
        again = run("again", model__model_name_or_path=str(folder / "new" / "model"))
        assert again[0]["train/loss"] < losses[0] - 0.3
        from transformers import AutoConfig
        try:
            AutoConfig.from_pretrained(folder / "new" / "model")
        except ValueError as error:
            assert "roberta-qknorm" in str(error)
        else:
            raise AssertionError("transformers loads it")
        """,
    )
