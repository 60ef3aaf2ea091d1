"""A RoBERTa-style masked language model in Linen, with the semantics of transformers' `RobertaForMaskedLM`.

Shapes: B rows, L tokens a row, K predicted positions a row, D hidden_size, F intermediate_size, H heads,
E = D / H, V vocab_size. In attention, M is L again, on the side of keys.

Parameters are float32; `dtype` is that of the matrix multiplications and of what flows between them. Layer
norm's statistics, softmax, the sum of embeddings and the logits are float32 whatever `dtype` is.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlm.errors import UserError
from mlm.models.attention import attend
from mlm.models.config import EncoderConfig
from mlm.models.dropout import Dropout

# The exact GELU, x * Phi(x) (Hendrycks and Gimpel, arXiv:1606.08415), not its tanh approximation.
_gelu = functools.partial(jax.nn.gelu, approximate=False)


def _dense(features: int, *, config: EncoderConfig, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(config.initializer_range), name=name)


def _norm(config: EncoderConfig, *, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    # The two-pass variance: E[x^2] - E[x]^2 cancels when the mean is large.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


def _embed(rows: int, *, config: EncoderConfig, zero_row: int | None = None) -> nn.Embed:
    """Return a table that starts normal but for one row, PyTorch's `padding_idx`, which starts at zero.

    PyTorch also stops the gradient of looking that row up. Here it is zero by itself: no loss is taken at
    padding, and no token attends to it.
    """
    normal = nn.initializers.normal(config.initializer_range)

    def init(key, shape, dtype):
        table = normal(key, shape, dtype)
        return table if zero_row is None else table.at[zero_row].set(0)

    # float32 whatever the model's dtype: gradients of frequent tokens are sums of very many terms.
    return nn.Embed(rows, config.hidden_size, embedding_init=init, dtype=jnp.float32)


class Embeddings(nn.Module):
    """Word, position and token type embeddings, summed and normalized."""

    config: EncoderConfig
    dtype: Any

    def setup(self):
        """Make the three tables, which `MaskedLM` must reach, and the norm."""
        cfg = self.config
        self.word = _embed(cfg.vocab_size, config=cfg, zero_row=cfg.pad_token_id)
        self.position = _embed(cfg.max_position_embeddings, config=cfg, zero_row=cfg.pad_token_id)
        self.token_type = _embed(cfg.type_vocab_size, config=cfg)
        self.norm = _norm(cfg, dtype=self.dtype)
        self.dropout = Dropout(cfg.hidden_dropout_prob)

    def __call__(self, inputs_BxL: jax.Array, counts_BxL: jax.Array, *, deterministic: bool) -> jax.Array:
        """Return hidden_BxLxD of token ids; `counts_BxL` numbers them from 1 in their document, padding is 0."""
        positions_BxL = counts_BxL + self.config.pad_token_id  # fairseq's
        token_types_1x1 = jnp.zeros((1, 1), jnp.int32)
        sum_BxLxD = self.word(inputs_BxL) + self.token_type(token_types_1x1) + self.position(positions_BxL)
        return self.dropout(self.norm(sum_BxLxD), deterministic=deterministic)


class SelfAttention(nn.Module):
    """Multi-head attention of every token to those it may see (Vaswani et al., arXiv:1706.03762)."""

    config: EncoderConfig
    dtype: Any
    isolate: bool

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, segments_BxL: jax.Array, *, deterministic: bool) -> jax.Array:
        """Return the heads' outputs, projected: [B, L, D]."""
        cfg = self.config
        # One parameter, hence one matrix multiplication, for queries, keys and values; columns in that order.
        qkv_BxLx3D = _dense(3 * cfg.hidden_size, config=cfg, dtype=self.dtype, name="qkv")(hidden_BxLxD)
        heads = (*hidden_BxLxD.shape[:2], cfg.num_attention_heads, cfg.head_size)
        query_BxLxHxE, key_BxMxHxE, value_BxMxHxE = (
            x_BxLxD.reshape(heads) for x_BxLxD in jnp.split(qkv_BxLx3D, 3, axis=-1)
        )
        dropped = cfg.attention_probs_dropout_prob > 0 and not deterministic
        output_BxLxHxE = attend(
            query_BxLxHxE,
            key_BxMxHxE,
            value_BxMxHxE,
            segments_BxL=segments_BxL,
            isolate=self.isolate,
            dropout_rate=cfg.attention_probs_dropout_prob,
            dropout_key=self.make_rng("dropout") if dropped else None,
        )
        return _dense(cfg.hidden_size, config=cfg, dtype=self.dtype, name="output")(
            output_BxLxHxE.reshape(hidden_BxLxD.shape)
        )


