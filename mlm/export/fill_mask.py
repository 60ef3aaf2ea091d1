"""The most probable tokens for the masked positions of a sentence."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError
from mlm.models.encoder import MaskedLM


@dataclasses.dataclass(frozen=True)
class MaskPrediction:
    """A sentence with masks, and for each mask its candidates: (token, probability), the most probable first."""

    sentence: str
    candidates: tuple[tuple[tuple[str, float], ...], ...]


def fill_mask(
    model: MaskedLM, params: Any, tokenizer: Tokenizer, sentences: Sequence[str], *, top_k: int = 5
) -> list[MaskPrediction]:
    """Predicts the token of each mask, given the sentence with all its masks.

    Args:
      model: the model.
      params: its parameters, without a device axis.
      tokenizer: its tokenizer.
      sentences: text with "<mask>" or the tokenizer's own mask token.
      top_k: number of candidates for each mask.

    Raises:
      UserError: a sentence has no mask, or is too long.
    """
    if not sentences:
        return []
    encoded = encode(tokenizer, sentences, max_seq_length=model.config.max_seq_length)
    masks = [[position for position, id in enumerate(ids) if id == tokenizer.mask_id] for ids in encoded]
    # Each shape (sentences, tokens, masks) is compiled once; lengths are multiples of 16, to have few shapes.
    length = min(-(-max(map(len, encoded)) // 16) * 16, model.config.max_seq_length)
    tokens_BxL = np.full((len(encoded), length), tokenizer.pad_id, np.int32)
    positions_BxM = np.zeros((len(encoded), max(map(len, masks))), np.int32)
    for row, (ids, positions) in enumerate(zip(encoded, masks, strict=True)):
        tokens_BxL[row, : len(ids)] = ids
        positions_BxM[row, : len(positions)] = positions
    arrays = jax.device_put((params, tokens_BxL, positions_BxM))
    probs_BxMxK, ids_BxMxK = jax.device_get(_top_candidates(*arrays, model=model, top_k=top_k))

    def candidates(row: int, mask: int) -> tuple[tuple[str, float], ...]:
        pairs = zip(ids_BxMxK[row, mask], probs_BxMxK[row, mask], strict=True)
        return tuple((tokenizer.decode([id]), float(prob)) for id, prob in pairs)

    return [
        MaskPrediction(sentence, tuple(candidates(row, mask) for mask in range(len(masks[row]))))
        for row, sentence in enumerate(sentences)
    ]


def encode(tokenizer: Tokenizer, sentences: Sequence[str], *, max_seq_length: int) -> list[list[int]]:
    """Returns the ids of each sentence, with begin and end tokens.

    Raises:
      UserError: a sentence has no mask, or more than `max_seq_length` tokens.
    """
    encoded = []
    for sentence in sentences:
        sentence = sentence.encode("utf-8", "replace").decode()  # Without bytes that are not UTF-8.
        ids = tokenizer.hf(sentence.replace("<mask>", tokenizer.hf.mask_token))["input_ids"]
        if tokenizer.mask_id not in ids:
            raise UserError(f"sentence {sentence!r}: has no <mask>; write <mask> for each token to predict")
        if len(ids) > max_seq_length:
            raise UserError(
                f"sentence {sentence!r}: has {len(ids)} tokens, the model takes at most {max_seq_length}; shorten it"
            )
        encoded.append(ids)
    return encoded


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def _top_candidates(
    params: Any, tokens_BxL: jax.Array, positions_BxM: jax.Array, *, model: MaskedLM, top_k: int
) -> tuple[jax.Array, jax.Array]:
    logits_BxMxV: Any = model.apply({"params": params}, tokens_BxL, positions_BxK=positions_BxM)
    return jax.lax.top_k(jax.nn.softmax(logits_BxMxV), top_k)


def format_predictions(predictions: Sequence[MaskPrediction]) -> str:
    """Returns lines for a terminal: each sentence, then for each of its masks the candidates with probabilities."""
    return compare_predictions({"": predictions})


def compare_predictions(predictions: Mapping[str, Sequence[MaskPrediction]]) -> str:
    """Returns lines like `format_predictions`, with the candidates of several models, which the keys name."""
    lines = []
    longest = max(map(len, predictions), default=0)
    width = longest + 3 if longest else 0
    for of_models in zip(*predictions.values(), strict=True):
        lines.append(f"  {of_models[0].sentence}")
        for of_mask in zip(*(prediction.candidates for prediction in of_models), strict=True):
            for name, candidates in zip(predictions, of_mask, strict=True):
                shown = "   ".join(f"{display_token(token)} {100 * prob:.1f} %" for token, prob in candidates)
                lines.append(f"      {name:<{width}}{shown}")
    return "\n".join(lines)


def display_token(token: str) -> str:
    """Returns a token without surrounding blanks; in quotes if it has nothing else."""
    return token.strip() or repr(token)
