"""The Hugging Face model directory: weights, config, tokenizer and a model card."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mlm.data.tokenizer import Tokenizer
from mlm.export.fill_mask import MaskPrediction
from mlm.export.model_card import Card, model_card
from mlm.models.config import EncoderConfig
from mlm.models.hf import weights
from mlm.reporting.curves import draw_curves
from mlm.run.workdir import sync

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


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
) -> None:
    """Writes `directory` anew: beside the old one, then in its place.

    A reader sees the old model or the new one, whole; between two renames, for some microseconds, none. Killed there,
    the old one stands beside as `directory`.old until `recover` puts it back. Everything is on the disk before it
    counts.

    Args:
      directory: where to; what stands there is replaced.
      step: updates made.
      params: on the host, unstacked.
      config: the encoder's.
      tokenizer: its tokenizer.
      card: for README.md.
      metrics: of its evaluation; may be empty.
      fillings: examples for the card.
      metrics_path: `metrics.jsonl`, for the curves.
      dtype: of the weights written, one of `DTYPES`.

    Raises:
      OSError: there is no room; what stood there still stands.
    """
    partial, old = directory + ".tmp", directory + ".old"
    recover(directory)
    shutil.rmtree(partial, ignore_errors=True)
    tensors = {name: np.ascontiguousarray(t).astype(DTYPES[dtype]) for name, t in weights.to_hf(params, config).items()}
    _require_room(os.path.dirname(directory), sum(tensor.nbytes for tensor in tensors.values()))
    os.makedirs(partial)
    tokenizer.save(partial)
    try:
        # transformers reads the framework from this entry and refuses a file without it.
        safetensors.numpy.save_file(tensors, os.path.join(partial, "model.safetensors"), metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"the model could not be written ({error})") from None
    # Some families' configs have these two by other names, or defaults past a small vocabulary.
    ids = {"cls_token_id": tokenizer.bos_id, "sep_token_id": tokenizer.eos_id}
    _write_json(os.path.join(partial, "config.json"), config.to_hf() | ids | {"dtype": dtype})
    draw_curves(metrics_path, os.path.join(partial, "curves.png"), title=f"{card.title}, {step:,} updates")
    with open(os.path.join(partial, "README.md"), "w", encoding="utf-8") as file:
        mask_token = tokenizer.hf.mask_token
        file.write(model_card(card, step=step, mask_token=mask_token, metrics=metrics, predictions=predictions))
    # safetensors makes files that nobody else may read.
    shutil.copymode(os.path.join(partial, "README.md"), os.path.join(partial, "model.safetensors"))
    state = {"global_step": step, "tokens_seen": card.tokens_seen, "hardware": card.hardware, **metrics}
    _write_json(os.path.join(partial, "trainer_state.json"), state)
    for name in (*os.listdir(partial), "."):
        sync(os.path.join(partial, name))

    if os.path.exists(directory):
        os.rename(directory, old)
    os.rename(partial, directory)
    sync(os.path.dirname(directory))
    shutil.rmtree(old, ignore_errors=True)


def recover(directory: str) -> None:
    """Puts the old model back where an export was killed between its two renames, and removes what one has left."""
    old = directory + ".old"
    if os.path.exists(old) and not os.path.exists(directory):
        os.rename(old, directory)
    shutil.rmtree(old, ignore_errors=True)


def _require_room(directory: str, needed: int) -> None:
    """Raises OSError unless so many bytes, and some more for what is small, are free."""
    needed += 16 << 20
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