class FeedForward(nn.Module):
    """Two dense layers with a GELU between them, applied to each token."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array) -> jax.Array:
        """Return [B, L, D]."""
        cfg = self.config
        inner_BxLxF = _dense(cfg.intermediate_size, config=cfg, dtype=self.dtype, name="inner")(hidden_BxLxD)
        return _dense(cfg.hidden_size, config=cfg, dtype=self.dtype, name="output")(_gelu(inner_BxLxF))


class Block(nn.Module):
    """One layer: attention, then the feed-forward net, each added to its input and then normalized."""

    config: EncoderConfig
    dtype: Any
    isolate: bool

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, segments_BxL: jax.Array, *, deterministic: bool) -> jax.Array:
        """Return the next hidden_BxLxD."""
        cfg = self.config
        dropout = functools.partial(Dropout(cfg.hidden_dropout_prob), deterministic=deterministic)

        update_BxLxD = SelfAttention(cfg, self.dtype, self.isolate, name="attention")(
            hidden_BxLxD, segments_BxL, deterministic=deterministic
        )
        hidden_BxLxD = _norm(cfg, dtype=self.dtype, name="attention_norm")(hidden_BxLxD + dropout(update_BxLxD))

        update_BxLxD = FeedForward(cfg, self.dtype, name="feed_forward")(hidden_BxLxD)
        return _norm(cfg, dtype=self.dtype, name="feed_forward_norm")(hidden_BxLxD + dropout(update_BxLxD))


class Head(nn.Module):
    """From hidden states to logits: dense, GELU, norm, the word embeddings as decoder, and a bias."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BxKxD: jax.Array, embedding_VxD: jax.Array) -> jax.Array:
        """Return float32 logits_BxKxV."""
        cfg = self.config
        hidden_BxKxD = _gelu(_dense(cfg.hidden_size, config=cfg, dtype=self.dtype, name="dense")(hidden_BxKxD))
        hidden_BxKxD = _norm(cfg, dtype=self.dtype, name="norm")(hidden_BxKxD)
        bias_V = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,), jnp.float32)
        logits_BxKxV = jnp.einsum(
            "BKD,VD->BKV", hidden_BxKxD, embedding_VxD.astype(self.dtype), preferred_element_type=jnp.float32
        )
        return logits_BxKxV + bias_V[None, None, :]


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
        self.embeddings = Embeddings(self.config, self.dtype)
        self.layer = [
            Block(self.config, self.dtype, self.begin_id is not None) for _ in range(self.config.num_hidden_layers)
        ]
        self.head = Head(self.config, self.dtype)

    def __call__(
        self, inputs_BxL: jax.Array, *, positions_BxK: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Return float32 logits of the tokens at `positions_BxK`, [B, K, V], or of all of them, [B, L, V].

        `inputs_BxL` are token ids; those equal to the config's pad_token_id are padding. With
        `deterministic=False` a "dropout" key is needed. Raises `UserError` for rows longer than the positions
        allow; an id past the vocabulary or a position past the row gives NaN.
        """
        cfg = self.config
        if inputs_BxL.shape[1] > cfg.max_seq_length:
            raise UserError(
                f"rows of {inputs_BxL.shape[1]} tokens are too long for a model of max_position_embeddings="
                f"{cfg.max_position_embeddings}, which takes at most {cfg.max_seq_length}"
            )
        segments_BxL, counts_BxL = segments(inputs_BxL, pad_id=cfg.pad_token_id, begin_id=self.begin_id)
        hidden_BxLxD = self.embeddings(inputs_BxL, counts_BxL, deterministic=deterministic)
        for block in self.layer:
            hidden_BxLxD = block(hidden_BxLxD, segments_BxL, deterministic=deterministic)
        if positions_BxK is not None:
            hidden_BxLxD = jnp.take_along_axis(hidden_BxLxD, positions_BxK[:, :, None], axis=1)
        return self.head(hidden_BxLxD, self.embeddings.word.embedding)
