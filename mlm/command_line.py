"""The command line around main.py's flags: clear errors, log lines, exit codes."""

import difflib
import glob
import io
import itertools
import logging as python_logging
import os
import re
import select
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from mlm import stages
from mlm.errors import UserError
from mlm.run import signals
from mlm.settings import RunSettings, check_key

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A shell's exit code for a process that SIGPIPE ended.
_EXIT_SIGPIPE = 141
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False"}


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


def accept_none() -> None:
    """Makes None reset any optional config key on the command line; mlm/settings.py refuses it for the others."""
    for value_type, parser in (
        (bool, flags.BooleanParser()),
        (int, flags.IntegerParser()),
        (float, flags.FloatParser()),
        (str, flags.ArgumentParser()),
    ):
        config_flags.register_flag_parser_for_type(value_type, _OptionalParser(parser))


def config_path(argv: Sequence[str]) -> str | None:
    """Returns the value of `--config=FILE` or `--config FILE`; None if the flag is missing."""
    for argument, following in itertools.pairwise([*argv, None]):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument or "", re.DOTALL):
            return match[1] if match[1] is not None else following
    return None


def given_keys(argv: Sequence[str]) -> frozenset[str]:
    """Returns the config keys that the command line sets."""
    return frozenset(match[1] for match in (re.match(r"--?(?:no)?config\.([^=]+)", item) for item in argv) if match)


def known_configs() -> list[str]:
    """Returns the config files of this repository, such as "configs/quickstart.py"."""
    names = glob.glob("configs/*.py", root_dir=_ROOT)
    return sorted(name for name in names if not name.endswith(("/__init__.py", "/default.py", "/compat.py")))


def check_arguments(argv: Sequence[str]) -> None:
    """Checks what absl would report less clearly: the config file's path and the names of overridden keys.

    Raises:
      UserError: the file does not exist, or a key is unknown.
    """
    path = config_path(argv)
    if path is not None and not os.path.isfile(path.split(":")[0]):
        nearest = difflib.get_close_matches(path, known_configs(), n=1, cutoff=0.0)[0]
        raise UserError(f"--config={path}: no such file; did you mean {nearest}?")
    for key in sorted(given_keys(argv)):
        check_key(key, shown=f"--config.{key}")
    first = next((item for item in argv if re.match(r"--?(?:no)?config[.=]|--?config$", item)), "")
    if path is not None and re.match(r"--?(?:no)?config\.", first):
        raise UserError(f"{first}: comes before --config={path}; write --config first")


def flag_error(error: Exception, path: str | None) -> UserError:
    """Returns the error of a flag's value; `path` is the config file."""
    message = str(error)
    if "Traceback (most recent call last)" in message:  # ml_collections reports a config file's ValueError this way.
        return _config_file_error(message.strip().splitlines()[-1], path)
    if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL):
        declared = _declared_type(match[1])
        if declared in _TYPE_NAMES:
            return UserError(f"--config.{match[1]}={match[2]}: must be {_TYPE_NAMES[declared]}")
    message = " ".join(message.split())
    if match := re.fullmatch(r"Unknown command line flag '(\w+)'\.?(?: Did you mean: (\w+).*)?", message):
        return UserError(f"--{match[1]}: unknown flag" + (f"; did you mean --{match[2]}?" if match[2] else ""))
    if match := re.fullmatch(r"flag (--\w+=.*): value should be one of <(.*)>", message):
        return UserError(f"{match[1]}: must be one of {match[2].replace('|', ', ')}")
    if match := re.match(r"flag (--\w+=.*): (invalid literal for int|could not convert string to float)", message):
        return UserError(f"{match[1]}: must be {_TYPE_NAMES[int if 'int' in match[2] else float]}")
    return UserError(message.removeprefix("flag "))


def config_file_error(error: Exception, path: str | None) -> UserError:
    """Returns the error that executing the config file raised, which is the user's own code."""
    message = str(error.args[0] if error.args else "").strip("'")  # A KeyError quotes its message.
    return _config_file_error(f"{type(error).__name__}: {message}", path)


def _config_file_error(message: str, path: str | None) -> UserError:
    if "no attribute 'get_config" in message:
        return UserError(f"--config={path}: has no function get_config(); write one as in configs/quickstart.py")
    if "get_config() takes 0 positional arguments" in message:
        return UserError(f"--config={path}: get_config() takes no argument; remove the colon and what follows it")
    # ml_collections lists all fields before it names the one that was probably meant.
    message = re.sub(r" Other fields present: .*?(?=Did you mean|\Z)", " ", message, flags=re.DOTALL)
    return UserError(f"--config={path}: {' '.join(message.split())}")


def _declared_type(key: str) -> type | None:
    """Returns the type of a config key in `RunSettings`, without None."""
    group: type = RunSettings
    for name in key.split("."):
        group = typing.get_type_hints(group)[name]
    return next((kind for kind in typing.get_args(group) if kind is not type(None)), group)


def read_config(config: Any, path: str | None) -> RunSettings:
    """Converts the return value of the config file's get_config() to settings."""
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(
            f"--config={path}: get_config() returns a {kind}, not a ConfigDict; start from configs/default.py"
        )
    settings = RunSettings.from_dict(config.to_dict())
    stages.check(settings)
    return settings


def set_up_logging(*, verbose: bool) -> None:
    """Formats log lines as "12:34:56  message"; shows other packages' messages from warnings up, all if `verbose`.

    CLU's ReportProgress repeats the progress lines in its own format, and Orbax logs a line for each of its stages.
    """
    logging.set_verbosity(logging.DEBUG if verbose else logging.INFO)
    if verbose:
        return
    ours = (os.path.join(_ROOT, "mlm") + os.sep, os.path.join(_ROOT, "main.py"))

    def is_shown(record: python_logging.LogRecord) -> bool:
        if f"{os.sep}orbax{os.sep}" in record.pathname:
            return False  # It logs a traceback for each of its threads; mlm/run/checkpoint.py reports what matters.
        return record.levelno >= python_logging.WARNING or record.pathname.startswith(ours)

    handler = logging.get_absl_handler()
    handler.addFilter(is_shown)
    handler.setFormatter(python_logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))


def run(main: Callable[[], None]) -> None:
    """Runs `main` and ends the process: a user's error is one line and exit code 2, a requested stop exit code 75."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Text may have characters that the terminal's encoding lacks.
            stream.reconfigure(errors="replace")
    was_interrupted = False

    def interrupt(number: int, frame: types.FrameType | None) -> NoReturn:
        nonlocal was_interrupted
        was_interrupted = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # A shell lets background jobs ignore SIGINT.
        signal.signal(signal.SIGINT, interrupt)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # Raises BrokenPipeError here, where it is handled.
    except UserError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except signals.Interrupted as interrupted:
        sys.exit(_fail(f"{interrupted}; rerun the same command to resume", signals.EXIT_INTERRUPTED))
    except KeyboardInterrupt:  # Before training, or in another mode.
        sys.exit(signals.EXIT_AT_ONCE)
    except BrokenPipeError:
        # The reader of stdout is gone, as with `| head`.
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):
            raise  # It was another pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit.
        sys.exit(_EXIT_SIGPIPE)
    except Exception:
        if not was_interrupted:
            raise
        # Native code that calls Python, such as gigatoken's, makes its own error of a KeyboardInterrupt.
        sys.exit(signals.EXIT_AT_ONCE)


def _fail(message: str, exit_code: int) -> int:
    print(message, file=sys.stderr)
    return exit_code
