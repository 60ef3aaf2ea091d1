"""A run's models as they were saved: any checkpoint as a Hugging Face directory, and what a model says to a sentence.

Nothing here needs the run's devices, its text or its training step; a run that goes on is not disturbed.
"""

import dataclasses
import json
import os
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from mlm import build
from mlm.data.tokenizer import Tokenizer, load_tokenizer
from mlm.errors import UserError
from mlm.models.config import EncoderConfig
from mlm.models.hf import weights
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings

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


def load_checkpoint(settings: RunSettings, place: WorkDir, *, step: int | None, average: int = 1) -> LoadedModel:
    """Reads the parameters of a checkpoint, or the mean of some.

    Raises:
      UserError: there are no such checkpoints, or they cannot be read.
    """
    if average < 1:
        raise UserError(f"--average={average} must be at least 1")
    with Checkpointer(place.checkpoints, keep_checkpoints=settings.checkpoint.keep_checkpoints) as checkpointer:
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
    encoder = _read_encoder(path) if os.path.exists(path) else build.open_encoder(settings, tokenizer)
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
