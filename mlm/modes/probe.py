"""--mode=probe: linear classifiers on a model's frozen features, beside baselines."""

import json
import os
import time
from typing import Any

import huggingface_hub
from absl import logging

from mlm.downstream.tasks import Task, open_task
from mlm.errors import UserError
from mlm.export.model_card import add_results
from mlm.load import load_any
from mlm.modes.score import check_directory
from mlm.run.gcs import is_url
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings

# Our names of metrics -> the hub's.
_HUB_METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "f1",
    "f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}


def run(
    settings: RunSettings | None,
    workdir_path: str | None,
    *,
    task: str,
    model: str | None = None,
    step: int | None = None,
    test: str | None = None,
    seeds: int = 5,
    train_examples: int | None = None,
    output: str | None = None,
) -> None:
    """Prints a table of scores and adds it to `results.json`, and to the model card of the run's `model/`.

    Args:
      settings: the run's settings; None with `model`.
      workdir_path: the run's work directory; None with `model`.
      task: a file, a GLUE task or a dataset on the hub.
      model: a model directory or a name on the hub, instead of a run.
      step: the run's checkpoint; None for the model in `model/`.
      test: a file with the examples to test on; None to hold out a part of the task.
      seeds: number of splits.
      train_examples: number of examples to train on; None for all.
      output: the file of results; None for `results.json` in the work directory, or here with `model` or a bucket.

    Raises:
      UserError: the task or the model cannot be used.
    """
    start = time.monotonic()
    opened = open_task(task, test=test)
    local_workdir = workdir_path if workdir_path is not None and not is_url(workdir_path) else None
    path = output or os.path.join(local_workdir or "", "results.json")
    results = _read_results(path)
    loaded = load_any(settings, workdir_path, model=model, step=step, needs_head=False)
    # Imported here: scikit-learn takes a second, which an error found before need not wait for.
    from mlm.downstream.probe import as_json, format_result, probe

    name = model or workdir_path or ""
    shown = (
        os.path.basename(os.path.abspath(os.path.expanduser(name))) if model is None or os.path.isdir(name) else name
    )
    result = probe(loaded, opened, name=shown, seeds=seeds, train_examples=train_examples)
    print(format_result(result))
    entry = {"mode": "probe", "model": name, "step": max(loaded.steps, default=None), **as_json(result)}
    key = ("mode", "model", "step", "task", "train")
    results = [old for old in results if any(old.get(field) != entry[field] for field in key)] + [entry]
    _write_json(path, {"results": results})
    logging.info("%.0f s; the scores of all seeds are in %s", time.monotonic() - start, path)
    # The card has the scores with all examples.
    if local_workdir is not None and train_examples is None:
        scores = {metric: result.rows[0].mean(metric) for metric in opened.metrics}
        _add_to_card(WorkDir(local_workdir), entry["step"], opened, scores)


def _read_results(path: str) -> list[dict[str, Any]]:
    """Returns the results in a file; none if it does not exist."""
    check_directory(path)
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            return list(json.load(file)["results"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--output={path}: is not a file of results; name another with --output") from None


def _write_json(path: str, value: Any) -> None:
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(f"{path}.tmp", path)


def _add_to_card(workdir: WorkDir, step: int | None, task: Task, scores: dict[str, float]) -> None:
    """Adds scores to the card in `model/` if that is the model of the same step."""
    try:
        workdir.lock()  # A run in progress would replace model/ with that of another step.
    except UserError:
        logging.info("the model card is unchanged: the run is in progress")
        return
    try:
        card = os.path.join(workdir.model, "README.md")
        if not os.path.exists(card) or workdir.exported_step() != step:
            logging.info("the model card is unchanged: model/ is the model of another step")
            return
        is_words = task.train.words is not None
        results = [
            huggingface_hub.EvalResult(
                task_type="token-classification" if is_words else "text-classification",
                task_name="Linear probe of frozen features",
                # The hub requires a type, even for data that is not on the hub.
                dataset_type=task.dataset or "text",
                dataset_name=task.name,
                metric_type=_HUB_METRICS[metric],
                metric_name=metric,
                metric_value=round(score, 4),
            )
            for metric, score in scores.items()
        ]
        add_results(card, results)
    finally:
        workdir.unlock()
