"""Starting from weights that are there: a checkpoint of transformers, of the hub or of ours, fitted to a run's model.

Rules, each told in a line of the log where it applies:

- A plain encoder (`BertModel`), or one with another head, gives all but the head, which starts as in a new model.
- Rows of the vocabulary go with their token's string when the checkpoint has a tokenizer of its own, else with their
  id. A row that the checkpoint does not have starts at the mean of those it has: a token like any other, where random
  numbers would stand out among trained ones. The decoder's bias and an untied decoder's rows do the same.
- Learned positions past the checkpoint's last repeat its own from the first on (as Longformer does, Beltagy et al.,
  arXiv:2004.05150): neighbours keep the distance that the trained layers know. Fewer positions are its first ones.
- float16 and bfloat16 become float32.
"""

import dataclasses
import json
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import huggingface_hub
import jax
import numpy as np
import safetensors.numpy
from absl import logging
from huggingface_hub.errors import HfHubHTTPError

from mlm.data.sources.source import is_local_path
from mlm.data.tokenizer import read_vocabulary
from mlm.errors import UserError, one_line
from mlm.models.config import EncoderConfig
from mlm.models.hf import weights
from mlm.models.hf.tensor_names import TENSOR_NAMES

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")


@dataclasses.dataclass(frozen=True)
class PretrainedWeights:
    """Weights as they are found, under the names of the family's `...ForMaskedLM`.

    Attributes:
      name: the directory or the hub's name, for messages.
      config: theirs.
      tensors: those that the model has a use for.
      has_head: whether the head is among them.
      vocabulary: token -> id of the tokenizer beside them; None where there is none.
    """

    name: str
    config: EncoderConfig
    tensors: dict[str, np.ndarray]
    has_head: bool
    vocabulary: dict[str, int] | None

    def has_tokens_of(self, vocabulary: Mapping[str, int]) -> bool:
        """Whether a tokenizer's tokens have the ids that they have here, as far as that is known."""
        ids = max(vocabulary.values()) + 1
        known = self.vocabulary is None or all(self.vocabulary.get(token) == id for token, id in vocabulary.items())
        return known and ids <= self.config.vocab_size


@dataclasses.dataclass(frozen=True)
class AdaptedWeights:
    """Tensors that fit a run's model."""

    tensors: dict[str, np.ndarray]
    config: EncoderConfig
    has_head: bool

    def params(self, fresh: Callable[[], Any]) -> dict[str, Any]:
        """The parameter tree; `fresh` makes that of a new model, for a head that is not there."""
        return weights.from_hf(self.tensors, self.config, fresh=None if self.has_head else fresh())


def open_config(name: str, *, cache_dir: str | None) -> EncoderConfig:
    """Reads the config of a local directory or of a model on the hub.

    Raises:
      UserError: it is not there, or not one that the encoder can be.
    """
    return _read_config(_fetch(name, cache_dir=cache_dir, patterns=["config.json"]))


def open_checkpoint(name: str, *, cache_dir: str | None) -> PretrainedWeights:
    """Reads config, weights and vocabulary of a local directory or of a model on the hub.

    Raises:
      UserError: one of them is not there, cannot be read, or they do not go together.
    """
    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json", *_TOKENIZER_FILES]
    path = _fetch(name, cache_dir=cache_dir, patterns=patterns)
    if not _files(path, "model.safetensors") and not os.path.isdir(os.path.expanduser(name)):
        # Only now: many models on the hub have both, and either is large.
        path = _fetch(name, cache_dir=cache_dir, patterns=["config.json", "pytorch_model*.bin*", *_TOKENIZER_FILES])
    config = _read_config(path)
    found = _named_as_in_full(_read_tensors(path), config)
    has_head = any(weights.is_head(tensor, config) for tensor in found)
    kept = found
    if not has_head:  # What stands outside the encoder is another head.
        base = TENSOR_NAMES[config.model_type].base
        kept = {tensor: array for tensor, array in found.items() if tensor.startswith(base)}
    weights.check(kept, config, without_head=not has_head)
    wanted = weights.shapes(config)
    if unused := found.keys() - wanted.keys() - weights.second_names(config):
        _say("%s: tensors that a masked language model has no use for are left out: %s", name, weights.some(unused))
    return PretrainedWeights(
        name=name,
        config=config,
        tensors={tensor: found[tensor] for tensor in wanted if tensor in found},
        has_head=has_head,
        vocabulary=read_vocabulary(path),
    )


def fit(checkpoint: PretrainedWeights, config: EncoderConfig, *, vocabulary: Mapping[str, int]) -> AdaptedWeights:
    """Fits a checkpoint to a model and its tokenizer's token -> id, by the rules above.

    Raises:
      UserError: the model differs in more than its vocabulary and its positions.
    """
    tensors = dict(checkpoint.tensors)
    _say("starting from the weights of %s", checkpoint.name)
    if not checkpoint.has_head:
        _say("%s has no head for masked language modelling: it starts as in a new model", checkpoint.name)
    source_V = _source_rows(checkpoint, config, vocabulary)
    if not np.array_equal(source_V, np.arange(checkpoint.config.vocab_size)):
        for path in ("embeddings/word/embedding", "head/bias", "head/decoder"):
            for tensor in weights.names_of(path, config):
                if tensor in tensors:
                    tensors[tensor] = _pick_rows(tensors[tensor], source_V)
        _say(
            "vocabulary: %d of %d rows go with their %s; the others start at the mean of the checkpoint's %d",
            np.sum(source_V >= 0),
            len(source_V),
            "id, for the checkpoint has no tokenizer" if checkpoint.vocabulary is None else "token",
            checkpoint.config.vocab_size,
        )
    for tensor in weights.names_of("embeddings/position/embedding", config):
        rows = _position_rows(checkpoint.config, config)
        if not np.array_equal(rows, np.arange(checkpoint.config.max_position_embeddings)):
            tensors[tensor] = tensors[tensor][rows]
            _say(
                "positions: rows of up to %d tokens, of the checkpoint's %d, which are repeated past their end",
                config.max_seq_length,
                checkpoint.config.max_seq_length,
            )
    weights.check(tensors, config, without_head=not checkpoint.has_head)
    return AdaptedWeights(tensors=tensors, config=config, has_head=checkpoint.has_head)


