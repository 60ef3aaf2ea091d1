"""How fast is an update on a CPU, against the reference's Flax step and PyTorch's?

    python benchmarks/cpu_step.py                                  # both shapes, some minutes
    python benchmarks/cpu_step.py --shapes=small --torch_python=PYTHON_WITH_TORCH_AND_TRANSFORMERS
    python benchmarks/cpu_step.py --shapes= --compile              # compile time of the quickstart's step

Every side is a process of its own with all cores, and they take turns for `--rounds`: one update each, then in the
opposite order. A side is given its fastest update: what else the machine does only slows. All compute in float32, with
dropout; PyTorch runs transformers' `RobertaForMaskedLM` with SDPA attention and AdamW.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

# Shape -> overrides of roberta-base by name in reference_step, rows and tokens a row.
SHAPES = {"base": ("", 8, 128), "small": ("SMALL", 32, 128)}
GOALS = {"flax": 1.35, "torch": 1.0}
NAMES = {"ours": "ours", "flax": "reference, Flax", "torch": "PyTorch"}


def jax_step(side: str, shape: str) -> Callable[[], None]:
    """One update of a JAX side, compiled."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import reference_step as sides

    from mlm import parallel
    from mlm.models.block import Execution

    name, rows, length = SHAPES[shape]
    config = sides.roberta(**(getattr(sides, name) if name else {}))
    tokens = sides.tokens(rows, length, vocab_size=config.vocab_size)
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
        state, result = step(state, batch)
        jax.block_until_ready(result)

    run()
    return run


def torch_step(shape: str) -> Callable[[], None]:
    """One update of PyTorch's."""
    import reference_step as sides  # Before torch, for it needs jax.
    import torch
    import transformers

    name, rows, length = SHAPES[shape]
    config = sides.roberta(**(getattr(sides, name) if name else {}))
    batch = sides.reference_batch(sides.tokens(rows, length, vocab_size=config.vocab_size))
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


def work(side: str, shape: str) -> None:
    """Makes an update for each line that comes in, and answers with its seconds."""
    run = torch_step(shape) if side == "torch" else jax_step(side, shape)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def start(side: str, shape: str, python: str) -> subprocess.Popen | None:
    """The process of a side, ready; None where it cannot run."""
    command = [python, os.path.abspath(__file__), f"--worker={side}", f"--shapes={shape}"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if process.stdout.readline().strip() == "ready":
        return process
    print(f"left out: {NAMES[side]} ({process.stderr.read().strip().splitlines()[-1]})")
    return None


def measure(shape: str, *, rounds: int, torch_python: str) -> dict[str, float]:
    """Seconds of each side's fastest update."""
    pythons = {"ours": sys.executable, "flax": sys.executable, "torch": torch_python}
    workers = {side: worker for side, python in pythons.items() if (worker := start(side, shape, python))}
    seconds = {side: float("inf") for side in workers}

    def turns() -> Iterator[str]:
        for turn in range(rounds):
            yield from list(workers)[:: 1 if turn % 2 else -1]

    for side in turns():
        workers[side].stdin.write("\n")
        workers[side].stdin.flush()
        seconds[side] = min(seconds[side], float(workers[side].stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    return seconds


def compile_quickstart() -> None:
    """Compiles the step of configs/quickstart.py and prints how long that took."""
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
    tokens = sides.tokens(config.per_device_train_batch_size, config.data.max_seq_length, vocab_size=2_048)
    step = parallel.data_parallel(sides.our_step(step_config), donate_argnums=(0,))
    start = time.perf_counter()
    step.lower(state, parallel.shard(tokens, shape=(1,))).compile()
    print(time.perf_counter() - start)


def compile_twice() -> None:
    """Prints the compile time in a fresh process and in a second one that finds the first one's cache."""
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
    """Prints the tables."""
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
        return work(options.worker, options.shapes)
    for shape in filter(None, options.shapes.split(",")):
        _, rows, length = SHAPES[shape]
        print(f"\n{shape}: {rows} rows of {length} tokens")
        seconds = measure(shape, rounds=options.rounds, torch_python=options.torch_python)
        for side, best in seconds.items():
            print(f"  {NAMES[side]:16} {rows * length / best:8,.0f} tokens/s")
        for side in seconds.keys() - {"ours"}:
            print(f"  ratio ours / {NAMES[side]}: {seconds[side] / seconds['ours']:.2f} (goal {GOALS[side]})")
    if options.compile:
        compile_twice()
    return None


if __name__ == "__main__":
    main()
