"""A masked language model in Linen, with the semantics of transformers' `...ForMaskedLM` of its config's family.

Shapes: B rows, L tokens a row, K predicted positions a row, C width of the embeddings, D hidden_size, V vocab_size.

Parameters are float32; `dtype` is that of the matrix multiplications and of what flows between them. Layer
norm's statistics, softmax and, but in training, the logits are float32 whatever `dtype` is.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlm.errors import UserError
from mlm.models.block import Block, initializer, make_dense, make_norm
from mlm.models.config import EncoderConfig, Layer
from mlm.models.execution import Execution, run_layers
from mlm.models.families import PositionEmbedding
from mlm.models.ops.activation import activation
from mlm.models.ops.dense import decode
from mlm.models.ops.dropout import Dropout
from mlm.models.ops.gather import embedding_lookup
from mlm.models.ops.position_ids import places, segments
from mlm.models.ops.rotary import Rotation, rotation


def _embed(rows: int, *, config: EncoderConfig, zero_row: int | None = None) -> nn.Embed:
    """Return a table that starts at random but for one row, PyTorch's `padding_idx`, which starts at zero.

    PyTorch also stops the gradient of looking that row up. Here it is zero by itself: no loss is taken at
    padding, and no token attends to it.
    """

    def init(key, shape, dtype):
        table = initializer(config)(key, shape, dtype)
        return table if zero_row is None else table.at[zero_row].set(0)

    # float32 whatever the model's dtype: gradients of frequent tokens are sums of very many terms.
    return nn.Embed(rows, config.embedding_width, embedding_init=init, dtype=jnp.float32)


class Embeddings(nn.Module):
    """Word, position and token type embeddings, as far as the family has them, summed, normalized and projected."""

    config: EncoderConfig
    dtype: Any

    def setup(self):
        """Make the tables, which `MaskedLM` must reach, the norm and the projection."""
        cfg = self.config
        self.word = _embed(cfg.vocab_size, config=cfg, zero_row=cfg.pad_token_id if cfg.family.zero_pad_row else None)
        if not cfg.family.positions.rotary:
            after_pad = cfg.family.positions is PositionEmbedding.LEARNED_PAD_OFFSET
            self.position = _embed(
                cfg.max_position_embeddings, config=cfg, zero_row=cfg.pad_token_id if after_pad else None
            )
        if cfg.type_vocab_size:
            self.token_type = _embed(cfg.type_vocab_size, config=cfg)
        self.norm = make_norm(cfg, dtype=self.dtype)
        self.dropout = Dropout(cfg.dropout("embedding"))
        if cfg.has_projection:
            self.project = make_dense(cfg.hidden_size, config=cfg, dtype=self.dtype)

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
        sum_BxLxC = self.word(inputs_BxL).astype(self.dtype)
        if cfg.type_vocab_size:
            token_types_BxL = jnp.zeros((1, 1), jnp.int32) if token_types_BxL is None else token_types_BxL
            sum_BxLxC += embedding_lookup(self.token_type.embedding, token_types_BxL, self.dtype)
        if not cfg.family.positions.rotary:
            sum_BxLxC += embedding_lookup(self.position.embedding, places_BxL, self.dtype)
        hidden_BxLxC = self.dropout(self.norm(sum_BxLxC), deterministic=deterministic)
        return self.project(hidden_BxLxC) if cfg.has_projection else hidden_BxLxC


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
        dense = make_dense(
            cfg.embedding_width,
            config=cfg,
            dtype=self.dtype,
            use_bias=cfg.classifier_bias,
            last=True,
            name="dense",
        )
        hidden_BxKxC = make_norm(cfg, dtype=self.dtype, name="norm")(act(dense(hidden_BxKxD)))
        if not cfg.tie_word_embeddings:
            embedding_VxC = self.param("decoder", initializer(cfg, last=True), embedding_VxC.shape, jnp.float32)
        logits_BxKxV = decode(hidden_BxKxC, embedding_VxC)
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
            self.final_norm = make_norm(cfg, dtype=self.dtype)
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
        if cfg.family.positions is PositionEmbedding.LEARNED_PAD_OFFSET:
            places_BxL = counts_BxL + cfg.pad_token_id
        else:
            places_BxL = places(inputs_BxL, begin_id=self.begin_id)
        hidden_BxLxD = self.embeddings(
            inputs_BxL, places_BxL=places_BxL, token_types_BxL=token_types_BxL, deterministic=deterministic
        )
        rotations = self._rotations(places_BxL)
        # Of the last layer nothing is wanted but what is predicted from: all that follows its keys and values is
        # computed at those positions alone.
        asked_of = {len(cfg.layers) - 1: positions_BxK}
        if self.is_initializing() or not (self.execution.scan_layers or self.execution.remat == "full"):
            hidden = hidden_BxLxD
            for number, layer in enumerate(cfg.layers):
                hidden = self.layer[layer.block](
                    hidden,
                    segments_BxL,
                    rotations[layer.rope_theta],
                    asked_of.get(number),
                    deterministic=deterministic,
                )
        else:

            def apply_layer(
                layer: Layer, params: Any, hidden_BxLxD: jax.Array, key: jax.Array | None, *, is_last: bool
            ) -> jax.Array:
                return self._block(layer, parent=None).apply(
                    {"params": params},
                    hidden_BxLxD,
                    segments_BxL,
                    rotations[layer.rope_theta],
                    positions_BxK if is_last else None,
                    deterministic=deterministic,
                    rngs={} if key is None else {"dropout": key},
                )

            hidden = run_layers(
                apply_layer,
                {layer.block: self.variables["params"][f"layer_{layer.block}"] for layer in cfg.layers},
                hidden_BxLxD,
                layers=cfg.layers,
                key=None if deterministic else self.make_rng("dropout"),
                execution=self.execution,
            )
        if cfg.family.norm_first:
            hidden = self.final_norm(hidden)
        logits_dtype = jnp.float32 if deterministic else self.dtype
        return self.head(hidden, self.embeddings.word.embedding, logits_dtype=logits_dtype)

    def _block(self, layer: Layer, **module_args: Any) -> Block:
        return Block(self.config, self.dtype, self.begin_id is not None, layer, self.execution, **module_args)

    def _rotations(self, places_BxL: jax.Array) -> dict[float | None, Rotation | None]:
        """What turns queries and keys, for each base that a layer has; layers with the same base share it."""
        cfg = self.config
        exact = cfg.family.positions is PositionEmbedding.ROTARY_INTERLEAVED
        thetas = {layer.rope_theta for layer in cfg.layers} - {None}
        return {None: None} | {
            theta: rotation(places_BxL, head_size=cfg.head_size, theta=theta, exact=exact) for theta in thetas
        }
