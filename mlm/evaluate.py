"""The evaluation set's loss: sums over all rows, divided once."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mlm import parallel
from mlm.steps import EvalSums


def unigram_log_probs(counts_V: np.ndarray, *, special_ids: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities of a model that knows how often each token occurs, and nothing else.

    Args:
      counts_V: how often each id was seen in training. One is added to each, so that none is impossible.
      special_ids: ids that are never predicted; they get no share.

    Returns:
      float32, -inf nowhere: special ids have the log-probability 0, and are never looked up.
    """
    smoothed_V = counts_V.astype(np.float64) + 1.0
    smoothed_V[list(special_ids)] = 0.0
    probs_V = smoothed_V / smoothed_V.sum()
    probs_V[list(special_ids)] = 1.0
    return np.log(probs_V).astype(np.float32)


class Evaluator:
    """Evaluates the same rows with the same masks, at every call.

    Rows are dealt to batches, processes and devices in order; the last batch is filled up with rows of padding, which
    count for nothing. Every process holds all rows.
    """

    def __init__(
        self,
        eval_step: Callable[..., EvalSums],
        rows_RxL: np.ndarray,
        *,
        per_device_batch_size: int,
        pad_id: int,
    ):
        """Takes the step under `data_parallel`, and the rows, int32."""
        local = per_device_batch_size * jax.local_device_count()
        batch = per_device_batch_size * jax.device_count()
        filled = -(-len(rows_RxL) // batch) * batch
        padding = np.full((filled - len(rows_RxL), rows_RxL.shape[1]), pad_id, np.int32)
        tokens = np.concatenate([rows_RxL, padding])
        starts = range(jax.process_index() * local, filled, batch)
        self._batches = [(tokens[i : i + local], np.arange(i, i + local, dtype=np.int32)) for i in starts]
        self._step = eval_step

    def __call__(self, params: Any, unigram_V: np.ndarray) -> dict[str, float]:
        """Returns the metrics for stacked parameters; reads the devices once, at the end."""
        unigram = parallel.replicate(unigram_V)
        results = [
            self._step(params, parallel.shard(tokens), parallel.shard(rows), unigram)
            for tokens, rows in self._batches
        ]
        total = jax.tree.map(lambda *parts: float(np.sum(parts, dtype=np.float64)), *parallel.first_replica(results))
        count = max(total.sums.count, 1.0)
        loss = total.sums.loss / count
        return {
            "eval/loss": loss,
            "eval/accuracy": total.sums.correct / count,
            "eval/perplexity": float(np.exp(min(loss, 700.0))),
            "eval/unigram_loss": total.unigram_loss / count,
        }
