"""Rows of an array, chosen by their numbers, whose gradients are products.

JAX adds gradients up row by row: a TPU does so one after the other or sorts them first, and a GPU in an order of its
own, which changes the last digits from run to run. With a matrix of ones and zeros it is a product, as long as there
are few rows to choose from: it takes a thousandth of an update's operations.

Shapes: B rows, L tokens a row, K chosen ones, P entries of a table, C and D their widths.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# A one times a value is that value, and none of its first digits: a TPU would round float32 ones to bfloat16.
_EXACT = jax.lax.Precision.HIGHEST


@jax.custom_vjp
def gather_tokens(hidden_BxLxD: jax.Array, positions_BxK: jax.Array) -> jax.Array:
    """Hidden states [B, K, D] of the tokens at some positions; NaN for those past the row."""
    return jnp.take_along_axis(hidden_BxLxD, positions_BxK[:, :, None], axis=1)


def _tokens_at_forward(hidden_BxLxD, positions_BxK):
    return gather_tokens(hidden_BxLxD, positions_BxK), (positions_BxK, hidden_BxLxD.shape[1])


def _tokens_at_backward(saved, d_chosen_BxKxD):
    positions_BxK, length = saved
    chosen_BxKxL = jax.nn.one_hot(positions_BxK, length, dtype=d_chosen_BxKxD.dtype)
    return jnp.einsum("BKL,BKD->BLD", chosen_BxKxL, d_chosen_BxKxD, precision=_EXACT), None


gather_tokens.defvjp(_tokens_at_forward, _tokens_at_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embedding_lookup(table_PxC: jax.Array, places_BxL: jax.Array, dtype: Any) -> jax.Array:
    """Entries [B, L, C] of a float32 table, rounded to a dtype; NaN for those past its end."""
    return jnp.take(table_PxC, places_BxL, axis=0, mode="fill").astype(dtype)


def _entries_at_forward(table_PxC, places_BxL, dtype):
    return embedding_lookup(table_PxC, places_BxL, dtype), (places_BxL, len(table_PxC))


def _entries_at_backward(dtype, saved, d_entries_BxLxC):
    places_BxL, entries = saved
    chosen_BxLxP = jax.nn.one_hot(places_BxL, entries, dtype=dtype)
    d_table_PxC = jnp.einsum(
        "BLP,BLC->PC", chosen_BxLxP, d_entries_BxLxC, precision=_EXACT, preferred_element_type=jnp.float32
    )
    return d_table_PxC, None


embedding_lookup.defvjp(_entries_at_forward, _entries_at_backward)
