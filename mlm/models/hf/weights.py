"""Our parameter tree <-> the tensors of a transformers `...ForMaskedLM`, by name and layout.

    embeddings/{word,position,token_type}/embedding, embeddings/norm/{scale,bias}, embeddings/project/{kernel,bias}
    layer_<i>/attention/qkv/{weight,bias}, layer_<i>/attention/output/{kernel,bias}
    layer_<i>/attention_norm/{scale,bias}
    layer_<i>/feed_forward/{inner,output}/{kernel,bias}, layer_<i>/feed_forward_norm/{scale,bias}
    final_norm/{scale,bias}
    head/dense/{kernel,bias}, head/norm/{scale,bias}, head/bias, head/decoder

as far as the family and its config have them. A kernel is [in, out], a weight [out, in] as PyTorch's. qkv holds query,
key and value side by side in its first axis, inner of a gated net the half that is activated, then the gate.
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

_LEAVES = dict.fromkeys(("kernel", "weight", "scale", "embedding", "decoder"), "weight") | {"bias": "bias"}

# In checkpoints of other classes and older versions: constants, and layers that no logit of a token depends on. After
# the family's base, and without it.
_UNUSED_IN_BASE = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.")
_UNUSED = ("cls.seq_relationship.", "sop_classifier.", "discriminator_predictions.")


def to_hf(params: Mapping[str, Any], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Return contiguous host arrays under the names the family's `...ForMaskedLM(config).save_pretrained()` writes.

    The tied decoder is absent, as it is there. Values are bit for bit those of `params`.
    """
    names = dict(_names(config))
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(jax.device_get(params), sep="/").items():
        for name, part in zip(names[path], np.split(leaf, len(names[path])), strict=True):
            # safetensors writes the buffer as it lies, strides ignored.
            tensors[name] = np.ascontiguousarray(part.T if path.endswith("/kernel") else part)
    return tensors | _constants(config)


def from_hf(
    tensors: Mapping[str, np.ndarray], config: EncoderConfig, *, fresh: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the float32 parameter tree, NumPy arrays, that holds these tensors.

    Tensors a masked language model has no use for (the pooler, constants that older versions saved) are
    dropped, and so is a decoder that equals what it is tied to. `fresh`, parameters of a new model, gives the head
    where `tensors` have none of it. Raises `UserError` as `check` does.
    """
    check(tensors, config, without_head=fresh is not None)
    leaves = {}
    for path, names in _names(config):
        if path.startswith("head/") and fresh is not None:
            leaves[path] = traverse_util.flatten_dict(fresh, sep="/")[path]
            continue
        parts = [np.asarray(tensors[name], np.float32) for name in names]
        leaves[path] = parts[0].T if path.endswith("/kernel") else np.concatenate(parts)
    return traverse_util.unflatten_dict(leaves, sep="/")


def check(tensors: Mapping[str, np.ndarray], config: EncoderConfig, *, without_head: bool = False) -> None:
    """Raise `UserError` listing what is missing, unexpected, of the wrong shape, not floating-point or untied."""
    wanted = {name: shape for name, shape in shapes(config).items() if not (without_head and is_head(name, config))}
    constants = _constants(config)
    tied = {name: twin for name, twin in tied_names(config).items() if name in tensors and twin in tensors}
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [
            name for name in tensors if name not in {*wanted, *constants, *tied} and not is_unused(name, config)
        ],
        "of the wrong shape": [
            f"{name} {list(tensors[name].shape)} (wanted {list(shape)})"
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "not floating-point": [
            f"{name} {tensors[name].dtype}"
            for name in wanted
            if name in tensors and not jnp.issubdtype(tensors[name].dtype, jnp.floating)
        ],
        "unlike what they are tied to": [
            name for name, twin in tied.items() if not np.array_equal(tensors[name], tensors[twin])
        ],
        "unlike the constants they are": [
            name for name, value in constants.items() if name in tensors and not _is_near(tensors[name], value)
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"the tensors are not those of a {config.model_type} masked language model; {found}")


def tied_names(config: EncoderConfig) -> dict[str, str]:
    """Second names of tensors that are one -> their first. transformers 5 does not save them, older versions did."""
    return TENSOR_NAMES[config.model_type].tied(config)


def second_names(config: EncoderConfig) -> set[str]:
    """The names of tensors that say nothing new: the tied ones, and constants."""
    return {*tied_names(config), *_constants(config)}


def names_of(path: str, config: EncoderConfig) -> tuple[str, ...]:
    """The names of the tensors that a leaf of our tree holds; none where the config has no such leaf."""
    return dict(_names(config)).get(path, ())


def is_head(name: str, config: EncoderConfig) -> bool:
    """Whether the tensor of that name belongs to the head; the decoder that is tied does."""
    return name in tied_names(config) or any(
        name in names for path, names in _names(config) if path.startswith("head/")
    )


def is_unused(name: str, config: EncoderConfig) -> bool:
    """Whether no logit of a token depends on the tensor of that name, in any class of the family."""
    base = TENSOR_NAMES[config.model_type].base
    return name.startswith((*(base + unused for unused in _UNUSED_IN_BASE), *_UNUSED))


def shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that hold parameters."""
    tree = _tree(config)
    shapes = {}
    for path, names in _names(config):
        first, *inner = tree[path].shape
        shape = (first // len(names), *inner)
        shapes.update(dict.fromkeys(names, shape[::-1] if path.endswith("/kernel") else shape))
    return shapes


def _constants(config: EncoderConfig) -> dict[str, np.ndarray]:
    """Tensors that are saved and never trained."""
    if config.family.positions is not PositionEmbedding.ROTARY_INTERLEAVED:
        return {}
    name = f"{TENSOR_NAMES[config.model_type].base}encoder.embed_positions.weight"
    return {name: sinusoids(config.max_position_embeddings, width=config.head_size)}


def _is_near(tensor: np.ndarray, value: np.ndarray) -> bool:
    # As near as half precision has it; a shorter or longer table is another max_position_embeddings, which may be.
    rows = min(len(tensor), len(value))
    return tensor.shape[1:] == value.shape[1:] and np.allclose(
        np.asarray(tensor[:rows], np.float32), value[:rows], rtol=0, atol=2**-8
    )


def _names(config: EncoderConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each leaf's path in our tree with the names of the tensors it holds."""
    modules = TENSOR_NAMES[config.model_type].modules(config)
    for path in _tree(config):
        module, leaf = path.rsplit("/", 1)
        yield path, tuple(f"{name}.{_LEAVES[leaf]}" for name in modules[module])


@functools.cache
def _tree(config: EncoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return our leaves' shapes by path. Nothing is computed or put on a device."""
    variables = jax.eval_shape(lambda: MaskedLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    return traverse_util.flatten_dict(variables["params"], sep="/")


def some(names: Iterable[str], *, at_most: int = 8) -> str:
    """Names as a line has room for them."""
    names = sorted(names)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
