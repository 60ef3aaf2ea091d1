"""One layer of the encoder: attention and a feed-forward network.

Shapes: B rows, L tokens per row, Q of them whose outputs are computed (all, or those at given positions),
D hidden_size, F intermediate_size, H heads, E = D / H head size.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlm.models.config import EncoderConfig, Layer
from mlm.models.families import PositionEmbedding
from mlm.models.ops.activation import activation
from mlm.models.ops.attention import attend, uses_blocks
from mlm.models.ops.dense import Dense, add_bias, qkv_projection
from mlm.models.ops.dropout import Dropout
from mlm.models.ops.gather import gather_tokens
from mlm.models.ops.rotary import Rotation, gather_rotation, rotate


@dataclasses.dataclass(frozen=True)
class Execution:
    """Choices of speed and memory, which change results by rounding only.

    Attributes:
      attention: the implementation, one of `settings.IMPLEMENTATIONS`.
      remat: what the backward pass recomputes, one of `settings.REMATS`. "none": what the compiler chooses. "dots": the
        activation of the feed-forward network, so that its largest array is saved once instead of twice. "full": each
        layer from its input.
    """

    attention: str = "plain"
    remat: str = "none"


def initializer(config: EncoderConfig, *, is_output: bool = False) -> nn.initializers.Initializer:
    """Returns the family's initializer: normal, or truncated normal for ModernBERT.

    ModernBERT scales it by (2 num_hidden_layers)^-0.5 if `is_output`: in matrices before a residual sum or the logits.
    """
    if config.initializer_cutoff_factor is None:
        return nn.initializers.normal(config.initializer_range)
    cutoff = config.initializer_cutoff_factor
    scale = (2 * config.num_hidden_layers) ** -0.5 if is_output else 1.0
    return nn.initializers.truncated_normal(config.initializer_range * scale, lower=-cutoff, upper=cutoff)


def make_dense(
    features: int,
    *,
    config: EncoderConfig,
    dtype: Any,
    name: str | None = None,
    use_bias: bool = True,
    is_output: bool = False,
) -> Dense:
    """Returns a dense layer with the family's initializer."""
    kernel_init = initializer(config, is_output=is_output)
    return Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=kernel_init, name=name)


def make_norm(config: EncoderConfig, *, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """Returns the family's layer norm."""
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=dtype,
        use_bias=config.norm_bias,
        # E[x^2] - E[x]^2 reads the array once less, but cancels where the mean is large: its error is about 2^-24 of
        # the squared mean, which is less than the rounding of bfloat16 inputs, and too much for float32.
        use_fast_variance=dtype == jnp.bfloat16,
        name=name,
    )


def _dropout_at(site: str, module: nn.Module, values: jax.Array, *, deterministic: bool) -> jax.Array:
    """Applies dropout if the family has it at this site of `Family.dropout`."""
    rate = module.config.dropout_rate(site)
    return Dropout(rate)(values, deterministic=deterministic) if rate else values


@jax.custom_vjp
def _materialize(values: jax.Array) -> jax.Array:
    """Returns the values behind a barrier, which keeps the compiler from storing an activation beside its input.

    The gradient of JAX's own barrier is a barrier, behind which the sum for the bias's gradient reads the array again:
    11 % more bytes and 8 % more cycles in a feed-forward network of the reference run, for a TPU v3 in bfloat16.
    """
    return jax.lax.optimization_barrier(values)


_materialize.defvjp(lambda values: (_materialize(values), None), lambda _, gradient: (gradient,))


