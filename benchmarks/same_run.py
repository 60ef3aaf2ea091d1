"""Are two finished runs identical?

    python benchmarks/same_run.py RUN OTHER_RUN

Compares two work directories: train state and stream state of the last checkpoint, metrics.jsonl without perf/*, the
exported model without its plot, and the tokenizer. Also looks for partially written files in the second one. Prints the
differences, and exits with 1 if there are any. The directories must have the same name, which is in the model card.
"""

import filecmp
import json
import os
import re
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mlm.reporting.curves import read_metrics

# Files of the model that show throughput.
TIMINGS = ("curves.png",)


def differences(one: str, other: str) -> list[str]:
    """Returns the differences between two finished work directories, and what is partially written in `other`."""
    found = []
    saved = [os.listdir(os.path.join(run, "checkpoints")) for run in (one, other)]
    steps = [max(int(name) for name in names if name.isdecimal()) for names in saved]
    if steps[0] != steps[1]:
        return [f"the last checkpoints are {steps[0]} and {steps[1]}"]
    first, second = (read_state(run, steps[0]) for run in (one, other))
    if first.keys() != second.keys():
        found.append(f"only one state has {sorted(first.keys() ^ second.keys())}")
    for name in first.keys() & second.keys():
        if first[name].tobytes() != second[name].tobytes() or first[name].dtype != second[name].dtype:
            found.append(f"checkpoint {steps[0]}: {name}")
    for name, read in (("stream", read_streams), ("loop", read_loop)):
        if read(one, steps[0]) != read(other, steps[0]):
            found.append(f"checkpoint {steps[0]}: {name}")
    lines = [[untimed(line) for line in read_metrics(os.path.join(run, "metrics.jsonl"))] for run in (one, other)]
    if lines[0] != lines[1]:
        differing = {line["step"] for line in (*lines[0], *lines[1]) if (line in lines[0]) != (line in lines[1])}
        found.append(f"metrics.jsonl, steps {sorted(differing)}")
    for part in ("model", "tokenizer"):
        names = [set(os.listdir(os.path.join(run, part))) for run in (one, other)]
        found += [f"only one run has {part}/{name}" for name in names[0] ^ names[1]]
        _, unequal, odd = filecmp.cmpfiles(
            os.path.join(one, part), os.path.join(other, part), sorted(names[0] & names[1]), shallow=False
        )
        found += [f"{part}/{name}" for name in (*unequal, *odd) if name not in TIMINGS]
    return found + [f"{path} is left over" for path in leftovers(other)]


def leftovers(workdir: str) -> list[str]:
    """Returns the paths of partially written and of quarantined files in a work directory."""
    found = []
    for folder, directories, files in os.walk(workdir):
        for name in (*directories, *files):
            if re.search(r"\.tmp|\.old|orbax-checkpoint-tmp|^push\.|^damaged$", name):
                found.append(os.path.relpath(os.path.join(folder, name), workdir))
    return found


def read_state(workdir: str, step: int) -> dict[str, np.ndarray]:
    """Reads the train state of a checkpoint with Orbax alone: path -> array."""
    directory = epath.Path(workdir) / "checkpoints" / str(step) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(directory).tree
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    state = handler.restore(directory, args=ocp.args.PyTreeRestore(item=tree, restore_args=kinds))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def read_streams(workdir: str, step: int) -> list[Any]:
    """Reads the stream states of a checkpoint, by process."""
    directory = os.path.join(workdir, "checkpoints", str(step), "stream")
    return [
        read_json(os.path.join(directory, name)) for name in sorted(os.listdir(directory)) if name.endswith(".json")
    ]


def read_loop(workdir: str, step: int) -> dict[str, Any]:
    """Reads the loop state and the checksums of a checkpoint, without timings."""
    saved = read_json(os.path.join(workdir, "checkpoints", str(step), "loop", "metadata"))["item"]
    return {**saved, "loop": untimed(saved["loop"] | {"interval": untimed(saved["loop"]["interval"])})}


def read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that are not timings."""
    return {name: value for name, value in values.items() if not name.startswith("perf/") and "seconds" not in name}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    found = differences(sys.argv[1], sys.argv[2])
    print("\n".join(found) or "no difference")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
