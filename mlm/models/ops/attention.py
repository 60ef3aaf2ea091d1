"""Attention of tokens to tokens, apart from the projections around it.

Shapes: B rows, L tokens a row that ask, M tokens a row that answer, the same L unless some are chosen, H heads, E
width of a head; X is L or 1, where every token of a row sees the same.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mlm.models.execution import REMAT_SAVED
from mlm.models.ops.dropout import kept

# How attention may be computed. "plain" is the form below; "xla" and "cudnn" are those of
# `jax.nn.dot_product_attention`: the second is a flash kernel, for NVIDIA GPUs and bfloat16.
IMPLEMENTATIONS = ("plain", "xla", "cudnn")


def attend(
    query_BxLxHxE: jax.Array,
    key_BxMxHxE: jax.Array,
    value_BxMxHxE: jax.Array,
    *,
    segments_BxM: jax.Array,
    isolate: bool,
    positions_BxL: jax.Array | None = None,
    window: int | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "plain",
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al., arXiv:1706.03762).

    Args:
      query_BxLxHxE, key_BxMxHxE, value_BxMxHxE: of one dtype; softmax is float32 whatever it is.
      segments_BxM: int32; the document of its row a token belongs to, 0 for padding, which is not attended to.
      isolate: whether tokens see those of their own document only.
      positions_BxL: int32, where in their rows the tokens stand that ask; None if all do.
      window: tokens see those at most so many places away; None for all.
      dropout_rate: of the attention weights.
      dropout_key: None for no dropout.
      implementation: one of IMPLEMENTATIONS. Weights are dropped by the plain form alone, so it is what runs with a
        `dropout_key`; and for `positions_BxL`, of which there are few. "cudnn" without `isolate` takes padding to be at
        the end of its row.

    Returns:
      The heads' outputs, [B, L, H, E]. A token of padding gets a mean of some values: it counts for nothing, and
      the gradient at it is taken to be 0.
    """
    dropped = dropout_key is not None and dropout_rate > 0
    implementation = "plain" if dropped or positions_BxL is not None else implementation
    if implementation == "cudnn" and not isolate and window is None:
        # Lengths are an argument of the kernel: no [L, L] mask is read. A row of padding has one token. A window to
        # both sides is not, to JAX: only to the side that tokens see where they see no later ones.
        lengths_B = jnp.maximum(jnp.sum(segments_BxM > 0, axis=1, dtype=jnp.int32), 1)
        return jax.nn.dot_product_attention(
            query_BxLxHxE,
            key_BxMxHxE,
            value_BxMxHxE,
            query_seq_lengths=lengths_B,
            key_value_seq_lengths=lengths_B,
            implementation="cudnn",
        )
    visible_BxXxM = _visible(segments_BxM, positions_BxL, isolate=isolate, window=window)
    if implementation != "plain":
        return jax.nn.dot_product_attention(
            query_BxLxHxE, key_BxMxHxE, value_BxMxHxE, mask=visible_BxXxM[:, None], implementation=implementation
        )
    return _attend(
        query_BxLxHxE,
        key_BxMxHxE,
        value_BxMxHxE,
        visible_BxXxM,
        dropout_key if dropped else None,
        dropout_rate if dropped else 0.0,
    )


def _visible(
    segments_BxM: jax.Array, positions_BxL: jax.Array | None, *, isolate: bool, window: int | None
) -> jax.Array:
    # Of one document, every token sees all that are not padding: M of them, the same for each (X is 1).
    visible_BxXxM = segments_BxM[:, None, :] > 0
    if isolate:
        segments_BxL = segments_BxM
        if positions_BxL is not None:
            segments_BxL = jnp.take_along_axis(segments_BxM, positions_BxL, axis=1)
        visible_BxXxM = segments_BxL[:, :, None] == segments_BxM[:, None, :]
    if window is not None:
        places_1xM = jnp.arange(segments_BxM.shape[1])[None]
        places_BxL = places_1xM if positions_BxL is None else positions_BxL
        visible_BxXxM &= jnp.abs(places_BxL[:, :, None] - places_1xM[:, None, :]) <= window
    return visible_BxXxM


# Derived by hand, for memory: kept from the forward pass are the scores, in the inputs' dtype, and of each row of
# them one number. Weights, dropped weights and masks are computed from these wherever they are read.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query_BxLxHxE, key_BxMxHxE, value_BxMxHxE, visible_BxXxM, dropout_key, rate):
    return _forward(query_BxLxHxE, key_BxMxHxE, value_BxMxHxE, visible_BxXxM, dropout_key, rate)[0]


