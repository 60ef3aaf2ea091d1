"""Where the modules of our parameter tree stand in the tensors of transformers' `...ForMaskedLM`, by family."""

import dataclasses
from collections.abc import Mapping

from mlm.models.config import EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorNames:
    """Their name of each of our modules, or several whose tensors stand side by side in ours.

    Attributes:
      base: what all names but the head's begin with; a checkpoint of an encoder without a head leaves it out.
      encoder: what is not in a layer nor in the head, after `base`.
      stack: where a layer is, after `base`: its number, or that of its group and of its place therein, filled in.
      layer: what is in a layer, after `stack`.
      head: the head.
      decoder: where the tied weight, and a second copy of the bias, are under names that need not be saved.
    """

    base: str
    encoder: Mapping[str, str]
    stack: str
    layer: Mapping[str, tuple[str, ...]]
    head: Mapping[str, str]
    decoder: str

    def modules(self, config: EncoderConfig) -> dict[str, tuple[str, ...]]:
        """Every module that this config may have."""
        names = {ours: (self.base + theirs,) for ours, theirs in self.encoder.items()}
        names |= {ours: (theirs,) for ours, theirs in self.head.items()}
        inner = config.inner_group_num or 1
        for block in {layer.block for layer in config.layers}:
            stack = self.base + self.stack.format(block=block, group=block // inner, inner=block % inner)
            for ours, theirs in self.layer.items():
                names[f"layer_{block}/{ours}"] = tuple(f"{stack}.{name}" for name in theirs)
        return names

    def tied(self, config: EncoderConfig) -> dict[str, str]:
        """Second names of tensors that are one. transformers 5 does not save them, older versions did."""
        twins = {
            f"{self.decoder}.weight": f"{self.base}{self.encoder['embeddings/word']}.weight",
            f"{self.decoder}.bias": f"{self.head['head']}.bias",
        }
        if not config.tie_word_embeddings:
            return {}
        return {name: twin for name, twin in twins.items() if name != twin}


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
