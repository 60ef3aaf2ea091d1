"""Four devices on the CPU, no network, and tiny models for the tests of steps."""

import atexit
import functools
import gc
import os
import shutil
import tempfile
from pathlib import Path

# Set before jax, TensorFlow and datasets are imported, which read these once. Subprocesses of tests inherit them.
# XLA's new emitters for CPUs take twice as long to compile a step. Of several device counts the last one counts.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
        "--xla_force_host_platform_device_count=4",
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# As in main.py, for work directories in a bucket; etils reads it once.
os.environ.setdefault("EPATH_USE_TF", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Complete runs, in test processes and subprocesses, compile the same programs many times.
os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    os.environ["JAX_COMPILATION_CACHE_DIR"] if "PYTEST_XDIST_WORKER" in os.environ else tempfile.mkdtemp()
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["SAVED_PROGRAMS"] = os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], "programs")
# Tests compile a lot and compute little. The test of the quickstart compiles as users do.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm import parallel, steps
from mlm.export import model_directory
from mlm.masking import MaskingSpec
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.optimizer import create_optimizer
from mlm.schedules import create_schedule
from tests import saved_programs
from tests.tiny import optimizer_settings

if "PYTEST_XDIST_WORKER" not in os.environ:
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Implicit broadcasting of [V] against [B, K, V] is usually a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")


_CAN_BROWSE = bool(shutil.which("chromium") and shutil.which("chromedriver"))


# They come first, so that no process is left with one of them when the others have ended.
_LONGEST_FILES = ("test_multihost", "test_stages", "test_gcs_runs", "test_end_to_end", "test_kill", "test_families")
_LONGEST_FILES += ("test_documented_commands", "test_slurm", "test_init_from", "test_configs", "test_processes")
_LONGEST_FILES += ("test_execution", "test_worked_examples", "test_recipes", "test_load", "test_formats")


