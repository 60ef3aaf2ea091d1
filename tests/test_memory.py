"""The memory of a compiled step and the largest batch that fits. The devices are the CPU's, which compile the same way;
libtpu itself is tried by hand."""

import functools
import importlib.util
import subprocess
import sys

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache

from configs import default
from mlm import memory, parallel
from mlm.errors import UserError
from mlm.hardware import parse_topology
from mlm.memory import BATCH_SIZES, MemoryEstimate, largest_batch
from mlm.modes import check
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests.tiny import settings_of, tiny_settings, write_corpus


@given(
    row_bytes=st.floats(1.0, 20_000.0),
    fixed=st.integers(0, 10_000),
    padding=st.integers(0, 300),
    limit=st.integers(7_000, 123_456_789),
    first=st.sampled_from([1, 8, 20, 512]),
    is_reported=st.booleans(),
)
def test_the_largest_batch_is_found_in_few_compilations(row_bytes, fixed, padding, limit, first, is_reported):
    compiled = []

    def exact_bytes(batch):
        # Padding to tiles grows in steps.
        return fixed + row_bytes * batch + padding * (batch // 64)

    def batch_bytes(batch):
        compiled.append(batch)
        needed = exact_bytes(batch)
        # Some compilers report what does not fit, some only that it does not.
        return needed if needed <= limit or is_reported else None

    found = largest_batch(batch_bytes, limit=limit, first=first)
    assert len(set(compiled)) == len(compiled) <= 13
    sizes = sorted({*BATCH_SIZES, first})
    assert found == max((size for size in sizes if exact_bytes(size) <= limit), default=0)


def test_small_batches_that_are_padded_do_not_lead_the_search_far_off():
    """Batches up to 8 take the same memory, so a line through 1 and 2 has no slope."""
    compiled = []

    def batch_bytes(batch):
        compiled.append(batch)
        needed = 1_000 * max(batch, 8)
        return needed if needed <= 100_000 else None

    assert largest_batch(batch_bytes, limit=100_000, first=1) == 96
    assert len(compiled) <= 10
    assert max(compiled) <= 128


@pytest.mark.slow
def test_the_memory_of_a_step_grows_with_the_batch(bag_step_config, bag_state):
    few, many = (
        memory.step_bytes(bag_step_config, jax.devices()[:1], batch, length=16, microbatches=1) for batch in (2, 64)
    )
    assert few >= sum(leaf.nbytes for leaf in jax.tree.leaves(bag_state))
    # At least one hidden state of 16 floats per token.
    assert many - few >= 62 * 16 * 16 * 4


@pytest.mark.slow
def test_the_memory_of_a_step_is_nearly_linear_in_the_batch(encoder_step_config):
    step_bytes = functools.partial(memory.step_bytes, encoder_step_config, length=16, microbatches=1)
    few, many = (step_bytes(jax.local_devices(), batch) for batch in (8, 64))
    assert few < many < 8 * few


@pytest.mark.slow
def test_programs_for_other_devices_are_not_cached(bag_step_config, tmp_path):
    # jax would warn about each: it cannot be loaded where no such device is.
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    try:
        memory.step_bytes(bag_step_config, jax.devices()[:1], 4, length=16, microbatches=1)
        assert list(tmp_path.iterdir()) == []
        jax.jit(lambda x: x + 0.125)(1.0)
        assert list(tmp_path.iterdir()) != []
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        compilation_cache.reset_cache()


def test_a_compiler_out_of_memory_is_no_error_and_other_failures_are(bag_step_config, monkeypatch):
    class Step:
        def lower(self, *shapes):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    monkeypatch.setattr(parallel, "over_mesh", lambda *args, **options: Step())
    step_bytes = functools.partial(memory.step_bytes, bag_step_config, jax.devices()[:1], 2, length=16, microbatches=1)
    Step.message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.3G of 15.75G hbm."
    assert step_bytes() is None
    Step.message = "INTERNAL: no\nsuch luck"
    with pytest.raises(UserError, match=r"does not compile for cpu: INTERNAL: no such luck$"):
        step_bytes()


@pytest.fixture
def v3(monkeypatch):
    """A v3-8 whose step needs 2 GB, and 100 MB per row; of its 17.2 GB, 16.9 GB are available."""

    def step_bytes(step_config, devices, batch, *, length, microbatches):
        needed = 2 * 10**9 + batch * 10**8
        return needed if needed < 17 * 10**9 else None

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(memory, "topology_devices", lambda machine: jax.devices()[:1])
    monkeypatch.setattr(memory, "step_bytes", step_bytes)
    return parse_topology("v3-8")


@pytest.mark.parametrize(
    ("batch", "needed_bytes", "largest"), [(128, 14_800_000_000, 144), (148, 16_800_000_000, 148), (256, None, 144)]
)
def test_the_estimate_for_a_batch(v3, batch, needed_bytes, largest):
    estimate = memory.estimate_memory(None, v3, length=8, microbatches=1, batch=batch)
    assert estimate == MemoryEstimate(needed_bytes=needed_bytes, largest_batch=largest)


def test_a_chosen_batch_leaves_memory_for_fragmentation(v3):
    # 95 % of 16.9 GB are 16.06 GB, so 136 rows and not 144.
    assert memory.find_batch_size(None, length=8, microbatches=1, machine=v3) == 136


def test_a_model_that_never_fits_is_an_error(v3, encoder_step_config, monkeypatch):
    monkeypatch.setattr(memory, "step_bytes", lambda *args, **options: None)
    assert memory.estimate_memory(encoder_step_config, v3, length=8, microbatches=1, batch=64).largest_batch == 0
    with pytest.raises(UserError, match=r"not even one sequence of 8 tokens fits the 15.8 GiB of a TPU v3 device"):
        memory.find_batch_size(encoder_step_config, length=8, microbatches=1, machine=v3)


def test_compiling_ahead_of_time_needs_a_tpu_machine_and_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert memory.can_compile_for(parse_topology("v3-8"))
    assert not memory.can_compile_for(parse_topology("h100-8"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not memory.can_compile_for(parse_topology("v3-8"))


FITS = "compiled      the step takes 2.0 GB of the 17.2 GB of a TPU v3 device; up to 40 sequences per microbatch fit\n"
DOES_NOT_FIT = "compiled      the step does not fit the 17.2 GB of a TPU v3 device\n"
FULL_REMAT = "compiling     the step with model.remat='full', which needs less memory and more time\n"
SOME_FIT = "compiled      up to {} sequences per microbatch fit\n"


@pytest.mark.parametrize(
    ("batch", "estimates", "printed", "advice"),
    [
        (64, {"dots": MemoryEstimate(2 * 10**9, 40)}, FITS, None),
        (64, {"dots": MemoryEstimate(None, 24)}, DOES_NOT_FIT, "set 24 and gradient_accumulation_steps=6"),
        (
            64,
            {"dots": MemoryEstimate(None, 0), "full": MemoryEstimate(None, 0)},
            DOES_NOT_FIT + FULL_REMAT + "compiled      none fits\n",
            "lower data.max_seq_length or choose a smaller model",
        ),
        (
            64,
            {"dots": MemoryEstimate(None, 0), "full": MemoryEstimate(None, 16)},
            DOES_NOT_FIT + FULL_REMAT + SOME_FIT.format(16),
            "set model.remat='full', 16 and gradient_accumulation_steps=8",
        ),
        (
            1,
            {"dots": MemoryEstimate(None, 0), "full": MemoryEstimate(2 * 10**9, 3)},
            DOES_NOT_FIT + FULL_REMAT + SOME_FIT.format(3),
            "set model.remat='full'",
        ),
    ],
)
def test_check_prints_the_estimate(batch, estimates, printed, advice, v3, encoder_step_config, monkeypatch, capsys):
    monkeypatch.setattr(memory, "estimate_memory", lambda config, **options: estimates[config.model.execution.remat])
    settings = settings_of(default.get_config()).replace(
        {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2}
    )
    findings = check.Findings()
    run = type("Run", (), {"step_config": encoder_step_config})
    check.show_compiled(settings, run, v3, findings)
    assert capsys.readouterr().out == "compiling     the step for TPU v3, minutes at real size\n" + printed
    expected = [f"per_device_train_batch_size={batch}: does not fit a TPU v3 device; {advice}"] if advice else []
    assert findings.problems == expected


def test_the_error_names_what_fits_with_full_remat(v3, encoder_step_config, monkeypatch):
    def step_bytes(step_config, devices, batch, *, length, microbatches):
        return batch * (1.5e9 if step_config.model.execution.remat == "full" else 20e9)

    monkeypatch.setattr(memory, "step_bytes", step_bytes)
    monkeypatch.setattr(memory, "topology_devices", lambda machine: [])
    with pytest.raises(
        UserError, match=r"not even one sequence of 8 tokens .* set model.remat='full', with which 8 fit"
    ):
        memory.find_batch_size(encoder_step_config, length=8, microbatches=1, machine=v3)


@pytest.mark.slow
def test_a_run_finds_its_batch_size_and_keeps_it_when_resumed(tmp_path, monkeypatch):
    settings = tiny_settings(write_corpus(tmp_path), per_device_train_batch_size=0)
    workdir = WorkDir(str(tmp_path / "run"))
    with pytest.raises(UserError, match="per_device_train_batch_size=0: the memory of a cpu device is unknown"):
        train_and_evaluate(settings, workdir.path)
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "step_bytes", lambda step_config, devices, batch, *, length, microbatches: batch * length)
        patch.setattr(memory, "_local_memory_bytes", lambda device: 16 * 16 / memory.USABLE + 1)
        train_and_evaluate(settings.replace({"num_train_steps": 4}), workdir.path)
    assert workdir.read_config()["per_device_train_batch_size"] == 16
    assert workdir.last_topology() == (1, 16 * jax.local_device_count())
    # A resumed run uses the stored batch size, whatever would be found now.
    train_and_evaluate(settings, workdir.path)
    assert workdir.read_config()["per_device_train_batch_size"] == 16


@pytest.mark.slow
def test_freed_memory_is_kept():
    code = """
import resource, numpy as np
from mlm import memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
memory.keep_freed_memory()
np.ones(50 << 20, np.uint8)  # The first one comes from the system.
before = faults()
for _ in range(20):
    np.ones(50 << 20, np.uint8)
print(faults() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2_000  # Each array has 12,800 pages.
