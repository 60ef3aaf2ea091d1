"""Document boundaries and positions of tokens within their documents. Shapes: B rows, L tokens per row.

A document begins at every `begin_id`; tokens before the first one are the tail of a document that began in an earlier
row. Without a `begin_id` each row is one document. Packing writes begin tokens, text never contains them, and masking
leaves special tokens alone, so a masked row has the same documents as the original.
"""

import jax
import jax.numpy as jnp


def segment_ids(inputs_BxL: jax.Array, *, pad_id: int, begin_id: int | None) -> tuple[jax.Array, jax.Array]:
    """Numbers the documents of a row, and the tokens of each document.

    Returns:
      segment_ids_BxL: int32, 1 for the tail of an earlier document, then 2, 3, ...; 0 for padding.
      counts_BxL: int32, 1, 2, ... for the tokens of each document; 0 for padding.
    """
    is_token_BxL = inputs_BxL != pad_id
    counts_BxL = jnp.cumsum(is_token_BxL, axis=1, dtype=jnp.int32)
    if begin_id is None:
        return is_token_BxL.astype(jnp.int32), counts_BxL * is_token_BxL
    is_begin_BxL = inputs_BxL == begin_id
    segment_ids_BxL = 1 + jnp.cumsum(is_begin_BxL, axis=1, dtype=jnp.int32)
    tokens_before_BxL = jax.lax.cummax(jnp.where(is_begin_BxL, counts_BxL - 1, 0), axis=1)
    return segment_ids_BxL * is_token_BxL, (counts_BxL - tokens_before_BxL) * is_token_BxL


def position_ids(inputs_BxL: jax.Array, *, begin_id: int | None) -> jax.Array:
    """Returns the distance of each token, padding included, from the beginning of its document, from 0 on.

    int32 [B, L], or [1, L] without a `begin_id`, when all rows have the same.
    """
    positions_1xL = jnp.arange(inputs_BxL.shape[1], dtype=jnp.int32)[None]
    if begin_id is None:
        return positions_1xL
    return positions_1xL - jax.lax.cummax(jnp.where(inputs_BxL == begin_id, positions_1xL, 0), axis=1)
