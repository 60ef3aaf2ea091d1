"""Masked cross-entropy as sums and counts. Whoever reports a mean divides once, at the very end.

Legend: B rows, K predicted tokens of a row, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LossSums:
    """Sums over predicted tokens; they add over batches, devices and hosts.

    Attributes:
      loss: float32, summed cross-entropy in nats.
      correct: float32, how many tokens the model puts first.
      count: float32, how many tokens there are.
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array


def masked_cross_entropy(logits_BxKxV: jax.Array, labels_BxK: jax.Array, label_weights_BxK: jax.Array) -> LossSums:
    """Sums -log softmax(logits)[target] over the slots in use.

    Args:
      logits_BxKxV: float32 or bfloat16; sums are float32 all the same.
      targets_BxK: int32 ids.
      weights_BxK: float32, 0 leaves a slot out. A logit that is not finite shows even there: the model is broken.

    Returns:
      The sums. With no slot in use all are 0. Of equal logits the one with the smallest id counts as first.
    """
    loss_BxK, correct_BxK = _cross_entropy(logits_BxKxV, labels_BxK)
    return LossSums(
        loss=jnp.sum(loss_BxK * label_weights_BxK),
        correct=jnp.sum(correct_BxK * label_weights_BxK),
        count=jnp.sum(label_weights_BxK),
    )


# Derived by hand: logits are the largest array of a step. They are read once for their maximum, once for all sums,
# and the backward pass computes their gradient from them where it is read.
@jax.custom_vjp
def _cross_entropy(logits_BxKxV: jax.Array, labels_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _forward(logits_BxKxV, labels_BxK)[0]


def _forward(logits_BxKxV, labels_BxK):
    largest_BxKx1 = jnp.max(logits_BxKxV, axis=-1, keepdims=True).astype(jnp.float32)
    values_BxKxV = logits_BxKxV.astype(jnp.float32)
    ids_1x1xV = jnp.arange(logits_BxKxV.shape[-1], dtype=labels_BxK.dtype)[None, None]
    targets_BxKx1 = labels_BxK[..., None]
    sum_BxK = jnp.sum(jnp.exp(values_BxKxV - largest_BxKx1), axis=-1)
    # A sum of one term, for it shares the pass over the logits; a lookup would be another.
    target_BxK = jnp.sum(jnp.where(ids_1x1xV == targets_BxKx1, values_BxKxV, 0.0), axis=-1)
    # Of floats as well: a sum of integers would be a pass of its own.
    equals_before_BxKxV = (values_BxKxV == largest_BxKx1) & (ids_1x1xV < targets_BxKx1)
    equals_before_BxK = jnp.sum(equals_before_BxKxV.astype(jnp.float32), axis=-1)
    log_sum_BxK = largest_BxKx1[..., 0] + jnp.log(sum_BxK)
    correct_BxK = (target_BxK == largest_BxKx1[..., 0]) & (equals_before_BxK == 0)
    # A sum of which a NaN is no part must not hide it: log_sum_BxK has them all.
    return (log_sum_BxK - target_BxK, correct_BxK.astype(jnp.float32)), (logits_BxKxV, labels_BxK, log_sum_BxK)


def _backward(saved, gradients):
    logits_BxKxV, labels_BxK, log_sum_BxK = saved
    softmax_BxKxV = jnp.exp(logits_BxKxV.astype(jnp.float32) - log_sum_BxK[..., None])
    ids_1x1xV = jnp.arange(logits_BxKxV.shape[-1], dtype=labels_BxK.dtype)[None, None]
    is_target_BxKxV = ids_1x1xV == labels_BxK[..., None]
    gradient_BxKxV = (softmax_BxKxV - is_target_BxKxV) * gradients[0][..., None]
    return gradient_BxKxV.astype(logits_BxKxV.dtype), None


_cross_entropy.defvjp(_forward, _backward)
