"""The live line: on a terminal below the log, of the terminal's width, gone at every end; elsewhere plain lines."""

import dataclasses
import fcntl
import logging as python_logging
import os
import re
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest
from absl import logging

from mlm.reporting import progress, writers
from mlm.reporting import reporter as reporter_lib
from mlm.reporting.progress import LiveLine, Progress, evaluation_line
from mlm.reporting.summary import show
from mlm.reporting.writers import JsonLinesWriter
from mlm.run.workdir import WorkDir
from mlm.settings import ProfileSettings
from tests.test_reporter import fake
from tests.tiny import settings_of, tiny_config, write_corpus

REPO = Path(__file__).parent.parent
PROGRESS = Progress(
    step=250,
    num_train_steps=10_000,
    loss=7.31249,
    accuracy=0.033,
    eval_loss=7.4012,
    tokens_per_second=1_234_567.8,
    utilization=0.384,
    input_wait=0.0149,
    seconds_left=4800,
)


def shown(output: str) -> list[str]:
    """The lines of a terminal that was sent `output`."""
    lines = [""]
    for text in re.findall(r"\x1b\[2K|\r|\n|[^\r\n\x1b]+", output):
        if text == "\n":
            lines.append("")
        elif text == "\x1b[2K":
            lines[-1] = ""
        elif text != "\r":
            assert lines[-1] == "", f"{text!r} is written into {lines[-1]!r}"
            lines[-1] += text
    return lines


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            None,
            "step   250 of 10000   loss 7.312   accuracy  3.3 %   evaluation 7.401   1,234,568 tokens/s   "
            "38 % of peak   1 % input wait   1 h 20 min left",
        ),
        (90, "  250/10000  loss 7.312  eval 7.401  1.23M tok/s  38% peak  1% wait  1h20min left"),
        (75, "  250/10000 loss 7.312 eval 7.401 1.23M tok/s 38% peak 1% wait 1h20min left"),
        (70, "  250/10000 loss 7.312 eval 7.401 1.23M tok/s 38% peak 1h20min left"),
        (20, "  250/10000"),
        (5, "  250"),
    ],
)
def test_a_line_has_all_fields_or_those_for_which_there_is_room(width, line):
    assert PROGRESS.line(width) == line


def test_a_line_is_never_wider_than_the_terminal():
    assert all(0 < len(PROGRESS.line(width)) <= width for width in range(1, 160))


def test_what_is_not_known_is_not_told():
    bare = dataclasses.replace(PROGRESS, eval_loss=None, utilization=None)
    assert "evaluation" not in bare.line()
    assert "peak" not in bare.line()
    assert bare.line(70) == "  250/10000  loss 7.312  eval -  1.23M tok/s  1% wait  1h20min left"


@pytest.mark.parametrize(
    ("number", "said"),
    [(0.4, "0"), (999.4, "999"), (999.6, "1.00k"), (14_746, "14.7k"), (999_600, "1.00M"), (19_947_000, "19.9M")],
)
def test_short_numbers_have_three_digits(number, said):
    assert f" {said} tok/s" in dataclasses.replace(PROGRESS, tokens_per_second=number).line(75)


def test_evaluations_fit_the_terminal_too():
    metrics = {"eval/loss": 3.304, "eval/unigram_loss": 3.297, "eval/accuracy": 0.2, "eval/perplexity": 27.22}
    assert evaluation_line(10, 1300, metrics) == (
        "step   10 of 1300   evaluation: loss 3.304 (unigram model 3.297)   accuracy 20.0 %   perplexity 27.2"
    )
    assert evaluation_line(10, 1300, metrics, width=70) == "  10/1300  eval 3.304 (unigram 3.297)  acc 20.0%"


class Screen:
    """A terminal whose program is this test."""

    def __init__(self, columns: int):
        self.master, slave = os.openpty()
        pty_size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, pty_size)
        self.stream = os.fdopen(slave, "w", buffering=1)
        self._read = ""

    def lines(self) -> list[str]:
        self.stream.flush()
        os.set_blocking(self.master, False)
        while True:
            try:
                self._read += os.read(self.master, 65536).decode()
            except BlockingIOError:
                return shown(self._read)


@pytest.fixture
def make_screen(monkeypatch):
    """To be called by the test itself: pytest sets stdout and stderr anew between a fixture and its test."""
    screen = Screen(80)

    def make_screen():
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", screen.stream)
        monkeypatch.setattr(sys, "stdout", screen.stream)
        monkeypatch.setattr(logging.get_absl_handler().python_handler, "stream", screen.stream)
        return screen

    yield make_screen
    monkeypatch.undo()
    screen.stream.close()
    os.close(screen.master)


