"""Rotary positions (Su et al., arXiv:2104.09864): queries and keys are turned by angles that grow with the place.

Shapes: B rows, L tokens a row, H heads, E width of a head, P = E / 2 planes.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Cosines and sines of a row's angles: float32 [B, L, P] each, B is 1 where all rows have the same.
Rotation = tuple[jax.Array, jax.Array]


def rotation(places_BxL: jax.Array, *, head_size: int, theta: float, exact: bool) -> Rotation:
    """Angles of tokens at `places_BxL`, each below L; [1, L] where all rows have the same.

    Plane p turns by theta^(-2p/E) radians a place. `exact`: in float64, as transformers makes RoFormer's table;
    else in float32, as its ModernBERT does: at place 8192 the two are up to 5e-4 radians apart.
    """
    dtype = np.float64 if exact else np.float32
    speeds_P = dtype(1) / dtype(theta) ** (np.arange(0, head_size, 2, dtype=dtype) / dtype(head_size))
    angles_LxP = np.arange(places_BxL.shape[1], dtype=dtype)[:, None] * speeds_P[None, :]
    cos_LxP, sin_LxP = (jnp.asarray(f(angles_LxP), jnp.float32) for f in (np.cos, np.sin))
    return cos_LxP[places_BxL], sin_LxP[places_BxL]


def rotation_at(rotation: Rotation, positions_BxK: jax.Array) -> Rotation:
    """The angles of the tokens at some positions of their rows: [B, K, P]."""
    cos_BxKxP, sin_BxKxP = (
        jnp.take_along_axis(part_BxLxP, positions_BxK[:, :, None], axis=1) for part_BxLxP in rotation
    )
    return cos_BxKxP, sin_BxKxP


def rotate(x_BxLxHxE: jax.Array, rotation: Rotation, *, pairs: bool) -> jax.Array:
    """The heads turned, in float32, given back in their own dtype.

    `pairs`: plane p holds the numbers 2p and 2p + 1; else p and E/2 + p.
    """
    cos_BxLx1xP, sin_BxLx1xP = (part_BxLxP[:, :, None, :] for part_BxLxP in rotation)
    shape = x_BxLxHxE.shape
    planes = (*shape[:-1], shape[-1] // 2, 2) if pairs else (*shape[:-1], 2, shape[-1] // 2)
    axis = -1 if pairs else -2
    split = x_BxLxHxE.astype(jnp.float32).reshape(planes)
    x_BxLxHxP, y_BxLxHxP = (jnp.take(split, i, axis=axis) for i in (0, 1))
    turned = (
        x_BxLxHxP * cos_BxLx1xP - y_BxLxHxP * sin_BxLx1xP,
        y_BxLxHxP * cos_BxLx1xP + x_BxLxHxP * sin_BxLx1xP,
    )
    return jnp.stack(turned, axis=axis).reshape(shape).astype(x_BxLxHxE.dtype)


def sinusoids(length: int, *, width: int) -> np.ndarray:
    """float32 [length, width]: RoFormer's constant table as PyTorch saves it, sines then cosines, base 10,000."""
    angles = np.arange(length)[:, None] / np.power(10_000, 2 * (np.arange(width) // 2) / width)[None, :]
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)
