"""The evaluation set's loss: sums over all rows, divided once."""

from collections.abc import Callable, Mapping
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

    Rows are dealt to batches, processes and devices in order, those of each source apart; a source's last batch is
    filled up with rows of padding, which count for nothing. Every process holds all rows.
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
        """Takes the step under `data_parallel`, and the rows, int32.

        `counts` says how many of them are of which source, one source after the other. With several, each has a loss
        of its own, `eval/<name>/loss`.
        """
        local = per_device_batch_size * jax.local_device_count()
        batch = per_device_batch_size * jax.device_count()
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._sources: list[str] = []  # of the batches
        first = 0
        for name, count in (counts or {"": len(rows_RxL)}).items():
            filled = -(-count // batch) * batch
            padding = np.full((filled - count, rows_RxL.shape[1]), pad_id, np.int32)
            tokens = np.concatenate([rows_RxL[first : first + count], padding])
            for i in range(jax.process_index() * local, filled, batch):
                # A row's number, and so its masks, do not depend on the size of batches.
                self._batches.append((tokens[i : i + local], np.arange(first + i, first + i + local, dtype=np.int32)))
                self._sources.append(name)
            first += count
        self._step = eval_step

    def __call__(self, params: Any, unigram_V: np.ndarray) -> dict[str, float]:
        """Returns the metrics for stacked parameters; reads the devices once, at the end."""
        unigram = parallel.replicate(unigram_V)
        results = [
            self._step(params, parallel.shard(tokens), parallel.shard(rows), unigram) for tokens, rows in self._batches
        ]
        results = parallel.first_replica(results)
        total = _add_up(results)
        count = max(total.sums.count, 1.0)
        loss = total.sums.loss / count
        metrics = {
            "eval/loss": loss,
            "eval/accuracy": total.sums.correct / count,
            "eval/perplexity": float(np.exp(min(loss, 700.0))),
            "eval/unigram_loss": total.unigram_loss / count,
        }
        names = dict.fromkeys(self._sources)
        for name in names if len(names) > 1 else ():
            part = _add_up([result for result, of in zip(results, self._sources, strict=True) if of == name])
            metrics[f"eval/{name}/loss"] = part.sums.loss / max(part.sums.count, 1.0)
        return metrics


def _add_up(results: list[EvalSums]) -> EvalSums:
    return jax.tree.map(lambda *parts: float(np.sum(parts, dtype=np.float64)), *results)
