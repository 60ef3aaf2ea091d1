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
from mlm.settings import WORD_START

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
def jitted(tokens, rows, key, spec, rate):
    return mask_tokens(tokens, rows_B=rows, key=key, spec=spec, mlm_probability=rate)


def mask(tokens, *, rows=None, seed=0, rate=None, **spec):
    rows = jnp.arange(len(tokens)) if rows is None else jnp.asarray(rows)
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.device_get(jitted(tokens, rows, key, dataclasses.replace(SPEC, **spec), rate))


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
    counts = masked.counts_B
    np.testing.assert_array_equal(counts.maskable, maskable.sum(1))
    np.testing.assert_array_equal(counts.predicted, used.sum(1))
    is_mask = chosen & (masked.inputs_BxL == MASK)
    np.testing.assert_array_equal(counts.mask_replaced, is_mask.sum(1))
    # A random token may be the original one.
    changed = (chosen & ~is_mask & (masked.inputs_BxL != tokens)).sum(1)
    assert (changed <= counts.random_replaced).all()
    assert (counts.random_replaced <= used.sum(1) - is_mask.sum(1)).all()


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def rows_of_words(num_rows, length, seed=0):
    """Random tokens in words of 1 to 4 tokens, some special; returns ids with word starts, plain ids and word starts.

    The first word of a row may have begun in the row before.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.choice([*ORDINARY, 0, PAD], (num_rows, length)).astype(np.int32)
    starts = rng.random((num_rows, length)) < 0.5
    return np.where(starts, tokens | WORD_START, tokens).astype(np.int32), tokens, starts


def words_of(tokens, starts):
    """Lists the words of a row as lists of positions, in a plain loop."""
    words, continues = [], False
    for position, (token, start) in enumerate(zip(tokens, starts, strict=True)):
        if token in SPECIAL:
            continues = False
            continue
        if start or not continues:
            words.append([])
        words[-1].append(position)
        continues = True
    return words


def actions_of(tokens, masked, row):
    """Position -> "mask", "random" or "kept" of the predicted tokens; random tokens differ from all ordinary ones."""
    used = masked.label_weights_BxK[row] == 1
    positions = masked.masked_positions_BxK[row][used]
    inputs = masked.inputs_BxL[row][positions]
    names = np.where(inputs == MASK, "mask", np.where(inputs == tokens[row][positions], "kept", "random"))
    return dict(zip(positions.tolist(), names.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.15, 0.5, 1.0])
def test_whole_words_are_chosen_until_the_next_would_exceed_the_count(probability):
    marked, tokens, starts = rows_of_words(400, 32)
    masked = mask(
        marked,
        strategy="whole_word",
        has_word_starts=True,
        mlm_probability=probability,
        mask_replace_prob=0.5,
        random_replace_prob=0.0,
    )
    assert_valid(tokens, masked)
    actions = set()
    for row in range(len(tokens)):
        predicted = actions_of(tokens, masked, row)
        words = words_of(tokens[row], starts[row])
        budget = math.ceil(probability * sum(map(len, words)) - 1e-6)
        left = [word for word in words if word[0] not in predicted]
        for word in words:
            assert len({position in predicted for position in word}) == 1  # A word is never cut.
            if word[0] in predicted:
                assert len({predicted[position] for position in word}) == 1
                actions.add(predicted[word[0]])
        assert len(predicted) <= budget
        # The next word did not fit, so at least one is too long for the rest.
        assert not left or max(map(len, left)) > math.floor(probability * sum(map(len, words)) + 1e-6) - len(predicted)
    assert actions == {"mask", "kept"}
    if probability == 1.0:
        assert masked.label_weights_BxK.sum() == (~np.isin(tokens, SPECIAL)).sum()


@pytest.mark.slow
def test_every_word_is_equally_likely_whatever_its_position():
    """Words of two tokens each, and room for one of them."""
    tokens = ordinary_rows(8192, 16)
    marked = tokens.copy()
    marked[:, ::2] |= WORD_START
    masked = mask(marked, strategy="whole_word", has_word_starts=True, mlm_probability=0.125)
    used = masked.label_weights_BxK == 1
    assert (used.sum(1) == 2).all()
    assert_uniform(np.bincount(masked.masked_positions_BxK[:, 0] // 2, minlength=8))


@pytest.mark.slow
def test_spans_are_whole_words_with_geometric_lengths_up_to_ten():
    tokens = ordinary_rows(4000, 128)
    marked = tokens | WORD_START  # Each token is a word.
    keys = dict(strategy="span", has_word_starts=True, mlm_probability=0.1, mask_replace_prob=1.0)
    masked = mask(marked, **keys, random_replace_prob=0.0)
    assert_valid(tokens, masked)
    chosen = np.zeros(tokens.shape, bool)
    np.put_along_axis(chosen, masked.masked_positions_BxK, masked.label_weights_BxK == 1, 1)
    edges = np.diff(np.pad(chosen, ((0, 0), (1, 1))).astype(int), axis=1)
    lengths = np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]
    # Runs of neighboring spans and spans at the boundary of the budget change the distribution a little: the mean of
    # a geometric one with p = 0.2 cut off at 10 is 3.8 (Joshi et al., 2020, section 3.1).
    assert 3.0 < lengths.mean() < 4.6
    shares = np.bincount(lengths)[1:6] / len(lengths)
    assert (np.diff(shares) < 0).all()
    assert 0.75 < masked.label_weights_BxK.sum() / (0.1 * tokens.size) <= 1.0


@pytest.mark.slow
def test_spans_do_not_cut_words_or_cross_special_tokens_and_are_replaced_as_one():
    marked, tokens, starts = rows_of_words(400, 48)
    masked = mask(
        marked,
        strategy="span",
        has_word_starts=True,
        mlm_probability=0.4,
        mask_replace_prob=0.5,
        random_replace_prob=0.0,
    )
    assert_valid(tokens, masked)
    longest = 0
    for row in range(len(tokens)):
        predicted = actions_of(tokens, masked, row)
        for word in words_of(tokens[row], starts[row]):
            assert len({predicted.get(position) for position in word}) == 1
        longest = max(longest, len(predicted))
    assert longest == math.ceil(0.4 * 48 - 1e-6) or longest > 10


def test_the_rate_of_a_step_may_be_lower_than_that_of_the_spec():
    tokens = ordinary_rows(2000, 40)
    masked = mask(tokens, mlm_probability=0.5, rate=jnp.float32(0.2))
    assert masked.masked_positions_BxK.shape == (2000, 20)
    np.testing.assert_array_equal(masked.label_weights_BxK.sum(1), 8)
