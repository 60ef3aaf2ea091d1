"""Speed of a training step on an NVIDIA GPU, and its fraction of the GPU's peak, against PyTorch.

    python benchmarks/gpu_step.py --shapes=base-512,base-128       # needs jax[cuda13], flax and optax only
    python benchmarks/gpu_step.py --shapes=large-512
    python benchmarks/gpu_step.py --shapes=modernbert-1024,modernbert-1024-isolate --sides=ours
    python benchmarks/gpu_step.py --shapes=base-512 --sides=ours --remat=none --attention_dropout=0
    python benchmarks/gpu_step.py --measure=repeat,loop            # needs requirements.txt
    JAX_PLATFORMS=cpu python benchmarks/gpu_step.py --tiny --measure=steps,repeat,loop   # checks that all of it runs
    python benchmarks/gpu_step.py --compile_only                   # needs jax[cuda13], but no GPU

Each command ends within `--minutes`, and prints every result as it arrives. `--measure`:

steps: both sides compute in bfloat16 with float32 parameters and AdamW. PyTorch (`--torch_python` if this Python has
none) runs transformers' `RobertaForMaskedLM` under autocast, with SDPA attention, fused AdamW and `torch.compile`; no
token is padding, so it gets no attention mask and SDPA can use its flash kernel. Dropout is 0.1 on hidden states on
both sides, and 0 on attention weights; ours is measured with 0.1 on these, too: cuDNN's flash attention in
`jax.nn.dot_product_attention` has no dropout, so ours then uses the plain implementation. Each side uses the batch
size out of `--tokens` with which it is fastest; a batch that does not fit is halved. Each side and shape runs in its
own process, for one or two minutes. The kernels are those of three more steps under the profiler, with their fraction
of all kernels' time and milliseconds per step. JAX_COMPILATION_CACHE_DIR saves compiling in a second run on the same
machine.

repeat: main.py trains a small model for 50 steps, twice in one go and once stopped after 25 steps and resumed. Prints
which parts of checkpoints, metrics and exported model differ: none should.

loop: main.py's --mode=benchmark trains RoBERTa-base with 512 tokens on a text file, written from the docstrings of the
installed packages. Prints the time of the loop / that of the step alone.

Utilization = model FLOP/s / measured peak. The peak is that of a bfloat16 matmul of 8192 x 8192 x 8192 on this GPU,
the faster of the two sides' own. The model FLOP of a step are three times those of the forward pass (every matmul has
two in the backward pass), with 2 per multiply-add, for the matmuls that the objective needs: `mlm/models/flops.py`
counts the head at masked positions only. Both sides are rated by the same number, whatever they compute.

`--compile_only` compiles our steps for the GPU that `--target_config` describes, and runs nothing. The file is a
`GpuTargetConfigProto` of XLA as text; `jax.experimental.topologies.get_topology_desc(platform="cuda").target_config`
returns it on a machine with that GPU. The compiler then cannot time kernels: every matmul goes to cuBLAS, where on a
GPU it also tries Triton, and sorts are XLA's own instead of CUB's. The columns: operations in matmuls and cuDNN's
attention, temporaries, memory of the step; calls of cuBLAS, of cuDNN's attention (forward + backward), other fused
kernels, and sorts.
"""

