"""Eval loss over time on a CPU: our recipe against the reference's and against PyTorch, trained on the same text.

    python benchmarks/time_to_loss.py --output=runs/time_to_loss          # an hour on two cores
    python benchmarks/time_to_loss.py --output=runs/time_to_loss_perl --text=/usr/share/perl/5.36.0/pod --seeds=1
    python benchmarks/time_to_loss.py --output=runs/time_to_loss --torch_python=PYTHON_WITH_TORCH_AND_THESE_PACKAGES
    python benchmarks/time_to_loss.py --output=runs/try --seconds=4 --seeds=1 --rates=1e-3

    example   the reference's recipe: post-norm RoBERTa with dropout 0.1, AdamW, a linear schedule with a tenth of
              warm-up, 15 % masks, its grouping, its shuffle buffer of 10,000 documents, its step (reference_step.py)
    ours      configs/quickstart.py, by the program's own pipeline and step
    torch     transformers' ModernBERT class in PyTorch: our text order, sizes and initialization, 30 % masks, AdamW,
              gradients clipped, logits at masked positions only

All have the same text, tokenizer, layers, width, batches (32 sequences of 64 tokens), evaluation sequences with the
same masks, and cores, and parameter counts within 5 %. Each run gets the number of steps that takes `--seconds`, from a
short run before; its schedule ends there. "ours, tenth" gets a tenth. The learning rates of example and torch are
tried with the first seed; the example's own (3e-4) and the best of each are run with all seeds.

Seconds are those of the steps and of their input: neither compilation nor evaluations. "From the command" adds the
seconds from the start of the process to the first step, with imports, reading and compilation. Every run is a process
of its own and writes a JSON file; runs that are finished are not repeated. The output has `table.md` and `curves.png`.

`--text` is `docstrings` (of this Python, as in the quickstart) or a directory of Perl's documentation (Debian's package
perl-doc), of which each section is a document.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np

OWN_RATE = 3e-4
SHUFFLE_BUFFER = 10_000
NUM_EVALUATIONS = 24
CALIBRATION_STEPS = 150
EVAL_ROWS = 64  # per batch
# Two matrices of a plain feed-forward network have the parameters of the three of a gated one.
EXAMPLE_SIZES = {"intermediate_size": 384, "layer_norm_eps": 1e-5, "type_vocab_size": 1, "max_position_embeddings": 66}


@dataclasses.dataclass(frozen=True)
class Job:
    """A run; `rate` is None for our recipe's own."""

    side: str
    rate: float | None
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of the run's file."""
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return f"{self.side}{rate}-seed{self.seed}-steps{self.steps}"


class Timer:
    """Evaluates after some of the steps, more often at the beginning, and times the steps between."""

    def __init__(self, steps: int, evaluate: Callable[[], float], tokens_per_step: int):
        self.log: list[dict[str, float]] = []
        self._evaluate, self._tokens_per_step = evaluate, tokens_per_step
        self._due = {max(1, round(steps * (i / NUM_EVALUATIONS) ** 2)) for i in range(1, NUM_EVALUATIONS + 1)}
        self._seconds, self._start = 0.0, time.perf_counter()

    def after(self, step: int, state: Any) -> None:
        """To be called after each step with its result, which is awaited before an evaluation."""
        if step not in self._due:
            return
        jax.block_until_ready(state)
        self._seconds += time.perf_counter() - self._start
        tokens = step * self._tokens_per_step
        self.log.append({"step": step, "seconds": self._seconds, "tokens": tokens, "loss": float(self._evaluate())})
        self._start = time.perf_counter()


def build_settings(job: Job, output: str) -> Any:
    """Returns the settings of our run, which determine text, tokenizer and evaluation for all sides."""
    from configs import quickstart
    from mlm.settings import RunSettings

    config = quickstart.get_config()
    changes = {
        "seed": job.seed,
        "num_train_steps": job.steps,
        "eval_steps": job.steps,
        "save_steps": job.steps,
        "data.data_files": os.path.join(output, "text", "*.jsonl"),
        "tokenizer.tokenizer_name": os.path.join(output, "tokenizer"),
        # A twentieth of the run: the quickstart's 100 steps do not fit short runs.
        "optimizer.warmup_steps": 0.05,
    }
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return RunSettings.from_dict(config.to_dict())


