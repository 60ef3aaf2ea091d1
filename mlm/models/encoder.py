"""A masked language model in Linen, with the semantics of transformers' `...ForMaskedLM` of its config's family.

Shapes: B rows, L tokens a row, K predicted positions a row, C width of the embeddings, D hidden_size, F
intermediate_size, H heads, E = D / H, V vocab_size. In attention, M is L again, on the side of keys.

Parameters are float32; `dtype` is that of the matrix multiplications and of what flows between them. Layer
norm's statistics, softmax, the sum of embeddings and the logits are float32 whatever `dtype` is.

Layers differ by what `config.Layer` says and by nothing else, so that those which are alike can be scanned over.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlm.errors import UserError
from mlm.models.attention import attend
from mlm.models.config import ACTIVATIONS, EncoderConfig, Layer
from mlm.models.dropout import Dropout
from mlm.models.families import Positions
from mlm.models.rotary import Rotation, rotate, rotation

_FUNCTIONS = {
    # The exact GELU, x * Phi(x) (Hendrycks and Gimpel, arXiv:1606.08415), and its tanh approximation.
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def _activation(name: str) -> Callable[[jax.Array], jax.Array]:
    return _FUNCTIONS[ACTIVATIONS[name]]


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
    # The two-pass variance: E[x^2] - E[x]^2 cancels when the mean is large.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=dtype, use_bias=config.norm_bias, use_fast_variance=False, name=name
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


class SelfAttention(nn.Module):
    """Multi-head attention of every token to those it may see (Vaswani et al., arXiv:1706.03762)."""

    config: EncoderConfig
    dtype: Any
    isolate: bool
    window: int | None

    @nn.compact
    def __call__(
        self, hidden_BxLxD: jax.Array, segments_BxL: jax.Array, rotation: Rotation | None, *, deterministic: bool
    ) -> jax.Array:
        """Return the heads' outputs, projected: [B, L, D]."""
        cfg = self.config
        dense = functools.partial(_dense, config=cfg, dtype=self.dtype, use_bias=cfg.attention_bias)
        # One parameter, hence one matrix multiplication, for queries, keys and values; columns in that order.
        qkv_BxLx3D = dense(3 * cfg.hidden_size, name="qkv")(hidden_BxLxD)
        heads = (*hidden_BxLxD.shape[:2], cfg.num_attention_heads, cfg.head_size)
        query_BxLxHxE, key_BxMxHxE, value_BxMxHxE = (
            x_BxLxD.reshape(heads) for x_BxLxD in jnp.split(qkv_BxLx3D, 3, axis=-1)
        )
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
        )
        return dense(cfg.hidden_size, name="output", last=True)(output_BxLxHxE.reshape(hidden_BxLxD.shape))


