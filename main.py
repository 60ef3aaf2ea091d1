"""Trains a masked language model.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart

Keys of the config can be set from the command line: --config.optimizer.learning_rate=1e-4. `configs/default.py`
explains them all. Run the same command again to go on after an interruption.
"""

import difflib
import os
import re
import sys
import warnings

# Before anything imports these libraries: what they say about themselves is of no use to the user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_dict import ConfigDict

from mlm.errors import UserError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The run's configuration, such as configs/quickstart.py.")
flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, model. Made if it is not there.")


def main(argv: list[str]) -> None:
    """Runs one training run."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag; flags begin with --, values follow after =")
    if FLAGS.config is None:
        raise UserError("no --config; try --config=configs/quickstart.py")
    if not FLAGS.workdir:
        raise UserError("no --workdir; name the directory of the run, such as --workdir=runs/quickstart")
    logging.get_absl_handler().setFormatter(logging.PythonFormatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logging.set_verbosity(max(FLAGS.verbosity, logging.INFO) if FLAGS["verbosity"].present else logging.INFO)

    # These take seconds to import; a mistake on the command line should not.
    from mlm.train import train_and_evaluate

    train_and_evaluate(FLAGS.config, FLAGS.workdir)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; every mistake in it is a UserError."""
    path = next((arg.split("=", 1)[1] for arg in argv if re.match(r"--?config=", arg)), None)

    try:
        return FLAGS(argv)
    except (AttributeError, KeyError) as error:
        raise UserError(str(error)) from None
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from None


def run() -> None:
    """The command line's entry: a user's mistake is one line and exit code 2."""
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