import argparse
import collections
import dataclasses
import functools
import glob
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch.

    Attributes:
      length: tokens per sequence.
      overrides: fields that differ from roberta-base, or from answerdotai/ModernBERT-base.
      family: "roberta" or "modernbert". PyTorch's side is measured for the first only.
      mlm_probability: fraction of the tokens that is predicted.
      document_length: a sequence holds documents of so many tokens, which do not attend to each other; 0 for one.
      utilization: goal.
      tokens_per_second: goal.
    """

    length: int
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    family: str = "roberta"
    mlm_probability: float = 0.15
    document_length: int = 0
    utilization: float | None = None
    tokens_per_second: float | None = None


# No random token may be padding. The goal is the rate of ModernBERT's authors on an H100.
SPECIAL_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
MODERNBERT = {
    "length": 1_024,
    "overrides": SPECIAL_IDS,
    "family": "modernbert",
    "mlm_probability": 0.3,
    "tokens_per_second": 304_000,
}
SHAPES = {
    "base-128": Shape(128),
    "base-512": Shape(512, utilization=0.50),
    "large-512": Shape(512, LARGE, utilization=0.55),
    "modernbert-1024": Shape(**MODERNBERT),
    "modernbert-1024-isolate": Shape(**MODERNBERT, document_length=400),
    "tiny": Shape(64, TINY),
    "tiny-modernbert": Shape(
        128, TINY | SPECIAL_IDS | {"local_attention": 16}, "modernbert", mlm_probability=0.3, document_length=40
    ),
}
STEPS, PROFILED_STEPS = 10, 3
# For main.py's runs with --tiny.
TINY_RUN = {name: size for name, size in TINY.items() if name != "vocab_size"}
H200 = os.path.join(ROOT, "benchmarks", "nvidia_h200.txt")
# As main.py sets them, for results that are the same in every run.
MAIN_FLAGS = "--xla_gpu_exclude_nondeterministic_ops=true"
Run = Callable[[], None]
show = functools.partial(print, flush=True)


def timed(run: Run, wait: Run) -> float:
    """Returns the seconds per step: the fastest of three series of STEPS, after three steps to warm up."""
    for _ in range(3):
        run()
    wait()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(STEPS):
            run()
        wait()
        best = min(best, (time.perf_counter() - start) / STEPS)
    return best


def report(**result: Any) -> None:
    """Sends a result to the parent process."""
    print(json.dumps(result), flush=True)


def our_matmul() -> None:
    """Times a bfloat16 matmul, 8192 x 8192 x 8192 (512 on a CPU)."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    size = 8192 if device.platform == "gpu" else 512
    matmul = jax.jit(lambda x, y: x @ y)
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    result = None

    def run() -> None:
        nonlocal result
        result = matmul(x, y)

    rate = 2 * size**3 / timed(run, lambda: result.block_until_ready())
    report(rate=rate, about=f"{device.device_kind}, jax {jax.__version__}")


def open_step(shape: Shape, options: argparse.Namespace, *, attention: str) -> tuple[Callable[..., Any], Run]:
    """Returns our step and the function that makes its first state."""
    import jax.numpy as jnp
    import reference_step as sides

    from mlm.models.block import Execution

    step_config = sides.our_step_config(
        model_config(shape, attention_dropout=float(options.attention_dropout)),
        jnp.bfloat16,
        Execution(attention=attention, remat=options.remat),
        mlm_probability=shape.mlm_probability,
        begin_id=sides.BEGIN if shape.document_length else None,
    )
    # The parameters are the same with any implementation, and that for the GPU may not run here.
    initial = dataclasses.replace(step_config, model=step_config.model.clone(execution=Execution()))
    return sides.our_step(step_config), lambda: sides.our_state(initial)


def our_step(shape: Shape, rows: int, options: argparse.Namespace) -> None:
    """Times our step and its kernels."""
    import jax
    import reference_step as sides

    from mlm import parallel

    step_fn, initial_state = open_step(
        shape, options, attention=options.attention if jax.default_backend() == "gpu" else "xla"
    )
    state = parallel.replicate(jax.jit(initial_state)())
    step = parallel.data_parallel(step_fn, donate_argnums=(0,))
    vocab_size = model_config(shape).vocab_size
    tokens = sides.random_tokens(rows, shape.length, vocab_size=vocab_size, document_length=shape.document_length)
    batch = parallel.shard(tokens, shape=(1,))
    metrics = None

    def run() -> None:
        nonlocal state, metrics
        state, metrics = step(state, batch)

    def wait() -> None:
        jax.block_until_ready((state, metrics))

    seconds = timed(run, wait)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    report(seconds=seconds, memory=memory, loss=float(metrics.sums.loss[0] / metrics.sums.count[0]))
    kernel_seconds = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED_STEPS):
                run()
            wait()
        for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            planes = jax.profiler.ProfileData.from_file(path).planes
            for line in (line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines):
                # Other lines repeat the same time, by operation or by step.
                for event in line.events if line.name.startswith("Stream") else ():
                    kernel_seconds[event.name] += event.duration_ns / 1e9 / PROFILED_STEPS
    report(kernels=kernel_seconds)