def _source_rows(checkpoint: PretrainedWeights, config: EncoderConfig, vocabulary: Mapping[str, int]) -> np.ndarray:
    """int [V]: the checkpoint's row for each of ours, -1 where it has none."""
    old_size, new_size = checkpoint.config.vocab_size, config.vocab_size
    ids_V = np.arange(new_size)
    source_V = np.where(ids_V < old_size, ids_V, -1)
    if checkpoint.vocabulary is not None:
        # An id that no token of theirs has either is a spare row, and stays one.
        taken = [id for id in checkpoint.vocabulary.values() if id < new_size]
        source_V[taken] = -1
        for token, id in vocabulary.items():
            source_V[id] = checkpoint.vocabulary.get(token, -1)
    return np.where(source_V < old_size, source_V, -1)


def _pick_rows(table: np.ndarray, source_V: np.ndarray) -> np.ndarray:
    table = np.asarray(table, np.float32)
    picked = table[np.maximum(source_V, 0)]
    picked[source_V < 0] = table.mean(axis=0, dtype=np.float64)
    return picked


def _position_rows(old: EncoderConfig, new: EncoderConfig) -> np.ndarray:
    """int [max_position_embeddings]: the checkpoint's row for each of ours; some families begin after padding's."""
    old_first, new_first = (config.max_position_embeddings - config.max_seq_length for config in (old, new))
    before = np.minimum(np.arange(new_first), max(0, old_first - 1))
    return np.concatenate([before, old_first + np.arange(new.max_seq_length) % old.max_seq_length])


def _named_as_in_full(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Names of a plain encoder, and those of norms in checkpoints that come from TensorFlow, as they are now."""
    names = TENSOR_NAMES[config.model_type]
    bare = f"{names.encoder['embeddings/word']}.weight" in tensors
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, now in ((".gamma", ".weight"), (".beta", ".bias")):
            name = name.removesuffix(theirs) + now if name.endswith(theirs) else name
        outside = weights.is_head(name, config) or weights.is_unused(name, config)
        renamed[names.base + name if bare and not outside else name] = tensor
    return renamed


def _read_config(path: str) -> EncoderConfig:
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            return EncoderConfig.from_hf(json.load(file))
    except ValueError:
        raise UserError(f"{path}/config.json is not JSON; fetch it anew") from None


def _read_tensors(path: str) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    if files := _files(path, "model.safetensors"):
        for file in files:
            try:
                tensors |= safetensors.numpy.load_file(file)
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read ({one_line(error)}); fetch it anew") from None
        return tensors
    files = _files(path, "pytorch_model.bin")
    if not files:
        raise UserError(
            f"{path} has neither model.safetensors nor pytorch_model.bin to start from; for its config alone, set "
            "model.config_name"
        )
    for file in files:
        tensors |= _read_pytorch(file)
    return tensors


def _read_pytorch(file: str) -> dict[str, np.ndarray]:
    """One file of PyTorch's own format, which only PyTorch reads."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file} is PyTorch's own format, and PyTorch is not installed: `pip install torch`, or save the model "
            "with transformers' save_pretrained, which writes safetensors"
        ) from None
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} is damaged, or holds more than tensors, which could run anything; fetch it anew, or save the "
            "model as safetensors where it can be trusted"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}); fetch it anew") from None
    return {
        name: (tensor.to(torch.float32) if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in tensors.items()
    }


def _files(path: str, whole: str) -> list[str]:
    """The file of that name, or the shards that its index names; none where there is neither."""
    if os.path.isfile(os.path.join(path, whole)):
        return [os.path.join(path, whole)]
    index = os.path.join(path, f"{whole}.index.json")
    if not os.path.isfile(index):
        return []
    try:
        with open(index, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not an index of shards; fetch it anew") from None
    if absent := [shard for shard in shards if not os.path.isfile(os.path.join(path, shard))]:
        raise UserError(f"{index} names {', '.join(absent[:4])}, which {path} does not have; fetch it anew")
    return [os.path.join(path, shard) for shard in shards]


def _fetch(name: str, *, cache_dir: str | None, patterns: list[str]) -> str:
    """A local directory with the model's files: `name` itself, or its copy from the hub."""
    name = os.path.expanduser(name)
    if os.path.isfile(os.path.join(name, "config.json")):
        return name
    if is_local_path(name) and not os.path.exists(name):
        raise UserError(f"there is no model directory {name!r}; check the path")
    if os.path.exists(name):
        raise UserError(f"the model directory {name!r} has no config.json; check the path")
    try:
        return huggingface_hub.snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns)
    except (HfHubHTTPError, OSError, ValueError):
        raise UserError(
            f"the model {name!r} is neither a local directory nor to be had from the hub; check the name and the "
            "network, or set model.config_name to a directory with a config.json"
        ) from None


def _say(message: str, *values: Any) -> None:
    if jax.process_index() == 0:
        logging.info(message, *values)
