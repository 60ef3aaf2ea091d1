"""Loads trained models from a run's checkpoints, from an exported model directory, or published ones.

Loading needs neither the run's devices nor its data, and does not disturb a run in progress.
"""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import logging

from mlm import build
from mlm.data.tokenizer import Tokenizer, load_tokenizer
from mlm.errors import UserError, one_line
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.models.hf import pretrained, weights
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings
from mlm.stages import settings_of_stages, stage_at, stages_at_last_start


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on the host.

    Attributes:
      steps: the checkpoints whose parameters are averaged, usually one; empty if unknown.
      params: float32 parameters, without a device axis.
      encoder: the encoder's config.
      tokenizer: the tokenizer.
      tokens_seen: number of training tokens up to the last of `steps`; 0 for an exported model.
    """

    steps: tuple[int, ...]
    params: Any
    encoder: EncoderConfig
    tokenizer: Tokenizer
    tokens_seen: int

    @property
    def max_tokens(self) -> int:
        """The length that texts are cut to: at most the training length, even if the model has more positions."""
        return self.tokenizer.max_tokens(self.encoder.max_seq_length)


def load_any(
    settings: RunSettings | None, workdir_path: str | None, *, model: str | None, step: int | None, needs_head: bool
) -> LoadedModel:
    """Loads the model of a run, or a published one.

    Args:
      settings: the run's settings.
      workdir_path: its work directory; None with `model`.
      model: a model directory or a name on the hub.
      step: the run's checkpoint; None for the model in `model/`.
      needs_head: refuse a model without masked-language-model head.

    Raises:
      UserError: there is no such model, or it lacks a tokenizer or the head.
    """
    if model is not None:
        return load_published(model, needs_head=needs_head)
    assert settings is not None
    assert workdir_path is not None
    workdir = WorkDir(workdir_path)
    if step is not None:
        return load_checkpoint(settings, workdir, step=step)
    workdir.fetch_weights()
    loaded = load_model(workdir.model, display_path=os.path.join(workdir.display_path, "model"))
    exported = workdir.exported_step()
    return loaded if exported is None else dataclasses.replace(loaded, steps=(exported,))


def load_published(name: str, *, needs_head: bool) -> LoadedModel:
    """Loads a model directory of transformers or a model on the hub; a missing head gets random weights.

    Raises:
      UserError: it does not exist, is damaged, or lacks a tokenizer or the head.
    """
    published = pretrained.load_weights(name, cache_dir=None)
    encoder, head_params = published.config, None
    if published.vocabulary is None:
        raise UserError(f"--model={name}: has no tokenizer; save its tokenizer in the same directory")
    if not published.has_head:
        if needs_head:
            raise UserError(f"--model={name}: has no masked-language-model head; choose a model that has one")
        head_params = jax.device_get(random_params(encoder, 0))
    tokenizer = load_tokenizer(name)
    if tokenizer.num_ids > encoder.vocab_size or tokenizer.pad_id != encoder.pad_token_id:
        raise UserError(
            f"--model={name}: its tokenizer has {tokenizer.num_ids} ids and pads with {tokenizer.pad_id}, its "
            f"model has {encoder.vocab_size} and {encoder.pad_token_id}; use the model's own tokenizer"
        )
    logging.info("loaded %s, %s with %d layers", name, encoder.model_type, len(encoder.layers))
    return LoadedModel((), weights.from_hf(published.tensors, encoder, head_params=head_params), encoder, tokenizer, 0)


@functools.partial(jax.jit, static_argnums=0)
def random_params(encoder: EncoderConfig, seed: int) -> Any:
    """Returns the parameters of a model before training."""
    return MaskedLM(encoder).init(jax.random.key(seed), jnp.ones((1, 2), jnp.int32))["params"]


def load_checkpoint(settings: RunSettings, workdir: WorkDir, *, step: int | None, average: int = 1) -> LoadedModel:
    """Loads a checkpoint, or the mean of the parameters of several.

    Args:
      settings: the run's settings.
      workdir: its work directory.
      step: the last checkpoint to use; None for the newest.
      average: number of checkpoints to average.

    Raises:
      UserError: such checkpoints do not exist or cannot be read.
    """
    # Imported here: it imports Orbax, which takes half a second, and an exported model needs none.
    from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError

    if average < 1:
        raise UserError(f"--average={average}: must be at least 1")
    with Checkpointer(workdir.storage, keep_checkpoints=settings.checkpoint.keep_checkpoints) as checkpointer:
        available = checkpointer.steps()
        if not available:
            raise UserError(
                f"--workdir={workdir.display_path}: has no checkpoints; give the work directory of a run that has some"
            )
        step = available[-1] if step is None else step
        if step not in available:
            raise UserError(f"--step={step}: no such checkpoint; choose one of {', '.join(map(str, available))}")
        steps = [other for other in available if other <= step][-average:]
        if len(steps) < average:
            raise UserError(
                f"--average={average}: up to step {step} there are only the checkpoints "
                f"{', '.join(map(str, steps))}; lower it, or keep more with checkpoint.keep_checkpoints or "
                "checkpoint.keep_every_steps"
            )
        try:
            mean, tokens_seen = None, 0
            for other in steps:
                params, loop = checkpointer.restore_params(other)
                tokens_seen = loop["tokens_seen"]
                # In float64, so that the mean of equal parameters is bitwise equal to them.
                params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) / len(steps), params)
                mean = params if mean is None else jax.tree.map(np.add, mean, params)
        except CorruptCheckpointError as error:
            raise UserError(
                f"--workdir={workdir.display_path}: cannot read checkpoint {other} ({error}); choose another --step"
            ) from None
    tokenizer = load_tokenizer(workdir.tokenizer)
    path = os.path.join(workdir.model, "config.json")
    stage = stage_at(stages_at_last_start(settings, workdir.last_stages()), steps[-1]).settings
    # The exported model may be from another stage.
    is_exported = os.path.exists(path) and len({other.model for other in settings_of_stages(settings)}) == 1
    encoder = _read_encoder(path) if is_exported else build.open_encoder(stage, tokenizer)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), mean)
    return LoadedModel(tuple(steps), params, encoder, tokenizer, tokens_seen)


def load_model(directory: str, *, display_path: str | None = None) -> LoadedModel:
    """Loads an exported model directory; messages call it `display_path`.

    Raises:
      UserError: the directory has no model.
    """
    display_path = display_path or directory
    # An export that was killed between its two renames leaves the old model here.
    directory = directory if os.path.exists(directory) else directory + ".old"
    names = os.listdir(directory) if os.path.isdir(directory) else []
    if not {"config.json", "model.safetensors"} <= set(names):
        raise UserError(
            f"{display_path}: there is no model, since the run has not evaluated yet; export a checkpoint with "
            "--mode=export"
        )
    encoder = _read_encoder(os.path.join(directory, "config.json"))
    try:
        tensors = safetensors.numpy.load_file(os.path.join(directory, "model.safetensors"))
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{display_path}/model.safetensors: is damaged ({one_line(error)}); export the model again with "
            "--mode=export"
        ) from None
    return LoadedModel((), weights.from_hf(tensors, encoder), encoder, load_tokenizer(directory), 0)


def _read_encoder(path: str) -> EncoderConfig:
    try:
        with open(path, encoding="utf-8") as file:
            return EncoderConfig.from_hf(json.load(file))
    except ValueError:
        raise UserError(f"{path}: is not JSON; export the model again with --mode=export") from None
