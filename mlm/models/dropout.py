"""Dropout (Srivastava et al., 2014)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def dropout(values: jax.Array, *, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each value with probability `rate` and divides the others by 1 - rate; nothing without a key."""
    if key is None or rate == 0.0:
        return values
    kept = jax.random.bernoulli(key, 1.0 - rate, values.shape)
    return jnp.where(kept, values / (1.0 - rate), 0.0).astype(values.dtype)


class Dropout(nn.Module):
    """Dropout whose keys come from the "dropout" stream."""

    rate: float

    @nn.compact
    def __call__(self, values: jax.Array, *, deterministic: bool) -> jax.Array:
        """The values, some of them dropped unless `deterministic`."""
        dropped = self.rate > 0 and not deterministic
        return dropout(values, rate=self.rate, key=self.make_rng("dropout") if dropped else None)
