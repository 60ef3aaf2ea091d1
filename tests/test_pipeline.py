"""Settings -> sources, tokenizer, evaluation set and batches; mixtures."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from mlm.data import pipeline
from mlm.data.train_tokenizer import train_tokenizer
from mlm.errors import UserError
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.tiny import sentences, settings_of, tiny_config, write_corpus


@pytest.fixture
def mixed(tmp_path) -> ConfigDict:
    """A mixture of sentences in three files, and numbers in another column of one file."""
    config = tiny_config(write_corpus(tmp_path, documents=200))
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps({"body": f"{n} {n * n}."}) + "\n" for n in range(300)))
    config.data.mixture = (
        ("sentences", 3, {"data_files": config.data.data_files}),
        ("numbers", 1, {"data_files": (str(tmp_path / "numbers.jsonl"),), "text_column_name": "body"}),
    )
    config.data.data_files = None
    config.data.min_shards = 0
    return config


def open_text(config):
    tokenizer = train_tokenizer(iter(sentences(50)), vocab_size=300, max_seq_length=16)
    data = settings_of(config).data
    return pipeline.open_text(data, pipeline.open_sources(data), tokenizer, seed=config.seed)


def test_a_mixture_holds_out_documents_of_each_source(mixed):
    text = open_text(mixed)
    assert text.name == "sentences (75.0%), numbers (25.0%)"
    assert dict(text.eval_counts) == {"sentences": 22, "numbers": 8}
    assert text.eval_rows_RxL.shape == (30, 16)
    decoded = ["".join(text.tokenizer.hf.batch_decode(part)) for part in np.split(text.eval_rows_RxL, [22])]
    assert decoded[0].startswith("<s>Number 0: the ")
    assert decoded[1].startswith("<s>0 0.</s><s>1 1.</s>")
    held_out = text.held_out.to_pylist()
    assert "0 0." in held_out
    assert sentences(1)[0] in held_out
    stream = text.batches(process_index=0, process_count=1, batch_rows=4)
    seen = {(d.source, d.shard, d.row) for _ in range(20) for d in [next(stream), *stream.documents()][1:]}
    numbers = [row for source, _, row in seen if source == "numbers"]
    assert min(numbers) == sum(text.endswith(".") and text[0].isdigit() for text in held_out)
    assert {source for source, *_ in seen} == {"sentences", "numbers"}


def test_evaluation_and_tokenizer_come_from_all_files_of_sorted_text(tmp_path, monkeypatch):
    for n, topic in enumerate(("sea", "city", "field")):
        (tmp_path / f"{n}.txt").write_text("".join(f"{topic} number {row}\n" for row in range(50)))
    config = tiny_config(str(tmp_path / "*.txt"))
    config.data.packing = "pad"
    config.tokenizer.train_documents = 30
    trained_on = []
    monkeypatch.setattr(
        "mlm.data.train_tokenizer.train_tokenizer", lambda texts, **options: trained_on.extend(texts) or options
    )
    for eval_rows, counts in {"spread": [10, 10, 10], "first": [30, 0, 0]}.items():
        trained_on.clear()
        config.data.eval_rows = eval_rows
        settings = settings_of(config)
        held_out = open_text(config).held_out.to_pylist()
        sources = pipeline.open_sources(settings.data)
        pipeline.open_tokenizer(settings, sources, saved_tokenizer=None, model_type="roberta")
        for texts in (held_out, trained_on):
            topics = [text.split()[0] for text in texts]
            assert [topics.count(topic) for topic in ("sea", "city", "field")] == counts


def test_the_shards_of_a_process_are_described(mixed):
    text = open_text(mixed)
    batches = text.batches(process_index=1, process_count=2, batch_rows=4)
    lines = list(text.describe_assignment(batches))
    assert lines[0].startswith("1 of 3 shards of ")
    assert lines[1].startswith("1 of 1 shards of ")
    assert ", some rows of them: '" in lines[1]
    assert lines[1].endswith("numbers.jsonl'")


@pytest.mark.slow
def test_a_mixture_evaluates_each_source_and_resumes_exactly(mixed, tmp_path):
    config = mixed
    config.num_train_steps = 4
    config.save_steps = config.eval_steps = 2
    train_and_evaluate(settings_of(config), str(tmp_path / "uninterrupted"))
    with config.unlocked():
        shorter = config.copy_and_resolve_references()
    shorter.num_train_steps = 2
    train_and_evaluate(settings_of(shorter), str(tmp_path / "resumed"))
    train_and_evaluate(settings_of(config), str(tmp_path / "resumed"))
    uninterrupted, resumed = (
        [
            {name: value for name, value in line.items() if name.startswith("eval/")}
            for line in read_metrics(str(tmp_path / run / "metrics.jsonl"))
        ]
        for run in ("uninterrupted", "resumed")
    )
    assert [line for line in uninterrupted if line] == [line for line in resumed if line]
    last = uninterrupted[-1]
    parts = last["eval/sentences/loss"], last["eval/numbers/loss"]
    assert min(parts) < last["eval/loss"] < max(parts)


def test_a_run_resumes_with_other_skip_steps_but_not_with_another_mixture(mixed, tmp_path):
    workdir = WorkDir(str(tmp_path / "run"))
    workdir.create(
        settings_of(mixed),
        save_tokenizer=lambda path: (tmp_path / path).mkdir(),
        processes=2,
        rows_per_process=8,
        step=0,
    )
    workdir.resume(settings_of(mixed))
    assert workdir.last_topology() == (2, 8)
    mixed.data.skip_steps = ((2, 3),)
    workdir.resume(settings_of(mixed))
    mixed.data.mixture = (("sentences", 2), ("numbers", 1))
    with pytest.raises(UserError, match=r"data\.mixture"):
        workdir.resume(settings_of(mixed))


def test_counts_are_proportional_to_weights_and_at_least_one():
    assert pipeline._proportional_counts(31, {"a": 2, "b": 1, "c": 1e-9}) == {"a": 21, "b": 10, "c": 1}


def test_an_error_names_the_key_of_the_evaluation_files(tmp_path):
    settings = settings_of(tiny_config(write_corpus(tmp_path))).replace({"data.eval_data_files": "/absent.txt"})
    with pytest.raises(
        UserError, match=r"^data\.eval_data_files='/absent\.txt': there is no such file; check the path$"
    ):
        pipeline.open_sources(settings.data)
