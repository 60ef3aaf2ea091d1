"""Masking of a batch, on the device.

A fraction of the tokens is predicted; of these, 80 % are replaced by the mask token, 10 % by a random token, and 10 %
stay as they are (Devlin et al., 2019, arXiv:1810.04805, section 3.1). A strategy chooses the tokens: single tokens,
words, or spans of words. Another strategy is another function like `choose_tokens`; replacing is the same for all.

The functions are pure: the masks of a row depend on the key and the row's number only. With numbers that count rows
over the global batch, masks are the same on any number of devices and after any restart.

Legend: B rows, L tokens per row, K max_predictions_per_seq, U units (words or spans), R ids that may replace a
token.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mlm.settings import WORD_START

# Spans of SpanBERT (Joshi et al., 2020, arXiv:1907.10529): their lengths in words are geometric, cut off.
SPAN_PROBABILITY = 0.2
MAX_SPAN_WORDS = 10


@dataclasses.dataclass(frozen=True)
class MaskingSpec:
    """Probabilities and token ids of the masking.

    Attributes:
      mlm_probability: largest probability that a token is predicted, in (0, 1]; special tokens never are.
      mask_replace_prob: probability that a predicted token is replaced by the mask token.
      random_replace_prob: probability that it is replaced by a random token that is not special.
      mask_id: id of the mask token.
      special_ids: ids that are neither predicted nor drawn as replacements: begin, end, padding, mask, unknown, ...
      num_ids: size of the vocabulary; random tokens have ids below it.
      strategy: "token", "whole_word" or "span".
      has_word_starts: the bit `WORD_START` of a token is set where a word starts; other strategies than "token" need
        it.
    """

    mlm_probability: float
    mask_replace_prob: float
    random_replace_prob: float
    mask_id: int
    special_ids: tuple[int, ...]
    num_ids: int
    strategy: str = "token"
    has_word_starts: bool = False

    def max_predictions_per_seq(self, length: int) -> int:
        """Returns K, the largest number of tokens that are predicted in a row of `length` tokens."""
        # 1e-6: in floating point, 0.07 * 100 is slightly more than 7.
        return max(1, math.ceil(self.mlm_probability * length - 1e-6))


@flax.struct.dataclass
class MaskCounts:
    """Numbers of tokens, float32: not special, predicted, replaced by the mask token, and by a random token."""

    maskable: jax.Array
    predicted: jax.Array
    mask_replaced: jax.Array
    random_replaced: jax.Array


@flax.struct.dataclass
class MaskedBatch:
    """The model's inputs and labels.

    Attributes:
      inputs_BxL: int32, token ids after masking.
      masked_positions_BxK: int32, positions of the predicted tokens, all different within a row.
      labels_BxK: int32, the original token ids at these positions.
      label_weights_BxK: float32, 1 for a predicted token, 0 for padding.
      counts_B: the counts of each row.
    """

    inputs_BxL: jax.Array
    masked_positions_BxK: jax.Array
    labels_BxK: jax.Array
    label_weights_BxK: jax.Array
    counts_B: MaskCounts


class Choice(NamedTuple):
    """The predicted tokens of a row.

    Attributes:
      positions_K: int32, all different.
      is_predicted_K: bool, False for padding.
      unit_K: int32 in [0, L), the word or span of each token, which is replaced as a unit; all different if the units
        are tokens.
    """

    positions_K: jax.Array
    is_predicted_K: jax.Array
    unit_K: jax.Array


def mask_tokens(
    tokens_BxL: jax.Array,
    *,
    rows_B: jax.Array,
    key: jax.Array,
    spec: MaskingSpec,
    mlm_probability: jax.Array | float | None = None,
) -> MaskedBatch:
    """Masks each row independently.

    Of n tokens that are not special, at most floor(mlm_probability * n + u) are predicted, with u uniform in [0, 1):
    exactly as many with the strategy "token", whose expected number is mlm_probability * n. There are never more than
    K = ceil(mlm_probability * L), so shapes are fixed.

    Args:
      tokens_BxL: int32 token ids, with the bits of `WORD_START` if the spec has them.
      rows_B: int32, number of each row, which is folded into the key.
      key: a threefry key; other kinds give different bits under `vmap`.
      spec: probabilities and ids.
      mlm_probability: probability in this step, at most `spec.mlm_probability`; None for `spec.mlm_probability`.

    Returns:
      The masked batch. A row without tokens to predict has label weight 0 everywhere.
    """
    starts_BxL = jnp.ones(tokens_BxL.shape, bool)
    if spec.has_word_starts:
        starts_BxL, tokens_BxL = (tokens_BxL & WORD_START) > 0, tokens_BxL & (WORD_START - 1)
    max_predictions = spec.max_predictions_per_seq(tokens_BxL.shape[1])
    rate = spec.mlm_probability if mlm_probability is None else mlm_probability
    maskable_BxL = ~jnp.isin(tokens_BxL, jnp.asarray(spec.special_ids, jnp.int32))
    choose = {"token": choose_tokens, "whole_word": choose_words, "span": choose_spans}[spec.strategy]
    # Actions are drawn per unit.
    num_actions = max_predictions if spec.strategy == "token" else tokens_BxL.shape[1]

    def mask_row(tokens_L: jax.Array, starts_L: jax.Array, maskable_L: jax.Array, row: jax.Array) -> MaskedBatch:
        # All random bits of a row in one call, since each call is a kernel.
        sizes = [tokens_L.shape[0], num_actions, max_predictions, 1]
        bits = jax.random.bits(jax.random.fold_in(key, row), (sum(sizes),), jnp.uint32)
        rank_bits_L, action_bits, random_bits_K, rounding_bits_1 = jnp.split(bits, np.cumsum(sizes)[:-1])
        num_maskable = maskable_L.sum()
        budget = jnp.floor(rate * num_maskable + uniform(rounding_bits_1[0]))
        choice = choose(rank_bits_L, starts_L, maskable_L, budget, max_predictions)
        labels_K = tokens_L[choice.positions_K]
        inputs_K, is_mask_K, is_random_K = replace_tokens(
            labels_K, choice.is_predicted_K, uniform(action_bits[choice.unit_K]), random_bits_K, spec
        )
        inputs_L = tokens_L.at[choice.positions_K].set(inputs_K, unique_indices=True, mode="promise_in_bounds")
        counts = [jnp.sum(flags, dtype=jnp.float32) for flags in (choice.is_predicted_K, is_mask_K, is_random_K)]
        return MaskedBatch(
            inputs_L,
            choice.positions_K,
            labels_K,
            choice.is_predicted_K.astype(jnp.float32),
            MaskCounts(num_maskable.astype(jnp.float32), *counts),
        )

    return jax.vmap(mask_row)(tokens_BxL, starts_BxL, maskable_BxL, rows_B)


def choose_tokens(
    rank_bits_L: jax.Array, starts_L: jax.Array, maskable_L: jax.Array, budget: jax.Array, max_predictions: int
) -> Choice:
    """Chooses single tokens, uniformly and without replacement.

    Args:
      rank_bits_L: uint32, random.
      starts_L: bool, True where a word starts.
      maskable_L: bool, False for special tokens.
      budget: float32, largest number of tokens to choose.
      max_predictions: K.
    """
    # Positions of the K largest random numbers.
    rank_L = jnp.where(maskable_L, (rank_bits_L >> 1).astype(jnp.int32), -1)
    _, positions_K = jax.lax.top_k(rank_L, max_predictions)
    unit_K = jnp.arange(max_predictions)
    return Choice(positions_K, (unit_K < budget) & maskable_L[positions_K], unit_K)


def choose_words(
    rank_bits_L: jax.Array, starts_L: jax.Array, maskable_L: jax.Array, budget: jax.Array, max_predictions: int
) -> Choice:
    """Chooses words in random order until the next one would exceed the budget.

    A word is its first token and the tokens up to the next word start or special token; see `choose_tokens`.
    """
    return _choose_units(rank_bits_L, _word_ids(starts_L, maskable_L), maskable_L, budget, max_predictions)


def choose_spans(
    rank_bits_L: jax.Array, starts_L: jax.Array, maskable_L: jax.Array, budget: jax.Array, max_predictions: int
) -> Choice:
    """Chooses spans of words in random order until the next one would exceed the budget.

    The row is cut into spans whose lengths in words are geometric with `SPAN_PROBABILITY`, at most `MAX_SPAN_WORDS`,
    and which end at special tokens. Spans therefore never overlap, unlike those that SpanBERT draws one by one.
    """
    length = len(starts_L)
    word_L = _word_ids(starts_L, maskable_L)
    # Inverse of the geometric distribution function. The low bits: the high ones rank the spans.
    draw_L = ((rank_bits_L & 0xFFFF).astype(jnp.float32) + 0.5) * 2**-16
    words_L = jnp.ceil(jnp.log(draw_L) / math.log(1 - SPAN_PROBABILITY)).astype(jnp.int32)
    span_ends_L = jnp.cumsum(jnp.clip(words_L, 1, MAX_SPAN_WORDS))  # In words: span s ends before word span_ends_L[s].
    span_L = jnp.searchsorted(span_ends_L, word_L, side="right").astype(jnp.int32)
    follows_special_L = maskable_L & ~jnp.roll(maskable_L, 1).at[0].set(False)
    is_start_L = maskable_L & ((span_L != jnp.roll(span_L, 1)) | follows_special_L)
    unit_L = jnp.clip(jnp.cumsum(is_start_L) - 1, 0, length - 1)
    return _choose_units(rank_bits_L, unit_L, maskable_L, budget, max_predictions)


def _word_ids(starts_L: jax.Array, maskable_L: jax.Array) -> jax.Array:
    """Numbers the words of a row from 0; a row may begin within a word, and special tokens end one."""
    follows_special_L = ~jnp.roll(maskable_L, 1).at[0].set(False)
    return jnp.clip(jnp.cumsum(maskable_L & (starts_L | follows_special_L)) - 1, 0, len(starts_L) - 1)


def _choose_units(
    rank_bits_L: jax.Array, unit_L: jax.Array, maskable_L: jax.Array, budget: jax.Array, max_predictions: int
) -> Choice:
    """Chooses complete units, which `unit_L` numbers from 0, in random order: `rank_bits_L[u]` ranks unit u."""
    length = len(unit_L)
    size_U = jnp.zeros(length, jnp.int32).at[unit_L].add(maskable_L.astype(jnp.int32))
    # Empty units are at the end.
    order_U = jnp.argsort(jnp.where(size_U > 0, rank_bits_L >> 1, jnp.uint32(2**31)), stable=True)
    fits_U = jnp.cumsum(size_U[order_U]) <= jnp.minimum(budget, max_predictions)
    is_chosen_U = jnp.zeros(length, bool).at[order_U].set(fits_U)
    is_predicted_L = is_chosen_U[unit_L] & maskable_L
    # Predicted positions first.
    _, positions_K = jax.lax.top_k(is_predicted_L.astype(jnp.int32), max_predictions)
    return Choice(positions_K, is_predicted_L[positions_K], unit_L[positions_K])


def replace_tokens(
    labels_K: jax.Array, is_predicted_K: jax.Array, action_K: jax.Array, random_bits_K: jax.Array, spec: MaskingSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Replaces predicted tokens by the mask token or a random one, or leaves them as they are.

    Args:
      labels_K: int32 token ids.
      is_predicted_K: bool, False for padding.
      action_K: float32 in [0, 1), random, the same within a unit.
      random_bits_K: uint32, random.
      spec: probabilities and ids.

    Returns:
      The inputs, whether each is the mask token, and whether each is a random token.
    """
    replacements_R = jnp.asarray(np.setdiff1d(np.arange(spec.num_ids), spec.special_ids), jnp.int32)
    is_mask_K = is_predicted_K & (action_K < spec.mask_replace_prob)
    is_random_K = is_predicted_K & ~is_mask_K & (action_K < spec.mask_replace_prob + spec.random_replace_prob)
    # The modulus favors small ids by R / 2^32: one part in 80,000 for a vocabulary of 50,000.
    random_K = replacements_R[random_bits_K % replacements_R.shape[0]]
    inputs_K = jnp.where(is_mask_K, spec.mask_id, jnp.where(is_random_K, random_K, labels_K))
    return inputs_K, is_mask_K, is_random_K


def uniform(bits: jax.Array) -> jax.Array:
    """Maps random uint32 to float32 in [0, 1), multiples of 2^-24."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)