def train_ours(job: Job, output: str, stack: contextlib.ExitStack) -> tuple[Timer, float, Any]:
    """Trains with our pipeline and step. Returns the timer, when the first step began, and the parameters."""
    import jax.numpy as jnp

    from mlm import parallel
    from mlm.evaluate import unigram_log_probs
    from mlm.run.signals import Interrupt
    from mlm.startup import open_run

    settings = build_settings(job, output)
    workdir = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "run")
    run = open_run(settings, workdir, stack, interrupt=Interrupt(), overwrite=False, key_changes=None)
    assert run is not None
    stage, tokenizer = run.stages[0], run.stages[0].components.tokenizer
    unigram_V = unigram_log_probs(np.zeros(tokenizer.num_ids), special_ids=tokenizer.special_ids)
    state, length = run.state, settings.data.max_seq_length
    rows = settings.per_device_train_batch_size

    def evaluate() -> float:
        return stage.evaluator(state.params, unigram_V)["eval/loss"]

    evaluate()
    unused = jax.tree.map(jnp.copy, state)
    jax.block_until_ready(stage.train_step(unused, parallel.shard(np.zeros((rows, length), np.int32), shape=(1,))))
    begin, timer = time.time(), Timer(job.steps, evaluate, rows * length)
    for step in range(1, job.steps + 1):
        tokens = parallel.shard(next(run.batches).tokens, shape=(1,))
        state, _ = stage.train_step(state, tokens)
        timer.after(step, state)
    return timer, begin, parallel.first_replica(state.params)


def masked_eval_set(components: Any) -> Any:
    """Returns our evaluation sequences after masking, as NumPy arrays."""
    from mlm.masking import mask_tokens
    from mlm.steps import EVAL_MASKS

    config, rows_RxL = components.step_config, components.text.eval_rows_RxL
    mask = jax.jit(functools.partial(mask_tokens, key=config.key(EVAL_MASKS), spec=config.eval_masking))
    assert len(rows_RxL) % EVAL_ROWS == 0
    return jax.device_get(mask(rows_RxL, rows_B=np.arange(len(rows_RxL), dtype=np.int32)))


def eval_batches(masked: Any) -> Iterator[Any]:
    """Yields batches of the evaluation set."""
    for start in range(0, len(masked.inputs_BxL), EVAL_ROWS):
        yield jax.tree.map(lambda leaf, start=start: leaf[start : start + EVAL_ROWS], masked)


def build_components(job: Job, output: str) -> Any:
    """Returns text, tokenizer, evaluation set and stream of our run."""
    from mlm import build
    from mlm.run.workdir import WorkDir

    with tempfile.TemporaryDirectory() as directory:
        return build.build(build_settings(job, output), WorkDir(directory))


def mask_on_host(tokens_BxL: np.ndarray, tokenizer: Any, rate: float, draw: np.random.Generator) -> Any:
    """Masks like transformers' collator. Returns the inputs and the labels, -100 where nothing is predicted."""
    special = np.isin(tokens_BxL, tokenizer.special_ids)
    chosen = (draw.random(tokens_BxL.shape) < rate) & ~special
    action = draw.random(tokens_BxL.shape)
    inputs = np.where(chosen & (action < 0.8), tokenizer.mask_id, tokens_BxL)
    random_ids = draw.integers(0, tokenizer.num_ids, tokens_BxL.shape)
    inputs = np.where(chosen & (action >= 0.9), random_ids, inputs)
    return inputs.astype(np.int32), np.where(chosen, tokens_BxL, -100).astype(np.int32)


def shuffled(items: Iterator[Any], *, buffer_size: int, seed: int) -> Iterator[Any]:
    """Shuffles like `datasets`: each item replaces a random one of the buffer, which is yielded."""
    draw, buffer = random.Random(seed), []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        index = draw.randrange(buffer_size)
        yield buffer[index]
        buffer[index] = item
    draw.shuffle(buffer)
    yield from buffer


