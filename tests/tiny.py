"""A run that takes seconds: a corpus with something to learn, and its config and settings."""

import json
import random
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import default
from mlm.settings import OptimizerSettings, RunSettings

NOUNS = ["cat", "dog", "bird", "fish", "child", "river", "house", "tree"]
VERBS = ["sees", "likes", "follows", "hears", "finds"]


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Distinct sentences."""
    draw = random.Random(seed)

    def noun() -> str:
        return draw.choice(NOUNS)

    return [f"Number {i}: the {noun()} {draw.choice(VERBS)} the {noun()} and the {noun()}." for i in range(count)]


def write_corpus(directory: Path, *, files: int = 3, documents: int = 400) -> str:
    """Writes JSON-lines files and returns their glob."""
    texts = sentences(documents)
    for i in range(files):
        lines = [json.dumps({"text": text, "id": i}) for text in texts[i::files]]
        (directory / f"part-{i}.jsonl").write_text("\n".join(lines) + "\n")
    return str(directory / "part-*.jsonl")


def tiny_config(data_files: str) -> ConfigDict:
    """One layer of width 16, sequences of 16 tokens, 8 steps."""
    config = default.get_config()
    config.num_train_steps = 8
    config.per_device_train_batch_size = 4
    config.per_device_eval_batch_size = 4
    config.logging_steps = 3
    config.eval_steps = 4
    config.save_steps = 4
    config.data.data_files = data_files
    config.data.max_seq_length = 16
    config.data.shuffle_buffer_size = 50
    config.data.num_eval_samples = 30
    config.tokenizer.vocab_size = 300
    config.tokenizer.train_documents = 200
    overrides = config.model.overrides
    overrides.hidden_size = 16
    overrides.num_hidden_layers = 1
    overrides.num_attention_heads = 2
    overrides.intermediate_size = 32
    overrides.max_position_embeddings = 20
    config.optimizer.learning_rate = 1e-2
    # Linear decay depends on num_train_steps; a constant rate lets runs of different lengths be compared.
    config.optimizer.schedule = "constant"
    config.report.sentences = ("Number 7: the <mask> sees the cat.",)
    return config


def staged_config(data_files: str, other_files: str) -> ConfigDict:
    """12 steps of a ModernBERT in three stages of 5, 4 and 3 steps; the second one has another length and source."""
    config = tiny_config(data_files)
    config.num_train_steps = 12
    config.logging_steps = 3
    config.eval_steps = 100
    config.save_steps = 1
    config.data.data_files = None
    config.data.mixture = (("text", 1, {"data_files": data_files}),)
    config.model.model_type = "modernbert"
    config.model.overrides.max_position_embeddings = 40
    config.optimizer.ema_decay = 0.9
    config.stages = (
        {"name": "pretrain", "steps": 5},
        {
            "name": "extend",
            "steps": 4,
            "data.max_seq_length": 32,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "model.overrides.global_rope_theta": 500.0,
            "data.mixture": (("text", 3, {"data_files": data_files}), ("other", 1, {"data_files": other_files})),
        },
        {
            "name": "decay",
            "steps": 3,
            "optimizer.schedule": "wsd",
            "optimizer.decay_steps": 1.0,
            "masking.mlm_probability": (0.3, 0.15),
        },
    )
    return config


def settings_of(config: ConfigDict) -> RunSettings:
    """The settings of a config, as main.py creates them."""
    return RunSettings.from_dict(config.to_dict())


def tiny_settings(data_files: str, **changes: Any) -> RunSettings:
    """The settings of `tiny_config`; `changes` replace keys, such as **{"data.packing": "pad"}."""
    return settings_of(tiny_config(data_files)).replace(changes)


def optimizer_settings(**changes: Any) -> OptimizerSettings:
    """AdamW with a constant learning rate and clipping; `changes` replace keys."""
    values = {"learning_rate": 0.01, "schedule": "constant", "adam_beta2": 0.98, "max_grad_norm": 1.0} | changes
    return OptimizerSettings(**{**default.get_config().optimizer.to_dict(), **values})
