"""--mode=report: the curves of one or more runs as one HTML page, which needs neither a network nor a server.

This file chooses what the page shows; `report.html` draws it, with Plotly and the data of the runs inserted.
"""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from mlm.errors import UserError
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import KeyChanges, WorkDir

# Maximum number of points per curve: a screen cannot show more, and they would make the page slow.
MAX_POINTS = 4000
# Panels in the order of the page: title, unit, curves as (metric, label), and the factor from the metric to the unit.
PANELS = (
    ("Loss", "nats per predicted token", [("train/loss", "train"), ("eval/loss", "eval")], 1),
    ("Accuracy", "% of predicted tokens", [("train/accuracy", "train"), ("eval/accuracy", "eval")], 100),
    ("Learning rate", "", [("train/learning_rate", "learning rate")], 1),
    ("Gradient norm", "before clipping", [("train/grad_norm", "gradient norm")], 1),
    ("Throughput", "tokens per second", [("perf/tokens_per_second", "tokens/s")], 1),
    ("Input wait", "% of the time", [("perf/input_wait_fraction", "input wait")], 100),
    ("Utilization", "% of the devices' peak FLOP/s", [("perf/mfu", "utilization")], 100),
    (
        "Pauses",
        "seconds since the last log line",
        [(f"perf/{name}_ms", name) for name in ("save", "evaluation", "export", "probes")],
        1e-3,
    ),
    ("Padding", "% of tokens", [("data/padding_fraction", "padding")], 100),
    ("Skipped steps", "so far", [("train/skipped_steps", "skipped")], 1),
)
# The stored curves of configs.
CURVES = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "docs", "curves")
# The panel of eval/<source>/loss, for the sources of a mixture.
SOURCES_TITLE = "Eval loss by source"
# Panels of the metrics of `eval.probes` and `eval.pairs`, <prefix>/<name>/accuracy: title, unit, prefix.
_TASKS = (("Probes", "% of held-out labels", "probe"), ("Minimal pairs", "% of pairs", "pairs"))


def run(
    settings: None,
    workdir: Sequence[str],
    *,
    output: str | None,
    reference: str | None = None,
    defaults: Mapping[str, Any],
    key_changes: KeyChanges | None = None,
) -> None:
    """Writes the page to `output`.

    Args:
      settings: unused.
      workdir: the directories of one or more runs.
      output: the file to write, replaced if it exists; None for report.html.
      reference: a stored curve to compare with, by its file or its name in docs/curves; None for no comparison.
      defaults: key -> value of `configs/default.py`, with dotted keys; the page shows what differs from it.
      key_changes: how config keys have changed since earlier versions; None for no changes.

    Raises:
      UserError: a directory has no run or no metrics yet, two are the same, there is no such reference, or the file
        cannot be written.
    """
    output = output or "report.html"
    if os.path.isdir(output):
        raise UserError(f"--output={output}: is a directory; name a file")
    workdirs = [WorkDir(path, key_changes=key_changes) for path in workdir]
    paths = [each.display_path for each in workdirs]
    if len(set(paths)) < len(paths):
        raise UserError("--workdir: the same run is given twice; give each run once")
    names = _short_names(paths)
    runs = [read_run(each, name) for each, name in zip(workdirs, names, strict=True)]
    if reference is not None:
        runs.append(read_reference(reference))
    _add_task_figures(runs)
    # Imported here: an error above need not wait for it.
    from plotly.offline import get_plotlyjs

    page = {"panels": _panels(runs), "runs": runs, "keys": _differing_keys(runs, defaults)}
    with open(os.path.join(os.path.dirname(__file__), "report.html"), encoding="utf-8") as file:
        html = file.read()
    # In a script, "</script>" would end it and "<!--" hide what follows.
    data = json.dumps(page, allow_nan=False).replace("<", "\\u003c")
    html = html.replace("/* the runs */", f"const page = {data};").replace("/* plotly */", get_plotlyjs())
    try:
        with open(output + ".tmp", "w", encoding="utf-8") as file:
            file.write(html)
        os.replace(output + ".tmp", output)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another file") from None
    logging.info("the report of %s is in %s", ", ".join(names), output)


