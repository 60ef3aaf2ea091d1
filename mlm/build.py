"""From a config to the parts of a run. What a user can get wrong is found here, before anything is compiled, and
nothing is written here."""

import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from mlm.data import packing
from mlm.data import pipeline as text_lib
from mlm.data.mixture import BatchStream, check_ranges
from mlm.data.pipeline import Text
from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError
from mlm.export import fill_mask
from mlm.export.hub import Hub, check_token, is_pushed
from mlm.export.model_directory import DTYPES as EXPORT_DTYPES
from mlm.masking import MaskingSpec
from mlm.models.config import EncoderConfig, default_config
from mlm.models.encoder import MaskedLM
from mlm.models.execution import REMATS, Execution
from mlm.models.hf import pretrained
from mlm.models.hf.pretrained import AdaptedWeights, PretrainedWeights
from mlm.models.ops.attention import IMPLEMENTATIONS
from mlm.optimizer import create_optimizer, create_schedule
from mlm.run.workdir import WorkDir
from mlm.steps import StepConfig, init_params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
      task: model, masking and optimizer, for the steps.
      encoder: the model's config.
      tokenizer: text to ids.
      stream: this process's training rows, at their beginning.
      text: what they and the evaluation rows come from.
      start: the weights to start from, or None.
    """

    step_config: StepConfig
    encoder: EncoderConfig
    tokenizer: Tokenizer
    stream: BatchStream
    text: Text
    start: AdaptedWeights | None

    def with_batch_size(self, config: ConfigDict) -> "Run":
        """The same parts for the `per_device_train_batch_size` that `config` has by now."""
        text = dataclasses.replace(self.text, batch_rows=text_lib.batch_rows(config))
        return dataclasses.replace(self, text=text, stream=text.batches())

    def initial_params(self) -> Any:
        """Parameters before the first update, on the host or one device."""
        init = jax.jit(init_params, static_argnums=0, static_argnames="length")
        fresh = functools.partial(init, self.step_config, length=self.text.eval_rows_RxL.shape[1])
        return fresh() if self.start is None else self.start.params(fresh)


def build(config: ConfigDict, workdir: WorkDir) -> Run:
    """Makes the parts, the cheap checks first.

    Raises:
      UserError: the config, the data, the tokenizer and the model do not fit together, or one of them is not there.
    """
    if jax.process_index() == 0:
        check_hub(config, workdir)
    options = config.optimizer.to_dict()
    schedule = create_schedule(
        options.pop("schedule"),
        learning_rate=options.pop("learning_rate"),
        warmup_steps=options.pop("warmup_steps"),
        num_train_steps=config.num_train_steps,
    )
    del options["max_skipped_steps"]  # The loop counts them.
    spike_factor = options.pop("spike_factor")
    optimizer = create_optimizer(schedule, **options)
    copied, checkpoint = _load_model(config)
    _check_positions_early(config, copied or default_config(config.model.model_type))

    text_sources = text_lib.open_sources(config)
    model_type = copied.model_type if copied is not None else config.model.model_type
    tokenizer = text_lib.open_tokenizer(config, workdir, text_sources, model_type=model_type)
    encoder = _encoder_config(config, copied, checkpoint, tokenizer)
    start = checkpoint and pretrained.fit(checkpoint, encoder, vocabulary=tokenizer.hf.get_vocab())

    text = text_lib.open_text(config, text_sources, tokenizer)
    fill_mask.encode(tokenizer, config.report.sentences, max_seq_length=encoder.max_seq_length)
    return Run(
        step_config=StepConfig(
            model=MaskedLM(
                encoder,
                DTYPES[config.model.dtype],
                begin_id=tokenizer.bos_id if config.data.packing == "isolate" else None,
                execution=open_execution(config, backend=jax.default_backend()),
            ),
            masking=open_masking(config, tokenizer),
            optimizer=optimizer,
            schedule=schedule,
            seed=config.seed,
            spike_factor=spike_factor,
        ),
        encoder=encoder,
        tokenizer=tokenizer,
        stream=text.batches(),
        text=text,
        start=start,
    )


def open_encoder(config: ConfigDict, tokenizer: Tokenizer) -> EncoderConfig:
    """The model's config, as `build` makes it."""
    copied, checkpoint = _load_model(config)
    return _encoder_config(config, copied, checkpoint, tokenizer)


def train_tokenizer(config: ConfigDict, output: str) -> None:
    """Trains the tokenizer of the config on the head of its text, for its model's family, and writes it to `output`.

    Raises:
      UserError: the config or the text do not allow it, or something stands at `output`.
    """
    if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise UserError(f"--output={output}: there is something already; name another directory")
    if config.tokenizer.train_documents < 1:
        raise UserError(f"tokenizer.train_documents={config.tokenizer.train_documents} must be at least 1")
    copied, _ = _load_model(config)
    model_type = copied.model_type if copied is not None else config.model.model_type
    tokenizer = text_lib.train_tokenizer(config, text_lib.open_sources(config), model_type=model_type)
    tokenizer.save(output)
    name = f"--config.tokenizer.tokenizer_name={output}"
    logging.info("a tokenizer of %d entries is in %s; use it with %s", tokenizer.num_ids, output, name)


