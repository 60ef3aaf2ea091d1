"""The model card, README.md of the exported model: metadata for the hub, and `model_card.md.jinja` for people."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub

from mlm.data.sources.source import is_local_path
from mlm.export.fill_mask import MaskPrediction, display_token
from mlm.settings import RunSettings
from mlm.stages import Stage

_TEMPLATE = os.path.join(os.path.dirname(__file__), "model_card.md.jinja")
# Metrics in the hub's model-index: our name -> the hub's name.
_HUB_METRICS = {"eval/loss": "loss", "eval/accuracy": "accuracy", "eval/perplexity": "perplexity"}


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """One source of training data.

    Attributes:
      name: plain text.
      description: Markdown.
      hub_id: the dataset's id on the hub; None for other sources.
      dataset_config, split: the configuration and split of the hub's dataset.
    """

    name: str
    description: str
    hub_id: str | None = None
    dataset_config: str | None = None
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """The content of a model card, except evaluation results and examples.

    Attributes:
      title: the model's name.
      model_type: the model family.
      data: the training data.
      initialization: Markdown, "from scratch" or "from ...".
      base_model: the hub id of the pretrained weights; None without such.
      license, languages: the hub's abbreviations.
      tokens_seen: number of training tokens, padding included.
      hardware: the devices, such as "8 x TPU v3"; empty if unknown.
      recipe: rows of a table, name -> value.
    """

    title: str
    model_type: str
    data: Sequence[TrainingData]
    initialization: str
    base_model: str | None
    license: str | None
    languages: Sequence[str]
    tokens_seen: int
    hardware: str
    recipe: Mapping[str, Any]


def build_card(
    settings: RunSettings,
    *,
    title: str,
    model_type: str,
    step: int,
    sequences_per_step: int,
    tokens_seen: int,
    hardware: str,
    stages: Sequence[Stage] = (),
) -> Card:
    """Returns the content of the card of a run.

    Args:
      settings: the run's settings, or those of the stage that `step` belongs to.
      title: the model's name.
      model_type: the model family.
      step: number of steps done.
      sequences_per_step: sequences in a step, over all devices.
      tokens_seen: number of training tokens, padding included.
      hardware: the devices; empty if unknown.
      stages: the run's stages.
    """
    data, begun = _training_data(settings), [stage for stage in stages if stage.start < max(step, 1)]
    if len(begun) > 1:
        data = tuple({source.name: source for stage in begun for source in _training_data(stage.settings)}.values())
    names = ", ".join(f"{stage.name} (steps {stage.start + 1:,} to {stage.end:,})" for stage in begun)
    pretrained = settings.model.model_name_or_path
    base_model = None
    if not pretrained:
        initialization = "from scratch"
    elif _is_local(pretrained):
        initialization = f"from the weights of `{_basename(pretrained)}`"
    else:
        initialization = f"from [{pretrained}](https://huggingface.co/{pretrained})"
        base_model = pretrained
    groups = ("optimizer.", "loss.", "masking.")
    options = {key: value for key, value in settings.flat().items() if key.startswith(groups) and value is not None}
    return Card(
        title=title,
        model_type=model_type,
        data=data,
        initialization=initialization,
        base_model=base_model,
        license=settings.hub.license,
        languages=settings.hub.languages,
        tokens_seen=tokens_seen,
        hardware=hardware,
        recipe={
            "steps": f"{step:,} of {settings.num_train_steps:,}",
            "sequences per step": f"{sequences_per_step:,} of {settings.data.max_seq_length} tokens",
            **({"stages": names} if len(stages) > 1 else {}),
            **{f"`{key}`": value for key, value in options.items()},
            "`packing`": settings.data.packing,
            "`dtype` of the computation": settings.model.dtype,
            "`seed`": settings.seed,
        },
    )


def _training_data(settings: RunSettings) -> tuple[TrainingData, ...]:
    defaults = {
        "dataset_name": settings.data.dataset_name,
        "dataset_config_name": settings.data.dataset_config_name,
        "data_files": settings.data.data_files,
        "split": settings.data.split,
    }
    entries = settings.data.mixture_entries
    if not entries:
        return (_describe(defaults),)
    total = sum(entry.weight for entry in entries)
    found = []
    for entry in entries:
        data = _describe(defaults | {"dataset_name": entry.name} | dict(entry.options))
        description = f"{data.description}, {entry.weight / total:.1%} of the sequences"
        found.append(dataclasses.replace(data, description=description))
    return tuple(found)


def _describe(source: Mapping[str, Any]) -> TrainingData:
    """Describes a source; the directories of local paths are private and left out."""
    files = source["data_files"]
    if files is not None:
        files = [files] if isinstance(files, str) else list(files)
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        names = [file if "://" in file else os.path.basename(file) for file in files[:5]]
        marked = [f"<{name}>" if "://" in name else f"`{name}`" for name in names]
        return TrainingData(f"{', '.join(names)}{more}", f"the files {', '.join(marked)}{more}")
    name = source["dataset_name"]
    if name == "docstrings":
        return TrainingData("docstrings", "the docstrings of Python packages")
    if _is_local(name):
        return TrainingData(_basename(name), f"`{_basename(name)}`")
    config = source["dataset_config_name"]
    link = f"[{name}](https://huggingface.co/datasets/{name})" + (f" (`{config}`)" if config else "")
    return TrainingData(name, link, name, config, source["split"])


def _is_local(path: str) -> bool:
    return is_local_path(path) or os.path.exists(os.path.expanduser(path))


def _basename(path: str) -> str:
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def metadata(card: Card, *, metrics: Mapping[str, float]) -> huggingface_hub.ModelCardData:
    """Returns the metadata that the hub reads, with evaluation results as its model-index."""
    first = card.data[0]
    results = [
        huggingface_hub.EvalResult(
            task_type="fill-mask",
            task_name="Masked language modeling",
            # The hub requires a type, even for data that is not on the hub.
            dataset_type=first.hub_id or "text",
            dataset_name=f"{', '.join(data.name for data in card.data)}, held-out sequences",
            dataset_config=first.dataset_config,
            dataset_split=first.split,
            metric_type=hub_name,
            metric_name=hub_name,
            metric_value=round(metrics[name], 4),
        )
        for name, hub_name in _HUB_METRICS.items()
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
        eval_results=results or None,
    )


def add_results(path: str, results: Sequence[huggingface_hub.EvalResult]) -> None:
    """Adds results to the model-index of a model card, in place of those of the same task and dataset."""
    card = huggingface_hub.ModelCard.load(path)
    replaced = {(result.task_name, result.dataset_name) for result in results}
    kept = [old for old in card.data.eval_results or () if (old.task_name, old.dataset_name) not in replaced]
    card.data.eval_results = [*kept, *results]
    card.data.model_name = card.data.model_name or os.path.basename(os.path.dirname(os.path.abspath(path)))
    partial = f"{path}.tmp"
    card.save(partial)
    os.replace(partial, path)


def render_card(
    card: Card,
    *,
    step: int,
    mask_token: str,
    metrics: Mapping[str, float],
    predictions: Sequence[MaskPrediction],
) -> str:
    """Returns the text of README.md.

    Args:
      card: its content.
      step: number of steps done.
      mask_token: the tokenizer's mask token.
      metrics: results of the evaluation after `step`; empty without an evaluation.
      predictions: examples.
    """
    sentence = predictions[0].sentence if predictions else "This is a <mask>."
    examples = [
        (
            prediction.sentence.replace("<mask>", f"`{mask_token}`"),
            "; ".join(
                ", ".join(f"`{display_token(token)}` ({100 * prob:.1f} %)" for token, prob in candidates)
                for candidates in prediction.candidates
            ),
        )
        for prediction in predictions
    ]
    rendered = huggingface_hub.ModelCard.from_template(
        metadata(card, metrics=metrics),
        template_path=_TEMPLATE,
        card=card,
        step=step,
        usage_sentence=repr(sentence.replace("<mask>", mask_token)),
        metrics=metrics,
        examples=examples,
    )
    return f"{rendered}\n"
