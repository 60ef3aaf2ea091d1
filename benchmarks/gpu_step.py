"""How fast is an update on an NVIDIA GPU, and what share of its peak is that, against PyTorch's?

    python benchmarks/gpu_step.py                                  # needs jax[cuda13], flax and optax alone
    python benchmarks/gpu_step.py --shapes=base-512 --tokens=65536,131072 --torch_python=PYTHON_WITH_TORCH
    python benchmarks/gpu_step.py --sides=ours --remat=dots,none   # two ways of ours, without the other side
    JAX_PLATFORMS=cpu python benchmarks/gpu_step.py --shapes=tiny --tokens=256   # only to see that it runs

bfloat16 on both sides, float32 parameters and AdamW. PyTorch runs transformers' `RobertaForMaskedLM` under autocast,
with SDPA attention, fused AdamW and `torch.compile`; as no token is padding it gets no mask, so that SDPA may take its
flash kernel. Dropout is 0.1 on hidden states on both sides, and 0 on attention weights unless `--attention_dropout`
says otherwise: cuDNN's flash attention, as `jax.nn.dot_product_attention` has it, drops none, and with it ours takes
the plain form. Each side takes the batch, of `--tokens`, at which it is fastest; where one does not fit, its half.

Utilization is model operations a second / the matrix multiplications a second that this card is measured to do in
bfloat16 (8192 x 8192 x 8192, the faster of the two sides' own). Model operations of an update are 3 x those of the
forward pass (a product has two in the backward pass), 2 for each multiply-add of the products that the objective
needs: `mlm/models/flops.py`, which counts the head on masked positions only. Both sides are held to the same number,
whatever they compute.

Every side and shape is a process of its own, of a minute or two. Results are printed as they come; after `--minutes`
no more are waited for. Kernels are those of three more updates, under the profiler: their share of all kernels' time,
and milliseconds an update. JAX_COMPILATION_CACHE_DIR spares a second run on the same machine the compiling.
"""

import argparse
import collections
import functools
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# Overrides of roberta-base, tokens a row, the utilization that is the goal.
SHAPES = {
    "base-128": ({}, 128, None),
    "base-512": ({}, 512, 0.50),
    "large-512": (LARGE, 512, 0.55),
    "tiny": (TINY, 64, None),
}
UPDATES, PROFILED = 10, 3
Run = Callable[[], None]
show = functools.partial(print, flush=True)


def timed(run: Run, wait: Run) -> float:
    """Seconds of an update: the fastest of three times `UPDATES`, after three to warm up."""
    for _ in range(3):
        run()
    wait()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(UPDATES):
            run()
        wait()
        best = min(best, (time.perf_counter() - start) / UPDATES)
    return best


def say(**what: Any) -> None:
    """Tells the process that waits for this one."""
    print(json.dumps(what), flush=True)


