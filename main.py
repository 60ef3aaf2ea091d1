"""Trains a masked language model.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart

Any key of the config can be set from the command line: --config.optimizer.learning_rate=1e-4. `configs/default.py`
explains them all. The same command, run again, goes on after an interruption. With --mode=show_data --step=N it prints
what update N of the run was trained on.
"""

import difflib
import glob
import itertools
import logging as python_logging
import os
import re
import shlex
import sys

# Before these libraries are imported: what they say about themselves is of no use to who trains a model.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import default
from mlm import interrupt
from mlm.errors import UserError
from mlm.workdir import flatten

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "the run's configuration, such as configs/quickstart.py")
flags.DEFINE_string("workdir", None, "the run's directory: checkpoints, metrics, model; made if it is not there")
flags.DEFINE_enum("mode", "train", ["train", "show_data"], "show_data prints what the update --step was trained on")
flags.DEFINE_bool("overwrite", False, "train: start anew, after moving what is in --workdir aside")
flags.DEFINE_bool("multihost", None, "train: one of several processes; by itself on a TPU pod")
flags.DEFINE_string("coordinator_address", None, "multihost: HOST:PORT of process 0, where jax cannot find it")
flags.DEFINE_integer("num_processes", None, "multihost: how many, where jax cannot find it", lower_bound=1)
flags.DEFINE_integer("process_id", None, "multihost: which one, where jax cannot find it", lower_bound=0)
flags.DEFINE_integer("step", None, "show_data: the update, from 1 on")
flags.DEFINE_integer("rows", 4, "show_data: how many of its rows to print", lower_bound=1)
flags.DEFINE_integer("process", 0, "show_data: whose rows, in a run of several processes", lower_bound=0)


def main(argv: list[str]) -> None:
    """Does what --mode says."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag; flags begin with --, their values follow after =")
    if not FLAGS.workdir:
        raise UserError("no --workdir; name the run's directory, such as --workdir=runs/quickstart")
    if FLAGS.mode == "show_data" and FLAGS.step is None:
        raise UserError("--mode=show_data needs the update to show, such as --step=100")
    check_keys(FLAGS.config)
    set_up_log(verbose=FLAGS.verbosity > 0)

    if FLAGS.mode == "show_data":
        # Before jax is imported: a device may be busy with the run itself.
        os.environ["JAX_PLATFORMS"] = "cpu"

    # These take seconds to import; a mistake on the command line should not.
    import jax

    if not jax.config.jax_compilation_cache_dir:
        # The second start of the same run compiles nothing.
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "mlm", "jax"))

    if FLAGS.mode == "show_data":
        from mlm.show_data import show_data

        show_data(FLAGS.config, FLAGS.workdir, step=FLAGS.step, rows=FLAGS.rows, process_index=FLAGS.process)
    else:
        train()


def train() -> None:
    """--mode=train, alone or as one of several processes."""
    from mlm import hosts

    if FLAGS.multihost or (FLAGS.multihost is None and hosts.on_tpu_pod()):
        hosts.start(
            coordinator_address=FLAGS.coordinator_address,
            num_processes=FLAGS.num_processes,
            process_id=FLAGS.process_id,
        )
    from mlm.train import train_and_evaluate

    # After jax.distributed, which has a handler of its own.
    with interrupt.Interrupt() as asked, hosts.end_together():
        train_and_evaluate(
            FLAGS.config,
            FLAGS.workdir,
            command=shlex.join(["python", *sys.argv]),
            interrupt=asked,
            overwrite=FLAGS.overwrite,
        )


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake in it, or in the config file, is a UserError."""
    # --config=FILE or --config FILE
    path = next((value for flag, value in itertools.pairwise([*argv, None]) if re.match(r"--?config$", flag)), None)
    path = next((arg.split("=", 1)[1] for arg in argv if re.match(r"--?config=", arg)), path)
    if path is not None:
        check_config_file(path)
    for arg in argv[1:]:
        if match := re.match(r"--?(no)?config\.([^=]+)", arg):
            _check_key(match[2], f"--config.{match[2]}")
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    except Exception as error:
        # The config file is the user's own code: whatever it raises is told with the file's name.
        last_line = str(error).strip().splitlines()[-1] if str(error).strip() else ""
        raise UserError(f"--config={path}: {type(error).__name__}: {last_line}") from None
    if path is None:
        raise UserError(f"no --config=FILE; there are {', '.join(_configs())}")
    return rest


def _configs() -> list[str]:
    here = os.path.dirname(os.path.abspath(__file__))
    names = glob.glob("configs/*.py", root_dir=here)
    return sorted(set(names) - {"configs/__init__.py", "configs/default.py"})


def check_config_file(path: str) -> None:
    """Raises UserError unless `path` is a file."""
    if not os.path.isfile(path.split(":")[0]):
        nearest = difflib.get_close_matches(path, _configs(), n=1, cutoff=0.0)[0]
        raise UserError(f"--config={path}: there is no such file; did you mean {nearest}?")


def check_keys(config: ConfigDict) -> None:
    """Raises UserError unless the config has the keys of `configs/default.py`, no more and no fewer."""
    if not isinstance(config, ConfigDict):
        raise UserError(f"the config's get_config() gives a {type(config).__name__}, not a ConfigDict")
    keys = flatten(config.to_dict()).keys()
    for key in keys:
        _check_key(key, key)
    if missing := sorted(flatten(default.get_config().to_dict()).keys() - keys):
        raise UserError(f"the config has no {', '.join(missing)}; let its get_config() start from configs/default.py")


def _check_key(key: str, shown: str) -> None:
    known = flatten(default.get_config().to_dict())
    if any(name.startswith(f"{key}.") for name in known):
        members = ", ".join(name for name in known if name.startswith(f"{key}."))
        raise UserError(f"{shown} is a group of keys; set one of them: {members}")
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise UserError(f"{shown}: there is no such key; did you mean {nearest}? (see configs/default.py)")


def set_up_log(*, verbose: bool) -> None:
    """Plain lines of our own, warnings of everyone's; all there is with --verbosity=1.

    CLU's log writer repeats in its own form what our progress lines say, and Orbax tells its every step.
    """
    logging.set_verbosity(logging.DEBUG if verbose else logging.INFO)
    if verbose:
        return
    here = os.path.dirname(os.path.abspath(__file__))
    ours = (os.path.join(here, "mlm") + os.sep, os.path.join(here, "main.py"))

    def is_ours(record: python_logging.LogRecord) -> bool:
        if f"{os.sep}orbax{os.sep}" in record.pathname:
            return False  # It logs a traceback for each of its threads; mlm/checkpoint.py tells what there is to tell.
        return record.levelno >= python_logging.WARNING or record.pathname.startswith(ours)

    handler = logging.get_absl_handler()
    handler.addFilter(is_ours)
    handler.setFormatter(python_logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))


def run() -> None:
    """The command line's entry: a user's mistake is one line and exit code 2, a stop on request exit code 75."""
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except interrupt.Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on", file=sys.stderr)
        sys.exit(interrupt.EXIT_INTERRUPTED)
    except KeyboardInterrupt:  # Before training, or in another mode.
        sys.exit(interrupt.EXIT_AT_ONCE)


if __name__ == "__main__":
    run()
