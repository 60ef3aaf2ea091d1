"""Ablations of the quickstart's recipe: each variation alone, on the same text, seeds and number of tokens.

    python benchmarks/recipe_sweep.py --output=runs/sweep                     # all variations: hours on two cores
    python benchmarks/recipe_sweep.py --output=runs/sweep --only=best,adamw   # some
    python benchmarks/recipe_sweep.py --output=runs/sweep --seeds=1,2,3 --steps=1300

Runs that are finished are not repeated, so the command can be interrupted and extended. It writes `table.md` (final
eval loss as mean and range over seeds, difference to the best recipe, seconds of training, tokens) and `curves.png`.
A variation with another packing has other evaluation sequences: for the table, the exported model of every run that has
the tokenizer of the best recipe is evaluated on the sequences of the best recipe.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from matplotlib.figure import Figure

from configs import quickstart
from mlm import build, load, parallel, steps
from mlm.evaluate import Evaluator
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings
from mlm.train import train_and_evaluate

# Keys of the optimizers that the best recipe sets, to be reset where another optimizer does not have them.
_NO_MUON = {"optimizer.adam_learning_rate": None}
_NO_ADAM = {"optimizer.adam_beta2": None}
# Variation -> changes of configs/quickstart.py; "family" chooses another one there, "steps" multiplies the steps.
VARIATIONS: dict[str, dict[str, Any]] = {
    "best": {},
    "adamw": {**_NO_MUON, "optimizer.name": "adamw", "optimizer.learning_rate": 4e-3},
    "adamw, twice the rate": {**_NO_MUON, "optimizer.name": "adamw", "optimizer.learning_rate": 8e-3},
    "stable_adamw": {**_NO_MUON, "optimizer.name": "stable_adamw", "optimizer.learning_rate": 2e-3},
    "lamb": {**_NO_MUON, "optimizer.name": "lamb", "optimizer.learning_rate": 1e-2},
    "lion": {**_NO_MUON, **_NO_ADAM, "optimizer.name": "lion", "optimizer.learning_rate": 4e-4},
    "adafactor": {**_NO_MUON, **_NO_ADAM, "optimizer.name": "adafactor", "optimizer.learning_rate": 2e-2},
    "half the rate": {"optimizer.learning_rate": 0.01, "optimizer.adam_learning_rate": 2e-3},
    "twice the rate": {"optimizer.learning_rate": 0.04, "optimizer.adam_learning_rate": 8e-3},
    "embeddings and head at 2e-3": {"optimizer.adam_learning_rate": 2e-3},
    "linear schedule": {"optimizer.schedule": "linear", "optimizer.decay_steps": None},
    "decay over half of the steps": {"optimizer.decay_steps": 0.5},
    "decay over a fifth of the steps": {"optimizer.decay_steps": 0.2},
    "ema 0.99": {"optimizer.ema_decay": 0.99},
    "z-loss": {"loss.z_loss": 1e-4},
    "15 % masks": {"masking.mlm_probability": 0.15},
    "40 % masks": {"masking.mlm_probability": 0.4},
    "30 % to 15 % masks": {"masking.mlm_probability": (0.3, 0.15)},
    "whole words": {"masking.strategy": "whole_word"},
    "spans": {"masking.strategy": "span"},
    "concatenate": {"data.packing": "concatenate"},
    "isolate": {"data.packing": "isolate"},
    "windows of 2,000 documents": {"data.shuffle_buffer_size": 2_000},
    "roberta": {"family": "roberta"},
    "roformer": {"family": "roformer"},
    "half the batch, twice the steps": {"per_device_train_batch_size": 16, "steps": 2},
    "twice the batch, half the steps": {"per_device_train_batch_size": 64, "steps": 0.5},
    "vocabulary of 4,096": {"tokenizer.vocab_size": 4_096},
}


def build_settings(variation: str, *, seed: int, num_steps: int) -> RunSettings:
    """Returns the settings of a run."""
    changes = dict(VARIATIONS[variation])
    config = quickstart.get_config(changes.pop("family", "modernbert"))
    num_steps = round(num_steps * changes.pop("steps", 1))
    every = max(1, num_steps // 4)
    changes |= {"seed": seed, "num_train_steps": num_steps, "eval_steps": every, "save_steps": num_steps}
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return RunSettings.from_dict(config.to_dict())


def evaluations(workdir: str) -> list[tuple[float, float, float]]:
    """Returns (tokens, seconds, eval loss) of each evaluation."""
    found, tokens, hours = [], 0.0, 0.0
    for line in read_metrics(os.path.join(workdir, "metrics.jsonl")):
        tokens, hours = line.get("data/tokens", tokens), line.get("perf/hours", hours)
        if "eval/loss" in line:
            found.append((tokens, 3600 * hours, line["eval/loss"]))
    return found


def evaluate_model(workdir: str, components: build.Components) -> float | None:
    """Returns the loss of a model on the evaluation sequences of `components`; None if it has another tokenizer."""
    loaded = load.load_model(os.path.join(workdir, "model"))
    if loaded.tokenizer.hf.get_vocab() != components.tokenizer.hf.get_vocab():
        return None
    model = components.step_config.model.clone(config=loaded.encoder)
    step_config = dataclasses.replace(components.step_config, model=model)
    eval_step = functools.partial(steps.eval_step, step_config=step_config, axis_name=parallel.AXIS)
    evaluator = Evaluator(
        parallel.data_parallel(eval_step),
        components.text.eval_rows_RxL,
        per_device_batch_size=64,
        pad_id=components.tokenizer.pad_id,
    )
    unigram_V = np.zeros(loaded.encoder.vocab_size, np.float32)  # Its loss is not used.
    return evaluator(parallel.replicate(loaded.params), unigram_V)["eval/loss"]


def table(results: dict[str, list[list[tuple[float, float, float]]]], losses: dict[str, list[float]]) -> str:
    """Returns a Markdown table of the final losses, the best first."""
    best = statistics.mean(losses["best"])
    rows = ["| recipe | eval loss | against the best | seconds | million tokens |", "|---|---|---|---|---|"]
    for name in sorted(losses, key=lambda name: statistics.mean(losses[name])):
        mean, runs = statistics.mean(losses[name]), results[name]
        spread = f" ({min(losses[name]):.3f} to {max(losses[name]):.3f})" if len(runs) > 1 else ""
        seconds, tokens = (statistics.mean(run[-1][column] for run in runs) for column in (1, 0))
        rows.append(f"| {name} | {mean:.3f}{spread} | {mean - best:+.3f} | {seconds:.0f} | {tokens / 1e6:.2f} |")
    return "\n".join(rows) + "\n"


def draw(results: dict[str, list[list[tuple[float, float, float]]]], path: str) -> None:
    """Draws the eval losses over tokens."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(results.items()):
        for index, run in enumerate(runs):
            axes.plot(
                [tokens / 1e6 for tokens, _, _ in run],
                [loss for _, _, loss in run],
                color=f"C{number % 10}",
                linestyle=("-", "--", ":")[number // 10 % 3],
                linewidth=3 if name == "best" else 1,
                label=None if index else name,
            )
    axes.set_xlabel("million tokens")
    axes.set_ylabel("eval loss (nats)")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains what is missing, then writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", default="", help="names of variations, separated by commas; all by default")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--steps", type=int, default=1_300)
    options = parser.parse_args()
    names = [name for name in VARIATIONS if not options.only or name in ("best", *options.only.split(","))]
    if unknown := set(filter(None, options.only.split(","))) - {*VARIATIONS}:
        parser.error(f"--only={','.join(sorted(unknown))}: must be of {', '.join(VARIATIONS)}")
    results: dict[str, list[list[tuple[float, float, float]]]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    of_best = None
    for name in names:
        for seed in map(int, options.seeds.split(",")):
            workdir = os.path.join(options.output, f"{name.replace(' ', '_').replace(',', '')}-{options.steps}-{seed}")
            settings = build_settings(name, seed=seed, num_steps=options.steps)
            if WorkDir(workdir).exported_step() != settings.num_train_steps:
                train_and_evaluate(settings, workdir)
            of_best = of_best or build.build(settings, WorkDir(workdir))
            results[name].append(evaluations(workdir))
            losses[name].append(evaluate_model(workdir, of_best) or results[name][-1][-1][2])
    with open(os.path.join(options.output, "table.md"), "w", encoding="utf-8") as file:
        file.write(table(results, losses))
    draw(results, os.path.join(options.output, "curves.png"))
    print(table(results, losses))


if __name__ == "__main__":
    main()
