import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlm.errors import one_line

REPO = Path(__file__).parent.parent


def test_an_error_is_one_line_of_limited_length():
    assert one_line(ValueError(" two\n  lines ")) == "two lines"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(FileNotFoundError("a.txt")) == "not found: a.txt"
    assert len(one_line(ValueError("x" * 1000))) == 403


def test_the_cause_of_an_error_is_in_its_line_once():
    error = RuntimeError("loading failed")
    error.__cause__ = OSError("disk full")
    assert one_line(error) == "loading failed (disk full)"
    error = RuntimeError("loading failed: disk full")
    error.__cause__ = OSError("disk full")
    assert one_line(error) == "loading failed: disk full"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_is_printed_in_any_encoding(encoding):
    code = "import sys; from mlm import command_line; "
    code += "command_line.run(lambda: (print('日本 ü'), print('日本 ü', file=sys.stderr)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert done.stdout == done.stderr == "日本 ü\n".encode(encoding, "replace")
