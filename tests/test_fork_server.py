"""tests/fork_server.py: its processes behave as those of a new interpreter."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import fork_server

REPO = Path(__file__).parent.parent
PROGRAMS = {
    "success": "print('a', flush=True); import sys; print('b', file=sys.stderr)",
    "a message": "import sys; sys.exit('wrong')",
    "a number": "import sys; sys.exit(75)",
    "no number": "import sys; sys.exit()",
    "a signal": "import os; os.kill(os.getpid(), 15)",
    "Ctrl-C": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "at once": "import os; os._exit(130)",
    "work at the end": "import atexit; atexit.register(print, 'end')",
    "a thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('end'))).start()",
    "arguments and input": "import sys; print(sys.argv, sys.stdin.read())",
    "search path": "import sys; print(sys.path)",
    "working directory": "import os; print(os.getcwd())",
    "modules of this repository": "import sys; print([name for name in sys.modules if name.startswith('mlm')])",
    "jax": "import jax; print(jax.devices(), jax.config.jax_compilation_cache_dir, jax.config.jax_enable_x64)",
    "session": "import os; print(os.getsid(0) == os.getpid())",
    "terminal": "import sys; print(sys.stdin.isatty(), sys.stdout.line_buffering, sys.stderr.line_buffering)",
}


@pytest.mark.slow
def test_a_process_is_as_that_of_a_new_interpreter(tmp_path):
    env = os.environ | {"JAX_ENABLE_X64": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "PYTHONPATH": "/nowhere"}
    for name, code in PROGRAMS.items():
        options = {"cwd": tmp_path, "env": env, "input": "text", "start_new_session": name == "session"}
        command = [sys.executable, "-c", code, "x y", "--z"]
        wanted = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        found = fork_server.run(command, **options)
        assert (found.returncode, found.stdout, found.stderr.splitlines()[-1:]) == (
            wanted.returncode,
            wanted.stdout,
            wanted.stderr.splitlines()[-1:],
        ), name


@pytest.mark.parametrize("code", ["raise KeyError(3)", "print(1)", "import sys; sys.stdout.write('a\\n')"])
def test_an_uncaught_exception_and_a_closed_stdout(code):
    results = []
    for run in (subprocess.run, fork_server.run):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stdout:
            options = {} if run is fork_server.run else {"text": True, "check": False}
            done = run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, **options)
        results.append((done.returncode, done.stderr.splitlines()[-1]))
    assert results[0] == results[1]
    assert results[0][0] != 0


def test_a_process_is_signalled_and_waited_for():
    code = "import time; print('started', flush=True); time.sleep(600)"
    process = fork_server.Process([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


@pytest.mark.slow
def test_the_server_ends_with_the_tests():
    code = "from tests import fork_server; import sys; fork_server.run([sys.executable, '-c', 'pass'])\n"
    code += "print(fork_server._server_for(dict(fork_server.os.environ))._process.pid)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    status = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 30
    while status.exists() and "State:\tZ" not in (status / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
