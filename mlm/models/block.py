"""One layer of the encoder, and the parts that its ends are made of as well.

Shapes: B rows, L tokens a row, K of them that are chosen, D hidden_size, F intermediate_size, H heads, E = D / H. In
attention, L tokens ask and M answer, as in `attention`.

Layers differ by what `config.Layer` says and by nothing else, so that those which are alike can be scanned over.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mlm.models.config import EncoderConfig, Layer
from mlm.models.execution import REMAT_SAVED, Execution
from mlm.models.families import PositionEmbedding
from mlm.models.ops.activation import activation
from mlm.models.ops.attention import attend
from mlm.models.ops.dense import Dense, add_bias, project
from mlm.models.ops.dropout import Dropout
from mlm.models.ops.gather import gather_tokens
from mlm.models.ops.rotary import Rotation, rotate, rotation_at


def initializer(config: EncoderConfig, *, last: bool = False) -> nn.initializers.Initializer:
    """Normal draws; ModernBERT's are cut off, and less wide in the `last` matrix before a sum or the logits."""
    if config.initializer_cutoff_factor is None:
        return nn.initializers.normal(config.initializer_range)
    cutoff = config.initializer_cutoff_factor
    scale = (2 * config.num_hidden_layers) ** -0.5 if last else 1.0
    return nn.initializers.truncated_normal(config.initializer_range * scale, lower=-cutoff, upper=cutoff)


def make_dense(
    features: int,
    *,
    config: EncoderConfig,
    dtype: Any,
    name: str | None = None,
    use_bias: bool = True,
    last: bool = False,
) -> Dense:
    """A dense layer with the family's initial values; `last` before a sum or the logits."""
    return Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=initializer(config, last=last), name=name)


def make_norm(config: EncoderConfig, *, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """The family's layer norm."""
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=dtype,
        use_bias=config.norm_bias,
        # E[x^2] - E[x]^2 saves a pass over memory, and cancels when the mean is large: then its error is some 2^-24 of
        # the squared mean, which is less than what rounding the values to bfloat16 did, and much in float32.
        use_fast_variance=dtype == jnp.bfloat16,
        name=name,
    )


def _drop(module: nn.Module, values: jax.Array, *, place: str, deterministic: bool) -> jax.Array:
    """Dropout at a place that `Family.dropout` may name."""
    rate = module.config.dropout(place)
    return Dropout(rate)(values, deterministic=deterministic) if rate else values


# The barrier keeps the compiler from writing the activation beside what it is of. JAX would put one before the gradient
# as well, which then is read once more for its sum, the bias's.
@jax.custom_vjp
def _materialize(values: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(values)


_materialize.defvjp(lambda values: (_materialize(values), None), lambda _, gradient: (gradient,))


class QueryKeyValue(nn.Module):
    """The three projections of attention: one parameter, of queries, keys and values in that order.

    It is [3 * D, D], outputs first: as compilers want its gradient, and PyTorch has it.
    """

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BxMxD: jax.Array, positions_BxL: jax.Array | None) -> list[jax.Array]:
        """Return queries [B, L, H, E] of the tokens at some positions, keys and values [B, M, H, E] of all."""
        cfg = self.config
        size, shape = cfg.hidden_size, (3, cfg.num_attention_heads, cfg.head_size)
        weight = self.param("weight", initializer(cfg), (3 * size, size), jnp.float32)
        weight_3xHxExD = weight.reshape(*shape, size)
        hidden_BxMxD = hidden_BxMxD.astype(self.dtype)
        if positions_BxL is None:
            parts = project(hidden_BxMxD, weight_3xHxExD)
        else:
            asking_BxLxD = gather_tokens(hidden_BxMxD, positions_BxL)
            parts = project(asking_BxLxD, weight_3xHxExD[:1]) + project(hidden_BxMxD, weight_3xHxExD[1:])
        if cfg.attention_bias:
            bias = self.param("bias", nn.initializers.zeros, (3 * size,), jnp.float32)
            parts = [add_bias(part, bias_HxE) for part, bias_HxE in zip(parts, bias.reshape(shape), strict=True)]
        return [checkpoint_name(part, REMAT_SAVED) for part in parts]


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to those they may see (Vaswani et al., arXiv:1706.03762).

    Shapes as in `attention`: L tokens ask, M answer.
    """

    config: EncoderConfig
    dtype: Any
    isolate: bool
    window: int | None
    implementation: str

    @nn.compact
    def __call__(
        self,
        hidden_BxMxD: jax.Array,
        segments_BxM: jax.Array,
        rotation: Rotation | None,
        positions_BxL: jax.Array | None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Return the heads' outputs for the tokens at `positions_BxL` (None for all), projected: [B, L, D]."""
        cfg = self.config
        dense = functools.partial(make_dense, config=cfg, dtype=self.dtype, use_bias=cfg.attention_bias)
        query_BxLxHxE, key_BxMxHxE, value_BxMxHxE = QueryKeyValue(cfg, self.dtype, name="qkv")(
            hidden_BxMxD, positions_BxL
        )
        if rotation is not None:
            turn = functools.partial(rotate, pairs=cfg.family.positions is PositionEmbedding.ROTARY_INTERLEAVED)
            asking = rotation if positions_BxL is None else rotation_at(rotation, positions_BxL)
            query_BxLxHxE, key_BxMxHxE = turn(query_BxLxHxE, asking), turn(key_BxMxHxE, rotation)
            value_BxMxHxE = turn(value_BxMxHxE, rotation) if cfg.rotary_value else value_BxMxHxE
        dropped = cfg.attention_probs_dropout_prob > 0 and not deterministic
        output_BxLxHxE = attend(
            query_BxLxHxE,
            key_BxMxHxE,
            value_BxMxHxE,
            segments_BxM=segments_BxM,
            isolate=self.isolate,
            positions_BxL=positions_BxL,
            window=self.window,
            dropout_rate=cfg.attention_probs_dropout_prob,
            dropout_key=self.make_rng("dropout") if dropped else None,
            implementation=self.implementation,
        )
        return dense(cfg.hidden_size, name="output", last=True)(
            output_BxLxHxE.reshape(*output_BxLxHxE.shape[:2], cfg.hidden_size)
        )


