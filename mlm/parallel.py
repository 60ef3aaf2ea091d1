"""Devices and processes: the only file that handles them.

A step is a function of one device's part of a batch. `data_parallel` runs it under `pmap` on every device of every
process. State is stacked: each array has a leading axis with one copy per local device, the only form in which `pmap`
accepts donated buffers over several processes. Checkpoints hold unstacked arrays, so the number of devices may change.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Name of the mapped axis, for `psum` and `axis_index`.
AXIS = "devices"
# Numbers the barriers, so that every one has its own name; all processes reach them in the same order.
_barrier_numbers = itertools.count()


class DataParallel:
    """Runs `step` on every device; arguments and results have a leading axis of local devices. The first call compiles.

    Several processes wait for each other after compiling: one may compile much longer than another, which found the
    program in its cache, and processes on CPUs wait at most 30 s for each other within a step.
    """

    def __init__(self, step: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()):
        self._run: Any = jax.pmap(step, axis_name=AXIS, donate_argnums=donate_argnums)
        self._is_compiled = jax.process_count() == 1  # Then `pmap` compiles.
        self._compilation: threading.Thread | None = None

    def __call__(self, *args: Any) -> Any:
        """Returns the results of the step."""
        if self._compilation is not None:
            self._compilation.join()
            self._compilation = None
        if not self._is_compiled:
            with _every_process_writes_the_cache():
                self._run.lower(*args).compile()
            barrier("compiled")
            self._is_compiled = True
        return self._run(*args)

    def compiled(self, *args: Any) -> jax.stages.Compiled:
        """Returns the compiled step, for its memory. After the first call with such arguments this compiles nothing."""
        return self._run.lower(*args).compile()

    def compile_in_background(self, *args: Any) -> None:
        """Starts a thread that compiles the step, which the first call with such arguments then uses.

        The step is traced here: Python code in a thread would delay the steps that run meanwhile. An error of the
        compiler is raised by the first call, which compiles again.
        """
        lowered = self._run.lower(*args)

        def compile_lowered() -> None:
            with contextlib.suppress(Exception), _every_process_writes_the_cache():
                lowered.compile()

        # Not a daemon: if the program ends while such a thread is in XLA, Python 3.11 aborts.
        self._compilation = threading.Thread(target=compile_lowered, name="mlm-compile")
        self._compilation.start()


def data_parallel(step: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()) -> DataParallel:
    """Returns `DataParallel` of a step."""
    return DataParallel(step, donate_argnums=donate_argnums)


def over_mesh(
    step: Callable[..., Any], devices: Sequence[jax.Device], *, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Wrapped:
    """`data_parallel` for ahead-of-time compilation: the devices may be those of another machine's topology.

    Usage: `over_mesh(step, devices).lower(*shapes).compile()`, where shapes have a leading axis of devices.
    """
    sharding = jax.NamedSharding(jax.sharding.Mesh(np.array(devices), (AXIS,)), jax.P(AXIS))

    def one_device(*args: Any) -> Any:
        result = step(*jax.tree.map(lambda leaf: leaf[0], args))
        return jax.tree.map(lambda leaf: leaf[None], result)

    # Without check_vma, because shard_map cannot prove that replicas stay equal.
    mapped = jax.shard_map(
        one_device, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
    )
    return jax.jit(mapped, in_shardings=sharding, out_shardings=sharding, donate_argnums=donate_argnums)


def shard(array: np.ndarray, *, shape: tuple[int, ...] = ()) -> jax.Array:
    """Splits this process's rows over its devices, in order: [rows, ...] -> [devices, *shape, rows per device, ...].

    Args:
      array: host array; its number of rows must be divisible by the local devices and by `shape`.
      shape: further axes to split the rows into, such as the microbatches of a step.
    """
    rows_shape = (jax.local_device_count(), *shape, -1)
    return jax.device_put(array.reshape(rows_shape + array.shape[1:]), _local_sharding())


def replicate(tree: Any) -> Any:
    """Copies host or single-device arrays to every local device, stacked."""
    devices = jax.local_devices()

    def replicate_leaf(leaf: Any) -> jax.Array:
        leaf = np.asarray(jax.device_get(leaf))[None]
        return _stack([jax.device_put(leaf, device) for device in devices])

    return jax.tree.map(replicate_leaf, tree)


def copy_to_devices(tree: Any) -> Any:
    """Copies host arrays to every local device, unstacked, for functions under `jax.jit`."""
    return jax.device_put(tree, jax.NamedSharding(_local_sharding().mesh, jax.P()))


def split_rows(tree: Any) -> Any:
    """Splits the rows of host arrays over the local devices, unstacked, for functions under `jax.jit`."""
    return jax.device_put(tree, _local_sharding())


def first_replica(tree: Any) -> Any:
    """Fetches the copy of stacked arrays on the first local device to the host, unstacked."""
    return jax.tree.map(lambda leaf: leaf[0], jax.device_get(jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)))


def to_global(tree: Any) -> Any:
    """Stacked arrays -> global arrays for a checkpoint: unstacked, on the first device of each process."""

    copies = _unstack(jax.tree.map(lambda leaf: leaf.addressable_data(0), tree))
    sharding = _first_devices_sharding()
    return jax.tree.map(lambda copy: jax.make_array_from_single_device_arrays(copy.shape, sharding, [copy]), copies)


def from_global(tree: Any) -> Any:
    """Inverse of `to_global`."""
    return replicate(jax.tree.map(lambda leaf: leaf.addressable_data(0), tree))


def global_like(tree: Any) -> Any:
    """Unstacked shapes -> the shapes and shardings to restore a checkpoint with, for `from_global`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_first_devices_sharding()), tree
    )


