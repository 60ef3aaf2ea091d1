"""Labeled tasks: texts, pairs of texts or words with labels, from files, datasets of the hub and GLUE."""

import collections
import csv
import dataclasses
import io
import json
import lzma
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlm.data.sources import files
from mlm.data.sources.encoding import Utf8Stream
from mlm.data.sources.source import is_local_path, require_hub
from mlm.data.sources.table import load_columns
from mlm.errors import UserError, one_line

_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
# GLUE task -> (the columns of its texts, the split to test on, its metrics); Wang et al. 2019, "GLUE", table 1. WNLI is
# left out, as in the papers, because its development set contradicts its training set.
GLUE: Mapping[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "cola": (("sentence",), "validation", ("matthews",)),
    "sst2": (("sentence",), "validation", ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), "validation", ("f1", "accuracy")),
    "qqp": (("question1", "question2"), "validation", ("f1", "accuracy")),
    "stsb": (("sentence1", "sentence2"), "validation", ("pearson", "spearman")),
    "mnli": (("premise", "hypothesis"), "validation_matched", ("accuracy",)),
    "mnli_mismatched": (("premise", "hypothesis"), "validation_mismatched", ("accuracy",)),
    "qnli": (("question", "sentence"), "validation", ("accuracy",)),
    "rte": (("sentence1", "sentence2"), "validation", ("accuracy",)),
}
# Fraction of a file that is held out for the test if there is no test file.
TEST_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class Examples:
    """N labeled examples; either texts or words.

    Attributes:
      texts: N strings; empty for words.
      pairs: N second texts; None for single texts.
      words: N lists of words with one label each; None for texts.
      labels: one per text, or one per word in order.
    """

    texts: Sequence[str]
    labels: np.ndarray
    pairs: Sequence[str] | None = None
    words: Sequence[Sequence[str]] | None = None

    def __len__(self) -> int:
        return len(self.texts if self.words is None else self.words)

    @property
    def groups(self) -> np.ndarray:
        """int [labels]: the number of the example that each label belongs to."""
        counts = np.ones(len(self), int) if self.words is None else [len(words) for words in self.words]
        return np.repeat(np.arange(len(self)), counts)

    def select(self, rows: np.ndarray) -> "Examples":
        """Returns the examples `rows`, in this order."""
        groups, starts = self.groups, np.searchsorted(self.groups, np.arange(len(self) + 1))
        labels = [self.labels[starts[row] : starts[row + 1]] for row in rows]
        return Examples(
            texts=[self.texts[row] for row in rows] if self.words is None else (),
            labels=np.concatenate(labels) if labels else self.labels[groups < 0],
            pairs=None if self.pairs is None else [self.pairs[row] for row in rows],
            words=None if self.words is None else [self.words[row] for row in rows],
        )

    def limited(self, count: int) -> "Examples":
        """Returns examples with at most `count` labels: the first ones of a shuffle that is always the same."""
        if len(self.labels) <= count:
            return self
        rows = np.random.default_rng(0).permutation(len(self))
        counts = np.bincount(self.groups)[rows]
        return self.select(rows[: max(1, np.searchsorted(np.cumsum(counts), count, side="right"))])

    def joined(self, other: "Examples") -> "Examples":
        """Returns these examples, then the others."""
        return Examples(
            texts=[*self.texts, *other.texts],
            labels=np.concatenate([self.labels, other.labels]),
            pairs=None if self.pairs is None else [*self.pairs, *(other.pairs or ())],
            words=None if self.words is None else [*self.words, *(other.words or ())],
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """A labeled task.

    Attributes:
      name: for tables and the model card.
      train: the training examples; without `test`, also those to be held out.
      test: the examples of a test file; None to hold out a part of `train`.
      metrics: names of `probe.METRICS`; the first one chooses the layer.
      dataset: the id of the dataset on the hub; None for files.
    """

    name: str
    train: Examples
    test: Examples | None
    metrics: tuple[str, ...]
    dataset: str | None = None

    @property
    def is_regression(self) -> bool:
        """True if labels are numbers with a decimal point instead of classes."""
        return self.train.labels.dtype.kind == "f"

    @property
    def classes(self) -> np.ndarray:
        """The sorted classes; empty for regression."""
        return np.array([]) if self.is_regression else np.unique(self.train.labels)


def open_task(name: str, *, test: str | None = None, flag: str | None = None) -> Task:
    """Reads a task.

    Args:
      name: a file, a GLUE task such as "sst2", or a dataset on the hub, "NAME" or "NAME:CONFIG".
      test: a file with the examples of the test.
      flag: the beginning of error messages; None for "--task=NAME".

    Raises:
      UserError: there is no such task, or its columns or labels cannot be used.
    """
    flag = flag or f"--task={name}"
    if name.removeprefix("glue/") in GLUE:
        task = _open_glue(name.removeprefix("glue/"), flag)
    elif _is_file(name):
        train = _examples(read_columns(name, flag=flag), flag=flag)
        task = Task(os.path.splitext(os.path.basename(name))[0], train, None, _metrics(train))
    elif name.removeprefix("glue/") == "wnli":
        raise UserError(f"{flag}: its development set contradicts its training set; choose one of {', '.join(GLUE)}")
    else:
        task = _open_hub(name, flag)
    if test is not None:
        held_out = _examples(read_columns(test, flag=f"--test={test}"), flag=f"--test={test}")
        task = dataclasses.replace(task, test=held_out)
    _check(task, flag, f"--test={test}" if test is not None else flag)
    return task


def _is_file(name: str) -> bool:
    return is_local_path(name) or os.path.exists(os.path.expanduser(name)) or _extension(name) in _FORMATS


def _extension(path: str) -> str:
    """Returns the extension before that of a compression, in lower case."""
    return os.path.splitext(files.split_compression(path)[0])[1].lower()


def read_columns(path: str, *, flag: str) -> dict[str, list[Any]]:
    """Reads a file of JSON (lines, or one list), CSV, TSV or parquet as columns of equal length; a text file as the
    column "text". It may be compressed, and in UTF-16 or UTF-32.

    Args:
      path: the file.
      flag: the beginning of error messages, such as "--task=FILE".
    """
    path = os.path.expanduser(path)
    suffix = _extension(path)
    if not os.path.exists(path):
        raise UserError(f"{flag}: no such file; check the path")
    if suffix not in _FORMATS or os.path.isdir(path):
        raise UserError(f"{flag}: must be a file that ends in one of {', '.join(_FORMATS)}, optionally compressed")
    try:
        columns = _read_parquet(path) if suffix == ".parquet" else _read_lines(path, suffix, flag)
    except UnicodeDecodeError:
        raise UserError(f"{flag}: is not UTF-8; convert it") from None
    # EOFError and LZMAError: a damaged compressed file. RecursionError: JSON nested too deeply.
    except (OSError, ValueError, EOFError, lzma.LZMAError, RecursionError, csv.Error) as error:
        raise UserError(f"{flag}: cannot be read ({one_line(error)}); create it again") from None
    if not columns or not len(next(iter(columns.values()))):
        raise UserError(f"{flag}: is empty; name a file with examples")
    return columns


def read_pairs(path: str, *, flag: str) -> dict[str, list[Any]]:
    """Reads a file of minimal pairs: the columns good and bad, and others.

    Raises:
      UserError: it has no such columns, or cannot be read.
    """
    columns = read_columns(path, flag=flag)
    for name in ("good", "bad"):
        if name not in columns:
            raise UserError(f"{flag}: has no column {name!r}, only {', '.join(columns)}; name the columns good and bad")
        check_texts(columns[name], name, flag=flag)
    return columns


def _read_parquet(path: str) -> dict[str, list[Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pydict()


def _read_lines(path: str, suffix: str, flag: str) -> dict[str, list[Any]]:
    with files.open_file(path) as stream:
        text = Utf8Stream(stream).read().decode("utf-8")
    rows: list[Any] = []
    if suffix == ".txt":
        return {"text": [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]}
    if suffix in (".csv", ".tsv"):
        # The csv module has a limit of 128 KiB for a field.
        csv.field_size_limit(2**31 - 1)
        delimiter = "," if suffix == ".csv" else "\t"
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True))
    elif text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        for number, line in enumerate(io.StringIO(text, newline=None), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    raise UserError(f"{flag}: line {number} is not JSON; write one object per line") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f'{flag}: row {number} is not a JSON object; write objects such as {{"text": ...}}')
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    if suffix in (".csv", ".tsv"):
        columns = {name: _numbers(values) if name == "label" else values for name, values in columns.items()}
    return columns


def _numbers(values: list[str | None]) -> list[Any]:
    """Returns strings of a CSV column as numbers, if all of them are: classes if all are whole, as in JSON."""
    for convert in (int, float):
        try:
            return [convert(value) for value in values]  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
    return [value or None for value in values]


def _examples(columns: Mapping[str, list[Any]], *, flag: str) -> Examples:
    """Checks columns and returns their examples."""
    if {"tokens", "tags"} <= columns.keys():
        return _tagged(columns, flag=flag)
    missing = [name for name in ("text", "label") if name not in columns]
    if missing:
        raise UserError(
            f"{flag}: has no column {missing[0]!r}, only {', '.join(sorted(columns))}; name the columns text (and "
            "text_b) and label, or tokens and tags"
        )
    for name in ("text", "text_b"):
        check_texts(columns.get(name, ()), name, flag=flag)
    return Examples(
        texts=columns["text"],
        pairs=columns.get("text_b"),
        labels=_labels(columns["label"], "label", flag=flag),
    )


def check_texts(texts: Sequence[Any], name: str, *, flag: str) -> None:
    """Raises UserError unless all values of a column are texts that are not empty."""
    wrong = [row for row, text in enumerate(texts, start=1) if not isinstance(text, str)]
    if wrong:
        raise UserError(f"{flag}: row {wrong[0]} of column {name!r} is not text; remove the row, or write text")
    empty = [row for row, text in enumerate(texts, start=1) if not text.strip()]
    if empty:
        raise UserError(
            f"{flag}: column {name!r} has {len(empty)} empty texts, the first in row {empty[0]}; remove them"
        )


def _tagged(columns: Mapping[str, list[Any]], *, flag: str) -> Examples:
    words, tags = columns["tokens"], columns["tags"]
    for row, (of_words, of_tags) in enumerate(zip(words, tags, strict=True), start=1):
        is_words = isinstance(of_words, list) and all(isinstance(word, str) and word.strip() for word in of_words)
        if not (is_words and of_words and isinstance(of_tags, list) and len(of_tags) == len(of_words)):
            raise UserError(
                f"{flag}: row {row} is not a list of words in tokens and a list of as many labels in tags; correct or "
                "remove it"
            )
    return Examples(texts=(), words=words, labels=_labels([tag for row in tags for tag in row], "tags", flag=flag))


def _labels(values: Sequence[Any], name: str, *, flag: str) -> np.ndarray:
    """Returns labels as strings, whole numbers or floats."""
    if None in values:
        raise UserError(f"{flag}: row {values.index(None) + 1} of column {name!r} has no value; remove or complete it")
    kinds = {"true or false" if isinstance(value, bool) else type(value).__name__ for value in values}
    if kinds == {"int", "float"}:  # JSON writes 3.0 as 3.
        kinds = {"float"}
    if len(kinds) > 1 or not kinds <= {"str", "int", "float", "true or false"}:
        raise UserError(
            f"{flag}: column {name!r} has labels of the types {', '.join(sorted(kinds))}; use one type, text or numbers"
        )
    if kinds == {"float"}:
        # Whole numbers of any size are finite, but may be too large for a float.
        if not all(abs(value) <= sys.float_info.max for value in values):
            raise UserError(f"{flag}: column {name!r} has a value that is not finite; remove its row")
        return np.array(values, float)
    return np.array([str(value).lower() if isinstance(value, bool) else value for value in values])


def _check(task: Task, flag: str, test_flag: str) -> None:
    """Raises UserError if nothing can be learned from the labels, or train and test do not fit together."""
    what = "tags" if task.train.words is not None else "label"
    if task.test is not None:
        sides = ((task.train, flag), (task.test, test_flag))
        forms = [(side.words is not None, side.pairs is not None, side.labels.dtype.kind) for side, _ in sides]
        if forms[0] != forms[1]:
            raise UserError(f"{test_flag}: has other columns or another type of labels than {flag}; make them equal")
    if len(task.train) < 10:
        raise UserError(f"{flag}: has {len(task.train)} examples; give at least 10")
    counts = collections.Counter(task.train.labels.tolist())
    if len(counts) < 2:
        raise UserError(f"{flag}: column {what!r} has the single value {next(iter(counts))!r}; give examples of others")
    if task.is_regression or task.train.words is not None:
        return
    rare = [label for label, count in counts.items() if count < 2]
    if rare:
        raise UserError(
            f"{flag}: the label {rare[0]!r} occurs once, and cannot be both learned and held out; add examples, or "
            "remove it"
        )
    if task.test is not None and (unknown := sorted(set(task.test.labels.tolist()) - counts.keys())):
        raise UserError(f"{test_flag}: the label {unknown[0]!r} does not occur in {flag}; correct or remove it")


def _metrics(examples: Examples) -> tuple[str, ...]:
    return ("pearson", "spearman") if examples.labels.dtype.kind == "f" else ("accuracy", "macro_f1")


def _open_glue(name: str, flag: str) -> Task:
    columns, test_split, metrics = GLUE[name]
    config = "mnli" if name == "mnli_mismatched" else name
    load = _loader("nyu-mll/glue", config, flag)
    train, test = (_examples(_renamed(load(split), columns), flag=flag) for split in ("train", test_split))
    return Task(name, train, test, metrics, dataset="nyu-mll/glue")


def _open_hub(name: str, flag: str) -> Task:
    path, _, config = name.partition(":")
    load = _loader(path, config or None, flag)
    train, test = load("train"), None
    for split in ("test", "validation"):
        columns = load(split, required=False)
        # Some test sets have no labels.
        if columns and set(columns.get("label", ())) != {-1}:
            test = _examples(columns, flag=flag)
            break
    examples = _examples(train, flag=flag)
    return Task(name, examples, test, _metrics(examples), dataset=path)


def _renamed(columns: Mapping[str, list[Any]], texts: Sequence[str]) -> dict[str, list[Any]]:
    names = dict(zip(texts, ("text", "text_b"), strict=False)) | {"label": "label"}
    return {new: columns[old] for old, new in names.items()}


def _loader(path: str, config: str | None, flag: str) -> Callable[..., dict[str, list[Any]]]:
    """Returns a function split -> columns of a dataset on the hub."""
    if not path or path.count("/") > 1:
        raise UserError(
            f"{flag}: unknown task; name a file, one of the GLUE tasks {', '.join(GLUE)}, or a dataset on the hub"
        )
    require_hub(flag)

    def load(split: str, *, required: bool = True) -> dict[str, list[Any]]:
        try:
            return load_columns(path, config, split)
        except ValueError as error:
            if not required and "split" in str(error).lower():
                return {}
            raise UserError(f"{flag}: cannot be loaded from the hub ({one_line(error)}); check the name") from None
        except OSError as error:
            raise UserError(
                f"{flag}: unknown task ({one_line(error)}); name a file, one of the GLUE tasks {', '.join(GLUE)}, or a "
                "dataset on the hub"
            ) from None

    return load


def split_rows(examples: Examples, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to keep and the rows to hold out, in random order.

    Texts with classes are stratified: of a class with n >= 2 examples at least one is held out and one is kept.
    """
    rng = np.random.default_rng(seed)
    if examples.words is not None or examples.labels.dtype.kind == "f":
        rows = rng.permutation(len(examples))
        count = max(1, round(fraction * len(rows)))
        return rows[count:], rows[:count]
    kept, held_out = [], []
    for label in np.unique(examples.labels):
        rows = rng.permutation(np.flatnonzero(examples.labels == label))
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        kept.append(rows[count:])
        held_out.append(rows[:count])
    return rng.permutation(np.concatenate(kept)), rng.permutation(np.concatenate(held_out))