def pytest_collection_modifyitems(config, items):
    """Puts the files that take longest first; deselects the tests marked `browser` if no browser is installed."""
    rank = {name: number for number, name in enumerate(_LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if _CAN_BROWSE:
        return
    deselected = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


def pytest_collection():
    """Collects no garbage while test files import the libraries: that would take a quarter of the time."""
    gc.disable()


def pytest_collection_finish():
    """Leaves the libraries' objects, which live to the end, out of garbage collections: a run takes a fifth less."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter):
    """Reports the deselected tests."""
    if not _CAN_BROWSE:
        terminalreporter.write_line("tests marked browser were deselected: chromium and chromedriver are not installed")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A process crashes at 65,530 memory maps, and every compiled program holds some."""
    yield
    with open("/proc/self/maps") as maps:
        if sum(1 for _ in maps) > 20_000:
            jax.clear_caches()
            saved_programs.forget()
            gc.collect()


@pytest.fixture(scope="session", autouse=True)
def undrawn_curves():
    """Drawing takes as long as a tiny run. tests/test_reporter.py and the runs in other processes draw curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_directory, "draw_curves", lambda metrics_path, path, *, title: Path(path).write_bytes(b""))
        yield


@pytest.fixture(scope="session", autouse=True)
def programs_of_the_session():
    """See saved_programs.py."""
    with pytest.MonkeyPatch.context() as patch:
        saved_programs.install(patch.setattr)
        yield


LENGTH = 16
VOCAB = 50
PAD, MASK = 1, 4


class BagOfTokens(nn.Module):
    """Predicts a token from its own input and the mean over its sequence. Compiles faster than the encoder."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs_BxL, *, positions_BxK=None, deterministic=True):
        hidden_BxLxD = nn.Embed(VOCAB, 16, name="word")(inputs_BxL)
        used_BxLx1 = (inputs_BxL != PAD)[:, :, None].astype(jnp.float32)
        mean_Bx1xD = jnp.mean(hidden_BxLxD * used_BxLx1, axis=1, keepdims=True)
        hidden_BxLxD = nn.LayerNorm()(hidden_BxLxD + mean_Bx1xD)
        hidden_BxLxD = nn.Dropout(self.dropout)(hidden_BxLxD, deterministic=deterministic)
        hidden_BxKxD = jnp.take_along_axis(hidden_BxLxD, positions_BxK[:, :, None], axis=1)
        return nn.Dense(VOCAB)(hidden_BxKxD)


@pytest.fixture(scope="session")
def tiny_config():
    """An encoder of one layer, for sequences of up to 16 tokens, without dropout."""
    return EncoderConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH + PAD + 1,
        type_vocab_size=1,
        pad_token_id=PAD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


@pytest.fixture(scope="session")
def make_step_config(tiny_config):
    """(model, dropout, masking, optimizer, schedule, seed) -> StepConfig.

    `model` is "encoder" or "bag". `masking` and `optimizer` are fields to change. `schedule` replaces the constant one.
    """

    def make(*, model="bag", dropout=0.0, masking=None, optimizer=None, schedule=None, seed=42):
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        # A large epsilon: with a small one, gradients that are 0 up to rounding would move parameters.
        settings = optimizer_settings(**{"adam_epsilon": 1e-3} | (optimizer or {}))
        schedule = schedule or create_schedule(settings, num_train_steps=100)
        fields = {
            "mlm_probability": 0.3,
            "mask_replace_prob": 0.8,
            "random_replace_prob": 0.1,
            "mask_id": MASK,
            "special_ids": (0, PAD, 2, 3, MASK),
            "num_ids": VOCAB,
        } | (masking or {})
        return steps.StepConfig(
            model=MaskedLM(tiny_config.replace(**rates)) if model == "encoder" else BagOfTokens(dropout),
            masking=MaskingSpec(**fields),
            optimizer=create_optimizer(settings, schedule),
            schedule=schedule,
            seed=seed,
        )

    return make


@pytest.fixture(scope="session")
def init():
    """StepConfig -> the state before step 1, unstacked."""

    def init(step_config):
        params = jax.jit(functools.partial(steps.init_params, step_config, length=LENGTH))()
        return steps.init_state(step_config, params)

    return init


@pytest.fixture(scope="session")
def train_step():
    """StepConfig -> its step on all devices, without donation."""

    def train_step(step_config):
        return parallel.data_parallel(
            functools.partial(steps.train_step, step_config=step_config, axis_name=parallel.AXIS)
        )

    return train_step


@pytest.fixture(scope="session")
def encoder_step_config(make_step_config):
    """The real encoder, with weight decay."""
    return make_step_config(model="encoder", optimizer={"weight_decay": 0.01})


@pytest.fixture(scope="session")
def encoder_state(encoder_step_config, init):
    """See `encoder_step_config`."""
    return init(encoder_step_config)


@pytest.fixture(scope="session")
def encoder_step(encoder_step_config, train_step):
    """See `encoder_step_config`."""
    return train_step(encoder_step_config)


@pytest.fixture(scope="session")
def bag_step_config(make_step_config):
    """The model that compiles fastest."""
    return make_step_config()


@pytest.fixture(scope="session")
def bag_state(bag_step_config, init):
    """See `bag_step_config`."""
    return init(bag_step_config)


@pytest.fixture(scope="session")
def bag_step(bag_step_config, train_step):
    """See `bag_step_config`."""
    return train_step(bag_step_config)


@pytest.fixture(scope="session")
def uneven_rows():
    """int32 [8, 16]: rows of very different lengths, so that devices predict different numbers of tokens."""
    rows = np.random.default_rng(0).integers(5, VOCAB, (8, LENGTH)).astype(np.int32)
    for row, tokens in zip(rows, (16, 16, 2, 4, 16, 8, 0, 3), strict=True):
        row[tokens:] = PAD
    return rows
