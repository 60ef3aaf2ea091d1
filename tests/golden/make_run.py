"""Makes the stored run of tests/test_formats.py, in tests/golden/run_format_N for the current format version N:

    python tests/golden/make_run.py

The run is stopped after 4 steps, in the middle of a shuffle window. If you raise a format version, in
mlm/run/workdir.py, mlm/run/checkpoint.py or mlm/data/mixture.py, make a new directory and keep the earlier ones: all
later versions of the code must resume them.
"""

import os
import shutil
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO))

from mlm.run.workdir import FORMAT_VERSION  # noqa: E402
from mlm.train import train_and_evaluate  # noqa: E402
from tests.tiny import settings_of, tiny_config, write_corpus  # noqa: E402


def main() -> None:
    """Writes the corpus and the run."""
    directory = REPO / "tests" / "golden" / f"run_format_{FORMAT_VERSION}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    # The run names its files relative to this directory, so that it can be copied.
    os.chdir(directory)
    write_corpus(Path(), files=2, documents=150)
    config = tiny_config("part-*.jsonl")
    config.num_train_steps = 4
    config.logging_steps = 2
    config.data.num_eval_samples = 8
    config.tokenizer.algorithm = "wordpiece"
    config.tokenizer.vocab_size = 100
    config.model.overrides.hidden_size = 8
    config.model.overrides.num_hidden_layers = 1
    config.model.overrides.intermediate_size = 16
    config.model.overrides.hidden_dropout_prob = 0.1
    train_and_evaluate(settings_of(config), "run")
    # An earlier version of the code may have been stopped before its first export.
    shutil.rmtree("run/model")
    for path in (*Path("run").glob("events.*"), Path("run/.lock")):
        path.unlink()


if __name__ == "__main__":
    main()
