"""Accelerators: what one device has, and the devices and hosts of a machine such as "v3-8"."""

import dataclasses
import re

from mlm.errors import UserError

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device as jax counts them: a core of a TPU v2 or v3 chip, a chip of a later TPU, or a GPU.

    Attributes:
      kind: name that `jax.Device.device_kind` contains.
      memory_bytes: memory of the device.
      peak_flops: peak bfloat16 FLOP/s, without sparsity.
      bandwidth: peak memory bandwidth, bytes/s.
      devices_per_host: devices of a single-host machine.
      devices_per_pod_host: devices per host of a multi-host machine, where that differs.
      units_per_device: units per device in a machine's name: names of v4 and v5p machines count cores.
      topology: libtpu's name for (part of) one host, to compile for it without a TPU; None for GPUs.
    """

    kind: str
    memory_bytes: int
    peak_flops: float
    bandwidth: float
    devices_per_host: int
    devices_per_pod_host: int | None = None
    units_per_device: int = 1
    topology: str | None = None


# By the first part of a machine's name. Sources:
#   TPU v3 to v6e: docs.cloud.google.com/tpu/docs/v3, /v4, /v5e, /v5p and /v6e, per chip; half of it per v3 core.
#   TPU v2: 180 TFLOP/s per four chips (Google's announcement); 700 GB/s per chip (Jouppi et al. 2020, "A
#   Domain-Specific Supercomputer for Training Deep Neural Networks"); half of it per core.
#   GPUs: NVIDIA's data sheets of the SXM versions (the A100 with 80 GB), dense FLOP/s.
DEVICES = {
    "v2": Device(
        kind="TPU v2",
        memory_bytes=8 * _GIB,
        peak_flops=22.5e12,
        bandwidth=350e9,
        devices_per_host=8,
        topology="v2:2x2",
    ),
    "v3": Device(
        kind="TPU v3",
        memory_bytes=16 * _GIB,
        peak_flops=61.5e12,
        bandwidth=450e9,
        devices_per_host=8,
        topology="v3:2x2",
    ),
    "v4": Device(
        kind="TPU v4",
        memory_bytes=32 * _GIB,
        peak_flops=275e12,
        bandwidth=1200e9,
        devices_per_host=4,
        units_per_device=2,
        topology="v4:2x2x1",
    ),
    "v5e": Device(
        kind="TPU v5 lite",
        memory_bytes=16 * _GIB,
        peak_flops=197e12,
        bandwidth=819e9,
        devices_per_host=8,
        devices_per_pod_host=4,
        topology="v5e:2x2",
    ),
    "v5p": Device(
        kind="TPU v5",
        memory_bytes=95 * _GIB,
        peak_flops=459e12,
        bandwidth=2765e9,
        devices_per_host=4,
        units_per_device=2,
        topology="v5p:2x2x1",
    ),
    "v6e": Device(
        kind="TPU v6 lite",
        memory_bytes=32 * _GIB,
        peak_flops=918e12,
        bandwidth=1640e9,
        devices_per_host=8,
        devices_per_pod_host=4,
        topology="v6e:2x2",
    ),
    "a100": Device(
        kind="NVIDIA A100", memory_bytes=80 * 10**9, peak_flops=312e12, bandwidth=2039e9, devices_per_host=8
    ),
    "h100": Device(
        kind="NVIDIA H100", memory_bytes=80 * 10**9, peak_flops=989e12, bandwidth=3350e9, devices_per_host=8
    ),
    "h200": Device(
        kind="NVIDIA H200", memory_bytes=141 * 10**9, peak_flops=989e12, bandwidth=4800e9, devices_per_host=8
    ),
    "b200": Device(
        kind="NVIDIA B200", memory_bytes=180 * 10**9, peak_flops=2250e12, bandwidth=8000e9, devices_per_host=8
    ),
}
# Another name of the same machines.
DEVICES["v5litepod"] = DEVICES["v5e"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices on one or more hosts.

    Attributes:
      name: machine type, such as "v3-8".
      kind: kind of a device, as `jax.Device.device_kind`.
      devices: devices over all hosts.
      hosts: hosts, with one process each.
      memory_bytes: memory of one device; None if it is unknown.
    """

    name: str
    kind: str
    devices: int
    hosts: int
    memory_bytes: int | None = None


def find_device(kind: str) -> Device | None:
    """Returns the table's row for a `jax.Device.device_kind`; None for kinds that are not in it, such as CPUs."""
    # The longest name counts: "TPU v5 lite" contains "TPU v5".
    matches = [device for device in DEVICES.values() if device.kind in kind]
    return max(matches, key=lambda device: len(device.kind), default=None)


def parse_topology(name: str) -> Machine:
    """Returns the machine of a name: "v3-8" is eight devices of one host.

    Raises:
      UserError: there is no such machine.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name.lower())
    if match is None or match[1] not in DEVICES:
        raise UserError(
            f"--topology={name}: unknown machine; use a kind and a number, such as v3-8. The kinds are "
            f"{', '.join(DEVICES)}"
        )
    device = DEVICES[match[1]]
    devices, rest = divmod(int(match[2]), device.units_per_device)
    if devices < 1 or rest:
        unit = "devices" if device.units_per_device == 1 else f"cores, {device.units_per_device} per device"
        raise UserError(
            f"--topology={name}: the number counts {unit}; set a positive multiple of {device.units_per_device}"
        )
    per_host = device.devices_per_host
    if devices > per_host and device.devices_per_pod_host:
        per_host = device.devices_per_pod_host
    if devices > per_host and devices % per_host:
        raise UserError(
            f"--topology={name}: {devices} devices do not fill hosts of {per_host}; set a multiple of {per_host} "
            "devices"
        )
    return Machine(name.lower(), device.kind, devices, -(-devices // per_host), device.memory_bytes)
