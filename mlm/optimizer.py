"""AdamW with gradient clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlm.settings import OptimizerSettings


def create_optimizer(settings: OptimizerSettings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping by global norm (none if `max_grad_norm` is 0), then AdamW (Loshchilov and Hutter, 2019)."""
    # max_grad_norm may change during a run, so the state must have the same structure with and without clipping.
    clip = optax.clip_by_global_norm(settings.max_grad_norm) if settings.max_grad_norm else optax.identity()
    adamw = optax.adamw(
        schedule,
        b1=settings.adam_beta1,
        b2=settings.adam_beta2,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip, adamw)


def decay_mask(params: Any) -> Any:
    """Returns a tree of booleans: True for parameters with weight decay, which are the matrices and embeddings.

    Names count as well as ranks: a bias with a leading axis of layers is still a bias.
    """

    def has_decay(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        return path[-1].key not in ("bias", "scale") and jnp.ndim(leaf) >= 2

    return jax.tree_util.tree_map_with_path(has_decay, params)
