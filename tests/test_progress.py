"""Progress lines: those of the log, and on a terminal a live line below it that is gone after every exit."""

import fcntl
import logging as python_logging
import os
import re
import struct
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest
from absl import logging

from mlm.export.fill_mask import MaskPrediction
from mlm.reporting import reporter as reporter_lib
from mlm.reporting.progress import LiveLine, evaluation_line, live_text, step_line
from mlm.reporting.summary import print_next_steps
from mlm.reporting.without_keras import metric_writers
from mlm.run.workdir import WorkDir
from mlm.settings import ProfileSettings
from tests import fork_server
from tests.test_reporter import fake
from tests.tiny import write_corpus

REPO = Path(__file__).parent.parent
METRICS = {
    "train/loss": 7.31249,
    "train/accuracy": 0.033,
    "perf/tokens_per_second": 1_234_567.8,
    "perf/mfu": 0.384,
    "perf/input_wait_fraction": 0.0149,
}
EVALUATION = {"eval/loss": 3.304, "eval/unigram_loss": 3.297, "eval/accuracy": 0.2, "eval/perplexity": 27.22}


def test_log_lines_have_all_fields():
    assert step_line(250, 10_000, METRICS, eval_loss=7.4012, seconds_left=4800) == (
        "step   250 of 10000   loss 7.312   accuracy  3.3 %   eval loss 7.401   1,234,568 tokens/s   "
        "38 % of peak   1 % input wait   1 h 20 min left"
    )
    assert evaluation_line(10, 1300, EVALUATION) == (
        "step   10 of 1300   evaluation: loss 3.304 (unigram model 3.297)   accuracy 20.0 %   perplexity 27.2"
    )
    assert live_text(METRICS, eval_loss=7.4012, seconds_left=4800) == (
        "loss 7.312, eval 7.401, 1.23M tok/s, 1 h 20 min left, 38% peak, 1% input wait"
    )


def test_fields_without_a_value_are_missing():
    # No evaluation yet, a device without a known peak, and all steps of the interval skipped.
    metrics = {name: METRICS[name] for name in ("perf/tokens_per_second", "perf/input_wait_fraction")}
    assert step_line(1, 2, metrics, eval_loss=None, seconds_left=5) == (
        "step 1 of 2   1,234,568 tokens/s   1 % input wait   5 s left"
    )
    assert live_text(metrics, eval_loss=None, seconds_left=5) == "1.23M tok/s, 5 s left, 1% input wait"


class Screen:
    """A terminal of this process or of a child."""

    def __init__(self, columns: int):
        self.columns = columns
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", buffering=1)
        self.output = ""

    def lines(self) -> list[str]:
        """Returns the lines on the screen, as far as the output uses \\r and \\n only."""
        if not self.stream.closed:
            self.stream.flush()
            os.set_blocking(self.master, False)
            try:
                while True:
                    self.output += os.read(self.master, 65536).decode()
            except BlockingIOError:
                pass
        assert "\x1b" not in self.output
        lines = [""]
        for text in re.findall(r"\r|\n|[^\r\n]+", self.output):
            if text == "\n":
                lines.append("")
            elif text == "\r":
                lines[-1] = "\r" + lines[-1].lstrip("\r")  # The cursor is at the start: what follows overwrites.
            elif lines[-1].startswith("\r"):
                lines[-1] = text + lines[-1][1 + len(text) :]
            else:
                lines[-1] += text
        return [line.strip("\r ") for line in lines]


@pytest.fixture
def make_screen(monkeypatch):
    """Returns a function for the test itself to call: pytest replaces stdout and stderr after a fixture has run."""
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


def log(message: str) -> None:
    record = python_logging.LogRecord("absl", python_logging.INFO, __file__, 1, message, (), None)
    logging.get_absl_handler().python_handler.emit(record)