class QueryKeyValue(nn.Module):
    """The projections to queries, keys and values: one weight [3D, D] (outputs first, as in PyTorch), in that order."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, positions_BxQ: jax.Array | None) -> list[jax.Array]:
        """Returns queries [B, Q, H, E] of the tokens at `positions_BxQ`, keys and values [B, L, H, E] of all tokens."""
        cfg = self.config
        size, shape = cfg.hidden_size, (3, cfg.num_attention_heads, cfg.head_size)
        weight = self.param("weight", initializer(cfg), (3 * size, size), jnp.float32)
        weight_3xHxExD = weight.reshape(*shape, size)
        hidden_BxLxD = hidden_BxLxD.astype(self.dtype)
        if positions_BxQ is None:
            projections = qkv_projection(hidden_BxLxD, weight_3xHxExD)
        else:
            query_hidden_BxQxD = gather_tokens(hidden_BxLxD, positions_BxQ)
            projections = qkv_projection(query_hidden_BxQxD, weight_3xHxExD[:1])
            projections += qkv_projection(hidden_BxLxD, weight_3xHxExD[1:])
        if cfg.attention_bias:
            biases = self.param("bias", nn.initializers.zeros, (3 * size,), jnp.float32).reshape(shape)
            projections = [add_bias(x, bias_HxE) for x, bias_HxE in zip(projections, biases, strict=True)]
        return projections


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al., arXiv:1706.03762)."""

    config: EncoderConfig
    dtype: Any
    isolate: bool
    window: int | None
    implementation: str

    @nn.compact
    def __call__(
        self,
        hidden_BxLxD: jax.Array,
        segment_ids_BxL: jax.Array,
        rotation: Rotation | None,
        positions_BxQ: jax.Array | None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Returns attention's output [B, Q, D] for the tokens at `positions_BxQ`, or for all tokens if that is None."""
        cfg = self.config
        selected_BxQ = None
        if uses_blocks(self.window, length=hidden_BxLxD.shape[1]):
            # Blocks need all queries; those at some positions would need the scores of all keys.
            selected_BxQ, positions_BxQ = positions_BxQ, None
        query_BxQxHxE, key_BxLxHxE, value_BxLxHxE = QueryKeyValue(cfg, self.dtype, name="qkv")(
            hidden_BxLxD, positions_BxQ
        )
        if rotation is not None:
            interleaved = cfg.family.position_embedding is PositionEmbedding.ROTARY_INTERLEAVED
            query_rotation = rotation if positions_BxQ is None else gather_rotation(rotation, positions_BxQ)
            query_BxQxHxE = rotate(query_BxQxHxE, query_rotation, interleaved=interleaved)
            key_BxLxHxE = rotate(key_BxLxHxE, rotation, interleaved=interleaved)
            if cfg.rotary_value:
                value_BxLxHxE = rotate(value_BxLxHxE, rotation, interleaved=interleaved)
        has_dropout = cfg.attention_probs_dropout_prob > 0 and not deterministic
        output_BxQxHxE = attend(
            query_BxQxHxE,
            key_BxLxHxE,
            value_BxLxHxE,
            segment_ids_BxK=segment_ids_BxL,
            isolate=self.isolate,
            query_positions_BxQ=positions_BxQ,
            window=self.window,
            dropout_rate=cfg.attention_probs_dropout_prob,
            dropout_key=self.make_rng("dropout") if has_dropout else None,
            implementation=self.implementation,
        )
        output_BxQxD = output_BxQxHxE.reshape(*output_BxQxHxE.shape[:2], cfg.hidden_size)
        if selected_BxQ is not None:
            output_BxQxD = gather_tokens(output_BxQxD, selected_BxQ)
        return make_dense(
            cfg.hidden_size,
            config=cfg,
            dtype=self.dtype,
            use_bias=cfg.attention_bias,
            is_output=True,
            name="output",
        )(output_BxQxD)


class FeedForward(nn.Module):
    """Two dense layers with an activation between them; gated in some families (Shazeer, arXiv:2002.05202)."""

    config: EncoderConfig
    dtype: Any
    recompute_activation: bool

    @nn.compact
    def __call__(self, hidden_BxQxD: jax.Array, *, deterministic: bool) -> jax.Array:
        """Returns [B, Q, D]."""
        cfg = self.config
        dense = functools.partial(make_dense, config=cfg, dtype=self.dtype, use_bias=cfg.mlp_bias)
        act = activation(cfg.hidden_act, save_input=self.recompute_activation)

        def output(self: nn.Module, inner_BxQxF: jax.Array) -> jax.Array:
            if cfg.family.gated:
                inner_BxQxF, gate_BxQxF = jnp.split(inner_BxQxF, 2, axis=-1)
                inner_BxQxF = act(inner_BxQxF) * gate_BxQxF
            else:
                inner_BxQxF = act(inner_BxQxF)
            inner_BxQxF = _dropout_at("feed_forward_inner", self, inner_BxQxF, deterministic=deterministic)
            return dense(cfg.hidden_size, name="output", is_output=True)(inner_BxQxF)

        inner_BxQxF = dense((1 + cfg.family.gated) * cfg.intermediate_size, name="inner")(hidden_BxQxD)
        if self.recompute_activation:
            return nn.remat(output)(self, _materialize(inner_BxQxF))
        return output(self, inner_BxQxF)


class Block(nn.Module):
    """Attention, then the feed-forward network, each added to its input, with a norm before each or after each sum."""

    config: EncoderConfig
    dtype: Any
    isolate: bool
    layer: Layer
    execution: Execution

    @nn.compact
    def __call__(
        self,
        hidden_BxLxD: jax.Array,
        segment_ids_BxL: jax.Array,
        rotation: Rotation | None,
        positions_BxQ: jax.Array | None = None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Returns the layer's output [B, Q, D] for the tokens at `positions_BxQ`, or for all tokens if that is None.

        Keys and values are computed for all tokens, everything else for these Q only.
        """
        cfg = self.config
        attention = SelfAttention(
            cfg, self.dtype, self.isolate, self.layer.window, self.execution.attention, name="attention"
        )
        feed_forward = FeedForward(cfg, self.dtype, self.execution.remat == "dots", name="feed_forward")
        feed_forward_norm = make_norm(cfg, dtype=self.dtype, name="feed_forward_norm")
        attention_norm = (
            make_norm(cfg, dtype=self.dtype, name="attention_norm")
            if self.layer.attention_norm
            else lambda values: values
        )

        def attention_residual(values_BxLxD: jax.Array) -> jax.Array:
            residual = attention(values_BxLxD, segment_ids_BxL, rotation, positions_BxQ, deterministic=deterministic)
            return _dropout_at("attention_output", self, residual, deterministic=deterministic)

        def feed_forward_residual(values_BxQxD: jax.Array) -> jax.Array:
            residual = feed_forward(values_BxQxD, deterministic=deterministic)
            return _dropout_at("feed_forward_output", self, residual, deterministic=deterministic)

        hidden_BxQxD = hidden_BxLxD if positions_BxQ is None else gather_tokens(hidden_BxLxD, positions_BxQ)
        if cfg.family.norm_first:
            hidden_BxQxD += attention_residual(attention_norm(hidden_BxLxD))
            return hidden_BxQxD + feed_forward_residual(feed_forward_norm(hidden_BxQxD))
        hidden_BxQxD = attention_norm(hidden_BxQxD + attention_residual(hidden_BxLxD))
        return feed_forward_norm(hidden_BxQxD + feed_forward_residual(hidden_BxQxD))
