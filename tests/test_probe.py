"""Features of every layer and linear probes: equal to plain code, and --mode=probe as a user calls it."""

import dataclasses
import json

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlm import load
from mlm.data.tokenizer import Tokenizer
from mlm.downstream import features, probe, tasks, tokens
from mlm.downstream.features import encode_texts, encode_words, extract
from mlm.downstream.tasks import Examples, Task
from mlm.errors import UserError
from mlm.export.model_card import add_results
from mlm.load import LoadedModel, random_params
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM
from mlm.models.hf import weights
from mlm.modes import probe as mode

WORDS = ["cat", "dog", "bird", "un", "##believ", "##able", "the", "sees", "[MASK]"]
SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def make_tokenizer():
    ids = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS[::-1]))}
    backend = Backend(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **SPECIAL), name="tiny")


def make_model(model_type="bert", **fields):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = EncoderConfig.from_hf(
        {
            "model_type": model_type,
            "vocab_size": 13,
            "max_position_embeddings": 20,
            "pad_token_id": 0,
            **sizes,
            **fields,
        }
    )
    return LoadedModel((), jax.device_get(random_params(config, 1)), config, make_tokenizer(), 0)


@pytest.fixture(scope="module")
def model():
    return make_model()


def states_of(loaded, ids):
    """The hidden states of one sequence."""
    apply = jax.jit(MaskedLM(loaded.encoder).apply, static_argnames=("return_layers", "method"))
    return apply({"params": loaded.params}, np.array([ids]), return_layers=True, method="encode")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_layers_end_with_what_encode_returns(model_type):
    loaded = make_model(model_type)
    encoder, ids = MaskedLM(loaded.encoder), np.array([[2, 5, 6, 7, 3], [2, 5, 3, 0, 0]], np.int32)
    variables = {"params": loaded.params}
    states = encoder.apply(variables, ids, return_layers=True, method="encode")
    assert len(states) == 3
    np.testing.assert_array_equal(states[-1], encoder.apply(variables, ids, method="encode"))
    one_layer = dataclasses.replace(encoder, config=loaded.encoder.replace(num_hidden_layers=1))
    if model_type == "bert":  # With a last norm the last state of a shorter model is another one.
        first = one_layer.apply({"params": {**loaded.params, "layer_1": None}}, ids, method="encode")
        np.testing.assert_allclose(states[1], first, atol=1e-6)


@pytest.mark.slow
def test_means_do_not_depend_on_the_batch(model, monkeypatch):
    texts = ["the cat", "the dog sees the unbelievable bird " * 3, "cat", "bird sees dog " * 5]
    inputs = encode_texts(model.tokenizer, texts, max_length=20)
    assert inputs.sequences.num_truncated == 1
    found = extract(model, inputs)
    assert found.shape == (3, 4, 16)
    for number in (0, 1):
        states = states_of(model, inputs.sequences.ids[number])
        np.testing.assert_allclose(found[:, number], [state[0].mean(axis=0) for state in states], atol=1e-5)
    monkeypatch.setattr(tokens, "_BATCH_TOKENS", 16)
    np.testing.assert_allclose(extract(model, inputs), found, atol=1e-5)


def test_pairs_have_token_types_and_names_of_special_tokens_are_text(model):
    sequences = encode_texts(model.tokenizer, ["cat"], ["dog [MASK]"], max_length=20).sequences
    assert model.tokenizer.mask_id not in sequences.ids[0]
    assert sequences.ids[0].count(model.tokenizer.eos_id) == 2
    assert set(sequences.types[0]) == {0}  # Training knows no others.
    published = make_tokenizer()
    published.hf.backend_tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    sequences = encode_texts(published, ["cat"], ["dog [MASK]"], max_length=20).sequences
    assert sequences.types[0] == [0, 0, 0] + [1] * (len(sequences.ids[0]) - 3)


