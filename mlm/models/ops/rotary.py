"""Rotary position embeddings (Su et al., arXiv:2104.09864): rotations by angles proportional to the position.

Shapes: B rows, L tokens per row, K selected tokens, H heads, E head size, P = E / 2 pairs of features.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Cosines and sines of the angles: float32 [B, L, P] each; B is 1 where all rows have the same.
Rotation = tuple[jax.Array, jax.Array]


def rotary_embedding(position_ids_BxL: jax.Array, *, head_size: int, theta: float, float64: bool) -> Rotation:
    """Returns cosines and sines of position * theta^(-2p/E) for each pair p.

    Args:
      position_ids_BxL: int32, each less than L; [1, L] where all rows have the same.
      head_size: E.
      theta: base of the frequencies.
      float64: compute the angles in float64, as transformers does for RoFormer, instead of float32, as it does for
        ModernBERT. At position 8192 the two differ by up to 5e-4 radians.
    """
    dtype: Any = np.float64 if float64 else np.float32
    frequencies_P = dtype(1) / dtype(theta) ** (np.arange(0, head_size, 2, dtype=dtype) / dtype(head_size))
    angles_LxP = np.arange(position_ids_BxL.shape[1], dtype=dtype)[:, None] * frequencies_P[None, :]
    cos_LxP, sin_LxP = (jnp.asarray(f(angles_LxP), jnp.float32) for f in (np.cos, np.sin))
    return cos_LxP[position_ids_BxL], sin_LxP[position_ids_BxL]


def gather_rotation(rotation: Rotation, positions_BxK: jax.Array) -> Rotation:
    """Returns the cosines and sines of the tokens at some positions of their rows, [B, K, P] each."""
    cos_BxKxP, sin_BxKxP = (
        jnp.take_along_axis(part_BxLxP, positions_BxK[:, :, None], axis=1) for part_BxLxP in rotation
    )
    return cos_BxKxP, sin_BxKxP


def rotate(x_BxLxHxE: jax.Array, rotation: Rotation, *, interleaved: bool) -> jax.Array:
    """Rotates each pair of features, in float32; the result has the dtype of the input.

    Pair p consists of features 2p and 2p + 1 if `interleaved`, else of p and E/2 + p.
    """
    cos_BxLx1xP, sin_BxLx1xP = (part_BxLxP[:, :, None, :] for part_BxLxP in rotation)
    shape = x_BxLxHxE.shape
    pairs_shape = (*shape[:-1], shape[-1] // 2, 2) if interleaved else (*shape[:-1], 2, shape[-1] // 2)
    axis = -1 if interleaved else -2
    pairs = x_BxLxHxE.astype(jnp.float32).reshape(pairs_shape)
    x_BxLxHxP, y_BxLxHxP = (jnp.take(pairs, i, axis=axis) for i in (0, 1))
    rotated = (
        x_BxLxHxP * cos_BxLx1xP - y_BxLxHxP * sin_BxLx1xP,
        y_BxLxHxP * cos_BxLx1xP + x_BxLxHxP * sin_BxLx1xP,
    )
    return jnp.stack(rotated, axis=axis).reshape(shape).astype(x_BxLxHxE.dtype)


def sinusoids(length: int, *, width: int) -> np.ndarray:
    """float32 [length, width]: RoFormer's constant table as PyTorch saves it: sines, then cosines, with base 10,000."""
    angles = np.arange(length)[:, None] / np.power(10_000, 2 * (np.arange(width) // 2) / width)[None, :]
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)
