"""What an update costs on TPUs, compiled for them on a machine that has none, beside the reference's update.

    pip install libtpu                                     # the version that goes with this jax
    nice python benchmarks/tpu_compile.py                  # all topologies, both dtypes: an hour or two on two cores
    nice python benchmarks/tpu_compile.py --topologies=v3-8 --dtypes=bfloat16
    nice python benchmarks/tpu_compile.py --layers=2       # minutes, to try a change
    nice python benchmarks/tpu_compile.py --topologies=v3-8 --sides= --remat=none,dots,full --largest

The shapes are those of configs/roberta_base.py: roberta-base, 128 rows of 128 tokens a device, dropout on. Operations,
bytes and temporaries are the compiler's own count for one device (a TensorCore up to v3, a chip from v4 on). The
roofline time is the larger of operations / peak and bytes / bandwidth: no update can be faster, and none is as fast.
Seconds of compiling are those of all cores together, which other work on the machine changes least.
Cycles are what the compiler itself expects of its kernels, added up: nearer to the truth, but it says nothing of sorts,
scatters and what goes between devices.
Peaks are the vendor's: docs.cloud.google.com/tpu/docs/v3, /v4, /v5e and /v6e, for bfloat16, which float32 products
are computed in as well at JAX's default precision.
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
from jax.experimental import topologies

from mlm import parallel
from mlm.models.block import Execution
from mlm.settings import REMATS

ROWS, LENGTH = 128, 128
# An estimate from here on is none.
UNKNOWN = 2**60


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a topology: its name for libtpu, peak operations and bytes a second, bytes of memory."""

    topology: str
    flops: float
    bandwidth: float
    memory: float


# v3 has two devices a chip: half of a chip's 123 TFLOP/s, 900 GB/s and 32 GiB each.
CHIPS = {
    "v3-8": Chip("v3:2x2", 61.5e12, 450e9, 16 * 2**30),
    "v4-8": Chip("v4:2x2x1", 275e12, 1_200e9, 32 * 2**30),
    "v5e-8": Chip("v5e:2x4", 197e12, 819e9, 16 * 2**30),
    "v6e-8": Chip("v6e:2x4", 918e12, 1_640e9, 32 * 2**30),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one update on one device."""

    flops: float
    accessed: float
    cycles: float  # NaN where the compiler's text cannot be had.
    temporaries: int
    peak: int
    seconds: float  # of compiling, of all cores' time

    def bound(self, chip: Chip) -> float:
        """Seconds that the update takes at least."""
        return max(self.flops / chip.flops, self.accessed / chip.bandwidth)


def compile_side(
    side: str, chip: Chip, *, dtype: Any, layers: int, execution: Execution, rows: int = ROWS
) -> Cost | None:
    """The cost of a side's update; None where it does not fit into the chip's memory."""
    devices = topologies.get_topology_desc(chip.topology, platform="tpu").devices
    config = sides.roberta(num_hidden_layers=layers)
    tokens = np.zeros((rows, LENGTH), np.int32)
    if side == "ours":
        step_config = sides.our_step_config(config, dtype, execution)
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
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    try:
        estimates = map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text()))
        cycles = float(sum(estimate for estimate in estimates if estimate < UNKNOWN))
    except jax.errors.JaxRuntimeError:
        # For a v6e, libtpu 0.0.52 writes an instruction that jaxlib 0.10.2 does not read.
        cycles = float("nan")
    return Cost(
        flops=cost["flops"],
        accessed=cost["bytes accessed"],
        cycles=cycles,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        seconds=seconds,
    )


def show(name: str, cost: Cost | None, chip: Chip) -> None:
    """Prints a row of the table."""
    if cost is None:
        print(f"  {name:28} does not fit into {chip.memory / 2**30:.0f} GiB", flush=True)
        return
    counts = (
        f"{cost.flops / 1e12:6.2f} {cost.accessed / 1e9:7.1f} {1e3 * cost.bound(chip):9.1f} {cost.cycles / 1e6:8.1f}"
    )
    share = cost.peak / chip.memory
    print(
        f"  {name:28} {counts} {cost.temporaries / 1e9:9.3f} {cost.peak / 1e9:8.2f} ({share:3.0%}) {cost.seconds:9.0f}",
        flush=True,
    )


def largest(chip: Chip, *, dtype: Any, layers: int, execution: Execution, step: int = 16) -> int:
    """The largest number of rows a device, a multiple of `step`, whose update compiles.

    Memory is nearly linear in the rows: a line through two of them says where to look.
    """

    def peak(rows: int) -> int | None:
        cost = compile_side("ours", chip, dtype=dtype, layers=layers, execution=execution, rows=rows)
        print(f"    {rows} rows: {'too many' if cost is None else f'{cost.peak / 1e9:.2f} GB'}", flush=True)
        return None if cost is None else cost.peak

    low, high = step, 4 * step
    first, second = peak(low), peak(high)
    if first is None:
        return 0
    if second is not None:
        a_row = (second - first) / (high - low)
        low, high = high, int(low + (chip.memory - first) / a_row) // step * step
    # From the guess on, in both directions, then by halves.
    while second is not None and high > low and peak(high) is not None:
        low, high = high, high + max(step, high // 8 // step * step)
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if peak(middle) is not None else (low, middle)
    return low


def main() -> None:
    """Prints a table a topology and dtype, the ratios last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", default=",".join(CHIPS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--sides", default="ours,reference")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--remat", default="", help="a row for each of these: none,dots,full")
    parser.add_argument("--largest", action="store_true", help="the largest batch that fits")
    options = parser.parse_args()
    layers, remats = options.layers, list(filter(None, options.remat.split(",")))
    if unknown := set(remats) - set(REMATS):
        parser.error(f"--remat={','.join(sorted(unknown))}: there are {', '.join(REMATS)}")
    for name in options.topologies.split(","):
        chip = CHIPS[name]
        for dtype_name in options.dtypes.split(","):
            dtype = jnp.dtype(dtype_name)
            print(f"\n{name}, {dtype_name}: {layers} layers, {ROWS} rows of {LENGTH} tokens a device, dropout on")
            counts = f"{'TFLOP':>6} {'GB read':>7} {'bound ms':>9} {'Mcycles':>8}"
            print(f"  {'':28} {counts} {'temp. GB':>9} {'peak GB':>14} {'compile s':>9}")
            costs = {}
            for side in filter(None, options.sides.split(",")):
                costs[side] = compile_side(side, chip, dtype=dtype, layers=layers, execution=Execution(remat="dots"))
                show(side, costs[side], chip)
            for remat in remats:
                cost = compile_side("ours", chip, dtype=dtype, layers=layers, execution=Execution(remat=remat))
                show(f"remat={remat}", cost, chip)
            if options.largest:
                rows = largest(chip, dtype=dtype, layers=layers, execution=Execution(remat="dots"))
                print(f"  the most rows a device that fit: {rows}")
            if all(costs.get(side) for side in ("ours", "reference")):
                ours, reference = costs["ours"], costs["reference"]
                ratios = {
                    "operations": reference.flops / ours.flops,
                    "bytes": reference.accessed / ours.accessed,
                    "temporaries": reference.temporaries / ours.temporaries,
                    "bound": reference.bound(chip) / ours.bound(chip),
                    "cycles": reference.cycles / ours.cycles,
                }
                print("  ratio reference / ours: " + ", ".join(f"{what} {x:.2f}" for what, x in ratios.items()))


if __name__ == "__main__":
    main()
