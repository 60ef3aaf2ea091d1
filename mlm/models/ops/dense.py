"""Products with parameters, and their gradients.

Parameters are float32, products are of the dtype of what they are applied to. By hand, for gradients of parameters are
sums over all tokens, which a product in bfloat16 adds up in float32 anyway: JAX would round them to bfloat16.

Shapes: ... any axes, D inputs, F outputs; B rows, L tokens a row, H heads of width E, P projections; K predicted
positions, C and V as in `encoder`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_vjp
def product(inputs: jax.Array, kernel_DxF: jax.Array) -> jax.Array:
    """[..., D] times a float32 kernel, [..., F] in the dtype of the inputs."""
    return jnp.einsum("...D,DF->...F", inputs, kernel_DxF.astype(inputs.dtype))


def _product_backward(saved, gradient):
    inputs, kernel_DxF = saved
    d_inputs = jnp.einsum("...F,DF->...D", gradient, kernel_DxF.astype(gradient.dtype))
    d_kernel_DxF = jnp.einsum("...D,...F->DF", inputs, gradient, preferred_element_type=jnp.float32)
    return d_inputs, d_kernel_DxF


product.defvjp(lambda inputs, kernel_DxF: (product(inputs, kernel_DxF), (inputs, kernel_DxF)), _product_backward)


@jax.custom_vjp
def add_bias(values: jax.Array, bias: jax.Array) -> jax.Array:
    """Values plus a float32 bias, of the shape of their last axes, in their dtype."""
    return values + bias.astype(values.dtype).reshape((1,) * (values.ndim - bias.ndim) + bias.shape)


def _add_bias_backward(bias, gradient):
    return gradient, jnp.sum(gradient.astype(jnp.float32), axis=tuple(range(gradient.ndim - bias.ndim)))


add_bias.defvjp(lambda values, bias: (add_bias(values, bias), bias), _add_bias_backward)


@jax.custom_vjp
def decode(hidden_BxKxC: jax.Array, embedding_VxC: jax.Array) -> jax.Array:
    """Logits_BxKxV, float32, by float32 embeddings; the product itself is of the dtype of the hidden states."""
    embedding_VxC = embedding_VxC.astype(hidden_BxKxC.dtype)
    return jnp.einsum("BKC,VC->BKV", hidden_BxKxC, embedding_VxC, preferred_element_type=jnp.float32)


def _decode_backward(saved, d_logits_BxKxV):
    hidden_BxKxC, embedding_VxC = saved
    dtype = hidden_BxKxC.dtype
    # In training logits are rounded to the dtype, and so are their gradients: float32 ones would hold nothing more, and
    # have both products made in float32.
    d_logits_BxKxV = d_logits_BxKxV.astype(dtype)
    d_hidden_BxKxC = jnp.einsum("BKV,VC->BKC", d_logits_BxKxV, embedding_VxC.astype(dtype))
    d_embedding_VxC = jnp.einsum("BKV,BKC->VC", d_logits_BxKxV, hidden_BxKxC, preferred_element_type=jnp.float32)
    return d_hidden_BxKxC, d_embedding_VxC


decode.defvjp(lambda hidden, embedding: (decode(hidden, embedding), (hidden, embedding)), _decode_backward)


# The gradients of all projections lie side by side, each padded with zeros, for two products in all: JAX
# would make two of each, and add up their results in memory. Padding is computed where it is read, a concatenation is
# not. In the forward pass one product would save nothing: its parts would have to be moved apart.
@jax.custom_vjp
def project(hidden_BxLxD: jax.Array, weight_PxHxExD: jax.Array) -> list[jax.Array]:
    """The P projections of hidden states, each [B, L, H, E], by a float32 weight, in the dtype of hidden states."""
    weight_PxHxExD = weight_PxHxExD.astype(hidden_BxLxD.dtype)
    return [jnp.einsum("BLD,HED->BLHE", hidden_BxLxD, weight_HxExD) for weight_HxExD in weight_PxHxExD]


def _project_forward(hidden_BxLxD, weight_PxHxExD):
    return project(hidden_BxLxD, weight_PxHxExD), (hidden_BxLxD, weight_PxHxExD)


def _project_backward(saved, gradients):
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


project.defvjp(_project_forward, _project_backward)


class Dense(nn.Module):
    """A kernel [D, F] and, with `use_bias`, a bias [F], named as Linen's own layer has them."""

    features: int
    dtype: Any
    kernel_init: nn.initializers.Initializer
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., D] -> [..., F]."""
        kernel_DxF = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), jnp.float32)
        outputs = product(inputs.astype(self.dtype), kernel_DxF)
        if self.use_bias:
            outputs = add_bias(outputs, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))
        return outputs
