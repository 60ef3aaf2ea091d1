"""Labeled tasks: files, GLUE and datasets of the hub, what is refused, and splits."""

import csv
import gzip
import json
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mlm.downstream import tasks
from mlm.downstream.tasks import Examples, open_task, split_rows
from mlm.errors import UserError

ROWS = [{"text": f"text, {i}", "label": "ab"[i % 2]} for i in range(20)]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def changed(row, **fields):
    """The rows with one changed; a field that is None is removed."""
    rows = [dict(old) for old in ROWS]
    rows[row] |= fields
    return rows


def test_formats_are_equal(tmp_path):
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    files = [write(tmp_path / "t.jsonl", ROWS), str(tmp_path / "t.csv"), str(tmp_path / "t.parquet")]
    for task in map(open_task, files):
        assert (task.name, task.metrics, task.test) == ("t", ("accuracy", "macro_f1"), None)
        assert task.train.texts == [row["text"] for row in ROWS]
        assert task.train.labels.tolist() == [row["label"] for row in ROWS]


def test_pairs_words_and_numbers(tmp_path):
    pairs = open_task(
        write(tmp_path / "p.jsonl", [row | {"text_b": "b", "label": i / 2} for i, row in enumerate(ROWS)])
    )
    assert pairs.is_regression
    assert pairs.metrics == ("pearson", "spearman")
    assert pairs.train.pairs == ["b"] * 20

    words = [{"tokens": ["one", "two"][: 1 + i % 2], "tags": ["X", "Y"][: 1 + i % 2]} for i in range(20)]
    task = open_task(write(tmp_path / "w.jsonl", words))
    assert task.train.groups[:4].tolist() == [0, 1, 1, 2]
    chosen = task.train.select(np.array([3, 0]))
    assert (chosen.words, chosen.labels.tolist()) == ([["one", "two"], ["one"]], ["X", "Y", "X"])

    (tmp_path / "c.csv").write_text("text,label\n" + "a,1\nb,0\n" * 10)
    assert open_task(str(tmp_path / "c.csv")).classes.tolist() == [0, 1]
    (tmp_path / "r.csv").write_text("text,label\n" + "a,1.5\nb,2\n" * 10)
    assert open_task(str(tmp_path / "r.csv")).is_regression


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty; name"),
        ([{"text": "a", "class": 1}], "has no column 'label', only class, text; name the columns text"),
        ([{"body": "a", "label": 1}], "has no column 'text', only body, label; name the columns text"),
        (changed(3, text=" "), "column 'text' has 1 empty texts, the first in row 4; remove them"),
        (changed(3, text=7), "row 4 of column 'text' is not text; remove"),
        (changed(3, label=7), "column 'label' has labels of the types int, str; use one type"),
        (changed(3, label=None), "row 4 of column 'label' has no value; remove"),
        (changed(3, label="c"), "the label 'c' occurs once, and cannot be both learned and held out; add"),
        ([row | {"label": "a"} for row in ROWS], "column 'label' has the single value 'a'; give"),
        ([row | {"label": float("nan")} for row in ROWS], "column 'label' has a value that is not finite; remove"),
        (ROWS[:4], "has 4 examples; give at least 10"),
        ([{"tokens": ["a", "b"], "tags": ["X"]}], "row 1 is not a list of words in tokens and a list of as many"),
        ([{"tokens": "a b", "tags": "X"}], "row 1 is not a list of words in tokens and a list of as many"),
        ("[1]\n", "row 1 is not a JSON object; write"),
        ('{"text": "a", "label": 1}\n7\n', "row 2 is not a JSON object; write"),
        ('{"text": "a", "label": 1}\n{\n', "line 2 is not JSON; write"),
        (b'{"text": "\xff"}', "is not UTF-8; convert it"),
    ],
)
def test_wrong_files_are_errors_of_one_line(tmp_path, rows, message):
    path = tmp_path / "t.jsonl"
    if isinstance(rows, list):
        write(path, rows)
    else:
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    with pytest.raises(UserError) as error:
        open_task(str(path))
    assert str(error.value).startswith(f"--task={path}: {message}")
    assert "\n" not in str(error.value)


