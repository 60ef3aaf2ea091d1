"""Dropout (Srivastava et al., 2014) whose mask is a hash of a value's index and a key.

The mask is recomputed wherever it is used, by a few integer operations that the compiler fuses into its reader, and is
never stored. Random bits of a generator would cost more operations per value (threefry) or an array in memory that is
written once and read three times (rbg). The same key gives the same mask on every kind of device.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Shifts and multipliers of a 32-bit finalizer found by search (Chris Wellons, "Prospecting for Hash Functions", 2018).
_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
_LAST_SHIFT = 14


def dropout_keep_mask(key: jax.Array, shape: tuple[int, ...], *, rate: float) -> jax.Array:
    """Returns a boolean array, False with probability `rate` (rounded to a multiple of 2^-32), with period 2^32."""
    first, second = jax.random.key_data(key).reshape(-1)[-2:]  # An rbg key is two threefry keys side by side.
    index = jnp.zeros((1,) * len(shape), jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        axis_shape = (1,) * axis + (shape[axis],) + (1,) * (len(shape) - 1 - axis)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, axis_shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    # The key is added last, so that the compiler can compute the index once for all keys.
    hash_ = index + first
    for number, (shift, multiplier) in enumerate(_ROUNDS):
        hash_ = (hash_ ^ (hash_ >> np.uint32(shift))) * np.uint32(multiplier)
        if number == 0:
            # After a round: otherwise keys with neighboring first words would give shifted copies of one mask.
            hash_ = hash_ ^ second
    hash_ = hash_ ^ (hash_ >> np.uint32(_LAST_SHIFT))
    return hash_ >= np.uint32(round(rate * 2**32))


def dropout(values: jax.Array, *, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each value with probability `rate` and divides the others by 1 - rate; without a key, changes nothing."""
    if key is None or rate == 0.0:
        return values
    return _dropout(values, key, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dropout(values: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Dropout whose backward pass recomputes the mask; JAX's own gradient would save it."""
    keep_mask = dropout_keep_mask(key, values.shape, rate=rate)
    return jnp.where(keep_mask, values / (1.0 - rate), 0.0).astype(values.dtype)


def _forward(values: jax.Array, key: jax.Array, rate: float) -> tuple[jax.Array, jax.Array]:
    return _dropout(values, key, rate), key


def _backward(rate: float, key: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return _dropout(gradient, key, rate), None


_dropout.defvjp(_forward, _backward)


class Dropout(nn.Module):
    """`dropout` with keys from the "dropout" stream."""

    rate: float

    @nn.compact
    def __call__(self, values: jax.Array, *, deterministic: bool) -> jax.Array:
        """Drops values unless `deterministic`."""
        has_dropout = self.rate > 0 and not deterministic
        return dropout(values, rate=self.rate, key=self.make_rng("dropout") if has_dropout else None)
