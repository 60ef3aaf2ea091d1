"""Our parameter tree <-> the tensors of a transformers `RobertaForMaskedLM`, by name and layout.

    embeddings/{word,position,token_type}/embedding, embeddings/norm/{scale,bias}
    layer_<i>/attention/{qkv,output}/{kernel,bias}, layer_<i>/attention_norm/{scale,bias}
    layer_<i>/feed_forward/{inner,output}/{kernel,bias}, layer_<i>/feed_forward_norm/{scale,bias}
    head/dense/{kernel,bias}, head/norm/{scale,bias}, head/bias

A kernel is [in, out], PyTorch's weight its transpose; qkv holds query, key and value side by side in its last
axis.
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

# Our module -> the PyTorch modules whose tensors it holds side by side.
_MODULES = {
    "embeddings/word": ("roberta.embeddings.word_embeddings",),
    "embeddings/position": ("roberta.embeddings.position_embeddings",),
    "embeddings/token_type": ("roberta.embeddings.token_type_embeddings",),
    "embeddings/norm": ("roberta.embeddings.LayerNorm",),
    "head/dense": ("lm_head.dense",),
    "head/norm": ("lm_head.layer_norm",),
    "head": ("lm_head",),
}
_LAYER_MODULES = {
    "attention/qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention/output": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "feed_forward/inner": ("intermediate.dense",),
    "feed_forward/output": ("output.dense",),
    "feed_forward_norm": ("output.LayerNorm",),
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# Second names of tensors that are one. transformers 5 does not save them, older versions did.
_TIED = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
# In checkpoints made by older versions: constants, and a layer over <s> that no logit depends on.
_UNUSED = {
    "roberta.embeddings.position_ids",
    "roberta.embeddings.token_type_ids",
    "roberta.pooler.dense.weight",
    "roberta.pooler.dense.bias",
}


def to_hf(params: Mapping[str, Any], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Return contiguous host arrays under the names `RobertaForMaskedLM(config).save_pretrained()` writes.

    The tied decoder is absent, as it is there. Values are bit for bit those of `params`.
    """
    names = dict(_names(config))
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(jax.device_get(params), sep="/").items():
        for name, part in zip(names[path], np.split(leaf, len(names[path]), axis=-1), strict=True):
            # safetensors writes the buffer as it lies, strides ignored.
            tensors[name] = np.ascontiguousarray(part.T if path.endswith("/kernel") else part)
    return tensors


def from_hf(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, Any]:
    """Return the float32 parameter tree, NumPy arrays, that holds these tensors.

    Tensors a masked language model has no use for (the pooler, constants that older versions saved) are
    dropped, and so is a decoder that equals what it is tied to. Raises `UserError` listing what is missing,
    unexpected, of the wrong shape, not floating-point or untied.
    """
    shapes = _shapes(config)
    tied = {name: twin for name, twin in _TIED.items() if name in tensors and twin in tensors}
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [name for name in tensors if name not in {*shapes, *tied, *_UNUSED}],
        "of the wrong shape": [
            f"{name} {list(tensors[name].shape)} (wanted {list(shape)})"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "not floating-point": [
            f"{name} {tensors[name].dtype}"
            for name in shapes
            if name in tensors and not jnp.issubdtype(tensors[name].dtype, jnp.floating)
        ],
        "unlike what they are tied to": [
            name for name, twin in tied.items() if not np.array_equal(tensors[name], tensors[twin])
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"the tensors are not those of a {config.model_type} masked language model; {found}")

    leaves = {}
    for path, names in _names(config):
        parts = [np.asarray(tensors[name], np.float32) for name in names]
        leaves[path] = np.concatenate([part.T for part in parts] if path.endswith("/kernel") else parts, axis=-1)
    return traverse_util.unflatten_dict(leaves, sep="/")


def _names(config: EncoderConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each leaf's path in our tree with the names of the tensors it holds."""
    modules = dict(_MODULES)
    for layer in range(config.num_hidden_layers):
        for ours, theirs in _LAYER_MODULES.items():
            modules[f"layer_{layer}/{ours}"] = tuple(f"roberta.encoder.layer.{layer}.{name}" for name in theirs)
    for path in _tree(config):
        module, leaf = path.rsplit("/", 1)
        yield path, tuple(f"{name}.{_LEAVES[leaf]}" for name in modules[module])


def _shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    tree = _tree(config)
    shapes = {}
    for path, names in _names(config):
        *outer, last = tree[path].shape
        shape = (*outer, last // len(names))
        shapes.update(dict.fromkeys(names, shape[::-1] if path.endswith("/kernel") else shape))
    return shapes


@functools.cache
def _tree(config: EncoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return our leaves' shapes by path. Nothing is computed or put on a device."""
    variables = jax.eval_shape(lambda: MaskedLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    return traverse_util.flatten_dict(variables["params"], sep="/")


def _some(names: Iterable[str], *, at_most: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