def test_files_may_be_compressed_or_utf_16_or_a_json_list(tmp_path):
    """What can be trained on can be a task."""
    expected = open_task(write(tmp_path / "t.jsonl", ROWS)).train
    lines = (tmp_path / "t.jsonl").read_text()
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "t16.jsonl").write_bytes(lines.encode("utf-16"))
    (tmp_path / "t.json").write_text(json.dumps(ROWS, indent=1))
    for name in ("t.jsonl.gz", "t16.jsonl", "t.json"):
        examples = open_task(str(tmp_path / name)).train
        assert examples.texts == expected.texts, name
        assert examples.labels.tolist() == expected.labels.tolist(), name


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "t.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"t\.parquet: cannot be read \(.*\); create it again"):
        open_task(str(tmp_path / "t.parquet"))


def test_a_test_file_must_fit(tmp_path):
    train = write(tmp_path / "train.jsonl", ROWS)
    assert open_task(train, test=write(tmp_path / "few.jsonl", ROWS[:3])).test.texts == [
        "text, 0",
        "text, 1",
        "text, 2",
    ]
    with pytest.raises(UserError, match=r"--test=.*other\.jsonl: the label 'c' does not occur in --task=.*; correct"):
        open_task(train, test=write(tmp_path / "other.jsonl", changed(3, label="c")))
    pairs = write(tmp_path / "pairs.jsonl", [row | {"text_b": "b"} for row in ROWS])
    with pytest.raises(UserError, match=r"--test=.*pairs\.jsonl: has other columns or another type of labels than"):
        open_task(train, test=pairs)


def hub(monkeypatch, load):
    monkeypatch.setattr(tasks, "require_hub", mock.Mock())
    monkeypatch.setattr(datasets, "load_dataset", load)


def test_glue_and_other_datasets_of_the_hub(monkeypatch):
    asked = []

    def load(path, config, split):
        asked.append((path, config, split))
        if split == "test" and path != "nyu-mll/glue":
            raise ValueError('Unknown split "test". Should be one of [train, validation]')
        texts = {"premise": ["a"] * 10, "hypothesis": ["b"] * 10} if path == "nyu-mll/glue" else {"text": ["a"] * 10}
        names = datasets.Features({name: datasets.Value("string") for name in texts})
        names["label"] = datasets.ClassLabel(names=["yes", "no"])
        return datasets.Dataset.from_dict(texts | {"label": [0, 1] * 5}, features=names)

    hub(monkeypatch, load)
    mnli = open_task("mnli")
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]
    assert (mnli.train.pairs, mnli.train.labels[:2].tolist()) == (["b"] * 10, ["yes", "no"])
    other = open_task("someone/reviews:small")
    assert asked[2:] == [("someone/reviews", "small", split) for split in ("train", "test", "validation")]
    assert other.test is not None
    assert other.dataset == "someone/reviews"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wnli", None, "its development set contradicts its training set; choose one of cola, sst2"),
        ("a/b/c", None, "must be a file"),
        (":small", None, "unknown task; name a file, one of the GLUE tasks cola"),
        ("nobody/none", FileNotFoundError("nobody/none"), "unknown task (not found: nobody/none); name a file"),
        ("someone/odd", ValueError("no config"), "cannot be loaded from the hub (no config); check the name"),
    ],
)
def test_wrong_tasks_are_errors_of_one_line(monkeypatch, tmp_path, name, error, message):
    hub(monkeypatch, mock.Mock(side_effect=error))
    monkeypatch.chdir(tmp_path)
    if name == "a/b/c":
        (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    with pytest.raises(UserError) as raised:
        open_task(name)
    assert str(raised.value).startswith(f"--task={name}: {message}")


def test_splits_are_stratified_disjoint_and_reproducible():
    labels = np.array(["a"] * 50 + ["b"] * 10 + ["c"] * 2 + ["d"])
    examples = Examples(texts=[""] * len(labels), labels=labels)
    kept, held_out = split_rows(examples, fraction=0.2, seed=1)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    assert {label: int(np.sum(labels[held_out] == label)) for label in "abcd"} == {"a": 10, "b": 2, "c": 1, "d": 0}
    again, other = (split_rows(examples, fraction=0.2, seed=seed)[1] for seed in (1, 2))
    assert np.array_equal(again, held_out)
    assert not np.array_equal(np.sort(other), np.sort(held_out))