def test_log_lines_and_prints_are_above_the_live_line_which_is_gone_at_the_end(make_screen):
    screen = make_screen()
    handler = logging.get_absl_handler().python_handler
    before = sys.stdout, sys.stderr, handler.stream
    with LiveLine(10_000, step=249) as live:
        live.show(250, "loss 7.312", activity="save")
        assert re.fullmatch(r"save:   2%\|.+\| 250/10000, loss 7\.312", screen.lines()[-1])
        log("one line")
        print("a print")
        print("half a line, ", end="", file=sys.stderr)
        live.show(251, "loss 7.311")  # Does not tear it.
        print("and its end", file=sys.stderr)
        assert re.fullmatch(r"3%\|.+\| 251/10000, loss 7\.311", screen.lines()[-1])
    *lines, last = screen.lines()
    # absl's first line of a process may be one about itself.
    assert [line.rpartition("] ")[2] for line in lines][-3:] == ["one line", "a print", "half a line, and its end"]
    assert last == ""
    assert (sys.stdout, sys.stderr, handler.stream) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_live_line_is_gone_after_an_exception(make_screen, error):
    screen = make_screen()

    def fail():
        with LiveLine(100, step=0) as live:
            live.show(1, "loss 7.3")
            raise error

    with pytest.raises(error):
        fail()
    assert screen.lines() == [""]


def test_the_live_line_is_never_wider_than_the_terminal(make_screen):
    screen = make_screen()
    with LiveLine(10_000, step=0) as live:
        live.show(250, live_text(METRICS, eval_loss=7.4, seconds_left=4800), activity="evaluation")
        (line,) = screen.lines()
    assert line.startswith("evaluation:   2%|")
    assert 70 < len(line) <= 80


def test_without_a_terminal_there_is_no_live_line(make_screen, monkeypatch, tmp_path):
    make_screen()
    assert LiveLine(100, step=0).enabled
    assert not LiveLine(100, step=0, enabled=False).enabled
    monkeypatch.setenv("TERM", "dumb")
    assert not LiveLine(100, step=0).enabled
    monkeypatch.setenv("TERM", "xterm")
    with open(tmp_path / "nohup.out", "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with LiveLine(100, step=0) as live:
            live.show(1, "loss 7.3")
            assert sys.stderr is file
    assert (tmp_path / "nohup.out").read_text() == ""


@pytest.fixture
def make_reporter(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writers, "SummaryWriter", lambda logdir: metric_writers.MultiWriter([]))

    def make():
        return reporter_lib.Reporter(
            WorkDir(str(tmp_path)),
            num_train_steps=100,
            vocab_size=10,
            profile=ProfileSettings(first_step=1, num_steps=0),
            max_skipped_steps=2,
            restored=None,
            step=0,
        )

    return make


def test_the_log_line_has_every_field(make_reporter, monkeypatch, caplog):
    monkeypatch.setattr(reporter_lib, "peak_flops", lambda: 1e6)
    with caplog.at_level("INFO"), make_reporter() as reporter:
        for step in (1, 2):
            with reporter.dispatch(stage="", flops_per_token=1e3):
                pass
            reporter.add_step(step, *fake(step), wait_seconds=0.0)
            reporter.wait_for_pending_step()
            reporter.log_evaluation(step, EVALUATION)
            reporter.log_steps(step)
    assert re.fullmatch(
        r"step   2 of 100   loss 5\.000   accuracy 100\.0 %   eval loss 3\.304   [\d,]+ tokens/s   \d+ % of peak   "
        r"0 % input wait   \d+ s left",
        [record.getMessage() for record in caplog.records if "input wait" in record.getMessage()][-1],
    )


def test_the_live_line_shows_steps_and_pauses_on_the_first_process_only(make_reporter, make_screen, monkeypatch):
    screen = make_screen()
    with make_reporter() as reporter:
        with reporter.dispatch(stage="", flops_per_token=1.0):
            assert screen.lines()[-1].startswith("compiling the step:   0%|")
        for step in (1, 2, 3):
            reporter.add_step(step, *fake(step), wait_seconds=0.0)
        assert re.match(r"1%\|.*\| 1/100, loss 3\.000", screen.lines()[-1])
        reporter.wait_for_pending_step()
        with reporter.timed("evaluation"):
            assert re.match(r"evaluation:   3%\|.*\| 3/100, loss", screen.lines()[-1])
            reporter.log_evaluation(3, EVALUATION)
        assert ", eval 3.304, " in screen.lines()[-1]
    assert screen.lines()[-1] == ""
    monkeypatch.setattr(reporter_lib.jax, "process_index", lambda: 1)
    with make_reporter() as reporter:
        reporter.add_step(1, *fake(1), wait_seconds=0.0)
        reporter.wait_for_pending_step()
        assert screen.lines()[-1] == ""


@pytest.mark.slow
def test_a_run_on_a_terminal_shows_a_live_line_and_leaves_none_after_ctrl_c(tmp_path):
    (tmp_path / "config.py").write_text(
        textwrap.dedent(f"""
            from tests.tiny import tiny_config

            def get_config():
                config = tiny_config({write_corpus(tmp_path)!r})
                config.num_train_steps = 1_000_000
                config.logging_steps = config.eval_steps = config.save_steps = 50
                return config
        """)
    )
    # The terminal sends Ctrl-C to the session whose controlling terminal it is.
    code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); import main; main.command_line.run("
    code += "lambda: main.app.run(main.main, flags_parser=main.parse_flags))"
    command = [sys.executable, "-c", code, f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    screen = Screen(100)
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), screen.stream)
    env = {**os.environ, "TERM": "xterm", "XLA_FLAGS": fork_server.xla_flags(1)}
    child = fork_server.Process(command, cwd=REPO, env=env, start_new_session=True, **streams)
    screen.stream.close()
    live = re.compile(r"\r +\d+%\|.+\| \d+/1000000, loss \d+\.\d+, eval \d+\.\d+, [\d.]+[kM]? ?tok/s, .+ left")
    is_stopping, deadline = False, time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            screen.output += os.read(screen.master, 65536).decode()
        except OSError:  # The child has closed the terminal.
            break
        if not is_stopping and live.search(screen.output):
            os.write(screen.master, b"\x03")
            is_stopping = True
    os.close(screen.master)
    assert child.wait(60) == 75, screen.output
    screen.output = screen.output.replace("^C", "")
    *lines, last = screen.lines()
    assert last == ""
    assert re.fullmatch(r"stopped after step \d+, which is saved; .*", lines[-1])
    assert [line for line in lines if "tok/s" in line] == []
    assert any(re.match(r"\d\d:\d\d:\d\d  step +50 of 1000000 +loss ", line) for line in lines)


