"""Choosing, hiding and remembering tokens: BERT's 80/10/10 rule (Devlin et al., 2019), on the device.

Pure and stateless: the masks of a row depend on a key and on the row's number alone. Whoever numbers rows by their
place in the global batch gets the same masks on any number of devices and hosts, and after any restart.

Legend: B rows, L tokens of a row, K slots for tokens to predict, R ids that may replace a token.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class MaskingSpec:
    """What is masked, and with what.

    Attributes:
      mlm_probability: share of the maskable tokens to predict, in (0, 1].
      mask_replace_prob: share of those replaced by the mask id.
      random_replace_prob: share of those replaced by a random id that is not special.
      mask_id: the mask token.
      special_ids: ids that are never masked and never drawn: begin, end, padding, mask, unknown, ...
      num_ids: ids are below this.
    """

    mlm_probability: float
    mask_replace_prob: float
    random_replace_prob: float
    mask_id: int
    special_ids: tuple[int, ...]
    num_ids: int

    def max_predictions_per_seq(self, length: int) -> int:
        """The largest number of tokens that a row of `length` tokens has to predict (K)."""
        # 1e-6: 0.07 * 100 is a little over 7 in floating point.
        return max(1, math.ceil(self.mlm_probability * length - 1e-6))


@flax.struct.dataclass
class MaskedBatch:
    """What the model sees, and what it has to say.

    Attributes:
      inputs_BxL: int32, the tokens with some hidden.
      positions_BxK: int32, the places to predict, no place twice in a row.
      targets_BxK: int32, the tokens that stood there.
      weights_BxK: float32, 1 for a token to predict, 0 for an unused slot.
    """

    inputs_BxL: jax.Array
    masked_positions_BxK: jax.Array
    labels_BxK: jax.Array
    label_weights_BxK: jax.Array


def mask_tokens(tokens_BxL: jax.Array, *, rows_B: jax.Array, key: jax.Array, spec: MaskingSpec) -> MaskedBatch:
    """Masks every row on its own.

    A row with n maskable tokens gets floor(mlm_probability * n + u) of them, u uniform in [0, 1): the expected
    share is exact for every n, and the number never exceeds K = ceil(mlm_probability * L), so shapes are fixed and
    no token drawn is thrown away.

    Args:
      tokens_BxL: int32 ids.
      rows_B: int32, the number of each row, folded into the key.
      key: a threefry key (others do not give the batch of single draws under `vmap`).
      spec: what to mask.

    Returns:
      The masked rows. A row without maskable tokens has weight 0 everywhere.
    """
    max_predictions_per_seq = spec.max_predictions_per_seq(tokens_BxL.shape[1])
    is_special_R = np.zeros(spec.num_ids, bool)
    is_special_R[[i for i in spec.special_ids if i < spec.num_ids]] = True
    replacements_R = jnp.asarray(np.flatnonzero(~is_special_R), jnp.int32)
    special_S = jnp.asarray(spec.special_ids, jnp.int32)
    maskable_BxL = ~jnp.isin(tokens_BxL, special_S)

    def mask_row(tokens_L: jax.Array, maskable_L: jax.Array, row: jax.Array) -> MaskedBatch:
        # One draw for all that the row needs: every call of the generator costs a kernel.
        bits = jax.random.bits(
            jax.random.fold_in(key, row), (tokens_L.shape[0] + 2 * max_predictions_per_seq + 1,), jnp.uint32
        )
        bits_L, action_bits_K, random_bits_K, rounding_bits = jnp.split(
            bits, np.cumsum([tokens_L.shape[0], max_predictions_per_seq, max_predictions_per_seq])
        )
        # The K largest of random numbers are a uniform draw without replacement.
        rank_L = jnp.where(maskable_L, (bits_L >> 1).astype(jnp.int32), -1)
        _, positions_K = jax.lax.top_k(rank_L, max_predictions_per_seq)
        number = jnp.floor(spec.mlm_probability * maskable_L.sum() + uniform(rounding_bits[0]))
        chosen_K = (jnp.arange(max_predictions_per_seq) < number) & maskable_L[positions_K]

        targets_K = tokens_L[positions_K]
        action_K = uniform(action_bits_K)
        # The remainder favours small ids by R / 2^32, one part in 80,000 for a vocabulary of 50,000.
        random_K = replacements_R[random_bits_K % replacements_R.shape[0]]
        shown_K = jnp.where(action_K < spec.mask_replace_prob + spec.random_replace_prob, random_K, targets_K)
        shown_K = jnp.where(action_K < spec.mask_replace_prob, spec.mask_id, shown_K)
        inputs_L = tokens_L.at[positions_K].set(
            jnp.where(chosen_K, shown_K, targets_K), unique_indices=True, mode="promise_in_bounds"
        )
        return MaskedBatch(inputs_L, positions_K, targets_K, chosen_K.astype(jnp.float32))

    return jax.vmap(mask_row)(tokens_BxL, maskable_BxL, rows_B)


def uniform(bits: jax.Array) -> jax.Array:
    """Maps random uint32 to float32 in [0, 1), multiples of 2^-24."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)