def compile_step(shape: Shape, rows: int, options: argparse.Namespace) -> None:
    """Compiles our step for the GPU of a target config, and counts its operations, memory and kernels."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from mlm import parallel

    with open(options.target_config, encoding="utf-8") as file:
        target_config = file.read()
    topology = topologies.get_topology_desc("", "cuda", target_config=target_config, topology="1x1x1")
    step, state = open_step(shape, options, attention=options.attention)
    tokens = jax.ShapeDtypeStruct((1, 1, rows, shape.length), jnp.int32)
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), jax.eval_shape(state))
    traced = parallel.over_mesh(step, topology.devices, donate_argnums=(0,)).trace(stacked, tokens)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    report(
        temporaries=memory.temp_size_in_bytes,
        memory=used + memory.temp_size_in_bytes,
        **count_kernels(compiled.as_text()),
    )


def count_kernels(text: str) -> dict[str, float]:
    """Returns the kernels of a program by kind, and the operations of its matmuls and of cuDNN's attention.

    Args:
      text: XLA's compiled program for a GPU, in its text format.
    """
    sizes = {
        name: [int(size) for size in shape.split(",") if size]
        for name, shape in re.findall(r"%([\w.-]+) = \(?\w+\[([\d,]*)\]", text)
    }
    counts = dict.fromkeys(("flops", "matmuls", "attention_forward", "attention_backward", "fusions", "sorts"), 0)
    for line in text.splitlines():
        if '"__cublas$' in line:
            output, left = re.search(r"%([\w.-]+) = .*? custom-call\(%([\w.-]+)", line).groups()
            contracted = re.findall(r"\d+", re.search(r'"lhs_contracting_dimensions":\[(.*?)\]', line)[1])
            counts["flops"] += 2 * math.prod(sizes[output]) * math.prod(sizes[left][int(axis)] for axis in contracted)
            counts["matmuls"] += 1
        elif '"__cudnn$fmha' in line:
            # Queries [B, Q, H, E] and keys [B, K, H, E]: two matmuls in the forward pass and five in the backward pass.
            shapes = re.findall(r"\[([\d,]+)\]", line.partition("operand_layout_constraints=")[2])
            queries, keys = ([int(size) for size in shape.split(",")] for shape in shapes[:2])
            kind, num_matmuls = ("backward", 5) if "Backward" in line else ("forward", 2)
            counts["flops"] += num_matmuls * 2 * math.prod(queries) * keys[1]
            counts[f"attention_{kind}"] += 1
        elif re.search(r" fusion\(.*kind=k(Loop|Input|Custom)", line):
            counts["fusions"] += 1
        elif " sort(" in line:
            counts["sorts"] += 1
    return counts


def torch_matmul() -> None:
    """Times PyTorch's matmul."""
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    device, size = ("cuda", 8192) if on_gpu else ("cpu", 512)
    x, y = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    rate = 2 * size**3 / timed(lambda: x @ y, torch.cuda.synchronize if on_gpu else lambda: None)
    about = torch.cuda.get_device_name() if on_gpu else device
    report(rate=rate, about=f"{about}, torch {torch.__version__}, transformers {transformers.__version__}")


