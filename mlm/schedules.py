"""Learning-rate schedules."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from mlm.errors import UserError
from mlm.settings import Boundaries, OptimizerSettings, resolve_boundaries


def create_schedule(
    settings: OptimizerSettings, *, num_train_steps: int, boundaries: Boundaries | None = None, start: int = 0
) -> optax.Schedule:
    """Linear warm-up from 0 to `learning_rate`, then the schedule named by `settings.schedule`.

    With step s, warm-up w, end factor e and t = (s - w) / (num_train_steps - w), the rate is learning_rate times

        linear:        1 - (1 - e) t
        cosine:        e + (1 - e) (1 + cos(pi t)) / 2
        constant:      1
        inverse_sqrt:  sqrt(max(w, 1) / max(s, w, 1)) (Vaswani et al., 2017)
        wsd:           1 (Hu et al., 2024, arXiv:2404.06395)

    The last two are multiplied by the decay, which begins at step b and has t = (s - b) / (num_train_steps - b):

        linear:        1 - (1 - e) t
        1-sqrt:        1 - (1 - e) sqrt(t) (Haegele et al., 2024, arXiv:2405.18392)
        cosine:        e + (1 - e) (1 + cos(pi t)) / 2

    Args:
      settings: the schedule and its keys.
      num_train_steps: steps of the schedule.
      boundaries: ends of the warm-up and of the constant phase; by default those of `settings`, which then must not
        count tokens.
      start: steps before the first one of the schedule, skipped ones included; each of these delays it by a step.

    Returns:
      A function of the number of steps applied so far. The first step of a warm-up has rate 0, as in the reference
      script.
    """
    boundaries = boundaries or resolve_boundaries(settings, num_train_steps=num_train_steps, tokens_per_step=0)
    warmup_steps, decay_start = boundaries.warmup_steps, boundaries.decay_start

    def schedule(count: jnp.ndarray) -> jnp.ndarray:
        step = jnp.asarray(count, jnp.float32)
        if start:
            step = jnp.maximum(step - start, 0.0)
        rate = jnp.float32(1.0)
        if settings.schedule in ("linear", "cosine"):
            rate = _decay(settings.schedule, step, warmup_steps, num_train_steps, settings.end_factor)
        if settings.schedule == "inverse_sqrt":
            first = max(warmup_steps, 1)
            rate = jnp.sqrt(first / jnp.maximum(step, first))
        if settings.schedule in ("inverse_sqrt", "wsd") and decay_start < num_train_steps:
            rate *= _decay(settings.decay_shape, step, decay_start, num_train_steps, settings.end_factor)
        if warmup_steps:
            rate = jnp.where(step < warmup_steps, step / warmup_steps, rate)
        return settings.learning_rate * rate

    return schedule


def _decay(shape: str | None, step: jnp.ndarray, start: int, end: int, end_factor: Any) -> jnp.ndarray:
    """Returns 1 up to `start`, then falls to `end_factor` at `end`."""
    done = jnp.clip((step - start) / max(1, end - start), 0.0, 1.0)
    left = {"linear": 1 - done, "1-sqrt": 1 - jnp.sqrt(done), "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}[
        shape or "linear"
    ]
    return end_factor + (1 - end_factor) * left


def keep_passed_boundaries(
    new: Boundaries, old: Boundaries, settings: OptimizerSettings, *, step: int, ends_as_before: bool
) -> Boundaries:
    """Returns the boundaries of a run that is resumed: only those ahead of `step` move.

    An exception is a warm-up of 0 steps: a longer one may be set at any time.

    Args:
      new: boundaries by the current settings.
      old: boundaries at the last start.
      settings: the current settings.
      step: applied steps so far.
      ends_as_before: whether the schedule still ends where it did at the last start.

    Raises:
      UserError: a boundary that is not ahead of `step` would move.
    """
    if 0 < old.warmup_steps <= step and new.warmup_steps != old.warmup_steps:
        if isinstance(settings.warmup_steps, int):
            raise UserError(
                f"optimizer.warmup_steps={settings.warmup_steps}: the warm-up of {old.warmup_steps} steps is over at "
                f"step {step}; set it to {old.warmup_steps}"
            )
        new = dataclasses.replace(new, warmup_steps=old.warmup_steps)
    if step > old.decay_start and new.decay_start != old.decay_start:
        # A decay in tokens has other steps on another number of devices.
        if isinstance(settings.decay_steps, str) and ends_as_before:
            return dataclasses.replace(new, decay_start=old.decay_start)
        raise UserError(
            f"optimizer.decay_steps={settings.decay_steps!r}: the decay would begin at step {new.decay_start}, but it "
            f"has begun at step {old.decay_start}, and {step} steps are done; branch a new run from a checkpoint up to "
            f"step {old.decay_start} with checkpoint.init_from"
        )
    return new
