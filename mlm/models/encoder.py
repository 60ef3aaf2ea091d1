"""`MaskedLM`, which computes what transformers' `...ForMaskedLM` of the config's family computes.

Shapes: B rows, L tokens per row, K predicted tokens per row, C embedding size, D hidden_size, V vocab_size.

Parameters are float32. `dtype` is that of activations and matrix products; statistics of layer norms and softmax are
float32 in any case, and so are the logits, except in training.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlm.errors import UserError
from mlm.models.block import Block, Execution, initializer, make_dense, make_norm
from mlm.models.config import EncoderConfig
from mlm.models.families import PositionEmbedding
from mlm.models.ops.activation import activation
from mlm.models.ops.dense import tied_logits
from mlm.models.ops.dropout import Dropout
from mlm.models.ops.gather import embedding_lookup, word_lookup
from mlm.models.ops.position_ids import position_ids, segment_ids
from mlm.models.ops.rotary import Rotation, rotary_embedding


def _embed(num_embeddings: int, *, config: EncoderConfig, padding_idx: int | None = None) -> nn.Embed:
    """Returns an embedding table whose row `padding_idx` is initialized to zero, as in PyTorch.

    PyTorch also stops this row's gradient. Here it is zero anyway: no token attends to padding, and padding has no
    loss.
    """

    def init(key, shape, dtype):
        table = initializer(config)(key, shape, dtype)
        return table if padding_idx is None else table.at[padding_idx].set(0)

    # float32 in any case: gradients of frequent tokens are sums of very many terms.
    return nn.Embed(num_embeddings, config.embedding_width, embedding_init=init, dtype=jnp.float32)


class Embeddings(nn.Module):
    """The sum of those word, position and token type embeddings that the family has; then norm and projection."""

    config: EncoderConfig
    dtype: Any

    def setup(self):
        """Creates the tables; `MaskedLM` reads the word embeddings for its logits."""
        cfg = self.config
        self.word = _embed(
            cfg.vocab_size, config=cfg, padding_idx=cfg.pad_token_id if cfg.family.zero_pad_embedding else None
        )
        if not cfg.family.position_embedding.rotary:
            pad_offset = cfg.family.position_embedding is PositionEmbedding.LEARNED_PAD_OFFSET
            self.position = _embed(
                cfg.max_position_embeddings, config=cfg, padding_idx=cfg.pad_token_id if pad_offset else None
            )
        if cfg.type_vocab_size:
            self.token_type = _embed(cfg.type_vocab_size, config=cfg)
        self.norm = make_norm(cfg, dtype=self.dtype)
        self.dropout = Dropout(cfg.dropout_rate("embedding"))
        if cfg.has_projection:
            self.project = make_dense(cfg.hidden_size, config=cfg, dtype=self.dtype)

    def __call__(
        self,
        inputs_BxL: jax.Array,
        *,
        position_ids_BxL: jax.Array,
        token_types_BxL: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """Returns hidden_BxLxD; `position_ids_BxL` are rows of the position table."""
        cfg = self.config
        sum_BxLxC = word_lookup(self.word.embedding, inputs_BxL, self.dtype)
        if cfg.type_vocab_size:
            token_types_BxL = jnp.zeros((1, 1), jnp.int32) if token_types_BxL is None else token_types_BxL
            sum_BxLxC += embedding_lookup(self.token_type.embedding, token_types_BxL, self.dtype)
        if not cfg.family.position_embedding.rotary:
            sum_BxLxC += embedding_lookup(self.position.embedding, position_ids_BxL, self.dtype)
        hidden_BxLxC = self.dropout(self.norm(sum_BxLxC), deterministic=deterministic)
        return self.project(hidden_BxLxC) if cfg.has_projection else hidden_BxLxC


class Head(nn.Module):
    """The masked-language-model head: dense, activation, norm, decoder, bias.

    The decoder's weight is the word embeddings, or a table of the same shape if the config does not tie them.
    """

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BxKxD: jax.Array, embedding_VxC: jax.Array, *, logits_dtype: Any) -> jax.Array:
        """Returns logits_BxKxV."""
        cfg = self.config
        act = activation(cfg.family.head_act or cfg.classifier_activation or cfg.hidden_act)
        dense = make_dense(
            cfg.embedding_width,
            config=cfg,
            dtype=self.dtype,
            use_bias=cfg.classifier_bias,
            is_output=True,
            name="dense",
        )
        hidden_BxKxC = make_norm(cfg, dtype=self.dtype, name="norm")(act(dense(hidden_BxKxD)))
        if not cfg.tie_word_embeddings:
            embedding_VxC = self.param("decoder", initializer(cfg, is_output=True), embedding_VxC.shape, jnp.float32)
        logits_BxKxV = tied_logits(hidden_BxKxC, embedding_VxC)
        if cfg.decoder_bias:
            bias_V = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,), jnp.float32)
            logits_BxKxV += bias_V[None, None, :]
        return logits_BxKxV.astype(logits_dtype)


class MaskedLM(nn.Module):
    """An encoder and its masked-language-model head. `models.hf.weights` documents the parameter tree.

    Attributes:
      config: the model's config.
      dtype: dtype of activations and matrix products.
      begin_id: token id with which documents begin. If set, attention and positions do not cross document boundaries;
        otherwise a row is one document. The parameters are the same.
      execution: attention implementation and rematerialization.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    begin_id: int | None = None
    execution: Execution = Execution()

    def setup(self):
        """Creates the embeddings, the layers and the head."""
        cfg = self.config
        self.embeddings = Embeddings(cfg, self.dtype)
        # Layers with the same parameters have the same fields: the last one stands for all.
        layers = {layer.block: layer for layer in cfg.layers}
        self.layer = [
            Block(cfg, self.dtype, self.begin_id is not None, layers[block], self.execution) for block in sorted(layers)
        ]
        if cfg.family.norm_first:
            self.final_norm = make_norm(cfg, dtype=self.dtype)
        self.head = Head(cfg, self.dtype)

    def __call__(
        self,
        inputs_BxL: jax.Array,
        positions_BxK: jax.Array | None = None,
        *,
        token_types_BxL: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns logits [B, K, V] of the tokens at `positions_BxK`, or [B, L, V] of all tokens if that is None.

        They are float32, or `dtype` in training (`deterministic=False`). The arguments are those of `encode`.
        """
        hidden_BxKxD = self.encode(
            inputs_BxL, positions_BxK, token_types_BxL=token_types_BxL, deterministic=deterministic
        )
        logits_dtype = jnp.float32 if deterministic else self.dtype
        return self.head(hidden_BxKxD, self.embeddings.word.embedding, logits_dtype=logits_dtype)

    def encode(
        self,
        inputs_BxL: jax.Array,
        positions_BxK: jax.Array | None = None,
        *,
        token_types_BxL: jax.Array | None = None,
        deterministic: bool = True,
        return_layers: bool = False,
    ) -> Any:
        """Returns the last hidden states [B, K, D] at `positions_BxK`, or [B, L, D] if that is None.

        The result at a position is the same either way. With `positions_BxK` the last layer computes only keys and
        values for the other tokens.

        Args:
          inputs_BxL: int32 token ids; `config.pad_token_id` is padding. An id past the vocabulary gives NaN.
          positions_BxK: int32 positions in the rows. A position past the row gives NaN.
          token_types_BxL: int32, all 0 if not given; ignored by families without token types.
          deterministic: False in training, which needs a "dropout" key.
          return_layers: return the tuple that transformers calls `hidden_states`: the embeddings, then the states
            after every layer; the last entry is what is returned otherwise.

        Raises:
          UserError: rows are longer than the model's positions.
        """
        cfg = self.config
        if inputs_BxL.shape[1] > cfg.max_seq_length:
            raise UserError(
                f"max_position_embeddings={cfg.max_position_embeddings}: allows sequences of at most "
                f"{cfg.max_seq_length} tokens, not {inputs_BxL.shape[1]}; shorten them"
            )
        segment_ids_BxL, counts_BxL = segment_ids(inputs_BxL, pad_id=cfg.pad_token_id, begin_id=self.begin_id)
        if cfg.family.position_embedding is PositionEmbedding.LEARNED_PAD_OFFSET:
            position_ids_BxL = counts_BxL + cfg.pad_token_id
        else:
            position_ids_BxL = position_ids(inputs_BxL, begin_id=self.begin_id)
        hidden = self.embeddings(
            inputs_BxL, position_ids_BxL=position_ids_BxL, token_types_BxL=token_types_BxL, deterministic=deterministic
        )
        rotations = self._rotations(position_ids_BxL)
        apply_block = functools.partial(Block.__call__, deterministic=deterministic)
        if self.execution.remat == "full":
            apply_block = nn.remat(apply_block)
        states = []
        for number, layer in enumerate(cfg.layers):
            states.append(hidden)
            is_last = number == len(cfg.layers) - 1
            hidden = apply_block(
                self.layer[layer.block],
                hidden,
                segment_ids_BxL,
                rotations[layer.rope_theta],
                positions_BxK if is_last else None,
            )
        hidden = self.final_norm(hidden) if cfg.family.norm_first else hidden
        return (*states, hidden) if return_layers else hidden

    def _rotations(self, position_ids_BxL: jax.Array) -> dict[float | None, Rotation | None]:
        """Returns the rotary embedding for each `Layer.rope_theta`."""
        cfg = self.config
        float64 = cfg.family.position_embedding is PositionEmbedding.ROTARY_INTERLEAVED
        rotations: dict[float | None, Rotation | None] = {None: None}
        for theta in {layer.rope_theta for layer in cfg.layers}:
            if theta is not None:
                rotations[theta] = rotary_embedding(
                    position_ids_BxL, head_size=cfg.head_size, theta=theta, float64=float64
                )
        return rotations
