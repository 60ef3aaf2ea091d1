"""Python programs in processes that need not import the libraries: forks of a server, which has imported them.

`run` and `Process` take the arguments of `subprocess.run` and `subprocess.Popen`. The command is [sys.executable,
FILE, ARGUMENT...] or [sys.executable, "-c", CODE, ARGUMENT...]. The process is a child of this one, with its own
environment, working directory, standard streams, signal handlers and exit code. A program that is not in this
repository imports the code beside it, as Python does. It differs from a new interpreter in six ways: the libraries are
imported, so what an import needs or prints is not seen; all processes of one server have the same hash seed; the peak
memory that the system reports starts at that of the server; curves are saved as an empty file, for drawing takes as
long as a tiny run; programs of steps are those of saved_programs.py; and at its end modules are not deleted one by one.
Tests of these start an interpreter.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.abc
import importlib.util
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
# What main.py imports, and the parts that these libraries import when they are first used.
LIBRARIES = (
    "absl.app",
    "aiohttp",
    "awkward",
    "clu.parameter_overview",
    "datasets",
    "flax.linen",
    "gigatoken",
    "jax",
    "jax.experimental.topologies",
    "jaxlib.mlir.dialects.builtin",
    "jaxlib.mlir.dialects.mhlo",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "ml_collections.config_flags",
    "optax",
    "orbax.checkpoint",
    "pyarrow.csv",
    "pyarrow.parquet",
    "safetensors.numpy",
    "tensorboard.plugins.custom_scalar.summary",
    "tensorboard.summary",
    "tensorflow.compat.v1",
    "tokenizers.trainers",
    "tqdm",
    "transformers.models.roberta.tokenization_roberta",
)
# What a run imports of this repository; the first imports TensorFlow without Keras.
OWN = ("mlm.reporting.reporter", "mlm.train", "mlm.modes.train", "configs.default", "tests.saved_programs")
# Libraries read these variables when they are imported: a process with other values needs another server.
_READ_BY_IMPORTS = ("EPATH_", "GCSFS_", "HF_", "HUGGINGFACE_", "PYTHON", "TF_", "TOKENIZERS_", "TRANSFORMERS_")
_PR_SET_CHILD_SUBREAPER = 36


# ---------------------------------------------------------------------------------------------------------- the tests


class Process(subprocess.Popen):
    """A `subprocess.Popen` of a Python program that is a fork of a server."""

    def _execute_child(self, *args: Any, **kwargs: Any) -> None:
        """Replaces the method that forks and executes."""
        options = inspect.signature(super()._execute_child).bind(*args, **kwargs).arguments
        command = [os.fspath(word) for word in options["args"]]
        if command[0] != sys.executable:
            raise ValueError(f"{command[0]} is not {sys.executable}")
        env = dict(os.environ if options["env"] is None else options["env"])
        request = {
            "words": command[1:],
            "cwd": os.fspath(options["cwd"] or os.getcwd()),
            "env": env,
            "start_new_session": options["start_new_session"],
        }
        ends = (options["p2cread"], options["c2pwrite"], options["errwrite"])
        streams = [own if end == -1 else end for own, end in enumerate(ends)]
        self.pid = _server_for(env).fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(
            *(options[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )


def run(command: Sequence[str], *, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess:
    """Runs a program to its end and returns its exit code, stdout and stderr, as text.

    Args:
      command: of `Process`.
      timeout: seconds.
      **options: of `Process`, and `input`, the text of stdin.
    """
    text = options.pop("input", None)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams["stdin"] = None if text is None else subprocess.PIPE
    with Process(command, text=True, **streams | options) as process:
        try:
            stdout, stderr = process.communicate(text, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def xla_flags(devices: int) -> str:
    """The tests' XLA_FLAGS, for processes with this many devices."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


class _Server:
    """A server for processes with these values of the variables that imports read."""

    def __init__(self, variables: Mapping[str, str]):
        self._socket, other = socket.socketpair()
        kept = {name: value for name, value in os.environ.items() if not _is_read_by_imports(name)}
        # A value that a process gives jax replaces a default.
        env = {name: value for name, value in kept.items() if not name.startswith("JAX_")} | dict(variables)
        command = [sys.executable, __file__, str(other.fileno())]
        # In its own session, a Ctrl-C does not reach it; it ends when the socket closes.
        options = {"pass_fds": [other.fileno()], "start_new_session": True, "stdin": subprocess.DEVNULL}
        # Pipes: the streams of a process could not be reconfigured if those that it inherits had a position.
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=REPO, env=env, **options)
        other.close()

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """Starts a process; returns its id."""
        body = json.dumps(request).encode()
        with _adopting_orphans():
            socket.send_fds(self._socket, [len(body).to_bytes(8, "big")], streams)
            self._socket.sendall(body)
            if not (answer := self._socket.recv(8)):
                _, errors = self._process.communicate()
                raise RuntimeError(f"the fork server has ended: {errors.decode()}")
        return int.from_bytes(answer, "big")


