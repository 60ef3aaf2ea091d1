"""Trains a masked language model.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart

Any key of the config can be set from the command line: --config.optimizer.learning_rate=1e-4. --mode=explain says what
each means, as configs/default.py does. The same command, run again, goes on after an interruption. Other modes:

    check           --config=FILE --workdir=DIR [--topology=v3-8]     looks through a run before it begins
    explain         [--config=FILE] [KEY]...                          what a config key means, its unit and default
    benchmark       --config=FILE [--updates=N]                       where the time of an update goes
    train_tokenizer --config=FILE --output=DIR                        trains the config's tokenizer and nothing else
    show_data       --workdir=DIR --step=N [--rows=R] [--process=P]   prints what update N of the run was trained on
    export          --workdir=DIR [--step=N] [--average=K] [--dtype=T] [--output=DIR]
                                                                      a checkpoint as a Hugging Face model directory
    fill_mask       --workdir=DIR [--step=N] "A <mask>." ...          the five best words; or lines from standard input
    report          --workdir=DIR [--workdir=DIR]... [--output=FILE]  the curves of runs as a page, report.html

The last four need no --config: the work directory has it. They run on the CPU, fill_mask elsewhere with the environment
variable JAX_PLATFORMS=cuda or tpu. Exit codes: 0 done, 2 a mistake of yours (one line says which), 75 stopped on
request (the same command goes on), 130 stopped at once, 141 nobody reads what it prints, anything else a failure.
For example:

    python main.py --mode=check --config=configs/roberta_base.py --workdir=runs/base --topology=v3-8
    python main.py --config=configs/quickstart.py --workdir=runs/mine --config.data.data_files='corpus/*.jsonl'
    python main.py --mode=explain optimizer data.packing
    python main.py --mode=fill_mask --workdir=runs/mine 'The cat sat on the <mask>.'
    python main.py --mode=report --workdir=runs/mine --workdir=runs/other
"""

import difflib
import functools
import glob
import itertools
import logging as python_logging
import operator
import os
import re
import select
import shlex
import sys
from typing import Any

# Before these libraries are imported: what they say about themselves is of no use to who trains a model.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# gs:// without TensorFlow: mlm/run/gcs.py says why.
os.environ.setdefault("EPATH_USE_TF", "0")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import default
from mlm.errors import UserError
from mlm.modes.explain import explain
from mlm.run import signals
from mlm.run.workdir import WorkDir, flatten

# As a shell says of what SIGPIPE ended.
_EXIT_UNREAD = 141


