"""Probes and minimal pairs at every evaluation: equal to those of the modes, and without effect on the training."""

import dataclasses
import filecmp
import json
from pathlib import Path

import jax
import matplotlib.figure
import numpy as np
import pytest

from mlm import load, parallel
from mlm.downstream import during_training
from mlm.downstream.during_training import EvalTasks, TaskEvaluator, read_tasks
from mlm.downstream.features import encode_texts, encode_words, extract
from mlm.downstream.probe import ridge_accuracy
from mlm.downstream.score import compare_pairs, score
from mlm.downstream.tasks import Examples, Task, split_rows
from mlm.errors import UserError
from mlm.eval_settings import EvalSettings
from mlm.modes import export, report
from mlm.reporting.curves import draw_curves, read_metrics
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.test_probe import WORDS, easy_task, make_model
from tests.tiny import sentences, settings_of, tiny_config, write_corpus

RNG = np.random.default_rng(0)
SENTENCES = [" ".join(RNG.choice(WORDS[:8], RNG.integers(2, 9))) for _ in range(80)]


def metrics_of_a_tiny_model():
    """In tests/test_multihost.py, too: two processes measure what one does."""
    model = make_model()
    tasks = EvalTasks({"easy": easy_task()}, {"pairs": SENTENCES})
    evaluator = TaskEvaluator(tasks, model.encoder, model.tokenizer, max_length=20, tokens_per_device=64)
    return evaluator(parallel.replicate(model.params))


@pytest.mark.slow
def test_rows_are_in_order():
    metrics = metrics_of_a_tiny_model()
    assert metrics["probe/easy/accuracy"] == 1.0
    assert 0 < metrics["pairs/pairs/accuracy"] < 1


@pytest.fixture(scope="module")
def model():
    return make_model(type_vocab_size=2)


def evaluate(model, tasks, **options):
    evaluator = TaskEvaluator(tasks, model.encoder, model.tokenizer, max_length=20, tokens_per_device=64, **options)
    params = parallel.replicate(model.params)
    with jax.transfer_guard("disallow"):
        metrics = evaluator(params)
        np.testing.assert_equal(evaluator(params), metrics)
    return metrics, evaluator.descriptions


def expected_accuracy(model, examples, inputs, parts):
    labels, groups = examples.labels[inputs.keep_mask], examples.groups[inputs.keep_mask]
    train, test = (np.flatnonzero(np.isin(groups, rows)) for rows in parts)
    return ridge_accuracy(extract(model, inputs)[-1], labels, train=train, test=test)


@pytest.mark.slow
def test_accuracies_are_those_of_the_modes(model):
    labels = RNG.integers(3, size=80).astype(str)
    texts = Examples(SENTENCES, labels)
    two_texts = Examples(SENTENCES, labels, pairs=SENTENCES[::-1])
    words = [sentence.split() for sentence in SENTENCES[:40]]
    # Words past the length of the model have no features.
    words[3] = ["unbelievable"] * 30
    tags = Examples((), np.array([word[0] for row in words for word in row]), words=words)
    task = lambda examples, test=None: Task("x", examples, test, ("accuracy",))  # noqa: E731
    probes = {
        "two": task(two_texts),
        "tags": task(tags),
        "given": task(texts.select(np.arange(50)), texts.select(np.arange(50, 80))),
    }
    metrics, descriptions = evaluate(model, EvalTasks(probes, {"pairs": SENTENCES}))

    encode = {"max_length": 20}
    inputs = encode_texts(model.tokenizer, SENTENCES, **encode)
    both = encode_texts(model.tokenizer, SENTENCES, SENTENCES[::-1], **encode)
    tagged = encode_words(model.tokenizer, words, **encode)
    split = {"fraction": 0.2, "seed": 0}
    assert metrics["probe/two/accuracy"] == expected_accuracy(model, two_texts, both, split_rows(two_texts, **split))
    assert metrics["probe/tags/accuracy"] == expected_accuracy(model, tags, tagged, split_rows(tags, **split))
    parts = np.arange(50), np.arange(50, 80)
    assert metrics["probe/given/accuracy"] == expected_accuracy(model, texts, inputs, parts)
    good, bad = score(model, SENTENCES[:40]), score(model, SENTENCES[40:])
    assert metrics["pairs/pairs/accuracy"] == compare_pairs(good, bad, ["x"] * 40)[-1].pll_word_l2r_accuracy
    assert 0 < metrics["pairs/pairs/accuracy"] < 1
    assert descriptions[0].startswith("probe two: 3 classes, 64 training labels, 16 held out; ")
    assert descriptions[1].endswith("1 of 40 texts cut to 20 tokens")
    assert descriptions[-1] == "pairs pairs: 40 minimal pairs; 0 sentences cut to 20 tokens"


