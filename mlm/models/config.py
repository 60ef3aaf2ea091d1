"""`EncoderConfig`: a frozen, hashable model config, read from and written to a Hugging Face `config.json`.

A field that the encoder does not support is an error with the field's name: a config is used completely or not at all.
A field of a `config.json` is one of

- a field of `EncoderConfig` that the family has (`families.py`): read and checked;
- a field of `_REQUIRED`, which changes the model and has one supported value: null stands for that value;
- a field of `_IGNORED_FIELDS` or `Family.ignored_fields`, which does not change the logits: dropped;
- unknown: dropped if null, false or empty, which mean "off"; otherwise an error.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from mlm.errors import UserError
from mlm.models import modernbert_fields
from mlm.models.families import FAMILIES, Family, PositionEmbedding
from mlm.settings import ACTIVATIONS

# Fields that change the model, with the only supported value.
_REQUIRED: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "per_layer_config": None,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "quantization_config": None,
    "sinusoidal_pos_embds": False,
    "torchscript": False,  # unties the decoder
}

# Labels of other heads, output options, storage, generation: none of them changes the logits.
_IGNORED_FIELDS = frozenset({
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

# Values of fields in families that do not have them, where these differ from the defaults below.
_ABSENT = {"hidden_dropout_prob": 0.0, "type_vocab_size": 0}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, in the order of application.

    Attributes:
      block: index of its parameters, layer_<block>; layers with shared parameters have the same index.
      window: largest distance between a query and the keys it sees, in positions; None for no limit.
      rope_theta: base of its rotary embeddings; None in families without.
      attention_norm: True if its attention has a layer norm.
    """

    block: int
    window: int | None
    rope_theta: float | None
    attention_norm: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and rates of an encoder; names, meanings and defaults are those of transformers' `RobertaConfig`.

    Fields of other families come last, with a default that means "none"; `default_config` returns the defaults of any
    family. Raises `UserError` for a wrong type, an invalid value, or a field that the family does not have.
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
    # electra, albert, roformer: embedding size. None: hidden_size.
    embedding_size: int | None = None
    # albert: num_hidden_groups x inner_group_num blocks of parameters; each layer applies all blocks of its group.
    num_hidden_groups: int | None = None
    inner_group_num: int | None = None
    # roformer: rotary embeddings for values too.
    rotary_value: bool = False
    # modernbert: attention is global in every n-th layer, from the first on; in the others it reaches
    # local_attention // 2 tokens to each side. Both kinds have their own base of rotary embeddings.
    global_attn_every_n_layers: int | None = None
    local_attention: int | None = None
    global_rope_theta: float | None = None
    local_rope_theta: float | None = None
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    classifier_bias: bool = True
    decoder_bias: bool = True
    classifier_activation: str | None = None
    embedding_dropout: float = 0.0
    mlp_dropout: float = 0.0
    # Initial weights are truncated at this many standard deviations.
    initializer_cutoff_factor: float | None = None

    def __post_init__(self):
        for name, kind in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), kind=kind)
        _check_model_type(self.model_type)
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        has = self.family.fields
        for name, value in _absent_fields(self.family).items():
            if getattr(self, name) != value:
                raise UserError(
                    f"model.overrides.{name}={getattr(self, name)!r}: the family {self.model_type} has no such field; "
                    "set it to None"
                )
        for name, default in self.family.defaults.items():
            if getattr(self, name) is None and default is not None:
                raise _error(name, None, f"the family {self.model_type} needs a value; set it")
        for name in ("hidden_act", "classifier_activation"):
            if name in has and getattr(self, name) not in ACTIVATIONS:
                raise _error(
                    name, getattr(self, name), f"must be one of {', '.join(ACTIVATIONS)} (gelu is the exact one)"
                )
        if not self.tie_word_embeddings and not self.family.supports_untied_embeddings:
            raise _error(
                "tie_word_embeddings", False, f"the family {self.model_type} supports true only; set it to true"
            )
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "type_vocab_size", "embedding_size", "num_hidden_groups", "inner_group_num",
            "global_attn_every_n_layers", "local_attention",
        ):  # fmt: skip
            if name in has and getattr(self, name) is not None and getattr(self, name) < 1:
                raise _error(name, getattr(self, name), "must be at least 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout", "mlp_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise _error(name, getattr(self, name), "must be at least 0 and less than 1")
        for name in (
            "initializer_range", "layer_norm_eps", "global_rope_theta", "local_rope_theta", "initializer_cutoff_factor",
        ):  # fmt: skip
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise _error(name, getattr(self, name), "must be positive and finite")

    def _check_combinations(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise _error(
                "hidden_size",
                self.hidden_size,
                f"must be a multiple of num_attention_heads={self.num_attention_heads}; change one of them",
            )
        if self.family.position_embedding.rotary and self.head_size % 2:
            raise _error(
                "num_attention_heads",
                self.num_attention_heads,
                f"rotary embeddings need an even head size, not {self.head_size}; change it, or hidden_size",
            )
        if self.num_hidden_groups is not None and self.num_hidden_groups > self.num_hidden_layers:
            raise _error(
                "num_hidden_groups",
                self.num_hidden_groups,
                f"must be at most num_hidden_layers={self.num_hidden_layers}",
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise _error(
                "pad_token_id", self.pad_token_id, f"must lie between 0 and vocab_size - 1 = {self.vocab_size - 1}"
            )
        if self.max_seq_length < 1:
            raise _error(
                "max_position_embeddings",
                self.max_position_embeddings,
                f"must be more than pad_token_id + 1 = {self.pad_token_id + 1} in the family {self.model_type}",
            )

    @property
    def family(self) -> Family:
        """The table row of its model_type."""
        return FAMILIES[self.model_type]

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        """Size of the embeddings, and of the decoder's input."""
        return self.embedding_size or self.hidden_size

    @property
    def has_projection(self) -> bool:
        """True if a dense layer projects the embeddings to hidden_size."""
        return self.family.always_projects or self.embedding_width != self.hidden_size

    @property
    def max_seq_length(self) -> int:
        """The most tokens that a row may have; RoBERTa's positions start at pad_token_id + 1."""
        if self.family.position_embedding is PositionEmbedding.LEARNED_PAD_OFFSET:
            return self.max_position_embeddings - self.pad_token_id - 1
        return self.max_position_embeddings

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in the order of application."""
        if self.num_hidden_groups is None or self.inner_group_num is None:
            blocks = list(range(self.num_hidden_layers))
        else:
            per_group = self.num_hidden_layers / self.num_hidden_groups  # Not always an integer, as in transformers.
            groups = [int(layer / per_group) for layer in range(self.num_hidden_layers)]
            blocks = [group * self.inner_group_num + i for group in groups for i in range(self.inner_group_num)]
        return tuple(self._layer(number, block) for number, block in enumerate(blocks))

    def _layer(self, number: int, block: int) -> Layer:
        every, local_attention = self.global_attn_every_n_layers, self.local_attention
        is_local = every is not None and number % every > 0
        return Layer(
            block=block,
            window=local_attention // 2 if is_local and local_attention is not None else None,
            rope_theta=self.local_rope_theta if is_local else self.global_rope_theta,
            attention_norm=self.family.norm_before_first_attention or number > 0,
        )

    def dropout_rate(self, site: str) -> float:
        """Returns the rate at a site of `Family.dropout_fields`; 0 if the family has no dropout there."""
        field = self.family.dropout_fields.get(site)
        return getattr(self, field) if field else 0.0

    def replace(self, **overrides: Any) -> "EncoderConfig":
        """Returns a checked copy with some fields changed; raises `UserError` for a name that is no field."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(names)}"
                raise UserError(f"model config: unknown field {name}; {hint}")
        return dataclasses.replace(self, **overrides)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "EncoderConfig":
        """Reads a parsed `config.json`; absent fields have the family's defaults, as in transformers.

        Raises:
          UserError: unknown model_type, or an unsupported or unknown field (see the module's docstring).
        """
        if "model_type" not in config:
            raise UserError(f"model config: model_type is missing; set it to one of {', '.join(FAMILIES)}")
        default = default_config(config["model_type"])
        if default.model_type == "modernbert":
            config = modernbert_fields.flatten(config)
        names = {hf_name: name for name, hf_name in default.family.fields.items()}
        overrides = {}
        for name, value in config.items():
            if name in names:
                overrides[names[name]] = value
            elif name in _REQUIRED:
                if value is not None and value != _REQUIRED[name]:
                    raise _error(name, value, f"only {_REQUIRED[name]!r} is supported; choose another model")
            elif name in _IGNORED_FIELDS or name in default.family.ignored_fields:
                continue
            elif not (value is None or value is False or value in ("", [], {})):
                raise _error(
                    name,
                    value,
                    f"unknown field of the family {default.model_type}, which may change the model; if not, remove it",
                )
        read = default.replace(**overrides)
        # transformers writes hidden_size here if the field is not set.
        is_unset = default.embedding_size is None and read.embedding_size == read.hidden_size
        return read.replace(embedding_size=None) if is_unset else read

    def to_hf(self) -> dict[str, Any]:
        """Returns the `config.json`, as a dict, from which transformers' Auto classes build the same model."""
        fields = {hf_name: getattr(self, name) for name, hf_name in self.family.fields.items()}
        if "embedding_size" in fields:
            fields["embedding_size"] = self.embedding_width
        if self.model_type == "modernbert":
            fields = modernbert_fields.nest(fields)
        return {"architectures": [self.family.architecture], **fields, "dtype": "float32"}

    def to_hf_4(self) -> dict[str, Any]:
        """Returns the fields of `to_hf` that have another name or form in transformers 4, in that form.

        An exported model has both: transformers 4 would silently use its defaults instead of fields it does not know.
        """
        older: dict[str, Any] = {"torch_dtype": "float32"}
        if self.model_type == "modernbert":
            older |= {name: getattr(self, name) for name in modernbert_fields.OLDER_FIELDS}
        return older


def default_config(model_type: str) -> EncoderConfig:
    """Returns the defaults of transformers' config class of this type; raises `UserError` for an unknown type."""
    _check_model_type(model_type)
    family = FAMILIES[model_type]
    return EncoderConfig(**({"model_type": model_type} | _absent_fields(family) | dict(family.defaults)))


def _absent_fields(family: Family) -> dict[str, Any]:
    """Returns the fields that a family does not have, with the values that stand for "none"."""
    return {
        field.name: family.defaults.get(field.name, _ABSENT.get(field.name, field.default))
        for field in dataclasses.fields(EncoderConfig)
        if field.name not in family.fields
    }


def _check_model_type(model_type: Any) -> None:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise _error("model_type", model_type, f"must be one of {', '.join(FAMILIES)}")


def _check_type(name: str, value: Any, *, kind: Any) -> None:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    names = " or ".join("null" if k is types.NoneType else k.__name__ for k in kinds)
    accepted = (*kinds, int) if float in kinds else kinds
    # In Python, bool is a subclass of int, but `hidden_size: true` is a mistake.
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        raise _error(name, value, f"must be of type {names}")


def _error(name: str, value: Any, problem: str) -> UserError:
    return UserError(f"model config {name}={value!r}: {problem}")
