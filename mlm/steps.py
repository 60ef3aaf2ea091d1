"""The training step and the evaluation step.

Both are pure functions of one device's part of a batch; `parallel.data_parallel` runs them on every device. They need
jax, flax, optax and NumPy only, so a step can be timed on a machine without TensorFlow.

Shape legend: A microbatches per step, B sequences per microbatch and device, L tokens per sequence, K predicted tokens
per sequence, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mlm.loss import LossSums, masked_cross_entropy, training_loss
from mlm.masking import MaskCounts, MaskedBatch, MaskingSpec, mask_tokens
from mlm.models.encoder import MaskedLM

# Random streams: each number is folded into the seed's key, which makes the streams independent.
INIT, TRAIN_MASKS, EVAL_MASKS, DROPOUT = range(4)

# Steps in the running mean of gradient norms. No step is a spike before that many were applied.
NORM_WINDOW = 100


@flax.struct.dataclass
class UpdateStats:
    """Statistics of the steps that were applied, not skipped.

    Attributes:
      num_applied: int32, the number of these steps; the learning-rate schedule follows it.
      mean_grad_norm: float32, the running mean of their gradient norms before clipping.
    """

    num_applied: jax.Array
    mean_grad_norm: jax.Array

    def add(self, grad_norm: jax.Array) -> "UpdateStats":
        """Adds a step: plain mean of the first NORM_WINDOW norms, then exponential mean with weight 1 / NORM_WINDOW."""
        weight = 1.0 / jnp.minimum(self.num_applied + 1, NORM_WINDOW)
        return UpdateStats(
            num_applied=self.num_applied + 1,
            mean_grad_norm=self.mean_grad_norm + weight * (grad_norm - self.mean_grad_norm),
        )


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes. `step` counts all steps so far, skipped ones included.

    `ema_params` is the exponential moving average of the parameters; None if there is none.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    update_stats: UpdateStats
    ema_params: Any = None

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and export."""
        return self.params if self.ema_params is None else self.ema_params


@flax.struct.dataclass
class TrainMetrics:
    """Metrics of one step, the same on every device.

    Attributes:
      sums: loss, correct predictions and predicted tokens, summed over all devices.
      mask_counts: numbers of tokens, summed over all devices.
      grad_norm: global norm of the gradient of the mean loss, before clipping.
      learning_rate: rate of this step.
      skipped: 1.0 if the step was skipped, else 0.0.
    """

    sums: LossSums
    mask_counts: MaskCounts
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array


@flax.struct.dataclass
class EvalSums:
    """Sums over one evaluation batch on all devices. `unigram_loss` is the loss of the unigram model."""

    sums: LossSums
    unigram_loss: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The constants of a step.

    Attributes:
      model: the encoder and its head.
      masking: what is masked in training.
      eval_masking: what is masked in evaluation; None for the same.
      optimizer: gradients to updates.
      schedule: learning rate by the number of applied steps, for the metrics; `optimizer` has it, too.
      seed: the run's seed.
      mask_rate: fraction of predicted tokens in training as a function of the steps done, at most that of `masking`;
        None for that of `masking` at every step.
      spike_factor: see `should_apply`.
      ema_decay: see `moving_average`; 0 for no average.
      z_loss, label_smoothing: see `training_loss`.
    """

    model: MaskedLM
    masking: MaskingSpec
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    seed: int
    eval_masking: MaskingSpec | None = None
    mask_rate: optax.Schedule | None = None
    spike_factor: float = 0.0
    ema_decay: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def key(self, stream: int) -> jax.Array:
        """The random key of a stream, such as `DROPOUT`."""
        return random_key(self.seed, stream)


def random_key(seed: int, stream: int) -> jax.Array:
    """The random key of a stream of a run.

    Threefry: keys of other generators give other masks under `vmap`, so masks would depend on the number of devices.
    """
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


def init_params(step_config: StepConfig, *, length: int) -> Any:
    """Draws the parameters of a new model from the seed."""
    tokens_BxL = jnp.ones((1, length), jnp.int32)
    return step_config.model.init(step_config.key(INIT), tokens_BxL, positions_BxK=tokens_BxL[:, :1])["params"]


def init_state(step_config: StepConfig, params: Any) -> TrainState:
    """The state before step 1."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=step_config.optimizer.init(params),
        update_stats=UpdateStats(num_applied=jnp.zeros((), jnp.int32), mean_grad_norm=jnp.zeros((), jnp.float32)),
        # A copy: the step donates both.
        ema_params=jax.tree.map(jnp.copy, params) if step_config.ema_decay else None,
    )