class FeedForward(nn.Module):
    """Two dense layers with an activation between them, applied to each token; gated in some families."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, *, deterministic: bool) -> jax.Array:
        """Return [B, L, D]."""
        cfg = self.config
        dense = functools.partial(_dense, config=cfg, dtype=self.dtype, use_bias=cfg.mlp_bias)
        act = _activation(cfg.hidden_act)
        if cfg.family.gated:
            inner_BxLx2F = dense(2 * cfg.intermediate_size, name="inner")(hidden_BxLxD)
            inner_BxLxF, gate_BxLxF = jnp.split(inner_BxLx2F, 2, axis=-1)
            inner_BxLxF = act(inner_BxLxF) * gate_BxLxF
        else:
            inner_BxLxF = act(dense(cfg.intermediate_size, name="inner")(hidden_BxLxD))
        inner_BxLxF = _drop(self, inner_BxLxF, place="feed_forward_inner", deterministic=deterministic)
        return dense(cfg.hidden_size, name="output", last=True)(inner_BxLxF)


class Block(nn.Module):
    """One layer: attention, then the feed-forward net, each added to its input, with a norm after or before."""

    config: EncoderConfig
    dtype: Any
    isolate: bool
    layer: Layer

    @nn.compact
    def __call__(
        self, hidden_BxLxD: jax.Array, segments_BxL: jax.Array, rotation: Rotation | None, *, deterministic: bool
    ) -> jax.Array:
        """Return the next hidden_BxLxD."""
        cfg = self.config
        attention = SelfAttention(cfg, self.dtype, self.isolate, self.layer.window, name="attention")
        feed_forward = FeedForward(cfg, self.dtype, name="feed_forward")
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
    def __call__(self, hidden_BxKxD: jax.Array, embedding_VxC: jax.Array) -> jax.Array:
        """Return float32 logits_BxKxV."""
        cfg = self.config
        act = _activation(cfg.family.head_act or cfg.classifier_activation or cfg.hidden_act)
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
        return logits_BxKxV


def segments(inputs_BxL: jax.Array, *, pad_id: int, begin_id: int | None) -> tuple[jax.Array, jax.Array]:
    """Return which document of its row a token belongs to, and its number there.

    A document begins at every `begin_id`; what stands before a row's first one is the tail of a document. Without
    a `begin_id` a row is one document. Packing lays begin tokens and text never holds one; masking neither hides
    nor draws special tokens: a masked row has the segments of the row.

    Returns:
      segments_BxL: int32; 1 for the tail, 2... for the documents that begin in the row (1 if none does), 0 for padding.
      counts_BxL: int32; tokens of a document (or of what the row has of it) are 1, 2..., padding is 0.
    """
    is_token_BxL = inputs_BxL != pad_id
    counts_BxL = jnp.cumsum(is_token_BxL, axis=1, dtype=jnp.int32)
    if begin_id is None:
        return is_token_BxL.astype(jnp.int32), counts_BxL * is_token_BxL
    begins_BxL = inputs_BxL == begin_id
    segments_BxL = 1 + jnp.cumsum(begins_BxL, axis=1, dtype=jnp.int32)
    # Tokens of the row before the document.
    before_BxL = jax.lax.cummax(jnp.where(begins_BxL, counts_BxL - 1, 0), axis=1)
    return segments_BxL * is_token_BxL, (counts_BxL - before_BxL) * is_token_BxL


def places(inputs_BxL: jax.Array, *, begin_id: int | None) -> jax.Array:
    """Return how far a token stands from the beginning of its document (or of what the row has of it), padding too.

    Documents are those of `segments`. int32 [B, L], or [1, L] without a `begin_id`, for all rows have the same.
    """
    places_1xL = jnp.arange(inputs_BxL.shape[1], dtype=jnp.int32)[None]
    if begin_id is None:
        return places_1xL
    return places_1xL - jax.lax.cummax(jnp.where(inputs_BxL == begin_id, places_1xL, 0), axis=1)


class MaskedLM(nn.Module):
    """The whole model. Its parameters are `init(key, inputs_BxL)["params"]`, laid out as `weights` says.

    With a `begin_id` each document of a row is on its own: attention stays inside it and positions start anew, as
    `segments` finds them. Without one a row is one document, whatever is in it. The parameters are the same.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    begin_id: int | None = None

    def setup(self):
        """Make the parts."""
        cfg = self.config
        self.embeddings = Embeddings(cfg, self.dtype)
        # Layers that share their parameters are alike: the last one stands for all.
        blocks = {layer.block: layer for layer in cfg.layers}
        self.layer = [Block(cfg, self.dtype, self.begin_id is not None, blocks[block]) for block in sorted(blocks)]
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
        """Return float32 logits of the tokens at `positions_BxK`, [B, K, V], or of all of them, [B, L, V].

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
        for layer in cfg.layers:
            hidden_BxLxD = self.layer[layer.block](
                hidden_BxLxD, segments_BxL, rotations[layer.rope_theta], deterministic=deterministic
            )
        if positions_BxK is not None:
            hidden_BxLxD = jnp.take_along_axis(hidden_BxLxD, positions_BxK[:, :, None], axis=1)
        if cfg.family.norm_first:
            hidden_BxLxD = self.final_norm(hidden_BxLxD)
        return self.head(hidden_BxLxD, self.embeddings.word.embedding)

    def _rotations(self, places_BxL: jax.Array) -> dict[float | None, Rotation | None]:
        """What turns queries and keys, for each base that a layer has; layers with the same base share it."""
        cfg = self.config
        exact = cfg.family.positions is Positions.ROTARY_PAIRS
        thetas = {layer.rope_theta for layer in cfg.layers} - {None}
        return {None: None} | {
            theta: rotation(places_BxL, head_size=cfg.head_size, theta=theta, exact=exact) for theta in thetas
        }
