"""Machines by the names that clouds give them: how many devices and hosts, and what a device has.

Figures are those of cloud.google.com/tpu/docs and of NVIDIA's data sheets.
"""

import dataclasses
import re

from mlm.errors import UserError

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Machine:
    """Some devices on some hosts.

    Attributes:
      name: as clouds say it, such as "v3-8".
      kind: of a device, as `jax.Device.device_kind` begins.
      devices: how many jax sees, over all hosts.
      hosts: how many processes there are.
      memory_bytes: of one device; None where nothing is known of it.
    """

    name: str
    kind: str
    devices: int
    hosts: int
    memory_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class _Family:
    kind: str
    memory_bytes: int
    devices_per_host: int
    # Of a machine of more than one host, where that differs.
    devices_per_pod_host: int | None = None
    # What the number in the name counts: a v4 or v5p device is a chip of two cores.
    counted_per_device: int = 1


_FAMILIES = {
    "v2": _Family("TPU v2", 8 * _GIB, 8),
    "v3": _Family("TPU v3", 16 * _GIB, 8),
    "v4": _Family("TPU v4", 32 * _GIB, 4, counted_per_device=2),
    "v5e": _Family("TPU v5 lite", 16 * _GIB, 8, devices_per_pod_host=4),
    "v5litepod": _Family("TPU v5 lite", 16 * _GIB, 8, devices_per_pod_host=4),
    "v5p": _Family("TPU v5", 95 * _GIB, 4, counted_per_device=2),
    "v6e": _Family("TPU v6 lite", 32 * _GIB, 8, devices_per_pod_host=4),
    "a100": _Family("NVIDIA A100", 80 * 10**9, 8),
    "h100": _Family("NVIDIA H100", 80 * 10**9, 8),
    "h200": _Family("NVIDIA H200", 141 * 10**9, 8),
    "b200": _Family("NVIDIA B200", 180 * 10**9, 8),
}


def parse_topology(name: str) -> Machine:
    """ "v3-8" -> eight devices of one host.

    Raises:
      UserError: no machine has such a name.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name.lower())
    family = _FAMILIES.get(match[1]) if match else None
    if family is None:
        known = ", ".join(_FAMILIES)
        raise UserError(f"--topology={name}: write a kind and a number, such as v3-8; the kinds are {known}")
    counted = int(match[2])
    devices, rest = divmod(counted, family.counted_per_device)
    if devices < 1 or rest:
        counts = "devices" if family.counted_per_device == 1 else f"cores, {family.counted_per_device} a device"
        raise UserError(
            f"--topology={name}: the number must be a multiple of {family.counted_per_device} and not 0; that of "
            f"{match[1]} counts {counts}"
        )
    per_host = family.devices_per_host
    if devices > per_host and family.devices_per_pod_host:
        per_host = family.devices_per_pod_host
    if devices > per_host and devices % per_host:
        raise UserError(f"--topology={name}: {devices} devices do not make whole hosts of {per_host}; take a multiple")
    return Machine(name.lower(), family.kind, devices, -(-devices // per_host), family.memory_bytes)