@pytest.mark.slow
def test_words_have_the_state_of_their_first_token_and_those_past_the_length_none(model):
    words = ["the", "unbelievable", "cat", "sees"]
    inputs = encode_words(model.tokenizer, [words, ["dog"]], max_length=6)  # [CLS] the un ##believ ##able [SEP]
    assert (inputs.first_token_positions, inputs.keep_mask.tolist(), inputs.sequences.num_truncated) == (
        [[1, 2], [1]],
        [True, True, False, False, True],
        1,
    )
    found = extract(model, inputs)
    states = states_of(model, inputs.sequences.ids[0])
    np.testing.assert_allclose(found[:, :2], [state[0, 1:3] for state in states], atol=1e-5)
    assert found.shape == (3, 3, 16)


def test_first_tokens_of_byte_level_pieces_that_begin_with_a_blank():
    # "ab cd": the blank belongs to the second piece; the blank is a piece; one piece has both words.
    assert features._first_tokens(["ab", "cd"], [(0, 0), (0, 2), (2, 5), (0, 0)]) == [1, 2]
    assert features._first_tokens(["ab", "cd"], [(0, 0), (0, 2), (2, 3), (3, 5), (0, 0)]) == [1, 3]
    assert features._first_tokens(["ab", "cd"], [(0, 5)]) == [0, 0]


def test_batches_hold_every_sequence_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 500, 3000)
    found, shapes = [], set()
    for numbers, rows, length in tokens.batches(lengths, max_length=500, rows_multiple=3):
        assert len(numbers) <= rows
        assert rows % 3 == 0
        assert lengths[numbers].max() <= length <= 500
        found += numbers.tolist()
        shapes.add((rows, length))
    assert sorted(found) == list(range(3000))
    assert len(shapes) <= 10


def easy_task(count=60, **fields):
    """The label is the first word."""
    rng = np.random.default_rng(0)
    labels = np.array(["cat", "dog", "bird"])[rng.integers(3, size=count)]
    return Task("easy", Examples([f"{label} sees the" for label in labels], labels, **fields), None, ("accuracy",))


@pytest.mark.slow
def test_a_probe_of_texts(model):
    result = probe.probe(model, easy_task(), name="mine", seeds=2)
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["mine", "random weights", "TF-IDF", "majority class"]
    assert rows["mine"].scores["accuracy"] == [1.0, 1.0]
    assert rows["TF-IDF"].mean("accuracy") == 1.0
    assert rows["majority class"].mean("accuracy") < 0.6
    assert (result.train + result.test, result.classes, result.num_truncated) == (60, 3, 0)
    again = probe.probe(model, easy_task(), name="mine", seeds=2)
    assert again == result


def test_the_baseline_of_words_learns_many_classes_of_rare_words():
    draw = np.random.default_rng(0)
    common = [f"word{i}" for i in range(400)]
    labels = np.repeat(np.arange(10), 60)
    texts = [
        " ".join([*draw.choice(common, 60), *(f"topic{label}x{i}" for i in draw.integers(20, size=4))])
        for label in labels
    ]
    examples = Examples(texts, labels)
    scorer = probe._Scorer(labels, ("accuracy",), is_regression=False)
    rows = draw.permutation(600)
    split = probe.Split(rows[:400], rows[400:], ())
    row = scorer.sparse("TF-IDF", probe._sparse_features(examples, np.ones(600, bool)), [split])
    assert row.mean("accuracy") > 0.5


@pytest.mark.slow
def test_a_probe_of_words_pairs_numbers_and_a_test_file(model):
    rng = np.random.default_rng(0)
    sentences = [[["cat", "dog", "the", "sees"][i] for i in rng.integers(4, size=5)] for _ in range(40)]
    tags = np.array(["NOUN" if word in ("cat", "dog") else "OTHER" for words in sentences for word in words])
    task = Task("tags", Examples((), tags, words=sentences), None, ("accuracy",))
    rows = {row.name: row.mean("accuracy") for row in probe.probe(model, task, name="mine", seeds=1).rows}
    assert rows["mine"] == rows["words and neighbors"] == 1.0
    assert rows["majority class"] < 0.8

    same = easy_task(pairs=["the"] * 60)
    numbers = np.array([len(label) + 0.5 for label in same.train.labels])
    examples = dataclasses.replace(same.train, labels=numbers)
    regression = Task("numbers", examples, examples, ("pearson", "spearman"))
    result = probe.probe(model, regression, name="mine", seeds=1)
    assert (result.train, result.test, result.classes) == (60, 60, 0)
    rows = {row.name: row.mean("pearson") for row in result.rows}
    assert rows["mine"] > 0.99
    assert rows["TF-IDF"] > 0.99
    assert rows["mean"] == 0.0


