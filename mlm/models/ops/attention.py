"""Scaled dot-product attention, without the projections around it.

Shapes: B rows, Q queries per row, K keys per row, H heads, E head size. X is Q, or 1 where all queries of a row see the
same keys. Without `query_positions_BxQ` there is a query for every key, and Q = K. Attention in blocks is a batch of
Z = B * number of blocks, with S = 2 * window queries and T = 4 * window keys each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mlm.models.ops.dropout import dropout_keep_mask


def attend(
    query_BxQxHxE: jax.Array,
    key_BxKxHxE: jax.Array,
    value_BxKxHxE: jax.Array,
    *,
    segment_ids_BxK: jax.Array,
    isolate: bool,
    query_positions_BxQ: jax.Array | None = None,
    window: int | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "plain",
) -> jax.Array:
    """Returns softmax(query key^T / sqrt(E)) value (Vaswani et al., arXiv:1706.03762), [B, Q, H, E].

    Args:
      query_BxQxHxE, key_BxKxHxE, value_BxKxHxE: arrays of one dtype; the softmax is float32 whatever it is.
      segment_ids_BxK: int32, the document of each token; 0 for padding, which no query sees.
      isolate: True if queries see keys of their own document only.
      query_positions_BxQ: int32, positions of the queries in their rows; None if every token is a query.
      window: queries see keys at a distance of at most `window` positions; None for all. If every token is a query and
        `uses_blocks`, operations and memory grow with Q * window instead of Q * K.
      dropout_rate: dropout rate of the attention weights.
      dropout_key: None for no dropout.
      implementation: one of `settings.IMPLEMENTATIONS`. "xla" and "cudnn" are those of `jax.nn.dot_product_attention`;
        "cudnn" is a flash kernel for NVIDIA GPUs and bfloat16, which without `isolate` expects padding at the end of a
        row. "splash" is one for TPUs. "plain" is used in any case for dropout, and where the others do not apply: "xla"
        with `query_positions_BxQ`, "splash" with a window.

    Returns:
      The heads' outputs. Those of padding are means of some values; nothing depends on them, and their gradients must
      be 0.
    """
    if dropout_key is None or dropout_rate == 0.0:
        dropout_key, dropout_rate = None, 0.0
    does_not_apply = {"xla": query_positions_BxQ is not None, "splash": window is not None}
    if dropout_key is not None or does_not_apply.get(implementation, False):
        implementation = "plain"
    kernel = functools.partial(
        _run_kernel, dropout_rate=dropout_rate, dropout_key=dropout_key, implementation=implementation
    )
    if window is not None and query_positions_BxQ is None and uses_blocks(window, length=key_BxKxHxE.shape[1]):
        output_ZxSxHxE = kernel(
            _query_blocks(query_BxQxHxE, window),
            _key_blocks(key_BxKxHxE, window),
            _key_blocks(value_BxKxHxE, window),
            _block_mask(segment_ids_BxK, isolate=isolate, window=window),
        )
        output_BxQxHxE = output_ZxSxHxE.reshape(query_BxQxHxE.shape[0], -1, *query_BxQxHxE.shape[2:])
        return output_BxQxHxE[:, : query_BxQxHxE.shape[1]]
    if implementation == "cudnn" and not isolate and window is None:
        # The kernel takes lengths, which is faster than reading a mask; at least 1, also for a row of padding. It takes
        # no window to both sides: JAX allows a window to the right with a causal mask only.
        lengths_B = jnp.maximum(jnp.sum(segment_ids_BxK > 0, axis=1, dtype=jnp.int32), 1)
        query_lengths_B = lengths_B
        if query_positions_BxQ is not None:
            query_lengths_B = jnp.full_like(lengths_B, query_BxQxHxE.shape[1])
        return _cudnn(
            query_BxQxHxE,
            key_BxKxHxE,
            value_BxKxHxE,
            query_seq_lengths=query_lengths_B,
            key_value_seq_lengths=lengths_B,
        )
    if implementation == "splash":
        # Imported here: it takes half a second, and only TPUs run it.
        from mlm.models.ops.splash import splash_attention

        return splash_attention(
            query_BxQxHxE,
            key_BxKxHxE,
            value_BxKxHxE,
            query_segments_BxQ=_query_segments(segment_ids_BxK, query_positions_BxQ, isolate=isolate),
            key_segments_BxK=segment_ids_BxK if isolate else jnp.minimum(segment_ids_BxK, 1),
        )
    mask_BxXxK = attention_mask(segment_ids_BxK, query_positions_BxQ, isolate=isolate, window=window)
    return kernel(query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, mask_BxXxK)


def _run_kernel(query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, mask_BxXxK, *, dropout_rate, dropout_key, implementation):
    """Returns the output [B, Q, H, E] of an implementation that takes a mask."""
    if implementation == "plain":
        return _attend(query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, mask_BxXxK, dropout_key, dropout_rate)
    if implementation == "xla":
        return jax.nn.dot_product_attention(
            query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, mask=mask_BxXxK[:, None], implementation="xla"
        )
    rows, num_queries, *_ = query_BxQxHxE.shape
    num_keys = key_BxKxHxE.shape[1]
    mask_BxQxK = jnp.broadcast_to(mask_BxXxK, (rows, num_queries, num_keys))
    mask_BxQxK = jnp.pad(mask_BxQxK, [(0, 0), (0, num_queries % 2), (0, num_keys % 2)])
    return _cudnn(query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, mask=mask_BxQxK[:, None])


def _cudnn(query_BxQxHxE: jax.Array, key_BxKxHxE: jax.Array, value_BxKxHxE: jax.Array, **options: Any) -> jax.Array:
    """Returns cuDNN's output [B, Q, H, E]. Its backward kernels take even numbers of queries and keys only."""
    query, key, value = (_pad(x, before=0, after=x.shape[1] % 2) for x in (query_BxQxHxE, key_BxKxHxE, value_BxKxHxE))
    output = jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **options)
    return output[:, : query_BxQxHxE.shape[1]]