def our_product() -> None:
    """Times a bfloat16 product, 8192 on every side (512 on a CPU)."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    size = 8192 if device.platform == "gpu" else 512
    product = jax.jit(lambda x, y: x @ y)
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    result = None

    def run() -> None:
        nonlocal result
        result = product(x, y)

    rate = 2 * size**3 / timed(run, lambda: result.block_until_ready())
    say(rate=rate, about=f"{device.device_kind}, jax {jax.__version__}")


def our_update(shape: str, rows: int, options: argparse.Namespace) -> None:
    """Times our update, and its kernels."""
    import jax
    import jax.numpy as jnp
    import reference_step as sides

    from mlm import parallel
    from mlm.models.block import Execution

    overrides, length, _ = SHAPES[shape]
    config = sides.roberta(**overrides, attention_probs_dropout_prob=options.attention_dropout)
    attention = options.attention if jax.default_backend() == "gpu" else "xla"
    step_config = sides.our_step_config(config, jnp.bfloat16, Execution(attention=attention, remat=options.remat))
    state = parallel.replicate(jax.jit(sides.our_state, static_argnums=0)(step_config))
    step = parallel.data_parallel(sides.our_step(step_config), donate_argnums=(0,))
    batch = parallel.shard(sides.tokens(rows, length, vocab_size=config.vocab_size), shape=(1,))
    metrics = None

    def run() -> None:
        nonlocal state, metrics
        state, metrics = step(state, batch)

    def wait() -> None:
        jax.block_until_ready((state, metrics))

    seconds = timed(run, wait)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    say(seconds=seconds, memory=memory, loss=float(metrics.sums.loss[0] / metrics.sums.count[0]))
    spent = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                run()
            wait()
        for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            planes = jax.profiler.ProfileData.from_file(path).planes
            for line in (line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines):
                # Other lines tell the same time again, by operation or by step.
                for event in line.events if line.name.startswith("Stream") else ():
                    spent[event.name] += event.duration_ns / 1e9 / PROFILED
    say(kernels=spent)


def torch_product() -> None:
    """Times PyTorch's product."""
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    device, size = ("cuda", 8192) if on_gpu else ("cpu", 512)
    x, y = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    rate = 2 * size**3 / timed(lambda: x @ y, torch.cuda.synchronize if on_gpu else lambda: None)
    about = torch.cuda.get_device_name() if on_gpu else device
    say(rate=rate, about=f"{about}, torch {torch.__version__}, transformers {transformers.__version__}")


def torch_update(shape: str, rows: int, options: argparse.Namespace) -> None:
    """Times PyTorch's update, and its kernels."""
    import reference_step as sides  # Before torch, for it needs jax.
    import torch
    import transformers

    overrides, length, _ = SHAPES[shape]
    config = sides.roberta(**overrides, attention_probs_dropout_prob=options.attention_dropout)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    batch = sides.reference_batch(sides.tokens(rows, length, vocab_size=config.vocab_size))
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
    say(seconds=seconds, memory=torch.cuda.max_memory_allocated() if on_gpu else 0, loss=loss.item())
    if on_gpu:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            for _ in range(PROFILED):
                run()
            wait()
        say(kernels={event.key: event.self_device_time_total / 1e6 / PROFILED for event in trace.key_averages()})


PRODUCTS = {"ours": our_product, "PyTorch": torch_product}
UPDATE = {"ours": our_update, "PyTorch": torch_update}


def in_own_process(side: str, *arguments: str, python: str, until: float) -> Iterator[dict[str, Any]]:
    """What a side says, when it says it; where it does not end well, last {"failed": why, "full": if memory was}."""
    command = [python, os.path.abspath(__file__), f"--worker={side}", *arguments]
    environment = {"XLA_CLIENT_MEM_FRACTION": "0.95", "JAX_TRACEBACK_FILTERING": "off"} | os.environ
    if side == "PyTorch":
        environment["JAX_PLATFORMS"] = "cpu"  # Its jax makes tokens, and must not take the GPU's memory.
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
        lines = [line for line in errors.read().splitlines() if line.strip()] or ["no reason given"]
    if code:
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines
        why = named[-1][:300] if time.monotonic() < until else "out of time"
        full = re.search("RESOURCE_EXHAUSTED|out of memory", "\n".join(lines), re.IGNORECASE) is not None
        yield {"failed": why, "full": full}


