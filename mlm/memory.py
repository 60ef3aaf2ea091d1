"""Memory of a training step, as the compiler reports it, and the largest batch that fits a device.

Nothing runs, so the devices can be those of another machine: libtpu, which is on every TPU VM and comes with
`pip install libtpu` elsewhere, compiles for TPUs without a TPU.

`keep_freed_memory` is about the memory of this process.
"""

import bisect
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from mlm import hardware, parallel, steps
from mlm.errors import UserError, one_line

# Batch sizes that a search tries: TPUs and GPUs lay rows out in groups of eight, so only long sequences need fewer.
BATCH_SIZES = (1, 2, 4, *range(8, (1 << 16) + 1, 8))
# Where a search starts.
FIRST_BATCH = 8
# Limit of a guess, as a multiple of the largest batch that is known.
_MAX_GROWTH = 64
# Fraction of the available memory that a chosen batch may use; the rest is for fragmentation.
USABLE = 0.95
# Fraction of a TPU's memory that libtpu leaves to programs: 15.75 of 16 GiB.
AVAILABLE = 15.75 / 16

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """The memory that a batch needs, and the largest batch that fits.

    Attributes:
      needed_bytes: memory of the step; None if it does not fit.
      largest_batch: largest batch that fits; 0 if none does.
    """

    needed_bytes: int | None
    largest_batch: int


def find_batch_size(
    step_config: steps.StepConfig, *, length: int, microbatches: int, machine: hardware.Machine | None = None
) -> int:
    """Returns the largest `per_device_train_batch_size` for the devices of `machine`, by default of this machine.

    Raises:
      UserError: the memory of the devices is unknown, or not even one sequence fits.
    """
    devices: Sequence[jax.Device]
    available: float | None
    if machine is None:
        devices = jax.local_devices()
        available = _local_memory_bytes(devices[0])
    else:
        devices = topology_devices(machine)
        available = AVAILABLE * _table_row(machine).memory_bytes
    kind = machine.kind if machine else devices[0].device_kind
    if available is None:
        raise UserError(
            f"per_device_train_batch_size=0: the memory of a {kind} device is unknown, so the largest batch that fits "
            "cannot be found; set a number"
        )

    def search(step_config: steps.StepConfig) -> int:
        batch_bytes = functools.partial(step_bytes, step_config, devices, length=length, microbatches=microbatches)
        return largest_batch(batch_bytes, limit=USABLE * available)

    found = search(step_config)
    if found == 0:
        advice = "lower data.max_seq_length or choose a smaller model"
        if step_config.model.execution.remat != "full" and (with_full := search(with_remat(step_config, "full"))):
            advice = f"set model.remat='full', with which {with_full} fit"
        raise UserError(
            f"per_device_train_batch_size=0: not even one sequence of {length} tokens fits the "
            f"{available / 2**30:.1f} GiB of a {kind} device; {advice}"
        )
    logging.info("per_device_train_batch_size=%d: the largest that fits %.1f GiB", found, available / 2**30)
    return found


def estimate_memory(
    step_config: steps.StepConfig, machine: hardware.Machine, *, length: int, microbatches: int, batch: int
) -> MemoryEstimate:
    """Compiles the step for a machine: does `batch` fit, and which is the largest batch that does?"""
    available = AVAILABLE * _table_row(machine).memory_bytes
    batch_bytes = functools.cache(
        functools.partial(step_bytes, step_config, topology_devices(machine), length=length, microbatches=microbatches)
    )
    needed = batch_bytes(batch)
    return MemoryEstimate(
        needed_bytes=needed if needed is not None and needed <= available else None,
        largest_batch=largest_batch(batch_bytes, limit=available, first=batch),
    )