def open_execution(config: ConfigDict, *, backend: str) -> Execution:
    """How the model is computed on devices of this kind, such as "cpu" or "gpu"."""
    attention, remat = config.model.attention, config.model.remat
    if attention == "auto":
        attention = "cudnn" if backend == "gpu" and config.model.dtype == "bfloat16" else "plain"
    if remat == "auto":
        remat = "none" if backend == "cpu" else "dots"
    return Execution(attention=attention, remat=remat, scan_layers=config.model.scan_layers)


def open_masking(config: ConfigDict, tokenizer: Tokenizer) -> MaskingSpec:
    """What is masked, and with what."""
    return MaskingSpec(
        **config.masking,
        mask_id=tokenizer.mask_id,
        # No token has the ids between: they cannot replace one.
        special_ids=tuple(sorted({*tokenizer.special_ids, *tokenizer.unused_ids})),
        num_ids=tokenizer.num_ids,
    )


def open_hub(config: ConfigDict, workdir: WorkDir) -> Hub | None:
    """The repository to push to, made if need be; None on other processes than the first, or when not asked for."""
    if not config.hub.push_to_hub or jax.process_index() > 0:
        return None
    return Hub(
        _hub_name(config, workdir),
        private=config.hub.private,
        workdir=workdir.path,
        retry_policy=text_lib.retry_policy(config),
        url=workdir.display_path if workdir.is_remote else None,
    )


def push_what_is_left(config: ConfigDict, workdir: WorkDir, *, step: int) -> None:
    """Pushes the model of a finished run, if it is to be and was not; waits for it."""
    if config.hub.push_to_hub and not is_pushed(workdir.path, name=_hub_name(config, workdir), step=step):
        hub = open_hub(config, workdir)
        if hub is not None:
            workdir.fetch_weights()
            hub.finish(step=step)
            with contextlib.suppress(OSError):  # Else it is pushed again, which does no harm.
                workdir.push()


def check_hub(config: ConfigDict, workdir: WorkDir) -> None:
    """Raises UserError unless the run may push to the hub, if it is to."""
    if config.hub.push_to_hub:
        check_token(_hub_name(config, workdir), retry_policy=text_lib.retry_policy(config))


def _hub_name(config: ConfigDict, workdir: WorkDir) -> str:
    return config.hub.hub_model_id or os.path.basename(workdir.path)


def check_numbers(config: ConfigDict) -> None:
    """Raises UserError for a number that cannot be, whatever the data and the model are."""
    positive = {
        "num_train_steps": config.num_train_steps,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "logging_steps": config.logging_steps,
        "eval_steps": config.eval_steps,
        "save_steps": config.save_steps,
        "data.num_eval_samples": config.data.num_eval_samples,
        "data.prefetch_batches": config.data.prefetch_batches,
        "tokenizer.train_documents": config.tokenizer.train_documents,
        "checkpoint.keep_checkpoints": config.checkpoint.keep_checkpoints,
    }
    for key, value in positive.items():
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    for key, value in {
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "optimizer.max_skipped_steps": config.optimizer.max_skipped_steps,
        "checkpoint.keep_every_steps": config.checkpoint.keep_every_steps,
    }.items():
        if value < 0:
            raise UserError(f"{key}={value} must not be negative")
    if config.optimizer.spike_factor != 0 and not config.optimizer.spike_factor > 1:
        raise UserError(f"optimizer.spike_factor={config.optimizer.spike_factor} must be 0, or more than 1")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} must lie between 0 and 2**32 - 1")
    if config.data.max_seq_length < 3:
        raise UserError(f"data.max_seq_length={config.data.max_seq_length} must be at least 3: begin, text, end")
    if config.data.shuffle_buffer_size < 0:
        raise UserError(f"data.shuffle_buffer_size={config.data.shuffle_buffer_size} must not be negative")
    if config.data.max_failed_shards < 0:
        raise UserError(f"data.max_failed_shards={config.data.max_failed_shards} must not be negative")
    if config.data.network_deadline_seconds < 0:
        raise UserError(f"data.network_deadline_seconds={config.data.network_deadline_seconds} must not be negative")
    if config.data.network_timeout_seconds <= 0:
        raise UserError(f"data.network_timeout_seconds={config.data.network_timeout_seconds} must be positive")
    check_ranges(config.data.skip_steps)
    text_lib.check_mixture(config.data.mixture)
    if config.data.packing not in packing.PACKINGS:
        raise UserError(f"data.packing={config.data.packing!r} is not one of {', '.join(packing.PACKINGS)}")
    if config.export.dtype not in EXPORT_DTYPES:
        raise UserError(f"export.dtype={config.export.dtype!r} is not one of {', '.join(EXPORT_DTYPES)}")
    if config.model.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.model.dtype!r} is not one of {', '.join(DTYPES)}")
    for key, value, known in (
        ("model.attention", config.model.attention, ("auto", *IMPLEMENTATIONS)),
        ("model.remat", config.model.remat, ("auto", *REMATS)),
    ):
        if value not in known:
            raise UserError(f"{key}={value!r} is not one of {', '.join(known)}")
    if config.model.attention == "cudnn" and (jax.default_backend() != "gpu" or config.model.dtype != "bfloat16"):
        raise UserError(
            f"model.attention='cudnn' needs an NVIDIA GPU and model.dtype='bfloat16', not {jax.default_backend()} and "
            f"{config.model.dtype!r}; set model.attention='auto'"
        )
    shares = config.masking
    if not 0 < shares.mlm_probability <= 1:
        raise UserError(f"masking.mlm_probability={shares.mlm_probability} must lie in (0, 1]")
    if not (shares.mask_replace_prob >= 0 and shares.random_replace_prob >= 0):
        raise UserError(
            f"masking.mask_replace_prob={shares.mask_replace_prob} and masking.random_replace_prob="
            f"{shares.random_replace_prob} must not be negative"
        )
    if not shares.mask_replace_prob + shares.random_replace_prob <= 1 + 1e-9:
        raise UserError(
            f"masking.mask_replace_prob={shares.mask_replace_prob} and masking.random_replace_prob="
            f"{shares.random_replace_prob} add up to more than 1"
        )


