"""The projections to queries, keys and values.

Shapes: B rows, L tokens a row, D hidden_size, H heads, E width of a head, P projections.
"""

import jax
import jax.numpy as jnp


# By hand, for the gradients of all projections lie side by side, each padded with zeros, for two products in all: JAX
# would make two of each, and add up their results in memory. Padding is computed where it is read, a concatenation is
# not. In the forward pass one product would save nothing: its parts would have to be moved apart.
@jax.custom_vjp
def project(hidden_BxLxD: jax.Array, weight_PxHxExD: jax.Array) -> list[jax.Array]:
    """The P projections of hidden states, each [B, L, H, E], by a float32 weight, in the dtype of hidden states."""
    weight_PxHxExD = weight_PxHxExD.astype(hidden_BxLxD.dtype)
    return [jnp.einsum("BLD,HED->BLHE", hidden_BxLxD, weight_HxExD) for weight_HxExD in weight_PxHxExD]


def _forward(hidden_BxLxD, weight_PxHxExD):
    return project(hidden_BxLxD, weight_PxHxExD), (hidden_BxLxD, weight_PxHxExD)


def _backward(saved, gradients):
    hidden_BxLxD, weight_PxHxExD = saved
    projections, heads, width, size = weight_PxHxExD.shape
    padded = [
        jnp.pad(gradient_BxLxHxE, ((0, 0), (0, 0), (place * heads, (projections - 1 - place) * heads), (0, 0)))
        for place, gradient_BxLxHxE in enumerate(gradients)
    ]
    d_BxLxPHxE = sum(padded[1:], start=padded[0])
    weight_PHxExD = weight_PxHxExD.astype(hidden_BxLxD.dtype).reshape(-1, width, size)
    d_hidden_BxLxD = jnp.einsum("BLhE,hED->BLD", d_BxLxPHxE, weight_PHxExD)
    d_weight_PHxExD = jnp.einsum("BLhE,BLD->hED", d_BxLxPHxE, hidden_BxLxD, preferred_element_type=jnp.float32)
    return d_hidden_BxLxD, d_weight_PHxExD.reshape(weight_PxHxExD.shape)


project.defvjp(_forward, _backward)