def compare(options: argparse.Namespace, *, until: float) -> None:
    """Measures, and prints what it finds as soon as it is known."""
    pythons = {"ours": sys.executable, "PyTorch": options.torch_python}
    run = {side: functools.partial(in_own_process, side, python=pythons[side], until=until) for side in pythons}
    rates = {}
    for side in options.sides.split(","):
        for said in run[side]("--shapes="):
            if "failed" in said:
                show(f"{side} does not run here: {said['failed']}")
            else:
                rates[side] = said["rate"]
                show(f"{side}: {said['about']}, bfloat16 products {said['rate'] / 1e12:.1f} TFLOP/s")
    if not rates:
        sys.exit(1)
    remats = {"ours": options.remat.split(","), "PyTorch": [""]}
    for shape in options.shapes.split(","):
        _, length, goal = SHAPES[shape]
        flops = model_flops(shape)
        show(f"\n{shape}, {length} tokens a row, {flops / 1e9:.3f} GFLOP a token")
        # A token's share of the card's peak, times tokens a second, is utilization.
        share = flops / max(rates.values())
        best = dict.fromkeys(rates, 0.0)
        for size in options.tokens.split(","):
            for side in rates:
                for remat in remats[side]:
                    rate = measure(run[side], f"{side} {remat}", shape, int(size) // length, remat, options, share)
                    best[side] = max(best[side], rate)
        for side, rate in best.items():
            aim = f" (goal {goal:.0%})" if goal and side == "ours" else ""
            show(f"  utilization of {side}: {rate * share:.1%}{aim}" if rate else f"  {side} gave nothing")
        if len(best) == 2 and all(best.values()):
            show(f"  ratio ours / PyTorch: {best['ours'] / best['PyTorch']:.2f} (goal 1.5)")


def measure(
    run: Callable[..., Iterator[dict[str, Any]]],
    name: str,
    shape: str,
    rows: int,
    remat: str,
    options: argparse.Namespace,
    share: float,
) -> float:
    """Tokens a second of a side, of `rows` or the half, a quarter... that fits; 0 if it gives none."""
    rate, full = 0.0, False
    given = (f"--attention_dropout={options.attention_dropout}", f"--attention={options.attention}", f"--remat={remat}")
    for said in run(f"--shapes={shape}", f"--tokens={rows}", *given):
        if "seconds" in said:
            rate = rows * SHAPES[shape][1] / said["seconds"]
            show(
                f"  {name:12} {rows:>4} rows {rate:12,.0f} tokens/s  {rate * share:6.1%}  "
                f"{1e3 * said['seconds']:8.2f} ms  {said['memory'] / 1e9:6.1f} GB  loss {said['loss']:.3f}"
            )
        elif "kernels" in said:
            spent = said["kernels"]
            total = sum(spent.values())
            show(f"      {len(spent)} kernels by name, {1e3 * total:.2f} ms")
            for kernel in sorted(spent, key=spent.get, reverse=True)[: options.kernels]:
                show(f"      {spent[kernel] / total:6.1%} {1e3 * spent[kernel]:8.2f} ms  {kernel[:90]}")
        else:
            show(f"  {name:12} {rows:>4} rows, {'no profile' if rate else 'left out'}: {said['failed']}")
            full = said["full"]
    if not rate and full and rows > 1:
        return measure(run, name, shape, rows // 2, remat, options, share)
    return rate


def model_flops(shape: str) -> float:
    """Operations that a token of an update needs."""
    import reference_step as sides

    from mlm.models.flops import flops_per_token

    overrides, length, _ = SHAPES[shape]
    return flops_per_token(sides.roberta(**overrides), length=length, max_predictions_per_seq=-(-length * 15 // 100))


def main() -> None:
    """Prints a table a shape, the ratio last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="base-512,large-512,base-128")
    parser.add_argument("--tokens", default="65536", help="of a batch; several are tried one after the other")
    parser.add_argument("--attention_dropout", type=float, default=0.0, help="of both sides")
    parser.add_argument("--attention", default="cudnn", help="of ours: plain, xla or cudnn")
    parser.add_argument("--remat", default="dots", help="of ours: none, dots or full; several are tried")
    parser.add_argument("--sides", default="ours,PyTorch")
    parser.add_argument("--torch_python", default=sys.executable, help="has jax, flax, optax, torch and transformers")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--kernels", type=int, default=5, help="how many of each side are named")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker and options.shapes:
        return UPDATE[options.worker](options.shapes, int(options.tokens), options)
    if options.worker:
        return PRODUCTS[options.worker]()
    compare(options, until=time.monotonic() + 60 * options.minutes)
    return None


if __name__ == "__main__":
    main()
