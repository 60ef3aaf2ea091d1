"""The model card: metadata that the hub reads, then figures, use, examples and recipe for people."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub

from mlm.data.sources.source import is_local_path
from mlm.export.fill_mask import MaskPrediction, shown
from mlm.settings import RunSettings

# The figures that the hub's leaderboards read.
_INDEXED = {"eval/loss": "loss", "eval/accuracy": "accuracy", "eval/perplexity": "perplexity"}


@dataclasses.dataclass(frozen=True)
class Data:
    """A source of text.

    Attributes:
      text: what it is, in Markdown.
      hub_id: the dataset's id on the hub, if it is one.
      dataset_config, split: of it.
    """

    text: str
    hub_id: str | None = None
    dataset_config: str | None = None
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """What the model card says beside the figures.

    Attributes:
      title: the model's name.
      model_type: the family.
      data: what it was trained on.
      start: "from scratch", or from what, in Markdown.
      base_model: the hub id of what it started from, if it is one.
      license, languages: as the hub abbreviates them.
      tokens_seen: by the updates so far, padding aside.
      hardware: what trained it; empty where nobody knows.
      recipe: rows of a table, name to value.
    """

    title: str
    model_type: str
    data: Sequence[Data]
    start: str
    base_model: str | None
    license: str | None
    languages: Sequence[str]
    tokens_seen: int
    hardware: str
    recipe: Mapping[str, Any]


def build_card(
    settings: RunSettings, *, title: str, model_type: str, step: int, rows: int, tokens_seen: int, hardware: str
) -> Card:
    """What the run's config says for the card.

    Args:
      config: the run's.
      title: the model's name.
      model_type: the family.
      step: updates made.
      rows: of an update, over all devices.
      tokens_seen: by the updates so far.
      hardware: what trained it.
    """
    name = settings.model.model_name_or_path
    local = name and (is_local_path(name) or os.path.exists(os.path.expanduser(name)))
    start = "from scratch"
    if name:
        start = f"from the weights of `{os.path.basename(os.path.normpath(name))}`"
        if not local:
            start = f"from [{name}](https://huggingface.co/{name})"
    recipe = {
        "updates": f"{step:,} of {settings.num_train_steps:,}",
        "rows an update": f"{rows:,} of {settings.data.max_seq_length} tokens",
        **{f"`{key}`": value for key, value in dataclasses.asdict(settings.optimizer).items()},
        **{f"`{key}`": value for key, value in dataclasses.asdict(settings.masking).items()},
        "`packing`": settings.data.packing,
        "`dtype` of the computation": settings.model.dtype,
        "`seed`": settings.seed,
    }
    return Card(
        title=title,
        model_type=model_type,
        data=_data_of(settings),
        start=start,
        base_model=name if name and not local else None,
        license=settings.hub.license,
        languages=settings.hub.languages,
        tokens_seen=tokens_seen,
        hardware=hardware,
        recipe=recipe,
    )


def _data_of(settings: RunSettings) -> tuple[Data, ...]:
    own = {
        "dataset_name": settings.data.dataset_name,
        "dataset_config_name": settings.data.dataset_config_name,
        "data_files": settings.data.data_files,
        "split": settings.data.split,
    }
    if not settings.data.mixture:
        return (_describe(own),)
    total = sum(entry[1] for entry in settings.data.mixture)
    found = []
    for name, weight, *options in settings.data.mixture:
        data = _describe(own | {"dataset_name": name} | dict(*options))
        found.append(dataclasses.replace(data, text=f"{data.text}, {weight / total:.1%} of the rows"))
    return tuple(found)


def _describe(source: Mapping[str, Any]) -> Data:
    """A local path is nobody's business: its last part must do."""
    files = source["data_files"]
    if files is not None:
        files = [files] if isinstance(files, str) else list(files)
        shown_files = [f"<{file}>" if "://" in file else f"`{os.path.basename(file)}`" for file in files[:5]]
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        return Data(f"the files {', '.join(shown_files)}{more}")
    name = source["dataset_name"]
    if name == "docstrings":
        return Data("the docstrings of Python packages")
    if is_local_path(name) or os.path.exists(os.path.expanduser(name)):
        return Data(f"`{os.path.basename(os.path.abspath(os.path.expanduser(name)))}`")
    part = f" (`{source['dataset_config_name']}`)" if source["dataset_config_name"] else ""
    link = f"[{name}](https://huggingface.co/datasets/{name}){part}"
    return Data(link, name, source["dataset_config_name"], source["split"])