def torch_step(shape: Shape, rows: int, options: argparse.Namespace) -> None:
    """Times PyTorch's step and its kernels."""
    import reference_step as sides  # Imported before torch, because it imports jax.
    import torch
    import transformers

    config = model_config(shape, attention_dropout=float(options.attention_dropout))
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    # Autocast leaves some products in float32; TensorFloat-32 is faster for them, as in XLA.
    torch.set_float32_matmul_precision("high")
    batch = sides.reference_batch(sides.random_tokens(rows, shape.length, vocab_size=config.vocab_size))
    batch = {name: torch.from_numpy(batch[name].astype("int64")).to(device) for name in ("input_ids", "labels")}
    hf_config = transformers.RobertaConfig(**config.to_hf(), attn_implementation="sdpa")
    model = transformers.RobertaForMaskedLM(hf_config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.98), fused=on_gpu)
    compiled = torch.compile(model) if on_gpu else model
    loss = None

    def run() -> None:
        nonlocal loss
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()

    wait = torch.cuda.synchronize if on_gpu else lambda: None
    seconds = timed(run, wait)
    report(seconds=seconds, memory=torch.cuda.max_memory_allocated() if on_gpu else 0, loss=loss.item())
    if on_gpu:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            for _ in range(PROFILED_STEPS):
                run()
            wait()
        report(
            kernels={event.key: event.self_device_time_total / 1e6 / PROFILED_STEPS for event in trace.key_averages()}
        )


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of our step.

    Attributes:
      remat: `model.remat`; "" for PyTorch.
      attention_dropout: dropout rate of the attention weights.
    """

    remat: str
    attention_dropout: float

    def __str__(self) -> str:
        return f"{self.remat} dropout {self.attention_dropout:g}" if self.attention_dropout else self.remat

    @property
    def flags(self) -> tuple[str, ...]:
        """Arguments of the process that measures it."""
        return f"--remat={self.remat}", f"--attention_dropout={self.attention_dropout}"


PLAIN_VARIANT = Variant("", 0.0)


def variants(shape: Shape, options: argparse.Namespace) -> list[Variant]:
    """Returns the variants of our step to measure; ModernBERT has no dropout in attention."""
    rates = [float(rate) for rate in options.attention_dropout.split(",")] if shape.family == "roberta" else [0.0]
    return [Variant(remat, rate) for rate, remat in itertools.product(rates, options.remat.split(","))]


MATMULS = {"ours": our_matmul, "PyTorch": torch_matmul}
TRAINING_STEPS = {"ours": our_step, "PyTorch": torch_step, "compiled": compile_step}


def in_own_process(side: str, *arguments: str, python: str, until: float) -> Iterator[dict[str, Any]]:
    """Yields the results of a side; after a failure the last one is {"failed": reason, "full": was memory full}."""
    command = [python, os.path.abspath(__file__), f"--worker={side}", *arguments]
    environment = {"XLA_CLIENT_MEM_FRACTION": "0.95", "JAX_TRACEBACK_FILTERING": "off", "XLA_FLAGS": MAIN_FLAGS}
    if side == "compiled":
        environment["XLA_FLAGS"] += " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    environment |= os.environ
    # PyTorch's side uses jax for the tokens only, which must not occupy the GPU's memory.
    if side != "ours":
        environment["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        timer = threading.Timer(max(0.0, until - time.monotonic()), process.kill)
        timer.start()
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()] or ["no message"]
    if code:
        errors_found = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines
        reason = errors_found[-1][:300] if time.monotonic() < until else "out of time"
        full = re.search("RESOURCE_EXHAUSTED|out of memory", "\n".join(lines), re.IGNORECASE) is not None
        yield {"failed": reason, "full": full}


def compare(options: argparse.Namespace, *, until: float) -> None:
    """Measures all sides and shapes, and prints results as they arrive."""
    pythons = {"ours": sys.executable, "PyTorch": options.torch_python}
    run = {side: functools.partial(in_own_process, side, python=pythons[side], until=until) for side in pythons}
    rates = {}
    for side in options.sides.split(","):
        for result in run[side]("--shapes="):
            if "failed" in result:
                show(f"{side} does not run here: {result['failed']}")
            else:
                rates[side] = result["rate"]
                show(f"{side}: {result['about']}, bfloat16 matmul {result['rate'] / 1e12:.1f} TFLOP/s")
    if not rates:
        sys.exit(1)
    for name in options.shapes.split(","):
        shape = SHAPES[name]
        flops = model_flops(shape)
        show(f"\n{name}, {shape.length} tokens per sequence, {flops / 1e9:.3f} GFLOP per token")
        seconds_per_token = flops / max(rates.values())  # at 100 % utilization
        best = dict.fromkeys((side for side in rates if side == "ours" or shape.family == "roberta"), 0.0)
        for size, side in itertools.product(options.tokens.split(","), best):
            for variant in variants(shape, options) if side == "ours" else [PLAIN_VARIANT]:
                rate = measure(run[side], side, name, int(size) // shape.length, variant, options, seconds_per_token)
                # The sides are compared without dropout in attention.
                if variant.attention_dropout == 0.0:
                    best[side] = max(best[side], rate)
        for side, rate in best.items():
            goals = [f"{shape.utilization:.0%}"] if shape.utilization else []
            goals += [f"{shape.tokens_per_second:,.0f} tokens/s"] if shape.tokens_per_second else []
            aim = f" (goal {', '.join(goals)})" if goals and side == "ours" else ""
            show(f"  utilization of {side}: {rate * seconds_per_token:.1%}{aim}" if rate else f"  no result of {side}")
        if len(best) == 2 and all(best.values()):
            show(f"  ratio ours / PyTorch: {best['ours'] / best['PyTorch']:.2f} (goal 1.5)")


def measure(
    run: Callable[..., Iterator[dict[str, Any]]],
    side: str,
    shape: str,
    rows: int,
    variant: Variant,
    options: argparse.Namespace,
    seconds_per_token: float,
) -> float:
    """Returns the tokens per second of a side with `rows` sequences, halved until they fit; 0 if it has no result."""
    rate, full = 0.0, False
    name = f"{side} {variant}".strip()
    for result in run(f"--shapes={shape}", f"--tokens={rows}", f"--attention={options.attention}", *variant.flags):
        if "seconds" in result:
            rate = rows * SHAPES[shape].length / result["seconds"]
            show(
                f"  {name:20} {rows:>4} sequences {rate:12,.0f} tokens/s  {rate * seconds_per_token:6.1%}  "
                f"{1e3 * result['seconds']:8.2f} ms  {result['memory'] / 1e9:6.1f} GB  loss {result['loss']:.3f}"
            )
        elif "kernels" in result:
            kernels = result["kernels"]
            total = sum(kernels.values())
            show(f"      {len(kernels)} kernels by name, {1e3 * total:.2f} ms")
            for kernel in sorted(kernels, key=kernels.get, reverse=True)[: options.kernels]:
                show(f"      {kernels[kernel] / total:6.1%} {1e3 * kernels[kernel]:8.2f} ms  {kernel[:90]}")
        else:
            show(f"  {name:20} {rows:>4} sequences, {'no profile' if rate else 'skipped'}: {result['failed']}")
            full = result["full"]
    if not rate and full and rows > 1:
        return measure(run, side, shape, rows // 2, variant, options, seconds_per_token)
    return rate


def compile_all(options: argparse.Namespace, *, until: float) -> None:
    """Prints a row for each compiled variant of our step."""
    columns = ("TFLOP", "temp. GB", "peak GB", "matmuls", "attention", "fusions", "sorts")
    show(f"{'':44}" + " ".join(f"{column:>9}" for column in columns))
    run = functools.partial(in_own_process, "compiled", python=sys.executable, until=until)
    flags = (f"--attention={options.attention}", f"--target_config={options.target_config}")
    for name, size in itertools.product(options.shapes.split(","), options.tokens.split(",")):
        shape, rows = SHAPES[name], int(size) // SHAPES[name].length
        for variant in variants(shape, options):
            for result in run(f"--shapes={name}", f"--tokens={rows}", *flags, *variant.flags):
                title = f"{name} x {rows}, {variant}"
                if "failed" in result:
                    show(f"{title:44} {result['failed']}")
                    continue
                attention = f"{result['attention_forward']}+{result['attention_backward']}"
                show(
                    f"{title:44} {result['flops'] / 1e12:9.2f} {result['temporaries'] / 1e9:9.2f} "
                    f"{result['memory'] / 1e9:9.2f} {result['matmuls']:9} {attention:>9} {result['fusions']:9} "
                    f"{result['sorts']:9}"
                )


def run_main(*flags: str, until: float) -> str | None:
    """Runs main.py and returns its output; prints the reason and returns None if it fails."""
    command = [sys.executable, os.path.join(ROOT, "main.py"), *flags]
    environment = {"XLA_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    limit = max(0.0, until - time.monotonic())
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False, env=environment, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        show(f"  out of time: {' '.join(flags)}")
        return None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        show(f"  exit code {result.returncode}: {lines[-1][:300]}")
        return None
    return result.stdout


def write_text(folder: str, *, megabytes: float) -> str:
    """Writes the first docstrings of the installed packages to a file and returns its path."""
    from mlm.data.sources.source import open_source

    source, size, path = open_source(dataset_name="docstrings"), 0, os.path.join(folder, "text.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for column in itertools.chain.from_iterable(map(source.read, range(source.num_shards))):
            file.writelines(json.dumps({"text": text}) + "\n" for text in column.drop_null().to_pylist())
            size += column.nbytes
            if size > megabytes * 1e6:
                break
    return path


def quickstart(options: argparse.Namespace, path: str, **overrides: int) -> list[str]:
    """Returns flags of main.py: the quickstart as RoBERTa in bfloat16, on a file, with fields of the model's config."""
    overrides |= TINY_RUN if options.tiny else {}
    flags = {f"model.overrides.{name}": value for name, value in overrides.items()} | {
        "model.dtype": "bfloat16",
        "data.data_files": path,
        "data.num_eval_samples": 64,
        "tokenizer.vocab_size": 300 if options.tiny else 8_192,
    }
    return ["--config=configs/quickstart.py:roberta", *(f"--config.{key}={value}" for key, value in flags.items())]