@pytest.mark.slow
def test_learning_from_few_examples(model):
    """Others for each seed, of texts in the proportions of the classes. The test stays the same."""
    task = easy_task(120)
    chosen = []
    for seed in (0, 1):
        every, few = (
            probe._split(task, task.train, task.train.groups, seed=seed, train_examples=count) for count in (None, 12)
        )
        np.testing.assert_array_equal(few.test, every.test)
        assert len(few.train) == 12
        assert set(few.train) < set(every.train)
        assert np.unique(task.train.labels[few.train], return_counts=True)[1].min() >= 3
        assert all({*fit, *valid} == set(few.train) for fit, valid in few.choices)
        assert len({tuple(sorted(valid)) for _, valid in few.choices}) > 1
        chosen.append(set(few.train))
    assert chosen[0] != chosen[1]
    result = probe.probe(model, task, name="mine", seeds=1, train_examples=12)
    assert (result.train, result.test) == (12, 24)
    for count, message in (
        (97, "the task has 96 training examples; give at most as many"),
        (5, "is too few for this task; give at least 6"),
    ):
        with pytest.raises(UserError, match=f"^--train_examples={count}: {message}$"):
            probe.probe(model, task, name="mine", seeds=1, train_examples=count)


def test_words_with_a_single_tag_are_learned():
    scorer = probe._Scorer(np.array(["O"] * 4), ("accuracy",), is_regression=False)
    fitted = scorer._fit(np.zeros((4, 2)), np.array(["O"] * 4), strengths=(1.0,))
    assert fitted.predict(np.ones((2, 2))).tolist() == ["O", "O"]


def test_the_accuracy_of_words_that_are_not_in_the_training_words():
    words = np.array(["the", "cat", "dog", "the", "bird", "sees"])
    labels = np.array(["D", "N", "N", "D", "N", "V"])
    scorer = probe._Scorer(labels, ("accuracy",), is_regression=False, words=words)
    row = scorer.constant("majority class", [probe.Split(np.arange(3), np.arange(3, 6), ())])
    assert row.scores == {"accuracy": [1 / 3], "unseen_accuracy": [1 / 2]}
    row = scorer.constant("majority class", [probe.Split(np.arange(3), np.array([3]), ())])
    assert row.scores == {"accuracy": [0.0]}


@pytest.mark.slow
def test_several_splits_choose_the_layer():
    """Of two layers one of which is noise, and of equal ones the last."""
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    noise, good = draw.normal(size=(2, 200, 4)).astype(np.float32)
    good[:, 0] += 2 * labels
    scorer = probe._Scorer(labels, ("accuracy",), is_regression=False)
    task = Task("t", Examples(["t"] * 200, labels), None, ("accuracy",))
    split = probe._split(task, task.train, np.arange(200), seed=0, train_examples=20)
    assert len(split.choices) == 10
    for layers, best in (([good, noise], 0), ([noise, good], 1), ([good, good], 1)):
        assert scorer.layers("", [np.stack(layers)], [split]).layers == [best]


def test_large_tasks_are_limited_and_sentences_stay_whole(monkeypatch):
    monkeypatch.setattr(probe, "MAX_TRAIN", 50)
    assert len(easy_task(200).train.limited(50)) == 50
    words = Examples((), np.arange(120), words=[["a", "b", "c"]] * 40)
    limited = words.limited(50)
    assert len(limited) == 16
    assert np.all(limited.labels.reshape(-1, 3) % 3 == [0, 1, 2])