def broadcast_from_first(array: np.ndarray) -> np.ndarray:
    """Returns the array of process 0 on every process."""
    if jax.process_count() == 1:
        return array
    # Host arrays are copied to devices implicitly, which the loop's transfer guard would reject.
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.broadcast_one_to_all(array))


def any_process(flag: bool) -> bool:
    """True on all processes if `flag` is set on any. Waits for the others: every process must call it."""
    return flag if jax.process_count() == 1 else bool(first_replica(any_process_async(flag)))


def any_process_async(flag: bool) -> jax.Array:
    """`any_process` without waiting: `first_replica` of the result is not 0 if the flag is set on any process."""
    flags = np.full(jax.local_device_count(), flag, np.int32)
    return _sum_over_devices()(shard(flags))


def preemption_noticed(step: int) -> bool:
    """True if jax's preemption service has received a notice: by default a SIGTERM before `Interrupt` was entered.

    For several processes. Every one must call it at every step; it becomes True at the same step on all.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def barrier(name: str, *, timeout_minutes: float = 24 * 60) -> None:
    """Waits until every process has reached this point. A lost process is detected elsewhere.

    Raises:
      TimeoutError: a process has not reached it in time.
    """
    if jax.process_count() > 1:
        # multihost_utils.sync_global_devices is a device collective, which times out after 30 s on CPUs.
        client = distributed_state().client
        try:
            client.wait_at_barrier(
                f"mlm/{next(_barrier_numbers)}/{name}", timeout_in_ms=int(timeout_minutes * 60 * 1000)
            )
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(f"a process did not reach {name!r} within {timeout_minutes:g} minutes") from None


def distributed_state() -> Any:
    """Returns jax's private state of a run of several processes: `client` and `process_id`.

    This is the only private jax API in use. There is no public access to the client of the coordination service, whose
    barriers and key-value store need no device, and no public option to let every process write the compilation cache.
    `tests/test_devices.py` names the versions of jax that this was tried with.
    """
    from jax._src import distributed

    return distributed.global_state


@contextlib.contextmanager
def _every_process_writes_the_cache() -> Iterator[None]:
    """Lets every process write to the compilation cache, which is on its machine.

    By default only process 0 writes it, so every start would wait for the others to compile again.
    """
    state = distributed_state()
    state.process_id = 0
    try:
        yield
    finally:
        # Not what it was before: two threads may compile at the same time.
        state.process_id = jax.process_index()


@functools.cache
def _sum_over_devices() -> Callable[[jax.Array], jax.Array]:
    return data_parallel(lambda values: jax.lax.psum(values, AXIS))


def _local_sharding() -> jax.NamedSharding:
    """The leading axis is split over this process's devices."""
    return jax.NamedSharding(jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,)), jax.P(AXIS))


@functools.cache
def _first_devices_sharding() -> jax.NamedSharding:
    """The first device of each process holds the complete array."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    return jax.NamedSharding(jax.sharding.Mesh(np.array([first[i] for i in sorted(first)]), (AXIS,)), jax.P())


@jax.jit
def _unstack(tree: Any) -> Any:
    """Drops the leading axis, of one device."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _stack(shards: list[jax.Array]) -> jax.Array:
    """Joins arrays [1, ...], one per local device, to one array [devices, ...] without copying."""
    shape = (len(shards), *shards[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, _local_sharding(), shards)
