"""--mode=export: writes a checkpoint of a run, or the mean of several, as a Hugging Face model directory."""

import json
import math
import os

from absl import logging

from mlm.errors import UserError
from mlm.export import model_directory
from mlm.export.fill_mask import fill_mask
from mlm.export.model_card import build_card
from mlm.load import load_checkpoint
from mlm.models.encoder import MaskedLM
from mlm.reporting.curves import read_metrics
from mlm.run.gcs import is_url
from mlm.run.workdir import WorkDir
from mlm.settings import EXPORT_DTYPES, RunSettings
from mlm.stages import stage_at, stages_at_last_start

# Metrics of an evaluation.
_EVALUATED = ("eval/", "probe/", "pairs/")


def run(
    settings: RunSettings,
    workdir_path: str,
    *,
    step: int | None = None,
    average: int = 1,
    output: str | None = None,
    dtype: str | None = None,
    sentence_transformers: bool | None = None,
) -> str:
    """Writes a checkpoint of a run as a Hugging Face model directory.

    Args:
      settings: the run's settings.
      workdir_path: the run's work directory.
      step: the checkpoint; None for the newest.
      average: number of checkpoints, the last of them `step`, whose parameters are averaged.
      output: the directory to write; None for the run's own `model/`.
      dtype: dtype of the weights; None for the run's export.dtype.
      sentence_transformers: add the files of that library; None for the run's export.sentence_transformers.

    Returns:
      The directory.

    Raises:
      UserError: the checkpoint does not exist, or `output` is something else than a model directory.
    """
    dtype = dtype or settings.export.dtype
    if sentence_transformers is None:
        sentence_transformers = settings.export.sentence_transformers
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"--dtype={dtype}: must be one of {', '.join(EXPORT_DTYPES)}")
    if output is not None and is_url(output):
        raise UserError(f"--output={output}: URLs are not supported; name a local directory and copy it to the URL")
    workdir = WorkDir(workdir_path)
    topology = workdir.last_topology()
    if topology is None:
        raise UserError(f"--workdir={workdir_path}: contains no run; choose a run's work directory")
    directory = os.path.abspath(os.path.expanduser(output)) if output is not None else workdir.model
    flag = f"--workdir={workdir_path}: model/" if output is None else f"--output={output}:"
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise UserError(f"{flag} is a file; name a directory")
    if os.path.isdir(directory) and os.listdir(directory) and not model_directory.is_exported(directory):
        raise UserError(f"{flag} has files that are not a model's; name another directory")
    if output is None:
        workdir.lock()  # A run in progress writes there, too.
    try:
        loaded = load_checkpoint(settings, workdir, step=step, average=average)
        last = loaded.steps[-1]
        title = os.path.basename(workdir.path)
        if average > 1:
            title += f", mean of the checkpoints {', '.join(map(str, loaded.steps))}"
        stages = stages_at_last_start(settings, workdir.last_stages())
        stage = stage_at(stages, last)
        card = build_card(
            stage.settings,
            title=title,
            model_type=loaded.encoder.model_type,
            step=last,
            # The topology has the sequences of the first stage.
            sequences_per_step=math.prod(topology) // stages[0].rows_per_device * stage.rows_per_device,
            stages=stages,
            tokens_seen=loaded.tokens_seen,
            hardware=_hardware(workdir),
        )
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        model_directory.export_model(
            directory,
            step=last,
            params=loaded.params,
            config=loaded.encoder,
            tokenizer=loaded.tokenizer,
            card=card,
            # A mean of checkpoints was not evaluated.
            metrics=_eval_metrics(workdir, last) if average == 1 else {},
            predictions=fill_mask(MaskedLM(loaded.encoder), loaded.params, loaded.tokenizer, settings.report.sentences),
            metrics_path=workdir.metrics,
            dtype=dtype,
            for_sentence_transformers=sentence_transformers,
        )
        if output is None:
            workdir.push()
    except OSError as error:
        raise UserError(f"--mode=export: {error}; free some space or fix the disk, and export again") from None
    finally:
        workdir.unlock()
    display_path = directory if output is not None else os.path.join(workdir.display_path, "model")
    names = " + ".join(map(str, loaded.steps))
    logging.info("exported step%s %s to %s", "s" * (average > 1), names, display_path)
    return display_path


def _hardware(workdir: WorkDir) -> str:
    """Returns the hardware that the run's own export names; empty without an export."""
    try:
        with open(os.path.join(workdir.model, "trainer_state.json"), encoding="utf-8") as file:
            return json.load(file)["hardware"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return ""


def _eval_metrics(workdir: WorkDir, step: int) -> dict[str, float]:
    """Returns the metrics of the evaluation after `step`; empty without an evaluation."""
    for line in read_metrics(workdir.metrics):
        if line["step"] == step:
            return {name: value for name, value in line.items() if name.startswith(_EVALUATED) and value is not None}
    return {}