def _is_read_by_imports(name: str) -> bool:
    # Python's own search path is set in each process.
    return name.startswith(_READ_BY_IMPORTS) and name != "PYTHONPATH"


def _server_for(env: Mapping[str, str]) -> _Server:
    return _start_server(tuple(sorted((name, env[name]) for name in env if _is_read_by_imports(name))))


@functools.cache
def _start_server(variables: tuple[tuple[str, str], ...]) -> _Server:
    return _Server(dict(variables))


@contextlib.contextmanager
def _adopting_orphans() -> Any:
    """Inside, a descendant whose parent has ended becomes a child of this process, which can then wait for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# --------------------------------------------------------------------------------------------------------- the server


class _ReadEnvironment(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Applies the environment to jax when a process first imports it, as jax does itself."""

    def __init__(self, jax: types.ModuleType):
        self._jax = jax

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self) if fullname == "jax" else None

    def create_module(self, spec: Any) -> types.ModuleType:
        spec.submodule_search_locations = self._jax.__path__
        return self._jax

    def exec_module(self, module: types.ModuleType) -> None:
        for variable, text in os.environ.items():
            name = variable.lower()
            if variable.startswith("JAX_") and name in module.config.values:
                module.config.update(name, _parse(text, like=module.config.values[name]))


def _parse(text: str, *, like: Any) -> Any:
    if isinstance(like, bool):
        return text.lower() in ("y", "yes", "t", "true", "on", "1")
    return type(like)(text) if isinstance(like, int | float) else text


def _import_libraries() -> None:
    """Imports them with the variables that main.py sets before its own imports."""
    exec((REPO / "main.py").read_text(encoding="utf-8").split("\nfrom absl", 1)[0], {"__name__": "main"})
    for name in (*OWN, *LIBRARIES):
        importlib.import_module(name)
    sys.modules["matplotlib.figure"].Figure.savefig = lambda figure, path, **_: Path(path).write_bytes(b"")


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Returns the next request and its three streams; None if the tests have ended."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    if not size:
        return None
    body = b""
    while len(body) < int.from_bytes(size, "big"):
        body += connection.recv(int.from_bytes(size, "big") - len(body))
    return json.loads(body), streams


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Returns in every process that is started, with its request; ends the server when the tests end."""
    while (received := _receive(connection)) is not None:
        request, streams = received
        # The parent of the new process ends, which makes it a child of the tests.
        reader, writer = os.pipe()
        if (parent := _fork()) == 0:
            if (child := _fork()) != 0:
                os.write(writer, child.to_bytes(8, "big"))
                os._exit(0)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            for descriptor in (reader, writer, connection.fileno(), *streams):
                os.close(descriptor)
            return request
        os.waitpid(parent, 0)
        connection.sendall(os.read(reader, 8))
        for descriptor in (reader, writer, *streams):
            os.close(descriptor)
    os._exit(0)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns that its threads are not forked; none have been started.
        return os.fork()


def _prepare(request: dict[str, Any], path: list[str]) -> None:
    """Makes this process what a new interpreter would be."""
    if request["start_new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    first, *words = request["words"]
    is_code = first == "-c"
    sys.argv = ["-c", *words[1:]] if is_code else [first, *words]
    own = [folder for folder in request["env"].get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = ["" if is_code else os.path.dirname(os.path.abspath(first)), *own, *path]
    sys.meta_path.insert(0, _ReadEnvironment(sys.modules.pop("jax")))
    if Path(sys.path[0]).absolute() == REPO:
        importlib.import_module("jax")
        importlib.import_module("tests.saved_programs").install()
    else:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("configs", "mlm")]:
            del sys.modules[name]


def _main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = str(REPO)
    path = [folder for folder in sys.path[1:] if folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    _import_libraries()
    if threading.active_count() > 1:
        raise RuntimeError(f"an import has started threads, which a fork lacks: {threading.enumerate()}")
    gc.freeze()
    request = _serve(connection)
    connection.detach()
    _prepare(request, path)
    _end(_exit_code_of(request["words"]))


def _exit_code_of(words: list[str]) -> int:
    """Runs the program and handles what it raises as Python does."""
    try:
        if words[0] == "-c":
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(words[1], module.__dict__)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(code: int) -> None:
    """Ends the process as Python does, except that objects are not deleted, which takes half a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    os._exit(code % 256)


if __name__ == "__main__":
    _main()
