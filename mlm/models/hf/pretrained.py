"""Loading of pretrained weights (a directory or hub model of transformers, or an exported `model/`) for a run's model.

Rules where the checkpoint and the run's model differ; each logs a line:

- A checkpoint without a masked-language-model head (`BertModel`, a classifier) gives all weights but the head's, which
  is initialized.
- Embeddings are matched by token if the checkpoint has a tokenizer, else by id. A token without an embedding starts at
  the mean of the checkpoint's embeddings; random values would stand out among trained ones. The decoder's
  bias and the rows of an untied decoder are matched the same way.
- Learned position embeddings past the checkpoint's last repeat from the first on (as in Longformer, Beltagy et al.,
  arXiv:2004.05150), which keeps the relative distances that the layers know. For shorter rows, the first ones are used.
- float16 and bfloat16 are converted to float32.
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
    """A checkpoint, with the names of the family's `...ForMaskedLM`.

    Attributes:
      name: the directory or hub name, for messages.
      config: the checkpoint's config.
      tensors: the tensors that a masked language model uses.
      has_head: True if the head is among them.
      vocabulary: token -> id of the checkpoint's tokenizer; None if it has none.
    """

    name: str
    config: EncoderConfig
    tensors: dict[str, np.ndarray]
    has_head: bool
    vocabulary: dict[str, int] | None

    def has_tokens_of(self, vocabulary: Mapping[str, int]) -> bool:
        """Returns True if these tokens have the checkpoint's ids, or the checkpoint has no tokenizer to compare."""
        same = self.vocabulary is None or all(self.vocabulary.get(token) == id for token, id in vocabulary.items())
        return same and max(vocabulary.values()) < self.config.vocab_size


@dataclasses.dataclass(frozen=True)
class AdaptedWeights:
    """Pretrained tensors with the shapes of a run's model."""

    tensors: dict[str, np.ndarray]
    config: EncoderConfig
    has_head: bool

    def params(self, init_params: Callable[[], Any]) -> dict[str, Any]:
        """Returns the parameter tree; `init_params` is called for the head if the checkpoint has none."""
        return weights.from_hf(self.tensors, self.config, head_params=None if self.has_head else init_params())


def load_config(name: str, *, cache_dir: str | None) -> EncoderConfig:
    """Loads the config of a local directory or a model on the hub.

    Raises:
      UserError: it does not exist, or the encoder does not support it.
    """
    return _read_config(_fetch(name, cache_dir=cache_dir, patterns=["config.json"]))


def load_weights(name: str, *, cache_dir: str | None) -> PretrainedWeights:
    """Loads config, weights and vocabulary of a local directory or a model on the hub.

    Raises:
      UserError: a file is missing or damaged, or config and weights do not match.
    """
    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json", *_TOKENIZER_FILES]
    path = _fetch(name, cache_dir=cache_dir, patterns=patterns)
    if not _files(path, "model.safetensors") and not os.path.isdir(os.path.expanduser(name)):
        # Only if there are no safetensors: many models on the hub have both, and each is large.
        path = _fetch(name, cache_dir=cache_dir, patterns=["config.json", "pytorch_model*.bin*", *_TOKENIZER_FILES])
    config = _read_config(path)
    found = _full_names(_read_tensors(path), config)
    has_head = any(weights.is_head_tensor(tensor, config) for tensor in found)
    checked = found
    if not has_head:  # Tensors outside the encoder belong to another head.
        base = TENSOR_NAMES[config.model_type].base
        checked = {tensor: array for tensor, array in found.items() if tensor.startswith(base)}
    weights.check_tensors(checked, config, without_head=not has_head)
    used = weights.tensor_shapes(config)
    if unused := found.keys() - used.keys() - weights.redundant_tensors(config):
        _log("%s: ignored unused tensors: %s", name, weights.format_names(unused))
    return PretrainedWeights(
        name=name,
        config=config,
        tensors={tensor: found[tensor] for tensor in used if tensor in found},
        has_head=has_head,
        vocabulary=read_vocabulary(path),
    )


def adapt_to_config(
    pretrained: PretrainedWeights, config: EncoderConfig, *, vocabulary: Mapping[str, int]
) -> AdaptedWeights:
    """Adapts pretrained weights to a model's config and its tokenizer's token -> id, by the rules above.

    Raises:
      UserError: the configs differ in more than vocabulary and positions.
    """
    tensors = dict(pretrained.tensors)
    _log("starting from the weights of %s", pretrained.name)
    if not pretrained.has_head:
        _log("%s has no masked-language-model head; it is initialized", pretrained.name)
    source_V = _source_ids(pretrained, config, vocabulary)
    if not np.array_equal(source_V, np.arange(pretrained.config.vocab_size)):
        for path in ("embeddings/word/embedding", "head/bias", "head/decoder"):
            for tensor in weights.tensor_names(path, config):
                if tensor in tensors:
                    tensors[tensor] = _select_rows(tensors[tensor], source_V)
        _log(
            "vocabulary: %d of %d embeddings are pretrained, matched by %s; the others start at the mean of its %d",
            np.sum(source_V >= 0),
            len(source_V),
            "id because the checkpoint has no tokenizer" if pretrained.vocabulary is None else "token",
            pretrained.config.vocab_size,
        )
    for tensor in weights.tensor_names("embeddings/position/embedding", config):
        source_rows = _source_position_rows(pretrained.config, config)
        if not np.array_equal(source_rows, np.arange(pretrained.config.max_position_embeddings)):
            tensors[tensor] = tensors[tensor][source_rows]
            _log(
                "positions: %d, from the checkpoint's %d, which are repeated if there are fewer",
                config.max_seq_length,
                pretrained.config.max_seq_length,
            )
    weights.check_tensors(tensors, config, without_head=not pretrained.has_head)
    return AdaptedWeights(tensors=tensors, config=config, has_head=pretrained.has_head)


