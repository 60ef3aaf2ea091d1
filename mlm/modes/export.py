"""--mode=export: writes a checkpoint of a run, or the mean of several, as a Hugging Face model directory."""

import json
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


def run(
    settings: RunSettings,
    workdir: str,
    *,
    step: int | None = None,
    average: int = 1,
    output: str | None = None,
    dtype: str | None = None,
) -> str:
    """Writes a checkpoint of a run as a Hugging Face model directory.

    Args:
      settings: those of the run.
      workdir: the run's.
      step: which checkpoint; None for the newest.
      average: of how many checkpoints, up to that one, the parameters' mean is taken.
      output: where to; None for the run's own `model/`.
      dtype: of the weights written; None for the run's export.dtype.

    Returns:
      The directory.

    Raises:
      UserError: there is no such checkpoint, or something else stands at `output`.
    """
    dtype = dtype or settings.export.dtype
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(EXPORT_DTYPES)}")
    if output is not None and is_url(output):
        raise UserError(f"--output={output}: URLs are not supported; name a directory here and copy it there")
    place = WorkDir(workdir)
    directory = os.path.abspath(os.path.expanduser(output)) if output is not None else place.model
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise UserError(f"--output={output}: there is a file; name a directory, or one that can be made")
    if os.path.isdir(directory) and os.listdir(directory) and "trainer_state.json" not in os.listdir(directory):
        raise UserError(f"--output={output}: there is something else than a model; name another directory")
    if output is None:
        place.lock()  # A run writes there, too.
    try:
        saved = load_checkpoint(settings, place, step=step, average=average)
        last = saved.steps[-1]
        title = os.path.basename(place.path)
        if average > 1:
            title += f", mean of the checkpoints {', '.join(map(str, saved.steps))}"
        processes, rows_per_process = place.last_topology()
        card = build_card(
            settings,
            title=title,
            model_type=saved.encoder.model_type,
            step=last,
            rows=processes * rows_per_process,
            tokens_seen=saved.tokens_seen,
            hardware=_hardware(place),
        )
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        model_directory.export_model(
            directory,
            step=last,
            params=saved.params,
            config=saved.encoder,
            tokenizer=saved.tokenizer,
            card=card,
            # Those of a checkpoint are not those of a mean.
            metrics=_evaluation(place, last) if average == 1 else {},
            predictions=fill_mask(MaskedLM(saved.encoder), saved.params, saved.tokenizer, settings.report.sentences),
            metrics_path=place.metrics,
            dtype=dtype,
        )
        if output is None:
            place.push()
    except OSError as error:
        raise UserError(f"{error}; make room, or mend that, and export again") from None
    finally:
        place.unlock()
    shown = directory if output is not None else os.path.join(place.display_path, "model")
    logging.info("exported update %s to %s", " + ".join(map(str, saved.steps)), shown)
    return shown


def _hardware(place: WorkDir) -> str:
    """What the run's own export says; empty where there is none."""
    try:
        with open(os.path.join(place.model, "trainer_state.json"), encoding="utf-8") as file:
            return json.load(file)["hardware"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return ""


def _evaluation(place: WorkDir, step: int) -> dict[str, float]:
    """The metrics of the evaluation after update `step`, empty if there was none."""
    for line in read_metrics(place.metrics):
        if line["step"] == step:
            return {name: value for name, value in line.items() if name.startswith("eval/")}
    return {}
