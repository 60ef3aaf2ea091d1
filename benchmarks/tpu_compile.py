"""Cost of a training step on TPUs, compiled on a machine without one, beside the reference's step.

    pip install libtpu                                     # the version for the installed jax
    nice python benchmarks/tpu_compile.py                  # all machines, both dtypes: an hour or two on two cores
    nice python benchmarks/tpu_compile.py --topologies=v3-8 --dtypes=bfloat16
    nice python benchmarks/tpu_compile.py --layers=2       # minutes, to try a change
    nice python benchmarks/tpu_compile.py --topologies=v3-8 --sides= --remat=none,dots,full --largest
    nice python benchmarks/tpu_compile.py --topologies=v3-8 --dtypes=bfloat16 --sides=ours --recipes=muon,mask30,ema
    nice python benchmarks/tpu_compile.py --topologies=v5e-8 --dtypes=bfloat16 --model=modernbert --lengths=8192 \
        --sides=ours,whole_rows --rows=1 --layers=4        # long sequences; all 22 layers take half an hour and more

The shapes are those of configs/roberta_base.py: roberta-base, 128 sequences of 128 tokens per device, with dropout.
With --model=modernbert they are those of configs/modernbert_base.py: 30 % of the tokens masked, documents isolated. Its
"whole_rows" is the step before local layers were computed in blocks and global ones by the splash kernel: plain
attention, with the scores of all pairs of tokens in every layer.

Columns, all for one device (a core up to v3, a chip from v4 on):

    TFLOP, GB moved   operations and memory traffic, as the compiler counts them; the compiler knows nothing of the
                      splash kernel's operations, so these are added here by a formula
    bound ms          the larger of FLOP / peak FLOP/s and bytes / bandwidth (mlm/hardware.py): a lower limit of the
                      step time, which no step reaches
    Mcycles           the compiler's estimates for its kernels, added up: closer to the step time, but without sorts,
                      scatters and communication between devices
    temp. GB          temporaries
    peak GB           peak memory, and its fraction of the device's memory
    compile s         CPU seconds over all cores, which other load on the machine changes least
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import time
from typing import Any
from unittest import mock

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}

import jax
import jax.numpy as jnp
import numpy as np
import reference_step as sides

from mlm import memory, parallel
from mlm.build import SPLASH_LENGTH
from mlm.hardware import Device, Machine, find_device, parse_topology
from mlm.models import block
from mlm.models.block import Execution
from mlm.models.config import EncoderConfig, default_config
from mlm.models.ops import attention
from mlm.settings import DTYPES, REMATS

# --recipes: arguments of `our_step_config`.
RECIPES: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": sides.MUON},
    "mask30": {"mlm_probability": 0.3},
    "ema": {"ema_decay": 0.999},
}
# The compiler writes such numbers of cycles where it has no estimate.
UNKNOWN_CYCLES = 2**60


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, and the batch of one device."""

    model: str
    config: EncoderConfig
    rows: int
    length: int

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `our_step_config`."""
        return {} if self.model == "roberta" else {"mlm_probability": 0.3, "begin_id": sides.BEGIN}

    def execution(self, remat: str) -> Execution:
        """What `model.attention="auto"` chooses on a TPU."""
        return Execution(attention="splash" if self.length >= SPLASH_LENGTH else "plain", remat=remat)


def parse_shape(model: str, *, layers: int | None, rows: int, length: int) -> Shape:
    """Returns roberta-base or ModernBERT-base, with fewer layers if `layers` is given."""
    fewer = {"num_hidden_layers": layers} if layers else {}
    if model == "roberta":
        return Shape(model, sides.roberta(**fewer), rows, length)
    return Shape(
        model, default_config(model).replace(bos_token_id=0, pad_token_id=1, eos_token_id=2, **fewer), rows, length
    )


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
    side: str, machine: Machine, shape: Shape, *, dtype: Any, remat: str = "dots", recipe: str = ""
) -> Cost | None:
    """Returns the cost of a side's step; None if it does not fit the device's memory."""
    devices = memory.topology_devices(machine)
    tokens = np.zeros((shape.rows, shape.length), np.int32)
    kernel_flops = 0.0
    if side == "reference":
        state = jax.eval_shape(lambda: sides.reference_state(shape.config, dtype))
        step, batch = sides.reference_step(shape.config, dtype), sides.reference_batch(tokens)
    else:
        execution = shape.execution(remat) if side == "ours" else Execution(remat=remat)
        step_config = sides.our_step_config(shape.config, dtype, execution, **shape.options | RECIPES.get(recipe, {}))
        state, step = jax.eval_shape(lambda: sides.our_state(step_config)), sides.our_step(step_config)
        batch = tokens[None]
        if execution.attention == "splash":
            queries = step_config.masking.max_predictions_per_seq(shape.length)
            kernel_flops = shape.rows * splash_flops(shape.config, length=shape.length, last_queries=queries)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(devices), *leaf.shape), leaf.dtype), (state, batch))
    with contextlib.ExitStack() as stack:
        if side == "whole_rows":
            for module in (attention, block):
                stack.enter_context(mock.patch.object(module, "uses_blocks", return_value=False))
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
        flops=cost["flops"] + kernel_flops,
        bytes_moved=cost["bytes accessed"],
        cycles=cycles,
        temporaries=memory_use.temp_size_in_bytes,
        peak=memory_use.peak_memory_in_bytes,
        compile_seconds=seconds,
    )


def splash_flops(config: EncoderConfig, *, length: int, last_queries: int) -> float:
    """Returns the operations of jax's splash kernel for a sequence, forward and backward.

    Nine products of queries, keys and head size in each global layer: two in the forward kernel, four in the one for
    the gradients of keys and values, and three in the one for those of queries. The last layer has fewer queries.
    """
    queries = [length] * (config.num_hidden_layers - 1) + [last_queries]
    is_global = [layer.window is None for layer in config.layers]
    return 9 * 2.0 * config.hidden_size * length * sum(np.multiply(queries, is_global))


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


def largest_batch(machine: Machine, shape: Shape, *, dtype: Any) -> int:
    """Returns the largest number of sequences per device whose step compiles."""

    def peak(rows: int) -> int | None:
        cost = compile_step("ours", machine, dataclasses.replace(shape, rows=rows), dtype=dtype)
        print(f"    {rows} sequences: {'do not fit' if cost is None else f'{cost.peak / 1e9:.2f} GB'}", flush=True)
        return None if cost is None else cost.peak

    return memory.largest_batch(peak, limit=machine.memory_bytes, first=shape.rows)


def main() -> None:
    """Prints a table for each machine and dtype, and then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", default="v3-8,v4-8,v5e-8,v6e-8")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--sides", default="ours,reference", help="of ours, and reference or whole_rows")
    parser.add_argument("--model", default="roberta", choices=("roberta", "modernbert"))
    parser.add_argument("--rows", type=int, default=128, help="sequences per device")
    parser.add_argument("--lengths", default="128", help="tokens per sequence")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--remat", default="", help="ours with these values of model.remat: none,dots,full")
    parser.add_argument("--recipes", default="", help="ours with each of: " + ", ".join(RECIPES))
    parser.add_argument("--largest", action="store_true", help="the largest batch that fits")
    options = parser.parse_args()
    remats = list(filter(None, options.remat.split(",")))
    if unknown := set(remats) - set(REMATS):
        parser.error(f"--remat={','.join(sorted(unknown))}: must be of {', '.join(REMATS)}")
    own_sides = {"ours", "reference" if options.model == "roberta" else "whole_rows"}
    if unknown := {*filter(None, options.sides.split(","))} - own_sides:
        parser.error(f"--sides={','.join(sorted(unknown))}: must be of {', '.join(sorted(own_sides))}")
    if unknown := {*filter(None, options.recipes.split(","))} - {*RECIPES}:
        parser.error(f"--recipes={','.join(sorted(unknown))}: must be of {', '.join(RECIPES)}")
    shapes = [
        parse_shape(options.model, layers=options.layers, rows=options.rows, length=int(length))
        for length in options.lengths.split(",")
    ]
    for name, dtype_name, shape in itertools.product(options.topologies.split(","), options.dtypes.split(","), shapes):
        machine = parse_topology(name)
        device = find_device(machine.kind)
        dtype = jnp.dtype(dtype_name)
        compiled = functools.partial(compile_step, machine=machine, shape=shape, dtype=dtype)
        batch = f"{shape.rows} sequence{'s' * (shape.rows > 1)} of {shape.length:,} tokens per device"
        print(f"\n{name}, {dtype_name}: {shape.config.num_hidden_layers} layers, {batch}")
        columns = f"{'TFLOP':>6} {'GB moved':>8} {'bound ms':>9} {'Mcycles':>8} {'temp. GB':>9} {'peak GB':>14}"
        print(f"  {'':28} {columns} {'compile s':>9}")
        costs = {}
        for side in filter(None, options.sides.split(",")):
            costs[side] = compiled(side)
            print_row(side, costs[side], device)
        for remat in remats:
            print_row(f"remat={remat}", compiled("ours", remat=remat), device)
        for recipe in filter(None, options.recipes.split(",")):
            print_row(f"ours with {recipe}", compiled("ours", recipe=recipe), device)
        if options.largest:
            print(f"  largest batch that fits: {largest_batch(machine, shape, dtype=dtype)} sequences per device")
        if len(costs) == 2 and all(costs.values()):
            ours, other = costs.pop("ours"), *costs.values()
            ratios = {
                "operations": other.flops / ours.flops,
                "bytes": other.bytes_moved / ours.bytes_moved,
                "temporaries": other.temporaries / ours.temporaries,
                "bound": other.bound(device) / ours.bound(device),
                "cycles": other.cycles / ours.cycles,
            }
            print(f"  ratio {', '.join(costs)} / ours: " + ", ".join(f"{what} {r:.2f}" for what, r in ratios.items()))


if __name__ == "__main__":
    main()
