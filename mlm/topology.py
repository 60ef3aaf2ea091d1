"""The real training step, compiled for TPUs that need not be here: what memory it takes of a device.

libtpu, which is on every TPU VM and comes with `pip install libtpu` elsewhere, compiles without a TPU.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from mlm import memory, steps
from mlm.errors import UserError
from mlm.hardware import Machine

# Chips of one host. What a device holds does not depend on how many hosts there are: each has all parameters.
_ONE_HOST = {
    "TPU v2": "v2:2x2",
    "TPU v3": "v3:2x2",
    "TPU v4": "v4:2x2x1",
    "TPU v5 lite": "v5e:2x2",
    "TPU v5": "v5p:2x2x1",
    "TPU v6 lite": "v6e:2x2",
}
# The compiler keeps a little of a device's memory to itself: 15.75 of 16 GiB.
_USABLE = 15.75 / 16
# Batches tried, each half of the one before, until one fits.
_TRIES = 6


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """How a step fits into a device's memory.

    Attributes:
      rows: of one pass on one device that were asked for.
      needed_bytes: by the step of so many rows; by the largest one that was compiled, where that did not fit.
      compiled_rows: the rows of that one; 0 where none fits.
      largest_rows: the most that fit, on the straight line through two compiled steps.
    """

    rows: int
    needed_bytes: int
    compiled_rows: int
    largest_rows: int


def can_compile(machine: Machine) -> bool:
    """Whether libtpu is here and knows such devices."""
    return machine.kind in _ONE_HOST and importlib.util.find_spec("libtpu") is not None


def devices_of(machine: Machine) -> Sequence[jax.Device]:
    """One host's devices, to compile for."""
    # No TPU is touched: one that is here may be at work, and elsewhere there is no server to ask about it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", machine.name)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # Without it libtpu takes the two cores of a v4 chip for two devices.
    options = {"chip_config_name": "megacore"} if machine.kind == "TPU v4" else {}
    return topologies.get_topology_desc(_ONE_HOST[machine.kind], platform="tpu", **options).devices


def try_batch(
    step_config: steps.StepConfig,
    devices: Sequence[jax.Device],
    *,
    rows: int,
    microbatches: int,
    length: int,
    memory_bytes: int,
) -> MemoryEstimate:
    """Compiles the step with `rows` rows a pass, or half, a quarter... as many, until it fits, and with half of that.

    Args:
      task: of the step.
      devices: to compile for.
      rows: of one pass on one device.
      passes: of one update.
      length: tokens of a row.
      memory_bytes: what a device has.
    """
    bytes_needed = functools.partial(step_memory, step_config, devices, microbatches=microbatches, length=length)
    usable = int(memory_bytes * _USABLE)
    tried = rows
    for _ in range(_TRIES):
        needed = bytes_needed(rows=tried)
        if needed is not None and needed <= usable:
            break
        if tried == 1:
            return MemoryEstimate(rows, 0, 0, 0)
        tried //= 2
    else:
        return MemoryEstimate(rows, 0, 0, 0)
    half = max(1, tried // 2)
    if half == tried:
        return MemoryEstimate(rows, needed, tried, tried)
    a_row = (needed - bytes_needed(rows=half)) / (tried - half)
    # Where a row costs nothing the compiler has room to spare: twice is as far as two points can tell.
    more = int((usable - needed) / a_row) if a_row > 0 else tried
    return MemoryEstimate(rows, needed, tried, tried + more)


def largest_batch(
    step_config: steps.StepConfig, devices: Sequence[jax.Device], *, microbatches: int, length: int, memory_bytes: int
) -> int:
    """The most rows a pass that fit, as a run with per_device_train_batch_size=0 finds it; 0 if none do."""

    def bytes_of(rows: int) -> float:
        needed = step_memory(step_config, devices, rows=rows, microbatches=microbatches, length=length)
        return math.inf if needed is None else needed

    return memory.largest_batch(bytes_of, limit=memory.USABLE * memory_bytes)


def step_memory(
    step_config: steps.StepConfig, devices: Sequence[jax.Device], *, rows: int, microbatches: int, length: int
) -> int | None:
    """Bytes of one device that the step takes, arguments included; None where the compiler says that they do not fit.

    Raises:
      UserError: the compiler fails otherwise.
    """
    try:
        with _no_cache():
            return memory.step_bytes(
                step_config, length=length, microbatches=microbatches, batch=rows, topology=devices
            )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(f"the step does not compile for {devices[0].device_kind}: {reason}") from None


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Inside, jax keeps nothing that it compiles: what is for a topology cannot be loaded where no such device is, and
    it warns of that."""
    before = jax.config.jax_enable_compilation_cache
    # Whether there is a cache is asked once a process; a reset has it asked again.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
