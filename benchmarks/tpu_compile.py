"""Cost of a training step on TPUs, compiled on a machine without one, beside the reference's step.

    pip install libtpu                                     # the version for the installed jax
    nice python benchmarks/tpu_compile.py                  # all machines, both dtypes: an hour or two on two cores
    nice python benchmarks/tpu_compile.py --topologies=v3-8 --dtypes=bfloat16
    nice python benchmarks/tpu_compile.py --layers=2       # minutes, to try a change
    nice python benchmarks/tpu_compile.py --topologies=v3-8 --sides= --remat=none,dots,full --largest
    nice python benchmarks/tpu_compile.py --topologies=v3-8 --dtypes=bfloat16 --sides=ours --recipes=muon,mask30,ema

The shapes are those of configs/roberta_base.py: roberta-base, 128 sequences of 128 tokens per device, with dropout.
Columns, all for one device (a core up to v3, a chip from v4 on):

    TFLOP, GB moved   operations and memory traffic, as the compiler counts them
    bound ms          the larger of FLOP / peak FLOP/s and bytes / bandwidth (mlm/hardware.py): a lower limit of the
                      step time, which no step reaches
    Mcycles           the compiler's estimates for its kernels, added up: closer to the step time, but without sorts,
                      scatters and communication between devices
    temp. GB          temporaries
    peak GB           peak memory, and its fraction of the device's memory
    compile s         CPU seconds over all cores, which other load on the machine changes least
"""

import argparse
import dataclasses
import os
import re
import time
from typing import Any

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}

import jax
import jax.numpy as jnp
import numpy as np
import reference_step as sides

from mlm import memory, parallel
from mlm.hardware import Device, Machine, find_device, parse_topology
from mlm.models.block import Execution
from mlm.settings import DTYPES, REMATS