def largest_batch(batch_bytes: Callable[[int], float | None], *, limit: float, first: int = FIRST_BATCH) -> int:
    """Returns the largest batch size that fits, out of BATCH_SIZES and `first`; 0 if none does.

    A step's memory grows by nearly the same number of bytes per sequence, so each guess is on the line through the two
    largest batches that are known. About four steps are compiled.

    Args:
      batch_bytes: memory of a step by its batch size, in bytes; None if the compiler reports that it does not fit.
      limit: bytes that are available.
      first: batch size to start with.
    """
    sizes = sorted({*BATCH_SIZES, first})
    known: list[tuple[int, float]] = []  # (batch size, bytes), sorted
    low, high = -1, len(sizes)  # indices of the largest size that fits and of the smallest that does not
    guess = sizes.index(first)
    while high - low > 1:
        size, needed = sizes[guess], batch_bytes(sizes[guess])
        if needed is not None:
            bisect.insort(known, (size, needed))
        if needed is not None and needed <= limit:
            low = guess
        else:
            high = guess
        if len(known) < 2:
            guess = bisect.bisect_left(sizes, 2 * sizes[low]) if low >= 0 else high // 2
        else:
            (x, x_bytes), (y, y_bytes) = known[-2:]
            slope = max((y_bytes - x_bytes) / (y - x), 1e-9)
            # Small batches are padded, so a line through two of them says little about much larger ones.
            guess = bisect.bisect_right(sizes, min(x + (limit - x_bytes) / slope, _MAX_GROWTH * y)) - 1
        guess = max(guess, low + 1)
        if guess >= high:  # The line is wrong.
            guess = (low + high) // 2
    return sizes[low] if low >= 0 else 0


def with_remat(step_config: steps.StepConfig, remat: str) -> steps.StepConfig:
    """Returns the same step with another `Execution.remat`."""
    model = step_config.model
    execution = dataclasses.replace(model.execution, remat=remat)
    return dataclasses.replace(step_config, model=model.clone(execution=execution))


def step_bytes(
    step_config: steps.StepConfig, devices: Sequence[jax.Device], batch: int, *, length: int, microbatches: int
) -> int | None:
    """Returns the bytes that a training step holds in one device's memory; None if the compiler says that it is full.

    Args:
      step_config: model, masking and optimizer.
      devices: devices to compile for.
      batch: sequences per microbatch and device.
      length: tokens per sequence.
      microbatches: microbatches per step.

    Raises:
      UserError: the step does not compile for another reason.
    """
    step = parallel.over_mesh(
        functools.partial(steps.train_step, step_config=step_config, axis_name=parallel.AXIS),
        devices,
        donate_argnums=(0,),
    )
    state = jax.eval_shape(lambda: steps.init_state(step_config, steps.init_params(step_config, length=length)))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(devices), *leaf.shape), leaf.dtype), state)
    tokens = jax.ShapeDtypeStruct((len(devices), microbatches, batch, length), jnp.int32)
    try:
        with _without_compilation_cache():
            return compiled_bytes(step.lower(stacked, tokens).compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise UserError(f"the step does not compile for {devices[0].device_kind}: {one_line(error)}") from None


def compiled_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns what a compiled step holds in one device's memory; None if the backend does not report it."""
    memory: Any = compiled.memory_analysis()
    if memory is None:
        return None
    # Donated buffers are counted twice, as arguments and as outputs.
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return used + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def can_compile_for(machine: hardware.Machine) -> bool:
    """True if the machine has TPUs and libtpu is installed."""
    device = hardware.find_device(machine.kind)
    return device is not None and device.topology is not None and importlib.util.find_spec("libtpu") is not None


def topology_devices(machine: hardware.Machine) -> Sequence[jax.Device]:
    """Devices of one host of a TPU machine, to compile for. More hosts do not change the memory of a device."""
    # libtpu must not touch a TPU of this machine, which may be in use, nor ask the metadata server about it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", machine.name)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # Without it, libtpu makes two devices of the two cores of a v4 chip.
    options = {"chip_config_name": "megacore"} if machine.kind == "TPU v4" else {}
    return topologies.get_topology_desc(_table_row(machine).topology or "", platform="tpu", **options).devices


def _table_row(machine: hardware.Machine) -> hardware.Device:
    device = hardware.find_device(machine.kind)
    assert device is not None, machine.kind
    return device


def _local_memory_bytes(device: jax.Device) -> int | None:
    """Memory that this process may use; None for devices that do not report it, such as CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Keeps programs out of jax's compilation cache: jax warns about those for devices that this machine lacks."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    # jax checks once per process whether the cache is enabled, until a reset.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def keep_freed_memory() -> None:
    """Makes glibc keep large blocks that are freed, instead of returning them to the system; without glibc, nothing.

    On CPUs XLA allocates and frees the temporaries in every step. The system clears each page before its next use,
    which takes a tenth of the quickstart's CPU time.
    """
    with contextlib.suppress(AttributeError):  # Another C library.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