def _encoder_config(
    config: ConfigDict, copied: EncoderConfig | None, checkpoint: PretrainedWeights | None, tokenizer: Tokenizer
) -> EncoderConfig:
    """The model's config: copied or the family's default, then the tokenizer's ids, then the overrides.

    The ids of a copied config stay, but for weights that go with another tokenizer than their own.
    """
    overrides = {name: value for name, value in config.model.overrides.to_dict().items() if value is not None}
    encoder = copied or default_config(config.model.model_type)
    if copied is None or (checkpoint is not None and not checkpoint.has_tokens_of(tokenizer.hf.get_vocab())):
        ids = {"vocab_size": tokenizer.num_ids, "pad_token_id": tokenizer.pad_id}
        if encoder.bos_token_id is not None:  # BERT's config, for one, has neither.
            ids |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        overrides = ids | overrides
    encoder = encoder.replace(**overrides)
    if tokenizer.num_ids > encoder.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has ids up to {tokenizer.num_ids - 1}, the model's vocab_size is "
            f"{encoder.vocab_size}; set --config.model.overrides.vocab_size={tokenizer.num_ids}"
        )
    if tokenizer.pad_id != encoder.pad_token_id:
        raise UserError(
            f"the tokenizer {tokenizer.name} pads with id {tokenizer.pad_id}, the model's pad_token_id is "
            f"{encoder.pad_token_id}; use the model's own tokenizer"
        )
    _check_positions(config, encoder)
    return encoder


def _check_positions_early(config: ConfigDict, encoder: EncoderConfig) -> None:
    """Refuses, before a tokenizer is trained, rows that are too long whichever id pads them."""
    if (given := config.model.overrides.max_position_embeddings) is not None:
        encoder = encoder.replace(max_position_embeddings=given)
    if config.data.max_seq_length > encoder.replace(pad_token_id=0).max_seq_length:
        _check_positions(config, encoder)


def _check_positions(config: ConfigDict, encoder: EncoderConfig) -> None:
    length = config.data.max_seq_length
    if length > encoder.max_seq_length:
        # Some families have positions before that of the first token.
        needed = length + encoder.max_position_embeddings - encoder.max_seq_length
        raise UserError(
            f"data.max_seq_length={length} is past the model's positions, which end at {encoder.max_seq_length}; "
            f"lower it, or set --config.model.overrides.max_position_embeddings={needed}"
        )


def _load_model(config: ConfigDict) -> tuple[EncoderConfig | None, PretrainedWeights | None]:
    """The config to copy and the weights to start from, where they are asked for."""
    model = config.model
    if model.config_name and model.model_name_or_path:
        raise UserError("model.config_name and model.model_name_or_path exclude each other; set one")
    if model.model_name_or_path:
        checkpoint = pretrained.open_checkpoint(model.model_name_or_path, cache_dir=config.data.cache_dir)
        return checkpoint.config, checkpoint
    if model.config_name:
        return pretrained.open_config(model.config_name, cache_dir=config.data.cache_dir), None
    default_config(model.model_type)  # Refuses a type that is not known before any data is read.
    return None, None
