"""Speed of a training step on CPU, against the reference's Flax step and PyTorch.

    python benchmarks/cpu_step.py                                  # both shapes, a few minutes
    python benchmarks/cpu_step.py --shapes=small --torch_python=PYTHON_WITH_TORCH_AND_TRANSFORMERS
    python benchmarks/cpu_step.py --shapes= --compile              # compile time of the quickstart's step

Each side runs in its own process with all cores. They take turns for `--rounds` rounds, one step each, in alternating
order, and the fastest step of each counts, because other load on the machine can only slow a step. All compute in
float32, with dropout. PyTorch runs transformers' `RobertaForMaskedLM` with SDPA attention and AdamW.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

# Shape -> name in reference_step of the overrides of roberta-base, sequences per batch, tokens per sequence.
SHAPES = {"base": ("", 8, 128), "small": ("SMALL", 32, 128)}
SIDES = {"ours": "ours", "flax": "reference, Flax", "torch": "PyTorch"}
# Side -> the speed ratio to reach.
GOALS = {"flax": 1.35, "torch": 1.0}


def jax_step(side: str, shape: str) -> Callable[[], None]:
    """Returns a function that makes one compiled step of a JAX side."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import reference_step as sides

    from mlm import parallel
    from mlm.models.block import Execution

    name, rows, length = SHAPES[shape]
    config = sides.roberta(**(getattr(sides, name) if name else {}))
    tokens = sides.random_tokens(rows, length, vocab_size=config.vocab_size)
    if side == "ours":
        step_config = sides.our_step_config(config, jnp.float32, Execution())
        state, step = jax.jit(sides.our_state, static_argnums=0)(step_config), sides.our_step(step_config)
        batch = parallel.shard(tokens, shape=(1,))
    else:
        state = jax.jit(sides.reference_state, static_argnums=(0, 1))(config, jnp.float32)
        step = sides.reference_step(config, jnp.float32)
        batch = jax.tree.map(parallel.shard, sides.reference_batch(tokens))
    state = parallel.replicate(state)
    step = parallel.data_parallel(step, donate_argnums=(0,))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    run()
    return run


def torch_step(shape: str) -> Callable[[], None]:
    """Returns a function that makes one step of PyTorch."""
    import reference_step as sides  # Imported before torch, because it imports jax.
    import torch
    import transformers

    name, rows, length = SHAPES[shape]
    config = sides.roberta(**(getattr(sides, name) if name else {}))
    batch = sides.reference_batch(sides.random_tokens(rows, length, vocab_size=config.vocab_size))
    batch = {key: torch.from_numpy(value.astype("int64")) for key, value in batch.items()}
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**config.to_hf())).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.98), eps=1e-8)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()

    run()
    return run


def run_worker(side: str, shape: str) -> None:
    """Makes a step for every line on standard input and prints its seconds."""
    run = torch_step(shape) if side == "torch" else jax_step(side, shape)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def start_worker(side: str, shape: str, python: str) -> subprocess.Popen | None:
    """Returns the process of a side once it is ready; None if it cannot run."""
    command = [python, os.path.abspath(__file__), f"--worker={side}", f"--shapes={shape}"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if process.stdout.readline().strip() == "ready":
        return process
    print(f"skipped: {SIDES[side]} ({process.stderr.read().strip().splitlines()[-1]})")
    return None


def measure(shape: str, *, rounds: int, torch_python: str) -> dict[str, float]:
    """Returns the seconds of each side's fastest step."""
    pythons = {"ours": sys.executable, "flax": sys.executable, "torch": torch_python}
    workers = {side: worker for side, python in pythons.items() if (worker := start_worker(side, shape, python))}
    seconds = {side: float("inf") for side in workers}
    for round_index in range(rounds):
        for side in list(workers)[:: 1 if round_index % 2 else -1]:
            workers[side].stdin.write("\n")
            workers[side].stdin.flush()
            seconds[side] = min(seconds[side], float(workers[side].stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    return seconds


def compile_quickstart() -> None:
    """Prints the seconds it takes to compile the step of configs/quickstart.py."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import reference_step as sides

    from configs import quickstart
    from mlm import parallel
    from mlm.models.block import Execution

    config = quickstart.get_config()
    overrides = {name: value for name, value in config.model.overrides.to_dict().items() if value is not None}
    encoder = sides.roberta(vocab_size=config.tokenizer.vocab_size, **overrides)
    step_config = sides.our_step_config(encoder, jnp.float32, Execution())
    state = parallel.replicate(jax.jit(sides.our_state, static_argnums=0)(step_config))
    tokens = sides.random_tokens(config.per_device_train_batch_size, config.data.max_seq_length, vocab_size=2_048)
    step = parallel.data_parallel(sides.our_step(step_config), donate_argnums=(0,))
    start = time.perf_counter()
    step.lower(state, parallel.shard(tokens, shape=(1,))).compile()
    print(time.perf_counter() - start)


def compile_twice() -> None:
    """Prints the compile time in a first process, and in a second one that finds the program in the cache."""
    command = [sys.executable, os.path.abspath(__file__), "--worker=compile"]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        first, second = (
            float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
            for _ in range(2)
        )
    print(f"\nquickstart's step: compiled in {first:.1f} s (goal: under 15), from the cache in {second:.1f} s")
    print(f"ratio first start / second start: {first / second:.1f}")


def main() -> None:
    """Prints tokens per second for each side and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="small,base")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--torch_python", default=sys.executable, help="has jax, flax, optax, torch and transformers")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "compile":
        return compile_quickstart()
    if options.worker:
        return run_worker(options.worker, options.shapes)
    for shape in filter(None, options.shapes.split(",")):
        _, rows, length = SHAPES[shape]
        print(f"\n{shape}: {rows} sequences of {length} tokens")
        seconds = measure(shape, rounds=options.rounds, torch_python=options.torch_python)
        for side, best in seconds.items():
            print(f"  {SIDES[side]:16} {rows * length / best:8,.0f} tokens/s")
        for side in seconds.keys() - {"ours"}:
            print(f"  ratio ours / {SIDES[side]}: {seconds[side] / seconds['ours']:.2f} (goal {GOALS[side]})")
    if options.compile:
        compile_twice()
    return None


if __name__ == "__main__":
    main()