@pytest.mark.slow
def test_long_files_are_limited_to_the_same_examples(model, tmp_path, monkeypatch):
    monkeypatch.setattr(during_training, "MAX_TEXTS", 40)
    monkeypatch.setattr(during_training, "MAX_PAIRS", 30)
    write(tmp_path / "task.jsonl", [{"text": text, "label": len(text) % 2} for text in SENTENCES])
    write(tmp_path / "pairs.jsonl", [{"good": text, "bad": text[::-1]} for text in SENTENCES])
    settings = EvalSettings(
        probes=(("a", str(tmp_path / "task.jsonl")),), pairs=(("b", str(tmp_path / "pairs.jsonl")),)
    )
    tasks = read_tasks(settings)
    good, bad = tasks.pairs["b"][:30], tasks.pairs["b"][30:]
    assert len(set(good)) == 30
    assert bad == [text[::-1] for text in good]
    assert read_tasks(settings).pairs == tasks.pairs
    _, (line, _) = evaluate(model, tasks)
    assert line.startswith("probe a: 2 classes, 32 training labels, 8 held out;")


@pytest.mark.slow
def test_parameters_that_are_not_finite_have_no_accuracy(model):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * np.float32("nan"), model.params))
    metrics, _ = evaluate(broken, EvalTasks({"a": easy_task()}, {"b": SENTENCES}))
    assert np.isnan(metrics["probe/a/accuracy"])
    assert metrics["pairs/b/accuracy"] == 0.0


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Settings, and the work directories of two runs of 8 steps: the second has no probes for the first 4 steps."""
    directory = tmp_path_factory.mktemp("runs")
    texts = sentences(150, seed=3)
    write(directory / "task.jsonl", [{"text": text, "label": text.split()[3]} for text in texts])
    write(directory / "pairs.jsonl", [{"good": text, "bad": text.replace("the", "cat")} for text in texts[:30]])
    config = tiny_config(write_corpus(directory))
    config.optimizer.ema_decay = 0.9
    config.logging_steps = 4
    settings = settings_of(config)
    probes = {
        "eval.probes": (("verbs", str(directory / "task.jsonl")),),
        "eval.pairs": (("words", str(directory / "pairs.jsonl")),),
    }
    train_and_evaluate(settings.replace(probes), str(directory / "a" / "run"))
    train_and_evaluate(settings.replace({"num_train_steps": 4}), str(directory / "b" / "run"))
    train_and_evaluate(settings.replace(probes), str(directory / "b" / "run"))
    return settings.replace(probes), directory / "a" / "run", directory / "b" / "run"


def lines_of(workdir, *, without=("perf/",)):
    return [
        {name: value for name, value in line.items() if not name.startswith(without)}
        for line in read_metrics(str(workdir / "metrics.jsonl"))
    ]


@pytest.mark.slow
def test_probes_do_not_change_a_run_and_a_resumed_run_has_the_same(runs):
    _, straight, resumed = runs
    for name in ("model.safetensors", "trainer_state.json"):
        assert filecmp.cmp(straight / "model" / name, resumed / "model" / name, shallow=False), name
    tasks = ("probe/", "pairs/")
    assert lines_of(straight, without=("perf/", *tasks)) == lines_of(resumed, without=("perf/", *tasks))
    assert lines_of(straight)[-1] == lines_of(resumed)[-1]
    measured = [line for line in lines_of(straight) if "eval/loss" in line]
    assert [(line["step"], "probe/verbs/accuracy" in line, "pairs/words/accuracy" in line) for line in measured] == [
        (4, True, True),
        (8, True, True),
    ]
    # As all pauses, it is in the next log line.
    assert "perf/probes_ms" in read_metrics(str(straight / "metrics.jsonl"))[-1]


@pytest.mark.slow
def test_the_metrics_are_those_of_the_exported_model(runs):
    settings, workdir, _ = runs
    loaded, metrics = load.load_model(str(workdir / "model")), lines_of(workdir)[-1]
    tasks = read_tasks(settings.eval)
    good, bad = score(loaded, tasks.pairs["words"][:30]), score(loaded, tasks.pairs["words"][30:])
    accuracy = compare_pairs(good, bad, ["x"] * 30)[-1].pll_word_l2r_accuracy
    assert metrics["pairs/words/accuracy"] == accuracy
    examples = tasks.probes["verbs"].train
    inputs = encode_texts(loaded.tokenizer, examples.texts, max_length=16)
    expected = expected_accuracy(loaded, examples, inputs, split_rows(examples, fraction=0.2, seed=0))
    assert metrics["probe/verbs/accuracy"] == expected


@pytest.mark.slow
def test_cards_exports_and_reports_have_the_metrics(runs, tmp_path):
    settings, workdir, resumed = runs
    metrics = lines_of(workdir)[-1]
    directory = export.run(settings, str(workdir), output=str(tmp_path / "model"))
    for model in (workdir / "model", Path(directory)):
        card = (model / "README.md").read_text()
        for name in ("probe/verbs/accuracy", "pairs/words/accuracy"):
            assert f"| {name} | {metrics[name]:.4f} |" in card
            assert json.loads((model / "trainer_state.json").read_text())[name] == metrics[name]
    described = [report.read_run(WorkDir(str(path)), path.parent.name) for path in (workdir, resumed)]
    panels = {panel["title"]: panel["curves"] for panel in report._panels(described)}
    assert panels["Probes"] == [("probe/verbs/accuracy", "verbs")]
    assert panels["Minimal pairs"] == [("pairs/words/accuracy", "words")]
    assert "Eval loss by source" not in panels
    report._add_task_figures([*described, {"curves": {}, "figures": (last := [])}])
    value = f"{100 * metrics['probe/verbs/accuracy']:.1f} %"
    assert [dict(run["figures"])["probe/verbs/accuracy"] for run in described] == [value, value]
    assert last == [("pairs/words/accuracy", "-"), ("probe/verbs/accuracy", "-")]


def test_curves_of_probes_and_pairs_have_pictures_of_their_own(tmp_path, monkeypatch):
    names = ("pairs/order/accuracy", "probe/a/accuracy", "probe/b/accuracy")
    write(tmp_path / "metrics.jsonl", [{"step": step} | dict.fromkeys(names, step / 10) for step in (2, 4)])
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    draw_curves(str(tmp_path / "metrics.jsonl"), str(tmp_path / "curves.png"), title="a run")
    drawn = {
        axis.get_title(): [(line.get_label(), line.get_ydata().tolist()) for line in axis.get_lines()]
        for axis in figures[0].axes
    }
    assert drawn["Probes"] == [("a", [20, 40]), ("b", [20, 40])]
    assert drawn["Minimal pairs"] == [("order", [20, 40])]
    assert len(drawn) == 6


def test_wrong_files_are_errors_of_one_line(tmp_path):
    write(tmp_path / "one.jsonl", [{"text": text, "label": 1} for text in SENTENCES])
    write(tmp_path / "numbers.jsonl", [{"text": text, "label": len(text) + 0.5} for text in SENTENCES[:40]])
    write(tmp_path / "good.jsonl", [{"good": "a", "text": "b"}])

    def message(**files):
        with pytest.raises(UserError) as error:
            read_tasks(EvalSettings(**{"probes": (), "pairs": (), **files}))
        return str(error.value).replace(f"{tmp_path}/", "")

    one, numbers, good, missing = (
        (("a", str(tmp_path / name)),) for name in ("one.jsonl", "numbers.jsonl", "good.jsonl", "missing.jsonl")
    )
    assert message(probes=missing) == "eval.probes[0]=missing.jsonl: no such file; check the path"
    assert message(pairs=missing) == "eval.pairs[0]=missing.jsonl: no such file; check the path"
    assert message(probes=one) == (
        "eval.probes[0]=one.jsonl: column 'label' has the single value 1; give examples of others"
    )
    assert message(pairs=good) == (
        "eval.pairs[0]=good.jsonl: has no column 'bad', only good, text; name the columns good and bad"
    )
    assert message(probes=numbers) == (
        "eval.probes[0]=numbers.jsonl: has labels with a decimal point; use classes: text or whole numbers"
    )