def emit(message: str) -> None:
    record = python_logging.LogRecord("absl", python_logging.INFO, __file__, 1, message, (), None)
    logging.get_absl_handler().python_handler.emit(record)


LIVE = "  250/10000 loss 7.312 eval 7.401 1.23M tok/s 38% peak 1% wait 1h20min left"


def test_the_log_is_above_the_line_which_is_gone_at_the_end(make_screen):
    screen = make_screen()
    handler = logging.get_absl_handler().python_handler
    before = sys.stdout, sys.stderr, handler.stream
    with LiveLine() as live:
        live.show(PROGRESS)
        assert screen.lines() == [LIVE]
        emit("one line")
        live.show(PROGRESS)
        print("a print")
        print("half a line, ", end="")
        live.show(PROGRESS)  # Not into it.
        print("and its end", file=sys.stderr)
        live.show(PROGRESS, busy="save")
    *lines, last = screen.lines()
    # absl's first line of a process may be one about itself.
    assert [line.rpartition("] ")[2] for line in lines][-3:] == ["one line", "a print", "half a line, and its end"]
    assert last == ""
    assert (sys.stdout, sys.stderr, handler.stream) == before


def test_what_a_run_does_instead_stands_at_the_end_within_the_width(make_screen):
    screen = make_screen()
    with LiveLine() as live:
        live.show(PROGRESS, busy="evaluation")
        (line,) = screen.lines()
    assert line.endswith("  evaluation ...")
    assert len(line) <= 75


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_it_is_gone_after_an_error(make_screen, error):
    screen = make_screen()

    def fail():
        with LiveLine() as live:
            live.show(PROGRESS)
            raise error

    with pytest.raises(error):
        fail()
    assert screen.lines() == [""]


