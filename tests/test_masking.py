"""Masking: every frequency is within five standard deviations of its probability; the key determines all draws."""

import dataclasses
import fractions
import functools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.masking import MaskingSpec, mask_tokens, uniform

# Special ids at both ends and in the middle.
SPECIAL = (0, 17, 18, 31, 49)
PAD, MASK, VOCAB = 31, 17, 50
ORDINARY = np.setdiff1d(np.arange(VOCAB), SPECIAL)
SPEC = MaskingSpec(
    mlm_probability=0.15,
    mask_replace_prob=0.8,
    random_replace_prob=0.1,
    mask_id=MASK,
    special_ids=SPECIAL,
    num_ids=VOCAB,
)


@functools.partial(jax.jit, static_argnames="spec")
def jitted(tokens, rows, key, spec):
    return mask_tokens(tokens, rows_B=rows, key=key, spec=spec)


def mask(tokens, *, rows=None, seed=0, **spec):
    rows = jnp.arange(len(tokens)) if rows is None else jnp.asarray(rows)
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.device_get(jitted(tokens, rows, key, dataclasses.replace(SPEC, **spec)))


def ordinary_rows(rows, length, seed=0):
    return np.random.default_rng(seed).choice(ORDINARY, (rows, length)).astype(np.int32)


def assert_binomial(count, trials, probability):
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) <= 5 * deviation


