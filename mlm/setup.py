"""From a config to the parts of a run. What a user can get wrong is found here, before anything is compiled, and
nothing is written here."""

import dataclasses
import glob
import json
import os
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from huggingface_hub.errors import HfHubHTTPError
from ml_collections import ConfigDict

from mlm import fill_mask
from mlm import text as text_lib
from mlm.data import packing, sources
from mlm.data.batches import BatchStream, check_ranges
from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError
from mlm.hub import Hub, check_token, is_pushed
from mlm.masking import MaskingSpec
from mlm.models import weights
from mlm.models.config import EncoderConfig, default_config
from mlm.models.encoder import MaskedLM
from mlm.optimizer import create_optimizer, create_schedule
from mlm.steps import Task, init_params
from mlm.text import Text
from mlm.workdir import WorkDir

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
      pretrained: the weights to start from, or None.
    """

    task: Task
    encoder: EncoderConfig
    tokenizer: Tokenizer
    stream: BatchStream
    text: Text
    pretrained: dict[str, np.ndarray] | None

    def initial_params(self) -> Any:
        """Parameters before the first update, on the host or one device."""
        if self.pretrained is not None:
            return weights.from_hf(self.pretrained, self.encoder)
        return jax.jit(init_params, static_argnums=0, static_argnames="length")(
            self.task, length=self.text.eval_rows_RxL.shape[1]
        )


def build(config: ConfigDict, workdir: WorkDir) -> Run:
    """Makes the parts, the cheap checks first.

    Raises:
      UserError: the config, the data, the tokenizer and the model do not fit together, or one of them is not there.
    """
    if config.hub.push_to_hub and jax.process_index() == 0:
        check_token(_hub_name(config, workdir), patience=text_lib.patience(config))
    options = config.optimizer.to_dict()
    schedule = create_schedule(
        options.pop("schedule"),
        learning_rate=options.pop("learning_rate"),
        warmup_steps=options.pop("warmup_steps"),
        num_train_steps=config.num_train_steps,
    )
    del options["max_skipped_updates"]  # The loop counts them.
    spike_factor = options.pop("spike_factor")
    optimizer = create_optimizer(schedule, **options)
    copied, pretrained = _load_model(config)

    text_sources = text_lib.open_sources(config)
    model_type = copied.model_type if copied is not None else config.model.model_type
    tokenizer = text_lib.open_tokenizer(config, workdir, text_sources, model_type=model_type)
    encoder = _encoder_config(config, copied, tokenizer)
    if pretrained is not None:
        weights.from_hf(pretrained, encoder)

    text = text_lib.open_text(config, text_sources, tokenizer)
    fill_mask.encode(tokenizer, config.report.sentences, max_seq_length=encoder.max_seq_length)
    return Run(
        task=Task(
            model=MaskedLM(
                encoder,
                DTYPES[config.model.dtype],
                begin_id=tokenizer.bos_id if config.data.packing == "isolate" else None,
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
        pretrained=pretrained,
    )


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
        patience=text_lib.patience(config),
    )


def push_what_is_left(config: ConfigDict, workdir: WorkDir, *, step: int) -> None:
    """Pushes the model of a finished run, if it is to be and was not; waits for it."""
    if config.hub.push_to_hub and not is_pushed(workdir.path, name=_hub_name(config, workdir), step=step):
        hub = open_hub(config, workdir)
        if hub is not None:
            hub.finish(step=step)


def _hub_name(config: ConfigDict, workdir: WorkDir) -> str:
    return config.hub.hub_model_id or os.path.basename(workdir.path)


def check_numbers(config: ConfigDict) -> None:
    """Raises UserError for a number that cannot be, whatever the data and the model are."""
    positive = {
        "num_train_steps": config.num_train_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
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
        "optimizer.max_skipped_updates": config.optimizer.max_skipped_updates,
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
    if config.model.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.model.dtype!r} is not one of {', '.join(DTYPES)}")
    shares = config.masking
    if not 0 < shares.mlm_probability <= 1:
        raise UserError(f"masking.mlm_probability={shares.mlm_probability} must lie in (0, 1]")
    if not (shares.mask_token_share >= 0 and shares.random_token_share >= 0):
        raise UserError("masking.mask_token_share and masking.random_token_share must not be negative")
    if not shares.mask_token_share + shares.random_token_share <= 1 + 1e-9:
        raise UserError(
            f"masking.mask_token_share={shares.mask_token_share} and masking.random_token_share="
            f"{shares.random_token_share} add up to more than 1"
        )


def _encoder_config(config: ConfigDict, copied: EncoderConfig | None, tokenizer: Tokenizer) -> EncoderConfig:
    """The model's config: copied or the family's default, then the tokenizer's ids, then the overrides."""
    overrides = {name: value for name, value in config.model.overrides.to_dict().items() if value is not None}
    encoder = copied
    if encoder is None:
        encoder = default_config(config.model.model_type)
        ids = {
            "vocab_size": tokenizer.num_ids,
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        }
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
    if config.data.max_seq_length > encoder.max_seq_length:
        raise UserError(
            f"data.max_seq_length={config.data.max_seq_length} is past the model's positions, which end at "
            f"{encoder.max_seq_length}; lower it or raise model.overrides.max_position_embeddings"
        )
    return encoder


def _load_model(config: ConfigDict) -> tuple[EncoderConfig | None, dict[str, np.ndarray] | None]:
    """The config to copy and the weights to start from, where they are asked for."""
    model = config.model
    if model.config_name and model.model_name_or_path:
        raise UserError("model.config_name and model.model_name_or_path exclude each other; set one")
    name = model.model_name_or_path or model.config_name
    if not name:
        default_config(model.model_type)  # Refuses a type that is not known before any data is read.
        return None, None
    path = _fetch(name, cache_dir=config.data.cache_dir, with_weights=bool(model.model_name_or_path))
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            copied = EncoderConfig.from_hf(json.load(file))
    except ValueError:
        raise UserError(f"{path}/config.json is not JSON") from None
    if not model.model_name_or_path:
        return copied, None
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors"))):
        try:
            tensors |= safetensors.numpy.load_file(shard)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{shard} cannot be read ({sources.one_line(error)}); fetch it anew") from None
    if not tensors:
        raise UserError(f"model.model_name_or_path={name!r} has no *.safetensors files to start from")
    return copied, tensors


def _fetch(name: str, *, cache_dir: str | None, with_weights: bool) -> str:
    """A local directory with the model's files: `name` itself, or its copy from the hub."""
    name = os.path.expanduser(name)
    if os.path.isfile(os.path.join(name, "config.json")):
        return name
    if sources.is_local_path(name) and not os.path.exists(name):
        raise UserError(f"there is no model directory {name!r}")
    if os.path.exists(name):
        raise UserError(f"the model directory {name!r} has no config.json")
    try:
        return huggingface_hub.snapshot_download(
            name,
            cache_dir=cache_dir,
            allow_patterns=["config.json", "*.safetensors"] if with_weights else ["config.json"],
        )
    except (HfHubHTTPError, OSError, ValueError):
        raise UserError(
            f"the model {name!r} is neither a local directory nor to be had from the hub; check the name and the "
            "network, or set model.config_name to a directory with a config.json"
        ) from None
