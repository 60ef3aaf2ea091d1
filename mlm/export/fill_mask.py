"""The model's guesses for the masked word of a sentence."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError
from mlm.models.encoder import MaskedLM


@dataclasses.dataclass(frozen=True)
class MaskPrediction:
    """A sentence with masked words: for each of them guesses and their probabilities, best first."""

    sentence: str
    candidates: tuple[tuple[tuple[str, float], ...], ...]


def fill_mask(
    model: MaskedLM, params: Any, tokenizer: Tokenizer, sentences: Sequence[str], *, top_k: int = 5
) -> list[MaskPrediction]:
    """Fills in each "<mask>" (or the tokenizer's own mask token) of each sentence, the others as they are.

    Args:
      model: the model.
      params: its parameters, unstacked.
      tokenizer: its tokenizer.
      sentences: as `encode` takes them.
      top_k: how many guesses.
    """
    if not sentences:
        return []
    encoded = encode(tokenizer, sentences, max_seq_length=model.config.max_seq_length)
    masks = [[place for place, id in enumerate(ids) if id == tokenizer.mask_id] for ids in encoded]
    # Few lengths, for each is compiled.
    length = min(-(-max(map(len, encoded)) // 16) * 16, model.config.max_seq_length)
    tokens_BxL = np.full((len(encoded), length), tokenizer.pad_id, np.int32)
    positions_BxM = np.zeros((len(encoded), max(map(len, masks))), np.int32)
    for row, (ids, places) in enumerate(zip(encoded, masks, strict=True)):
        tokens_BxL[row, : len(ids)] = ids
        positions_BxM[row, : len(places)] = places
    arrays = jax.device_put((params, tokens_BxL, positions_BxM))
    probs_BxMxK, ids_BxMxK = jax.device_get(_guess(*arrays, model=model, top_k=top_k))

    def candidates(row: int, mask: int) -> tuple[tuple[str, float], ...]:
        pairs = zip(ids_BxMxK[row, mask], probs_BxMxK[row, mask], strict=True)
        return tuple((tokenizer.hf.decode([id]), float(prob)) for id, prob in pairs)

    return [
        MaskPrediction(sentence, tuple(candidates(row, mask) for mask in range(len(masks[row]))))
        for row, sentence in enumerate(sentences)
    ]


def encode(tokenizer: Tokenizer, sentences: Sequence[str], *, max_seq_length: int) -> list[list[int]]:
    """The ids of each sentence, begin and end tokens included.

    Raises:
      UserError: a sentence without a mask, or of more than `max_seq_length` tokens.
    """
    encoded = []
    for sentence in sentences:
        ids = tokenizer.hf(sentence.replace("<mask>", tokenizer.hf.mask_token))["input_ids"]
        if tokenizer.mask_id not in ids:
            raise UserError(f"no <mask> in the sentence {sentence!r}; write it where a word is to be guessed")
        if len(ids) > max_seq_length:
            raise UserError(f"the sentence {sentence!r} has {len(ids)} tokens, the model takes {max_seq_length}")
        encoded.append(ids)
    return encoded


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def _guess(
    params: Any, tokens_BxL: jax.Array, positions_BxM: jax.Array, *, model: MaskedLM, top_k: int
) -> tuple[jax.Array, jax.Array]:
    logits_BxMxV = model.apply({"params": params}, tokens_BxL, positions_BxK=positions_BxM)
    return jax.lax.top_k(jax.nn.softmax(logits_BxMxV), top_k)


def table(predictions: Sequence[MaskPrediction]) -> str:
    """Fillings as lines for a terminal: a sentence, then a line of guesses with probabilities for each mask."""
    lines = []
    for filling in predictions:
        lines.append(f"  {filling.sentence}")
        for candidates in filling.candidates:
            lines.append("      " + "   ".join(f"{shown(word)} {100 * prob:.1f} %" for word, prob in candidates))
    return "\n".join(lines)


def shown(word: str) -> str:
    """A guess as a person can read it: without the blank before it, in quotes where nothing else is left."""
    return word.strip() or repr(word)
