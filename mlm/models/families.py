"""The differences between the families of encoders: the fields of their configs, and how their layers are built.

A family is a row of a table: `encoder.MaskedLM` reads its traits, `config.EncoderConfig` its fields. They reproduce the
classes of the same `model_type` in transformers 5.23.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any


class PositionEmbedding(enum.Enum):
    """How the model knows the position of a token in its document."""

    # Learned embeddings; the first token has row 0, and padding counts as a token.
    LEARNED = enum.auto()
    # Learned embeddings; the first token has row pad_token_id + 1, and all padding has row pad_token_id.
    LEARNED_PAD_OFFSET = enum.auto()
    # Rotary embeddings of the pairs of features (0, 1), (2, 3), ...
    ROTARY_INTERLEAVED = enum.auto()
    # Rotary embeddings of the pairs of features (0, E/2), (1, E/2 + 1), ... with E the head size.
    ROTARY_HALF = enum.auto()

    @property
    def rotary(self) -> bool:
        """True for rotary embeddings, which have no parameters."""
        return self in (PositionEmbedding.ROTARY_INTERLEAVED, PositionEmbedding.ROTARY_HALF)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`.

    Attributes:
      architecture: the transformers class with the same logits and tensor names.
      fields: `EncoderConfig`'s name of each field of the config -> its name in `config.json`.
      defaults: defaults that differ from `EncoderConfig`'s.
      ignored_fields: fields of `config.json` that do not change the logits, besides those ignored for all families.
      position_embedding: how positions are represented.
      norm_first: layer norm before attention and feed-forward network, and once more at the end (pre-LN), instead of
        after each residual sum (post-LN).
      norm_before_first_attention: the first layer has an attention norm.
      gated: gated feed-forward network (Shazeer, arXiv:2002.05202).
      always_projects: embeddings are projected even if they are as wide as the hidden states.
      head_act: activation of the head; None for hidden_act.
      dropout_fields: dropout site -> the field with its rate. There is no dropout at other sites.
      zero_pad_embedding: the word embedding of padding is initialized to zero.
      supports_untied_embeddings: the decoder may have its own weight.
    """

    architecture: str
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    ignored_fields: frozenset[str] = frozenset()
    position_embedding: PositionEmbedding = PositionEmbedding.LEARNED
    norm_first: bool = False
    norm_before_first_attention: bool = True
    gated: bool = False
    always_projects: bool = False
    head_act: str | None = None
    dropout_fields: Mapping[str, str]
    zero_pad_embedding: bool = True
    supports_untied_embeddings: bool = False


_COMMON_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_act", "attention_probs_dropout_prob", "max_position_embeddings", "initializer_range", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings",
)  # fmt: skip
_BERT_FIELDS = (*_COMMON_FIELDS, "hidden_dropout_prob", "type_vocab_size", "layer_norm_eps")
_BERT_IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_BERT_DROPOUT = {
    "embedding": "hidden_dropout_prob",
    "attention_output": "hidden_dropout_prob",
    "feed_forward_output": "hidden_dropout_prob",
}


def _unchanged(*names: str) -> dict[str, str]:
    """Fields with the same name in `config.json`."""
    return {name: name for name in names}


def _roberta(architecture: str, *, vocab_size: int = 50265, norm_first: bool = False) -> Family:
    return Family(
        architecture=architecture,
        fields=_unchanged(*_BERT_FIELDS),
        defaults={"vocab_size": vocab_size},
        position_embedding=PositionEmbedding.LEARNED_PAD_OFFSET,
        norm_first=norm_first,
        head_act="gelu",
        dropout_fields=_BERT_DROPOUT,
    )


FAMILIES: dict[str, Family] = {
    "roberta": _roberta("RobertaForMaskedLM"),
    "xlm-roberta": _roberta("XLMRobertaForMaskedLM", vocab_size=30522),
    "camembert": _roberta("CamembertForMaskedLM", vocab_size=30522),
    "roberta-prelayernorm": _roberta("RobertaPreLayerNormForMaskedLM", norm_first=True),
    "bert": Family(
        architecture="BertForMaskedLM",
        fields=_unchanged(*_BERT_FIELDS),
        defaults={"vocab_size": 30522, **_BERT_IDS},
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
        dropout_fields=_BERT_DROPOUT,
    ),
    "distilbert": Family(
        architecture="DistilBertForMaskedLM",
        fields=_unchanged(*_COMMON_FIELDS)
        | {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        defaults={"vocab_size": 30522, "num_hidden_layers": 6, **_BERT_IDS},
        ignored_fields=frozenset({"qa_dropout", "seq_classif_dropout", "tie_weights_"}),
        dropout_fields={"embedding": "hidden_dropout_prob", "feed_forward_output": "hidden_dropout_prob"},
    ),
    "electra": Family(
        architecture="ElectraForMaskedLM",
        fields=_unchanged(*_BERT_FIELDS, "embedding_size"),
        defaults={
            "vocab_size": 30522,
            "embedding_size": 128,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            **_BERT_IDS,
        },
        ignored_fields=frozenset({"summary_activation", "summary_last_dropout", "summary_type", "summary_use_proj"}),
        head_act="gelu",
        dropout_fields=_BERT_DROPOUT,
    ),
    "albert": Family(
        architecture="AlbertForMaskedLM",
        fields=_unchanged(*_BERT_FIELDS, "embedding_size", "num_hidden_groups", "inner_group_num"),
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
        dropout_fields={"embedding": "hidden_dropout_prob", "attention_output": "hidden_dropout_prob"},
    ),
    "roformer": Family(
        architecture="RoFormerForMaskedLM",
        fields=_unchanged(*_BERT_FIELDS, "embedding_size", "rotary_value"),
        defaults={"vocab_size": 50000, "max_position_embeddings": 1536, "global_rope_theta": 10_000.0, **_BERT_IDS},
        position_embedding=PositionEmbedding.ROTARY_INTERLEAVED,
        dropout_fields=_BERT_DROPOUT,
    ),
    "modernbert": Family(
        architecture="ModernBertForMaskedLM",
        fields=_unchanged(
            *_COMMON_FIELDS,
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
        # Configs on the hub have layer_norm_eps and norm_eps, of which the class reads the second. sparse_prediction
        # computes logits of labeled tokens only, which does not change them.
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
        position_embedding=PositionEmbedding.ROTARY_HALF,
        norm_first=True,
        norm_before_first_attention=False,
        gated=True,
        dropout_fields={
            "embedding": "embedding_dropout",
            "attention_output": "attention_probs_dropout_prob",
            "feed_forward_inner": "mlp_dropout",
        },
        zero_pad_embedding=False,
        supports_untied_embeddings=True,
    ),
}
