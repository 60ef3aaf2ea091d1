"""Attention of tokens to tokens, apart from the projections around it.

Shapes: B rows, L tokens a row, M is L again on the side of keys, H heads, E width of a head.
"""

import jax
import jax.numpy as jnp

from mlm.models.dropout import dropout


def attend(
    query_BxLxHxE: jax.Array,
    key_BxMxHxE: jax.Array,
    value_BxMxHxE: jax.Array,
    *,
    segments_BxL: jax.Array,
    isolate: bool,
    window: int | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al., arXiv:1706.03762).

    Args:
      query_BxLxHxE, key_BxMxHxE, value_BxMxHxE: of one dtype; softmax is float32 whatever it is.
      segments_BxL: int32; the document of its row a token belongs to, 0 for padding, which is not attended to.
      isolate: whether tokens see those of their own document only.
      window: tokens see those at most so many places away; None for all.
      dropout_rate: of the attention weights.
      dropout_key: None for no dropout.

    Returns:
      The heads' outputs, [B, L, H, E]. A token of padding gets a mean of some values: it counts for nothing.
    """
    # Of one document, every token sees all that are not padding: M of them, the same for each (L is 1).
    visible_BxLxM = segments_BxL[:, None, :] > 0
    if isolate:
        visible_BxLxM = segments_BxL[:, :, None] == segments_BxL[:, None, :]
    if window is not None:
        places_L = jnp.arange(segments_BxL.shape[1])
        visible_BxLxM &= (jnp.abs(places_L[:, None] - places_L[None, :]) <= window)[None]
    scores_BxHxLxM = jnp.einsum(
        "BLHE,BMHE->BHLM",
        query_BxLxHxE * query_BxLxHxE.shape[-1] ** -0.5,
        key_BxMxHxE,
        preferred_element_type=jnp.float32,
    )
    scores_BxHxLxM = jnp.where(visible_BxLxM[:, None], scores_BxHxLxM, jnp.finfo(jnp.float32).min)
    weights_BxHxLxM = jax.nn.softmax(scores_BxHxLxM).astype(value_BxMxHxE.dtype)
    weights_BxHxLxM = dropout(weights_BxHxLxM, rate=dropout_rate, key=dropout_key)
    return jnp.einsum("BHLM,BMHE->BLHE", weights_BxHxLxM, value_BxMxHxE)
