"""--mode=report: the curves of one or several runs as one HTML page, which needs no network and no server.

What is drawn is chosen here; how, in `report.html` beside this file, which gets Plotly and the runs' numbers put
into it.
"""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from plotly.offline import get_plotlyjs

from mlm.errors import UserError
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import KeyChanges, WorkDir

# Points of a curve, at most: more are not to be told apart on a screen, and make a page slow.
MAX_POINTS = 4000

_PAUSES = ("save", "evaluation", "export")
# Panels in the page's order: title, unit, curves as (metric, what it is called), and the factor to the unit.
PANELS = (
    ("Loss", "nats a predicted token", [("train/loss", "train"), ("eval/loss", "evaluation")], 1),
    ("Accuracy", "% of predicted tokens", [("train/accuracy", "train"), ("eval/accuracy", "evaluation")], 100),
    ("Learning rate", "per update", [("train/learning_rate", "learning rate")], 1),
    ("Gradient norm", "before clipping", [("train/grad_norm", "gradient norm")], 1),
    ("Throughput", "tokens a second", [("perf/tokens_per_second", "tokens/s")], 1),
    ("Input wait", "% of the time", [("perf/input_wait_fraction", "waiting for text")], 100),
    ("Utilization", "% of the devices' peak", [("perf/mfu", "utilization")], 100),
    ("Pauses", "seconds since the point before", [(f"perf/{what}_ms", what) for what in _PAUSES], 1e-3),
    ("Padding", "% of the tokens", [("data/padding_fraction", "padding")], 100),
    ("Skipped updates", "so far", [("train/skipped_updates", "skipped")], 1),
)
# Of the sources of a mixture, each eval/<name>/loss.
SOURCES_TITLE = "Evaluation loss of the sources"


def run(
    settings: None,
    workdir: Sequence[str],
    *,
    output: str | None,
    defaults: Mapping[str, Any],
    key_changes: KeyChanges | None = None,
) -> None:
    """Writes the page to `output`.

    Args:
      settings: unused.
      workdir: the directories of one or more runs.
      output: the file to write, replaced if it exists; None for report.html.
      defaults: key -> value of `configs/default.py`, flat; what differs from it is shown.
      key_changes: how config keys have changed since earlier versions; None for no changes.

    Raises:
      UserError: a directory holds no run or has no metrics yet, two are the same, or the file cannot be written.
    """
    output = output or "report.html"
    places = [WorkDir(path, key_changes=key_changes) for path in workdir]
    if len({place.display_path for place in places}) < len(places):
        raise UserError("--workdir: two of the runs are the same; name each once")
    names = _names([place.display_path for place in places])
    runs = [read_run(place, name) for place, name in zip(places, names, strict=True)]
    page = {
        "panels": _panels(runs),
        "runs": runs,
        "keys": _differing_keys(runs, defaults),
    }
    with open(os.path.join(os.path.dirname(__file__), "report.html"), encoding="utf-8") as file:
        html = file.read()
    # In a script, "</script>" and "<!--" would end or hide what follows.
    data = json.dumps(page, allow_nan=False).replace("<", "\\u003c")
    html = html.replace("/* the runs */", f"const page = {data};").replace("/* plotly */", get_plotlyjs())
    try:
        with open(output + ".tmp", "w", encoding="utf-8") as file:
            file.write(html)
        os.replace(output + ".tmp", output)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another file") from None
    logging.info("the report of %s is in %s", ", ".join(names), output)


