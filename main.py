"""Trains a masked language model.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart

Any config key can be set from the command line: --config.optimizer.learning_rate=1e-4. --mode=explain describes each
key. Rerun the same command to resume after an interruption. Other modes:

    check           --config=FILE --workdir=DIR [--topology=v3-8] [--utilization=0.4]
                                                                      dry run: config, text, model, memory, time
    explain         [--config=FILE] [KEY]...                          meaning, unit and default of config keys
    benchmark       --config=FILE [--steps=N]                         time per step, by part
    train_tokenizer --config=FILE --output=DIR                        trains the config's tokenizer only
    show_data       --workdir=DIR --step=N [--sequences=S] [--process=P]   prints the sequences of step N
    export          --workdir=DIR [--step=N] [--average=K] [--dtype=T] [--sentence_transformers] [--output=DIR]
                                                                      a checkpoint as a Hugging Face model directory
    fill_mask       --workdir=DIR [--step=N] "A <mask>." ...          the five best tokens; or lines from standard input
    report          --workdir=DIR... [--output=FILE] [--reference=NAME]  the curves of runs as an HTML page
    probe           --workdir=DIR [--step=N] --task=FILE [--test=FILE] [--train_examples=N] [--seeds=N]
                    [--output=FILE]
                                                                      linear classifiers on frozen features
    score           --workdir=DIR [--step=N] [--output=FILE] FILE     pseudo-log-likelihoods, minimal pairs
    embed           --workdir=DIR [--step=N] [--layer=N] --output=FILE FILE   vectors of texts

check, show_data, export, fill_mask and report run on the CPU; set JAX_PLATFORMS=cuda or tpu to run fill_mask elsewhere.
probe, score and embed take --model=DIR_OR_HUB_NAME instead of --workdir, too. Exit codes: 0 done; 2 an error that one
line explains; 75 stopped on request, state saved; 130 stopped at once; 141 stdout was closed (SIGPIPE); anything
else is a failure. Examples:

    python main.py --mode=check --config=configs/roberta_base.py --workdir=runs/base --topology=v3-8
    python main.py --config=configs/quickstart.py --workdir=runs/mine --config.data.data_files='corpus/*.jsonl'
    python main.py --mode=explain optimizer data.packing
    python main.py --mode=fill_mask --workdir=runs/mine 'The cat sat on the <mask>.'
    python main.py --mode=report --workdir=runs/mine --workdir=runs/other
    python main.py --mode=probe --workdir=runs/mine --task=reviews.jsonl
"""

import dataclasses
import importlib
import os
import shlex
import sys

# Set before these libraries are imported: their own messages do not help a user of this program.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# gs:// paths without TensorFlow: mlm/run/gcs.py explains why.
os.environ.setdefault("EPATH_USE_TF", "0")
# Compiled programs are cached, so a second start compiles nothing. jax caches only those that take a second to compile,
# which would leave out about eighty small programs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mlm", "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Otherwise a resumed run differs in the last digits on a GPU, where cuDNN's gradient of attention has no fixed order of
# summation. The user's own flags come last and take precedence.
os.environ["XLA_FLAGS"] = "--xla_gpu_exclude_nondeterministic_ops=true " + os.environ.get("XLA_FLAGS", "")

from absl import app, flags
from ml_collections import config_flags

from configs import compat, default
from mlm import command_line
from mlm.errors import UserError
from mlm.run.workdir import KeyChanges, WorkDir
from mlm.settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Mode:
    """A value of --mode: `run` of mlm/modes/<mode>.py is called with the settings, the work directory and `options`.

    Attributes:
      options: the other arguments of `run`: flags, "arguments" (those that are not flags), "command", "key_changes"
        (how config keys have changed since earlier versions), "defaults" (the values of configs/default.py) and
        "defaults_file" (its path).
      config: whether --config is "required", "optional" or "refused".
      config_from_workdir: without --config, the run's own config is used.
      workdirs: the number of work directories: "none", "one" or "many"; "model": one, or --model instead.
      required: flags that must be given, with an example value.
      on_cpu: run on the CPU, since an accelerator may be busy with the run itself.
    """

    options: tuple[str, ...] = ()
    config: str = "required"
    config_from_workdir: bool = False
    workdirs: str = "one"
    required: tuple[tuple[str, str], ...] = ()
    on_cpu: bool = False


