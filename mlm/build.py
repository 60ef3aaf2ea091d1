"""Builds the components of a run from its settings: model, masking, optimizer, tokenizer and text.

User errors in any of them are reported here, before anything is compiled. Nothing is written here.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlm import parallel
from mlm.data import pipeline
from mlm.data.mixture import BatchShape, BatchStream
from mlm.data.pipeline import TextPipeline
from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError
from mlm.export import fill_mask
from mlm.export.hub import Hub, check_token, is_pushed
from mlm.masking import MaskingSpec
from mlm.models.block import Execution
from mlm.models.config import EncoderConfig, default_config
from mlm.models.encoder import MaskedLM
from mlm.models.hf import pretrained
from mlm.models.hf.pretrained import AdaptedWeights, PretrainedWeights
from mlm.optimizer import create_optimizer
from mlm.run.workdir import WorkDir
from mlm.schedules import create_schedule
from mlm.settings import ISOLATING, RunSettings
from mlm.stages import Stage, resolve, source_weights
from mlm.steps import StepConfig, TrainState, init_params, init_state

# Tokens per sequence from which "auto" uses the flash kernel on TPUs.
SPLASH_LENGTH = 1_024
# Fields of the model's config that a stage may change.
_ROTARY_BASES = ("global_rope_theta", "local_rope_theta")


@dataclasses.dataclass(frozen=True)
class Components:
    """The parts of a run that settings determine.

    Attributes:
      step_config: model, masking and optimizer, for `train_step` and `eval_step`.
      encoder: the model's config.
      tokenizer: text to ids.
      stream: the training batches of this process, at their beginning.
      text: the source of training batches and evaluation sequences.
      pretrained: the weights to start from; None for random ones.
      stages: the stages of the run.

    Step config and encoder are for the first stage, or for the stage given to `for_stage`.
    """

    step_config: StepConfig
    encoder: EncoderConfig
    tokenizer: Tokenizer
    stream: BatchStream
    text: TextPipeline
    pretrained: AdaptedWeights | None
    stages: tuple[Stage, ...]

    def with_stages(self, stages: tuple[Stage, ...]) -> "Components":
        """Returns the components with other boundaries, batch sizes or schedules of the stages, for the first one."""
        stream = _open_batches(stages, self.text)
        return dataclasses.replace(self, stream=stream, stages=stages).for_stage(stages[0])

    def for_stage(self, stage: Stage) -> "Components":
        """Returns the same components with the model, masking and optimizer of a stage."""
        given = stage.settings.model.overrides.given()
        encoder = self.encoder.replace(**{name: given[name] for name in _ROTARY_BASES if name in given})
        step_config = _step_config(stage, encoder, self.tokenizer)
        return dataclasses.replace(self, step_config=step_config, encoder=encoder)

    def initial_params(self) -> Any:
        """Returns the parameters before the first step, on the host or one device."""
        init = jax.jit(init_params, static_argnums=0, static_argnames="length")
        random_params = functools.partial(init, self.step_config, length=self.text.eval_rows_RxL.shape[1])
        return random_params() if self.pretrained is None else self.pretrained.params(random_params)

    def initial_state(self) -> TrainState:
        """Returns the state before the first step, on the host or one device."""
        # One program instead of one for each shape.
        return jax.jit(init_state, static_argnums=0)(self.step_config, self.initial_params())


def build(
    settings: RunSettings,
    workdir: WorkDir,
    *,
    stages: tuple[Stage, ...] | None = None,
    parent_tokenizer: str | None = None,
) -> Components:
    """Builds the components, cheap checks first.

    Args:
      settings: the run's settings.
      workdir: its work directory.
      stages: the stages of the run; None to resolve those of a new run.
      parent_tokenizer: directory of the parent's tokenizer, if the run starts from another run's checkpoint.

    Raises:
      UserError: config, data, tokenizer and model do not fit together, or one of them is missing.
    """
    if jax.process_index() == 0:
        check_hub(settings, workdir)
    stages = stages or resolve(settings, num_devices=jax.device_count())
    first, later = stages[0].settings, [stage.settings for stage in stages[1:]]
    copied, checkpoint = load_pretrained(settings)

    text_sources = pipeline.open_sources(first.data, *(stage.data for stage in later))
    model_type = copied.model_type if copied is not None else settings.model.model_type
    tokenizer = pipeline.open_tokenizer(
        settings,
        text_sources,
        saved_tokenizer=workdir.tokenizer if workdir.has_tokenizer() else parent_tokenizer,
        model_type=model_type,
    )
    encoder = _encoder_config(first, copied, checkpoint, tokenizer)
    for stage in later:
        _check_positions(stage, encoder)
    adapted = None
    if checkpoint is not None:
        adapted = pretrained.adapt_to_config(checkpoint, encoder, vocabulary=tokenizer.hf.get_vocab())

    text = pipeline.open_text(
        first.data, text_sources, tokenizer, seed=settings.seed, later_stages=[stage.data for stage in later]
    )
    # Only a check: a sentence without a mask, or one that is too long, is an error before training.
    fill_mask.encode(tokenizer, settings.report.sentences, max_seq_length=encoder.max_seq_length)
    return Components(
        step_config=_step_config(stages[0], encoder, tokenizer),
        encoder=encoder,
        tokenizer=tokenizer,
        stream=_open_batches(stages, text),
        text=text,
        pretrained=adapted,
        stages=stages,
    )


def _step_config(stage: Stage, encoder: EncoderConfig, tokenizer: Tokenizer) -> StepConfig:
    settings = stage.settings
    schedule = create_schedule(
        settings.optimizer,
        num_train_steps=stage.schedule_end - stage.schedule_start,
        boundaries=stage.boundaries,
        start=stage.schedule_start,
    )
    return StepConfig(
        model=MaskedLM(
            encoder,
            jnp.dtype(settings.model.dtype),
            begin_id=tokenizer.bos_id if settings.data.packing in ISOLATING else None,
            execution=resolve_execution(settings, backend=jax.default_backend()),
        ),
        masking=create_masking_spec(settings, tokenizer),
        eval_masking=create_eval_masking_spec(settings, tokenizer),
        mask_rate=create_mask_rate_schedule(stage),
        optimizer=create_optimizer(settings.optimizer, schedule, axis_name=parallel.AXIS),
        schedule=schedule,
        seed=settings.seed,
        spike_factor=settings.optimizer.spike_factor,
        ema_decay=settings.optimizer.ema_decay,
        z_loss=settings.loss.z_loss,
        label_smoothing=settings.loss.label_smoothing,
    )


def _open_batches(stages: Sequence[Stage], text: TextPipeline) -> BatchStream:
    """Opens the training batches of this process; for per_device_train_batch_size=0, with one row per device."""
    local_devices = jax.local_device_count()
    return text.batches(
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        batch_rows=stages[0].rows_per_device * local_devices,
        shapes=[batch_shape(stage, batch_rows=stage.rows_per_device * local_devices) for stage in stages],
    )


def batch_shape(stage: Stage, *, batch_rows: int) -> BatchShape:
    """Returns the shape of a stage's batches in one process."""
    data = stage.settings.data
    return BatchShape(stage.start, batch_rows, data.max_seq_length, source_weights(data))


