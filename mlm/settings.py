"""The settings of a run: one frozen dataclass per group of `configs/default.py`, and `RunSettings` across the groups.

They perform every check that needs no device, file or network, so that a wrong value is an error before anything slow
is imported. `configs/default.py` documents every key and holds every default. This module imports no jax, and the
lower layers take the names of their choices (`PACKINGS`, `DTYPES`, ...) from here.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from mlm.errors import UserError
from mlm.eval_settings import EvalSettings
from mlm.models.families import FAMILIES, Family, PositionEmbedding

# data.packing.
PACKINGS = ("concatenate", "pad", "pad_lines", "isolate", "best_fit")
# Packings whose sequences may have several documents without attention between them.
ISOLATING = ("isolate", "best_fit")
# Minimum of data.shuffle_piece_bytes, so that every piece has at least one character.
MIN_PIECE_BYTES = 8
# data.eval_rows.
EVAL_ROWS = ("spread", "first")
# Keys that an entry of data.mixture may set for its source only.
MIXTURE_KEYS = ("dataset_name", "dataset_config_name", "data_files", "eval_data_files", "split", "text_column_name")
# data.dataset_name of random ids, which need no text.
SYNTHETIC = "synthetic"
# tokenizer.algorithm -> the model families whose published tokenizers use it: what "auto" chooses.
ALGORITHM_FAMILIES = {
    "bpe": ("roberta", "roberta-prelayernorm", "modernbert"),
    "wordpiece": ("bert", "distilbert", "electra", "roformer"),
    "unigram": ("albert", "camembert", "xlm-roberta"),
}
ALGORITHMS = ("auto", *ALGORITHM_FAMILIES)
# tokenizer.backend.
BACKENDS = ("auto", "gigatoken", "tokenizers")
# Every tokenizer trained here has begin, end, padding, unknown and mask tokens.
NUM_SPECIAL_TOKENS = 5
# model.dtype.
DTYPES = ("float32", "bfloat16")
# model.attention and model.remat; both also take "auto".
IMPLEMENTATIONS = ("plain", "xla", "cudnn", "splash")
REMATS = ("none", "dots", "full")
# model.overrides.hidden_act and classifier_activation: transformers' name -> ours, where "gelu" is exact.
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# masking.strategy and masking.eval_strategy.
STRATEGIES = ("token", "whole_word", "span")
# Bit of a token in a row that is set where a word starts, if a strategy needs words. Vocabularies are far smaller.
WORD_START = 1 << 30
# optimizer.name -> the keys that not every optimizer has, and what None means for them: the values of the reference
# script for adamw, of the papers for the others (see mlm/optimizer.py).
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
    "stable_adamw": {"adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-6},
    "lamb": {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-6},
    "lion": {"lion_beta1": 0.9, "lion_beta2": 0.99},
    "adafactor": {"adafactor_decay_rate": 0.8, "adafactor_clipping_threshold": 1.0},
    "muon": {
        "adam_learning_rate": 3e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "muon_momentum": 0.95,
        "muon_iterations": 5,
        "muon_scale": "spectral",
    },
}
# optimizer.muon_scale.
MUON_SCALES = ("spectral", "rms")
# optimizer.schedule -> the keys that not every schedule has, and what None means for them.
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"end_factor": 0.0},
    "cosine": {"end_factor": 0.0},
    "constant": {},
    "inverse_sqrt": {"decay_steps": 0, "decay_shape": "linear", "end_factor": 0.0},
    "wsd": {"decay_steps": 0.1, "decay_shape": "1-sqrt", "end_factor": 0.0},
}
# optimizer.decay_shape.
DECAY_SHAPES = ("linear", "1-sqrt", "cosine")
# checkpoint.init_mode.
INIT_MODES = ("branch", "restart")
# export.dtype.
EXPORT_DTYPES = ("float32", "bfloat16", "float16")

# Keys that may change during a run, one by one: any other key would change the meaning of the steps done so far.
MUTABLE_KEYS: tuple[str, ...] = (
    # How long the run is, and how often it reports: no step depends on it, except through the schedules of the learning
    # rate and of masking.mlm_probability.
    "num_train_steps",
    "per_device_eval_batch_size",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "max_hours",
    # How batches are read, not what is in them. skip_steps may change after the last checkpoint only, which
    # restoring the data stream checks.
    "data.skip_steps",
    "data.network_deadline_seconds",
    "data.network_timeout_seconds",
    "data.max_failed_shards",
    "data.max_unknown_fraction",
    "data.accept_changed_files",
    "data.prefetch_batches",
    "data.cache_dir",
    # Both backends give the same ids; this is verified on the first documents.
    "tokenizer.backend",
    # Hyperparameters that people tune during a run, as after a loss spike: the optimizer state stays valid. The
    # optimizer and its betas define that state, so they stay fixed.
    "optimizer.learning_rate",
    "optimizer.adam_learning_rate",
    "optimizer.warmup_steps",
    "optimizer.schedule",
    "optimizer.decay_steps",
    "optimizer.decay_shape",
    "optimizer.end_factor",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "optimizer.max_skipped_steps",
    "optimizer.spike_factor",
    # Which checkpoints stay on disk.
    "checkpoint.keep_checkpoints",
    "checkpoint.keep_every_steps",
    # What is written beside the checkpoints, and where it is uploaded.
    "export.dtype",
    "export.sentence_transformers",
    "hub.push_to_hub",
    "hub.hub_model_id",
    "hub.private",
    "hub.license",
    "hub.languages",
    # Measurements and examples.
    "eval.probes",
    "eval.pairs",
    "profile.first_step",
    "profile.num_steps",
    "report.sentences",
)

# Defaults of transformers' config classes for families whose table has no other.
_HF_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
}


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One source of `data.mixture`.

    Attributes:
      name: for metrics and messages; also its dataset_name unless `options` has one.
      weight: relative number of its sequences.
      options: the `MIXTURE_KEYS` whose values differ from the data group's.
    """

    name: str
    weight: float
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """`data`: where text comes from and how it becomes sequences."""

    dataset_name: str
    dataset_config_name: str | None
    data_files: str | tuple[str, ...] | None
    eval_data_files: str | tuple[str, ...] | None
    mixture: tuple[Any, ...]
    split: str
    text_column_name: str
    max_seq_length: int
    packing: str
    shuffle_buffer_size: int
    first_shuffle_buffer_size: int
    shuffle_buffer_bytes: int
    shuffle_piece_bytes: int
    interleave_shards: int
    min_shards: int
    num_eval_samples: int
    eval_rows: str
    skip_steps: tuple[Any, ...]
    network_deadline_seconds: float
    network_timeout_seconds: float
    max_failed_shards: int
    max_unknown_fraction: float
    accept_changed_files: bool
    prefetch_batches: int
    cache_dir: str | None

    def __post_init__(self):
        _convert_types(self, "data.")
        _check_files("data.data_files", self.data_files)
        _check_files("data.eval_data_files", self.eval_data_files)
        mixture = self.mixture_entries
        if mixture:
            for key in ("data_files", "eval_data_files"):
                if (value := getattr(self, key)) is not None:
                    raise _error(
                        f"data.{key}", value, "the sources of data.mixture have their own files; set it to None"
                    )
        elif self.data_files is None and not self.dataset_name:
            raise _error("data.dataset_name", self.dataset_name, "there is no data; set it, or data.data_files")
        if self.max_seq_length < 3:
            raise _error(
                "data.max_seq_length", self.max_seq_length, "must be at least 3: a begin token, text and an end token"
            )
        _check_choice("data.packing", self.packing, PACKINGS)
        _check_choice("data.eval_rows", self.eval_rows, EVAL_ROWS)
        zeros = ("shuffle_buffer_size", "first_shuffle_buffer_size", "min_shards", "max_failed_shards")
        _check_minimums(self, "data.", **dict.fromkeys(zeros, 0))
        ones = ("shuffle_buffer_bytes", "interleave_shards", "num_eval_samples", "prefetch_batches")
        _check_minimums(self, "data.", **dict.fromkeys(ones, 1))
        if self.shuffle_piece_bytes != 0 and self.shuffle_piece_bytes < MIN_PIECE_BYTES:
            raise _error(
                "data.shuffle_piece_bytes", self.shuffle_piece_bytes, f"must be 0, or at least {MIN_PIECE_BYTES}"
            )
        if not 0 <= self.max_unknown_fraction <= 1:
            raise _error("data.max_unknown_fraction", self.max_unknown_fraction, "must be between 0 and 1")
        _check_skip_steps(self.skip_steps)
        if not self.network_deadline_seconds >= 0:
            raise _error("data.network_deadline_seconds", self.network_deadline_seconds, "must not be negative")
        if not self.network_timeout_seconds > 0:
            raise _error("data.network_timeout_seconds", self.network_timeout_seconds, "must be positive")

    @property
    def mixture_entries(self) -> tuple[MixtureEntry, ...]:
        """The parsed entries of `mixture`."""
        entries: list[MixtureEntry] = []
        for number, value in enumerate(self.mixture):
            entry = _parse_mixture_entry(f"data.mixture[{number}]", value)
            if entry.name in (other.name for other in entries):
                raise _error(f"data.mixture[{number}]", value, f"the name {entry.name!r} is not unique; rename one")
            entries.append(entry)
        return tuple(entries)

    @property
    def is_synthetic(self) -> bool:
        """True if random ids take the place of text."""
        return self.dataset_name == SYNTHETIC and self.data_files is None and not self.mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """`tokenizer`: which tokenizer is loaded or trained."""

    tokenizer_name: str | None
    use_fast_tokenizer: bool
    algorithm: str
    lowercase: bool
    vocab_size: int
    train_documents: int
    backend: str

    def __post_init__(self):
        _convert_types(self, "tokenizer.")
        if not self.use_fast_tokenizer:
            raise _error("tokenizer.use_fast_tokenizer", False, "slow tokenizers are not supported; set it to True")
        _check_choice("tokenizer.algorithm", self.algorithm, ALGORITHMS)
        _check_choice("tokenizer.backend", self.backend, BACKENDS)
        _check_minimums(self, "tokenizer.", train_documents=1)
        # Besides the special tokens there must be one that can be predicted.
        _check_minimums(self, "tokenizer.", vocab_size=NUM_SPECIAL_TOKENS + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOverrides:
    """`model.overrides`: fields of the Hugging Face config to change; None leaves a field as it is."""

    vocab_size: int | None
    hidden_size: int | None
    num_hidden_layers: int | None
    num_attention_heads: int | None
    intermediate_size: int | None
    hidden_act: str | None
    hidden_dropout_prob: float | None
    attention_probs_dropout_prob: float | None
    max_position_embeddings: int | None
    type_vocab_size: int | None
    initializer_range: float | None
    layer_norm_eps: float | None
    embedding_size: int | None
    num_hidden_groups: int | None
    inner_group_num: int | None
    rotary_value: bool | None
    global_attn_every_n_layers: int | None
    local_attention: int | None
    global_rope_theta: float | None
    local_rope_theta: float | None
    attention_bias: bool | None
    mlp_bias: bool | None
    norm_bias: bool | None
    classifier_bias: bool | None
    decoder_bias: bool | None
    classifier_activation: str | None
    embedding_dropout: float | None
    mlp_dropout: float | None
    initializer_cutoff_factor: float | None
    tie_word_embeddings: bool | None

    def __post_init__(self):
        _convert_types(self, "model.overrides.")
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            key = f"model.overrides.{name}"
            if value is None:
                continue
            if name in ("hidden_act", "classifier_activation"):
                _check_choice(key, value, tuple(ACTIVATIONS))
            elif field.type == int | None and value < 1:
                raise _error(key, value, "must be at least 1")
            elif name.endswith(("_dropout", "_dropout_prob")) and not 0 <= value < 1:
                raise _error(key, value, "must be at least 0 and less than 1")
            elif field.type == float | None and "dropout" not in name and not 0 < value < math.inf:
                raise _error(key, value, "must be positive and finite")

    def given(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """`model`: which encoder, and how it is computed."""

    model_type: str
    config_name: str | None
    model_name_or_path: str | None
    dtype: str
    attention: str
    remat: str
    overrides: ModelOverrides

    def __post_init__(self):
        _convert_types(self, "model.")
        _check_choice("model.model_type", self.model_type, tuple(FAMILIES))
        if self.config_name and self.model_name_or_path:
            raise _error(
                "model.model_name_or_path",
                self.model_name_or_path,
                f"cannot be combined with model.config_name={self.config_name!r}; set one of them to None",
            )
        _check_choice("model.dtype", self.dtype, DTYPES)
        _check_choice("model.attention", self.attention, ("auto", *IMPLEMENTATIONS))
        _check_choice("model.remat", self.remat, ("auto", *REMATS))
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise _error(
                "model.attention",
                "cudnn",
                f"needs model.dtype='bfloat16', not {self.dtype!r}; set that, or model.attention='auto'",
            )
        if self.family is not None:
            self._check_overrides_of_family(self.family)
        self._check_shape()

    @property
    def family(self) -> Family | None:
        """The table of model_type; None where the model's config is loaded, whose family is not known here."""
        return None if self.config_name or self.model_name_or_path else FAMILIES[self.model_type]

    def config_field(self, name: str) -> Any:
        """The value of a field of the model's config; None where it is not known before that config is loaded."""
        override = getattr(self.overrides, name, None)
        if override is not None or self.family is None:
            return override
        return self.family.defaults.get(name, _HF_DEFAULTS.get(name))

    def _check_overrides_of_family(self, family: Family) -> None:
        for name, value in self.overrides.given().items():
            if name not in family.fields:
                raise _error(
                    f"model.overrides.{name}",
                    value,
                    f"the family {self.model_type} has no such field; set it to None "
                    f"(--config=configs/quickstart.py:{self.model_type} sets all fields for this family)",
                )
        if self.overrides.tie_word_embeddings is False and not family.supports_untied_embeddings:
            raise _error(
                "model.overrides.tie_word_embeddings",
                False,
                f"the family {self.model_type} always ties the decoder to the word embeddings; set it to None",
            )

    def _check_shape(self) -> None:
        width, heads = self.config_field("hidden_size"), self.config_field("num_attention_heads")
        if width and heads:
            if width % heads:
                raise _error(
                    "model.overrides.hidden_size",
                    width,
                    f"must be a multiple of num_attention_heads={heads}; change one of them",
                )
            if self.family is not None and self.family.position_embedding.rotary and width // heads % 2:
                raise _error(
                    "model.overrides.num_attention_heads",
                    heads,
                    f"rotary positions need heads of an even width, not {width // heads}; "
                    "change it, or model.overrides.hidden_size",
                )
        groups, layers = self.config_field("num_hidden_groups"), self.config_field("num_hidden_layers")
        if groups and layers and groups > layers:
            raise _error("model.overrides.num_hidden_groups", groups, f"must be at most num_hidden_layers={layers}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingSettings:
    """`masking`: which tokens are predicted and what replaces them, in training and in evaluation."""

    strategy: str
    mlm_probability: float | tuple[Any, ...]
    mask_replace_prob: float
    random_replace_prob: float
    eval_strategy: str
    eval_mlm_probability: float | None
    eval_mask_replace_prob: float | None
    eval_random_replace_prob: float | None

    def __post_init__(self):
        rates = self.mlm_probability if isinstance(self.mlm_probability, tuple | list) else (self.mlm_probability,) * 2
        if len(rates) != 2 or any(type(rate) not in (int, float) for rate in rates):
            raise _error("masking.mlm_probability", self.mlm_probability, "must be a number or a pair of numbers")
        _convert_types(self, "masking.")
        if not all(0 < rate <= 1 for rate in self.mlm_probabilities):
            raise _error("masking.mlm_probability", self.mlm_probability, "must lie in (0, 1]")
        # None: the value of training, as before these keys existed.
        if self.eval_mlm_probability is None:
            object.__setattr__(self, "eval_mlm_probability", max(self.mlm_probabilities))
        for name in ("mask_replace_prob", "random_replace_prob"):
            if getattr(self, f"eval_{name}") is None:
                object.__setattr__(self, f"eval_{name}", getattr(self, name))
        if not 0 < self.eval_mlm_probability <= 1:
            raise _error("masking.eval_mlm_probability", self.eval_mlm_probability, "must lie in (0, 1]")
        for prefix in ("", "eval_"):
            _check_choice(f"masking.{prefix}strategy", getattr(self, f"{prefix}strategy"), STRATEGIES)
            keys = f"{prefix}mask_replace_prob", f"{prefix}random_replace_prob"
            mask_replace_prob, random_replace_prob = (getattr(self, key) for key in keys)
            for key in keys:
                if not 0 <= getattr(self, key) <= 1:
                    raise _error(f"masking.{key}", getattr(self, key), "must lie in [0, 1]")
            if not mask_replace_prob + random_replace_prob <= 1 + 1e-9:
                raise _error(
                    f"masking.{keys[0]}",
                    mask_replace_prob,
                    f"together with masking.{keys[1]}={random_replace_prob!r} it exceeds 1; lower either",
                )

    @property
    def mlm_probabilities(self) -> tuple[float, float]:
        """The training rate at the first and at the last step."""
        rate = self.mlm_probability
        return rate if isinstance(rate, tuple) else (rate, rate)

    @property
    def needs_words(self) -> bool:
        """True if a strategy chooses words, so that tokens must say where one starts."""
        return self.strategy != "token" or self.eval_strategy != "token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """`loss`: terms of the training loss."""

    z_loss: float
    label_smoothing: float

    def __post_init__(self):
        _convert_types(self, "loss.")
        if not 0 <= self.z_loss < math.inf:
            raise _error("loss.z_loss", self.z_loss, "must be finite and not negative")
        if not 0 <= self.label_smoothing < 1:
            raise _error("loss.label_smoothing", self.label_smoothing, "must lie in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """`optimizer`: the optimizer, its schedule, and which steps are skipped.

    A key that is None and that the optimizer or schedule has gets its value from `OPTIMIZERS` or `SCHEDULES`.
    """

    name: str
    learning_rate: float
    adam_learning_rate: float | None
    warmup_steps: int | float | str
    schedule: str
    decay_steps: int | float | str | None
    decay_shape: str | None
    end_factor: float | None
    adam_beta1: float | None
    adam_beta2: float | None
    adam_epsilon: float | None
    muon_momentum: float | None
    muon_iterations: int | None
    muon_scale: str | None
    lion_beta1: float | None
    lion_beta2: float | None
    adafactor_decay_rate: float | None
    adafactor_clipping_threshold: float | None
    weight_decay: float
    layer_decay: float
    ema_decay: float
    max_grad_norm: float
    max_skipped_steps: int
    spike_factor: float

    def __post_init__(self):
        check_duration("optimizer.warmup_steps", self.warmup_steps)
        # 1.0: the complete schedule, such as one that begins with a stage.
        if self.decay_steps is not None and (type(self.decay_steps), self.decay_steps) != (float, 1.0):
            check_duration("optimizer.decay_steps", self.decay_steps)
        _convert_types(self, "optimizer.", skip=("warmup_steps", "decay_steps"))
        _check_choice("optimizer.name", self.name, tuple(OPTIMIZERS))
        _check_choice("optimizer.schedule", self.schedule, tuple(SCHEDULES))
        self._set_defaults("name", OPTIMIZERS)
        self._set_defaults("schedule", SCHEDULES)

        def check(is_valid: Callable[[Any], bool], problem: str, *keys: str) -> None:
            for key in keys:
                value = getattr(self, key)
                if value is not None and not is_valid(value):
                    raise _error(f"optimizer.{key}", value, problem)

        def is_positive(value: float) -> bool:
            return 0 < value < math.inf

        check(is_positive, "must be positive and finite", "learning_rate", "adam_learning_rate", "adam_epsilon")
        check(is_positive, "must be positive and finite", "adafactor_decay_rate", "adafactor_clipping_threshold")
        betas = ("adam_beta1", "adam_beta2", "muon_momentum", "lion_beta1", "lion_beta2", "ema_decay")
        check(lambda value: 0 <= value < 1, "must lie in [0, 1)", *betas)
        check(lambda value: 0 < value <= 1, "must lie in (0, 1]", "layer_decay")
        check(lambda value: 0 <= value <= 1, "must lie in [0, 1]", "end_factor")
        check(lambda value: 0 <= value < math.inf, "must be finite and not negative", "weight_decay", "max_grad_norm")
        check(lambda value: value >= 1, "must be at least 1", "muon_iterations")
        _check_minimums(self, "optimizer.", max_skipped_steps=0)
        check(lambda value: value == 0 or value > 1, "must be 0 or more than 1", "spike_factor")
        for key, choices in (("muon_scale", MUON_SCALES), ("decay_shape", DECAY_SHAPES)):
            if getattr(self, key) is not None:
                _check_choice(f"optimizer.{key}", getattr(self, key), choices)

    def _set_defaults(self, choice: str, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Replaces None by the default of the chosen optimizer or schedule, and refuses keys that it does not have."""
        chosen = getattr(self, choice)
        keys = dict.fromkeys(key for table in tables.values() for key in table)
        unused = [key for key in keys if getattr(self, key) is not None and key not in tables[chosen]]
        if unused:
            shown = ", ".join(f"optimizer.{key}={getattr(self, key)!r}" for key in unused)
            them = "it; set it" if len(unused) == 1 else "them; set them"
            raise UserError(f"{shown}: optimizer.{choice}={chosen!r} does not use {them} to None")
        for key in keys:
            if getattr(self, key) is None:
                object.__setattr__(self, key, tables[chosen].get(key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """`checkpoint`: which checkpoints stay on disk, and the one that a new run starts from."""

    keep_checkpoints: int
    keep_every_steps: int
    init_from: str | None
    init_mode: str | None

    def __post_init__(self):
        _convert_types(self, "checkpoint.")
        _check_minimums(self, "checkpoint.", keep_checkpoints=1, keep_every_steps=0)
        if self.init_mode is not None:
            _check_choice("checkpoint.init_mode", self.init_mode, INIT_MODES)
            if not self.init_from:
                raise _error("checkpoint.init_mode", self.init_mode, "needs checkpoint.init_from; set that, too")
        elif self.init_from:
            object.__setattr__(self, "init_mode", INIT_MODES[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """`export`: what is in `model/`."""

    dtype: str
    sentence_transformers: bool

    def __post_init__(self):
        _convert_types(self, "export.")
        _check_choice("export.dtype", self.dtype, EXPORT_DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubSettings:
    """`hub`: uploads, and what the model card says."""

    push_to_hub: bool
    hub_model_id: str | None
    private: bool
    license: str | None
    languages: tuple[str, ...]

    def __post_init__(self):
        _convert_types(self, "hub.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """`profile`: which steps are traced."""

    first_step: int
    num_steps: int

    def __post_init__(self):
        _convert_types(self, "profile.")
        _check_minimums(self, "profile.", first_step=0, num_steps=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """`report`: example sentences that the model fills in."""

    sentences: tuple[str, ...]

    def __post_init__(self):
        _convert_types(self, "report.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Every key of a run; `configs/default.py` documents them."""

    seed: int
    num_train_steps: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    logging_steps: int
    eval_steps: int
    save_steps: int
    max_hours: float
    stages: tuple[Any, ...]
    data: DataSettings
    tokenizer: TokenizerSettings
    model: ModelSettings
    masking: MaskingSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    eval: EvalSettings
    checkpoint: CheckpointSettings
    export: ExportSettings
    hub: HubSettings
    profile: ProfileSettings
    report: ReportSettings

    def __post_init__(self):
        _convert_types(self, "")
        if not 0 <= self.seed < 2**32:
            raise _error("seed", self.seed, "must lie between 0 and 2**32 - 1")
        _check_minimums(
            self,
            "",
            num_train_steps=1,
            per_device_train_batch_size=0,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=1,
            logging_steps=1,
            eval_steps=1,
            save_steps=1,
        )
        if not 0 <= self.max_hours < math.inf:
            raise _error("max_hours", self.max_hours, "must be a number of hours, or 0 for no limit")
        # Numbers of tokens are checked once the tokens of a step are known.
        if not any(isinstance(value, str) for value in (self.optimizer.warmup_steps, self.optimizer.decay_steps)):
            resolve_boundaries(self.optimizer, num_train_steps=self.num_train_steps, tokens_per_step=0)
        self._check_positions()
        self._check_trained_tokenizer()
        if self.masking.needs_words:
            strategy = "strategy" if self.masking.strategy != "token" else "eval_strategy"
            key, value = f"masking.{strategy}", getattr(self.masking, strategy)
            if self.tokenizer.backend == "gigatoken":
                raise _error(key, value, "gigatoken does not find words; set tokenizer.backend='auto'")
            if self.data.is_synthetic:
                raise _error(key, value, "random token ids are not words; set it to 'token', or use text")

    @classmethod
    def from_dict(cls, nested: Mapping[str, Any]) -> Self:
        """Builds the settings from a config's `to_dict()` or from a parsed `config.json`: lists become tuples.

        Raises:
          UserError: a key is unknown or missing, or a value is invalid.
        """
        check_keys(nested)
        return _build(cls, nested)

    @classmethod
    def from_flat(cls, keys: Mapping[str, Any]) -> Self:
        """Builds the settings from keys with dots, as `flat` returns them. Raises UserError as `from_dict` does."""
        nested: dict[str, Any] = {}
        for key, value in keys.items():
            *groups, name = key.split(".")
            functools.reduce(lambda group, part: group.setdefault(part, {}), groups, nested)[name] = value
        return cls.from_dict(nested)

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys as nested dicts, in the order of `configs/default.py`."""
        return dataclasses.asdict(self)

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """Returns settings with some values changed, by keys with dots: `replace({"hub.push_to_hub": False})`."""
        return self.from_flat({**self.flat(), **changes})

    def flat(self) -> dict[str, Any]:
        """Returns the keys with dots, such as "optimizer.learning_rate", in the order of `configs/default.py`."""
        values = self.to_dict()
        return {key: _value_at(values, key) for key in KEYS}

    def _check_positions(self) -> None:
        """Checks the length of sequences as far as the model's config and its padding id are known."""
        length, positions = self.data.max_seq_length, self.model.config_field("max_position_embeddings")
        family = self.model.family
        has_offset = family is not None and family.position_embedding is PositionEmbedding.LEARNED_PAD_OFFSET
        # Such a family counts positions from pad_token_id + 1, and the tokenizer may have another padding id: sequences
        # that fit with padding id 0 pass here, and are checked again with the tokenizer.
        if positions is None or length <= (positions - 1 if has_offset else positions):
            return
        reserved = self.model.config_field("pad_token_id") + 1 if has_offset else 0
        raise _error(
            "data.max_seq_length",
            length,
            f"is longer than the model's {positions - reserved} positions; lower it, or set "
            f"model.overrides.max_position_embeddings={length + reserved}",
        )

    def _check_trained_tokenizer(self) -> None:
        """Checks the options of a tokenizer that is to be trained; they do not matter to one that is loaded."""
        options = self.tokenizer
        if options.tokenizer_name or self.model.model_name_or_path or self.data.is_synthetic:
            return
        # A config that is yet to be loaded may be of any family.
        model_type = None if self.model.family is None else self.model.model_type
        if options.algorithm == "auto" and model_type is None:
            return
        check_tokenizer_options(
            options.algorithm, model_type=model_type, vocab_size=options.vocab_size, lowercase=options.lowercase
        )


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """Where the parts of a learning-rate schedule begin and end, in applied steps.

    Attributes:
      warmup_steps: length of the warm-up.
      decay_start: first step of the decay of `wsd` or `inverse_sqrt`; num_train_steps if there is none.
    """

    warmup_steps: int
    decay_start: int


def resolve_boundaries(
    optimizer: OptimizerSettings,
    *,
    num_train_steps: int,
    tokens_per_step: int,
    parts: Sequence[tuple[int, int]] | None = None,
) -> Boundaries:
    """Converts `optimizer.warmup_steps` and `decay_steps` to steps.

    Args:
      optimizer: an integer is a number of steps, a float a fraction of the run, a string a number of tokens.
      num_train_steps: steps of the schedule.
      tokens_per_step: tokens in a batch on all devices, for values in tokens.
      parts: (steps, tokens per step) of the parts of the schedule, if they differ in the latter.

    Raises:
      UserError: they are longer than the run.
    """
    limit = f"{num_train_steps=}" if parts is None else f"the {num_train_steps} steps of its schedule"
    parts = parts or ((num_train_steps, tokens_per_step),)
    warmup_steps = num_steps(optimizer.warmup_steps, parts)
    decay_steps = num_steps(optimizer.decay_steps or 0, parts[::-1])
    if warmup_steps > num_train_steps:
        raise _error("optimizer.warmup_steps", optimizer.warmup_steps, f"must be at most {limit}")
    if warmup_steps + decay_steps > num_train_steps:
        raise _error(
            "optimizer.decay_steps",
            optimizer.decay_steps,
            f"with {warmup_steps} warm-up steps it is longer than {limit}; lower one of them",
        )
    return Boundaries(warmup_steps, num_train_steps - decay_steps)


def num_steps(duration: int | float | str, parts: Sequence[tuple[int, int]]) -> int:
    """Converts a duration to steps.

    Args:
      duration: a number of steps, a fraction of all of them, or a string such as "3e9 tokens".
      parts: (steps, tokens per step), in the order in which tokens are counted; the last one never ends.
    """
    if isinstance(duration, float):
        return round(duration * sum(steps for steps, _ in parts))
    if isinstance(duration, int):
        return duration
    tokens, passed = num_tokens(duration) or 0.0, 0
    for steps, tokens_per_step in parts[:-1]:
        if tokens <= steps * tokens_per_step:
            return passed + round(tokens / tokens_per_step)
        tokens, passed = tokens - steps * tokens_per_step, passed + steps
    return passed + round(tokens / parts[-1][1])


def resolve_algorithm(algorithm: str, *, model_type: str) -> str:
    """Returns `algorithm`, or for "auto" the one of the model's family."""
    if algorithm != "auto":
        return algorithm
    return next(known for known, families in ALGORITHM_FAMILIES.items() if model_type in families)


def check_tokenizer_options(algorithm: str, *, model_type: str | None, vocab_size: int, lowercase: bool) -> None:
    """Raises UserError unless a tokenizer can be trained with these options.

    Args:
      algorithm: one of `ALGORITHMS`.
      model_type: the family; None where it is not known, which needs an algorithm other than "auto".
      vocab_size: entries, special tokens included.
      lowercase: whether case is folded.
    """
    algorithm = resolve_algorithm(algorithm, model_type=model_type or "")
    if lowercase and (algorithm == "bpe" or (algorithm == "unigram" and model_type not in (None, "albert"))):
        raise _error(
            "tokenizer.lowercase",
            True,
            f"the {algorithm} tokenizer{f' of {model_type} models' if model_type else ''} has no lowercase form; "
            "set it to False, or tokenizer.algorithm='wordpiece'",
        )
    smallest = 256 + NUM_SPECIAL_TOKENS
    if algorithm == "bpe" and vocab_size < smallest:
        raise _error(
            "tokenizer.vocab_size",
            vocab_size,
            f"must be at least {smallest} for bpe: 256 bytes and {NUM_SPECIAL_TOKENS} special tokens",
        )


def check_key(key: str, *, shown: str | None = None) -> None:
    """Raises UserError unless `key`, with dots, is a key of `configs/default.py`; the error shows it as `shown`."""
    shown = shown or key
    if key in KEYS:
        return
    if members := [known for known in KEYS if known.startswith(f"{key}.")]:
        raise UserError(f"{shown}: is a group of keys; set one of them: {', '.join(members)}")
    nearest = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
    raise UserError(f"{shown}: unknown key; did you mean {nearest}?")


def check_keys(nested: Mapping[str, Any]) -> None:
    """Raises UserError unless nested dicts have the keys of `configs/default.py`, no more and no fewer."""
    found = dict(_flatten(nested))
    for key, value in found.items():
        check_key(key, shown=f"{key}={value!r}")
    if missing := [key for key in KEYS if key not in found]:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise UserError(f"{', '.join(missing[:4])}{more}: missing; let get_config() start from configs/default.py")


def _keys(group: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(group):
        if dataclasses.is_dataclass(field.type):
            yield from _keys(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


# Every key, with dots, in the order of configs/default.py.
KEYS: tuple[str, ...] = tuple(_keys(RunSettings))


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value_at(nested: Mapping[str, Any], key: str) -> Any:
    value: Any = nested
    for name in key.split("."):
        value = value[name]
    return value


def _build(group: Any, nested: Mapping[str, Any]) -> Any:
    values = {}
    for field in dataclasses.fields(group):
        value = nested[field.name]
        values[field.name] = _build(field.type, value) if dataclasses.is_dataclass(field.type) else value
    return group(**values)


# Larger numbers of steps and tokens overflow on the device.
_MAX_INTEGER = 2**31 - 1
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
    tuple[str, ...]: "a list of strings",
    tuple[Any, ...]: "a list",
}


def _convert_types(group: Any, prefix: str, *, skip: Sequence[str] = ()) -> None:
    """Checks the type of every field but `skip`; a whole number becomes a float if one is declared, a list a tuple."""
    for field in dataclasses.fields(group):
        if field.name in skip:
            continue
        value = _converted(f"{prefix}{field.name}", getattr(group, field.name), field.type)
        object.__setattr__(group, field.name, value)


def _converted(key: str, value: Any, declared: Any) -> Any:
    kinds = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    for kind in kinds:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(kind) is tuple:
            if isinstance(value, list | tuple) and (
                kind == tuple[Any, ...] or all(isinstance(item, str) for item in value)
            ):
                return as_tuples(value)
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            limit = 2**53 if key.endswith(("_bytes", "seed")) else _MAX_INTEGER
            if kind is int and abs(value) > limit:
                raise _error(key, value, f"must be at most {limit:,}")
            return value
    words = [_WORDS.get(kind, getattr(kind, "__name__", "")) for kind in kinds]
    raise _error(key, value, f"must be {' or '.join(words)}")


def as_tuples(value: Any) -> Any:
    """Returns a value as settings have it, such as one that was read from JSON: lists become tuples."""
    if isinstance(value, list | tuple):
        return tuple(as_tuples(item) for item in value)
    if isinstance(value, Mapping):
        return {name: as_tuples(item) for name, item in value.items()}
    return value


def _error(key: str, value: Any, problem: str) -> UserError:
    return UserError(f"{key}={value!r}: {problem}")


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise _error(key, value, f"must be one of {', '.join(choices)}")


def _check_minimums(group: Any, prefix: str, **minimums: int) -> None:
    for name, minimum in minimums.items():
        value = getattr(group, name)
        if value < minimum:
            raise _error(f"{prefix}{name}", value, f"must be at least {minimum}" if minimum else "must not be negative")


def check_duration(key: str, value: Any) -> None:
    """Checks a number of steps: an integer, a fraction of the run, or a string with a number of tokens."""
    if (type(value) is int and value >= 0) or (type(value) is float and 0 <= value < 1):
        return
    if isinstance(value, str) and num_tokens(value) is not None:
        return
    raise _error(
        key, value, "must be a number of steps, a fraction of the run in (0, 1), or a string such as '3e9 tokens'"
    )


def num_tokens(value: str) -> float | None:
    """Returns the number in a string such as "3e9 tokens"; None if it is something else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?) tokens", value)
    return float(match[1]) if match and math.isfinite(float(match[1])) else None


def _check_files(key: str, files: Any) -> None:
    is_list = isinstance(files, tuple | list) and all(isinstance(file, str) for file in files)
    if files is not None and not (files and (isinstance(files, str) or (is_list and all(files)))):
        raise _error(key, files, "no files given; set a path, a glob, a URL, a list of these, or None")


def _check_skip_steps(skip_steps: Sequence[Any]) -> None:
    for number, pair in enumerate(skip_steps):
        key = f"data.skip_steps[{number}]"
        if not isinstance(pair, tuple) or [type(step) for step in pair] != [int, int]:
            raise _error(key, pair, "must be a pair of steps, such as (1200, 1210)")
        if not 1 <= pair[0] <= pair[1]:
            raise _error(key, pair, "must be (first, last) with 1 <= first <= last")


def _parse_mixture_entry(key: str, value: Any) -> MixtureEntry:
    name, weight, options = (*value, {})[:3] if isinstance(value, tuple) and len(value) in (2, 3) else (None,) * 3
    if (
        not isinstance(name, str)
        or isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not isinstance(options, Mapping)
    ):
        raise _error(key, value, "must be (name, weight) or (name, weight, {key: value})")
    if not 0 < weight < math.inf:
        raise _error(key, value, "the weight must be positive and finite")
    for option, option_value in options.items():
        if option not in MIXTURE_KEYS:
            raise _error(f"{key}.{option}", option_value, f"unknown key; must be one of {', '.join(MIXTURE_KEYS)}")
        if option in ("data_files", "eval_data_files"):
            _check_files(f"{key}.{option}", option_value)
        elif not isinstance(option_value, str) and not (option == "dataset_config_name" and option_value is None):
            raise _error(f"{key}.{option}", option_value, "must be a string")
    if not name or (options.get("data_files") is None and not options.get("dataset_name", name)):
        raise _error(key, value, "there is no data; its name must be that of a dataset, or it needs data_files")
    return MixtureEntry(name, float(weight), dict(options))
