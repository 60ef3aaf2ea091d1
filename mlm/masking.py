"""BERT's masking (Devlin et al., 2019, arXiv:1810.04805, section 3.1), on the device.

A fraction `mlm_probability` of the tokens is predicted; of these, 80 % are replaced by the mask token, 10 % by a random
token, and 10 % stay as they are. The function is pure: the masks of a row depend on the key and the row's number only.
With numbers that count rows over the global batch, masks are the same on any number of devices and after any restart.

Legend: B rows, L tokens per row, K max_predictions_per_seq, S special ids, R ids that may replace a token.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class MaskingSpec:
    """Probabilities and token ids of the masking.

    Attributes:
      mlm_probability: probability that a token is predicted, in (0, 1]; special tokens never are.
      mask_replace_prob: probability that a predicted token is replaced by the mask token.
      random_replace_prob: probability that it is replaced by a random token that is not special.
      mask_id: id of the mask token.
      special_ids: ids that are neither predicted nor drawn as replacements: begin, end, padding, mask, unknown, ...
      num_ids: size of the vocabulary; random tokens have ids below it.
    """

    mlm_probability: float
    mask_replace_prob: float
    random_replace_prob: float
    mask_id: int
    special_ids: tuple[int, ...]
    num_ids: int

    def max_predictions_per_seq(self, length: int) -> int:
        """Returns K, the largest number of tokens that are predicted in a row of `length` tokens."""
        # 1e-6: in floating point, 0.07 * 100 is slightly more than 7.
        return max(1, math.ceil(self.mlm_probability * length - 1e-6))


@flax.struct.dataclass
class MaskedBatch:
    """The model's inputs and labels.

    Attributes:
      inputs_BxL: int32, token ids after masking.
      masked_positions_BxK: int32, positions of the predicted tokens, all different within a row.
      labels_BxK: int32, the original token ids at these positions.
      label_weights_BxK: float32, 1 for a predicted token, 0 for padding.
    """

    inputs_BxL: jax.Array
    masked_positions_BxK: jax.Array
    labels_BxK: jax.Array
    label_weights_BxK: jax.Array


def mask_tokens(tokens_BxL: jax.Array, *, rows_B: jax.Array, key: jax.Array, spec: MaskingSpec) -> MaskedBatch:
    """Masks each row independently.

    Of n tokens that are not special, floor(mlm_probability * n + u) are predicted, with u uniform in [0, 1). Their
    expected number is mlm_probability * n, and they are never more than K = ceil(mlm_probability * L): fixed shapes.

    Args:
      tokens_BxL: int32 token ids.
      rows_B: int32, number of each row, which is folded into the key.
      key: a threefry key; other kinds give different bits under `vmap`.
      spec: probabilities and ids.

    Returns:
      The masked batch. A row without tokens to predict has label weight 0 everywhere.
    """
    max_predictions = spec.max_predictions_per_seq(tokens_BxL.shape[1])
    replacements_R = jnp.asarray(np.setdiff1d(np.arange(spec.num_ids), spec.special_ids), jnp.int32)
    special_S = jnp.asarray(spec.special_ids, jnp.int32)
    maskable_BxL = ~jnp.isin(tokens_BxL, special_S)

    def mask_row(tokens_L: jax.Array, maskable_L: jax.Array, row: jax.Array) -> MaskedBatch:
        # All random bits of a row in one call, since each call is a kernel.
        sizes = [tokens_L.shape[0], max_predictions, max_predictions, 1]
        bits = jax.random.bits(jax.random.fold_in(key, row), (sum(sizes),), jnp.uint32)
        rank_bits_L, action_bits_K, random_bits_K, rounding_bits_1 = jnp.split(bits, np.cumsum(sizes)[:-1])

        # Positions of the K largest random numbers: a uniform draw without replacement.
        rank_L = jnp.where(maskable_L, (rank_bits_L >> 1).astype(jnp.int32), -1)
        _, positions_K = jax.lax.top_k(rank_L, max_predictions)
        num_predicted = jnp.floor(spec.mlm_probability * maskable_L.sum() + uniform(rounding_bits_1[0]))
        is_predicted_K = (jnp.arange(max_predictions) < num_predicted) & maskable_L[positions_K]

        labels_K = tokens_L[positions_K]
        action_K = uniform(action_bits_K)
        # The modulus favours small ids by R / 2^32: one part in 80,000 for a vocabulary of 50,000.
        random_K = replacements_R[random_bits_K % replacements_R.shape[0]]
        inputs_K = jnp.where(action_K < spec.mask_replace_prob + spec.random_replace_prob, random_K, labels_K)
        inputs_K = jnp.where(action_K < spec.mask_replace_prob, spec.mask_id, inputs_K)
        inputs_K = jnp.where(is_predicted_K, inputs_K, labels_K)
        inputs_L = tokens_L.at[positions_K].set(inputs_K, unique_indices=True, mode="promise_in_bounds")
        return MaskedBatch(inputs_L, positions_K, labels_K, is_predicted_K.astype(jnp.float32))

    return jax.vmap(mask_row)(tokens_BxL, maskable_BxL, rows_B)


def uniform(bits: jax.Array) -> jax.Array:
    """Maps random uint32 to float32 in [0, 1), multiples of 2^-24."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)
