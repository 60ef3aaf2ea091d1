"""The step compiled ahead of time: its memory, and the largest batch that fits. Devices are the CPU's, which compile
the same way; libtpu itself is tried by hand."""

import importlib.util

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mlm import parallel, topology
from mlm.errors import UserError
from mlm.hardware import parse_topology
from mlm.modes import check
from tests.tiny import settings_of


@pytest.fixture
def memory(monkeypatch):
    """Sets what a step of so many rows takes."""
    calls = []

    def set_memory(function):
        def step_memory(step_config, devices, *, rows, microbatches, length):
            calls.append(rows)
            return function(rows)

        monkeypatch.setattr(topology, "step_memory", step_memory)
        return calls

    return set_memory


def fit(rows):
    return topology.try_batch(None, (), rows=rows, microbatches=1, length=8, memory_bytes=16_000)


def test_a_batch_that_fits_and_the_largest_one(memory):
    calls = memory(lambda rows: 5_000 + 100 * rows)
    # 15,750 are usable: 107 rows of 100, and 5,000.
    assert fit(32) == topology.MemoryEstimate(rows=32, needed_bytes=8_200, compiled_rows=32, largest_rows=107)
    assert calls == [32, 16]


def test_a_batch_that_does_not_fit(memory):
    calls = memory(lambda rows: 5_000 + 100 * rows if rows <= 200 else None)
    assert fit(512) == topology.MemoryEstimate(rows=512, needed_bytes=11_400, compiled_rows=64, largest_rows=107)
    assert calls == [512, 256, 128, 64, 32]


def test_a_model_that_does_not_fit(memory):
    memory(lambda rows: None)
    assert fit(4) == topology.MemoryEstimate(rows=4, needed_bytes=0, compiled_rows=0, largest_rows=0)
    assert fit(1024).compiled_rows == 0


def test_one_row(memory):
    memory(lambda rows: 10)
    assert fit(1).largest_rows == 1


def test_a_batch_left_to_the_program_is_the_largest(memory):
    memory(lambda rows: 5_000 + 100 * rows if rows <= 200 else None)
    found = topology.largest_batch(None, (), microbatches=1, length=8, memory_bytes=16_000)
    # 15,200 are used: 102 rows, of which eights are taken.
    assert found == 96
    memory(lambda rows: None)
    assert topology.largest_batch(None, (), microbatches=1, length=8, memory_bytes=16_000) == 0


def test_the_memory_of_the_real_step(bag_step_config, bag_state):
    devices = jax.devices()[:1]
    few, many = (
        topology.step_memory(bag_step_config, devices, rows=rows, microbatches=1, length=16) for rows in (2, 64)
    )
    assert few >= sum(leaf.nbytes for leaf in jax.tree.leaves(bag_state))
    # Rows cost activations: a hidden state of 16 floats a token, at the least.
    assert many - few >= 62 * 16 * 16 * 4


def test_nothing_compiled_for_a_topology_is_kept(bag_step_config, tmp_path):
    # jax would warn of each when it is to be loaded: it cannot be where no such device is.
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    try:
        topology.step_memory(bag_step_config, jax.devices()[:1], rows=4, microbatches=1, length=16)
        assert list(tmp_path.iterdir()) == []
        jax.jit(lambda x: x + 0.125)(1.0)
        assert list(tmp_path.iterdir()) != []
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        compilation_cache.reset_cache()


def test_what_the_compiler_says(bag_step_config, monkeypatch):
    class Step:
        def lower(self, *shapes):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    monkeypatch.setattr(parallel, "over_mesh", lambda *args, **options: Step())
    Step.message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.3G of 15.75G hbm."
    assert topology.step_memory(bag_step_config, jax.devices()[:1], rows=2, microbatches=1, length=16) is None
    Step.message = "INTERNAL: no\nsuch luck"
    with pytest.raises(UserError, match=r"does not compile for cpu: INTERNAL: no such luck$"):
        topology.step_memory(bag_step_config, jax.devices()[:1], rows=2, microbatches=1, length=16)


def test_only_tpus_are_compiled_for_and_only_with_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert topology.can_compile(parse_topology("v3-8"))
    assert not topology.can_compile(parse_topology("h100-8"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not topology.can_compile(parse_topology("v3-8"))


@pytest.mark.parametrize(
    ("found", "printed", "problems"),
    [
        (
            topology.MemoryEstimate(8, 2 * 10**9, 8, 40),
            "compiling     the step for TPU v3, minutes at real size; all else is said above\n"
            "compiled      the step takes 2.0 GB of the 17.2 GB of a TPU v3 device; about 40 rows a pass fit\n",
            [],
        ),
        (
            topology.MemoryEstimate(8, 10**9, 4, 6),
            "compiling     the step for TPU v3, minutes at real size; all else is said above\n"
            "compiled      the step does not fit into the 17.2 GB of a TPU v3 device\n",
            [
                "per_device_train_batch_size=8 does not fit into a TPU v3 device; about 6 do, and "
                "gradient_accumulation_steps makes up for it"
            ],
        ),
    ],
)
def test_what_is_told_of_it(found, printed, problems, encoder_step_config, monkeypatch, capsys):
    from configs import default

    monkeypatch.setattr(topology, "can_compile", lambda machine: True)
    monkeypatch.setattr(topology, "devices_of", lambda machine: jax.devices())
    monkeypatch.setattr(topology, "try_batch", lambda *args, **options: found)
    findings = check.Findings()
    run = type("Run", (), {"step_config": encoder_step_config})
    check.show_compiled(settings_of(default.get_config()), run, parse_topology("v3-8"), findings)
    assert capsys.readouterr().out == printed
    assert findings.problems == problems


def test_the_topologies_are_those_of_machines_with_a_peak_rate():
    assert set(topology._ONE_HOST) == {
        parse_topology(f"{kind}-8").kind for kind in ("v2", "v3", "v4", "v5e", "v5p", "v6e")
    }
