"""Lookups whose gradients are matrix products instead of scatters.

A scatter adds up gradients row by row: a TPU does so one after the other or sorts first, and a GPU in an order that
changes from run to run, and with it the last digits. A product with a one-hot matrix has a fixed order of summation and
is fast as long as there are few rows to select from: about 0.1 % of the operations of a step.

Shapes: B rows, L tokens per row, K selected tokens, N rows of a table, C and D feature sizes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Products of ones and values must return the values: at the default precision a TPU rounds float32 to bfloat16.
_EXACT = jax.lax.Precision.HIGHEST


@jax.custom_vjp
def gather_tokens(hidden_BxLxD: jax.Array, positions_BxK: jax.Array) -> jax.Array:
    """Returns the hidden states at some positions, [B, K, D]; NaN for positions past the row.

    The gradient has a fixed order of summation.
    """
    return jnp.take_along_axis(hidden_BxLxD, positions_BxK[:, :, None], axis=1)


def _gather_tokens_forward(hidden_BxLxD, positions_BxK):
    return gather_tokens(hidden_BxLxD, positions_BxK), (positions_BxK, hidden_BxLxD.shape[1])


def _gather_tokens_backward(residuals, d_selected_BxKxD):
    positions_BxK, length = residuals
    one_hot_BxKxL = jax.nn.one_hot(positions_BxK, length, dtype=d_selected_BxKxD.dtype)
    return jnp.einsum("BKL,BKD->BLD", one_hot_BxKxL, d_selected_BxKxD, precision=_EXACT), None


gather_tokens.defvjp(_gather_tokens_forward, _gather_tokens_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embedding_lookup(table_NxC: jax.Array, ids_BxL: jax.Array, dtype: Any) -> jax.Array:
    """Returns rows of a float32 table, [B, L, C], rounded to a dtype; NaN for ids past its end.

    The gradient is float32, with a fixed order of summation.
    """
    return jnp.take(table_NxC, ids_BxL, axis=0, mode="fill").astype(dtype)


def _embedding_lookup_forward(table_NxC, ids_BxL, dtype):
    return embedding_lookup(table_NxC, ids_BxL, dtype), (ids_BxL, len(table_NxC))


def _embedding_lookup_backward(dtype, residuals, d_rows_BxLxC):
    ids_BxL, table_size = residuals
    one_hot_BxLxN = jax.nn.one_hot(ids_BxL, table_size, dtype=dtype)
    d_table_NxC = jnp.einsum(
        "BLN,BLC->NC", one_hot_BxLxN, d_rows_BxLxC, precision=_EXACT, preferred_element_type=jnp.float32
    )
    return d_table_NxC, None


embedding_lookup.defvjp(_embedding_lookup_forward, _embedding_lookup_backward)
