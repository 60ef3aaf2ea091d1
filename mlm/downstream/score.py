"""Scores of sentences by masking: pseudo-log-likelihood, pseudo-perplexity, minimal pairs.

- PLL (Salazar et al. 2020, "Masked Language Model Scoring"): the sum over the tokens of log p(token | all others), each
  token masked in turn. Begin and end tokens are given, not scored.
- PLL-word-l2r (Kauf and Ivanova 2023, "A Better Way to Do Masked Language Model Scoring"): while a token is scored, the
  later tokens of its word are masked, too; otherwise the rest of a long word gives its beginning away.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mlm import parallel
from mlm.data.tokenizer import Tokenizer
from mlm.downstream import tokens
from mlm.load import LoadedModel
from mlm.models.encoder import MaskedLM

# Smaller differences of two scores, in nats, are rounding.
_TIE = 1e-4


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of N sentences, in nats.

    Attributes:
      pll: float64 [N].
      pll_word_l2r: float64 [N].
      tokens: int [N], the number of scored tokens.
      num_truncated: number of sentences longer than the model, which were cut.
    """

    pll: np.ndarray
    pll_word_l2r: np.ndarray
    tokens: np.ndarray
    num_truncated: int

    def perplexities(self) -> tuple[float, float]:
        """Returns exp(-PLL / tokens) of all sentences together, with PLL and with PLL-word-l2r."""
        count = max(1, self.tokens.sum())
        return float(np.exp(-self.pll.sum() / count)), float(np.exp(-self.pll_word_l2r.sum() / count))


def score(loaded: LoadedModel, texts: Sequence[str]) -> Scores:
    """Scores sentences; the words are those of the tokenizer's pre-tokenizer.

    Args:
      loaded: a model with a masked-language-model head.
      texts: N sentences.
    """
    sequences = tokens.encode(loaded.tokenizer, texts, max_length=loaded.max_tokens)
    rows = masked_copies(sequences)
    log_probs = _log_probs(loaded, sequences.ids, rows)
    numbers = np.array([row.sentence for row in rows], int)

    def sums(is_in: Sequence[bool]) -> np.ndarray:
        return np.bincount(numbers, weights=np.where(is_in, log_probs, 0), minlength=len(texts))

    in_pll, in_word_l2r = ([getattr(row, name) for row in rows] for name in ("in_pll", "in_word_l2r"))
    counts = np.bincount(numbers, weights=in_pll, minlength=len(texts)).astype(int)
    return Scores(sums(in_pll), sums(in_word_l2r), counts, sequences.num_truncated)


@dataclasses.dataclass(frozen=True)
class MaskedCopy:
    """A sentence with some tokens masked; the first of them is scored, for one of the two scores or for both."""

    sentence: int
    masked_positions: Sequence[int]
    in_pll: bool
    in_word_l2r: bool


def masked_copies(sequences: tokens.Sequences) -> list[MaskedCopy]:
    """Returns the copies of sentences that their scores need, in the order of the sentences."""
    return [
        MaskedCopy(sentence, masked, in_pll, in_word_l2r)
        for sentence, encoding in enumerate(sequences.encodings)
        for masked, in_pll, in_word_l2r in _masks(encoding.word_ids)
    ]


def _masks(word_ids: Sequence[int | None]) -> Iterator[tuple[list[int], bool, bool]]:
    """Yields (masked positions, in PLL, in PLL-word-l2r): the same for the last token of a word."""
    for position, word in enumerate(word_ids):
        if word is None:
            continue
        later = [other for other in range(position + 1, len(word_ids)) if word_ids[other] == word]
        yield [position], True, not later
        if later:
            yield [position, *later], False, True


def _log_probs(loaded: LoadedModel, ids: Sequence[Sequence[int]], rows: Sequence[MaskedCopy]) -> np.ndarray:
    """Returns float64 [rows]: the log-probability of the first masked token of each row."""
    model, tokenizer = MaskedLM(loaded.encoder), loaded.tokenizer
    params = parallel.copy_to_devices(loaded.params)
    found = np.zeros(len(rows))
    with tokens.progress_bar(len(rows), "masked copies") as bar:
        for numbers, size, length in tokens.batches(
            [len(ids[row.sentence]) for row in rows],
            max_length=loaded.max_tokens,
            rows_multiple=jax.local_device_count(),
        ):
            batch = [rows[number] for number in numbers]
            arrays = parallel.split_rows(copies_as_arrays(ids, batch, shape=(size, length), tokenizer=tokenizer))
            found[numbers] = np.asarray(_first_log_probs(params, *arrays, model=model))[: len(numbers)]
            bar.update(len(numbers))
    return found