def assert_uniform(counts):
    """Chi-square: its mean is the degrees of freedom, its variance twice that."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def assert_valid(tokens, masked):
    """Properties of every row, whatever is drawn."""
    maskable = ~np.isin(tokens, SPECIAL)
    used = masked.label_weights_BxK == 1
    np.testing.assert_array_equal(masked.label_weights_BxK[~used], 0)
    assert (np.diff(np.sort(masked.masked_positions_BxK)) > 0).all()  # Positions of a row differ.
    np.testing.assert_array_equal(masked.labels_BxK, np.take_along_axis(tokens, masked.masked_positions_BxK, 1))
    assert not np.isin(masked.labels_BxK[used], SPECIAL).any()
    # Only predicted tokens may change, and their replacements are never special, except the mask.
    chosen = np.zeros(tokens.shape, bool)
    np.put_along_axis(chosen, masked.masked_positions_BxK, used, 1)
    assert not (chosen & ~maskable).any()
    np.testing.assert_array_equal(masked.inputs_BxL[~chosen], tokens[~chosen])
    shown = masked.inputs_BxL[chosen]
    assert np.isin(shown, [*ORDINARY, MASK]).all()


@pytest.mark.parametrize(("mask_prob", "random_prob"), [(0.8, 0.1), (0.0, 0.0), (0.5, 0.5)])
def test_fractions_of_masked_random_and_unchanged_tokens(mask_prob, random_prob):
    tokens = ordinary_rows(8192, 32)
    masked = mask(tokens, mask_replace_prob=mask_prob, random_replace_prob=random_prob)
    used = masked.label_weights_BxK == 1
    shown = np.take_along_axis(masked.inputs_BxL, masked.masked_positions_BxK, 1)[used]
    labels = masked.labels_BxK[used]
    # One of len(ORDINARY) random tokens equals the original.
    changed = random_prob * (1 - 1 / len(ORDINARY))
    assert_binomial((shown == MASK).sum(), used.sum(), mask_prob)
    assert_binomial(((shown != MASK) & (shown != labels)).sum(), used.sum(), changed)
    assert_binomial((shown == labels).sum(), used.sum(), 1 - mask_prob - changed)


@pytest.mark.parametrize(("length", "probability"), [(100, 0.15), (20, 0.5), (8, 1.0), (5, 0.01)])
def test_expected_number_of_predictions_is_exact_for_any_number_of_tokens(length, probability):
    tokens = ordinary_rows(300 * (length + 1), length)
    maskable = np.arange(len(tokens)) % (length + 1)
    # A given number of special tokens, at random positions.
    tokens[np.arange(length) >= maskable[:, None]] = PAD
    tokens = np.random.default_rng(1).permuted(tokens, axis=1)
    masked = mask(tokens, mlm_probability=probability)
    assert_valid(tokens, masked)
    numbers = masked.label_weights_BxK.sum(1)
    for n in range(length + 1):
        expected = fractions.Fraction(str(probability)) * n
        drawn = numbers[maskable == n]
        # floor(expected + u): one of the two nearest integers, the upper one with the fractional part as probability.
        low = math.floor(expected)
        assert set(drawn) <= {low, math.ceil(expected)}
        assert_binomial((drawn - low).sum(), len(drawn), float(expected - low))


def test_row_of_special_tokens_is_unchanged():
    tokens = np.array([[0, 18, 49, PAD], [PAD] * 4, [MASK] * 4], np.int32)
    masked = mask(tokens, mlm_probability=1.0)
    np.testing.assert_array_equal(masked.inputs_BxL, tokens)
    assert masked.label_weights_BxK.sum() == 0


def test_probability_one_predicts_every_token_once():
    tokens = ordinary_rows(500, 8)
    tokens[:, 0], tokens[::2, 5:] = 0, PAD
    masked = mask(tokens, mlm_probability=1.0)
    assert_valid(tokens, masked)
    np.testing.assert_array_equal(masked.label_weights_BxK.sum(1), (~np.isin(tokens, SPECIAL)).sum(1))


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    tokens=hnp.arrays(np.int32, (4, 12), elements={"min_value": 0, "max_value": VOCAB - 1}),
    seed=hnp.arrays(np.uint32, ()),
)
def test_any_tokens_give_a_valid_batch(tokens, seed):
    assert_valid(tokens, mask(tokens, seed=int(seed), mlm_probability=0.4, mask_replace_prob=0.1))


def test_positions_are_uniform():
    masked = mask(ordinary_rows(8192, 32))
    # All predicted positions, and the first of each row: no position may be more likely to come first either.
    for used in (
        masked.label_weights_BxK == 1,
        masked.label_weights_BxK * (np.arange(masked.label_weights_BxK.shape[1]) == 0) == 1,
    ):
        assert_uniform(np.bincount(masked.masked_positions_BxK[used], minlength=32))


def test_replacements_are_uniform_over_ordinary_ids():
    tokens = np.full((8192, 32), ORDINARY[3], np.int32)
    masked = mask(tokens, mask_replace_prob=0.0, random_replace_prob=1.0)
    shown = np.take_along_axis(masked.inputs_BxL, masked.masked_positions_BxK, 1)[masked.label_weights_BxK == 1]
    counts = np.bincount(shown, minlength=VOCAB)
    assert counts[list(SPECIAL)].sum() == 0
    assert_uniform(counts[ORDINARY])


def test_replacement_does_not_depend_on_the_position():
    masked = mask(ordinary_rows(8192, 32))
    used = masked.label_weights_BxK == 1
    hidden = np.take_along_axis(masked.inputs_BxL, masked.masked_positions_BxK, 1) == MASK
    for k in range(used.shape[1]):
        assert_binomial((hidden & used)[:, k].sum(), used[:, k].sum(), 0.8)
    for position in range(32):
        here = used & (masked.masked_positions_BxK == position)
        assert_binomial((hidden & here).sum(), here.sum(), 0.8)


def test_masks_depend_on_the_row_number_not_on_the_batch():
    tokens = ordinary_rows(8, 24)
    together = mask(tokens, rows=np.arange(8) + 5)
    order = np.array([3, 0, 7, 5, 1, 2, 6, 4])
    for batches in ([order], np.split(order, 4)):
        parts = [mask(tokens[rows], rows=rows + 5) for rows in batches]
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        jax.tree.map(np.testing.assert_array_equal, joined, jax.tree.map(lambda leaf: leaf[order], together))


def test_masks_differ_by_row_and_key():
    tokens = np.repeat(ordinary_rows(1, 64), 40, axis=0)
    masks = []
    for seed in range(3):
        masked = mask(tokens, seed=seed)
        masks += [tuple(sorted(row)) for row in masked.masked_positions_BxK]
    # 120 draws of 10 positions of 64: the probability that two are equal is 120^2 / 2 / 1.5e11.
    assert len(set(masks)) == 120


def test_max_predictions_per_seq_is_the_ceiling_of_probability_times_length():
    for probability in ("0.15", "0.07", "0.55", "0.3", "0.1", "0.2", "0.7", "0.5", "1.0", "0.01"):
        spec = dataclasses.replace(SPEC, mlm_probability=float(probability))
        for length in range(1, 513):
            assert spec.max_predictions_per_seq(length) == math.ceil(fractions.Fraction(probability) * length)


def test_special_ids_past_num_ids_are_ignored():
    tokens = ordinary_rows(200, 16)
    masked = mask(tokens, num_ids=30, special_ids=(0, MASK, 35), random_replace_prob=1.0, mask_replace_prob=0.0)
    shown = np.take_along_axis(masked.inputs_BxL, masked.masked_positions_BxK, 1)[masked.label_weights_BxK == 1]
    np.testing.assert_array_equal(np.unique(shown), np.setdiff1d(np.arange(30), (0, MASK)))


def test_uniform_spans_zero_to_one_and_excludes_one():
    bits = jnp.array([0, 2**31, 2**32 - 1], jnp.uint32)
    np.testing.assert_array_equal(uniform(bits), [0.0, 0.5, 1 - 2.0**-24])
