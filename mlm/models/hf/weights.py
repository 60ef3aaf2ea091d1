"""Conversion between our parameter tree and the tensors of a transformers `...ForMaskedLM`.

    embeddings/{word,position,token_type}/embedding, embeddings/norm/{scale,bias}, embeddings/project/{kernel,bias}
    layer_<i>/attention/qkv/{weight,bias}, layer_<i>/attention/output/{kernel,bias}
    layer_<i>/attention_norm/{scale,bias}
    layer_<i>/feed_forward/{inner,output}/{kernel,bias}, layer_<i>/feed_forward_norm/{scale,bias}
    final_norm/{scale,bias}
    head/dense/{kernel,bias}, head/norm/{scale,bias}, head/bias, head/decoder

A tree has only the parameters that the family and the config require. A kernel is [in, out], a weight [out, in] as
in PyTorch. qkv is query, key and value, concatenated along the first axis; the inner kernel of a gated network is the
activated half, then the gate.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mlm.errors import UserError
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.models.families import PositionEmbedding
from mlm.models.hf.tensor_names import TENSOR_NAMES
from mlm.models.ops.rotary import sinusoids

# Leaf of our tree -> last part of PyTorch's name.
_LEAVES = dict.fromkeys(("kernel", "weight", "scale", "embedding", "decoder"), "weight") | {"bias": "bias"}

# Tensors in checkpoints of other classes and older versions that do not affect the logits of a token: constants, and
# other heads. Those of the first tuple are prefixed with the family's base model.
_UNUSED_IN_BASE = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.")
_UNUSED = ("cls.seq_relationship.", "sop_classifier.", "discriminator_predictions.")


def to_hf(params: Mapping[str, Any], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Returns contiguous host arrays with the names that the family's `...ForMaskedLM.save_pretrained()` writes.

    As there, a tied decoder is absent. Values are bitwise those of `params`.
    """
    names_of_path = dict(_leaf_tensor_names(config))
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(jax.device_get(params), sep="/").items():
        names = names_of_path[path]
        for name, part in zip(names, np.split(leaf, len(names)), strict=True):
            # Contiguous, because safetensors writes the buffer and ignores strides.
            tensors[name] = np.ascontiguousarray(part.T if path.endswith("/kernel") else part)
    return tensors | _constants(config)