def test_metrics_are_those_of_glue():
    labels, predicted = np.array(["not_equivalent", "equivalent"] * 2), np.array(["equivalent"] * 4)
    assert probe.METRICS["f1"](labels, predicted) == pytest.approx(2 / 3)
    assert probe.METRICS["matthews"](labels, predicted) == 0.0
    assert probe.METRICS["pearson"](np.array([1.0, 2, 3]), np.array([2.0, 4, 6])) == pytest.approx(1)
    assert tasks.GLUE.keys() == {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli_mismatched", "qnli", "rte"}
    assert all(metric in probe.METRICS for _, _, metrics in tasks.GLUE.values() for metric in metrics)


def save(directory, loaded, *, tokenizer=True, head=True):
    tensors = weights.to_hf(loaded.params, loaded.encoder)
    if not head:
        tensors = {name: tensor for name, tensor in tensors.items() if not weights.is_head_tensor(name, loaded.encoder)}
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(loaded.encoder.to_hf()))
    if tokenizer:
        loaded.tokenizer.save(str(directory))
    return str(directory)


def write_easy(path):
    task = easy_task()
    rows = zip(task.train.texts, task.train.labels.tolist(), strict=True)
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return str(path)


@pytest.mark.slow
def test_the_mode_prints_a_table_and_adds_to_the_results(tmp_path, model, capsys):
    directory, task = save(tmp_path / "model", model, head=False), write_easy(tmp_path / "easy.jsonl")
    output = str(tmp_path / "results.json")
    for seeds in (1, 2):
        mode.run(None, None, model=directory, task=task, seeds=seeds, output=output)
    table = capsys.readouterr().out.splitlines()[-6:]
    assert table[0] == "easy: 3 classes, 48 training labels, 12 held out"
    assert table[2].split()[:4] == ["model", "100.0", "±", "0.0"]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(entry["task"], entry["model"], entry["step"]) for entry in results] == [("easy", directory, None)]
    assert results[0]["rows"][0]["scores"]["accuracy"] == [1.0, 1.0]


@pytest.mark.slow
def test_models_without_a_tokenizer_or_a_head(tmp_path, model):
    with pytest.raises(UserError, match=r"--model=.*bare: has no tokenizer; save"):
        load.load_published(save(tmp_path / "bare", model, tokenizer=False), needs_head=False)
    headless = save(tmp_path / "headless", model, head=False)
    with pytest.raises(UserError, match=r"--model=.*headless: has no masked-language-model head; choose"):
        load.load_published(headless, needs_head=True)
    kept = load.load_published(headless, needs_head=False)
    np.testing.assert_array_equal(
        kept.params["embeddings"]["word"]["embedding"], model.params["embeddings"]["word"]["embedding"]
    )
    small = save(tmp_path / "small", make_model(vocab_size=9))
    with pytest.raises(
        UserError, match=r"--model=.*small: its tokenizer has 13 ids and pads with 0, its model has 9 and 0"
    ):
        load.load_published(small, needs_head=False)


def test_outputs_that_are_refused(tmp_path):
    task = write_easy(tmp_path / "easy.jsonl")
    with pytest.raises(
        UserError, match=r"--output=.*: cannot be written there; name a file in a directory that exists"
    ):
        mode.run(None, None, model="x", task=task, output=str(tmp_path / "none" / "results.json"))
    with pytest.raises(UserError, match=r"--output=.*: is not a file of results; name another"):
        mode.run(None, None, model="x", task=task, output=task)


def test_the_model_card_has_the_results_once(tmp_path):
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# a\n")
    for value in (0.5, 0.75):
        result = huggingface_hub.EvalResult(
            task_type="text-classification",
            task_name="Linear probe of frozen features",
            dataset_type="text",
            dataset_name="easy",
            metric_type="accuracy",
            metric_value=value,
        )
        add_results(str(tmp_path / "README.md"), [result])
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert [found.metric_value for found in card.data.eval_results] == [0.75]
    assert card.text.strip() == "# a"
