"""The Hugging Face model directory: weights, config, tokenizer and model card."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mlm.data.tokenizer import Tokenizer
from mlm.export import sentence_transformers
from mlm.export.fill_mask import MaskPrediction
from mlm.export.model_card import Card, render_card
from mlm.models.config import EncoderConfig
from mlm.models.hf import weights
from mlm.reporting.curves import draw_curves
from mlm.run.workdir import sync

# Free bytes required beyond those of the weights, for the small files.
_SMALL_FILES_BYTES = 16 << 20


def export_model(
    directory: str,
    *,
    step: int,
    params: Any,
    config: EncoderConfig,
    tokenizer: Tokenizer,
    card: Card,
    metrics: Mapping[str, float],
    predictions: Sequence[MaskPrediction],
    metrics_path: str,
    dtype: str = "float32",
    for_sentence_transformers: bool = False,
) -> None:
    """Writes a model directory, replacing an existing one atomically.

    The model is written and synced to `directory`.tmp, then two renames replace the old one; between them, for
    microseconds, `directory` does not exist. If the process is killed there, the old model is `directory`.old until
    `recover` renames it back.

    Args:
      directory: the directory to write; its previous content is removed.
      step: number of steps done.
      params: float32 parameters on the host, without a device axis.
      config: the encoder's config.
      tokenizer: the tokenizer.
      card: content of README.md.
      metrics: results of the evaluation after `step`; empty without an evaluation.
      predictions: examples for the card.
      metrics_path: `metrics.jsonl`, for the curves.
      dtype: dtype of the weights, one of `settings.EXPORT_DTYPES`.
      for_sentence_transformers: add the files that sentence-transformers needs.

    Raises:
      OSError: the disk is full or fails; the old model is unchanged.
    """
    partial, old = directory + ".tmp", directory + ".old"
    recover(directory)
    shutil.rmtree(partial, ignore_errors=True)
    tensors = weights.to_hf(params, config)
    tensors |= weights.tied_biases(tensors, config)
    tensors = {name: np.ascontiguousarray(tensor).astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    _require_room(os.path.dirname(directory), sum(tensor.nbytes for tensor in tensors.values()))
    os.makedirs(partial)
    tokenizer.save(partial, max_seq_length=config.max_seq_length, has_token_types=config.type_vocab_size > 1)
    try:
        # transformers reads the framework from this entry and rejects a file without it.
        safetensors.numpy.save_file(tensors, os.path.join(partial, "model.safetensors"), metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"the model could not be written ({error})") from None
    # Some families name these two differently, or have default ids beyond a small vocabulary.
    ids = {"cls_token_id": tokenizer.bos_id, "sep_token_id": tokenizer.eos_id}
    fields = config.to_hf() | config.to_hf_4() | ids | {"dtype": dtype, "torch_dtype": dtype}
    _write_json(os.path.join(partial, "config.json"), fields)
    if for_sentence_transformers:
        sentence_transformers.write_files(
            partial, hidden_size=config.hidden_size, max_seq_length=tokenizer.max_tokens(config.max_seq_length)
        )
    draw_curves(metrics_path, os.path.join(partial, "curves.png"), title=f"{card.title}, {step:,} steps")
    with open(os.path.join(partial, "README.md"), "w", encoding="utf-8") as file:
        mask_token = tokenizer.hf.mask_token
        file.write(render_card(card, step=step, mask_token=mask_token, metrics=metrics, predictions=predictions))
    # safetensors creates files that only their owner can read.
    shutil.copymode(os.path.join(partial, "README.md"), os.path.join(partial, "model.safetensors"))
    state = {"global_step": step, "tokens_seen": card.tokens_seen, "hardware": card.hardware, **metrics}
    _write_json(os.path.join(partial, "trainer_state.json"), state)
    for folder, _, names in os.walk(partial):
        for name in (*names, "."):
            sync(os.path.join(folder, name))

    if os.path.exists(directory):
        os.rename(directory, old)
    os.rename(partial, directory)
    sync(os.path.dirname(directory))
    shutil.rmtree(old, ignore_errors=True)


def is_exported(directory: str) -> bool:
    """Returns whether a directory was written by `export_model`, not by the Trainer of transformers, for example."""
    try:
        with open(os.path.join(directory, "trainer_state.json"), encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and {"global_step", "tokens_seen", "hardware"} <= state.keys()


def recover(directory: str) -> None:
    """Restores the old model if an export was killed between its two renames; removes `directory`.old otherwise."""
    old = directory + ".old"
    if os.path.exists(old) and not os.path.exists(directory):
        os.rename(old, directory)
    shutil.rmtree(old, ignore_errors=True)


def _require_room(directory: str, weight_bytes: int) -> None:
    needed = weight_bytes + _SMALL_FILES_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"the model could not be written: {free / 1e6:,.0f} MB are free in {directory}, "
            f"and {needed / 1e6:,.0f} are needed"
        )


def _write_json(path: str, value: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
