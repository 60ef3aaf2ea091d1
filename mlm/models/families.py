"""What tells the families of encoders apart: the fields of their configs, and how their layers are put together.

A family is a table, not a module: `encoder.MaskedLM` reads these traits, `config.EncoderConfig` these fields.
Everything here is what transformers' classes of the same `model_type` do (transformers 5.23).
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any


class PositionEmbedding(enum.Enum):
    """How a token's place in its document reaches the model."""

    LEARNED = enum.auto()  # A learned row each, the first token's is row 0; padding counts too.
    LEARNED_PAD_OFFSET = (
        enum.auto()
    )  # A learned row each, the first token's is row pad_token_id + 1; padding has its own.
    ROTARY_INTERLEAVED = (
        enum.auto()
    )  # Queries and keys turned, neighbouring numbers (0, 1), (2, 3)... as points of a plane.
    ROTARY_HALF = enum.auto()  # The same of the numbers (0, E/2), (1, E/2 + 1)...

    @property
    def rotary(self) -> bool:
        """Whether places turn queries and keys; else they add a learned row to the embeddings."""
        return self in (PositionEmbedding.ROTARY_INTERLEAVED, PositionEmbedding.ROTARY_HALF)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`.

    Attributes:
      architecture: the transformers class whose logits and tensor names are ours.
      fields: our names of the config's fields, to theirs.
      defaults: of fields, where their config class has others than `EncoderConfig`.
      harmless: fields of theirs that move no logit, beside those that do so in no family.
      positions: see there.
      norm_first: the norm stands before attention and feed-forward net, with one more at the end; else after each sum.
      first_norm: whether the first layer has a norm before its attention.
      gated: the feed-forward net's inner half is multiplied with its other half (Shazeer, arXiv:2002.05202).
      always_projects: embeddings go through a dense layer even when they are as wide as the hidden states.
      head_act: the head's activation; None for hidden_act.
      dropout: place -> the field with its rate. No dropout at places that are not named.
      zero_pad_row: whether the word embedding of padding starts at zero.
      may_untie: whether the decoder may have weights of its own.
    """

    architecture: str
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    ignored_fields: frozenset[str] = frozenset()
    positions: PositionEmbedding = PositionEmbedding.LEARNED
    norm_first: bool = False
    norm_before_first_attention: bool = True
    gated: bool = False
    always_projects: bool = False
    head_act: str | None = None
    dropout: Mapping[str, str]
    zero_pad_row: bool = True
    supports_untied_embeddings: bool = False


_EVERYWHERE = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_act", "attention_probs_dropout_prob", "max_position_embeddings", "initializer_range", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings",
)  # fmt: skip
_BERT_LIKE = (*_EVERYWHERE, "hidden_dropout_prob", "type_vocab_size", "layer_norm_eps")
_NO_BEGIN = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_EVERY_DROPOUT = {
    "embedding": "hidden_dropout_prob",
    "attention_output": "hidden_dropout_prob",
    "feed_forward_output": "hidden_dropout_prob",
}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _roberta(architecture: str, *, vocab_size: int = 50265, norm_first: bool = False) -> Family:
    return Family(
        architecture=architecture,
        fields=_same(*_BERT_LIKE),
        defaults={"vocab_size": vocab_size},
        positions=PositionEmbedding.LEARNED_PAD_OFFSET,
        norm_first=norm_first,
        head_act="gelu",
        dropout=_EVERY_DROPOUT,
    )


FAMILIES: dict[str, Family] = {
    "roberta": _roberta("RobertaForMaskedLM"),
    "xlm-roberta": _roberta("XLMRobertaForMaskedLM", vocab_size=30522),
    "camembert": _roberta("CamembertForMaskedLM", vocab_size=30522),
    "roberta-prelayernorm": _roberta("RobertaPreLayerNormForMaskedLM", norm_first=True),
    "bert": Family(
        architecture="BertForMaskedLM",
        fields=_same(*_BERT_LIKE),
        defaults={"vocab_size": 30522, **_NO_BEGIN},
        ignored_fields=frozenset(
            {
                "directionality",
                "pooler_fc_size",
                "pooler_num_attention_heads",
                "pooler_num_fc_layers",
                "pooler_size_per_head",
                "pooler_type",
            }
        ),
        dropout=_EVERY_DROPOUT,
    ),
    "distilbert": Family(
        architecture="DistilBertForMaskedLM",
        fields=_same(*_EVERYWHERE)
        | {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        defaults={"vocab_size": 30522, "num_hidden_layers": 6, **_NO_BEGIN},
        ignored_fields=frozenset({"qa_dropout", "seq_classif_dropout", "tie_weights_"}),
        dropout={"embedding": "hidden_dropout_prob", "feed_forward_output": "hidden_dropout_prob"},
    ),
    "electra": Family(
        architecture="ElectraForMaskedLM",
        fields=_same(*_BERT_LIKE, "embedding_size"),
        defaults={
            "vocab_size": 30522,
            "embedding_size": 128,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            **_NO_BEGIN,
        },
        ignored_fields=frozenset({"summary_activation", "summary_last_dropout", "summary_type", "summary_use_proj"}),
        head_act="gelu",
        dropout=_EVERY_DROPOUT,
    ),
    "albert": Family(
        architecture="AlbertForMaskedLM",
        fields=_same(*_BERT_LIKE, "embedding_size", "num_hidden_groups", "inner_group_num"),
        defaults={
            "vocab_size": 30000,
            "embedding_size": 128,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "intermediate_size": 16384,
            "num_hidden_groups": 1,
            "inner_group_num": 1,
            "hidden_act": "gelu_new",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        ignored_fields=frozenset(
            {
                "classifier_dropout_prob",
                "down_scale_factor",
                "gap_size",
                "net_structure_type",
                "num_memory_blocks",
            }
        ),
        always_projects=True,
        dropout={"embedding": "hidden_dropout_prob", "attention_output": "hidden_dropout_prob"},
    ),
    "roformer": Family(
        architecture="RoFormerForMaskedLM",
        fields=_same(*_BERT_LIKE, "embedding_size", "rotary_value"),
        defaults={"vocab_size": 50000, "max_position_embeddings": 1536, "global_rope_theta": 10_000.0, **_NO_BEGIN},
        positions=PositionEmbedding.ROTARY_INTERLEAVED,
        dropout=_EVERY_DROPOUT,
    ),
    "modernbert": Family(
        architecture="ModernBertForMaskedLM",
        fields=_same(
            *_EVERYWHERE,
            "embedding_dropout",
            "mlp_dropout",
            "attention_bias",
            "mlp_bias",
            "norm_bias",
            "decoder_bias",
            "classifier_bias",
            "classifier_activation",
            "initializer_cutoff_factor",
            "local_attention",
            "global_attn_every_n_layers",
            "global_rope_theta",
            "local_rope_theta",
        )
        | {
            "hidden_act": "hidden_activation",
            "layer_norm_eps": "norm_eps",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        defaults={
            "vocab_size": 50368,
            "num_hidden_layers": 22,
            "intermediate_size": 1152,
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": 50283,
            "bos_token_id": 50281,
            "eos_token_id": 50282,
            "attention_bias": False,
            "mlp_bias": False,
            "norm_bias": False,
            "classifier_bias": False,
            "classifier_activation": "gelu",
            "initializer_cutoff_factor": 2.0,
            "local_attention": 128,
            "global_attn_every_n_layers": 3,
            "global_rope_theta": 160_000.0,
            "local_rope_theta": 10_000.0,
        },
        # Hub configs of the family have layer_norm_eps beside norm_eps; the class reads the latter only. With
        # sparse_prediction it leaves logits out where there is no label; those it gives are the same.
        ignored_fields=frozenset(
            {
                "classifier_pooling",
                "deterministic_flash_attn",
                "layer_norm_eps",
                "reference_compile",
                "repad_logits_with_grad",
                "sparse_pred_ignore_index",
                "sparse_prediction",
            }
        ),
        positions=PositionEmbedding.ROTARY_HALF,
        norm_first=True,
        norm_before_first_attention=False,
        gated=True,
        dropout={
            "embedding": "embedding_dropout",
            "attention_output": "attention_probs_dropout_prob",
            "feed_forward_inner": "mlp_dropout",
        },
        zero_pad_row=False,
        supports_untied_embeddings=True,
    ),
}