def test_it_is_drawn_a_few_times_a_second_whatever_the_updates_do(make_screen, monkeypatch):
    make_screen()
    now = [0.0]
    monkeypatch.setattr(progress, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    draws = 0
    with LiveLine() as live:
        for _ in range(1000):
            now[0] += 1 / 64
            if live.due():
                live.show(PROGRESS)
                draws += 1
    assert draws == 63  # 1000 / 16


def test_no_line_where_there_is_no_terminal(make_screen, monkeypatch, tmp_path):
    make_screen()
    assert LiveLine().alive
    assert not LiveLine(wanted=False).alive
    monkeypatch.setenv("TERM", "dumb")
    assert not LiveLine().alive
    monkeypatch.setenv("TERM", "xterm")
    with open(tmp_path / "nohup.out", "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with LiveLine() as live:
            live.show(PROGRESS)
            assert not live.due()
            assert live.width is None
            assert sys.stderr is file
    assert (tmp_path / "nohup.out").read_text() == ""


def make_reporter(tmp_path) -> reporter_lib.Reporter:
    return reporter_lib.Reporter(
        WorkDir(str(tmp_path)),
        num_train_steps=100,
        vocab_size=10,
        flops_per_token=1e3,
        profile=ProfileSettings(first_step=1, num_steps=0),
        max_skipped_steps=2,
        restored=None,
        step=0,
    )


EVALUATION = {"eval/loss": 3.0, "eval/unigram_loss": 6.0, "eval/accuracy": 0.25, "eval/perplexity": 20.0}


@pytest.fixture
def plain_writer(monkeypatch):
    monkeypatch.setattr(
        writers, "create_writer", lambda place, last_step: JsonLinesWriter(place.metrics, last_step=last_step)
    )


def test_a_plain_line_has_every_field(tmp_path, plain_writer, monkeypatch, caplog):
    monkeypatch.setattr(reporter_lib, "peak_flops", lambda: 1e6)
    with caplog.at_level("INFO"), make_reporter(tmp_path) as reporter:
        for step in (1, 2):
            reporter.update(step, *fake(step), wait_seconds=0.0)
            reporter.wait_for_pending_step()
            reporter.log_evaluation(step, EVALUATION)
            reporter.log_updates(step)
    assert re.fullmatch(
        r"step   2 of 100   loss 5\.000   accuracy 100\.0 %   evaluation 3\.000   [\d,]+ tokens/s   \d+ % of peak   "
        r"0 % input wait   \d+ s left",
        [record.getMessage() for record in caplog.records if "input wait" in record.getMessage()][-1],
    )


def test_the_reporter_draws_after_updates_and_only_on_the_first_process(
    tmp_path, plain_writer, make_screen, monkeypatch
):
    screen = make_screen()
    with make_reporter(tmp_path) as reporter:
        for step in (1, 2, 3):
            reporter.update(step, *fake(step), wait_seconds=0.0)
        reporter.wait_for_pending_step()
        assert screen.lines()[-1].startswith("  1/100  loss 3.000  eval -")
        with reporter.timed("evaluation"):
            assert screen.lines()[-1].startswith("  3/100 ")
            assert screen.lines()[-1].endswith("  evaluation ...")
            reporter.log_evaluation(3, EVALUATION)
        assert " eval 3.000 " in screen.lines()[-1]
    assert screen.lines()[-1] == ""
    monkeypatch.setattr(reporter_lib.jax, "process_index", lambda: 1)
    with make_reporter(tmp_path) as reporter:
        reporter.update(1, *fake(1), wait_seconds=0.0)
        reporter.wait_for_pending_step()
        assert screen.lines()[-1] == ""


def test_until_the_first_update_the_line_says_that_it_compiles(tmp_path, plain_writer, make_screen):
    screen = make_screen()
    with make_reporter(tmp_path) as reporter:
        with reporter.transfer():
            assert screen.lines() == ["compiling the step ..."]
        for step in (1, 2):
            reporter.update(step, *fake(step), wait_seconds=0.0)
        with reporter.transfer():
            assert screen.lines()[-1].startswith("  1/100 ")
    assert screen.lines() == [""]


@pytest.mark.slow
def test_a_run_on_a_terminal_shows_itself_and_leaves_it_clean_after_ctrl_c(tmp_path):
    corpus = write_corpus(tmp_path)
    (tmp_path / "config.py").write_text(
        textwrap.dedent(f"""
            from tests.tiny import tiny_config

            def get_config():
                config = tiny_config({corpus!r})
                config.num_train_steps = 1_000_000
                config.logging_steps = config.eval_steps = config.save_steps = 50
                return config
        """)
    )
    # A CPU has no peak rate in a data sheet.
    code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from mlm.reporting import reporter as report; "
    code += "report.peak_flops = lambda: 1e9; import main; main.command_line.run(lambda: main.app.run(main.main, flags_parser=main.parse_flags))"
    screen = Screen(100)
    command = [sys.executable, "-c", code, f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    env = {**os.environ, "TERM": "xterm", "XLA_FLAGS": ""}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), screen.stream)
    child = subprocess.Popen(command, cwd=REPO, env=env, start_new_session=True, **streams)
    screen.stream.close()
    live = re.compile(
        r"\r\x1b\[2K *\d+/1000000 +loss \d+\.\d+ +eval \d+\.\d+ +[\d.]+[kM]? tok/s +\d+% peak +\d+% wait +\S+ left"
    )
    output, asked, end = "", False, time.monotonic() + 120
    while time.monotonic() < end:
        try:
            output += os.read(screen.master, 65536).decode()
        except OSError:  # The other end is closed.
            break
        if not asked and live.search(output):
            os.write(screen.master, b"\x03")
            asked = True
    os.close(screen.master)
    assert child.wait(60) == 75, output
    *lines, last = shown(output.replace("^C", ""))
    assert last == ""
    assert re.fullmatch(r"stopped after update \d+, which is saved; rerun the same command to resume", lines[-1])
    assert [line for line in lines if "tok/s" in line and not re.match(r"\d\d:\d\d:\d\d  ", line)] == []
    assert any(re.match(r"\d\d:\d\d:\d\d +50/1000000 +loss ", line) for line in lines)


def test_the_last_words_of_a_process_that_ends_at_once_stand_alone():
    code = "import os; from mlm.reporting import progress; os.write(2, progress.erasing() + b'stopped')"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, check=True).stderr == b"stopped"


@pytest.mark.parametrize("absolute", [True, False])
def test_the_last_words_name_the_work_directory_as_it_was_typed(tmp_path, monkeypatch, capsys, absolute):
    # From a sibling directory the shortest name would be ../runs/de.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    typed = str(tmp_path / "runs" / "de") if absolute else "../runs/de"
    show(settings_of(tiny_config("*")), WorkDir(typed), [], f"python main.py --workdir={typed}")
    assert f"\nModel      {typed}/model\n" in capsys.readouterr().out
