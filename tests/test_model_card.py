"""The model card: what the hub reads of it, and that the hub takes it."""

import math

import huggingface_hub
import pytest
import yaml

from configs import default
from mlm.export.fill_mask import MaskPrediction
from mlm.export.model_card import build_card, model_card
from tests import hub_server
from tests.hub_server import HubServer, card_errors
from tests.tiny import settings_of

METRICS = {"eval/loss": 2.5, "eval/accuracy": 0.5, "eval/perplexity": math.inf, "eval/unigram_loss": 6.0}
FILLING = MaskPrediction("A <mask> | and <mask>.", ((("cat", 0.5), ("|", 0.25)), (("dog", 0.125),)))


@pytest.fixture
def config():
    config = default.get_config()
    config.unlock()
    return config


def card(config, *, metrics=METRICS, predictions=(FILLING,)):
    made = build_card(
        settings_of(config),
        title="my run",
        model_type="bert",
        step=1500,
        rows=64,
        tokens_seen=12_288_000,
        hardware="8 x TPU v3",
    )
    return model_card(made, step=1500, mask_token="[MASK]", metrics=metrics, predictions=predictions)


@pytest.fixture(scope="module")
def server():
    server = HubServer()
    yield server
    server.close()


def named(config):
    """A run with all there is to say."""
    config.data.dataset_name = "allenai/c4"
    config.data.dataset_config_name = "en"
    config.model.model_name_or_path = "google-bert/bert-base-cased"
    config.hub.license = "apache-2.0"
    config.hub.languages = ("en", "de")


def test_metadata_is_what_the_hub_reads(config):
    named(config)
    data = huggingface_hub.ModelCard(card(config)).data
    assert data.pipeline_tag == "fill-mask"
    assert data.library_name == "transformers"
    assert data.tags == ["masked-lm", "jax", "bert"]
    assert data.base_model == "google-bert/bert-base-cased"
    assert data.datasets == ["allenai/c4"]
    assert data.license == "apache-2.0"
    assert data.language == ["en", "de"]
    assert data.model_name == "my run"
    found = {result.metric_type: result for result in data.eval_results}
    # Perplexity has no number there.
    assert {name: result.metric_value for name, result in found.items()} == {"loss": 2.5, "accuracy": 0.5}
    loss = found["loss"]
    assert (loss.task_type, loss.dataset_type, loss.dataset_config, loss.dataset_split) == (
        "fill-mask", "allenai/c4", "en", "train",
    )  # fmt: skip
    # And back: what is read is what was written.
    text = card(config)
    assert yaml.safe_load(text.split("---\n")[1]) == yaml.safe_load(data.to_yaml())


def test_files_of_cards_are_read_as_the_hub_reads_them(config, tmp_path):
    named(config)
    (tmp_path / "README.md").write_text(card(config))
    data = huggingface_hub.metadata_load(str(tmp_path / "README.md"))
    assert data["model-index"][0]["results"][0]["task"]["type"] == "fill-mask"


def mixed(config):
    config.data.mixture = (
        ("owner/books", 3, {}),
        ("web", 1, {"data_files": ["https://example.org/a.parquet", "/home/ann/secret/b.parquet"]}),
    )


def local(config):
    config.data.data_files = "/home/ann/secret/*.txt"
    config.model.model_name_or_path = "/home/ann/secret/old-model/"


@pytest.mark.parametrize("change", [named, mixed, local, lambda config: None])
@pytest.mark.parametrize("metrics", [METRICS, {}])
def test_the_hub_takes_it(config, change, metrics, server, monkeypatch, tmp_path):
    """By huggingface_hub's own validation, which asks the server."""
    change(config)
    hub_server.use(server, monkeypatch, tmp_path)
    made = huggingface_hub.ModelCard(card(config, metrics=metrics, predictions=[FILLING] if metrics else []))
    made.validate()
    assert server.questions.pop() == []
    made.data.license = "My own!"
    with pytest.raises(ValueError, match="license is 'My own!'"):
        huggingface_hub.ModelCard(str(made)).validate()


def test_the_stand_in_for_the_hub_refuses():
    """Of what the hub's documentation does not allow, what a card of ours could get wrong."""
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


def test_people_read_what_it_was_trained_on(config):
    named(config)
    text = card(config)
    assert "trained from [google-bert/bert-base-cased](https://huggingface.co/google-bert/bert-base-cased)" in text
    assert "- [allenai/c4](https://huggingface.co/datasets/allenai/c4) (`en`)\n" in text
    assert "for 1,500 updates" in text
    assert "| tokens seen | 12,288,000 |" in text
    assert "| hardware | 8 x TPU v3 |" in text
    assert "| `learning_rate` | 5e-05 |" in text
    assert "| eval/loss | 2.5000 |" in text
    assert "![Loss, accuracy, learning rate and throughput over updates](curves.png)" in text
    # Three lines of use, with the model's own mask token; a bar would end a table's cell.
    assert "# Needs PyTorch: pip install torch\nfill_mask = pipeline(" in text
    assert "fill_mask('A [MASK] | and [MASK].')\n```" in text
    assert "| A `[MASK]` \\| and `[MASK]`. | `cat` (50.0 %), `\\|` (25.0 %); `dog` (12.5 %) |" in text


def test_mixtures_are_told_with_their_shares_and_local_paths_stay_local(config):
    mixed(config)
    text = card(config)
    assert "- [owner/books](https://huggingface.co/datasets/owner/books), 75.0% of the rows\n" in text
    assert "- the files <https://example.org/a.parquet>, `b.parquet`, 25.0% of the rows\n" in text
    assert huggingface_hub.ModelCard(text).data.datasets == ["owner/books"]
    local(config)
    config.data.mixture = ()
    text += card(config)
    assert "the weights of `old-model`" in text
    assert "secret" not in text


def test_weights_that_were_not_evaluated_have_no_figures(config):
    text = card(config, metrics={}, predictions=())
    data = huggingface_hub.ModelCard(text).data
    assert data.eval_results is None
    assert "not evaluated" in text
    assert "## Examples" not in text
    assert "fill_mask('This is a [MASK].')" in text
