"""Schedules against closed forms, AdamW against NumPy, and what decays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm.errors import UserError
from mlm.optimizer import create_optimizer, create_schedule, decays
from mlm.steps import init_params

ADAMW = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.1,
    "max_grad_norm": 0.0,
}
AFTER_WARMUP = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1,
}


@pytest.mark.parametrize("kind", AFTER_WARMUP)
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule_is_its_closed_form(kind, warmup):
    peak, steps = 3e-4, 110
    schedule = create_schedule(kind, learning_rate=peak, warmup_steps=warmup, num_train_steps=steps)
    expected = [
        peak * (step / warmup if step < warmup else AFTER_WARMUP[kind]((step - warmup) / (steps - warmup)))
        for step in range(steps + 1)
    ]
    # The decayed rate is a difference of numbers near 1 in float32: 1e-6 of the peak, not of itself.
    rates = jax.vmap(schedule)(jnp.arange(steps + 1)) * jnp.ones(steps + 1)
    np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-6 * peak)
    assert rates[warmup] == np.float32(peak)
    assert (rates[0] == 0) == (warmup > 0)
    if kind != "constant":
        assert abs(rates[steps]) < 1e-7 * peak


def test_warmup_may_take_the_whole_run():
    schedule = create_schedule("linear", learning_rate=1.0, warmup_steps=4, num_train_steps=4)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0, 0.25, 0.5, 0.75], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schedule": "sqrt"}, "optimizer.schedule='sqrt' is not one of linear, cosine, constant"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate=0.0"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate=-1.0"),
        ({"learning_rate": math.nan}, "optimizer.learning_rate=nan"),
        ({"warmup_steps": 11}, "optimizer.warmup_steps=11 .* num_train_steps=10"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps=-1"),
    ],
)
def test_schedule_refuses(change, named):
    options = {"schedule": "linear", "learning_rate": 1.0, "warmup_steps": 0, "num_train_steps": 10} | change
    with pytest.raises(UserError, match=named):
        create_schedule(options.pop("schedule"), **options)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adam_beta1", 1.0),
        ("adam_beta1", -0.1),
        ("adam_beta2", 1.0),
        ("adam_epsilon", 0.0),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", math.nan),
    ],
)
def test_optimizer_refuses(key, value):
    with pytest.raises(UserError, match=f"optimizer.{key}={value}"):
        create_optimizer(optax.constant_schedule(1.0), **(ADAMW | {key: value}))


def test_matrices_and_embeddings_decay_biases_and_scales_do_not():
    params = {
        "word": {"embedding": np.ones((9, 4))},
        "layer": {  # With a leading axis of layers, as `nn.scan` would give them.
            "dense": {"kernel": np.ones((3, 4, 4)), "bias": np.ones((3, 4))},
            "norm": {"scale": np.ones((3, 4)), "bias": np.ones((3, 4))},
        },
        "head": {"bias": np.ones(9), "temperature": np.ones(())},
    }
    assert decays(params) == {
        "word": {"embedding": True},
        "layer": {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False, "bias": False}},
        "head": {"bias": False, "temperature": False},
    }


def test_in_the_encoder_kernels_and_embeddings_decay_and_nothing_else(make_step_config):
    params = jax.eval_shape(lambda: init_params(make_step_config(model="encoder"), length=8))
    flat = jax.tree_util.tree_leaves_with_path(decays(params))
    assert {path[-1].key for path, decayed in flat if decayed} == {"kernel", "weight", "embedding"}
    assert {path[-1].key for path, decayed in flat if not decayed} == {"bias", "scale"}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 1e9])
def test_updates_are_those_of_numpy(max_grad_norm):
    rng = np.random.default_rng(0)
    params = {"dense": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}}
    params = jax.tree.map(np.float32, params)
    schedule = create_schedule("linear", learning_rate=0.1, warmup_steps=2, num_train_steps=10)
    optimizer = create_optimizer(schedule, **(ADAMW | {"max_grad_norm": max_grad_norm}))
    state = optimizer.init(params)

    expected = jax.tree.map(np.float64, params)
    first = jax.tree.map(np.zeros_like, expected)
    second = jax.tree.map(np.zeros_like, expected)
    for step in range(4):
        grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), expected)
        updates, state = optimizer.update(jax.tree.map(np.float32, grads), state, params)
        params = optax.apply_updates(params, updates)

        # Loshchilov and Hutter, 2019, algorithm 2, decay times the rate.
        norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
        scale = max_grad_norm / norm if 0 < max_grad_norm < norm else 1.0
        rate = 0.1 * (step / 2 if step < 2 else 1 - (step - 2) / 8)
        for name, decay in (("kernel", 0.1), ("bias", 0.0)):
            g, m, v, p = (tree["dense"] for tree in (grads, first, second, expected))
            m[name] = 0.9 * m[name] + 0.1 * scale * g[name]
            v[name] = 0.98 * v[name] + 0.02 * (scale * g[name]) ** 2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.98 ** (step + 1))
            p[name] = p[name] - rate * (m_hat / (np.sqrt(v_hat) + 1e-6) + decay * p[name])
        # Float32 rounding of values near 1, a few operations deep.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), params, expected)


def test_a_run_may_go_on_with_another_choice_of_numbers():
    """What `workdir.MAY_CHANGE` allows: a checkpoint's optimizer state fits whatever the numbers are."""
    params = {"kernel": jnp.ones((2, 2))}

    def state_like(kind, **change):
        schedule = create_schedule(kind, learning_rate=1.0, warmup_steps=change.pop("warmup", 0), num_train_steps=9)
        return jax.eval_shape(create_optimizer(schedule, **(ADAMW | change)).init, params)

    plain = state_like("constant", max_grad_norm=0.0, weight_decay=0.0)
    assert plain == state_like("linear", max_grad_norm=1.0, weight_decay=0.1, warmup=3)
    assert plain == state_like("cosine", max_grad_norm=0.0, weight_decay=0.1, adam_beta1=0.0)
