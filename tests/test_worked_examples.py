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
    assert len(files) >= 2
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(REPO / "pyproject.toml"), *files]
        result = subprocess.run(ruff, cwd=copy, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


# The start of every script: `run` makes a tiny run with the changed code and returns its lines of metrics.
BEGIN = """
import json
import os
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
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
        from mlm.loss import training_loss

        logits = jax.random.normal(jax.random.key(0), (2, 3, 7)) + 1.0
        labels, weights = jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])

        def reference(logits):
            log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
            return jnp.sum(-weights * (1 - jnp.exp(log_p)) ** 2 * log_p)

        def focal(logits):
            return training_loss(logits, labels, weights, focal_gamma=2.0)[0]

        np.testing.assert_allclose(focal(logits), reference(logits), rtol=1e-5)
        np.testing.assert_allclose(jax.grad(focal)(logits), jax.grad(reference)(logits), rtol=1e-4, atol=1e-6)

        plain, with_focal = run("plain"), run("focal", loss__focal_gamma=30.0)
        # Two programs: the sums may be rounded differently.
        np.testing.assert_allclose(plain[0]["train/loss"], with_focal[0]["train/loss"], rtol=1e-6)
        norms = with_focal[0]["train/grad_norm"], plain[0]["train/grad_norm"]
        assert abs(norms[0] / norms[1] - 1) > 0.05, norms
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

        spec = MaskingSpec(
            mlm_probability=0.15, mask_replace_prob=1.0, random_replace_prob=0.0, mask_id=4, special_ids=(4,),
            num_ids=50, strategy="triples",
        )
        tokens = jnp.full((2000, 128), 7, jnp.int32)
        batch = mask_tokens(tokens, rows_B=jnp.arange(2000), key=jax.random.key(0), spec=spec)
        triples = np.asarray(batch.inputs_BxL) == 4
        before = np.load(folder / "masked.npy")
        # Every sequence has as many masked tokens as before.
        assert (triples.sum(axis=1) == before.sum(axis=1)).all()
        neighbor_rate = np.mean(triples[:, 1:][triples[:, :-1]])
        assert 0.67 < neighbor_rate < 0.74, neighbor_rate
        # All positions are equally likely.
        np.testing.assert_allclose(triples.mean(axis=0), 0.15, atol=0.04)
        lines = run("run", masking__strategy="triples", num_train_steps=4)
        assert np.isfinite(lines[-1]["eval/loss"])
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

        params = grads = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}

        def first_change(name):
            optimizer = create_optimizer(optimizer_settings(name=name), optax.constant_schedule(0.01))
            return float(optimizer.update(grads, optimizer.init(params), params)[0]["a"]["bias"][0])

        # With gradient g: m_hat = (0.9 * 0.1 g / (1 - 0.9^2)) + 0.1 g / (1 - 0.9), instead of g.
        np.testing.assert_allclose(first_change("nadamw") / first_change("adamw"), 0.09 / 0.19 + 1, rtol=1e-5)
        lines = run("run", optimizer__name="nadamw", num_train_steps=12)
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        assert losses[-1] < losses[0] - 0.2, losses
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
        assert changes["new"] < 1e-5 < 1e-4 < changes["old"], changes
        tensors = logits_of("new")[1]
        assert tensors["roberta.encoder.layer.0.attention.self.query_norm.weight"].shape == (8,)

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
