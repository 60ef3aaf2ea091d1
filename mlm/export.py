"""The Hugging Face model directory: weights, config, tokenizer and a model card."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub
import numpy as np
import safetensors.numpy

from mlm.curves import draw_curves
from mlm.data.tokenizer import Tokenizer
from mlm.fill_mask import Filling, shown
from mlm.models import weights
from mlm.models.config import EncoderConfig


@dataclasses.dataclass(frozen=True)
class Card:
    """What the model card says beside the figures.

    Attributes:
      title: the model's name.
      data: what it was trained on.
      data_id: the dataset's id on the hub, if it is one.
      start: "from scratch", or from what.
      recipe: rows of a table, name to value.
    """

    title: str
    data: str
    data_id: str | None
    start: str
    recipe: Mapping[str, Any]


def export_model(
    directory: str,
    *,
    step: int,
    params: Any,
    config: EncoderConfig,
    tokenizer: Tokenizer,
    card: Card,
    metrics: Mapping[str, float],
    fillings: Sequence[Filling],
    metrics_path: str,
) -> None:
    """Writes `directory` anew, beside the old one first, so that a reader never sees half a model.

    Args:
      directory: where to; what stands there is replaced.
      step: updates made.
      params: on the host, unstacked.
      config: the encoder's.
      tokenizer: its tokenizer.
      card: for README.md.
      metrics: the last evaluation's.
      fillings: examples for the card.
      metrics_path: `metrics.jsonl`, for the curves.
    """
    partial, old = directory + ".tmp", directory + ".old"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    tokenizer.save(partial)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in weights.to_hf(params, config).items()}
    # transformers reads the framework from this entry and refuses a file without it.
    safetensors.numpy.save_file(tensors, os.path.join(partial, "model.safetensors"), metadata={"format": "pt"})
    _write_json(os.path.join(partial, "config.json"), config.to_hf())
    draw_curves(metrics_path, os.path.join(partial, "curves.png"), title=f"{card.title}, {step:,} updates")
    with open(os.path.join(partial, "README.md"), "w", encoding="utf-8") as file:
        file.write(model_card(card, step=step, config=config, tokenizer=tokenizer, metrics=metrics, fillings=fillings))
    _write_json(os.path.join(partial, "trainer_state.json"), {"global_step": step, **metrics})

    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(directory):
        os.rename(directory, old)
    os.rename(partial, directory)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: str, value: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def model_card(
    card: Card,
    *,
    step: int,
    config: EncoderConfig,
    tokenizer: Tokenizer,
    metrics: Mapping[str, float],
    fillings: Sequence[Filling],
) -> str:
    """Renders README.md: metadata the hub reads, then figures, use, examples, recipe."""
    data = huggingface_hub.ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["masked-lm", "jax", config.model_type],
        datasets=[card.data_id] if card.data_id else None,
        model_name=card.title,
        eval_results=[
            huggingface_hub.EvalResult(
                task_type="fill-mask",
                dataset_type=card.data_id or card.data,
                dataset_name=f"{card.data}, held-out rows",
                metric_type=name.removeprefix("eval/"),
                metric_value=round(value, 4),
            )
            for name, value in metrics.items()
            if name in ("eval/loss", "eval/accuracy", "eval/perplexity")
        ],
    )
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    recipe = "\n".join(f"| {name} | {value} |" for name, value in card.recipe.items())
    mask = tokenizer.hf.mask_token
    examples = "\n".join(
        f"| {filling.sentence.replace('<mask>', f'`{mask}`')} | "
        + ", ".join(f"`{shown(word)}` ({100 * prob:.1f} %)".replace("|", "\\|") for word, prob in filling.guesses)
        + " |"
        for filling in fillings
    )
    sentence = fillings[0].sentence.replace("<mask>", mask) if fillings else f"This is a {mask}."
    return f"""---
{data.to_yaml()}
---

# {card.title}

A {config.model_type} encoder trained {card.start} with masked language modelling on {card.data}, for {step:,} updates.

```python
from transformers import pipeline
fill_mask = pipeline("fill-mask", model="path/or/name/of/this/model")
fill_mask({sentence!r})
```

## Figures

On text that was not trained on, loss in nats per masked token:

| metric | value |
|---|---|
{figures}

![Loss, accuracy, learning rate and throughput over updates](curves.png)

## Examples

| sentence | best guesses |
|---|---|
{examples}

## Recipe

| key | value |
|---|---|
{recipe}
"""
