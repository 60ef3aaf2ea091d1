"""Devices and processes: the only file that knows there are several.

A step is a function of one device's share. `data_parallel` runs it on every device of every process under `pmap`.
The state is stacked, one copy per local device along a leading axis: over several processes that is the form in
which `pmap` accepts donated buffers. Checkpoints hold it unstacked, so the number of devices may change.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

# The client of the coordination service; jax has no public name for it.
from jax._src import distributed
from jax.experimental import multihost_utils

# The name of the mapped axis, for `psum` and `axis_index`.
AXIS = "devices"
# Each has a name of its own; all processes come by the same ones in the same order.
_barriers = itertools.count()


def data_parallel(step: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Runs `step` on every device; arguments and results have a leading axis of local devices.

    Several processes compile on their own, and begin the first update together: those on CPUs wait for each other for
    no more than 30 s, and one may find the program in its cache where another has to compile it.
    """
    run = jax.pmap(step, axis_name=AXIS, donate_argnums=donate_argnums)
    if jax.process_count() == 1:
        return run
    compiled = False

    def run_together(*args: Any) -> Any:
        nonlocal compiled
        if not compiled:
            with _every_process_caches():
                run.lower(*args).compile()
            barrier("compiled")
            compiled = True
        return run(*args)

    return run_together


@contextlib.contextmanager
def _every_process_caches() -> Iterator[None]:
    """Inside, jax keeps what it compiles, in a cache that is a directory of this machine, whichever process this is.

    Else process 0 alone keeps it, and at every start all others would compile anew while it waits for them.
    """
    state = distributed.global_state
    own, state.process_id = state.process_id, 0
    try:
        yield
    finally:
        state.process_id = own


def over_mesh(
    step: Callable[..., Any], devices: Sequence[jax.Device], *, donate_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """`data_parallel` for compiling ahead of time, over devices that need not be there, such as those of a topology.

    `over_mesh(step, devices).lower(*shapes).compile()`: arguments have a leading axis of devices there, too.
    """
    sharding = jax.NamedSharding(jax.sharding.Mesh(np.array(devices), (AXIS,)), jax.P(AXIS))

    def one_device(*arguments: Any) -> Any:
        result = step(*jax.tree.map(lambda leaf: leaf[0], arguments))
        return jax.tree.map(lambda leaf: leaf[None], result)

    # Replicas are equal because the step adds gradients up, which shard_map could not tell: hence no check.
    mapped = jax.shard_map(
        one_device, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
    )
    return jax.jit(mapped, in_shardings=sharding, out_shardings=sharding, donate_argnums=donate_argnums)


def _local_sharding() -> jax.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.NamedSharding(mesh, jax.P(AXIS))


def _stack(shards: list[jax.Array]) -> jax.Array:
    """Joins one array [1, ...] per local device to one [devices, ...] without moving data."""
    shape = (len(shards), *shards[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, _local_sharding(), shards)


def replicate(tree: Any) -> Any:
    """Copies host or single-device arrays to every local device, stacked."""
    devices = jax.local_devices()

    def replicate_leaf(leaf: Any) -> jax.Array:
        leaf = np.asarray(jax.device_get(leaf))[None]
        return _stack([jax.device_put(leaf, device) for device in devices])

    return jax.tree.map(replicate_leaf, tree)


def first_replica(tree: Any) -> Any:
    """Fetches the first local device's copy of stacked arrays to the host, unstacked."""
    return jax.tree.map(lambda leaf: leaf[0], jax.device_get(jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)))


def to_global(tree: Any) -> Any:
    """Turns stacked copies into global arrays, unstacked and replicated over all processes, for a checkpoint."""

    def to_global_leaf(leaf: jax.Array) -> jax.Array:
        shards = [shard.data.reshape(leaf.shape[1:]) for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape[1:], _global_sharding(), shards)

    return jax.tree.map(to_global_leaf, tree)


def from_global(tree: Any) -> Any:
    """The inverse of `to_global`."""
    return jax.tree.map(lambda leaf: _stack([shard.data[None] for shard in leaf.addressable_shards]), tree)


def global_like(tree: Any) -> Any:
    """Shapes -> what a checkpoint is to be restored as, for `from_global`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_global_sharding()), tree)


def _global_sharding() -> jax.NamedSharding:
    """Every device of every process holds the whole array."""
    return jax.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), (AXIS,)), jax.P())


def shard(array: np.ndarray, *, shape: tuple[int, ...] = ()) -> jax.Array:
    """Places this process's rows on its devices, in order: [rows, ...] becomes [devices, *shape, rows left, ...].

    Args:
      array: host array; its rows must divide by the local devices and `shape`.
      shape: further axes to split the rows into, such as the passes of an update.
    """
    rows_shape = (jax.local_device_count(), *shape, -1)
    return jax.device_put(array.reshape(rows_shape + array.shape[1:]), _local_sharding())


def broadcast_from_first(array: np.ndarray) -> np.ndarray:
    """Gives every process the array of process 0."""
    if jax.process_count() == 1:
        return array
    # It places host arrays itself, which the loop's guard would refuse.
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.broadcast_one_to_all(array))


def any_process(flag: bool) -> jax.Array:
    """Asks whether the flag is set on any process, without waiting for the answer: `first_replica` of it is the number
    of devices whose process has set it, the same on all. Every process must ask."""
    flags = np.full(jax.local_device_count(), flag, np.int32)
    return _add_up_devices()(shard(flags))


@functools.cache
def _add_up_devices() -> Callable[[jax.Array], jax.Array]:
    return data_parallel(lambda values: jax.lax.psum(values, AXIS))


def on_any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; waits for the others. Every process must ask."""
    return flag if jax.process_count() == 1 else bool(first_replica(any_process(flag)))


def maintenance_is_near(step: int) -> bool:
    """Whether a machine of the run has been told that it is about to be taken away, by other ways than a signal.

    Every process must ask at every step, and is told at the same one.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def barrier(name: str) -> None:
    """Waits until every process has come here, however long that takes: one that is gone is noticed elsewhere."""
    if jax.process_count() > 1:
        # Not by a collective operation of the devices, for which processes on CPUs have no patience.
        client = distributed.global_state.client
        client.wait_at_barrier(f"mlm/{next(_barriers)}/{name}", timeout_in_ms=24 * 3600 * 1000)
