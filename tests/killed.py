"""Runs main.py until a step, and kills its process there. Unlike main.py, it compiles later stages in the background.

Usage: killed.py add_step|save STEP FLAG... kills after the dispatch of the step, or while its checkpoint is written.
"""

import os
import signal
import sys

import main
from mlm import startup
from mlm.reporting.reporter import Reporter
from mlm.run.checkpoint import Checkpointer

function, last, *flags = sys.argv[1:]
owner = {"add_step": Reporter, "save": Checkpointer}[function]
call = getattr(owner, function)


def call_and_kill(self, step, *args, **kwargs):
    call(self, step, *args, **kwargs)
    if step == int(last):
        os.kill(os.getpid(), signal.SIGKILL)


setattr(owner, function, call_and_kill)
startup._HOST_COMPILED_BACKENDS = ("cpu",)
sys.argv = ["main.py", *flags]
main.command_line.run(lambda: main.app.run(main.main, flags_parser=main.parse_flags))
