"""The learning-rate schedule and AdamW."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlm.errors import UserError

SCHEDULES = ("linear", "cosine", "constant")


def create_schedule(schedule: str, *, learning_rate: float, warmup_steps: int, num_train_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then `schedule` down to 0 (or constant).

    Returns:
      A function of the number of updates done *before* this one, so the first update of a warm-up has rate 0,
      as in the reference script.

    Raises:
      UserError: the schedule is not known, or a number cannot be.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"optimizer.schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if not 0 < learning_rate < math.inf:
        raise UserError(f"optimizer.learning_rate={learning_rate} must be positive and finite")
    if not 0 <= warmup_steps <= num_train_steps:
        raise UserError(
            f"optimizer.warmup_steps={warmup_steps} must lie between 0 and num_train_steps={num_train_steps}"
        )
    decay_steps = max(1, num_train_steps - warmup_steps)
    if schedule == "linear":
        decay = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    elif schedule == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, decay_steps)
    else:
        decay = optax.constant_schedule(learning_rate)
    if warmup_steps == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), decay], [warmup_steps])


def decays(params: Any) -> Any:
    """A tree of booleans: True where weight decay applies, to matrices and embeddings.

    Told by the last name of the path and by rank: a bias with a leading axis of layers is still a bias.
    """

    def decays_leaf(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        return path[-1].key not in ("bias", "scale") and jnp.ndim(leaf) >= 2

    return jax.tree_util.tree_map_with_path(decays_leaf, params)


def create_optimizer(
    schedule: optax.Schedule,
    *,
    adam_beta1: float,
    adam_beta2: float,
    adam_epsilon: float,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) after clipping by global norm, when `max_grad_norm` is not 0.

    Raises:
      UserError: a number that cannot be.
    """
    for name, beta in (("adam_beta1", adam_beta1), ("adam_beta2", adam_beta2)):
        if not 0 <= beta < 1:
            raise UserError(f"optimizer.{name}={beta} must lie in [0, 1)")
    for name, number in (("weight_decay", weight_decay), ("max_grad_norm", max_grad_norm)):
        if not 0 <= number < math.inf:
            raise UserError(f"optimizer.{name}={number} must be finite and not negative")
    if not 0 < adam_epsilon < math.inf:
        raise UserError(f"optimizer.adam_epsilon={adam_epsilon} must be positive and finite")
    adamw = optax.adamw(
        schedule, b1=adam_beta1, b2=adam_beta2, eps=adam_epsilon, weight_decay=weight_decay, mask=decays
    )
    # A run may go on with another max_grad_norm: the state must have the same structure with and without.
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
    return optax.chain(clip, adamw)