def forward(
    step_config: StepConfig, params: Any, tokens_BxL: jax.Array, *, rows_B: jax.Array, mask_key: jax.Array, **model_args
) -> tuple[jax.Array, MaskedBatch]:
    """Masks a batch as in evaluation and runs the model on it. Returns float32 logits_BxKxV and the masked batch."""
    spec = step_config.eval_masking or step_config.masking
    batch = mask_tokens(tokens_BxL, rows_B=rows_B, key=mask_key, spec=spec)
    return predict(step_config, params, batch, **model_args), batch


def predict(step_config: StepConfig, params: Any, batch: MaskedBatch, **model_args) -> jax.Array:
    """Runs the model on a masked batch. Returns logits_BxKxV."""
    logits_BxKxV: Any = step_config.model.apply(
        {"params": params}, batch.inputs_BxL, positions_BxK=batch.masked_positions_BxK, **model_args
    )
    return logits_BxKxV


def train_step(
    state: TrainState, tokens_AxBxL: jax.Array, *, step_config: StepConfig, axis_name: str
) -> tuple[TrainState, TrainMetrics]:
    """Makes one optimizer step.

        gradient = sum over devices and microbatches of d(loss sum) / d(params), divided by the predicted tokens

    It is divided once, after all sums, so the gradient does not depend on how sequences are split over devices and
    microbatches; neither do masks, but dropout does. A step that `should_apply` rejects is skipped: it changes
    `state.step` only, so the next step draws other masks.

    Args:
      state: training state, the same on every device.
      tokens_AxBxL: int32, this device's sequences.
      step_config: model, masking and optimizer.
      axis_name: mapped axis of the devices.

    Returns:
      The next state and the metrics, the same on every device.
    """
    grads, sums, counts = jax.lax.psum(sum_gradients(state, tokens_AxBxL, step_config, axis_name), axis_name)
    grads = jax.tree.map(lambda grad: grad / jnp.maximum(sums.count, 1.0), grads)
    grad_norm = optax.tree.norm(grads)
    apply_update = should_apply(sums, grad_norm, state.update_stats, spike_factor=step_config.spike_factor)

    updates, opt_state = step_config.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = None
    if step_config.ema_decay:
        ema_params = moving_average(state.ema_params, params, state.update_stats.num_applied, step_config.ema_decay)
    updated = TrainState(state.step, params, opt_state, state.update_stats.add(grad_norm), ema_params)
    # Selected on the device, so the host can dispatch the next step without waiting for this one.
    selected = jax.tree.map(lambda new, old: jnp.where(apply_update, new, old), updated, state)

    learning_rate = jnp.asarray(step_config.schedule(state.update_stats.num_applied), jnp.float32)
    metrics = TrainMetrics(
        sums=sums, mask_counts=counts, grad_norm=grad_norm, learning_rate=learning_rate, skipped=1.0 - apply_update
    )
    return selected.replace(step=state.step + 1), metrics


