"""Which encoder: a frozen, hashable description, read from and written as a Hugging Face `config.json`.

What the encoder cannot do is refused here by the field's name, so that a config is either honoured whole or not at
all. A key of a `config.json` is one of:

- a field of `EncoderConfig` that the family has (`families.py`): read, and checked;
- in `_REQUIRED`: it changes the model and we have one value of it; null means that one, any other is refused;
- harmless: it does not move a logit of the transformers classes, and is dropped;
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
from mlm.models import modernbert_fields
from mlm.models.families import FAMILIES, Family, PositionEmbedding

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
    "sinusoidal_pos_embds": False,
    "torchscript": False,  # unties the decoder
}

# Labels of heads we do not have, what to return, how to store or generate: none of them moves a logit.
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

# What fields are in families that do not have them, where that is not the default below.
_ABSENT = {"hidden_dropout_prob": 0.0, "type_vocab_size": 0}

# transformers' name -> jax.nn's, where "gelu" is the exact one, x * Phi(x), not its tanh approximation.
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of the stack, as it is applied.

    Attributes:
      block: whose parameters it has; layers that share them have the same number.
      window: tokens see those at most so many places away; None for all.
      rope_theta: of its rotary positions; None where the family has none.
      attention_norm: whether a norm belongs to its attention.
    """

    block: int
    window: int | None
    rope_theta: float | None
    attention_norm: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder's shape and rates; names, meanings and defaults are those of transformers' `RobertaConfig`.

    What only other families have comes last, at a value that means "none". `default_config` gives the defaults of any
    family. Raises `UserError` for a value of the wrong type, one that no model can have, or one that the family has no
    field for.
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
    # electra, albert, roformer: width of the embeddings. None: hidden_size.
    embedding_size: int | None = None
    # albert: there are num_hidden_groups x inner_group_num blocks of parameters; a layer is a group's inner blocks.
    num_hidden_groups: int | None = None
    inner_group_num: int | None = None
    # roformer: whether values are turned too.
    rotary_value: bool = False
    # modernbert: attention is global in every so many layers, from the first on, and reaches local_attention // 2
    # tokens to either side in the others. Rotary positions have a base for either kind.
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
    # Initial weights so many standard deviations out are drawn again.
    initializer_cutoff_factor: float | None = None

    def __post_init__(self):
        for name, kind in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), kind=kind)
        _check_model_type(self.model_type)
        self._check_alone()
        self._check_together()

    def _check_alone(self) -> None:
        has = self.family.fields
        for name, value in _absent_fields(self.family).items():
            if getattr(self, name) != value:
                raise _refusal(name, getattr(self, name), f"the family {self.model_type} has no such field")
        for name, default in self.family.defaults.items():
            if getattr(self, name) is None and default is not None:
                raise _refusal(name, None, f"the family {self.model_type} needs it")
        for name in ("hidden_act", "classifier_activation"):
            if name in has and getattr(self, name) not in ACTIVATIONS:
                raise _refusal(name, getattr(self, name), f"known: {', '.join(ACTIVATIONS)} (gelu is the exact one)")
        if not self.tie_word_embeddings and not self.family.supports_untied_embeddings:
            raise _refusal("tie_word_embeddings", False, "only true is supported")
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "type_vocab_size", "embedding_size", "num_hidden_groups", "inner_group_num",
            "global_attn_every_n_layers", "local_attention",
        ):  # fmt: skip
            if name in has and getattr(self, name) is not None and getattr(self, name) < 1:
                raise _refusal(name, getattr(self, name), "it must be at least 1")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout", "mlp_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise _refusal(name, getattr(self, name), "it must be at least 0 and less than 1")
        for name in (
            "initializer_range", "layer_norm_eps", "global_rope_theta", "local_rope_theta", "initializer_cutoff_factor",
        ):  # fmt: skip
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise _refusal(name, getattr(self, name), "it must be positive and finite")

    def _check_together(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise _refusal(
                "hidden_size",
                self.hidden_size,
                f"num_attention_heads={self.num_attention_heads} must divide it",
            )
        if self.family.positions.rotary and self.head_size % 2:
            raise _refusal(
                "num_attention_heads",
                self.num_attention_heads,
                f"a head is {self.head_size} wide, and rotary positions need an even width",
            )
        if self.num_hidden_groups is not None and self.num_hidden_groups > self.num_hidden_layers:
            raise _refusal(
                "num_hidden_groups",
                self.num_hidden_groups,
                f"it must be at most num_hidden_layers={self.num_hidden_layers}",
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
    def family(self) -> Family:
        """The traits of its model_type."""
        return FAMILIES[self.model_type]

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings, and of what the decoder takes."""
        return self.embedding_size or self.hidden_size

    @property
    def has_projection(self) -> bool:
        """Whether a dense layer stands between the embeddings and the first layer."""
        return self.family.always_projects or self.embedding_width != self.hidden_size

    @property
    def max_seq_length(self) -> int:
        """Tokens in the longest row the positions allow: RoBERTa counts them from pad_token_id + 1."""
        if self.family.positions is PositionEmbedding.LEARNED_PAD_OFFSET:
            return self.max_position_embeddings - self.pad_token_id - 1
        return self.max_position_embeddings

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The stack, in the order of application."""
        if self.num_hidden_groups is None:
            blocks = list(range(self.num_hidden_layers))
        else:
            per_group = self.num_hidden_layers / self.num_hidden_groups  # Not whole at times, in transformers too.
            groups = [int(layer / per_group) for layer in range(self.num_hidden_layers)]
            blocks = [group * self.inner_group_num + i for group in groups for i in range(self.inner_group_num)]
        return tuple(self._layer(number, block) for number, block in enumerate(blocks))

    def _layer(self, number: int, block: int) -> Layer:
        local = self.global_attn_every_n_layers is not None and number % self.global_attn_every_n_layers > 0
        return Layer(
            block=block,
            window=self.local_attention // 2 if local else None,
            rope_theta=self.local_rope_theta if local else self.global_rope_theta,
            attention_norm=self.family.norm_before_first_attention or number > 0,
        )

    def dropout(self, place: str) -> float:
        """The rate at a place that `Family.dropout` names; 0 where the family has none."""
        field = self.family.dropout.get(place)
        return getattr(self, field) if field else 0.0

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
            raise UserError(f"model config: model_type is missing; one of: {', '.join(FAMILIES)}")
        default = default_config(config["model_type"])
        if default.model_type == "modernbert":
            config = modernbert_fields.flatten(config)
        ours = {theirs: name for name, theirs in default.family.fields.items()}
        overrides = {}
        for name, value in config.items():
            if name in ours:
                overrides[ours[name]] = value
            elif name in _REQUIRED:
                if value is not None and value != _REQUIRED[name]:
                    raise _refusal(name, value, f"only {_REQUIRED[name]!r} is supported")
            elif name in _IGNORED_FIELDS or name in default.family.ignored_fields:
                continue
            elif not (value is None or value is False or value in ("", [], {})):
                raise _refusal(name, value, "the field is unknown, and ignoring it might change the model")
        read = default.replace(**overrides)
        # transformers writes the width it fell back to.
        falls_back = default.embedding_size is None and read.embedding_size == read.hidden_size
        return read.replace(embedding_size=None) if falls_back else read

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json`, as a dict, from which transformers' Auto classes build the same model."""
        fields = {theirs: getattr(self, name) for name, theirs in self.family.fields.items()}
        if "embedding_size" in fields:
            fields["embedding_size"] = self.embedding_width
        if self.model_type == "modernbert":
            fields = modernbert_fields.nest(fields)
        return {"architectures": [self.family.architecture], **fields, "dtype": "float32"}


def default_config(model_type: str) -> EncoderConfig:
    """Return the defaults transformers' config class of this type has; `UserError` for an unknown type."""
    _check_model_type(model_type)
    family = FAMILIES[model_type]
    return EncoderConfig(**({"model_type": model_type} | _absent_fields(family) | dict(family.defaults)))


def _absent_fields(family: Family) -> dict[str, Any]:
    """The fields a family does not have, with the values they must have."""
    return {
        field.name: family.defaults.get(field.name, _ABSENT.get(field.name, field.default))
        for field in dataclasses.fields(EncoderConfig)
        if field.name not in family.fields
    }


def _check_model_type(model_type: Any) -> None:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise _refusal("model_type", model_type, f"known: {', '.join(FAMILIES)}")


def _check_type(name: str, value: Any, *, kind: Any) -> None:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    wanted = " or ".join("null" if k is types.NoneType else k.__name__ for k in kinds)
    accepted = (*kinds, int) if float in kinds else kinds
    # bool is an int to Python, but `hidden_size: true` is a mistake.
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        raise _refusal(name, value, f"it must be of type {wanted}")


def _refusal(name: str, value: Any, reason: str) -> UserError:
    return UserError(f"model config: {name}={value!r} will not do; {reason}")