MODES = {
    "train": Mode(
        options=(
            "command",
            "overwrite",
            "multihost",
            "coordinator_address",
            "num_processes",
            "process_id",
            "key_changes",
        ),
    ),
    "check": Mode(options=("defaults", "topology", "utilization", "key_changes"), on_cpu=True),
    "explain": Mode(options=("arguments", "defaults", "defaults_file"), config="optional", workdirs="none"),
    "benchmark": Mode(options=("steps",), workdirs="none"),
    "train_tokenizer": Mode(options=("output",), workdirs="none", required=(("output", "tokenizers/mine"),)),
    "show_data": Mode(
        options=("step", "sequences", "process", "key_changes"),
        config="optional",
        config_from_workdir=True,
        required=(("step", "100"),),
        on_cpu=True,
    ),
    "export": Mode(
        options=("step", "average", "output", "dtype", "sentence_transformers"),
        config="refused",
        config_from_workdir=True,
        on_cpu=True,
    ),
    "fill_mask": Mode(
        options=("arguments", "step"),
        config="refused",
        config_from_workdir=True,
        on_cpu="JAX_PLATFORMS" not in os.environ,
    ),
    "report": Mode(
        options=("defaults", "output", "reference", "key_changes"), config="refused", workdirs="many", on_cpu=True
    ),
    "probe": Mode(
        options=("model", "step", "task", "test", "seeds", "train_examples", "output"),
        config="refused",
        config_from_workdir=True,
        workdirs="model",
        required=(("task", "reviews.jsonl"),),
    ),
    "score": Mode(
        options=("arguments", "model", "step", "output"), config="refused", config_from_workdir=True, workdirs="model"
    ),
    "embed": Mode(
        options=("arguments", "model", "step", "layer", "output"),
        config="refused",
        config_from_workdir=True,
        workdirs="model",
        required=(("output", "vectors.npy"),),
    ),
}

FLAGS = flags.FLAGS
command_line.accept_none()
config_flags.DEFINE_config_file("config", None, "the run's configuration, such as configs/quickstart.py")
flags.DEFINE_multi_string("workdir", None, "the run's directory; report: one of several runs to compare")
flags.DEFINE_enum("mode", "train", list(MODES), "what to do, see above")
flags.DEFINE_bool("overwrite", False, "train: start a new run after renaming the existing work directory")
flags.DEFINE_bool("multihost", None, "train: run as one of several processes; automatic on a TPU pod")
flags.DEFINE_string("coordinator_address", None, "multihost: HOST:PORT of process 0, if jax cannot find it")
flags.DEFINE_integer("num_processes", None, "multihost: number of processes, if jax cannot find it", lower_bound=1)
flags.DEFINE_integer("process_id", None, "multihost: number of this process, if jax cannot find it", lower_bound=0)
flags.DEFINE_integer(
    "step", None, "show_data: the step, from 1 on; export, fill_mask, probe, score, embed: the checkpoint"
)
flags.DEFINE_string("output", None, "export, train_tokenizer: the directory to write; others: the file")
flags.DEFINE_string("reference", None, "report: a stored curve to compare with, such as quickstart")
flags.DEFINE_integer("average", 1, "export: average this many checkpoints, the last of them --step", lower_bound=1)
flags.DEFINE_string("dtype", None, "export: of the weights; the default is the config's export.dtype")
flags.DEFINE_bool("sentence_transformers", None, "export: add that library's files; default: as the config says")
flags.DEFINE_integer("steps", 50, "benchmark: number of steps to time", lower_bound=1)
flags.DEFINE_integer("sequences", 4, "show_data: number of sequences to print", lower_bound=1)
flags.DEFINE_integer("process", 0, "show_data: the process whose sequences to print", lower_bound=0)
flags.DEFINE_string("topology", None, "check: the machine the run is meant for, such as v3-8, v5e-16 or h100-8")
flags.DEFINE_float("utilization", 0.4, "check: assumed fraction of the peak rate", lower_bound=1e-3, upper_bound=1)
flags.DEFINE_string("model", None, "probe, score, embed: a model directory or a name on the hub, instead of --workdir")
flags.DEFINE_string("task", None, "probe: a file with text and label, a GLUE task, or a dataset on the hub")
flags.DEFINE_string("test", None, "probe: a file with the examples to test on; default: a fifth of --task")
flags.DEFINE_integer("layer", None, "embed: the layer, 0 for the embeddings; default: the last")
flags.DEFINE_integer("train_examples", None, "probe: number of examples to learn from; default: all", lower_bound=1)
flags.DEFINE_integer("seeds", 5, "probe: number of splits and of models with random weights", lower_bound=1)


