"""Dropout (Srivastava et al., 2014) whose masks are computed where they are used, and never stored.

Whether a value is kept is a hash of its place and of a key: some integer operations that the compiler fuses into
whatever reads the values, forward and backward. Random bits from a generator (threefry, rbg) are either far more
work for every value or an array in memory, written once and read three times; see benchmarks/tpu_compile.py. The
same key drops the same places on any kind of device.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Shifts and multipliers of a 32-bit finalizer found by search (Chris Wellons, "Prospecting for Hash Functions", 2018).
_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
_LAST_SHIFT = 14


def kept(key: jax.Array, shape: tuple[int, ...], *, rate: float) -> jax.Array:
    """Returns a boolean array, False with probability `rate` (rounded to a multiple of 2^-32).

    After 2^32 values the mask repeats itself.
    """
    first, second = jax.random.key_data(key).reshape(-1)[-2:]  # An rbg key is two threefry keys side by side.
    place = jnp.zeros((1,) * len(shape), jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        along = (1,) * axis + (shape[axis],) + (1,) * (len(shape) - 1 - axis)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, along, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    # The key comes last: the compiler keeps sums of iotas, which are then the same for all keys.
    hash_ = place + first
    for number, (shift, multiplier) in enumerate(_ROUNDS):
        hash_ = (hash_ ^ (hash_ >> np.uint32(shift))) * np.uint32(multiplier)
        if number == 0:
            # Here, so that keys whose first words lie close together do not give shifted copies of one mask.
            hash_ = hash_ ^ second
    hash_ = hash_ ^ (hash_ >> np.uint32(_LAST_SHIFT))
    return hash_ >= np.uint32(round(rate * 2**32))


def dropout(values: jax.Array, *, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each value with probability `rate` and divides the others by 1 - rate; nothing without a key."""
    if key is None or rate == 0.0:
        return values
    return _dropout(values, key, rate)


# By hand, for JAX would save the mask for the backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dropout(values: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    return jnp.where(kept(key, values.shape, rate=rate), values / (1.0 - rate), 0.0).astype(values.dtype)


def _forward(values: jax.Array, key: jax.Array, rate: float) -> tuple[jax.Array, jax.Array]:
    return _dropout(values, key, rate), key


def _backward(rate: float, key: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return _dropout(gradient, key, rate), None


_dropout.defvjp(_forward, _backward)


class Dropout(nn.Module):
    """Dropout whose keys come from the "dropout" stream."""

    rate: float

    @nn.compact
    def __call__(self, values: jax.Array, *, deterministic: bool) -> jax.Array:
        """The values, some of them dropped unless `deterministic`."""
        dropped = self.rate > 0 and not deterministic
        return dropout(values, rate=self.rate, key=self.make_rng("dropout") if dropped else None)
