"""The model card: the metadata that the hub reads, the text for people, and that the hub accepts it."""

import math

import huggingface_hub
import pytest
import yaml

from configs import default
from mlm.export.fill_mask import MaskPrediction
from mlm.export.model_card import build_card, render_card
from tests import hub_server
from tests.hub_server import HubServer, card_errors
from tests.tiny import settings_of

METRICS = {"eval/loss": 2.5, "eval/accuracy": 0.5, "eval/perplexity": math.inf, "eval/unigram_loss": 6.0}
PREDICTION = MaskPrediction("A <mask> | and <mask>.", ((("cat", 0.5), ("|", 0.25)), (("dog", 0.125),)))


@pytest.fixture
def config():
    config = default.get_config()
    config.unlock()
    return config


def render(config, *, metrics=METRICS, predictions=(PREDICTION,)):
    card = build_card(
        settings_of(config),
        title="my run",
        model_type="bert",
        step=1500,
        sequences_per_step=64,
        tokens_seen=12_288_000,
        hardware="8 x TPU v3",
    )
    return render_card(card, step=1500, mask_token="[MASK]", metrics=metrics, predictions=predictions)


@pytest.fixture(scope="module")
def server():
    server = HubServer()
    yield server
    server.close()


def set_hub_names(config):
    """A run whose data and weights are on the hub."""
    config.data.dataset_name = "allenai/c4"
    config.data.dataset_config_name = "en"
    config.model.model_name_or_path = "google-bert/bert-base-cased"
    config.hub.license = "apache-2.0"
    config.hub.languages = ("en", "de")


def test_metadata_of_a_run_from_hub_data_and_weights(config):
    set_hub_names(config)
    data = huggingface_hub.ModelCard(render(config)).data
    assert data.pipeline_tag == "fill-mask"
    assert data.library_name == "transformers"
    assert data.tags == ["masked-lm", "jax", "bert"]
    assert data.base_model == "google-bert/bert-base-cased"
    assert data.datasets == ["allenai/c4"]
    assert data.license == "apache-2.0"
    assert data.language == ["en", "de"]
    assert data.model_name == "my run"
    found = {result.metric_type: result for result in data.eval_results}
    # The infinite perplexity is left out.
    assert {name: result.metric_value for name, result in found.items()} == {"loss": 2.5, "accuracy": 0.5}
    loss = found["loss"]
    assert (loss.task_type, loss.dataset_type, loss.dataset_config, loss.dataset_split) == (
        "fill-mask", "allenai/c4", "en", "train",
    )  # fmt: skip
    # The metadata survives a round trip.
    text = render(config)
    assert yaml.safe_load(text.split("---\n")[1]) == yaml.safe_load(data.to_yaml())


def test_the_hubs_loader_reads_the_file(config, tmp_path):
    set_hub_names(config)
    (tmp_path / "README.md").write_text(render(config))
    data = huggingface_hub.metadata_load(str(tmp_path / "README.md"))
    assert data["model-index"][0]["results"][0]["task"]["type"] == "fill-mask"


def set_mixture(config):
    config.data.mixture = (
        ("owner/books", 3, {}),
        ("web", 1, {"data_files": ["https://example.org/a.parquet", "/home/ann/secret/b.parquet"]}),
    )


def set_local_paths(config):
    config.data.data_files = "/home/ann/secret/*.txt"
    config.model.model_name_or_path = "/home/ann/secret/old-model/"


@pytest.mark.parametrize("change", [set_hub_names, set_mixture, set_local_paths, lambda config: None])
@pytest.mark.parametrize("metrics", [METRICS, {}])
def test_the_hub_accepts_the_card(config, change, metrics, server, monkeypatch, tmp_path):
    """huggingface_hub's own validation asks the server."""
    change(config)
    hub_server.use(server, monkeypatch, tmp_path)
    card = huggingface_hub.ModelCard(render(config, metrics=metrics, predictions=[PREDICTION] if metrics else []))
    card.validate()
    assert server.card_checks.pop() == []
    card.data.license = "My own!"
    with pytest.raises(ValueError, match="license is 'My own!'"):
        huggingface_hub.ModelCard(str(card)).validate()


def test_the_test_server_refuses_invalid_metadata():
    """The rules of the hub's documentation that a generated card could violate."""
    good = "---\ndatasets: [a/b]\nmodel-index:\n- name: x\n  results:\n  - task: {type: t}\n"
    good += "    dataset: {type: text, name: n}\n    metrics: [{type: loss, value: 1.0}]\n---\n"
    assert list(card_errors(good)) == []
    for right, wrong in [
        ("datasets: [a/b]", "datasets: [a/b/c]"),
        ("type: text", "type: /a/b*.txt"),
        ("value: 1.0", "value: high"),
        ("{type: t}", "{}"),
        ("name: x", "other: x"),
        ("---\n", ""),
    ]:
        assert right in good
        assert list(card_errors(good.replace(right, wrong))) != []


def test_the_text_has_data_recipe_metrics_and_examples(config):
    set_hub_names(config)
    text = render(config)
    assert "trained from [google-bert/bert-base-cased](https://huggingface.co/google-bert/bert-base-cased)" in text
    assert "- [allenai/c4](https://huggingface.co/datasets/allenai/c4) (`en`)\n" in text
    assert "for 1,500 steps" in text
    assert "| tokens seen | 12,288,000 |" in text
    assert "| hardware | 8 x TPU v3 |" in text
    assert "| `optimizer.learning_rate` | 5e-05 |" in text
    assert "| eval/loss | 2.5000 |" in text
    assert "![Loss, accuracy, learning rate and throughput over steps](curves.png)" in text
    # The usage example has the model's own mask token; a bar in a table cell is escaped.
    assert "# Needs PyTorch: pip install torch\nfill_mask = pipeline(" in text
    assert "fill_mask('A [MASK] | and [MASK].')\n```" in text
    assert "| A `[MASK]` \\| and `[MASK]`. | `cat` (50.0 %), `\\|` (25.0 %); `dog` (12.5 %) |" in text


def test_a_mixture_lists_fractions_and_local_paths_are_shortened(config):
    set_mixture(config)
    text = render(config)
    assert "- [owner/books](https://huggingface.co/datasets/owner/books), 75.0% of the sequences\n" in text
    assert "- the files <https://example.org/a.parquet>, `b.parquet`, 25.0% of the sequences\n" in text
    assert huggingface_hub.ModelCard(text).data.datasets == ["owner/books"]
    set_local_paths(config)
    config.data.mixture = ()
    text += render(config)
    assert "the weights of `old-model`" in text
    assert "secret" not in text


def test_weights_without_an_evaluation_have_no_metrics(config):
    text = render(config, metrics={}, predictions=())
    data = huggingface_hub.ModelCard(text).data
    assert data.eval_results is None
    assert "not evaluated" in text
    assert "## Examples" not in text
    assert "fill_mask('This is a [MASK].')" in text
