"""--mode=fill_mask: prints the five best tokens for each mask of some sentences."""

import os
import sys
from collections.abc import Iterable, Sequence

import jax

from mlm.errors import UserError
from mlm.export.fill_mask import fill_mask, table
from mlm.load import load_checkpoint, load_model
from mlm.models.encoder import MaskedLM
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings

# Sentences of a file or a pipe that are predicted together.
_SENTENCES_AT_ONCE = 64


def run(settings: RunSettings, workdir: str, *, arguments: Sequence[str], step: int | None = None) -> None:
    """Prints the five best words for each mask of the sentences: the command line's, or those of standard input.

    Args:
      settings: those of the run.
      workdir: the run's.
      arguments: sentences with "<mask>" or the tokenizer's own mask token; none: standard input's lines.
      step: the checkpoint to ask; None for the model in `model/`.

    Raises:
      UserError: there is no such model, or a sentence has no mask or is too long.
    """
    place = WorkDir(workdir)
    if step is None:
        place.fetch_weights()
        saved = load_model(place.model, shown=os.path.join(place.display_path, "model"))
    else:
        saved = load_checkpoint(settings, place, step=step)
    model, params = MaskedLM(saved.encoder), jax.device_put(saved.params)
    asked = False
    for some in _batches(arguments, _lines()):
        asked = True
        print(table(fill_mask(model, params, saved.tokenizer, some)), flush=True)
    if not asked:
        raise UserError("no sentence; write some after the flags, or send lines to standard input")


def _lines() -> Iterable[str]:
    return (line.strip() for line in sys.stdin if line.strip())


def _batches(sentences: Sequence[str], lines: Iterable[str]) -> Iterable[list[str]]:
    """The sentences at once; or lines, some at a time, and one where a person types them."""
    if sentences:
        yield list(sentences)
        return
    at_once = 1 if sys.stdin.isatty() else _SENTENCES_AT_ONCE
    some = []
    for line in lines:
        some.append(line)
        if len(some) == at_once:
            yield some
            some = []
    if some:
        yield some
