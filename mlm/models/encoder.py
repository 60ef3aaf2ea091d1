"""A masked language model in Linen, with the semantics of transformers' `...ForMaskedLM` of its config's family.

Shapes: B rows, L tokens a row, K predicted positions a row, C width of the embeddings, D hidden_size, F
intermediate_size, H heads, E = D / H, V vocab_size. In attention, M is L again, on the side of keys.

Parameters are float32; `dtype` is that of the matrix multiplications and of what flows between them. Layer
norm's statistics, softmax, the sum of embeddings and, but in training, the logits are float32 whatever `dtype` is.

Layers differ by what `config.Layer` says and by nothing else, so that those which are alike can be scanned over.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlm.errors import UserError
from mlm.models.activation import activation
from mlm.models.attention import attend
from mlm.models.config import EncoderConfig, Layer
from mlm.models.dropout import Dropout
from mlm.models.execution import Execution, run_layers
from mlm.models.families import Positions
from mlm.models.rotary import Rotation, rotate, rotation
from mlm.models.segments import places, segments


def _initializer(config: EncoderConfig, *, last: bool = False) -> nn.initializers.Initializer:
    """Normal draws; ModernBERT's are cut off, and less wide in the `last` matrix before a sum or the logits."""
    if config.initializer_cutoff_factor is None:
        return nn.initializers.normal(config.initializer_range)
    cutoff = config.initializer_cutoff_factor
    scale = (2 * config.num_hidden_layers) ** -0.5 if last else 1.0
    return nn.initializers.truncated_normal(config.initializer_range * scale, lower=-cutoff, upper=cutoff)


def _dense(
    features: int,
    *,
    config: EncoderConfig,
    dtype: Any,
    name: str | None = None,
    use_bias: bool = True,
    last: bool = False,
) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=_initializer(config, last=last), name=name)


def _norm(config: EncoderConfig, *, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=dtype,
        use_bias=config.norm_bias,
        # E[x^2] - E[x]^2 saves a pass over memory, and cancels when the mean is large: then its error is some 2^-24 of
        # the squared mean, which is less than what rounding the values to bfloat16 did, and much in float32.
        use_fast_variance=dtype == jnp.bfloat16,
        name=name,
    )


def _embed(rows: int, *, config: EncoderConfig, zero_row: int | None = None) -> nn.Embed:
    """Return a table that starts at random but for one row, PyTorch's `padding_idx`, which starts at zero.

    PyTorch also stops the gradient of looking that row up. Here it is zero by itself: no loss is taken at
    padding, and no token attends to it.
    """

    def init(key, shape, dtype):
        table = _initializer(config)(key, shape, dtype)
        return table if zero_row is None else table.at[zero_row].set(0)

    # float32 whatever the model's dtype: gradients of frequent tokens are sums of very many terms.
    return nn.Embed(rows, config.embedding_width, embedding_init=init, dtype=jnp.float32)


def _drop(module: nn.Module, values: jax.Array, *, place: str, deterministic: bool) -> jax.Array:
    """Dropout at a place that `Family.dropout` may name."""
    rate = module.config.dropout(place)
    return Dropout(rate)(values, deterministic=deterministic) if rate else values


