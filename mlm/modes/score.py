"""--mode=score: pseudo-log-likelihoods of sentences, or of minimal pairs."""

import json
import os
from collections.abc import Sequence
from typing import Any

from mlm.downstream.score import Scores, compare_pairs, format_pairs, score
from mlm.downstream.tasks import check_texts, read_columns
from mlm.errors import UserError
from mlm.load import load_any
from mlm.run.storage import try_to_write
from mlm.settings import RunSettings


def run(
    settings: RunSettings | None,
    workdir_path: str | None,
    *,
    arguments: Sequence[str],
    model: str | None = None,
    step: int | None = None,
    output: str | None = None,
) -> None:
    """Prints the pseudo-perplexity of a file's texts, or the accuracy on its minimal pairs.

    Args:
      settings: the run's settings; None with `model`.
      workdir_path: the run's work directory; None with `model`.
      arguments: one file, with the column text (or lines of text), or with good, bad and optionally phenomenon.
      model: a model directory or a name on the hub, instead of a run.
      step: the run's checkpoint; None for the model in `model/`.
      output: a file of JSON lines to write, one for each row of the input; None to write no file.

    Raises:
      UserError: the file or the model cannot be used.
    """
    path = one_file(arguments, mode="score")
    columns = read_columns(path, flag=path)
    is_pairs = {"good", "bad"} <= columns.keys()
    names = ("good", "bad") if is_pairs else ("text",)
    if names[0] not in columns:
        raise UserError(
            f"{path}: needs a column text, or good and bad; it has only {', '.join(sorted(columns))}; rename them"
        )
    for name in names:
        check_texts(columns[name], name, flag=path)
    check_output(output, path)
    loaded = load_any(settings, workdir_path, model=model, step=step, needs_head=True)
    # Scored together, so that few shapes are compiled.
    scores = score(loaded, [text for name in names for text in columns[name]])
    count = len(columns[names[0]])
    parts = [_part(scores, slice(start, start + count)) for start in range(0, len(names) * count, count)]
    if is_pairs:
        phenomena = [str(name) for name in columns.get("phenomenon", ["all"] * count)]
        results = compare_pairs(parts[0], parts[1], phenomena)
        print(format_pairs(results if len(results) > 2 else results[-1:]))
    else:
        pll, word_l2r = scores.perplexities()
        print(f"{count:,} texts, {scores.tokens.sum():,} tokens")
        print(f"pseudo-perplexity {pll:.3f} (PLL), {word_l2r:.3f} (PLL-word-l2r)")
    if scores.num_truncated:
        print(f"{scores.num_truncated:,} texts were cut to {loaded.max_tokens} tokens")
    if output is not None:
        with open(output, "w", encoding="utf-8") as file:
            for row in range(count):
                fields: dict[str, Any] = {}
                for name, part in zip(names, parts, strict=True):
                    prefix = f"{name}_" if is_pairs else ""
                    fields[name] = columns[name][row]
                    fields[f"{prefix}pll"] = float(part.pll[row])
                    fields[f"{prefix}pll_word_l2r"] = float(part.pll_word_l2r[row])
                    fields[f"{prefix}tokens"] = int(part.tokens[row])
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _part(scores: Scores, rows: slice) -> Scores:
    return Scores(scores.pll[rows], scores.pll_word_l2r[rows], scores.tokens[rows], scores.num_truncated)


def one_file(arguments: Sequence[str], *, mode: str) -> str:
    """Returns the only argument. Raises UserError if there is none, or several."""
    if len(arguments) != 1:
        raise UserError(f"--mode={mode}: needs one file, not {len(arguments)}; name it after the flags")
    return arguments[0]


def check_output(output: str | None, path: str, *, formats: Sequence[str] = (".jsonl",)) -> None:
    """Raises UserError unless `output` can be written and is not the input `path`, before a model is loaded."""
    if output is None:
        return
    if not output.endswith(tuple(formats)):
        raise UserError(f"--output={output}: must end in {' or '.join(formats)}")
    if os.path.exists(output) and os.path.samefile(output, path):
        raise UserError(f"--output={output}: is the file to read; name another")
    check_directory(output)


def check_directory(output: str) -> None:
    """Raises UserError unless `output` can be a file in a directory that exists."""
    directory = os.path.dirname(os.path.abspath(output))
    if os.path.isdir(output) or not os.path.isdir(directory):
        raise UserError(f"--output={output}: cannot be written there; name a file in a directory that exists")
    try:
        try_to_write(directory)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another file") from None