class _OptionalParser(flags.ArgumentParser):
    """Parses "None" as None, and everything else as `parser` does."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: str) -> Any:
        """Returns the value."""
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        """Returns the type that --help shows."""
        return self._parser.flag_type()


# None resets any optional key of the config; mlm/settings.py refuses it for the others.
for _type, _parser in (
    (bool, flags.BooleanParser()),
    (int, flags.IntegerParser()),
    (float, flags.FloatParser()),
    (str, flags.ArgumentParser()),
):
    config_flags.register_flag_parser_for_type(_type, _OptionalParser(_parser))

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "the run's configuration, such as configs/quickstart.py")
flags.DEFINE_multi_string("workdir", None, "the run's directory; report: one of several runs to compare")
MODES = ("train", "benchmark", "check", "explain", "train_tokenizer", "show_data", "export", "fill_mask", "report")
# They find the config in the work directory.
MODES_WITH_WORKDIR_CONFIG = ("show_data", "export", "fill_mask", "report")
# Words that are no flags: sentences, keys.
MODES_WITH_ARGS = ("fill_mask", "explain")
flags.DEFINE_enum("mode", "train", MODES, "what to do, as told above")
flags.DEFINE_bool("overwrite", False, "train: start anew, after moving what is in --workdir aside")
flags.DEFINE_bool("multihost", None, "train: one of several processes; by itself on a TPU pod")
flags.DEFINE_string("coordinator_address", None, "multihost: HOST:PORT of process 0, where jax cannot find it")
flags.DEFINE_integer("num_processes", None, "multihost: how many, where jax cannot find it", lower_bound=1)
flags.DEFINE_integer("process_id", None, "multihost: which one, where jax cannot find it", lower_bound=0)
flags.DEFINE_integer("step", None, "show_data: the update, from 1 on; export, fill_mask: the checkpoint")
flags.DEFINE_string("output", None, "export, train_tokenizer: the directory; report: the page")
flags.DEFINE_integer("average", 1, "export: the mean of so many checkpoints, the last of them --step", lower_bound=1)
flags.DEFINE_string("dtype", None, "export: of the weights, else the run's export.dtype")
flags.DEFINE_integer("updates", 50, "benchmark: how many to time", lower_bound=1)
flags.DEFINE_integer("rows", 4, "show_data: how many of its rows to print", lower_bound=1)
flags.DEFINE_integer("process", 0, "show_data: whose rows, in a run of several processes", lower_bound=0)
flags.DEFINE_string("topology", None, "check: the machine the run is meant for, such as v3-8, v5e-16 or h100-8")
flags.DEFINE_float("utilization", 0.4, "check: the share of its peak rate to count on", lower_bound=1e-3, upper_bound=1)


def main(argv: list[str]) -> None:
    """Does what --mode says."""
    if len(argv) > 1 and FLAGS.mode not in MODES_WITH_ARGS:
        raise UserError(f"{argv[1]!r} is not a flag; flags begin with --, their values follow after =")
    if not FLAGS.workdir and FLAGS.mode not in ("train_tokenizer", "explain", "benchmark"):
        raise UserError("no --workdir; name the run's directory, such as --workdir=runs/quickstart")
    if FLAGS.mode != "report" and len(FLAGS.workdir or ()) > 1:
        raise UserError(f"--workdir is there {len(FLAGS.workdir)} times; only --mode=report takes several runs")
    if FLAGS.mode == "train_tokenizer" and not FLAGS.output:
        raise UserError("--mode=train_tokenizer needs a directory to write to, such as --output=tokenizers/mine")
    if FLAGS.mode == "show_data" and FLAGS.step is None:
        raise UserError("--mode=show_data needs the update to show, such as --step=100")
    set_up_log(verbose=FLAGS.verbosity > 0)
    defaults = flatten(default.get_config().to_dict())
    if FLAGS.mode == "report":
        from mlm.modes.report import write_report

        write_report(FLAGS.workdir, FLAGS.output or "report.html", defaults=defaults)
        return
    if FLAGS.mode == "explain":
        explain_keys(argv[1:], defaults)
        return
    workdir = FLAGS.workdir[0] if FLAGS.workdir else None
    config = config_of_run(workdir) if FLAGS.config is None else FLAGS.config
    check_keys(config)

    if FLAGS.mode in (*MODES_WITH_WORKDIR_CONFIG, "check") and not (
        FLAGS.mode == "fill_mask" and "JAX_PLATFORMS" in os.environ
    ):
        # Before jax is imported: a device may be busy with the run itself.
        os.environ["JAX_PLATFORMS"] = "cpu"

    if FLAGS.mode == "train":
        signals.exit_on_signal()
    # These take seconds to import; a mistake on the command line should not.
    import jax

    if not jax.config.jax_compilation_cache_dir:
        # The second start of the same run compiles nothing.
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "mlm", "jax"))
        # jax's own limit, a second, leaves out some eighty programs of one operation, as a save has for every shape.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

    if FLAGS.mode == "show_data":
        from mlm.modes.show_data import show_data

        show_data(config, workdir, step=FLAGS.step, rows=FLAGS.rows, process_index=FLAGS.process)
    elif FLAGS.mode == "check":
        from mlm.hardware import parse_topology
        from mlm.modes.check import check

        machine = parse_topology(FLAGS.topology) if FLAGS.topology else None
        problems = check(config, workdir, defaults=defaults, machine=machine, utilization=FLAGS.utilization)
        if problems:
            raise UserError("; ".join(["not ready", *problems]))
        print("\nready")
    elif FLAGS.mode == "train_tokenizer":
        from mlm import build

        build.train_tokenizer(config, FLAGS.output)
    elif FLAGS.mode == "benchmark":
        from mlm.modes.benchmark import benchmark

        benchmark(config, updates=FLAGS.updates)
    elif FLAGS.mode == "export":
        from mlm import load

        options = {"step": FLAGS.step, "average": FLAGS.average, "output": FLAGS.output, "dtype": FLAGS.dtype}
        load.export_checkpoint(config, workdir, **options)
    elif FLAGS.mode == "fill_mask":
        from mlm import load

        load.fill_sentences(config, workdir, argv[1:], step=FLAGS.step)
    else:
        train()


def explain_keys(names: list[str], defaults: dict[str, Any]) -> None:
    """--mode=explain: prints what the keys mean; with a config, its own values, too."""
    values = None
    if FLAGS.config is not None:
        check_keys(FLAGS.config)
        values = flatten(FLAGS.config.to_dict())
    with open(default.__file__, encoding="utf-8") as file:
        print(explain(names, file.read(), defaults=defaults, values=values))


def train() -> None:
    """--mode=train, alone or as one of several processes."""
    from mlm.run import multihost

    if FLAGS.multihost or (FLAGS.multihost is None and multihost.on_tpu_pod()):
        multihost.start(
            coordinator_address=FLAGS.coordinator_address,
            num_processes=FLAGS.num_processes,
            process_id=FLAGS.process_id,
        )
    from mlm.train import train_and_evaluate

    # After jax.distributed, which has a handler of its own.
    with signals.Interrupt() as asked, multihost.propagate_failures():
        train_and_evaluate(
            FLAGS.config,
            FLAGS.workdir[0],
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
        raise UserError(_flag_error_message(str(error), path)) from None
    except BrokenPipeError:  # Of --help, which is printed here.
        raise
    except Exception as error:
        # The config file is the user's own code: whatever it raises is told with the file's name.
        told = str(error.args[0] if error.args else "").strip("'")  # A KeyError's own is in quotes.
        raise UserError(_of_config_file(f"{type(error).__name__}: {told}", path)) from None
    if path is None and FLAGS.mode not in (*MODES_WITH_WORKDIR_CONFIG, "explain"):
        raise UserError(f"no --config=FILE; there are {', '.join(_configs())}")
    return rest


def _flag_error_message(told: str, path: str | None) -> str:
    """What the flags' parser says, in this program's words where it speaks of Python's."""
    if "Traceback (most recent call last)" in told:  # ml_collections' way to tell of a config file's ValueError.
        return _of_config_file(told.strip().splitlines()[-1], path)
    if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", told, re.DOTALL):
        *groups, name = match[1].split(".")
        group = functools.reduce(operator.getitem, groups, default.get_config())
        kinds = {int: "a whole number", float: "a number", bool: "True or False"}
        if (kind := group.get_type(name)) in kinds:
            return f"--config.{match[1]}={match[2]} must be {kinds[kind]}"
    return " ".join(told.split())


