"""tests/saved_programs.py: a run loads only programs that are its own."""

import pytest

from mlm import build
from mlm.run.workdir import WorkDir
from tests import saved_programs
from tests.tiny import tiny_settings, write_corpus

CHANGES = (
    {},
    {"seed": 7},
    {"optimizer.learning_rate": 0.02},
    {"optimizer.name": "lamb"},
    {"optimizer.weight_decay": 0.1},
    {"optimizer.ema_decay": 0.9},
    {"optimizer.schedule": "linear"},
    {"optimizer.schedule": "linear", "num_train_steps": 9},
    {"masking.mlm_probability": 0.3},
    {"masking.mlm_probability": (0.3, 0.15)},
    {"masking.mlm_probability": (0.3, 0.15), "num_train_steps": 9},
    {"model.overrides.hidden_size": 32},
    {"model.attention": "xla"},
    {"data.packing": "isolate"},
    {"loss.z_loss": 1e-4},
)


@pytest.mark.slow
def test_the_description_of_a_step_has_everything_that_determines_it(tmp_path):
    files = write_corpus(tmp_path)
    descriptions = []
    for changes in (*CHANGES, {}):
        components = build.build(tiny_settings(files, **changes), WorkDir(str(tmp_path / "run")))
        descriptions.append(saved_programs._describe(components.step_config))
    assert all(map(saved_programs._identifies, descriptions))
    *different, again = descriptions
    assert len(set(different)) == len(CHANGES)
    assert again == descriptions[0]
