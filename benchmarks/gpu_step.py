"""How fast is an update on an NVIDIA GPU, and what share of its peak is that, against PyTorch's?

    python benchmarks/gpu_step.py                                  # needs jax[cuda13], flax and optax alone
    python benchmarks/gpu_step.py --shapes=base-512 --batches=64,128 --torch_python=PYTHON_WITH_TORCH
    JAX_PLATFORMS=cpu python benchmarks/gpu_step.py --shapes=tiny --batches=4    # only to see that it runs

bfloat16 on both sides, float32 parameters and AdamW. PyTorch runs transformers' `RobertaForMaskedLM` under autocast,
with SDPA attention, fused AdamW and `torch.compile`. Dropout is 0.1 on hidden states on both sides, and 0 on attention
weights unless `--attention_dropout` says otherwise: cuDNN's flash attention, as `jax.nn.dot_product_attention` has
it, drops none. Each side takes the batch, of `--batches`, at which it is fastest.

Utilization is model operations a second / the matrix multiplications a second that this card is measured to do in
bfloat16 (8192 x 8192 x 8192). Model operations of an update are 3 x those of the forward pass (a product has two in
the backward pass), 2 for each multiply-add of the products that the objective needs: `mlm/models/flops.py`, which
counts the head on masked positions only. Both sides are held to the same number, whatever they compute.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# Overrides of roberta-base, tokens a row, the utilization that is the goal.
SHAPES = {
    "base-128": ({}, 128, None),
    "base-512": ({}, 512, 0.50),
    "large-512": (LARGE, 512, 0.55),
    "tiny": (TINY, 64, None),
}
UPDATES = 20


def timed(run: Callable[[], None], wait: Callable[[], None]) -> float:
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


def ours(shape: str, rows: int, attention_dropout: float) -> float:
    """Seconds of our update."""
    import jax
    import jax.numpy as jnp
    import reference_step as sides

    from mlm import parallel
    from mlm.models.execution import Execution

    overrides, length, _ = SHAPES[shape]
    config = sides.roberta(**overrides, attention_probs_dropout_prob=attention_dropout)
    how = Execution(attention="cudnn" if jax.default_backend() == "gpu" else "xla", remat="dots")
    task = sides.our_task(config, jnp.bfloat16, how)
    state = parallel.replicate(jax.jit(sides.our_state, static_argnums=0)(task))
    step = parallel.data_parallel(sides.our_step(task), donate_argnums=(0,))
    batch = parallel.shard(sides.tokens(rows, length, vocab_size=config.vocab_size), shape=(1,))
    metrics = None

    def run() -> None:
        nonlocal state, metrics
        state, metrics = step(state, batch)

    return timed(run, lambda: jax.block_until_ready(metrics))


def pytorch(shape: str, rows: int, attention_dropout: float) -> float:
    """Seconds of PyTorch's update."""
    import reference_step as sides  # Before torch, for it needs jax.
    import torch
    import transformers

    overrides, length, _ = SHAPES[shape]
    config = sides.roberta(**overrides, attention_probs_dropout_prob=attention_dropout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = sides.reference_batch(sides.tokens(rows, length, vocab_size=config.vocab_size))
    batch = {key: torch.from_numpy(value.astype("int64")).to(device) for key, value in batch.items()}
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**config.to_hf())).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.98), fused=device == "cuda")
    compiled = torch.compile(model) if device == "cuda" else model

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()

    return timed(run, torch.cuda.synchronize if device == "cuda" else lambda: None)


def matmul_rate() -> float:
    """Operations a second of a bfloat16 product, 8192 on every side (512 on a CPU)."""
    import jax
    import jax.numpy as jnp

    size = 8192 if jax.default_backend() == "gpu" else 512
    product = jax.jit(lambda x, y: x @ y)
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    result = product(x, y)

    def run() -> None:
        nonlocal result
        result = product(x, y)

    return 2 * size**3 / timed(run, lambda: result.block_until_ready())


def model_flops(shape: str) -> float:
    """Operations that a token of an update needs."""
    import reference_step as sides

    from mlm.models.flops import flops_per_token

    overrides, length, _ = SHAPES[shape]
    return flops_per_token(sides.roberta(**overrides), length=length, slots=-(-length * 15 // 100))


SIDES = {"ours": ours, "PyTorch": pytorch}


def in_own_process(python: str, *arguments: str) -> float | None:
    """What this file prints with `arguments`; None, and why, where it fails, as for want of memory."""
    command = [python, os.path.abspath(__file__), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = ([line for line in result.stderr.splitlines() if line.strip()] or ["no reason given"])[-1]
        print(f"    left out, {' '.join(arguments)}: {reason[:160]}", flush=True)
        return None
    return float(result.stdout.split()[-1])


def main() -> None:
    """Prints a table a shape, the ratio last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="base-128,base-512,large-512")
    parser.add_argument("--batches", default="32,64,128,256,512")
    parser.add_argument("--attention_dropout", type=float, default=0.0)
    parser.add_argument("--torch_python", default=sys.executable, help="has jax, flax, optax, torch and transformers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "matmul":
        return print(matmul_rate())
    if options.worker == "flops":
        return print(model_flops(options.shapes))
    if options.worker:
        return print(SIDES[options.worker](options.shapes, int(options.batches), options.attention_dropout))

    peak = in_own_process(sys.executable, "--worker=matmul")
    if peak is None:
        sys.exit("jax does not run here")
    print(f"bfloat16 products: {peak / 1e12:.1f} TFLOP/s measured")
    pythons = {"ours": sys.executable, "PyTorch": options.torch_python}
    for shape in options.shapes.split(","):
        _, length, goal = SHAPES[shape]
        flops = in_own_process(sys.executable, "--worker=flops", f"--shapes={shape}")
        print(f"\n{shape}, {length} tokens a row, {flops / 1e9:.3f} GFLOP a token", flush=True)
        best = {}
        for rows in options.batches.split(","):
            for side, python in pythons.items():
                arguments = (f"--worker={side}", f"--shapes={shape}", f"--batches={rows}")
                seconds = in_own_process(python, *arguments, f"--attention_dropout={options.attention_dropout}")
                if seconds is not None:
                    rate = int(rows) * length / seconds
                    print(f"  {side:8} {rows:>4} rows {rate:12,.0f} tokens/s  {rate * flops / peak:6.1%}", flush=True)
                    best[side] = max(best.get(side, 0.0), rate)
        if "ours" in best:
            aim = f" (goal {goal:.0%})" if goal else ""
            print(f"  utilization of ours: {best['ours'] * flops / peak:.1%}{aim}")
        if len(best) == 2:
            print(f"  ratio ours / PyTorch: {best['ours'] / best['PyTorch']:.2f} (goal 1.5)")
    return None


if __name__ == "__main__":
    main()
