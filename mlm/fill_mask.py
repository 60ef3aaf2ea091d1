"""The model's guesses for the masked word of a sentence."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError
from mlm.models.encoder import MaskedLM


@dataclasses.dataclass(frozen=True)
class Filling:
    """A sentence with one masked word: guesses and their probabilities, best first."""

    sentence: str
    guesses: tuple[tuple[str, float], ...]


def fill_mask(
    model: MaskedLM, params: Any, tokenizer: Tokenizer, sentences: Sequence[str], *, top_k: int = 5
) -> list[Filling]:
    """Fills in the first "<mask>" (or the tokenizer's own mask token) of each sentence.

    Args:
      model: the model.
      params: its parameters, unstacked.
      tokenizer: its tokenizer.
      sentences: each with one masked word, no longer than the model's rows.
      top_k: how many guesses.

    Raises:
      UserError: a sentence without a mask, or too long.
    """
    if not sentences:
        return []
    encoded = []
    for sentence in sentences:
        ids = tokenizer.hf(sentence.replace("<mask>", tokenizer.hf.mask_token))["input_ids"]
        if tokenizer.mask_id not in ids:
            raise UserError(f"no <mask> in the sentence {sentence!r}")
        if len(ids) > model.config.max_seq_length:
            raise UserError(f"{sentence[:60]!r}... has {len(ids)} tokens, the model takes {model.config.max_seq_length}")
        encoded.append(ids)
    tokens_BxL = np.full((len(encoded), max(map(len, encoded))), tokenizer.pad_id, np.int32)
    for row, ids in enumerate(encoded):
        tokens_BxL[row, : len(ids)] = ids
    positions_Bx1 = np.array([[ids.index(tokenizer.mask_id)] for ids in encoded], np.int32)

    @jax.jit
    def guess(params: Any, tokens_BxL: jax.Array, positions_Bx1: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_Bx1xV = model.apply({"params": params}, tokens_BxL, positions_BxK=positions_Bx1)
        return jax.lax.top_k(jax.nn.softmax(logits_Bx1xV[:, 0].astype(jnp.float32)), top_k)

    probs_BxK, ids_BxK = jax.device_get(guess(*jax.device_put((params, tokens_BxL, positions_Bx1))))
    return [
        Filling(sentence, tuple((tokenizer.hf.decode([i]).strip(), float(p)) for i, p in zip(ids, probs, strict=True)))
        for sentence, ids, probs in zip(sentences, ids_BxK, probs_BxK, strict=True)
    ]


def table(fillings: Sequence[Filling]) -> str:
    """Fillings as lines for a terminal: a sentence, then its guesses with their probabilities."""
    lines = []
    for filling in fillings:
        guesses = "   ".join(f"{word or repr(word)} {100 * prob:.1f}%" for word, prob in filling.guesses)
        lines += [f"  {filling.sentence}", f"      {guesses}"]
    return "\n".join(lines)
