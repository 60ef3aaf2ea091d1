"""One update and one evaluation batch, as pure functions that `parallel` runs on every device.

Needs only jax, flax, optax and NumPy, so a step can be timed where there is no TensorFlow.

Legend: A forward passes of one update, B rows of one pass on one device, L tokens, K predicted tokens,
V vocabulary.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mlm.loss import LossSums, masked_cross_entropy
from mlm.masking import MaskingSpec, mask_tokens
from mlm.models.encoder import MaskedLM

# Random streams: each folds its number into the seed's key first, so that none repeats another.
INIT, TRAIN_MASKS, EVAL_MASKS, DROPOUT = range(4)


# Updates over which the mean of gradient norms runs, and before which no norm counts as a spike.
NORM_WINDOW = 100


@flax.struct.dataclass
class UpdateStats:
    """Of the updates that were not skipped: how many, and the running mean of their gradients' norms."""

    count: jax.Array
    mean_norm: jax.Array


class TrainState(flax.struct.PyTreeNode):
    """All that an update changes. `step` counts updates completed, skipped ones included."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    applied: UpdateStats


@flax.struct.dataclass
class TrainMetrics:
    """Of one update: sums over all devices, the norm before clipping, the learning rate, 1 if it was skipped."""

    sums: LossSums
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array


@flax.struct.dataclass
class EvalSums:
    """Of one evaluation batch, over all devices. `unigram_loss` is the summed loss of the unigram model."""

    sums: LossSums
    unigram_loss: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step closes over; nothing in it changes during a run.

    `spike_factor`: an update whose gradient norm is over so many times the running mean is skipped; 0 for none.
    """

    model: MaskedLM
    masking: MaskingSpec
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    seed: int
    spike_factor: float = 0.0

    def key(self, stream: int) -> jax.Array:
        """The key of a random stream. Threefry: masks must not depend on how rows are dealt to devices."""
        return random_key(self.seed, stream)


def random_key(seed: int, stream: int) -> jax.Array:
    """The key of a random stream of a run."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


def init_params(step_config: StepConfig, *, length: int) -> Any:
    """Draws the parameters of a fresh model from the seed."""
    tokens_BxL = jnp.ones((1, length), jnp.int32)
    return step_config.model.init(step_config.key(INIT), tokens_BxL, positions_BxK=tokens_BxL[:, :1])["params"]


def init_state(step_config: StepConfig, params: Any) -> TrainState:
    """The state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=step_config.optimizer.init(params),
        applied=UpdateStats(count=jnp.zeros((), jnp.int32), mean_norm=jnp.zeros((), jnp.float32)),
    )


def forward(
    step_config: StepConfig, params: Any, tokens_BxL: jax.Array, *, rows_B: jax.Array, mask_key: jax.Array, **model_args
):
    """Masks a batch and predicts it. Returns the logits (float32) and the masked batch."""
    batch = mask_tokens(tokens_BxL, rows_B=rows_B, key=mask_key, spec=step_config.masking)
    logits_BxKxV = step_config.model.apply(
        {"params": params}, batch.inputs_BxL, positions_BxK=batch.masked_positions_BxK, **model_args
    )
    return logits_BxKxV, batch