ROWS, LENGTH = 128, 128
# --recipes: arguments of `our_step_config`.
RECIPES: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": sides.MUON},
    "mask30": {"mlm_probability": 0.3},
    "ema": {"ema_decay": 0.999},
}
# The compiler writes such numbers of cycles where it has no estimate.
UNKNOWN_CYCLES = 2**60


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one step on one device."""

    flops: float
    bytes_moved: float
    cycles: float  # NaN where jaxlib cannot read the compiled program
    temporaries: int
    peak: int
    compile_seconds: float

    def bound(self, device: Device) -> float:
        """Lower limit of the step time in seconds."""
        return max(self.flops / device.peak_flops, self.bytes_moved / device.bandwidth)


def compile_step(
    side: str, machine: Machine, *, dtype: Any, layers: int, execution: Execution, rows: int = ROWS, recipe: str = ""
) -> Cost | None:
    """Returns the cost of a side's step; None if it does not fit the device's memory."""
    devices = memory.topology_devices(machine)
    config = sides.roberta(num_hidden_layers=layers)
    tokens = np.zeros((rows, LENGTH), np.int32)
    if side == "ours":
        step_config = sides.our_step_config(config, dtype, execution, **RECIPES.get(recipe, {}))
        state, step = jax.eval_shape(lambda: sides.our_state(step_config)), sides.our_step(step_config)
        batch = tokens[None]
    else:
        state = jax.eval_shape(lambda: sides.reference_state(config, dtype))
        step, batch = sides.reference_step(config, dtype), sides.reference_batch(tokens)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(devices), *leaf.shape), leaf.dtype), (state, batch))
    lowered = parallel.over_mesh(step, devices, donate_argnums=(0,)).lower(*shapes)
    start = time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    seconds = time.process_time() - start
    cost, memory_use = compiled.cost_analysis(), compiled.memory_analysis()
    try:
        estimates = map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text()))
        cycles = float(sum(estimate for estimate in estimates if estimate < UNKNOWN_CYCLES))
    except jax.errors.JaxRuntimeError:
        # For a v6e, libtpu 0.0.52 writes an instruction that jaxlib 0.10.2 cannot read.
        cycles = float("nan")
    return Cost(
        flops=cost["flops"],
        bytes_moved=cost["bytes accessed"],
        cycles=cycles,
        temporaries=memory_use.temp_size_in_bytes,
        peak=memory_use.peak_memory_in_bytes,
        compile_seconds=seconds,
    )


def print_row(name: str, cost: Cost | None, device: Device) -> None:
    """Prints a line of the table."""
    if cost is None:
        print(f"  {name:28} does not fit {device.memory_bytes / 2**30:.0f} GiB", flush=True)
        return
    print(
        f"  {name:28} {cost.flops / 1e12:6.2f} {cost.bytes_moved / 1e9:8.1f} {1e3 * cost.bound(device):9.1f} "
        f"{cost.cycles / 1e6:8.1f} {cost.temporaries / 1e9:9.3f} {cost.peak / 1e9:8.2f} "
        f"({cost.peak / device.memory_bytes:3.0%}) {cost.compile_seconds:9.0f}",
        flush=True,
    )


def largest_batch(machine: Machine, *, dtype: Any, layers: int, execution: Execution) -> int:
    """Returns the largest number of sequences per device whose step compiles."""

    def peak(rows: int) -> int | None:
        cost = compile_step("ours", machine, dtype=dtype, layers=layers, execution=execution, rows=rows)
        print(f"    {rows} sequences: {'do not fit' if cost is None else f'{cost.peak / 1e9:.2f} GB'}", flush=True)
        return None if cost is None else cost.peak

    return memory.largest_batch(peak, limit=machine.memory_bytes, first=ROWS)


def main() -> None:
    """Prints a table for each machine and dtype, and then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", default="v3-8,v4-8,v5e-8,v6e-8")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--sides", default="ours,reference")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--remat", default="", help="ours with these values of model.remat: none,dots,full")
    parser.add_argument("--recipes", default="", help="ours with each of: " + ", ".join(RECIPES))
    parser.add_argument("--largest", action="store_true", help="the largest batch that fits")
    options = parser.parse_args()
    layers, remats = options.layers, list(filter(None, options.remat.split(",")))
    if unknown := set(remats) - set(REMATS):
        parser.error(f"--remat={','.join(sorted(unknown))}: must be of {', '.join(REMATS)}")
    if unknown := {*filter(None, options.recipes.split(","))} - {*RECIPES}:
        parser.error(f"--recipes={','.join(sorted(unknown))}: must be of {', '.join(RECIPES)}")
    for name in options.topologies.split(","):
        machine = parse_topology(name)
        device = find_device(machine.kind)
        for dtype_name in options.dtypes.split(","):
            dtype = jnp.dtype(dtype_name)
            print(f"\n{name}, {dtype_name}: {layers} layers, {ROWS} sequences of {LENGTH} tokens per device")
            columns = f"{'TFLOP':>6} {'GB moved':>8} {'bound ms':>9} {'Mcycles':>8} {'temp. GB':>9} {'peak GB':>14}"
            print(f"  {'':28} {columns} {'compile s':>9}")
            costs = {}
            for side in filter(None, options.sides.split(",")):
                costs[side] = compile_step(side, machine, dtype=dtype, layers=layers, execution=Execution(remat="dots"))
                print_row(side, costs[side], device)
            for remat in remats:
                cost = compile_step("ours", machine, dtype=dtype, layers=layers, execution=Execution(remat=remat))
                print_row(f"remat={remat}", cost, device)
            for recipe in filter(None, options.recipes.split(",")):
                execution = Execution(remat="dots")
                cost = compile_step("ours", machine, dtype=dtype, layers=layers, execution=execution, recipe=recipe)
                print_row(f"ours with {recipe}", cost, device)
            if options.largest:
                rows = largest_batch(machine, dtype=dtype, layers=layers, execution=Execution(remat="dots"))
                print(f"  largest batch that fits: {rows} sequences per device")
            if all(costs.get(side) for side in ("ours", "reference")):
                ours, reference = costs["ours"], costs["reference"]
                ratios = {
                    "operations": reference.flops / ours.flops,
                    "bytes": reference.bytes_moved / ours.bytes_moved,
                    "temporaries": reference.temporaries / ours.temporaries,
                    "bound": reference.bound(device) / ours.bound(device),
                    "cycles": reference.cycles / ours.cycles,
                }
                print("  ratio reference / ours: " + ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items()))


if __name__ == "__main__":
    main()