@pytest.mark.parametrize("is_absolute", [True, False])
def test_the_next_steps_name_the_work_directory_as_it_was_typed(tmp_path, monkeypatch, capsys, is_absolute):
    # From a sibling directory the shortest name would be ../runs/de.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    typed = str(tmp_path / "runs" / "de") if is_absolute else "../runs/de"
    print_next_steps(
        WorkDir(typed), {}, command=f"python main.py --workdir={typed}", num_train_steps=8, can_be_extended=True
    )
    printed = capsys.readouterr().out
    assert f"\nModel      {typed}/model\n" in printed
    assert f"python main.py --workdir={typed} --config.num_train_steps=16\n" in printed


def test_a_finished_run_prints_the_first_and_the_last_predictions(tmp_path, capsys):
    def predictions(token):
        return [MaskPrediction("A <mask> here.", [[(token, 0.25), (" ", 0.125)]])]

    by_step = {4: predictions(" cat"), 12: predictions(" dog"), 8: predictions(" cow")}
    print_next_steps(
        WorkDir(str(tmp_path)), by_step, command="python main.py", num_train_steps=12, can_be_extended=False
    )
    printed = capsys.readouterr().out
    assert (
        """
  A <mask> here.
      step 4    cat 25.0 %   ' ' 12.5 %
      step 12   dog 25.0 %   ' ' 12.5 %

Model      """
        in printed
    )
    assert "cow" not in printed
    assert "Resume" not in printed  # Its learning rate has decayed.


def test_a_run_whose_learning_rate_has_decayed_is_extended_by_a_branch(capsys):
    command = "python main.py --config=c.py --workdir=runs/a --config.num_train_steps 12"
    print_next_steps(WorkDir("runs/a"), {}, command=command, num_train_steps=12, can_be_extended=False, branch_step=8)
    longer = "--workdir=runs/a_longer --config.checkpoint.init_from=runs/a@8 --config.num_train_steps=24"
    assert f"\nLonger     python main.py --config=c.py {longer}\n" in capsys.readouterr().out