class FeedForward(nn.Module):
    """Two dense layers with an activation between them, applied to each token; gated in some families."""

    config: EncoderConfig
    dtype: Any
    recompute: bool

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, *, deterministic: bool) -> jax.Array:
        """Return [B, L, D]. With `recompute` the activation is computed anew in the backward pass."""
        cfg = self.config
        dense = functools.partial(make_dense, config=cfg, dtype=self.dtype, use_bias=cfg.mlp_bias)
        act = activation(cfg.hidden_act, save_input=self.recompute)

        def finish(self: nn.Module, inner_BxLxF: jax.Array) -> jax.Array:
            if cfg.family.gated:
                inner_BxLxF, gate_BxLxF = jnp.split(inner_BxLxF, 2, axis=-1)
                inner_BxLxF = act(inner_BxLxF) * gate_BxLxF
            else:
                inner_BxLxF = act(inner_BxLxF)
            inner_BxLxF = _drop(self, inner_BxLxF, place="feed_forward_inner", deterministic=deterministic)
            return dense(cfg.hidden_size, name="output", last=True)(inner_BxLxF)

        inner_BxLxF = dense((1 + cfg.family.gated) * cfg.intermediate_size, name="inner")(hidden_BxLxD)
        inner_BxLxF = checkpoint_name(inner_BxLxF, REMAT_SAVED)
        if self.recompute:
            return nn.remat(finish)(self, _materialize(inner_BxLxF))
        return finish(self, inner_BxLxF)


class Block(nn.Module):
    """One layer: attention, then the feed-forward net, each added to its input, with a norm after or before."""

    config: EncoderConfig
    dtype: Any
    isolate: bool
    layer: Layer
    execution: Execution

    @nn.compact
    def __call__(
        self,
        hidden_BxLxD: jax.Array,
        segments_BxL: jax.Array,
        rotation: Rotation | None,
        positions_BxK: jax.Array | None = None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Return the next hidden_BxLxD, or hidden_BxKxD of the tokens at some positions."""
        cfg = self.config
        how = self.execution
        attention = SelfAttention(cfg, self.dtype, self.isolate, self.layer.window, how.attention, name="attention")
        feed_forward = FeedForward(cfg, self.dtype, how.remat == "dots", name="feed_forward")
        feed_forward_norm = make_norm(cfg, dtype=self.dtype, name="feed_forward_norm")
        attention_norm = (
            make_norm(cfg, dtype=self.dtype, name="attention_norm")
            if self.layer.attention_norm
            else lambda values: values
        )
        drop = functools.partial(_drop, self, deterministic=deterministic)

        def attended(values_BxLxD: jax.Array) -> jax.Array:
            update = attention(values_BxLxD, segments_BxL, rotation, positions_BxK, deterministic=deterministic)
            return drop(update, place="attention_output")

        def fed_forward(values_BxLxD: jax.Array) -> jax.Array:
            return drop(feed_forward(values_BxLxD, deterministic=deterministic), place="feed_forward_output")

        # Of the positions that are asked for alone, [B, K, D], from here on.
        asking = hidden_BxLxD if positions_BxK is None else gather_tokens(hidden_BxLxD, positions_BxK)
        if cfg.family.norm_first:
            hidden = checkpoint_name(asking + attended(attention_norm(hidden_BxLxD)), REMAT_SAVED)
            return hidden + fed_forward(feed_forward_norm(hidden))
        hidden = attention_norm(checkpoint_name(asking + attended(hidden_BxLxD), REMAT_SAVED))
        return feed_forward_norm(checkpoint_name(hidden + fed_forward(hidden), REMAT_SAVED))
