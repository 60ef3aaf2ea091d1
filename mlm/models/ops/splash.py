"""Attention on TPUs by the flash kernel that jax ships, whose memory grows with the row's length, not its square.

Shapes: B rows, Q queries and K keys per row, H heads, E head size.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

# The kernel takes numbers of queries and keys that are multiples of its blocks, and blocks of multiples of 128.
_LANES = 128
_MAX_BLOCK = 512


def splash_attention(
    query_BxQxHxE: jax.Array,
    key_BxKxHxE: jax.Array,
    value_BxKxHxE: jax.Array,
    *,
    query_segments_BxQ: jax.Array,
    key_segments_BxK: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Returns softmax(query key^T / sqrt(E)) value, [B, Q, H, E], where queries see keys of their own segment.

    Args:
      query_BxQxHxE, key_BxKxHxE, value_BxKxHxE: arrays of one dtype.
      query_segments_BxQ, key_segments_BxK: int32.
      interpret: run the kernel's operations one by one, on any device: for tests.
    """
    num_queries = query_BxQxHxE.shape[1]
    query_block, padded_queries = _block(num_queries)
    key_block, padded_keys = _block(key_BxKxHxE.shape[1])
    kernel = kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask_lib.FullMask((padded_queries, padded_keys))] * query_BxQxHxE.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernel_lib.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        interpret=interpret,
    )
    query_BxHxQxE = _heads_first(query_BxQxHxE * query_BxQxHxE.shape[-1] ** -0.5, padded_queries)
    key_BxHxKxE, value_BxHxKxE = (_heads_first(x, padded_keys) for x in (key_BxKxHxE, value_BxKxHxE))
    # No query of the row sees the padding of the keys.
    segments = kernel_lib.SegmentIds(
        _pad(query_segments_BxQ, padded_queries, value=0), _pad(key_segments_BxK, padded_keys, value=-1)
    )
    output_BxHxQxE = jax.vmap(kernel)(query_BxHxQxE, key_BxHxKxE, value_BxHxKxE, segments)
    return output_BxHxQxE.swapaxes(1, 2)[:, :num_queries].astype(value_BxKxHxE.dtype)


def _block(length: int) -> tuple[int, int]:
    """Returns a block size and the length padded to a multiple of it."""
    padded = -(-length // _LANES) * _LANES
    block = next(size for size in range(min(_MAX_BLOCK, padded), 0, -_LANES) if padded % size == 0)
    return block, padded


def _heads_first(x_BxLxHxE: jax.Array, length: int) -> jax.Array:
    return _pad(x_BxLxHxE, length).swapaxes(1, 2)


def _pad(x: jax.Array, length: int, *, value: int = 0) -> jax.Array:
    widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)
