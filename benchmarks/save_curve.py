"""Stores the curve of a finished run, for `--mode=report --reference`.

    python benchmarks/save_curve.py runs/quickstart docs/curves/quickstart.jsonl

The first line is the content of config.json with the machine, the others are those of metrics.jsonl.
"""

import json
import os
import platform
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mlm.reporting.curves import read_metrics
from mlm.run.workdir import WorkDir


def main(workdir_path: str, output: str) -> None:
    """Writes the file."""
    workdir = WorkDir(workdir_path)
    machine = f"{os.cpu_count()} x {platform.processor() or platform.machine()}"
    content = {"config": workdir.read_config(), "history": workdir.read_history(), "machine": machine}
    with open(output, "w", encoding="utf-8") as file:
        for line in (content, *read_metrics(workdir.metrics)):
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
