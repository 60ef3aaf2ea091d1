"""Speed of a training step on an NVIDIA GPU, and its fraction of the GPU's peak, against PyTorch.

    python benchmarks/gpu_step.py                                  # needs jax[cuda13], flax and optax only
    python benchmarks/gpu_step.py --shapes=base-512 --tokens=65536,131072 --torch_python=PYTHON_WITH_TORCH
    python benchmarks/gpu_step.py --sides=ours --remat=dots,none   # two variants of ours, without PyTorch
    python benchmarks/gpu_step.py --shapes=modernbert-1024,modernbert-1024-isolate --sides=ours
    JAX_PLATFORMS=cpu python benchmarks/gpu_step.py --shapes=tiny --tokens=256   # only checks that it runs

Both sides compute in bfloat16 with float32 parameters and AdamW. PyTorch runs transformers' `RobertaForMaskedLM`
under autocast, with SDPA attention, fused AdamW and `torch.compile`; no token is padding, so it gets no attention
mask and SDPA can use its flash kernel. Dropout is 0.1 on hidden states on both sides, and 0 on attention weights
unless `--attention_dropout` is given: cuDNN's flash attention in `jax.nn.dot_product_attention` has no dropout, so
ours then uses the plain implementation. Each side uses the batch size out of `--tokens` with which it is fastest; a
batch that does not fit is halved.

Utilization = model FLOP/s / measured peak. The peak is that of a bfloat16 matmul of 8192 x 8192 x 8192 on this GPU,
the faster of the two sides' own. The model FLOP of a step are three times those of the forward pass (every matmul has
two in the backward pass), with 2 per multiply-add, for the matmuls that the objective needs: `mlm/models/flops.py`
counts the head at masked positions only. Both sides are rated by the same number, whatever they compute.

Each side and shape runs in its own process, for one or two minutes. Results are printed as they arrive; measuring
stops after `--minutes`. The kernels are those of three more steps under the profiler, with their fraction of all
kernels' time and milliseconds per step. JAX_COMPILATION_CACHE_DIR saves compiling in a second run on the same
machine.
"""

import argparse
import collections
import dataclasses
import functools
import glob
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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

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


def our_step(shape: Shape, rows: int, options: argparse.Namespace) -> None:
    """Times our step and its kernels."""
    import jax
    import jax.numpy as jnp
    import reference_step as sides

    from mlm import parallel
    from mlm.models.block import Execution

    config = model_config(shape, attention_dropout=options.attention_dropout)
    attention = options.attention if jax.default_backend() == "gpu" else "xla"
    step_config = sides.our_step_config(
        config,
        jnp.bfloat16,
        Execution(attention=attention, remat=options.remat),
        mlm_probability=shape.mlm_probability,
        begin_id=sides.BEGIN if shape.document_length else None,
    )
    state = parallel.replicate(jax.jit(sides.our_state, static_argnums=0)(step_config))
    step = parallel.data_parallel(sides.our_step(step_config), donate_argnums=(0,))
    tokens = sides.random_tokens(
        rows, shape.length, vocab_size=config.vocab_size, document_length=shape.document_length
    )
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

    config = model_config(shape, attention_dropout=options.attention_dropout)
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


MATMULS = {"ours": our_matmul, "PyTorch": torch_matmul}
TRAINING_STEPS = {"ours": our_step, "PyTorch": torch_step}


def in_own_process(side: str, *arguments: str, python: str, until: float) -> Iterator[dict[str, Any]]:
    """Yields the results of a side; after a failure the last one is {"failed": reason, "full": was memory full}."""
    command = [python, os.path.abspath(__file__), f"--worker={side}", *arguments]
    environment = {"XLA_CLIENT_MEM_FRACTION": "0.95", "JAX_TRACEBACK_FILTERING": "off", "XLA_FLAGS": MAIN_FLAGS}
    environment |= os.environ
    if side == "PyTorch":
        environment["JAX_PLATFORMS"] = "cpu"  # It uses jax for the tokens only, which must not occupy the GPU's memory.
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
    remats = {"ours": options.remat.split(","), "PyTorch": [""]}
    for name in options.shapes.split(","):
        shape = SHAPES[name]
        flops = model_flops(shape)
        show(f"\n{name}, {shape.length} tokens per sequence, {flops / 1e9:.3f} GFLOP per token")
        seconds_per_token = flops / max(rates.values())  # at 100 % utilization
        best = dict.fromkeys((side for side in rates if side == "ours" or shape.family == "roberta"), 0.0)
        for size in options.tokens.split(","):
            for side in best:
                for remat in remats[side]:
                    rows = int(size) // shape.length
                    rate = measure(run[side], f"{side} {remat}", name, rows, remat, options, seconds_per_token)
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
    name: str,
    shape: str,
    rows: int,
    remat: str,
    options: argparse.Namespace,
    seconds_per_token: float,
) -> float:
    """Returns the tokens per second of a side with `rows` sequences, halved until they fit; 0 if it has no result."""
    rate, full = 0.0, False
    flags = (f"--attention_dropout={options.attention_dropout}", f"--attention={options.attention}", f"--remat={remat}")
    for result in run(f"--shapes={shape}", f"--tokens={rows}", *flags):
        if "seconds" in result:
            rate = rows * SHAPES[shape].length / result["seconds"]
            show(
                f"  {name:12} {rows:>4} sequences {rate:12,.0f} tokens/s  {rate * seconds_per_token:6.1%}  "
                f"{1e3 * result['seconds']:8.2f} ms  {result['memory'] / 1e9:6.1f} GB  loss {result['loss']:.3f}"
            )
        elif "kernels" in result:
            kernels = result["kernels"]
            total = sum(kernels.values())
            show(f"      {len(kernels)} kernels by name, {1e3 * total:.2f} ms")
            for kernel in sorted(kernels, key=kernels.get, reverse=True)[: options.kernels]:
                show(f"      {kernels[kernel] / total:6.1%} {1e3 * kernels[kernel]:8.2f} ms  {kernel[:90]}")
        else:
            show(f"  {name:12} {rows:>4} sequences, {'no profile' if rate else 'skipped'}: {result['failed']}")
            full = result["full"]
    if not rate and full and rows > 1:
        return measure(run, name, shape, rows // 2, remat, options, seconds_per_token)
    return rate


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
    parser.add_argument("--shapes", default="base-512,large-512,base-128,modernbert-1024,modernbert-1024-isolate")
    parser.add_argument("--tokens", default="65536", help="tokens per batch; several are tried")
    parser.add_argument("--attention_dropout", type=float, default=0.0, help="both sides")
    parser.add_argument("--attention", default="cudnn", help="ours: plain, xla or cudnn")
    parser.add_argument("--remat", default="dots", help="ours: none, dots or full; several are tried")
    parser.add_argument("--sides", default="ours,PyTorch")
    parser.add_argument("--torch_python", default=sys.executable, help="has jax, flax, optax, torch and transformers")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--kernels", type=int, default=5, help="number of kernels to print for each side")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker and options.shapes:
        return TRAINING_STEPS[options.worker](SHAPES[options.shapes], int(options.tokens), options)
    if options.worker:
        return MATMULS[options.worker]()
    compare(options, until=time.monotonic() + 60 * options.minutes)
    return None


if __name__ == "__main__":
    main()