class Embeddings(nn.Module):
    """Word, position and token type embeddings, as far as the family has them, summed, normalized and projected."""

    config: EncoderConfig
    dtype: Any

    def setup(self):
        """Make the tables, which `MaskedLM` must reach, the norm and the projection."""
        cfg = self.config
        self.word = _embed(cfg.vocab_size, config=cfg, zero_row=cfg.pad_token_id if cfg.family.zero_pad_row else None)
        if not cfg.family.positions.rotary:
            after_pad = cfg.family.positions is Positions.AFTER_PAD
            self.position = _embed(
                cfg.max_position_embeddings, config=cfg, zero_row=cfg.pad_token_id if after_pad else None
            )
        if cfg.type_vocab_size:
            self.token_type = _embed(cfg.type_vocab_size, config=cfg)
        self.norm = _norm(cfg, dtype=self.dtype)
        self.dropout = Dropout(cfg.dropout("embedding"))
        if cfg.has_projection:
            self.project = _dense(cfg.hidden_size, config=cfg, dtype=self.dtype)

    def __call__(
        self,
        inputs_BxL: jax.Array,
        *,
        places_BxL: jax.Array,
        token_types_BxL: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """Return hidden_BxLxD of token ids; `places_BxL` are rows of the table of positions."""
        cfg = self.config
        sum_BxLxC = self.word(inputs_BxL)
        if cfg.type_vocab_size:
            sum_BxLxC += self.token_type(jnp.zeros((1, 1), jnp.int32) if token_types_BxL is None else token_types_BxL)
        if not cfg.family.positions.rotary:
            sum_BxLxC += self.position(places_BxL)
        hidden_BxLxC = self.dropout(self.norm(sum_BxLxC), deterministic=deterministic)
        return self.project(hidden_BxLxC) if cfg.has_projection else hidden_BxLxC


class QueryKeyValue(nn.Module):
    """The three projections of attention: one parameter of columns for queries, keys and values, in that order."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array) -> list[jax.Array]:
        """Return queries, keys and values, each [B, L, H, E]."""
        cfg = self.config
        size, shape = cfg.hidden_size, (3, cfg.num_attention_heads, cfg.head_size)
        kernel = self.param("kernel", _initializer(cfg), (size, 3 * size), jnp.float32)
        kernel_Dx3xHxE = kernel.astype(self.dtype).reshape(size, *shape)
        # Three products, for heads and parts of the result of one would have to be moved apart in memory.
        parts = [jnp.einsum("BLD,DHE->BLHE", hidden_BxLxD, kernel_Dx3xHxE[:, part]) for part in range(3)]
        if cfg.attention_bias:
            bias = self.param("bias", nn.initializers.zeros, (3 * size,), jnp.float32)
            bias_3x1x1xHxE = bias.astype(self.dtype).reshape(3, 1, 1, *shape[1:])
            parts = [part + bias_1x1xHxE for part, bias_1x1xHxE in zip(parts, bias_3x1x1xHxE, strict=True)]
        return parts


class SelfAttention(nn.Module):
    """Multi-head attention of every token to those it may see (Vaswani et al., arXiv:1706.03762)."""

    config: EncoderConfig
    dtype: Any
    isolate: bool
    window: int | None
    implementation: str

    @nn.compact
    def __call__(
        self, hidden_BxLxD: jax.Array, segments_BxL: jax.Array, rotation: Rotation | None, *, deterministic: bool
    ) -> jax.Array:
        """Return the heads' outputs, projected: [B, L, D]."""
        cfg = self.config
        dense = functools.partial(_dense, config=cfg, dtype=self.dtype, use_bias=cfg.attention_bias)
        query_BxLxHxE, key_BxMxHxE, value_BxMxHxE = QueryKeyValue(cfg, self.dtype, name="qkv")(hidden_BxLxD)
        if rotation is not None:
            turn = functools.partial(rotate, rotation=rotation, pairs=cfg.family.positions is Positions.ROTARY_PAIRS)
            query_BxLxHxE, key_BxMxHxE = turn(query_BxLxHxE), turn(key_BxMxHxE)
            value_BxMxHxE = turn(value_BxMxHxE) if cfg.rotary_value else value_BxMxHxE
        dropped = cfg.attention_probs_dropout_prob > 0 and not deterministic
        output_BxLxHxE = attend(
            query_BxLxHxE,
            key_BxMxHxE,
            value_BxMxHxE,
            segments_BxL=segments_BxL,
            isolate=self.isolate,
            window=self.window,
            dropout_rate=cfg.attention_probs_dropout_prob,
            dropout_key=self.make_rng("dropout") if dropped else None,
            implementation=self.implementation,
        )
        return dense(cfg.hidden_size, name="output", last=True)(output_BxLxHxE.reshape(hidden_BxLxD.shape))


class FeedForward(nn.Module):
    """Two dense layers with an activation between them, applied to each token; gated in some families."""

    config: EncoderConfig
    dtype: Any
    recompute: bool

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, *, deterministic: bool) -> jax.Array:
        """Return [B, L, D]. With `recompute` the activation is computed anew in the backward pass."""
        cfg = self.config
        dense = functools.partial(_dense, config=cfg, dtype=self.dtype, use_bias=cfg.mlp_bias)
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
        if self.recompute:
            # The barrier keeps the compiler from writing the activation beside what it is of.
            return nn.remat(finish)(self, jax.lax.optimization_barrier(inner_BxLxF))
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
        self, hidden_BxLxD: jax.Array, segments_BxL: jax.Array, rotation: Rotation | None, *, deterministic: bool
    ) -> jax.Array:
        """Return the next hidden_BxLxD."""
        cfg = self.config
        how = self.execution
        attention = SelfAttention(cfg, self.dtype, self.isolate, self.layer.window, how.attention, name="attention")
        feed_forward = FeedForward(cfg, self.dtype, how.remat == "dots", name="feed_forward")
        feed_forward_norm = _norm(cfg, dtype=self.dtype, name="feed_forward_norm")
        attention_norm = (
            _norm(cfg, dtype=self.dtype, name="attention_norm") if self.layer.attention_norm else lambda values: values
        )
        drop = functools.partial(_drop, self, deterministic=deterministic)

        def attended(values_BxLxD: jax.Array) -> jax.Array:
            update_BxLxD = attention(values_BxLxD, segments_BxL, rotation, deterministic=deterministic)
            return drop(update_BxLxD, place="attention_output")

        def fed_forward(values_BxLxD: jax.Array) -> jax.Array:
            return drop(feed_forward(values_BxLxD, deterministic=deterministic), place="feed_forward_output")

        if cfg.family.norm_first:
            hidden_BxLxD = hidden_BxLxD + attended(attention_norm(hidden_BxLxD))
            return hidden_BxLxD + fed_forward(feed_forward_norm(hidden_BxLxD))
        hidden_BxLxD = attention_norm(hidden_BxLxD + attended(hidden_BxLxD))
        return feed_forward_norm(hidden_BxLxD + fed_forward(hidden_BxLxD))