def example_batches(components: Any, output: str, *, rows: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Yields batches of tokens, grouped like the reference: what a batch does not need of its documents is dropped."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(os.path.join(output, "tokenizer"))
    held_out, source = set(components.text.held_out.to_pylist()), components.text.sources[0].train

    def tokenized() -> Iterator[list[int]]:
        for shard in range(source.num_shards):
            for column in source.read(shard):
                texts = [text for text in column.to_pylist() if text and text not in held_out]
                for start in range(0, len(texts), 1_000):
                    yield from tokenizer(texts[start : start + 1_000])["input_ids"]

    for epoch in range(1_000):
        documents = shuffled(tokenized(), buffer_size=SHUFFLE_BUFFER, seed=seed + epoch)
        group: list[int] = []
        for ids in documents:
            group += ids
            if len(group) >= rows * length:
                yield np.array(group[: rows * length], np.int32).reshape(rows, length)
                group = []


def train_example(job: Job, output: str, stack: contextlib.ExitStack) -> tuple[Timer, float, Any]:
    """Trains with the reference's pipeline and step."""
    import jax.numpy as jnp
    import optax
    import reference_step as sides

    from mlm import parallel

    settings, components = build_settings(job, output), build_components(job, output)
    tokenizer, length, rows = components.tokenizer, settings.data.max_seq_length, settings.per_device_train_batch_size
    encoder = components.encoder
    sizes = {name: getattr(encoder, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = sides.roberta(vocab_size=encoder.vocab_size, pad_token_id=tokenizer.pad_id, **sizes, **EXAMPLE_SIZES)
    warmup = round(0.1 * job.steps)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, job.rate, warmup), optax.linear_schedule(job.rate, 0.0, job.steps - warmup)],
        [warmup],
    )
    optimizer = sides.reference_optimizer(schedule)
    step_fn = parallel.data_parallel(sides.reference_step(config, jnp.float32, optimizer), donate_argnums=(0,))
    state = parallel.replicate(sides.reference_state(config, jnp.float32, optimizer, seed=job.seed))
    model = sides.ReferenceModel(config, jnp.float32, deterministic=True)

    @jax.jit
    def loss_sum(params: Any, masked: Any) -> jax.Array:
        logits = model.apply({"params": params}, masked.inputs_BxL, jnp.ones_like(masked.inputs_BxL))
        logits = jnp.take_along_axis(logits, masked.masked_positions_BxK[..., None], axis=1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, masked.labels_BxK)
        return jnp.sum(losses * masked.label_weights_BxK)

    masked = masked_eval_set(components)

    def evaluate() -> float:
        params = jax.tree.map(lambda leaf: leaf[0], state["params"])
        return sum(float(loss_sum(params, part)) for part in eval_batches(masked)) / masked.label_weights_BxK.sum()

    draw = np.random.default_rng(job.seed)
    batches = example_batches(components, output, rows=rows, length=length, seed=job.seed)

    def next_batch() -> dict[str, jax.Array]:
        inputs, labels = mask_on_host(next(batches), tokenizer, 0.15, draw)
        return {
            name: parallel.shard(array)
            for name, array in {"input_ids": inputs, "labels": labels, "attention_mask": np.ones_like(inputs)}.items()
        }

    evaluate()
    jax.block_until_ready(step_fn(jax.tree.map(jnp.copy, state), next_batch()))
    begin, timer = time.time(), Timer(job.steps, evaluate, rows * length)
    for step in range(1, job.steps + 1):
        state, _ = step_fn(state, next_batch())
        timer.after(step, state)
    return timer, begin, jax.tree.map(lambda leaf: leaf[0], state["params"])


