"""Where documents begin in a row, and where tokens stand in them. Shapes: B rows, L tokens a row."""

import jax
import jax.numpy as jnp


def segments(inputs_BxL: jax.Array, *, pad_id: int, begin_id: int | None) -> tuple[jax.Array, jax.Array]:
    """Return which document of its row a token belongs to, and its number there.

    A document begins at every `begin_id`; what stands before a row's first one is the tail of a document. Without
    a `begin_id` a row is one document. Packing lays begin tokens and text never holds one; masking neither hides
    nor draws special tokens: a masked row has the segments of the row.

    Returns:
      segments_BxL: int32; 1 for the tail, 2... for the documents that begin in the row (1 if none does), 0 for padding.
      counts_BxL: int32; tokens of a document (or of what the row has of it) are 1, 2..., padding is 0.
    """
    is_token_BxL = inputs_BxL != pad_id
    counts_BxL = jnp.cumsum(is_token_BxL, axis=1, dtype=jnp.int32)
    if begin_id is None:
        return is_token_BxL.astype(jnp.int32), counts_BxL * is_token_BxL
    begins_BxL = inputs_BxL == begin_id
    segments_BxL = 1 + jnp.cumsum(begins_BxL, axis=1, dtype=jnp.int32)
    # Tokens of the row before the document.
    before_BxL = jax.lax.cummax(jnp.where(begins_BxL, counts_BxL - 1, 0), axis=1)
    return segments_BxL * is_token_BxL, (counts_BxL - before_BxL) * is_token_BxL


def places(inputs_BxL: jax.Array, *, begin_id: int | None) -> jax.Array:
    """Return how far a token stands from the beginning of its document (or of what the row has of it), padding too.

    Documents are those of `segments`. int32 [B, L], or [1, L] without a `begin_id`, for all rows have the same.
    """
    places_1xL = jnp.arange(inputs_BxL.shape[1], dtype=jnp.int32)[None]
    if begin_id is None:
        return places_1xL
    return places_1xL - jax.lax.cummax(jnp.where(inputs_BxL == begin_id, places_1xL, 0), axis=1)