class Head(nn.Module):
    """From hidden states to logits: dense, activation, norm, a decoder and its bias.

    The decoder is the word embeddings, or a table of the same shape where the config does not tie them.
    """

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BxKxD: jax.Array, embedding_VxC: jax.Array, *, logits_dtype: Any) -> jax.Array:
        """Return logits_BxKxV."""
        cfg = self.config
        act = activation(cfg.family.head_act or cfg.classifier_activation or cfg.hidden_act)
        dense = _dense(
            cfg.embedding_width,
            config=cfg,
            dtype=self.dtype,
            use_bias=cfg.classifier_bias,
            last=True,
            name="dense",
        )
        hidden_BxKxC = _norm(cfg, dtype=self.dtype, name="norm")(act(dense(hidden_BxKxD)))
        if not cfg.tie_word_embeddings:
            embedding_VxC = self.param("decoder", _initializer(cfg, last=True), embedding_VxC.shape, jnp.float32)
        logits_BxKxV = jnp.einsum(
            "BKC,VC->BKV", hidden_BxKxC, embedding_VxC.astype(self.dtype), preferred_element_type=jnp.float32
        )
        if cfg.decoder_bias:
            bias_V = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,), jnp.float32)
            logits_BxKxV += bias_V[None, None, :]
        return logits_BxKxV.astype(logits_dtype)