def _forward(query_BxLxHxE, key_BxMxHxE, value_BxMxHxE, visible_BxXxM, dropout_key, rate):
    dtype = value_BxMxHxE.dtype
    scores_BxHxLxM = jnp.einsum("BLHE,BMHE->BHLM", query_BxLxHxE, key_BxMxHxE, preferred_element_type=jnp.float32)
    scores_BxHxLxM = jnp.where(
        visible_BxXxM[:, None], scores_BxHxLxM * query_BxLxHxE.shape[-1] ** -0.5, jnp.finfo(dtype).min
    ).astype(dtype)
    largest_BxHxLx1 = jnp.max(scores_BxHxLxM, axis=-1, keepdims=True).astype(jnp.float32)
    # Softmax divides by the sum: here the outputs are divided, of which there are fewer than weights.
    weights_BxHxLxM = jnp.exp(scores_BxHxLxM.astype(jnp.float32) - largest_BxHxLx1)
    sum_BxHxLx1 = jnp.sum(weights_BxHxLxM, axis=-1, keepdims=True)
    weights_BxHxLxM = weights_BxHxLxM.astype(dtype)
    if rate:
        weights_BxHxLxM = jnp.where(kept(dropout_key, weights_BxHxLxM.shape, rate=rate), weights_BxHxLxM, 0)
    output_BxHxLxE = jnp.einsum(
        "BHLM,BMHE->BHLE", weights_BxHxLxM, value_BxMxHxE, preferred_element_type=jnp.float32
    ) / (sum_BxHxLx1 * (1.0 - rate))
    output_BxLxHxE = output_BxHxLxE.swapaxes(1, 2).astype(dtype)
    log_sum_BxHxLx1 = largest_BxHxLx1 + jnp.log(sum_BxHxLx1)
    scores_BxHxLxM, log_sum_BxHxLx1, output_BxLxHxE = (
        checkpoint_name(array, REMAT_SAVED) for array in (scores_BxHxLxM, log_sum_BxHxLx1, output_BxLxHxE)
    )
    saved = (query_BxLxHxE, key_BxMxHxE, value_BxMxHxE, scores_BxHxLxM, log_sum_BxHxLx1, dropout_key, output_BxLxHxE)
    return output_BxLxHxE, saved


def _backward(rate, saved, d_output_BxLxHxE):
    query_BxLxHxE, key_BxMxHxE, value_BxMxHxE, scores_BxHxLxM, log_sum_BxHxLx1, dropout_key, output_BxLxHxE = saved
    dtype = value_BxMxHxE.dtype
    weights_BxHxLxM = jnp.exp(scores_BxHxLxM.astype(jnp.float32) - log_sum_BxHxLx1).astype(dtype)
    d_weights_BxHxLxM = jnp.einsum(
        "BLHE,BMHE->BHLM", d_output_BxLxHxE, value_BxMxHxE, preferred_element_type=jnp.float32
    )
    dropped_BxHxLxM = weights_BxHxLxM
    if rate:
        kept_BxHxLxM = kept(dropout_key, weights_BxHxLxM.shape, rate=rate)
        d_weights_BxHxLxM = jnp.where(kept_BxHxLxM, d_weights_BxHxLxM / (1.0 - rate), 0)
        dropped_BxHxLxM = jnp.where(kept_BxHxLxM, weights_BxHxLxM / (1.0 - rate), 0).astype(dtype)
    # Softmax's gradient needs the sum of weights times their gradients: that of outputs times theirs is the same.
    dot_BxLxH = jnp.sum(d_output_BxLxHxE.astype(jnp.float32) * output_BxLxHxE.astype(jnp.float32), axis=-1)
    d_weights_BxHxLxM -= dot_BxLxH.swapaxes(1, 2)[..., None]
    d_scores_BxHxLxM = (weights_BxHxLxM.astype(jnp.float32) * d_weights_BxHxLxM).astype(dtype)
    scale = query_BxLxHxE.shape[-1] ** -0.5

    def product(equation, x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    d_value_BxMxHxE = product("BHLM,BLHE->BMHE", dropped_BxHxLxM, d_output_BxLxHxE).astype(dtype)
    d_query_BxLxHxE = (product("BHLM,BMHE->BLHE", d_scores_BxHxLxM, key_BxMxHxE) * scale).astype(dtype)
    d_key_BxMxHxE = (product("BHLM,BLHE->BMHE", d_scores_BxHxLxM, query_BxLxHxE) * scale).astype(dtype)
    return d_query_BxLxHxE, d_key_BxMxHxE, d_value_BxMxHxE, None, None


_attend.defvjp(_forward, _backward)