def check_repeat(options: argparse.Namespace, *, until: float) -> None:
    """Trains twice in one go, and once stopped and resumed, and prints what differs."""
    show("\nrepeat: 50 steps of the quickstart, width 256, bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        flags = quickstart(options, write_text(folder, megabytes=0.2 if options.tiny else 5), hidden_size=256)
        flags += [f"--config.{key}=25" for key in ("eval_steps", "save_steps", "logging_steps")]
        # The learning rate must not depend on the number of steps, which is 25 in the run that is resumed.
        flags += ["--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=10"]
        first = os.path.join(folder, "first", "run")
        for name, counts in (("first", [50]), ("second", [50]), ("resumed", [25, 50])):
            workdir = os.path.join(folder, name, "run")
            for count in counts:
                if run_main(*flags, f"--workdir={workdir}", f"--config.num_train_steps={count}", until=until) is None:
                    return
            if name != "first":
                # In its own process, with jax on the CPU.
                command = [sys.executable, os.path.join(ROOT, "benchmarks", "same_run.py"), first, workdir]
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                show(f"  first and {name} run: {' '.join(result.stdout.split()) or result.stderr[-300:]}")


def measure_loop(options: argparse.Namespace, *, until: float) -> None:
    """Prints the time of the training loop on a text file / the time of the step alone."""
    rows, length = (4, 64) if options.tiny else (128, 512)
    show(f"\nloop: RoBERTa-base, {rows} sequences of {length} tokens a step, from a text file")
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3_072}
    with tempfile.TemporaryDirectory() as folder:
        path = write_text(folder, megabytes=0.2 if options.tiny else 30)
        output = run_main(
            "--mode=benchmark",
            f"--steps={2 if options.tiny else 100}",
            *quickstart(options, path, **base, vocab_size=50_265, max_position_embeddings=length + 2),
            f"--config.data.max_seq_length={length}",
            f"--config.per_device_train_batch_size={rows}",
            "--config.optimizer.name=adamw",
            "--config.optimizer.adam_learning_rate=None",
            "--config.masking.mlm_probability=0.15",
            until=until,
        )
    show("\n".join(f"  {line}" for line in (output or "").splitlines() if line.strip()))