def _source_ids(pretrained: PretrainedWeights, config: EncoderConfig, vocabulary: Mapping[str, int]) -> np.ndarray:
    """Returns int [V]: the checkpoint's id for each id of the new vocabulary, -1 if it has none."""
    old_size, new_size = pretrained.config.vocab_size, config.vocab_size
    ids_V = np.arange(new_size)
    source_V = np.where(ids_V < old_size, ids_V, -1)
    if pretrained.vocabulary is not None:
        # Ids without a token in both vocabularies are spare rows and keep their embeddings.
        taken = [id for id in pretrained.vocabulary.values() if id < new_size]
        source_V[taken] = -1
        for token, id in vocabulary.items():
            source_V[id] = pretrained.vocabulary.get(token, -1)
    return np.where(source_V < old_size, source_V, -1)


def _select_rows(table: np.ndarray, source_V: np.ndarray) -> np.ndarray:
    """Returns the rows with these ids, in float32; the mean of all rows for -1."""
    table = np.asarray(table, np.float32)
    selected = table[np.maximum(source_V, 0)]
    selected[source_V < 0] = table.mean(axis=0, dtype=np.float64)
    return selected


def _source_position_rows(old: EncoderConfig, new: EncoderConfig) -> np.ndarray:
    """Returns int [max_position_embeddings]: the checkpoint's row of the position table for each new row."""
    # RoBERTa has pad_token_id + 1 rows before the first position.
    old_first, new_first = (config.max_position_embeddings - config.max_seq_length for config in (old, new))
    before = np.minimum(np.arange(new_first), max(0, old_first - 1))
    return np.concatenate([before, old_first + np.arange(new.max_seq_length) % old.max_seq_length])


def _full_names(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Adds the prefix that checkpoints of a plain encoder lack, and renames TensorFlow's gamma and beta of norms."""
    names = TENSOR_NAMES[config.model_type]
    lacks_prefix = f"{names.encoder['embeddings/word']}.weight" in tensors
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            name = name.removesuffix(old) + new if name.endswith(old) else name
        outside = weights.is_head_tensor(name, config) or weights.is_unused_tensor(name, config)
        renamed[names.base + name if lacks_prefix and not outside else name] = tensor
    return renamed


def _read_config(path: str) -> EncoderConfig:
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            return EncoderConfig.from_hf(json.load(file))
    except ValueError:
        raise UserError(f"{path}/config.json: is not JSON; download it again") from None


def _read_tensors(path: str) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    if files := _files(path, "model.safetensors"):
        for file in files:
            try:
                tensors |= safetensors.numpy.load_file(file)
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read ({one_line(error)}); download it again") from None
        return tensors
    files = _files(path, "pytorch_model.bin")
    if not files:
        raise UserError(
            f"the model {path!r}: has neither model.safetensors nor pytorch_model.bin; to use its config only, set "
            "model.config_name"
        )
    for file in files:
        tensors |= _read_pytorch(file)
    return tensors


def _read_pytorch(file: str) -> dict[str, np.ndarray]:
    """Reads a file in PyTorch's format, which needs PyTorch."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file}: is in PyTorch's format, and PyTorch is not installed; `pip install torch`, or convert the model "
            "to safetensors with transformers' save_pretrained"
        ) from None
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file}: is damaged, or contains code besides tensors; download it again, or convert it to safetensors "
            "if you trust it"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}); download it again") from None
    return {
        name: (tensor.to(torch.float32) if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in tensors.items()
    }


def _files(path: str, name: str) -> list[str]:
    """Returns the file of that name, or the shards listed in its index; empty if there is neither."""
    if os.path.isfile(os.path.join(path, name)):
        return [os.path.join(path, name)]
    index = os.path.join(path, f"{name}.index.json")
    if not os.path.isfile(index):
        return []
    try:
        with open(index, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: is not a valid shard index; download it again") from None
    if missing := [shard for shard in shards if not os.path.isfile(os.path.join(path, shard))]:
        raise UserError(f"{index}: lists {', '.join(missing[:4])}, which {path} does not have; download them")
    return [os.path.join(path, shard) for shard in shards]


def _fetch(name: str, *, cache_dir: str | None, patterns: list[str]) -> str:
    """Returns a local directory with the model's files: `name` itself, or a download from the hub."""
    name = os.path.expanduser(name)
    if os.path.isfile(os.path.join(name, "config.json")):
        return name
    if is_local_path(name) and not os.path.exists(name):
        raise UserError(f"the model {name!r}: no such directory; check the path")
    if os.path.exists(name):
        raise UserError(f"the model {name!r}: has no config.json; check the path")
    try:
        return huggingface_hub.snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns)
    except (HfHubHTTPError, OSError, ValueError):
        raise UserError(
            f"the model {name!r}: is not a local directory, and cannot be downloaded from the hub; check the name and "
            "the network"
        ) from None


def _log(message: str, *values: Any) -> None:
    if jax.process_index() == 0:
        logging.info(message, *values)