def uses_blocks(window: int | None, *, length: int) -> bool:
    """True if blocks have fewer scores than the whole row: 4 * window instead of `length` per query."""
    return window is not None and 0 < 4 * window < length


def _query_blocks(x: jax.Array, window: int) -> jax.Array:
    """Returns [Z, S, ...]: the rows of x [B, K, ...], padded with 0, in blocks of S = 2 * window tokens."""
    return _pad(x, before=0, after=-x.shape[1] % (2 * window)).reshape(-1, 2 * window, *x.shape[2:])


def _key_blocks(x: jax.Array, window: int) -> jax.Array:
    """Returns [Z, T, ...]: each query block's own tokens, `window` before it and `window` after it; 0 past the row."""
    rows, length, *rest = x.shape
    padded = _pad(x, before=window, after=window + -length % (2 * window))
    halves = padded.reshape(rows, -1, 2 * window, *rest)
    return jnp.concatenate([halves[:, :-1], halves[:, 1:]], axis=2).reshape(-1, 4 * window, *rest)


def _pad(x: jax.Array, *, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def _block_mask(segment_ids_BxK: jax.Array, *, isolate: bool, window: int) -> jax.Array:
    """Returns mask_ZxSxT, True where a query of a block sees a key."""
    key_segments_Zx1xT = _key_blocks(segment_ids_BxK, window)[:, None, :]
    visible_ZxXxT = key_segments_Zx1xT > 0
    if isolate:
        visible_ZxXxT = _query_blocks(segment_ids_BxK, window)[:, :, None] == key_segments_Zx1xT
    distance_1xSxT = jnp.arange(2 * window)[None, :, None] + window - jnp.arange(4 * window)[None, None, :]
    return visible_ZxXxT & (jnp.abs(distance_1xSxT) <= window)


def attention_mask(
    segment_ids_BxK: jax.Array, query_positions_BxQ: jax.Array | None, *, isolate: bool, window: int | None
) -> jax.Array:
    """Returns mask_BxXxK, True where a query sees a key."""
    mask_BxXxK = segment_ids_BxK[:, None, :] > 0
    if isolate:
        segments_BxQ = _query_segments(segment_ids_BxK, query_positions_BxQ, isolate=True)
        mask_BxXxK = segments_BxQ[:, :, None] == segment_ids_BxK[:, None, :]
    if window is not None:
        positions_1xK = jnp.arange(segment_ids_BxK.shape[1])[None]
        positions_BxQ = positions_1xK if query_positions_BxQ is None else query_positions_BxQ
        mask_BxXxK &= jnp.abs(positions_BxQ[:, :, None] - positions_1xK[:, None, :]) <= window
    return mask_BxXxK


def _query_segments(segment_ids_BxK: jax.Array, query_positions_BxQ: jax.Array | None, *, isolate: bool) -> jax.Array:
    """Returns the segment of the keys that each query sees, [B, Q]; all 1 if every query sees all keys."""
    segments_BxQ = segment_ids_BxK
    if query_positions_BxQ is not None:
        segments_BxQ = jnp.take_along_axis(segment_ids_BxK, query_positions_BxQ, axis=1)
    return segments_BxQ if isolate else jnp.ones_like(segments_BxQ)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, mask_BxXxK, dropout_key, rate):
    """The "plain" implementation; tests/test_attention.py has the same in a few lines of plain jnp.

    The gradient is written by hand for memory: besides inputs and output, the forward pass saves only the scores, in
    the inputs' dtype, and their log-sum-exp. Weights and dropout masks, [B, H, Q, K] each, are recomputed from these.
    In the shape of the reference run, compiled for a TPU v3 in bfloat16: 0.72 GB moved and 2.9 million cycles, against
    1.18 GB and 3.7 million with JAX's own gradient.
    """
    return _forward(query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, mask_BxXxK, dropout_key, rate)[0]