class MaskedLM(nn.Module):
    """The whole model. Its parameters are `init(key, inputs_BxL)["params"]`, laid out as `weights` says.

    With a `begin_id` each document of a row is on its own: attention stays inside it and positions start anew, as
    `segments` finds them. Without one a row is one document, whatever is in it. The parameters are the same.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    begin_id: int | None = None
    execution: Execution = Execution()

    def setup(self):
        """Make the parts."""
        cfg = self.config
        self.embeddings = Embeddings(cfg, self.dtype)
        # Layers that share their parameters are alike: the last one stands for all.
        blocks = {layer.block: layer for layer in cfg.layers}
        self.layer = [self._block(blocks[block]) for block in sorted(blocks)]
        if cfg.family.norm_first:
            self.final_norm = _norm(cfg, dtype=self.dtype)
        self.head = Head(cfg, self.dtype)

    def __call__(
        self,
        inputs_BxL: jax.Array,
        *,
        positions_BxK: jax.Array | None = None,
        token_types_BxL: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Return logits of the tokens at `positions_BxK`, [B, K, V], or of all of them, [B, L, V].

        They are float32, but of the model's `dtype` in training, when `deterministic` is False.

        `inputs_BxL` are token ids; those equal to the config's pad_token_id are padding. `token_types_BxL` are all 0
        if not given, and count for nothing in families that have none. With `deterministic=False` a "dropout" key is
        needed. Raises `UserError` for rows longer than the positions allow; an id past the vocabulary or a position
        past the row gives NaN.
        """
        cfg = self.config
        if inputs_BxL.shape[1] > cfg.max_seq_length:
            raise UserError(
                f"rows of {inputs_BxL.shape[1]} tokens are too long for a model of max_position_embeddings="
                f"{cfg.max_position_embeddings}, which takes at most {cfg.max_seq_length}"
            )
        segments_BxL, counts_BxL = segments(inputs_BxL, pad_id=cfg.pad_token_id, begin_id=self.begin_id)
        if cfg.family.positions is Positions.AFTER_PAD:
            places_BxL = counts_BxL + cfg.pad_token_id
        else:
            places_BxL = places(inputs_BxL, begin_id=self.begin_id)
        hidden_BxLxD = self.embeddings(
            inputs_BxL, places_BxL=places_BxL, token_types_BxL=token_types_BxL, deterministic=deterministic
        )
        rotations = self._rotations(places_BxL)
        if self.is_initializing() or not (self.execution.scan_layers or self.execution.remat == "full"):
            for layer in cfg.layers:
                hidden_BxLxD = self.layer[layer.block](
                    hidden_BxLxD, segments_BxL, rotations[layer.rope_theta], deterministic=deterministic
                )
        else:

            def apply_layer(layer: Layer, params: Any, hidden_BxLxD: jax.Array, key: jax.Array | None) -> jax.Array:
                return self._block(layer, parent=None).apply(
                    {"params": params},
                    hidden_BxLxD,
                    segments_BxL,
                    rotations[layer.rope_theta],
                    deterministic=deterministic,
                    rngs={} if key is None else {"dropout": key},
                )

            hidden_BxLxD = run_layers(
                apply_layer,
                {layer.block: self.variables["params"][f"layer_{layer.block}"] for layer in cfg.layers},
                hidden_BxLxD,
                layers=cfg.layers,
                key=None if deterministic else self.make_rng("dropout"),
                execution=self.execution,
            )
        if positions_BxK is not None:
            hidden_BxLxD = jnp.take_along_axis(hidden_BxLxD, positions_BxK[:, :, None], axis=1)
        if cfg.family.norm_first:
            hidden_BxLxD = self.final_norm(hidden_BxLxD)
        logits_dtype = jnp.float32 if deterministic else self.dtype
        return self.head(hidden_BxLxD, self.embeddings.word.embedding, logits_dtype=logits_dtype)

    def _block(self, layer: Layer, **module_args: Any) -> Block:
        return Block(self.config, self.dtype, self.begin_id is not None, layer, self.execution, **module_args)

    def _rotations(self, places_BxL: jax.Array) -> dict[float | None, Rotation | None]:
        """What turns queries and keys, for each base that a layer has; layers with the same base share it."""
        cfg = self.config
        exact = cfg.family.positions is Positions.ROTARY_PAIRS
        thetas = {layer.rope_theta for layer in cfg.layers} - {None}
        return {None: None} | {
            theta: rotation(places_BxL, head_size=cfg.head_size, theta=theta, exact=exact) for theta in thetas
        }