def open_encoder(settings: RunSettings, tokenizer: Tokenizer) -> EncoderConfig:
    """Returns the model's config, as `build` does."""
    copied, checkpoint = load_pretrained(settings)
    return _encoder_config(settings, copied, checkpoint, tokenizer)


def resolve_execution(settings: RunSettings, *, backend: str) -> Execution:
    """Returns how the model is computed on a backend such as "cpu" or "gpu": resolves "auto"."""
    attention, remat = settings.model.attention, settings.model.remat
    if attention == "auto":
        attention = "plain"
        if backend == "gpu" and settings.model.dtype == "bfloat16":
            attention = "cudnn"
        elif backend == "tpu" and settings.data.max_seq_length >= SPLASH_LENGTH:
            attention = "splash"
    if remat == "auto":
        remat = "none" if backend == "cpu" else "dots"
    return Execution(attention=attention, remat=remat)


def create_masking_spec(settings: RunSettings, tokenizer: Tokenizer) -> MaskingSpec:
    """Returns what is masked in training, and which ids replace masked tokens."""
    masking = settings.masking
    return MaskingSpec(
        mlm_probability=max(masking.mlm_probabilities),
        mask_replace_prob=masking.mask_replace_prob,
        random_replace_prob=masking.random_replace_prob,
        mask_id=tokenizer.mask_id,
        # Unused ids must not be drawn as random tokens.
        special_ids=tuple(sorted({*tokenizer.special_ids, *tokenizer.unused_ids})),
        num_ids=tokenizer.num_ids,
        strategy=masking.strategy,
        has_word_starts=tokenizer.marks_words,
    )


def create_eval_masking_spec(settings: RunSettings, tokenizer: Tokenizer) -> MaskingSpec:
    """Returns what is masked in evaluation."""
    masking: Any = settings.masking  # Its values for evaluation are not None.
    return dataclasses.replace(
        create_masking_spec(settings, tokenizer),
        strategy=masking.eval_strategy,
        mlm_probability=masking.eval_mlm_probability,
        mask_replace_prob=masking.eval_mask_replace_prob,
        random_replace_prob=masking.eval_random_replace_prob,
    )