def read_run(workdir: WorkDir, name: str) -> dict[str, Any]:
    """Returns what the page shows of a run.

    Returns:
      name, path; config: dotted key -> value as JSON; curves: metric -> {steps, tokens, hours, values}, equally long;
      events: restarts and skipped steps, each with its step, tokens and hours; figures: (label, value) of the table.

    Raises:
      UserError: there is no run, or it has no metrics yet.
    """
    lines = read_metrics(workdir.metrics)
    if not lines:
        workdir.read_config()
        raise UserError(
            f"--workdir={workdir.display_path}: has no metrics yet; try again after the first evaluation or checkpoint"
        )
    return _describe(name, workdir.display_path, workdir.read_config(), workdir.read_history(), lines)


def read_reference(name: str) -> dict[str, Any]:
    """Returns what the page shows of a stored curve, as `read_run` does.

    Its first line is the content of `config.json`, the others are those of `metrics.jsonl`: benchmarks/save_curve.py
    writes such files.

    Args:
      name: a file, or the name of one in docs/curves without its ending.

    Raises:
      UserError: there is no such file, or it is not a stored curve.
    """
    path = name if name.endswith(".jsonl") else os.path.join(CURVES, f"{name}.jsonl")
    if not os.path.isfile(path):
        known = sorted(file.removesuffix(".jsonl") for file in os.listdir(CURVES)) if os.path.isdir(CURVES) else []
        raise UserError(f"--reference={name}: no such file; stored curves are {', '.join(known)}")
    stored = read_metrics(path)
    if len(stored) < 2 or "history" not in stored[0]:
        raise UserError(f"--reference={name}: is not a stored curve; write one with benchmarks/save_curve.py")
    content, *lines = stored
    title = os.path.basename(path).removesuffix(".jsonl")
    return _describe(f"reference {title}", path, content["config"], content["history"], lines)


def _describe(
    name: str, path: str, config: dict[str, Any], history: list[dict[str, Any]], lines: list[dict[str, Any]]
) -> dict[str, Any]:
    curves = {}
    for metric in sorted({metric for line in lines for metric in line} - {"step"}):
        points = [(line["step"], line[metric]) for line in lines if _is_number(line.get(metric))]
        # Evenly spaced points, with the last one.
        points = points[:: -max(1, math.ceil(len(points) / MAX_POINTS))][::-1]
        curves[metric] = _axes(lines, [step for step, _ in points]) | {"values": [value for _, value in points]}
    return {
        "name": name,
        "path": path,
        "config": {key: json.dumps(value) for key, value in config.items()},
        "curves": curves,
        "events": _events(lines, history),
        "figures": _figures(lines, config, history),
    }


def _axes(lines: list[dict[str, Any]], steps: list[int]) -> dict[str, Sequence[float]]:
    """Returns the steps, and the tokens and hours at these steps: interpolated between the lines that have them."""
    return {
        "steps": steps,
        "tokens": _interpolate(lines, "data/tokens", steps),
        "hours": _interpolate(lines, "perf/hours", steps),
    }


def _interpolate(lines: list[dict[str, Any]], metric: str, steps: list[int]) -> list[float]:
    """Interpolates linearly from 0 at step 0; after the last line that has the metric, at the rate before it."""
    import numpy as np  # Imported here: errors in the command and in the files are found before.

    x, y = np.array([(0, 0.0), *((line["step"], line[metric]) for line in lines if metric in line)]).T
    rate = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 else 0.0
    beyond = np.maximum(np.array(steps) - x[-1], 0)
    return np.round(np.interp(steps, x, y) + rate * beyond, 6).tolist()


