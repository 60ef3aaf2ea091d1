"""Our training step and the one that the benchmarks compare it with, as functions of one device's batch.

The reference is a reimplementation of Hugging Face's `run_mlm_flax.py` with the Flax `RobertaForMaskedLM` of
transformers 4, written from its behavior: separate matmuls for queries, keys and values, one attention dropout mask
for all sequences and heads, logits at every position, cross-entropy with one-hot labels, gradients averaged over
devices, AdamW. Its labels come from the host, -100 where nothing is predicted; ours masks on the device.

Legend: B rows, L tokens, D hidden_size, H heads, E width of a head, V vocabulary.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mlm import parallel, steps
from mlm.masking import MaskingSpec
from mlm.models.block import Execution
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.optimizer import create_optimizer, decay_mask
from mlm.schedules import create_schedule
from mlm.settings import OptimizerSettings


def _optimizer(**fields: Any) -> OptimizerSettings:
    """The defaults of configs/default.py but for `fields`; without that file, which needs ml_collections."""
    unset = dict.fromkeys(field.name for field in dataclasses.fields(OptimizerSettings))
    off = {"weight_decay": 0.0, "layer_decay": 1.0, "ema_decay": 0.0, "max_grad_norm": 0.0, "spike_factor": 0.0}
    defaults = {"name": "adamw", "schedule": "linear", "warmup_steps": 0, "max_skipped_steps": 10, **off}
    return OptimizerSettings(**unset | defaults | fields)


OPTIMIZER = _optimizer(learning_rate=3e-4, warmup_steps=1_000, adam_beta2=0.98, weight_decay=0.01)
MUON = _optimizer(name="muon", learning_rate=0.02)
SCHEDULE = create_schedule(OPTIMIZER, num_train_steps=10_000)
SPECIAL = 5  # ids below are special; the last one is the mask token
BEGIN = 0


def roberta(**overrides: Any) -> EncoderConfig:
    """The config of roberta-base on the hub, with some fields changed."""
    shape = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return EncoderConfig(**shape | overrides)


# Overrides for the small model of the CPU benchmark.
SMALL = {
    "vocab_size": 8_192,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1_024,
}


def our_step_config(
    config: EncoderConfig,
    dtype: Any,
    execution: Execution,
    *,
    mlm_probability: float = 0.15,
    begin_id: int | None = None,
    ema_decay: float = 0.0,
    optimizer: OptimizerSettings = OPTIMIZER,
) -> steps.StepConfig:
    """Our model, masking and optimizer."""
    return steps.StepConfig(
        model=MaskedLM(config, dtype, begin_id=begin_id, execution=execution),
        masking=MaskingSpec(
            mlm_probability=mlm_probability,
            mask_replace_prob=0.8,
            random_replace_prob=0.1,
            mask_id=SPECIAL - 1,
            special_ids=tuple(range(SPECIAL)),
            num_ids=config.vocab_size,
        ),
        optimizer=create_optimizer(optimizer, SCHEDULE, axis_name=parallel.AXIS),
        schedule=SCHEDULE,
        seed=0,
        ema_decay=ema_decay,
    )


def our_step(step_config: steps.StepConfig) -> Callable[..., Any]:
    """Our step: (state, tokens_1xBxL) -> (state, metrics)."""
    return functools.partial(steps.train_step, step_config=step_config, axis_name=parallel.AXIS)


def our_state(step_config: steps.StepConfig) -> steps.TrainState:
    """Our state before step 1."""
    return steps.init_state(step_config, steps.init_params(step_config, length=8))


def random_tokens(rows: int, length: int, *, vocab_size: int, document_length: int = 0) -> np.ndarray:
    """int32 [rows, length], random tokens without padding; documents of `document_length` tokens begin with BEGIN."""
    draw = np.random.default_rng(0)
    tokens_BxL = draw.integers(SPECIAL, vocab_size, (rows, length)).astype(np.int32)
    if document_length:
        offsets_Bx1 = draw.integers(0, document_length, (rows, 1))
        tokens_BxL[(np.arange(length) + offsets_Bx1) % document_length == 0] = BEGIN
    return tokens_BxL


def reference_batch(tokens_BxL: np.ndarray) -> dict[str, np.ndarray]:
    """A batch as from the reference's collator: 15 % of the tokens masked, and labels."""
    chosen_BxL = np.random.default_rng(1).random(tokens_BxL.shape) < 0.15
    return {
        "input_ids": np.where(chosen_BxL, SPECIAL - 1, tokens_BxL).astype(np.int32),
        "attention_mask": np.ones_like(tokens_BxL),
        "labels": np.where(chosen_BxL, tokens_BxL, -100).astype(np.int32),
    }


