"""Do shuffle windows from parts of 16 files train as well as a full shuffle, if the text is sorted by topic?

    python benchmarks/data_order.py --output=runs/data_order                           # 12 runs of minutes on two cores
    python benchmarks/data_order.py --output=runs/data_order --seeds=1 --orders="one file after the other"
    python benchmarks/data_order.py --output=runs/quick --seeds=1 --steps=200 --max_shards=50 --window=250

The text is docstrings, sorted by package and cut into 16 files; a package is the topic. A held-out random sample is
what all runs are evaluated on. The quickstart's model is trained on it in four orders: a full shuffle, windows that
take documents from parts of the 16 files (`data.min_shards`), from the 16 files, and of one file after the other. The
goal: the second lies within 0.02 nats of the first. Runs that are finished are not repeated.

The runs are about one epoch long, so that the orders do not differ in what they have seen. Text and window are both an
eighth of the complete ones: 10,000 documents, the default, of all docstrings' 88,000.
"""

import argparse
import itertools
import json
import os
import statistics
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from configs import default, quickstart
from mlm.data.sources.source import open_source
from mlm.data.train_tokenizer import train_tokenizer
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings
from mlm.train import train_and_evaluate

FILES = 16
# Order -> folder of its files, and changes of the config.
ORDERS = {
    "full shuffle": ("shuffled", {}),
    "parts of 16 files": ("sorted", {}),
    "16 files": ("sorted", {"data.min_shards": 0}),
    "one file after the other": ("sorted", {"data.min_shards": 0, "data.interleave_shards": 1}),
}


def write_text(folder: str, *, max_shards: int, eval_documents: int) -> int:
    """Writes the files and a tokenizer; returns the number of documents to train on."""
    source = open_source(dataset_name="docstrings")
    shards = sorted(range(source.num_shards), key=source.shard_name)  # By package.
    shards = shards[:: -(-len(shards) // max_shards)]
    columns = (column.drop_null().to_pylist() for shard in shards for column in source.read(shard))
    documents = list(dict.fromkeys(itertools.chain.from_iterable(columns)))
    random = np.random.default_rng(0)
    is_eval = np.zeros(len(documents), bool)
    is_eval[random.permutation(len(documents))[:eval_documents]] = True
    train = np.flatnonzero(~is_eval)
    if os.path.isdir(os.path.join(folder, "tokenizer")):
        return len(train)
    parts = {"eval": [np.flatnonzero(is_eval)], "sorted": np.array_split(train, FILES)}
    parts["shuffled"] = np.array_split(random.permutation(train), FILES)
    for name, numbers in parts.items():
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        for index, part in enumerate(numbers):
            with open(os.path.join(folder, name, f"{index:02}.jsonl"), "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": documents[number]}) + "\n" for number in part)
    sample = (documents[number] for number in random.permutation(train)[:5000])
    train_tokenizer(sample, vocab_size=2_048, max_seq_length=64, model_type="modernbert").save(
        os.path.join(folder, "tokenizer")
    )
    return len(train)


def build_settings(order: str, folder: str, *, seed: int, num_steps: int, window: int) -> RunSettings:
    """Returns the settings of a run."""
    name, changes = ORDERS[order]
    config = quickstart.get_config()
    config.seed, config.num_train_steps = seed, num_steps
    config.eval_steps = config.save_steps = num_steps
    config.data.num_eval_samples = 2_000
    config.optimizer.warmup_steps = num_steps // 20
    config.tokenizer.tokenizer_name = os.path.join(folder, "tokenizer")
    config.data.data_files = os.path.join(folder, name, "*.jsonl")
    config.data.eval_data_files = os.path.join(folder, "eval", "*.jsonl")
    config.data.shuffle_buffer_size = window
    for key in ("shuffle_buffer_bytes", "interleave_shards", "min_shards"):
        config.data[key] = default.get_config().data[key]
    config.update_from_flattened_dict(changes)
    return RunSettings.from_dict(config.to_dict())


def last_value(workdir: str, name: str) -> float:
    """Returns the last value of a metric of a run."""
    return [line[name] for line in read_metrics(os.path.join(workdir, "metrics.jsonl")) if name in line][-1]


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--max_shards", type=int, default=257, help="parts of packages to read")
    parser.add_argument("--window", type=int, default=1_250, help="documents of a shuffle window")
    parser.add_argument("--eval_documents", type=int, default=1_000)
    options = parser.parse_args(argv)
    folder = os.path.abspath(os.path.join(options.output, f"text-{options.max_shards}"))
    num_documents = write_text(folder, max_shards=options.max_shards, eval_documents=options.eval_documents)
    found: dict[str, list[tuple[float, float]]] = {order: [] for order in options.orders.split(",")}
    for seed in map(int, options.seeds.split(",")):
        for order, results in found.items():
            name = f"{order.replace(' ', '_')}-{options.max_shards}-{options.window}-{options.steps}-{seed}"
            workdir = os.path.join(options.output, name)
            if WorkDir(workdir).exported_step() != options.steps:
                settings = build_settings(order, folder, seed=seed, num_steps=options.steps, window=options.window)
                train_and_evaluate(settings, workdir)
            results.append((last_value(workdir, "eval/loss"), last_value(workdir, "data/documents")))
    baseline = statistics.mean(loss for loss, _ in found.get("full shuffle", [(float("nan"), 0)]))
    print(f"\n{num_documents} documents, windows of {options.window}, {options.steps} steps\n")
    print("| order | eval loss | by seed | against full | epochs |\n|---|---|---|---|---|")
    for order, results in found.items():
        mean, epochs = statistics.mean(loss for loss, _ in results), results[0][1] / num_documents
        by_seed = ", ".join(f"{loss:.3f}" for loss, _ in results)
        print(f"| {order} | {mean:.3f} | {by_seed} | {mean - baseline:+.3f} | {epochs:.2f} |")


if __name__ == "__main__":
    main()