def _events(lines: list[dict[str, Any]], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the starts after the first one, then the log lines with skipped steps."""
    events = []
    for start in history[1:]:
        changes = ", ".join(f"{key}: {old} to {new}" for key, (old, new) in start["changed"].items())
        text = f"restart after step {start['step']:,}, {start['time'][:16].replace('T', ' ')}"
        events.append(("restart", text + (f"; {changes}" if changes else ""), start["step"]))
    last_step, last_count = 0, 0
    for line in lines:
        count = line.get("train/skipped_steps", last_count)
        if count > last_count:
            text = f"{count - last_count} skipped in steps {last_step + 1:,} to {line['step']:,}"
            events.append(("skip", text, line["step"]))
        last_step, last_count = line["step"], count
    axes = _axes(lines, [step for *_, step in events])
    return [
        {"kind": kind, "text": text} | {axis: values[i] for axis, values in axes.items()}
        for i, (kind, text, _) in enumerate(events)
    ]


def _figures(
    lines: list[dict[str, Any]], config: dict[str, Any], history: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Returns (label, value) pairs, the same labels in the same order for every run."""

    def values(metric: str) -> list[float]:
        return [line[metric] for line in lines if _is_number(line.get(metric))]

    def last(metric: str, form: str) -> str:
        return form.format(values(metric)[-1]).replace("%", " %") if values(metric) else "-"

    def median(metric: str, form: str) -> str:
        return form.format(statistics.median(values(metric))).replace("%", " %") if values(metric) else "-"

    step = lines[-1]["step"]
    now = _axes(lines, [step])
    evaluations = [(line["eval/loss"], line["step"]) for line in lines if _is_number(line.get("eval/loss"))]
    return [
        ("Steps", f"{step:,} of {config['num_train_steps']:,}"),
        ("Eval loss", last("eval/loss", "{:.3f}")),
        ("Best eval loss", "{:.3f} at step {:,}".format(*min(evaluations)) if evaluations else "-"),
        ("Eval perplexity", last("eval/perplexity", "{:.1f}")),
        ("Eval accuracy", last("eval/accuracy", "{:.1%}")),
        ("Unigram loss", last("eval/unigram_loss", "{:.3f}")),
        ("Train loss", last("train/loss", "{:.3f}")),
        ("Tokens seen", f"{now['tokens'][0]:,.0f}"),
        ("Hours", f"{now['hours'][0]:.2f}"),
        ("Tokens per second, median", median("perf/tokens_per_second", "{:,.0f}")),
        ("Input wait, median", median("perf/input_wait_fraction", "{:.1%}")),
        ("Utilization, median", median("perf/mfu", "{:.1%}")),
        ("Skipped steps", last("train/skipped_steps", "{:,.0f}")),
        ("Restarts", str(len(history) - 1)),
        ("Evaluation sequences, checksum", history[-1].get("eval_checksum", "-")),
    ]


def _add_task_figures(runs: Sequence[dict[str, Any]]) -> None:
    """Adds the last accuracies of probes and minimal pairs to the table, the same rows for every run."""
    prefixes = tuple(f"{prefix}/" for *_, prefix in _TASKS)
    for metric in sorted({metric for run in runs for metric in run["curves"] if metric.startswith(prefixes)}):
        for run in runs:
            values = run["curves"].get(metric, {}).get("values")
            run["figures"].append((metric, f"{100 * values[-1]:.1f} %" if values else "-"))


def _panels(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the panels for which a run has a curve; that of skipped steps only if there were any."""
    metrics = {
        metric
        for run in runs
        for metric, curve in run["curves"].items()
        if metric != "train/skipped_steps" or any(curve["values"])
    }

    def named(prefix: str, name: str) -> list[tuple[str, str]]:
        """Returns (metric, label) of the metrics <prefix>/<label>/<name>."""
        found = sorted(m for m in metrics if m.startswith(f"{prefix}/") and m.count("/") > 1 and m.endswith(f"/{name}"))
        return [(metric, metric.removeprefix(f"{prefix}/").removesuffix(f"/{name}")) for metric in found]

    loss, accuracy, *others = PANELS
    by_source = (SOURCES_TITLE, loss[1], named("eval", "loss"), 1)
    tasks = [(title, unit, named(prefix, "accuracy"), 100) for title, unit, prefix in _TASKS]
    panels = []
    for title, unit, curves, scale in (loss, by_source, accuracy, *tasks, *others):
        curves = [(metric, label) for metric, label in curves if metric in metrics]
        if curves:
            panels.append({"title": title, "unit": unit, "curves": curves, "scale": scale})
    return panels


def _differing_keys(runs: list[dict[str, Any]], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the keys that differ from the defaults in a run; first those that differ between the runs."""
    rows = []
    for key in sorted({key for run in runs for key in run["config"]} | defaults.keys()):
        values = [run["config"].get(key, "absent") for run in runs]
        default = json.dumps(defaults[key]) if key in defaults else "absent"
        if set(values) != {default}:
            rows.append({"key": key, "default": default, "values": values, "differs": len(set(values)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _short_names(paths: list[str]) -> list[str]:
    """Returns the shortest ends of the paths that differ from each other."""
    for count in range(1, max(path.count("/") for path in paths) + 1):
        names = ["/".join(path.strip("/").split("/")[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return paths


def _is_number(value: Any) -> bool:
    """Returns whether the value can be drawn: Python reads Infinity and NaN from JSON, too."""
    return isinstance(value, int | float) and math.isfinite(value)
