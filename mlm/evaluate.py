"""Evaluation: sums over the held-out sequences, divided once."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mlm import parallel
from mlm.steps import EvalSums


def unigram_log_probs(counts_V: np.ndarray, *, special_ids: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities of the unigram model, which predicts each token by its frequency alone.

    Args:
      counts_V: occurrences of each id in the training data; one is added to each, so no probability is 0.
      special_ids: ids that are never predicted; the distribution leaves them out.

    Returns:
      float32 [V]. Special ids have the value 0, which is never looked up, instead of -inf.
    """
    smoothed_V = counts_V.astype(np.float64) + 1.0
    smoothed_V[list(special_ids)] = 0.0
    probs_V = smoothed_V / smoothed_V.sum()
    probs_V[list(special_ids)] = 1.0
    return np.log(probs_V).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """This process's part of an evaluation batch, all of one source."""

    source: str
    tokens_BxL: np.ndarray
    rows_B: np.ndarray  # index of each sequence in the evaluation set: its masks do not depend on the batch size


class Evaluator:
    """Evaluates the same sequences with the same masks at every call.

    Batches, processes and devices get the sequences in order, one source after the other. The last batch of a source
    is filled up with padding, which adds nothing to the sums. Every process holds all sequences.
    """

    def __init__(
        self,
        eval_step: Callable[..., EvalSums],
        rows_RxL: np.ndarray,
        *,
        per_device_batch_size: int,
        pad_id: int,
        counts: Mapping[str, int] | None = None,
    ):
        """Splits the evaluation set into batches.

        Args:
          eval_step: `steps.eval_step` under `data_parallel`.
          rows_RxL: int32, the evaluation set.
          per_device_batch_size: sequences per batch and device.
          pad_id: id of the padding token.
          counts: number of sequences per source, in order. With several sources each also gets its metric,
            `eval/<name>/loss`.
        """
        self._eval_step = eval_step
        self._batches = list(_split(rows_RxL, counts or {"": len(rows_RxL)}, per_device_batch_size, pad_id))

    def __call__(self, params: Any, unigram_V: np.ndarray) -> dict[str, float]:
        """Returns the metrics of stacked parameters. Reads results from the devices once, at the end."""
        unigram_V = parallel.replicate(unigram_V)
        results = parallel.first_replica(
            [
                self._eval_step(params, parallel.shard(batch.tokens_BxL), parallel.shard(batch.rows_B), unigram_V)
                for batch in self._batches
            ]
        )
        total = _add(results)
        loss = _mean(total.sums.loss, total)
        metrics = {
            "eval/loss": loss,
            "eval/accuracy": _mean(total.sums.correct, total),
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/unigram_loss": _mean(total.unigram_loss, total),
        }
        sources = [batch.source for batch in self._batches]
        if len(set(sources)) > 1:
            for source in dict.fromkeys(sources):
                own = _add([result for result, name in zip(results, sources, strict=True) if name == source])
                metrics[f"eval/{source}/loss"] = _mean(own.sums.loss, own)
        return metrics


def _split(
    rows_RxL: np.ndarray, counts: Mapping[str, int], per_device_batch_size: int, pad_id: int
) -> Iterator[_Batch]:
    """This process's part of every batch."""
    local_size = per_device_batch_size * jax.local_device_count()
    global_size = per_device_batch_size * jax.device_count()
    first_row = 0
    for source, count in counts.items():
        padded = -(-count // global_size) * global_size
        padding = np.full((padded - count, rows_RxL.shape[1]), pad_id, np.int32)
        tokens = np.concatenate([rows_RxL[first_row : first_row + count], padding])
        rows = np.arange(first_row, first_row + padded, dtype=np.int32)
        for start in range(jax.process_index() * local_size, padded, global_size):
            own = slice(start, start + local_size)
            yield _Batch(source, tokens[own], rows[own])
        first_row += count


def _add(results: Sequence[EvalSums]) -> EvalSums:
    return jax.tree.map(lambda *values: float(np.sum(values, dtype=np.float64)), *results)


def _mean(value: Any, result: EvalSums) -> float:
    """The mean over predicted tokens of a value that was summed over them."""
    return float(value) / max(float(result.sums.count), 1.0)
