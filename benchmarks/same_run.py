"""Are two finished runs the same run?

    python benchmarks/same_run.py RUN OTHER_RUN

Compares two work directories: train state and stream state of the last checkpoint, metrics.jsonl but for perf/*, the
exported model but for its picture, the tokenizer; and looks for what is half-written in the second one. Prints what
differs, and exits with 1 if anything does. Runs of the same name only: it stands in the model's card.
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

# Throughput is in the picture.
TIMINGS = ("curves.png",)
# Of what the loop saves, beside its sums and the checksums; the rest are clocks.
TELLING_LOOP = ("counts_V", "tokens_seen", "skipped", "evaluated")


def differences(one: str, other: str) -> list[str]:
    """What two finished work directories do not have in common, and should; what is left in the second, and should
    not be."""
    found = []
    saved = [os.listdir(os.path.join(run, "checkpoints")) for run in (one, other)]
    steps = [max(int(name) for name in names if name.isdecimal()) for names in saved]
    if steps[0] != steps[1]:
        return [f"the last checkpoints are {steps[0]} and {steps[1]}"]
    first, second = (read_state(run, steps[0]) for run in (one, other))
    if first.keys() != second.keys():
        found.append(f"the states have other parts: {sorted(first.keys() ^ second.keys())}")
    for name in first.keys() & second.keys():
        if first[name].tobytes() != second[name].tobytes() or first[name].dtype != second[name].dtype:
            found.append(f"checkpoint {steps[0]}: {name}")
    for name, read in (("stream", read_streams), ("loop", read_loop)):
        if read(one, steps[0]) != read(other, steps[0]):
            found.append(f"checkpoint {steps[0]}: {name}")
    lines = [untimed(read_metrics(os.path.join(run, "metrics.jsonl"))) for run in (one, other)]
    if lines[0] != lines[1]:
        odd = [line["step"] for line in (*lines[0], *lines[1]) if (line in lines[0]) != (line in lines[1])]
        found.append(f"metrics.jsonl, steps {sorted(set(odd))}")
    for part in ("model", "tokenizer"):
        names = [set(os.listdir(os.path.join(run, part))) for run in (one, other)]
        found += [f"{part}/{name} is in one alone" for name in names[0] ^ names[1]]
        _, unequal, odd = filecmp.cmpfiles(
            os.path.join(one, part), os.path.join(other, part), sorted(names[0] & names[1]), shallow=False
        )
        found += [f"{part}/{name}" for name in (*unequal, *odd) if name not in TIMINGS]
    return found + [f"{path} is left" for path in leftovers(other)]


def leftovers(workdir: str) -> list[str]:
    """Paths of what is half-written, or set aside, anywhere in a work directory."""
    found = []
    for at, directories, files in os.walk(workdir):
        for name in (*directories, *files):
            if re.search(r"\.tmp|\.old|orbax-checkpoint-tmp|^push\.|^damaged$", name):
                found.append(os.path.relpath(os.path.join(at, name), workdir))
    return found


def read_state(workdir: str, step: int) -> dict[str, np.ndarray]:
    """A checkpoint's train state, path -> array, as Orbax reads it by itself."""
    directory = epath.Path(workdir) / "checkpoints" / str(step) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(directory).tree
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    state = handler.restore(directory, args=ocp.args.PyTreeRestore(item=tree, restore_args=kinds))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def read_streams(workdir: str, step: int) -> list[Any]:
    """The streams' places in a checkpoint."""
    directory = os.path.join(workdir, "checkpoints", str(step), "stream")
    return [
        read_json(os.path.join(directory, name)) for name in sorted(os.listdir(directory)) if name.endswith(".json")
    ]


def read_loop(workdir: str, step: int) -> dict[str, Any]:
    """What the loop has summed up, and the checksums, in a checkpoint; without its clock."""
    directory = os.path.join(workdir, "checkpoints", str(step), "loop")
    saved = read_json(os.path.join(directory, "metadata"))["item"]
    sums = {k: v for k, v in saved["loop"]["interval"].items() if "seconds" not in k}
    return {"checksums": saved["checksums"], **sums, **{key: saved["loop"][key] for key in TELLING_LOOP}}


def read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without their timings."""
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    found = differences(sys.argv[1], sys.argv[2])
    print("\n".join(found) or "no difference")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