def train_torch(job: Job, output: str, stack: contextlib.ExitStack) -> tuple[Timer, float, Any]:
    """Trains transformers' ModernBERT class in PyTorch on the batches of our stream."""
    import torch
    import transformers

    from mlm.data.prefetch import Prefetcher

    settings, components = build_settings(job, output), build_components(job, output)
    tokenizer, length, rows = components.tokenizer, settings.data.max_seq_length, settings.per_device_train_batch_size
    masked = masked_eval_set(components)
    torch.manual_seed(job.seed)
    torch.set_num_threads(os.cpu_count() or 1)
    fields = {
        name: value for name, value in components.encoder.to_hf().items() if name not in ("architectures", "dtype")
    }
    config = transformers.ModernBertConfig(**fields, attn_implementation="sdpa", sparse_prediction=True)
    model = transformers.ModernBertForMaskedLM(config)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    other = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}],
        lr=job.rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(0.05 * job.steps), job.steps)

    def evaluate() -> float:
        model.eval()
        total = 0.0
        with torch.no_grad():
            for part in eval_batches(masked):
                inputs = torch.from_numpy(np.array(part.inputs_BxL)).long()
                positions = torch.from_numpy(np.array(part.masked_positions_BxK)).long()
                logits = model(input_ids=inputs).logits.gather(
                    1, positions[..., None].expand(-1, -1, config.vocab_size)
                )
                labels = torch.from_numpy(np.array(part.labels_BxK)).long()
                losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
                total += float((losses * torch.from_numpy(np.array(part.label_weights_BxK))).sum())
        model.train()
        return total / float(masked.label_weights_BxK.sum())

    draw = np.random.default_rng(job.seed)
    batches = stack.enter_context(Prefetcher(components.stream, depth=settings.data.prefetch_batches))
    evaluate()
    begin, timer = time.time(), Timer(job.steps, evaluate, rows * length)
    for step in range(1, job.steps + 1):
        inputs, labels = mask_on_host(next(batches).tokens, tokenizer, 0.3, draw)
        loss = model(input_ids=torch.from_numpy(inputs).long(), labels=torch.from_numpy(labels).long()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        timer.after(step, ())
    return timer, begin, [parameter.detach().numpy() for parameter in model.parameters()]


SIDES = {"ours": train_ours, "example": train_example, "torch": train_torch}


def matmul_rate() -> float:
    """Returns the GFLOP/s of NumPy's float32 matmul, for comparing machines."""
    matrix = np.ones((1024, 1024), np.float32)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times) / 1e9


def work(job: Job, output: str, started: float) -> None:
    """Trains one run and writes its file."""
    rate = matmul_rate()
    with contextlib.ExitStack() as stack:
        timer, begin, params = SIDES[job.side](job, output, stack)
        result = {
            **dataclasses.asdict(job),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "start_seconds": begin - started,
            "machine": {"cores": os.cpu_count(), "matmul_gflops": rate, "load": os.getloadavg()[0]},
            "settings": build_settings(job, output).flat(),
            "log": timer.log,
        }
    path = os.path.join(output, f"{job.name}.json")
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1, default=str)
    os.replace(f"{path}.partial", path)


