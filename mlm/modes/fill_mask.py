"""--mode=fill_mask: prints the five most probable tokens for each mask of some sentences."""

import sys
from collections.abc import Iterable, Sequence

import jax

from mlm.errors import UserError
from mlm.export.fill_mask import fill_mask, format_predictions
from mlm.load import load_any
from mlm.models.encoder import MaskedLM
from mlm.settings import RunSettings

# Number of sentences of a file or a pipe that are predicted together.
_BATCH_SIZE = 64


def run(settings: RunSettings, workdir_path: str, *, arguments: Sequence[str], step: int | None = None) -> None:
    """Prints the most probable tokens for each mask of the sentences.

    Args:
      settings: the run's settings.
      workdir_path: the run's work directory.
      arguments: sentences with "<mask>" or the tokenizer's own mask token; none: the lines of standard input.
      step: the checkpoint to use; None for the model in `model/`.

    Raises:
      UserError: the model does not exist, or a sentence has no mask or is too long.
    """
    loaded = load_any(settings, workdir_path, model=None, step=step, needs_head=True)
    model, params = MaskedLM(loaded.encoder), jax.device_put(loaded.params)
    is_empty = True
    for sentences in _batches(arguments, _lines()):
        is_empty = False
        print(format_predictions(fill_mask(model, params, loaded.tokenizer, sentences)), flush=True)
    if is_empty:
        raise UserError("--mode=fill_mask: no sentences; pass them after the flags, or one per line on standard input")


def _lines() -> Iterable[str]:
    return (line.strip() for line in sys.stdin if line.strip())


def _batches(sentences: Sequence[str], lines: Iterable[str]) -> Iterable[list[str]]:
    """Yields all sentences at once; without sentences, batches of lines, or single lines if a person types them."""
    if sentences:
        yield list(sentences)
        return
    size = 1 if sys.stdin.isatty() else _BATCH_SIZE
    batch = []
    for line in lines:
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
