"""Lookups whose gradients are matrix products instead of scatters.

A scatter adds up gradients row by row: a TPU does so one after the other or sorts first, and a GPU in an order that
changes from run to run, which changes the last digits. A product with a one-hot matrix has a fixed order of summation
and is fast as long as there are few rows to select from: about 0.1 % of the operations of a step.

For tables of many rows, such as the vocabulary's, `word_lookup` scatters, with a sorted sum on GPUs.

Shapes: B rows, L tokens per row, K selected tokens, N rows of a table, C and D feature sizes. In a sorted sum: T = B L
tokens, G groups of S tokens.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def word_lookup(table_NxC: jax.Array, ids_BxL: jax.Array, dtype: Any) -> jax.Array:
    """`embedding_lookup` for a table of many rows. The gradient is float32, with a fixed order of summation."""
    return jnp.take(table_NxC, ids_BxL, axis=0, mode="fill").astype(dtype)


def _word_lookup_backward(dtype, residuals, d_rows_BxLxC):
    ids_BxL, table_size = residuals
    ids_T, d_rows_TxC = ids_BxL.reshape(-1), d_rows_BxLxC.reshape(-1, d_rows_BxLxC.shape[-1])
    d_table_NxC = jax.lax.platform_dependent(
        ids_T,
        d_rows_TxC,
        cuda=functools.partial(sorted_sum, table_size=table_size),
        default=functools.partial(_scatter_sum, table_size=table_size),
    )
    return d_table_NxC, None


word_lookup.defvjp(
    lambda table_NxC, ids_BxL, dtype: (word_lookup(table_NxC, ids_BxL, dtype), (ids_BxL, len(table_NxC))),
    _word_lookup_backward,
)


def _scatter_sum(ids_T: jax.Array, rows_TxC: jax.Array, *, table_size: int) -> jax.Array:
    """Returns [N, C] float32: the sum of the rows of each id."""
    zeros_NxC = jnp.zeros((table_size, rows_TxC.shape[-1]), jnp.float32)
    return zeros_NxC.at[ids_T].add(rows_TxC.astype(jnp.float32))


def sorted_sum(ids_T: jax.Array, rows_TxC: jax.Array, *, table_size: int, group_size: int = 128) -> jax.Array:
    """`_scatter_sum` with a fixed order of summation on GPUs, where a scatter with equal ids has none.

    The rows are sorted by id and cut into groups. Within a group, a one-hot product adds up the rows of each id. Ids
    that continue from one group to the next are added up by a second one, over the groups. Then each id has one row,
    and a scatter with unique ids writes them. (XLA's own `--xla_gpu_exclude_nondeterministic_ops` takes 40 ms instead
    of 0.3 for the vocabulary of RoBERTa and 65,536 tokens on an H200.)
    """
    padding = -len(ids_T) % group_size
    # The padding's id is past the table, so that its rows are dropped.
    ids_T = jnp.pad(ids_T, (0, padding), constant_values=table_size)
    order_T = jnp.argsort(ids_T, stable=True)
    ids_GxS = ids_T[order_T].reshape(-1, group_size)
    rows_GxSxC = jnp.pad(rows_TxC, ((0, padding), (0, 0)))[order_T].reshape(*ids_GxS.shape, -1)

    previous_GxS = jnp.concatenate([jnp.full((1,), -1), ids_GxS.reshape(-1)[:-1]]).reshape(ids_GxS.shape)
    is_first_GxS = ids_GxS != previous_GxS  # of its id
    starts_GxS = is_first_GxS.at[:, 0].set(True)  # a sum within a group
    number_GxS = jnp.cumsum(starts_GxS, axis=1) - 1  # of the sum to which a row belongs, within its group
    belongs_GxSxS = number_GxS[:, :, None] == jnp.arange(group_size)[None, None, :]
    sums_GxSxC = jnp.einsum(
        "GRS,GRC->GSC", belongs_GxSxS.astype(rows_TxC.dtype), rows_GxSxC,
        precision=_EXACT, preferred_element_type=jnp.float32,
    )  # fmt: skip

    # The group in which the first row of a group's first id is.
    num_groups = len(ids_GxS)
    positions_GxS = jnp.arange(ids_GxS.size).reshape(ids_GxS.shape)
    last_first_G = jnp.max(jnp.where(is_first_GxS, positions_GxS, 0), axis=1)
    home_G = jnp.pad(jax.lax.cummax(last_first_G), (1, 0))[:-1] // group_size
    continues_G = ~is_first_GxS[:, 0]
    is_home_GxG = (home_G[:, None] == jnp.arange(num_groups)[None]) & continues_G[:, None]
    continued_GxC = jnp.einsum("GH,GC->HC", is_home_GxG.astype(jnp.float32), sums_GxSxC[:, 0], precision=_EXACT)
    is_last_GxS = number_GxS[:, -1:] == jnp.arange(group_size)[None]
    sums_GxSxC += jnp.where(is_last_GxS[:, :, None], continued_GxC[:, None, :], 0.0)

    # Sums that continue an earlier one, and numbers without a row, get different ids past the table.
    id_GxS = jnp.max(jnp.where(belongs_GxSxS, ids_GxS[:, :, None], -1), axis=1)
    is_used_GxS = (id_GxS >= 0) & ~(continues_G[:, None] & (jnp.arange(group_size) == 0)[None])
    target_GxS = jnp.where(is_used_GxS, id_GxS, table_size + 1 + positions_GxS)
    zeros_NxC = jnp.zeros((table_size, rows_TxC.shape[-1]), jnp.float32)
    return zeros_NxC.at[target_GxS.reshape(-1)].set(
        sums_GxSxC.reshape(-1, rows_TxC.shape[-1]), mode="drop", unique_indices=True
    )
