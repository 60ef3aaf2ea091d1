"""Which encoder: a frozen, hashable description, read from and written as a Hugging Face `config.json`.

Only RoBERTa so far. What the encoder cannot do is refused here by the field's name, so that a config is
either honoured whole or not at all. A key of a `config.json` is one of:

- a field of `EncoderConfig`: read, and checked;
- in `_REQUIRED`: it changes the model and we have one value of it; null means that one, any other is refused;
- in `_HARMLESS`: it does not move a logit of the transformers classes, and is dropped;
- anything else: not known to us. Null, false and empty mean "off" and are dropped, all else is refused.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from mlm.errors import UserError

# model_type -> the transformers class whose logits and tensor names are ours.
_ARCHITECTURES = {"roberta": "RobertaForMaskedLM"}

# Fields that change the model, with the only value the encoder has.
_REQUIRED = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "per_layer_config": None,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "quantization_config": None,
    "torchscript": False,  # unties the decoder
}

# Labels of heads we do not have, what to return, how to store or generate: none of them moves a logit.
_HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path", "_num_labels",
    "architectures", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "classifier_dropout", "cls_token_id", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "label2id", "language", "length_penalty", "mask_token_id",
    "max_length", "min_length", "name", "name_or_path", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_past", "output_scores", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "transformers_version", "typical_p", "unk_token_id", "use_bfloat16", "use_cache",
})  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder's shape and rates; names, meanings and defaults are those of transformers' `RobertaConfig`.

    Raises `UserError` for a value of the wrong type or one that no model can have.
    """

    model_type: str = "roberta"
    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for name, kind in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), kind=kind)
        _check_model_type(self.model_type)
        if self.hidden_act != "gelu":
            raise _refusal("hidden_act", self.hidden_act, '"gelu" (the exact one) is supported')
        if not self.tie_word_embeddings:
            raise _refusal("tie_word_embeddings", False, "only true is supported")
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "type_vocab_size",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise _refusal(name, getattr(self, name), "it must be at least 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise _refusal(name, getattr(self, name), "it must be at least 0 and less than 1")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise _refusal(name, getattr(self, name), "it must be positive and finite")
        if self.hidden_size % self.num_attention_heads:
            raise _refusal(
                "hidden_size",
                self.hidden_size,
                f"num_attention_heads={self.num_attention_heads} must divide it",
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise _refusal(
                "pad_token_id", self.pad_token_id, f"it must be from 0 to vocab_size-1={self.vocab_size - 1}"
            )
        if self.max_seq_length < 1:
            raise _refusal(
                "max_position_embeddings",
                self.max_position_embeddings,
                f"pad_token_id={self.pad_token_id} and the ids below it take {self.pad_token_id + 1} of them",
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def max_seq_length(self) -> int:
        """Tokens in the longest row the positions allow: RoBERTa counts them from pad_token_id + 1."""
        return self.max_position_embeddings - self.pad_token_id - 1

    def replace(self, **overrides: Any) -> "EncoderConfig":
        """Return a copy with some fields changed, checked anew; `UserError` for a name that is no field."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(names)}"
                raise UserError(f"model config: there is no field {name}; {hint}")
        return dataclasses.replace(self, **overrides)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "EncoderConfig":
        """Read a parsed `config.json`; absent fields take the family's defaults, as in transformers.

        Raises `UserError`, by name, for an unknown model_type, a field that changes the model and is not
        supported, and an unknown field that is not off (see the module's docstring for the rule).
        """
        if "model_type" not in config:
            raise UserError(f"model config: model_type is missing; one of: {', '.join(_ARCHITECTURES)}")
        fields = {field.name for field in dataclasses.fields(cls)}
        overrides = {}
        for name, value in config.items():
            if name in fields:
                overrides[name] = value
            elif name in _REQUIRED:
                if value is not None and value != _REQUIRED[name]:
                    raise _refusal(name, value, f"only {_REQUIRED[name]!r} is supported")
            elif name not in _HARMLESS and not (value is None or value is False or value in ("", [], {})):
                raise _refusal(name, value, "the field is unknown, and ignoring it might change the model")
        return default_config(config["model_type"]).replace(**overrides)

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json`, as a dict, from which transformers' Auto classes build the same model."""
        return {
            "architectures": [_ARCHITECTURES[self.model_type]],
            **dataclasses.asdict(self),
            "dtype": "float32",
        }


def default_config(model_type: str) -> EncoderConfig:
    """Return the defaults transformers' config class of this type has; `UserError` for an unknown type."""
    _check_model_type(model_type)
    return EncoderConfig(model_type=model_type)


def _check_model_type(model_type: Any) -> None:
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise _refusal("model_type", model_type, f"known: {', '.join(_ARCHITECTURES)}")


def _check_type(name: str, value: Any, *, kind: Any) -> None:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    wanted = " or ".join("null" if k is types.NoneType else k.__name__ for k in kinds)
    accepted = (*kinds, int) if float in kinds else kinds
    # bool is an int to Python, but `hidden_size: true` is a mistake.
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        raise _refusal(name, value, f"it must be of type {wanted}")


def _refusal(name: str, value: Any, reason: str) -> UserError:
    return UserError(f"model config: {name}={value!r} will not do; {reason}")