def sum_gradients(
    state: TrainState, tokens_AxBxL: jax.Array, step_config: StepConfig, axis_name: str
) -> tuple[Any, LossSums, MaskCounts]:
    """The gradient of this device's summed loss, and the sums themselves, one microbatch after the other."""
    num_microbatches, num_rows, _ = tokens_AxBxL.shape
    device_index = jax.lax.axis_index(axis_name)
    mask_key = jax.random.fold_in(step_config.key(TRAIN_MASKS), state.step)
    dropout_key = jax.random.fold_in(jax.random.fold_in(step_config.key(DROPOUT), state.step), device_index)

    def loss_fn(params: Any, tokens_BxL: jax.Array, microbatch_index: jax.Array):
        first_row = (device_index * num_microbatches + microbatch_index) * num_rows
        batch = mask_tokens(
            tokens_BxL,
            rows_B=first_row + jnp.arange(num_rows),
            key=mask_key,
            spec=step_config.masking,
            mlm_probability=step_config.mask_rate(state.step) if step_config.mask_rate else None,
        )
        dropout = jax.random.fold_in(dropout_key, microbatch_index)
        loss, sums = training_loss(
            predict(step_config, params, batch, deterministic=False, rngs={"dropout": dropout}),
            batch.labels_BxK,
            batch.label_weights_BxK,
            z_loss=step_config.z_loss,
            label_smoothing=step_config.label_smoothing,
        )
        return loss, (sums, jax.tree.map(jnp.sum, batch.counts_B))

    def accumulate(total: Any, microbatch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        microbatch_index, tokens_BxL = microbatch
        (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, tokens_BxL, microbatch_index)
        return jax.tree.map(jnp.add, total, (grads, *sums)), None

    zero = jnp.zeros((), jnp.float32)
    zeros = (jax.tree.map(jnp.zeros_like, state.params), LossSums(*[zero] * 3), MaskCounts(*[zero] * 4))
    microbatches = (jnp.arange(num_microbatches), tokens_AxBxL)
    # A loop of one iteration would only keep XLA from fusing across it.
    total, _ = jax.lax.scan(accumulate, zeros, microbatches, unroll=num_microbatches == 1)
    return total


def moving_average(average: Any, params: Any, num_applied: jax.Array, decay: float) -> Any:
    """Returns d * average + (1 - d) * params with d = min(decay, (1 + n) / (10 + n)) after n steps.

    The smaller d of the first steps, as in TensorFlow's `ExponentialMovingAverage`, removes the initial parameters from
    the average early.
    """
    weight = 1.0 - jnp.minimum(decay, (1.0 + num_applied) / (10.0 + num_applied))
    return jax.tree.map(lambda mean, param: mean + weight * (param - mean), average, params)


def should_apply(sums: LossSums, grad_norm: jax.Array, stats: UpdateStats, *, spike_factor: float) -> jax.Array:
    """True if the step predicts a token, is finite, and its gradient norm is not a spike.

    A spike is a norm over `spike_factor` times the running mean; 0 disables the check.
    """
    apply_update = (sums.count > 0) & jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
    if spike_factor:
        apply_update &= (stats.num_applied < NORM_WINDOW) | (grad_norm <= spike_factor * stats.mean_grad_norm)
    return apply_update


def eval_step(
    params: Any,
    tokens_BxL: jax.Array,
    rows_B: jax.Array,
    unigram_V: jax.Array,
    *,
    step_config: StepConfig,
    axis_name: str,
) -> EvalSums:
    """Sums the losses of one evaluation batch over all devices.

    Args:
      params: parameters, the same on every device.
      tokens_BxL: int32, this device's sequences; sequences of padding add nothing to the sums.
      rows_B: int32, index of each sequence in the evaluation set: its masks never change.
      unigram_V: float32, log-probabilities of the unigram model.
      step_config: model and masking.
      axis_name: mapped axis of the devices.

    Returns:
      The sums, the same on every device.
    """
    logits_BxKxV, batch = forward(
        step_config, params, tokens_BxL, rows_B=rows_B, mask_key=step_config.key(EVAL_MASKS), deterministic=True
    )
    sums = masked_cross_entropy(logits_BxKxV, batch.labels_BxK, batch.label_weights_BxK)
    unigram_loss = -jnp.sum(unigram_V[batch.labels_BxK] * batch.label_weights_BxK)
    return jax.lax.psum(EvalSums(sums=sums, unigram_loss=unigram_loss), axis_name)
