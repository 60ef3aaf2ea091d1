"""Reads `metrics.jsonl` and draws its curves as a PNG."""

import json
import os
import warnings
from typing import Any

from mlm.errors import UserError


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`, without an incomplete last line left by a crash. None stands for NaN and infinity.

    Raises:
      UserError: another line is not JSON, or has no step.
    """
    if not os.path.exists(path):
        return []
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                values = json.loads(line)
            except ValueError:
                raise UserError(f"{path}, line {number}: is not JSON; fix or remove the line") from None
            # The first line of a stored curve has the config.
            if not isinstance(values, dict) or not (isinstance(values.get("step"), int) or "config" in values):
                raise UserError(f"{path}, line {number}: has no step; remove the line")
            lines.append(values)
    return lines


def draw_curves(metrics_path: str, picture_path: str, *, title: str) -> None:
    """Draws loss, accuracy, learning rate and throughput over steps as a PNG; probes and minimal pairs if there are."""
    # Imported here: it takes half a second, and only an export draws.
    import matplotlib.figure

    lines = read_metrics(metrics_path)
    tasks = sorted({name for line in lines for name in line if name.startswith(("probe/", "pairs/"))})
    columns = 3 if tasks else 2
    figure = matplotlib.figure.Figure(figsize=(5 * columns, 7), layout="constrained")
    axes = figure.subplots(2, columns, sharex=True)

    def plot(axis: Any, name: str, label: str, *, scale: float = 1.0, **style: Any) -> None:
        points = [(line["step"], line[name] * scale) for line in lines if line.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    loss, accuracy, rate, throughput = axes[:, :2].flat
    plot(loss, "train/loss", "train", color="tab:blue", linewidth=1)
    plot(loss, "eval/loss", "evaluation", color="tab:orange", marker="o", markersize=3)
    plot(loss, "eval/unigram_loss", "unigram model", color="gray", linestyle="--", linewidth=1)
    loss.set(title="Loss", ylabel="nats per predicted token")
    plot(accuracy, "train/accuracy", "train", scale=100, color="tab:blue", linewidth=1)
    plot(accuracy, "eval/accuracy", "evaluation", scale=100, color="tab:orange", marker="o", markersize=3)
    accuracy.set(title="Accuracy", ylabel="% of predicted tokens")
    plot(rate, "train/learning_rate", "learning rate", color="tab:green")
    rate.set(title="Learning rate", xlabel="steps")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    plot(throughput, "perf/tokens_per_second", "throughput", color="tab:purple", linewidth=1)
    throughput.set(title="Throughput", ylabel="tokens per second", xlabel="steps", ylim=(0, None))
    throughput.yaxis.set_major_formatter("{x:,.0f}")
    for name in tasks:
        kind, task, _ = name.split("/")
        plot(axes[int(kind == "pairs"), 2], name, task, scale=100, marker="o", markersize=3)
    if tasks:
        # The full scale: with few examples, differences of a few percent are noise.
        axes[0, 2].set(title="Probes", ylabel="% of held-out labels", ylim=(0, 100))
        axes[1, 2].set(title="Minimal pairs", ylabel="% of pairs", ylim=(0, 100), xlabel="steps")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if len(axis.get_lines()) > 1 or axis.get_title() in ("Probes", "Minimal pairs"):
            axis.legend()
    figure.suptitle(title, parse_math=False)
    with warnings.catch_warnings():
        # A title in Chinese is drawn as boxes, which says enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(picture_path, dpi=110)
