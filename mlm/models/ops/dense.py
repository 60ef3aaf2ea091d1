"""Matrix products with float32 parameters, whose gradients are float32 too.

Products are computed in the dtype of the activations. A parameter's gradient is a sum over all tokens, which a bfloat16
product accumulates in float32 anyway; JAX's own gradient would round it to bfloat16 at the end, these do not.

Shapes: ... any axes, D inputs, F outputs; B rows, L tokens per row, H heads, E head size, P projections; K predicted
tokens, C embedding size, V vocabulary size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_vjp
def matmul(inputs: jax.Array, kernel_DxF: jax.Array) -> jax.Array:
    """Returns inputs [..., D] times a float32 kernel, [..., F], in the dtype of the inputs.

    The kernel's gradient is float32.
    """
    return jnp.einsum("...D,DF->...F", inputs, kernel_DxF.astype(inputs.dtype))


def _matmul_backward(residuals, gradient):
    inputs, kernel_DxF = residuals
    d_inputs = jnp.einsum("...F,DF->...D", gradient, kernel_DxF.astype(gradient.dtype))
    d_kernel_DxF = jnp.einsum("...D,...F->DF", inputs, gradient, preferred_element_type=jnp.float32)
    return d_inputs, d_kernel_DxF


matmul.defvjp(lambda inputs, kernel_DxF: (matmul(inputs, kernel_DxF), (inputs, kernel_DxF)), _matmul_backward)


@jax.custom_vjp
def add_bias(values: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a float32 bias, which has the shape of the values' last axes, in the dtype of the values.

    The bias's gradient is float32.
    """
    return values + bias.astype(values.dtype).reshape((1,) * (values.ndim - bias.ndim) + bias.shape)


def _add_bias_backward(bias, gradient):
    return gradient, jnp.sum(gradient.astype(jnp.float32), axis=tuple(range(gradient.ndim - bias.ndim)))


add_bias.defvjp(lambda values, bias: (add_bias(values, bias), bias), _add_bias_backward)


@jax.custom_vjp
def tied_logits(hidden_BxKxC: jax.Array, embedding_VxC: jax.Array) -> jax.Array:
    """Returns float32 logits_BxKxV: hidden states times the float32 embeddings of the vocabulary.

    The embeddings' gradient is float32.
    """
    embedding_VxC = embedding_VxC.astype(hidden_BxKxC.dtype)
    return jnp.einsum("BKC,VC->BKV", hidden_BxKxC, embedding_VxC, preferred_element_type=jnp.float32)


def _tied_logits_backward(residuals, d_logits_BxKxV):
    hidden_BxKxC, embedding_VxC = residuals
    dtype = hidden_BxKxC.dtype
    # Training rounds the logits to this dtype, so their gradients hold no more digits; float32 ones would make both
    # products float32.
    d_logits_BxKxV = d_logits_BxKxV.astype(dtype)
    d_hidden_BxKxC = jnp.einsum("BKV,VC->BKC", d_logits_BxKxV, embedding_VxC.astype(dtype))
    d_embedding_VxC = jnp.einsum("BKV,BKC->VC", d_logits_BxKxV, hidden_BxKxC, preferred_element_type=jnp.float32)
    return d_hidden_BxKxC, d_embedding_VxC


tied_logits.defvjp(
    lambda hidden, embedding: (tied_logits(hidden, embedding), (hidden, embedding)), _tied_logits_backward
)


@jax.custom_vjp
def qkv_projection(hidden_BxLxD: jax.Array, weight_PxHxExD: jax.Array) -> list[jax.Array]:
    """Returns the P projections of the hidden states, [B, L, H, E] each, by a float32 weight, in the hidden dtype.

    The backward pass makes two products for all projections together, where JAX's own gradient makes two for each and
    adds up the results in memory. The weight's gradient is float32.
    """
    weight_PxHxExD = weight_PxHxExD.astype(hidden_BxLxD.dtype)
    # One product would save nothing in the forward pass, because its parts would have to be copied apart.
    return [jnp.einsum("BLD,HED->BLHE", hidden_BxLxD, weight_HxExD) for weight_HxExD in weight_PxHxExD]


def _qkv_projection_forward(hidden_BxLxD, weight_PxHxExD):
    return qkv_projection(hidden_BxLxD, weight_PxHxExD), (hidden_BxLxD, weight_PxHxExD)


def _qkv_projection_backward(residuals, gradients):
    hidden_BxLxD, weight_PxHxExD = residuals
    num_projections, num_heads, head_size, hidden_size = weight_PxHxExD.shape
    # Concatenated along the heads, as a sum of zero-padded arrays: padding fuses into the product, a concatenation is
    # copied.
    padded = [
        jnp.pad(gradient_BxLxHxE, ((0, 0), (0, 0), (i * num_heads, (num_projections - 1 - i) * num_heads), (0, 0)))
        for i, gradient_BxLxHxE in enumerate(gradients)
    ]
    d_BxLxPHxE = sum(padded[1:], start=padded[0])
    weight_PHxExD = weight_PxHxExD.astype(hidden_BxLxD.dtype).reshape(-1, head_size, hidden_size)
    d_hidden_BxLxD = jnp.einsum("BLhE,hED->BLD", d_BxLxPHxE, weight_PHxExD)
    d_weight_PHxExD = jnp.einsum("BLhE,BLD->hED", d_BxLxPHxE, hidden_BxLxD, preferred_element_type=jnp.float32)
    return d_hidden_BxLxD, d_weight_PHxExD.reshape(weight_PxHxExD.shape)


qkv_projection.defvjp(_qkv_projection_forward, _qkv_projection_backward)


class Dense(nn.Module):
    """`nn.Dense` with `matmul` and `add_bias`: a kernel [D, F] and, with `use_bias`, a bias [F]."""

    features: int
    dtype: Any
    kernel_init: nn.initializers.Initializer
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., F]."""
        kernel_DxF = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), jnp.float32)
        outputs = matmul(inputs.astype(self.dtype), kernel_DxF)
        if self.use_bias:
            outputs = add_bias(outputs, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))
        return outputs