def train_step(
    state: TrainState, tokens_AxBxL: jax.Array, *, step_config: StepConfig, axis_name: str
) -> tuple[TrainState, TrainMetrics]:
    """Makes one update from this device's share of the global batch.

    Gradients, losses and counts are sums until all passes and devices are in, then divided once by the number
    of predicted tokens: the update does not depend on how rows are dealt to devices or passes.

    An update that `is_good` refuses is skipped: parameters, optimizer and learning rate stay as they were, and only
    the step goes on, so that the next update has masks of its own.

    Args:
      state: the same on every device.
      tokens_AxBxL: int32, this device's rows.
      task: model, masking and optimizer.
      axis_name: the axis over which devices add up.

    Returns:
      The state after the update and its metrics, the same on every device.
    """
    microbatches, rows, _ = tokens_AxBxL.shape
    device = jax.lax.axis_index(axis_name)
    mask_key = jax.random.fold_in(step_config.key(TRAIN_MASKS), state.step)
    dropout_key = jax.random.fold_in(jax.random.fold_in(step_config.key(DROPOUT), state.step), device)

    def loss_fn(params: Any, tokens_BxL: jax.Array, number: jax.Array) -> tuple[jax.Array, LossSums]:
        logits_BxKxV, batch = forward(
            step_config,
            params,
            tokens_BxL,
            rows_B=(device * microbatches + number) * rows + jnp.arange(rows),
            mask_key=mask_key,
            deterministic=False,
            rngs={"dropout": jax.random.fold_in(dropout_key, number)},
        )
        sums = masked_cross_entropy(logits_BxKxV, batch.labels_BxK, batch.label_weights_BxK)
        return sums.loss, sums

    def accumulate(total: Any, numbered: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        number, tokens_BxL = numbered
        (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, tokens_BxL, number)
        return jax.tree.map(jnp.add, total, (grads, sums)), None

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in range(3)))
    total = (jax.tree.map(jnp.zeros_like, state.params), zero)
    total, _ = jax.lax.scan(accumulate, total, (jnp.arange(microbatches), tokens_AxBxL), unroll=microbatches == 1)
    grads, sums = jax.lax.psum(total, axis_name)
    grads = jax.tree.map(lambda grad: grad / jnp.maximum(sums.count, 1.0), grads)

    norm = optax.tree.norm(grads)
    good = should_apply(sums, norm, state.applied, spike_factor=step_config.spike_factor)

    updates, opt_state = step_config.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # The mean over all updates so far, until there are as many as the window has; then an exponential one.
    weight = 1.0 / jnp.minimum(state.applied.count + 1, NORM_WINDOW)
    applied = UpdateStats(
        count=state.applied.count + 1,
        mean_norm=state.applied.mean_norm + weight * (norm - state.applied.mean_norm),
    )
    # A choice on the device: the host need not know before it sends the next batch.
    params, opt_state, applied = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, opt_state, applied),
        (state.params, state.opt_state, state.applied),
    )
    metrics = TrainMetrics(
        sums=sums,
        grad_norm=norm,
        # Of the optimizer's own count, which a skipped update does not move.
        learning_rate=jnp.asarray(step_config.schedule(state.applied.count), jnp.float32),
        skipped=1.0 - good,
    )
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, applied=applied), metrics


def should_apply(sums: LossSums, norm: jax.Array, applied: UpdateStats, *, spike_factor: float) -> jax.Array:
    """Whether to make an update: it has tokens to predict, is finite, and its gradient norm is no spike."""
    good = (sums.count > 0) & jnp.isfinite(sums.loss) & jnp.isfinite(norm)
    if spike_factor:
        good &= (applied.count < NORM_WINDOW) | (norm <= spike_factor * applied.mean_norm)
    return good


def eval_step(
    params: Any,
    tokens_BxL: jax.Array,
    rows_B: jax.Array,
    unigram_V: jax.Array,
    *,
    step_config: StepConfig,
    axis_name: str,
) -> EvalSums:
    """Sums the losses of one batch of evaluation rows over all devices.

    Args:
      params: the same on every device.
      tokens_BxL: int32; rows of padding count for nothing.
      rows_B: int32, each row's number in the evaluation set: its masks never change.
      unigram_V: float32, log-probabilities of the unigram model.
      task: model and masking.
      axis_name: the axis over which devices add up.

    Returns:
      The sums, the same on every device.
    """
    logits_BxKxV, batch = forward(
        step_config, params, tokens_BxL, rows_B=rows_B, mask_key=step_config.key(EVAL_MASKS), deterministic=True
    )
    sums = masked_cross_entropy(logits_BxKxV, batch.labels_BxK, batch.label_weights_BxK)
    unigram_loss = -jnp.sum(unigram_V[batch.labels_BxK] * batch.label_weights_BxK)
    return jax.lax.psum(EvalSums(sums=sums, unigram_loss=unigram_loss), axis_name)
