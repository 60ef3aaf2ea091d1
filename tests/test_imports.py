"""What each mode imports before its own work: every package below takes a noticeable part of a second."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SLOW = {
    "IPython", "PIL", "aiohttp", "awkward", "clu", "datasets", "etils", "flax", "fsspec", "gcsfs", "gigatoken",
    "google", "h5py", "huggingface_hub", "jax", "keras", "matplotlib", "numpy", "optax", "orbax", "pandas", "plotly",
    "pyarrow", "safetensors", "scipy", "sentencepiece", "sklearn", "tensorboard", "tensorflow", "tensorstore",
    "tokenizers", "torch", "transformers",
}  # fmt: skip
MODEL = {"etils", "flax", "jax", "numpy", "optax", "safetensors"}
TEXT = {"aiohttp", "fsspec", "huggingface_hub", "pyarrow", "tokenizers"}
# google.protobuf is imported by Orbax. CLU's parameter overview does not import TensorFlow.
RUN = {"clu", "google", "orbax", "tensorstore"}
TEXT_MODES = ("fill_mask", "export", "probe", "score", "embed", "show_data", "check", "train_tokenizer")


@pytest.mark.parametrize(
    ("modules", "packages"),
    [
        ("main", set()),
        ("mlm.modes.explain", set()),
        ("mlm.modes.report", set()),
        *(
            pytest.param(modules, packages, marks=pytest.mark.slow)
            for modules, packages in (
                # Those that import the same packages, in one process.
                (", ".join(f"mlm.modes.{mode}" for mode in TEXT_MODES), MODEL | TEXT),
                ("mlm.downstream.probe", MODEL | TEXT | {"pandas", "scipy", "sklearn"}),
                ("mlm.modes.benchmark", MODEL | TEXT | RUN),
                # mlm/modes/train.py imports mlm/train.py after it has set up jax.distributed.
                ("mlm.modes.train, mlm.train", MODEL | TEXT | RUN),
                # TensorFlow without Keras, which would import pandas, scikit-learn and Matplotlib.
                (
                    "mlm.train, mlm.reporting.reporter",
                    MODEL | TEXT | RUN | {"h5py", "scipy", "tensorboard", "tensorflow"},
                ),
            )
        ),
    ],
)
def test_modes_import_what_they_need(modules, packages):
    code = f"import sys, main, {modules}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) & SLOW == packages


@pytest.mark.slow
def test_training_checks_everything_before_it_imports_tensorflow(tmp_path):
    """The last check of `build.build` is that of the sentences to predict."""
    code = f"""
import pathlib
import sys
from mlm.errors import UserError
from mlm.train import train_and_evaluate
from tests.tiny import tiny_settings, write_corpus
settings = tiny_settings(write_corpus(pathlib.Path({str(tmp_path)!r})))
settings = settings.replace({{"report.sentences": ("a cat " * 99 + "<mask>",)}})
try:
    train_and_evaluate(settings, {str(tmp_path / "run")!r})
except UserError as error:
    print(error)
print(*{{"clu.metric_writers", "datasets", "matplotlib", "tensorflow"}} & {{*sys.modules}})
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    message, imported = result.stdout.splitlines()
    assert message.startswith("sentence ")
    assert imported == ""
