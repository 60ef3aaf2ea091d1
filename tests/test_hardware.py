"""The table of accelerators, and the names of machines."""

import pytest

from mlm.errors import UserError
from mlm.hardware import DEVICES, Machine, find_device, parse_topology


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v3", "v3"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_a_device_is_found_by_its_kind(kind, name):
    assert find_device(kind) is DEVICES[name]


def test_a_cpu_is_not_in_the_table():
    assert find_device("cpu") is None


def test_every_tpu_can_be_compiled_for_and_no_gpu():
    for device in DEVICES.values():
        assert (device.topology is not None) == device.kind.startswith("TPU")


@pytest.mark.parametrize(
    ("name", "kind", "devices", "hosts", "gib"),
    [
        ("v2-8", "TPU v2", 8, 1, 8),
        ("v3-8", "TPU v3", 8, 1, 16),
        ("v3-32", "TPU v3", 32, 4, 16),
        ("v4-8", "TPU v4", 4, 1, 32),
        ("v4-16", "TPU v4", 8, 2, 32),
        ("v5e-8", "TPU v5 lite", 8, 1, 16),
        ("v5litepod-16", "TPU v5 lite", 16, 4, 16),
        ("v5p-16", "TPU v5", 8, 2, 95),
        ("V6E-8", "TPU v6 lite", 8, 1, 32),
    ],
)
def test_a_tpu_machine_is_parsed(name, kind, devices, hosts, gib):
    assert parse_topology(name) == Machine(name.lower(), kind, devices, hosts, gib << 30)


def test_a_gpu_machine_is_parsed():
    assert parse_topology("h100-16") == Machine("h100-16", "NVIDIA H100", 16, 2, 80 * 10**9)


@pytest.mark.parametrize("name", ["v3", "v9-8", "8", "v3-x", "v4-7", "v3-12", "v5p-1"])
def test_an_unknown_machine_is_an_error(name):
    with pytest.raises(UserError, match=f"--topology={name}: "):
        parse_topology(name)