class _Layer(nn.Module):
    config: EncoderConfig
    dtype: Any
    deterministic: bool = False

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, bias_Bx1x1xL: jax.Array) -> jax.Array:
        cfg = self.config
        heads = (*hidden_BxLxD.shape[:2], cfg.num_attention_heads, cfg.head_size)

        def dense(size: int, name: str) -> nn.Dense:
            return nn.Dense(size, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name=name)

        def add_norm(output_BxLxD: jax.Array, residual_BxLxD: jax.Array, name: str) -> jax.Array:
            output_BxLxD = nn.Dropout(cfg.hidden_dropout_prob)(output_BxLxD, deterministic=self.deterministic)
            return nn.LayerNorm(cfg.layer_norm_eps, dtype=self.dtype, name=name)(output_BxLxD + residual_BxLxD)

        query, key, value = (dense(cfg.hidden_size, name)(hidden_BxLxD).reshape(heads) for name in ("q", "k", "v"))
        scores_BxHxLxL = jnp.einsum("...qhd,...khd->...hqk", query / np.sqrt(cfg.head_size).astype(self.dtype), key)
        weights_BxHxLxL = jax.nn.softmax(scores_BxHxLxL + bias_Bx1x1xL).astype(self.dtype)
        weights_BxHxLxL = nn.Dropout(cfg.attention_probs_dropout_prob, broadcast_dims=(0, 1))(
            weights_BxHxLxL, deterministic=self.deterministic
        )
        attended_BxLxD = jnp.einsum("...hqk,...khd->...qhd", weights_BxHxLxL, value).reshape(hidden_BxLxD.shape)
        hidden_BxLxD = add_norm(dense(cfg.hidden_size, "attention_output")(attended_BxLxD), hidden_BxLxD, "norm_1")
        inner_BxLxF = nn.gelu(dense(cfg.intermediate_size, "intermediate")(hidden_BxLxD), approximate=False)
        return add_norm(dense(cfg.hidden_size, "output")(inner_BxLxF), hidden_BxLxD, "norm_2")


class ReferenceModel(nn.Module):
    """The reference's model; dropout is active unless `deterministic`."""

    config: EncoderConfig
    dtype: Any
    deterministic: bool = False

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Returns logits_BxLxV."""
        cfg = self.config

        def embed(rows: int, name: str) -> nn.Embed:
            init = nn.initializers.normal(0.02)
            return nn.Embed(rows, cfg.hidden_size, embedding_init=init, dtype=self.dtype, name=name)

        word = embed(cfg.vocab_size, "word")
        is_token = (input_ids != cfg.pad_token_id).astype(jnp.int32)
        positions = jnp.cumsum(is_token, axis=1) * is_token + cfg.pad_token_id
        hidden = word(input_ids) + embed(cfg.max_position_embeddings, "position")(positions)
        hidden += embed(cfg.type_vocab_size, "type")(jnp.zeros_like(input_ids))
        hidden = nn.LayerNorm(cfg.layer_norm_eps, dtype=self.dtype, name="norm")(hidden)
        hidden = nn.Dropout(cfg.hidden_dropout_prob)(hidden, deterministic=self.deterministic)
        bias = jnp.where(attention_mask[:, None, None] > 0, 0.0, jnp.finfo(self.dtype).min).astype(self.dtype)
        for index in range(cfg.num_hidden_layers):
            hidden = _Layer(cfg, self.dtype, self.deterministic, name=f"layer_{index}")(hidden, bias)
        hidden = nn.gelu(nn.Dense(cfg.hidden_size, dtype=self.dtype, name="head")(hidden), approximate=False)
        hidden = nn.LayerNorm(cfg.layer_norm_eps, dtype=self.dtype, name="head_norm")(hidden)
        logits = hidden @ word.embedding.T.astype(self.dtype)
        return logits + self.param("bias", nn.initializers.zeros, (cfg.vocab_size,)).astype(self.dtype)


def reference_optimizer(schedule: optax.Schedule = SCHEDULE) -> optax.GradientTransformation:
    """AdamW with the reference's betas and weight decay."""
    return optax.adamw(schedule, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, mask=decay_mask)


def reference_state(
    config: EncoderConfig, dtype: Any, optimizer: optax.GradientTransformation | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """The reference's state before step 1; the optimizer is `reference_optimizer()` by default."""
    ids = jnp.ones((1, 8), jnp.int32)
    keys = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(seed)), strict=True))
    params = ReferenceModel(config, dtype).init(keys, ids, ids)["params"]
    optimizer = optimizer or reference_optimizer()
    return {"params": params, "adam": optimizer.init(params), "key": jax.random.PRNGKey(seed)}


def reference_step(
    config: EncoderConfig, dtype: Any, optimizer: optax.GradientTransformation | None = None
) -> Callable[..., Any]:
    """The reference's step: (state, batch) -> (state, mean loss)."""
    model, optimizer = ReferenceModel(config, dtype), optimizer or reference_optimizer()

    def step(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
        dropout_key, next_key = jax.random.split(state["key"])

        def loss_fn(params: Any) -> jax.Array:
            rngs = {"dropout": dropout_key}
            logits = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"], rngs=rngs)
            in_use = batch["labels"] > 0
            losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["labels"], logits.shape[-1]))
            return jnp.sum(losses * in_use) / jnp.sum(in_use)

        loss, gradients = jax.value_and_grad(loss_fn)(state["params"])
        gradients, loss = jax.lax.pmean((gradients, loss), parallel.AXIS)
        updates, adam = optimizer.update(gradients, state["adam"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "adam": adam, "key": next_key}, loss

    return step