def copies_as_arrays(
    ids: Sequence[Sequence[int]], copies: Sequence[MaskedCopy], *, shape: tuple[int, int], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns inputs int32 [shape], and positions and labels of the scored tokens int32 [rows, 1]; padding at the end.

    Args:
      ids: token ids of the sentences.
      copies: the rows.
      shape: rows and tokens.
      tokenizer: the tokenizer.
    """
    inputs_BxL = tokens.padded((ids[copy.sentence] for copy in copies), shape=shape, value=tokenizer.pad_id)
    positions_Bx1 = tokens.padded((copy.masked_positions[:1] for copy in copies), shape=(shape[0], 1), value=0)
    labels_Bx1 = np.take_along_axis(inputs_BxL, positions_Bx1, axis=1)
    for row, copy in enumerate(copies):
        inputs_BxL[row, list(copy.masked_positions)] = tokenizer.mask_id
    return inputs_BxL, positions_Bx1, labels_Bx1


def first_log_probs(
    params: Any, inputs_BxL: jax.Array, positions_Bx1: jax.Array, labels_Bx1: jax.Array, *, model: MaskedLM
) -> jax.Array:
    """Returns [B], the log-probabilities of the labels."""
    logits_Bx1xV: Any = model.apply({"params": params}, inputs_BxL, positions_Bx1)
    log_probs_Bx1xV = jax.nn.log_softmax(logits_Bx1xV)
    return jax.numpy.take_along_axis(log_probs_Bx1xV, labels_Bx1[..., None], axis=-1)[:, 0, 0]


_first_log_probs = jax.jit(first_log_probs, static_argnames="model")


def fraction_better(good: np.ndarray, bad: np.ndarray) -> float:
    """Returns how often the good score is the higher one; a tie is wrong."""
    return float(np.mean(good - bad > _TIE))


@dataclasses.dataclass(frozen=True)
class PairResult:
    """Minimal pairs of a phenomenon: how often the good sentence has the higher score."""

    phenomenon: str
    pairs: int
    pll_accuracy: float
    pll_word_l2r_accuracy: float
    ties: int


def compare_pairs(good: Scores, bad: Scores, phenomena: Sequence[str]) -> list[PairResult]:
    """Returns the accuracy per phenomenon, in alphabetical order, then that of all pairs.

    A tie is wrong: a model that scores everything alike knows nothing (BLiMP, Warstadt et al. 2020, asks for a strictly
    higher score). Ties are those of PLL.
    """

    def result(name: str, is_in: np.ndarray) -> PairResult:
        return PairResult(
            phenomenon=name,
            pairs=int(is_in.sum()),
            pll_accuracy=fraction_better(good.pll[is_in], bad.pll[is_in]),
            pll_word_l2r_accuracy=fraction_better(good.pll_word_l2r[is_in], bad.pll_word_l2r[is_in]),
            ties=int(np.sum(np.abs(good.pll - bad.pll)[is_in] <= _TIE)),
        )

    names = np.array(phenomena)
    of_each = [result(str(name), names == name) for name in np.unique(names)]
    return [*of_each, result("all pairs", np.ones(len(names), bool))]


def format_pairs(results: Sequence[PairResult]) -> str:
    """Returns the table as lines for a terminal, in percent."""
    width = max(len(result.phenomenon) for result in results)
    lines = [f"{'':{width}}   pairs     PLL   PLL-word-l2r   ties"]
    lines += [
        f"{result.phenomenon:{width}}{result.pairs:8,}{100 * result.pll_accuracy:8.1f}"
        f"{100 * result.pll_word_l2r_accuracy:15.1f}{result.ties:7,}"
        for result in results
    ]
    return "\n".join(lines)