def from_hf(
    tensors: Mapping[str, np.ndarray], config: EncoderConfig, *, head_params: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the parameter tree, float32 NumPy arrays, with the values of these tensors.

    Tensors that a masked language model does not use (poolers, constants saved by older versions, a decoder equal to
    the embeddings) are dropped.

    Args:
      tensors: name -> tensor.
      config: the model's config.
      head_params: a parameter tree whose head is used; `tensors` then need not have one.

    Raises:
      UserError: see `check_tensors`.
    """
    check_tensors(tensors, config, without_head=head_params is not None)
    leaves = {}
    for path, names in _leaf_tensor_names(config):
        if path.startswith("head/") and head_params is not None:
            leaves[path] = traverse_util.flatten_dict(head_params, sep="/")[path]
            continue
        parts = [np.asarray(tensors[name], np.float32) for name in names]
        leaves[path] = parts[0].T if path.endswith("/kernel") else np.concatenate(parts)
    return traverse_util.unflatten_dict(leaves, sep="/")


def check_tensors(tensors: Mapping[str, np.ndarray], config: EncoderConfig, *, without_head: bool = False) -> None:
    """Raises `UserError` with lists of tensors that are missing, unexpected, or of the wrong shape, dtype or value."""
    expected = {
        name: shape
        for name, shape in tensor_shapes(config).items()
        if not (without_head and is_head_tensor(name, config))
    }
    constants = _constants(config)
    tied = {name: source for name, source in tied_tensors(config).items() if name in tensors and source in tensors}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [
            name
            for name in tensors
            if name not in {*expected, *constants, *tied} and not is_unused_tensor(name, config)
        ],
        "of the wrong shape": [
            f"{name} {list(tensors[name].shape)} (expected {list(shape)})"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "not floating-point": [
            f"{name} {tensors[name].dtype}"
            for name in expected
            if name in tensors and not jnp.issubdtype(tensors[name].dtype, jnp.floating)
        ],
        "different from the tensor they are tied to": [
            name for name, source in tied.items() if not np.array_equal(tensors[name], tensors[source])
        ],
        "different from the constant": [
            name for name, value in constants.items() if name in tensors and not _is_close(tensors[name], value)
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{problem}: {format_names(names)}" for problem, names in problems.items() if names)
        raise UserError(
            f"the tensors do not match the config of the {config.model_type} model: {found}; use config and weights of "
            "the same model"
        )


def tied_tensors(config: EncoderConfig) -> dict[str, str]:
    """Returns second name -> first name of tied tensors. transformers 5 saves the first only, older versions both."""
    return TENSOR_NAMES[config.model_type].tied(config)


def tied_biases(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Returns the tensors of `to_hf` that an exported model has under their second name, too: the head's bias.

    transformers 4.48 silently sets the bias of RoBERTa and ALBERT to zero in a file that lacks this name, even in its
    own files.
    """
    tied = tied_tensors(config).items()
    return {second: tensors[first] for second, first in tied if second.endswith(".bias")}


def redundant_tensors(config: EncoderConfig) -> set[str]:
    """Returns names of tensors without information: the second names of tied tensors, and constants."""
    return {*tied_tensors(config), *_constants(config)}


def tensor_names(path: str, config: EncoderConfig) -> tuple[str, ...]:
    """Returns the names of the tensors that make up a leaf of our tree; empty if the config has no such leaf."""
    return dict(_leaf_tensor_names(config)).get(path, ())


def is_head_tensor(name: str, config: EncoderConfig) -> bool:
    """Returns True for tensors of the head, a tied decoder included."""
    return name in tied_tensors(config) or any(
        name in names for path, names in _leaf_tensor_names(config) if path.startswith("head/")
    )


def is_unused_tensor(name: str, config: EncoderConfig) -> bool:
    """Returns True for tensors, of any class of the family, that do not affect the logits of a token."""
    base = TENSOR_NAMES[config.model_type].base
    return name.startswith((*(base + unused for unused in _UNUSED_IN_BASE), *_UNUSED))


def tensor_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the tensors that hold parameters."""
    tree = _param_shapes(config)
    shapes = {}
    for path, names in _leaf_tensor_names(config):
        first, *rest = tree[path].shape
        shape = (first // len(names), *rest)
        shapes.update(dict.fromkeys(names, shape[::-1] if path.endswith("/kernel") else shape))
    return shapes


def format_names(names: Iterable[str], *, at_most: int = 8) -> str:
    """Joins the first names, sorted, and the number of others."""
    names = sorted(names)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _constants(config: EncoderConfig) -> dict[str, np.ndarray]:
    """Returns tensors that are saved but not trained."""
    if config.family.position_embedding is not PositionEmbedding.ROTARY_INTERLEAVED:
        return {}
    name = f"{TENSOR_NAMES[config.model_type].base}encoder.embed_positions.weight"
    return {name: sinusoids(config.max_position_embeddings, width=config.head_size)}


def _is_close(tensor: np.ndarray, value: np.ndarray) -> bool:
    # Equal to half precision, in the rows that both have: max_position_embeddings changes the table's length.
    rows = min(len(tensor), len(value))
    return tensor.shape[1:] == value.shape[1:] and np.allclose(
        np.asarray(tensor[:rows], np.float32), value[:rows], rtol=0, atol=2**-8
    )


def _leaf_tensor_names(config: EncoderConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields each leaf's path in our tree and the names of the tensors that make it up."""
    modules = TENSOR_NAMES[config.model_type].modules(config)
    for path in _param_shapes(config):
        module, leaf = path.rsplit("/", 1)
        yield path, tuple(f"{name}.{_LEAVES[leaf]}" for name in modules[module])


@functools.cache
def _param_shapes(config: EncoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns path -> shape of the leaves of our tree, without computing anything."""
    variables = jax.eval_shape(lambda: MaskedLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    return traverse_util.flatten_dict(variables["params"], sep="/")
