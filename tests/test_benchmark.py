"""--mode=benchmark: times per step in the loop, by part, and of the step alone."""

import re

import pytest

from mlm import memory
from mlm.modes import benchmark
from tests.tiny import tiny_settings, write_corpus


@pytest.mark.slow
def test_the_parts_add_up_to_the_step_and_the_largest_batch_is_found_once(tmp_path, capsys, monkeypatch):
    found = []

    def find(step_config, *, length, microbatches):
        found.append((length, microbatches))
        return 4

    monkeypatch.setattr(memory, "find_batch_size", find)
    settings = tiny_settings(write_corpus(tmp_path), per_device_train_batch_size=0)
    benchmark.run(settings, None, steps=3)
    assert found == [(16, 1)]
    output = capsys.readouterr().out
    step, *parts = (float(ms) for ms in re.findall(r"^(?:time per step|  \w.*?) +([\d.]+) ms", output, re.MULTILINE))
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(step, abs=0.05)
    before, after = map(float, re.search(r"\(before and after: ([\d.]+), ([\d.]+)\)", output).groups())
    ratio = float(re.search(r"loop / step alone +([\d.]+)", output)[1])
    assert ratio == pytest.approx(step / ((before + after) / 2), rel=0.01)
    assert [line.split()[1] for line in output.splitlines() if line.startswith("every")] == [
        "eval_steps",
        "save_steps",
        "eval_steps",
    ]