def write_text(text: str, output: str) -> None:
    """Writes the documents as JSON lines, and a tokenizer trained on them as the quickstart trains its own."""
    directory = os.path.join(output, "text")
    if not os.path.isdir(directory):
        os.makedirs(f"{directory}.partial", exist_ok=True)
        for number, documents in enumerate(shards(text)):
            with open(os.path.join(f"{directory}.partial", f"{number:04}.jsonl"), "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
        os.rename(f"{directory}.partial", directory)
    if not os.path.isdir(os.path.join(output, "tokenizer")):
        from configs import quickstart
        from mlm import build
        from mlm.run.workdir import WorkDir
        from mlm.settings import RunSettings

        config = quickstart.get_config()
        config.data.data_files = os.path.join(directory, "*.jsonl")
        with tempfile.TemporaryDirectory() as empty:
            components = build.build(RunSettings.from_dict(config.to_dict()), WorkDir(empty))
        components.tokenizer.save(os.path.join(output, "tokenizer"))


def shards(text: str) -> Iterator[list[str]]:
    """Yields the documents of each file to write."""
    if text == "docstrings":
        from mlm.data.sources import docstrings

        for shard in docstrings.find_shards():
            yield [document for column in docstrings.read_shard(shard) for document in column.to_pylist()]
        return
    for path in sorted(glob.glob(os.path.join(text, "**", "*.pod"), recursive=True)):
        with open(path, encoding="utf-8", errors="replace") as file:
            sections = re.split(r"^=head\d ", file.read(), flags=re.MULTILINE)
        yield [section.strip() for section in sections if len(section) >= 40]


def run_job(job: Job, output: str, *, python: str = sys.executable) -> dict[str, Any]:
    """Runs a job in a process of its own, unless its file exists. Returns the content of the file."""
    path = os.path.join(output, f"{job.name}.json")
    if not os.path.exists(path):
        arguments = json.dumps([dataclasses.asdict(job), output, time.time()])
        subprocess.run([python, __file__, "--worker", arguments], check=True)
    with open(path, encoding="utf-8") as file:
        result = json.load(file)
    last = result["log"][-1]
    print(f"{job.name}: {last['loss']:.3f} after {last['seconds']:.0f} s", flush=True)
    return result


def seconds_to(result: dict[str, Any], loss: float) -> float | None:
    """Returns the seconds of training until the eval loss was reached, interpolated; None if it was not."""
    before = None
    for line in result["log"]:
        if line["loss"] <= loss:
            if before is None:
                return line["seconds"]
            part = (before["loss"] - loss) / (before["loss"] - line["loss"])
            return before["seconds"] + part * (line["seconds"] - before["seconds"])
        before = line
    return None


def table(results: dict[str, list[dict[str, Any]]], target: float) -> str:
    """Returns a Markdown table; `target` is the example's final loss."""
    rows = [
        f"| run | steps | seconds | eval loss | seconds to {target:.3f} | from the command | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        losses = [run["log"][-1]["loss"] for run in runs]
        reached = [seconds_to(run, target) for run in runs]
        times = commands = "not reached"
        if None not in reached:
            found = [seconds for seconds in reached if seconds is not None]
            times = f"{statistics.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})"
            commands = f"{statistics.mean(t + run['start_seconds'] for t, run in zip(found, runs, strict=True)):.1f}"
        spread = f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        seconds = statistics.mean(run["log"][-1]["seconds"] for run in runs)
        rows.append(
            f"| {name} | {runs[0]['steps']} | {seconds:.0f} | {spread} | {times} | {commands} | "
            f"{runs[0]['parameters']:,} |"
        )
    return "\n".join(rows) + "\n"


def draw_curves(results: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Draws the eval losses over seconds and over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True), ("seconds", "tokens"), ("seconds of training", "tokens"), strict=True
    ):
        for number, (name, runs) in enumerate(results.items()):
            for index, run in enumerate(runs):
                values = [line[column] for line in run["log"]], [line["loss"] for line in run["log"]]
                axes.plot(*values, color=f"C{number}", linewidth=1.2, label=None if index else name)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("eval loss (nats)")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs what is missing, then writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output")
    parser.add_argument("--text", default="docstrings", help="docstrings, or a directory of .pod files")
    parser.add_argument("--seconds", type=float, default=140.0)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3", help="of the example")
    parser.add_argument("--torch_rates", default="2e-3,4e-3", help="of PyTorch")
    parser.add_argument("--torch_python", default="", help="runs PyTorch; without it, its side is left out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        job, output, started = json.loads(options.worker)
        work(Job(**job), output, started)
        return
    if not options.output:
        parser.error("--output: is missing")
    output, seeds = options.output, [int(seed) for seed in options.seeds.split(",")]
    rates = {
        "example": [float(rate) for rate in options.rates.split(",")],
        "torch": [float(rate) for rate in options.torch_rates.split(",") if options.torch_python],
    }
    os.makedirs(output, exist_ok=True)
    write_text(options.text, output)

    steps: dict[str, int] = {}

    def run(side: str, rate: float | None, seed: int, *, fraction: float = 1.0) -> dict[str, Any]:
        python = options.torch_python if side == "torch" else sys.executable
        if side not in steps:
            last = run_job(Job(side, rate, 0, CALIBRATION_STEPS), output, python=python)["log"][-1]
            steps[side] = round(options.seconds * last["step"] / last["seconds"])
        return run_job(Job(side, rate, seed, round(fraction * steps[side])), output, python=python)

    def all_seeds(side: str, rate: float | None = None, *, fraction: float = 1.0) -> list[dict[str, Any]]:
        return [run(side, rate, seed, fraction=fraction) for seed in seeds]

    def best_rate(side: str) -> float:
        losses = {rate: run(side, rate, seeds[0])["log"][-1]["loss"] for rate in rates[side]}
        return min(losses, key=lambda rate: losses[rate])

    results = {}
    best = best_rate("example")
    if OWN_RATE in rates["example"] and best != OWN_RATE:
        results["example, 3e-4"] = all_seeds("example", OWN_RATE)
    results[f"example, {best:g}"] = of_example = all_seeds("example", best)
    results["ours"] = all_seeds("ours")
    results["ours, tenth"] = all_seeds("ours", fraction=0.1)
    if rates["torch"]:
        best = best_rate("torch")
        results[f"torch, {best:g}"] = all_seeds("torch", best)
    target = statistics.mean(run["log"][-1]["loss"] for run in of_example)
    lines = table(results, target)
    with open(os.path.join(output, "table.md"), "w", encoding="utf-8") as file:
        file.write(lines)
    draw_curves(results, os.path.join(output, "curves.png"))
    print(lines)


if __name__ == "__main__":
    main()