def read_run(place: WorkDir, name: str) -> dict[str, Any]:
    """What the page is told of a run.

    Returns:
      name; curves: metric -> {steps, tokens, hours, values}, equally long; events: starts after the first one and
      skipped updates, with their steps, tokens and hours; figures: (label, value) of the table; config, flat.

    Raises:
      UserError: there is no run, or it has no metrics yet.
    """
    config, history = place.read_config(), place.read_history()
    lines = read_metrics(place.metrics)
    if not lines:
        raise UserError(
            f"--workdir={place.display_path}: no metrics yet; come back after the first evaluation or checkpoint"
        )
    clock = _Clock(lines)
    curves = {}
    for metric in sorted({metric for line in lines for metric in line} - {"step"}):
        points = [(line["step"], line[metric]) for line in lines if _is_number(line.get(metric))]
        # Evenly thinned, the last point kept.
        points = points[:: -max(1, -(-len(points) // MAX_POINTS))][::-1]
        steps = [step for step, _ in points]
        curves[metric] = clock.at(steps) | {"values": [value for _, value in points]}
    events = []
    for start in history[1:]:
        changed = ", ".join(f"{key}: {old} to {new}" for key, (old, new) in start["changed"].items())
        text = f"restart after update {start['step']:,}, {start['time'][:16].replace('T', ' ')}"
        events.append(_event("restart", text + (f"; {changed}" if changed else ""), clock, start["step"]))
    before = (0, 0)
    for line in lines:
        count = line.get("train/skipped_updates", before[1])
        if count > before[1]:
            text = f"{count - before[1]} skipped in updates {before[0] + 1:,} to {line['step']:,}"
            events.append(_event("skip", text, clock, line["step"]))
        before = (line["step"], count)
    return {
        "name": name,
        "path": place.display_path,
        "config": {key: json.dumps(value) for key, value in config.items()},
        "curves": curves,
        "events": events,
        "figures": _figures(lines, config, history, clock),
    }


class _Clock:
    """Tokens and hours at a step, between the lines that tell them on the straight line."""

    def __init__(self, lines: list[dict[str, Any]]):
        self._known = {
            axis: [(0, 0.0), *((line["step"], line[metric]) for line in lines if metric in line)]
            for axis, metric in (("tokens", "data/tokens"), ("hours", "perf/hours"))
        }

    def at(self, steps: list[int]) -> dict[str, list[float]]:
        """Of steps that rise."""
        return {"steps": steps} | {axis: self._interpolate(axis, steps) for axis in self._known}

    def _interpolate(self, axis: str, steps: list[int]) -> list[float]:
        known, at, values = self._known[axis], 0, []
        for step in steps:
            while at + 2 < len(known) and known[at + 1][0] < step:
                at += 1
            (x0, y0), (x1, y1) = known[at], known[min(at + 1, len(known) - 1)]
            values.append(round(y0 + (y1 - y0) * (step - x0) / (x1 - x0), 6) if x1 > x0 else y0)
        return values


def _event(kind: str, text: str, clock: _Clock, step: int) -> dict[str, Any]:
    at = clock.at([step])
    return {"kind": kind, "text": text} | {axis: values[0] for axis, values in at.items()}


def _figures(
    lines: list[dict[str, Any]], config: dict[str, Any], history: list[dict[str, Any]], clock: _Clock
) -> list[tuple[str, str]]:
    """(label, value) of a run, the same labels in the same order for every run."""

    def last(metric: str, form: str, scale: float = 1.0) -> str:
        values = [line[metric] for line in lines if _is_number(line.get(metric))]
        return format(values[-1] * scale, form) if values else "-"

    def middle(metric: str, form: str, scale: float = 1.0) -> str:
        values = [line[metric] for line in lines if _is_number(line.get(metric))]
        return format(statistics.median(values) * scale, form) if values else "-"

    step = lines[-1]["step"]
    evaluations = [(line["eval/loss"], line["step"]) for line in lines if _is_number(line.get("eval/loss"))]
    now = clock.at([step])
    best = "{:.3f} at update {:,}".format(*min(evaluations)) if evaluations else "-"
    return [
        ("Updates", f"{step:,} of {config['num_train_steps']:,}"),
        ("Evaluation loss", last("eval/loss", ".3f")),
        ("Best evaluation loss", best),
        ("Evaluation perplexity", last("eval/perplexity", ".1f")),
        ("Evaluation accuracy", last("eval/accuracy", ".1f", 100) + " %"),
        ("Unigram model's loss", last("eval/unigram_loss", ".3f")),
        ("Train loss", last("train/loss", ".3f")),
        ("Tokens seen", f"{now['tokens'][0]:,.0f}"),
        ("Hours", f"{now['hours'][0]:.2f}"),
        ("Tokens a second, median", middle("perf/tokens_per_second", ",.0f")),
        ("Input wait, median", middle("perf/input_wait_fraction", ".1f", 100) + " %"),
        ("Utilization, median", middle("perf/mfu", ".1f", 100) + " %"),
        ("Skipped updates", last("train/skipped_updates", ",.0f")),
        ("Restarts", str(len(history) - 1)),
    ]


def _panels(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that some run has a curve for."""
    there = {metric for run in runs for metric in run["curves"]}
    sources = sorted(m for m in there if m.startswith("eval/") and m.count("/") > 1 and m.endswith("/loss"))
    by_source = (SOURCES_TITLE, "nats a predicted token", [(m, m.split("/", 1)[1][:-5]) for m in sources], 1)
    panels = []
    for title, unit, curves, scale in [PANELS[0], by_source, *PANELS[1:]]:
        curves = [(metric, label) for metric, label in curves if metric in there]
        if title == "Skipped updates" and not any(
            any(r["curves"].get(m, {"values": []})["values"]) for r in runs for m, _ in curves
        ):
            continue
        if curves:
            panels.append({"title": title, "unit": unit, "curves": curves, "scale": scale})
    return panels


def _differing_keys(runs: list[dict[str, Any]], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Keys that some run has otherwise than the defaults, those first in which the runs differ among themselves."""
    rows = []
    for key in sorted({key for run in runs for key in run["config"]} | defaults.keys()):
        values = [run["config"].get(key, "absent") for run in runs]
        default = json.dumps(defaults[key]) if key in defaults else "absent"
        if set(values) != {default}:
            rows.append({"key": key, "default": default, "values": values, "differs": len(set(values)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = 1
    while True:
        names = ["/".join(path.strip("/").split("/")[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        parts += 1


def _is_number(value: Any) -> bool:
    # JSON has no infinity, but Python's reader takes it.
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")
