"""The largest batch that a device takes, found by compiling the step, not by running out of memory."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import logging

from mlm import parallel, steps
from mlm.errors import UserError

# Batches are multiples of this: rows are laid out by eights on TPUs and GPUs.
MULTIPLE = 8
# Of a device's memory; the rest is for what fragments it.
USABLE = 0.95
# The search gives up past it.
LARGEST = 1 << 16


def largest_batch(bytes_of: Callable[[int], int], *, limit: float) -> int:
    """The largest multiple of MULTIPLE whose `bytes_of` is at most `limit`; 0 if there is none.

    A step's memory grows by much the same for every row: each guess is on the line through the largest batch known to
    fit and the smallest known not to, or the next one up. It calls `bytes_of`, which compiles, some four times.
    """
    known: dict[int, int] = {}

    def fits(batch: int) -> bool:
        if batch not in known:
            known[batch] = bytes_of(batch)
        return known[batch] <= limit

    if not fits(MULTIPLE):
        return 0
    low, high = MULTIPLE, 2 * MULTIPLE
    while fits(high):
        slope = max(1.0, (known[high] - known[low]) / (high - low))
        low = high
        if low >= LARGEST:
            return low
        guess = int(low + (limit - known[low]) / slope)
        high = min(LARGEST, max(low + MULTIPLE, guess // MULTIPLE * MULTIPLE))
    while high - low > MULTIPLE:
        slope = (known[high] - known[low]) / (high - low)
        guess = int(low + (limit - known[low]) / slope) // MULTIPLE * MULTIPLE
        guess = min(max(guess, low + MULTIPLE), high - MULTIPLE)
        if fits(guess):
            low = guess
        else:
            high = guess
    return low


def step_bytes(
    step_config: steps.StepConfig,
    *,
    length: int,
    microbatches: int,
    batch: int,
    topology: Sequence[jax.Device] | None = None,
) -> int:
    """What a training step of `batch` rows a pass and device holds in the memory of a device, by its compiler.

    Of this machine's devices, or of those of a `topology`, which need not be there.
    """
    step = functools.partial(steps.train_step, step_config=step_config, axis_name=parallel.AXIS)
    if topology is None:
        step, devices = parallel.data_parallel(step, donate_argnums=(0,)), jax.local_device_count()
    else:
        step, devices = parallel.over_mesh(step, topology, donate_argnums=(0,)), len(topology)
    state = jax.eval_shape(lambda: steps.init_state(step_config, steps.init_params(step_config, length=length)))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((devices, *leaf.shape), leaf.dtype), state)
    tokens = jax.ShapeDtypeStruct((devices, microbatches, batch, length), jnp.int32)
    memory = step.lower(stacked, tokens).compile().memory_analysis()
    # What is donated is counted as an argument and as an output.
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return used + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def find_batch_size(step_config: steps.StepConfig, *, length: int, microbatches: int) -> int:
    """The largest `per_device_train_batch_size` for this machine's devices.

    Raises:
      UserError: the devices do not tell how much memory they have, or not even the smallest batch fits.
    """
    device = jax.local_devices()[0]
    limit = _memory(device)
    if limit is None:
        raise UserError(
            f"per_device_train_batch_size=0 finds the largest that fits, but a {device.device_kind} device does not "
            "tell its memory; set a number"
        )
    found = largest_batch(
        lambda batch: step_bytes(step_config, length=length, microbatches=microbatches, batch=batch),
        limit=USABLE * limit,
    )
    if found == 0:
        raise UserError(
            f"not even {MULTIPLE} rows of {length} tokens fit into the {limit / 2**30:.1f} GiB of a "
            f"{device.device_kind}; take shorter rows, model.remat='full', or a smaller model"
        )
    logging.info("per_device_train_batch_size is %d: the largest that fits %.1f GiB", found, limit / 2**30)
    return found


def _memory(device: jax.Device) -> int | None:
    """Its bytes, as far as they are this process's to use; None where it does not tell (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")