def _forward(query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, mask_BxXxK, dropout_key, rate):
    dtype = value_BxKxHxE.dtype
    scores_BxHxQxK = jnp.einsum("BQHE,BKHE->BHQK", query_BxQxHxE, key_BxKxHxE, preferred_element_type=jnp.float32)
    scores_BxHxQxK = jnp.where(
        mask_BxXxK[:, None], scores_BxHxQxK * query_BxQxHxE.shape[-1] ** -0.5, jnp.finfo(dtype).min
    ).astype(dtype)
    max_BxHxQx1 = jnp.max(scores_BxHxQxK, axis=-1, keepdims=True).astype(jnp.float32)
    # Softmax divides the weights by their sum; dividing the outputs is the same, and there are fewer of them.
    weights_BxHxQxK = jnp.exp(scores_BxHxQxK.astype(jnp.float32) - max_BxHxQx1)
    sum_BxHxQx1 = jnp.sum(weights_BxHxQxK, axis=-1, keepdims=True)
    weights_BxHxQxK = weights_BxHxQxK.astype(dtype)
    if rate:
        keep_mask_BxHxQxK = dropout_keep_mask(dropout_key, weights_BxHxQxK.shape, rate=rate)
        weights_BxHxQxK = jnp.where(keep_mask_BxHxQxK, weights_BxHxQxK, 0)
    output_BxHxQxE = jnp.einsum(
        "BHQK,BKHE->BHQE", weights_BxHxQxK, value_BxKxHxE, preferred_element_type=jnp.float32
    ) / (sum_BxHxQx1 * (1.0 - rate))
    output_BxQxHxE = output_BxHxQxE.swapaxes(1, 2).astype(dtype)
    log_sum_exp_BxHxQx1 = max_BxHxQx1 + jnp.log(sum_BxHxQx1)
    residuals = (
        query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, scores_BxHxQxK, log_sum_exp_BxHxQx1, dropout_key, output_BxQxHxE
    )  # fmt: skip
    return output_BxQxHxE, residuals


def _backward(rate, residuals, d_output_BxQxHxE):
    query_BxQxHxE, key_BxKxHxE, value_BxKxHxE, scores_BxHxQxK, log_sum_exp_BxHxQx1, dropout_key, output_BxQxHxE = (
        residuals
    )
    dtype = value_BxKxHxE.dtype
    weights_BxHxQxK = jnp.exp(scores_BxHxQxK.astype(jnp.float32) - log_sum_exp_BxHxQx1).astype(dtype)
    d_weights_BxHxQxK = jnp.einsum(
        "BQHE,BKHE->BHQK", d_output_BxQxHxE, value_BxKxHxE, preferred_element_type=jnp.float32
    )
    dropped_weights_BxHxQxK = weights_BxHxQxK
    if rate:
        keep_mask_BxHxQxK = dropout_keep_mask(dropout_key, weights_BxHxQxK.shape, rate=rate)
        d_weights_BxHxQxK = jnp.where(keep_mask_BxHxQxK, d_weights_BxHxQxK / (1.0 - rate), 0)
        dropped_weights_BxHxQxK = jnp.where(keep_mask_BxHxQxK, weights_BxHxQxK / (1.0 - rate), 0).astype(dtype)
    # The gradient of softmax needs sum_k weights * d_weights, which equals sum_e output * d_output.
    dot_BxQxH = jnp.sum(d_output_BxQxHxE.astype(jnp.float32) * output_BxQxHxE.astype(jnp.float32), axis=-1)
    d_weights_BxHxQxK -= dot_BxQxH.swapaxes(1, 2)[..., None]
    d_scores_BxHxQxK = (weights_BxHxQxK.astype(jnp.float32) * d_weights_BxHxQxK).astype(dtype)
    scale = query_BxQxHxE.shape[-1] ** -0.5

    def einsum(equation, x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    d_value_BxKxHxE = einsum("BHQK,BQHE->BKHE", dropped_weights_BxHxQxK, d_output_BxQxHxE).astype(dtype)
    d_query_BxQxHxE = (einsum("BHQK,BKHE->BQHE", d_scores_BxHxQxK, key_BxKxHxE) * scale).astype(dtype)
    d_key_BxKxHxE = (einsum("BHQK,BQHE->BKHE", d_scores_BxHxQxK, query_BxQxHxE) * scale).astype(dtype)
    return d_query_BxQxHxE, d_key_BxKxHxE, d_value_BxKxHxE, None, None


_attend.defvjp(_forward, _backward)
