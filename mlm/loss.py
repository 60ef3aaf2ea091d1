"""Masked cross-entropy as sums and counts. Whoever reports a mean divides once, at the very end.

Legend: B rows, K predicted tokens of a row, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax


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


def masked_cross_entropy(logits_BxKxV: jax.Array, targets_BxK: jax.Array, weights_BxK: jax.Array) -> LossSums:
    """Sums -log softmax(logits)[target] over the slots in use.

    Args:
      logits_BxKxV: float32.
      targets_BxK: int32 ids.
      weights_BxK: float32, 0 leaves a slot out. A logit that is not finite shows even there: the model is broken.

    Returns:
      The sums. With no slot in use all are 0.
    """
    loss_BxK = optax.softmax_cross_entropy_with_integer_labels(logits_BxKxV, targets_BxK)
    correct_BxK = (jnp.argmax(logits_BxKxV, axis=-1) == targets_BxK).astype(jnp.float32)
    return LossSums(
        loss=jnp.sum(loss_BxK * weights_BxK),
        correct=jnp.sum(correct_BxK * weights_BxK),
        count=jnp.sum(weights_BxK),
    )
