"""A run's models as they were saved: any checkpoint as a Hugging Face directory, and what a model says to a sentence.

Nothing here needs the run's devices, its text or its training step; a run that goes on is not disturbed.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from absl import logging
from ml_collections import ConfigDict

from mlm import build
from mlm.data.tokenizer import Tokenizer, load_tokenizer
from mlm.errors import UserError
from mlm.export import model_directory
from mlm.export.fill_mask import fill_mask, table
from mlm.export.model_card import build_card
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.models.hf import weights
from mlm.reporting.curves import read_metrics
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError
from mlm.run.gcs import is_url
from mlm.run.workdir import WorkDir

# Sentences of a file or a pipe that are filled in together.
_SENTENCES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on the host.

    Attributes:
      steps: the checkpoints it is the mean of, most often one.
      params: float32, unstacked.
      encoder: its config.
      tokenizer: its tokenizer.
      tokens_seen: by the updates up to the last of `steps`.
    """

    steps: tuple[int, ...]
    params: Any
    encoder: EncoderConfig
    tokenizer: Tokenizer
    tokens_seen: int


def export_checkpoint(
    config: ConfigDict,
    workdir: str,
    *,
    step: int | None = None,
    average: int = 1,
    output: str | None = None,
    dtype: str | None = None,
) -> str:
    """Writes a checkpoint of a run as a Hugging Face model directory.

    Args:
      config: the run's.
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
    dtype = dtype or config.export.dtype
    if dtype not in model_directory.DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(model_directory.DTYPES)}")
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
        saved = load_checkpoint(config, place, step=step, average=average)
        last = saved.steps[-1]
        title = os.path.basename(place.path)
        if average > 1:
            title += f", mean of the checkpoints {', '.join(map(str, saved.steps))}"
        processes, rows_per_process = place.last_topology()
        card = build_card(
            config,
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
            predictions=fill_mask(MaskedLM(saved.encoder), saved.params, saved.tokenizer, config.report.sentences),
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


def load_checkpoint(config: ConfigDict, place: WorkDir, *, step: int | None, average: int = 1) -> LoadedModel:
    """Reads the parameters of a checkpoint, or the mean of some.

    Raises:
      UserError: there are no such checkpoints, or they cannot be read.
    """
    if average < 1:
        raise UserError(f"--average={average} must be at least 1")
    with Checkpointer(place.checkpoints, keep_checkpoints=config.checkpoint.keep_checkpoints) as checkpointer:
        there = checkpointer.steps()
        if not there:
            raise UserError(
                f"{place.display_path} has no checkpoints; name the work directory of a run that has saved one"
            )
        step = there[-1] if step is None else step
        if step not in there:
            raise UserError(f"--step={step}: there is no such checkpoint; there are {', '.join(map(str, there))}")
        steps = [other for other in there if other <= step][-average:]
        if len(steps) < average:
            raise UserError(
                f"--average={average}: up to update {step} there are only the checkpoints "
                f"{', '.join(map(str, steps))}; checkpoint.keep_checkpoints and checkpoint.keep_every_steps keep more"
            )
        try:
            mean, tokens_seen = None, 0
            for other in steps:
                params, loop = checkpointer.restore_params(other)
                tokens_seen = loop["tokens_seen"]
                # In float64, so that the mean of equal ones is the same to the bit.
                params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) / len(steps), params)
                mean = params if mean is None else jax.tree.map(np.add, mean, params)
        except CorruptCheckpointError as error:
            raise UserError(
                f"checkpoint {other} in {place.display_path} cannot be read ({error}); choose another --step"
            ) from None
    tokenizer = load_tokenizer(place.tokenizer)
    path = os.path.join(place.model, "config.json")
    encoder = _read_encoder(path) if os.path.exists(path) else build.open_encoder(config, tokenizer)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), mean)
    return LoadedModel(tuple(steps), params, encoder, tokenizer, tokens_seen)


def load_model(directory: str, *, shown: str | None = None) -> LoadedModel:
    """Reads an exported model directory, called `shown` where that is not its name.

    Raises:
      UserError: there is none.
    """
    shown = shown or directory
    directory = directory if os.path.exists(directory) else directory + ".old"
    names = os.listdir(directory) if os.path.isdir(directory) else []
    if not {"config.json", "model.safetensors"} <= set(names):
        raise UserError(
            f"there is no model in {shown}: the run has not evaluated yet; --mode=export makes one of a checkpoint"
        )
    encoder = _read_encoder(os.path.join(directory, "config.json"))
    tensors = safetensors.numpy.load_file(os.path.join(directory, "model.safetensors"))
    return LoadedModel((), weights.from_hf(tensors, encoder), encoder, load_tokenizer(directory), 0)


def _read_encoder(path: str) -> EncoderConfig:
    try:
        with open(path, encoding="utf-8") as file:
            return EncoderConfig.from_hf(json.load(file))
    except ValueError:
        raise UserError(f"{path} is not JSON; --mode=export writes it anew") from None


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


def fill_sentences(config: ConfigDict, workdir: str, sentences: Sequence[str], *, step: int | None = None) -> None:
    """Prints the five best words for each mask of the sentences: the command line's, or those of standard input.

    Args:
      config: the run's.
      workdir: the run's.
      sentences: with "<mask>" or the tokenizer's own mask token; none: standard input's lines.
      step: the checkpoint to ask; None for the model in `model/`.

    Raises:
      UserError: there is no such model, or a sentence has no mask or is too long.
    """
    place = WorkDir(workdir)
    if step is None:
        place.fetch_weights()
        saved = load_model(place.model, shown=os.path.join(place.display_path, "model"))
    else:
        saved = load_checkpoint(config, place, step=step)
    model, params = MaskedLM(saved.encoder), jax.device_put(saved.params)
    asked = False
    for some in _batches(sentences, _lines()):
        asked = True
        print(table(fill_mask(model, params, saved.tokenizer, some)), flush=True)
    if not asked:
        raise UserError("no sentence; write some after the flags, or send lines to standard input")


def _lines() -> Iterable[str]:
    return (line.strip() for line in sys.stdin if line.strip())


def _batches(sentences: Sequence[str], lines: Iterable[str]) -> Iterable[list[str]]:
    """The sentences at once; or lines, some at a time, and one where a person types them."""
    if sentences:
        yield list(sentences)
        return
    at_once = 1 if sys.stdin.isatty() else _SENTENCES_AT_ONCE
    some = []
    for line in lines:
        some.append(line)
        if len(some) == at_once:
            yield some
            some = []
    if some:
        yield some