def main(argv: list[str]) -> None:
    """Checks the flags, then runs the mode."""
    mode = MODES[FLAGS.mode]
    if len(argv) > 1 and "arguments" not in mode.options:
        raise UserError(f"{argv[1]}: is not a flag; write flags as --NAME=VALUE")
    for option in sorted({option for other in MODES.values() for option in other.options} - set(mode.options)):
        if option in FLAGS and FLAGS[option].present:
            users = ", ".join(name for name, other in MODES.items() if option in other.options)
            raise UserError(f"--{option}: is for --mode={users}; --mode={FLAGS.mode} does not use it")
    for flag in ("workdir", "model", "output", "task", "test"):
        if FLAGS[flag].value in ("", [""]):
            raise UserError(f"--{flag}: is empty; was a variable of the shell not set?")
    workdirs = FLAGS.workdir or []
    has_model = mode.workdirs == "model" and FLAGS.model is not None
    if has_model and (workdirs or FLAGS.step is not None):
        raise UserError(f"--model={FLAGS.model}: excludes --workdir and --step; give one of them")
    if not workdirs and not has_model and mode.workdirs != "none":
        raise UserError("--workdir: missing; name the run's directory, such as --workdir=runs/quickstart")
    if len(workdirs) > 1 and mode.workdirs != "many":
        raise UserError(f"--workdir: was given {len(workdirs)} times; only --mode=report takes several runs")
    if FLAGS.config is not None and mode.config == "refused":
        raise UserError(f"--config: is not for --mode={FLAGS.mode}, which uses the config of the run; omit it")
    for flag, example in mode.required:
        if FLAGS[flag].value is None:
            raise UserError(f"--{flag}: missing; --mode={FLAGS.mode} needs it, such as --{flag}={example}")
    command_line.set_up_logging(verbose=FLAGS.verbosity > 0)
    if mode.on_cpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    key_changes = KeyChanges(
        compat.ADDED_KEYS, compat.RENAMED_KEYS, compat.REMOVED_KEYS, given=command_line.given_keys(sys.argv)
    )
    defaults = RunSettings.from_dict(default.get_config().to_dict())
    if FLAGS.config is not None:
        settings = command_line.read_config(FLAGS.config, command_line.config_path(sys.argv))
    elif mode.config_from_workdir and workdirs:
        settings = WorkDir(workdirs[0], key_changes=key_changes).read_settings()
    elif mode.config == "required":
        raise UserError(f"--config: missing; there are {', '.join(command_line.known_configs())}")
    else:
        settings = None
    command = shlex.join(["python", *sys.argv])
    values = FLAGS.flag_values_dict() | {"arguments": argv[1:], "command": command}
    values |= {"defaults": defaults.flat(), "defaults_file": default.__file__, "key_changes": key_changes}
    # Imported here: jax and TensorFlow take seconds, which an error on the command line need not wait for.
    module = importlib.import_module(f"mlm.modes.{FLAGS.mode}")
    workdir = workdirs if mode.workdirs == "many" else next(iter(workdirs), None)
    module.run(settings, workdir, **{name: values[name] for name in mode.options})


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; an error in it, or in the config file, is a UserError."""
    command_line.check_arguments(argv)
    path = command_line.config_path(argv)
    try:
        return FLAGS(argv)
    except flags.Error as error:
        raise command_line.flag_error(error, path) from None
    except BrokenPipeError:  # Raised by --help, which prints here.
        raise
    except Exception as error:
        raise command_line.config_file_error(error, path) from None


if __name__ == "__main__":
    command_line.run(lambda: app.run(main, flags_parser=parse_flags))