def create_mask_rate_schedule(stage: Stage) -> optax.Schedule | None:
    """Returns the fraction of predicted tokens as a function of the steps done; None if it is constant."""
    first, last = stage.settings.masking.mlm_probabilities
    steps = max(1, stage.mask_end - stage.mask_start - 1)
    return None if first == last else optax.linear_schedule(first, last, steps, transition_begin=stage.mask_start)


def open_hub(settings: RunSettings, workdir: WorkDir) -> Hub | None:
    """Returns the repository to push to, created if needed; None without one, and on all processes but the first."""
    if not settings.hub.push_to_hub or jax.process_index() > 0:
        return None
    return Hub(
        _hub_name(settings, workdir),
        private=settings.hub.private,
        workdir=workdir.path,
        retry_policy=pipeline.retry_policy(settings.data),
        download_command=workdir.storage.download_command("model"),
    )


def push_finished_model(settings: RunSettings, workdir: WorkDir, *, step: int) -> None:
    """Pushes the model of a finished run and waits, if the run pushes to the hub and this has not been done."""
    if settings.hub.push_to_hub and not is_pushed(workdir.path, name=_hub_name(settings, workdir), step=step):
        hub = open_hub(settings, workdir)
        if hub is not None:
            workdir.fetch_weights()
            hub.finish(step=step)
            with contextlib.suppress(OSError):  # Then it is pushed once more, which is harmless.
                workdir.push()


def check_hub(settings: RunSettings, workdir: WorkDir) -> None:
    """Raises UserError if the run pushes to the hub, but the token does not allow it or cannot be checked."""
    if settings.hub.push_to_hub:
        check_token(_hub_name(settings, workdir), retry_policy=pipeline.retry_policy(settings.data))


def _hub_name(settings: RunSettings, workdir: WorkDir) -> str:
    return settings.hub.hub_model_id or os.path.basename(workdir.path)


def check_device(settings: RunSettings) -> None:
    """Raises UserError if the devices here cannot run what `model.attention` asks for."""
    attention, backend = settings.model.attention, jax.default_backend()
    for kernel, platform, device in (("cudnn", "gpu", "an NVIDIA GPU"), ("splash", "tpu", "a TPU")):
        if attention == kernel and backend != platform:
            raise UserError(f"model.attention={kernel!r}: needs {device}, and jax runs on {backend}; set it to 'auto'")


def _encoder_config(
    settings: RunSettings, copied: EncoderConfig | None, checkpoint: PretrainedWeights | None, tokenizer: Tokenizer
) -> EncoderConfig:
    """The model's config: copied or the family's default, then the tokenizer's ids, then the overrides.

    The ids of a copied config are kept, unless its weights are used with a different tokenizer.
    """
    overrides = settings.model.overrides.given()
    encoder = copied or default_config(settings.model.model_type)
    if copied is None or (checkpoint is not None and not checkpoint.has_tokens_of(tokenizer.hf.get_vocab())):
        ids = {"vocab_size": tokenizer.num_ids, "pad_token_id": tokenizer.pad_id}
        if encoder.bos_token_id is not None:  # BERT's config, for one, has neither.
            ids |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        overrides = ids | overrides
    encoder = encoder.replace(**overrides)
    if tokenizer.num_ids > encoder.vocab_size:
        raise UserError(
            f"model.overrides.vocab_size={encoder.vocab_size}: the tokenizer {tokenizer.name} has ids up to "
            f"{tokenizer.num_ids - 1}; set it to {tokenizer.num_ids}"
        )
    if tokenizer.pad_id != encoder.pad_token_id:
        raise UserError(
            f"tokenizer.tokenizer_name={tokenizer.name!r}: pads with id {tokenizer.pad_id}, but the model's "
            f"pad_token_id is {encoder.pad_token_id}; use the model's own tokenizer"
        )
    _check_positions(settings, encoder)
    return encoder


def _check_positions(settings: RunSettings, encoder: EncoderConfig) -> None:
    length = settings.data.max_seq_length
    if length > encoder.max_seq_length:
        # Some families have positions before that of the first token.
        needed = length + encoder.max_position_embeddings - encoder.max_seq_length
        raise UserError(
            f"data.max_seq_length={length}: is longer than the model's {encoder.max_seq_length} positions; lower it, "
            f"or set model.overrides.max_position_embeddings={needed}"
        )


def load_pretrained(settings: RunSettings) -> tuple[EncoderConfig | None, PretrainedWeights | None]:
    """Loads the config to copy and the weights to start from; None for those that the settings do not name."""
    model = settings.model
    if model.model_name_or_path:
        checkpoint = pretrained.load_weights(model.model_name_or_path, cache_dir=settings.data.cache_dir)
        return checkpoint.config, checkpoint
    if model.config_name:
        return pretrained.load_config(model.config_name, cache_dir=settings.data.cache_dir), None
    return None, None
