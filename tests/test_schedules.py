"""Learning-rate schedules against their closed forms, and where their parts begin."""

import functools
import math
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.errors import UserError
from mlm.schedules import create_schedule, keep_passed_boundaries
from mlm.settings import DECAY_SHAPES, SCHEDULES, Boundaries, resolve_boundaries
from tests.tiny import optimizer_settings

SHAPES = {
    "linear": lambda done: 1 - done,
    "1-sqrt": lambda done: 1 - math.sqrt(done),
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
PEAK, STEPS = 3e-4, 110


def rates_of(**keys):
    settings = optimizer_settings(learning_rate=PEAK, **keys)
    return jax.vmap(create_schedule(settings, num_train_steps=STEPS))(jnp.arange(STEPS + 1)) * jnp.ones(STEPS + 1)


def decay(shape, step, start, end_factor=0.0):
    """1 up to `start`, `end_factor` at the end."""
    done = min(max(0.0, (step - start) / (STEPS - start)), 1.0)
    return end_factor + (1 - end_factor) * SHAPES[shape](done)


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 10])
def test_every_schedule_equals_its_closed_form(warmup):
    cases = {"constant": ({"schedule": "constant"}, lambda step: 1.0)}
    for shape, end_factor in product(("linear", "cosine"), (None, 0.1)):
        cases[f"{shape} {end_factor}"] = (
            {"schedule": shape, "end_factor": end_factor},
            lambda step, shape=shape, end=end_factor or 0.0: decay(shape, step, warmup, end),
        )
    first = max(warmup, 1)
    cases["inverse_sqrt"] = ({"schedule": "inverse_sqrt"}, lambda step: math.sqrt(first / max(step, first)))
    cases["inverse_sqrt with decay"] = (
        {"schedule": "inverse_sqrt", "decay_steps": 20, "decay_shape": "linear"},
        lambda step: math.sqrt(first / max(step, first)) * decay("linear", step, 90),
    )
    for shape, end_factor in product(DECAY_SHAPES, (0.0, 0.2)):
        cases[f"wsd {shape} {end_factor}"] = (
            {"schedule": "wsd", "decay_steps": 20, "decay_shape": shape, "end_factor": end_factor},
            lambda step, shape=shape, end=end_factor: decay(shape, step, 90, end),
        )
    assert {keys["schedule"] for keys, _ in cases.values()} == {*SCHEDULES}
    for name, (keys, expected) in cases.items():
        values = [PEAK * (step / warmup if step < warmup else expected(step)) for step in range(STEPS + 1)]
        rates = rates_of(warmup_steps=warmup, **keys)
        # The decayed rate is a difference of float32 numbers near 1, so its error is relative to the peak.
        np.testing.assert_allclose(rates, values, rtol=0, atol=1e-6 * PEAK, err_msg=name)
        assert rates[warmup] == np.float32(PEAK), name
        assert (rates[0] == 0) == (warmup > 0), name


def test_warmup_may_last_the_complete_run():
    settings = optimizer_settings(schedule="linear", learning_rate=1.0, warmup_steps=4)
    schedule = create_schedule(settings, num_train_steps=4)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0, 0.25, 0.5, 0.75], rtol=1e-6)


def test_warmup_and_decay_are_steps_fractions_or_tokens():
    def boundaries(**keys):
        settings = optimizer_settings(schedule="wsd", **keys)
        return resolve_boundaries(settings, num_train_steps=1_000, tokens_per_step=2_048)

    assert boundaries(warmup_steps=60, decay_steps=100) == Boundaries(60, 900)
    assert boundaries(warmup_steps=0.06, decay_steps=0.1) == Boundaries(60, 900)
    assert boundaries(warmup_steps="122880 tokens", decay_steps="2.048e5 tokens") == Boundaries(60, 900)
    assert boundaries() == Boundaries(0, 900)  # wsd decays over a tenth of the run by default.
    with pytest.raises(
        UserError, match=r"^optimizer\.decay_steps='1.8e6 tokens': with 200 warm-up steps it is longer "
    ):
        boundaries(warmup_steps=200, decay_steps="1.8e6 tokens")
    with pytest.raises(UserError, match=r"^optimizer\.warmup_steps='3e9 tokens': must be at most num_train_steps=1000"):
        boundaries(warmup_steps="3e9 tokens")


def test_a_longer_run_moves_only_the_boundaries_ahead():
    keep = functools.partial(keep_passed_boundaries, ends_as_before=False)
    keys = {"schedule": "wsd", "warmup_steps": 0.1, "decay_steps": 0.2}
    settings = optimizer_settings(**keys)
    old = resolve_boundaries(settings, num_train_steps=100, tokens_per_step=1)
    new = resolve_boundaries(settings, num_train_steps=200, tokens_per_step=1)
    assert (old, new) == (Boundaries(10, 80), Boundaries(20, 160))
    assert keep(new, old, settings, step=5) == new
    assert keep(new, old, settings, step=10) == Boundaries(10, 160)
    assert keep(new, old, settings, step=80) == Boundaries(10, 160)
    with pytest.raises(UserError, match=r"^optimizer\.decay_steps=0\.2: the decay would begin at step 160, but it has"):
        keep(new, old, settings, step=81)
    # A longer run may keep the boundary: the decay gets longer.
    assert keep(Boundaries(10, 80), old, settings, step=81) == Boundaries(10, 80)
    explicit = optimizer_settings(schedule="constant", warmup_steps=20)
    with pytest.raises(UserError, match=r"^optimizer\.warmup_steps=20: the warm-up of 10 steps is over at step 10"):
        keep(Boundaries(20, 100), Boundaries(10, 100), explicit, step=10)
    assert keep(Boundaries(20, 100), Boundaries(10, 100), explicit, step=9) == Boundaries(20, 100)


def test_a_decay_in_tokens_that_has_begun_stays_on_another_number_of_devices():
    settings = optimizer_settings(schedule="wsd", decay_steps="200 tokens")
    old = resolve_boundaries(settings, num_train_steps=100, tokens_per_step=10)
    new = resolve_boundaries(settings, num_train_steps=100, tokens_per_step=5)
    assert (old.decay_start, new.decay_start) == (80, 60)
    assert keep_passed_boundaries(new, old, settings, step=80, ends_as_before=True) == new
    assert keep_passed_boundaries(new, old, settings, step=81, ends_as_before=True) == old
    with pytest.raises(UserError, match=r"^optimizer\.decay_steps='200 tokens': the decay would begin at step 60"):
        keep_passed_boundaries(new, old, settings, step=81, ends_as_before=False)