def model_config(shape: Shape, *, attention_dropout: float = 0.0) -> Any:
    """Returns the `EncoderConfig`."""
    import reference_step as sides

    from mlm.models.config import default_config

    if shape.family == "roberta":
        return sides.roberta(**shape.overrides, attention_probs_dropout_prob=attention_dropout)
    return default_config(shape.family).replace(**shape.overrides, attention_probs_dropout_prob=attention_dropout)


def model_flops(shape: Shape) -> float:
    """Returns the FLOP per token that a step needs."""
    from mlm.models.flops import flops_per_token

    max_predictions = math.ceil(shape.mlm_probability * shape.length)
    return flops_per_token(model_config(shape), length=shape.length, max_predictions_per_seq=max_predictions)


def main() -> None:
    """Prints a table for each shape, and then the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", default="steps", help="of steps, repeat, loop")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default: all but the last two")
    parser.add_argument("--tokens", help="tokens per batch; several are tried; default: 65536")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to check on a CPU that everything runs")
    parser.add_argument("--attention_dropout", default="0,0.1", help="ours: rates on the attention weights")
    parser.add_argument("--attention", default="cudnn", help="ours: plain, xla or cudnn")
    parser.add_argument("--remat", default="dots", help="ours: none, dots or full; several are tried")
    parser.add_argument("--sides", default="ours,PyTorch")
    parser.add_argument("--torch_python", default=sys.executable, help="has jax, flax, optax, torch and transformers")
    parser.add_argument("--minutes", type=float, default=4.8)
    parser.add_argument("--kernels", type=int, default=5, help="number of kernels to print for each side")
    parser.add_argument("--compile_only", action="store_true", help="compile our steps for --target_config")
    parser.add_argument("--target_config", default=H200, help="a file with XLA's description of a GPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker and options.shapes:
        return TRAINING_STEPS[options.worker](SHAPES[options.shapes], int(options.tokens), options)
    if options.worker:
        return MATMULS[options.worker]()
    options.shapes = options.shapes or ",".join(name for name in SHAPES if name.startswith("tiny") == options.tiny)
    options.tokens = options.tokens or ("256" if options.tiny else "65536")
    until = time.monotonic() + 60 * options.minutes
    if options.compile_only:
        return compile_all(options, until=until)
    measures = {"steps": compare, "repeat": check_repeat, "loop": measure_loop}
    if unknown := {*options.measure.split(",")} - {*measures}:
        parser.error(f"--measure={','.join(sorted(unknown))}: must be of {', '.join(measures)}")
    for measure_name in options.measure.split(","):
        measures[measure_name](options, until=until)
    return None


if __name__ == "__main__":
    main()