def _of_config_file(told: str, path: str | None) -> str:
    if "no attribute 'get_config" in told:
        return f"--config={path}: there is no function get_config() in it; write one as configs/quickstart.py has it"
    if "get_config() takes 0 positional arguments" in told:
        return f"--config={path}: get_config() takes no argument; remove the colon and what follows it"
    # ml_collections lists all keys that there are before it names the one that was meant.
    told = re.sub(r" Other fields present: .*?(?=Did you mean|\Z)", " ", told, flags=re.DOTALL)
    return f"--config={path}: {' '.join(told.split())}"


def _configs() -> list[str]:
    here = os.path.dirname(os.path.abspath(__file__))
    names = glob.glob("configs/*.py", root_dir=here)
    return sorted(set(names) - {"configs/__init__.py", "configs/default.py"})


def check_config_file(path: str) -> None:
    """Raises UserError unless `path` is a file."""
    if not os.path.isfile(path.split(":")[0]):
        nearest = difflib.get_close_matches(path, _configs(), n=1, cutoff=0.0)[0]
        raise UserError(f"--config={path}: there is no such file; did you mean {nearest}?")


def config_of_run(workdir: str) -> ConfigDict:
    """The config of the run in a work directory; keys that are younger than the run have their defaults."""
    place = WorkDir(workdir)
    if not os.path.exists(place.config):
        raise UserError(f"--workdir={workdir}: there is no run; name the work directory of one")
    keys = flatten(default.get_config().to_dict()) | flatten(place.read_config())
    config = ConfigDict()
    for key, value in keys.items():
        group = config
        *groups, name = key.split(".")
        for part in groups:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        group[name] = value
    return config


def check_keys(config: ConfigDict) -> None:
    """Raises UserError unless the config has the keys of `configs/default.py`, no more and no fewer."""
    if not isinstance(config, ConfigDict):
        raise UserError(f"the config's get_config() gives a {type(config).__name__}, not a ConfigDict")
    keys = flatten(config.to_dict()).keys()
    for key in keys:
        _check_key(key, key)
    if missing := sorted(flatten(default.get_config().to_dict()).keys() - keys):
        more = f" and {len(missing) - 4} more keys" if len(missing) > 4 else ""
        raise UserError(
            f"the config has no {', '.join(missing[:4])}{more}; let its get_config() start from configs/default.py"
        )


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
            return False  # It logs a traceback for each of its threads; mlm/run/checkpoint.py reports what matters.
        return record.levelno >= python_logging.WARNING or record.pathname.startswith(ours)

    handler = logging.get_absl_handler()
    handler.addFilter(is_ours)
    handler.setFormatter(python_logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))


def run() -> None:
    """The command line's entry: a user's mistake is one line and exit code 2, a stop on request exit code 75.

    Where the reader of what is printed has gone, as `head` does, it ends quietly.
    """
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()  # Else Python finds out too late for us to hear of it.
    except BrokenPipeError:
        out = select.poll()
        out.register(sys.stdout.fileno(), 0)
        if not out.poll(0):
            raise  # Another pipe's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # For what Python still has to print.
        sys.exit(_EXIT_UNREAD)


def _run() -> None:
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except signals.Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on", file=sys.stderr)
        sys.exit(signals.EXIT_INTERRUPTED)
    except KeyboardInterrupt:  # Before training, or in another mode.
        sys.exit(signals.EXIT_AT_ONCE)


if __name__ == "__main__":
    run()