def metadata(card: Card, *, metrics: Mapping[str, float]) -> huggingface_hub.ModelCardData:
    """The part that the hub reads, figures in the form of its model-index."""
    first = card.data[0]
    results = [
        huggingface_hub.EvalResult(
            task_type="fill-mask",
            task_name="Masked language modelling",
            # The hub wants one even where it has no such data set.
            dataset_type=first.hub_id or "text",
            dataset_name=f"{_plain(card)}, held-out rows",
            dataset_config=first.dataset_config,
            dataset_split=first.split,
            metric_type=short,
            metric_name=short,
            metric_value=round(metrics[name], 4),
        )
        for name, short in _INDEXED.items()
        if name in metrics and math.isfinite(metrics[name])
    ]
    return huggingface_hub.ModelCardData(
        language=list(card.languages) or None,
        license=card.license,
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["masked-lm", "jax", card.model_type],
        base_model=card.base_model,
        datasets=[data.hub_id for data in card.data if data.hub_id] or None,
        model_name=card.title,
        # A name without results is no model-index.
        eval_results=results or None,
    )


def _plain(card: Card) -> str:
    """What it was trained on, without Markdown."""
    return "; ".join(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", data.text).replace("`", "") for data in card.data)


def model_card(
    card: Card,
    *,
    step: int,
    mask_token: str,
    metrics: Mapping[str, float],
    predictions: Sequence[MaskPrediction],
) -> str:
    """README.md.

    Args:
      card: what does not change from one export to the next.
      step: updates made.
      mask_token: as sentences for this model write it.
      metrics: of the evaluation; may be empty.
      fillings: examples.
    """
    sentence = predictions[0].sentence.replace("<mask>", mask_token) if predictions else f"This is a {mask_token}."
    examples = [
        [
            filling.sentence.replace("<mask>", f"`{mask_token}`"),
            "; ".join(
                ", ".join(f"`{shown(word)}` ({100 * prob:.1f} %)" for word, prob in candidates)
                for candidates in filling.candidates
            ),
        ]
        for filling in predictions
    ]
    figures = [[name, f"{value:.4f}"] for name, value in metrics.items()]
    training = {"tokens seen": f"{card.tokens_seen:,}"} | ({"hardware": card.hardware} if card.hardware else {})
    data = "\n".join(f"- {data.text}" for data in card.data)
    parts = [
        f"---\n{metadata(card, metrics=metrics).to_yaml()}\n---\n",
        f"# {card.title}\n",
        f"A {card.model_type} encoder trained {card.start} with masked language modelling, for {step:,} updates.\n",
        "```python\nfrom transformers import pipeline\n"
        "# Needs PyTorch: pip install torch\n"
        'fill_mask = pipeline("fill-mask", model="path/or/name/of/this/model")\n'
        f"fill_mask({sentence!r})\n```\n",
        "## Figures\n",
        "On text that was not trained on, loss in nats per masked token:\n\n" + _table(["metric", "value"], figures)
        if figures
        else "These weights were not evaluated by themselves.\n",
        "![Loss, accuracy, learning rate and throughput over updates](curves.png)\n",
        *(["## Examples\n", _table(["sentence", "best guesses"], examples)] if examples else []),
        f"## Data\n\n{data}\n",
        "## Recipe\n",
        _table(["", ""], [[name, str(value)] for name, value in (training | dict(card.recipe)).items()]),
    ]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"
