"""Learning-rate schedules against their closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.schedules import create_schedule
from mlm.settings import SCHEDULES
from tests.tiny import optimizer_settings

# The fraction of the decay done so far -> the rate as a fraction of its peak.
DECAYS = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 10])
def test_every_schedule_equals_its_closed_form(schedule, warmup):
    peak, steps = 3e-4, 110
    settings = optimizer_settings(schedule=schedule, learning_rate=peak, warmup_steps=warmup)
    expected = [
        peak * (step / warmup if step < warmup else DECAYS[schedule]((step - warmup) / (steps - warmup)))
        for step in range(steps + 1)
    ]
    # The decayed rate is a difference of float32 numbers near 1, so its error is relative to the peak.
    rates = jax.vmap(create_schedule(settings, num_train_steps=steps))(jnp.arange(steps + 1)) * jnp.ones(steps + 1)
    np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-6 * peak)
    assert rates[warmup] == np.float32(peak)
    assert (rates[0] == 0) == (warmup > 0)
    if schedule != "constant":
        assert abs(rates[steps]) < 1e-7 * peak


def test_warmup_may_last_the_complete_run():
    settings = optimizer_settings(schedule="linear", learning_rate=1.0, warmup_steps=4)
    schedule = create_schedule(settings, num_train_steps=4)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0, 0.25, 0.5, 0.75], rtol=1e-6)
