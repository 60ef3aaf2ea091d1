"""Names of our modules in the checkpoints of transformers' `...ForMaskedLM`, by family."""

import dataclasses
from collections.abc import Mapping

from mlm.models.config import EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorNames:
    """transformers' name for each of our modules.

    Attributes:
      base: prefix of all names but the head's; absent in checkpoints of an encoder without a head.
      encoder: our module -> name after `base`, for modules outside layers and head.
      stack: name of a layer after `base`, with the placeholders {block} (its number), or {group} and {inner}.
      layer: our module -> names after `stack`; several if our tensor concatenates theirs.
      head: our module -> name, for the head.
      decoder: second name of the tied weight and of the head's bias.
    """

    base: str
    encoder: Mapping[str, str]
    stack: str
    layer: Mapping[str, tuple[str, ...]]
    head: Mapping[str, str]
    decoder: str

    def modules(self, config: EncoderConfig) -> dict[str, tuple[str, ...]]:
        """Returns our module -> names, for every module that a model of this config may have."""
        names: dict[str, tuple[str, ...]] = {module: (self.base + name,) for module, name in self.encoder.items()}
        names |= {module: (name,) for module, name in self.head.items()}
        inner = config.inner_group_num or 1
        for block in {layer.block for layer in config.layers}:
            stack = self.base + self.stack.format(block=block, group=block // inner, inner=block % inner)
            for module, layer_names in self.layer.items():
                names[f"layer_{block}/{module}"] = tuple(f"{stack}.{name}" for name in layer_names)
        return names

    def tied(self, config: EncoderConfig) -> dict[str, str]:
        """Returns second name -> first name of tied tensors."""
        tied = {
            f"{self.decoder}.weight": f"{self.base}{self.encoder['embeddings/word']}.weight",
            f"{self.decoder}.bias": f"{self.head['head']}.bias",
        }
        if not config.tie_word_embeddings:
            return {}
        return {second: first for second, first in tied.items() if second != first}


_EMBEDDINGS = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "embeddings/project": "embeddings_project",
}
_LAYER = {
    "attention/qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention/output": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "feed_forward/inner": ("intermediate.dense",),
    "feed_forward/output": ("output.dense",),
    "feed_forward_norm": ("output.LayerNorm",),
}
_ROBERTA = TensorNames(
    base="roberta.",
    encoder=_EMBEDDINGS,
    stack="encoder.layer.{block}",
    layer=_LAYER,
    head={"head/dense": "lm_head.dense", "head/norm": "lm_head.layer_norm", "head": "lm_head"},
    decoder="lm_head.decoder",
)
_BERT = TensorNames(
    base="bert.",
    encoder=_EMBEDDINGS,
    stack="encoder.layer.{block}",
    layer=_LAYER,
    head={
        "head/dense": "cls.predictions.transform.dense",
        "head/norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",
    },
    decoder="cls.predictions.decoder",
)

TENSOR_NAMES: dict[str, TensorNames] = {
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "roberta-prelayernorm": dataclasses.replace(
        _ROBERTA,
        base="roberta_prelayernorm.",
        encoder=_EMBEDDINGS | {"final_norm": "LayerNorm"},
        layer=_LAYER | {"attention_norm": ("attention.LayerNorm",), "feed_forward_norm": ("intermediate.LayerNorm",)},
    ),
    "bert": _BERT,
    "roformer": dataclasses.replace(_BERT, base="roformer."),
    "distilbert": TensorNames(
        base="distilbert.",
        encoder=_EMBEDDINGS,
        stack="transformer.layer.{block}",
        layer={
            "attention/qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "attention/output": ("attention.out_lin",),
            "attention_norm": ("sa_layer_norm",),
            "feed_forward/inner": ("ffn.lin1",),
            "feed_forward/output": ("ffn.lin2",),
            "feed_forward_norm": ("output_layer_norm",),
        },
        head={"head/dense": "vocab_transform", "head/norm": "vocab_layer_norm", "head": "vocab_projector"},
        decoder="vocab_projector",
    ),
    "electra": TensorNames(
        base="electra.",
        encoder=_EMBEDDINGS,
        stack="encoder.layer.{block}",
        layer=_LAYER,
        head={
            "head/dense": "generator_predictions.dense",
            "head/norm": "generator_predictions.LayerNorm",
            "head": "generator_lm_head",
        },
        decoder="generator_lm_head",
    ),
    "albert": TensorNames(
        base="albert.",
        encoder=_EMBEDDINGS | {"embeddings/project": "encoder.embedding_hidden_mapping_in"},
        stack="encoder.albert_layer_groups.{group}.albert_layers.{inner}",
        layer={
            "attention/qkv": ("attention.query", "attention.key", "attention.value"),
            "attention/output": ("attention.dense",),
            "attention_norm": ("attention.LayerNorm",),
            "feed_forward/inner": ("ffn",),
            "feed_forward/output": ("ffn_output",),
            "feed_forward_norm": ("full_layer_layer_norm",),
        },
        head={"head/dense": "predictions.dense", "head/norm": "predictions.LayerNorm", "head": "predictions"},
        decoder="predictions.decoder",
    ),
    "modernbert": TensorNames(
        base="model.",
        encoder={
            "embeddings/word": "embeddings.tok_embeddings",
            "embeddings/norm": "embeddings.norm",
            "final_norm": "final_norm",
        },
        stack="layers.{block}",
        layer={
            "attention/qkv": ("attn.Wqkv",),
            "attention/output": ("attn.Wo",),
            "attention_norm": ("attn_norm",),
            "feed_forward/inner": ("mlp.Wi",),
            "feed_forward/output": ("mlp.Wo",),
            "feed_forward_norm": ("mlp_norm",),
        },
        head={"head/dense": "head.dense", "head/norm": "head.norm", "head": "decoder"},
        decoder="decoder",
    ),
}
