"""AdamW against NumPy, and which parameters have weight decay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm.optimizer import create_optimizer, decay_mask
from mlm.schedules import create_schedule
from mlm.steps import init_params
from tests.tiny import optimizer_settings


def test_matrices_and_embeddings_have_weight_decay_biases_and_scales_do_not():
    params = {
        "word": {"embedding": np.ones((9, 4))},
        "layer": {  # With a leading axis of layers, as from `nn.scan`.
            "dense": {"kernel": np.ones((3, 4, 4)), "bias": np.ones((3, 4))},
            "norm": {"scale": np.ones((3, 4)), "bias": np.ones((3, 4))},
        },
        "head": {"bias": np.ones(9), "temperature": np.ones(())},
    }
    assert decay_mask(params) == {
        "word": {"embedding": True},
        "layer": {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False, "bias": False}},
        "head": {"bias": False, "temperature": False},
    }


def test_only_kernels_and_embeddings_of_the_encoder_have_weight_decay(make_step_config):
    params = jax.eval_shape(lambda: init_params(make_step_config(model="encoder"), length=8))
    flat = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    assert {path[-1].key for path, decayed in flat if decayed} == {"kernel", "weight", "embedding"}
    assert {path[-1].key for path, decayed in flat if not decayed} == {"bias", "scale"}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 1e9])
def test_updates_equal_a_numpy_implementation(max_grad_norm):
    rng = np.random.default_rng(0)
    params = {"dense": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}}
    params = jax.tree.map(np.float32, params)
    settings = optimizer_settings(
        learning_rate=0.1,
        schedule="linear",
        warmup_steps=2,
        adam_epsilon=1e-6,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
    )
    optimizer = create_optimizer(settings, create_schedule(settings, num_train_steps=10))
    state = optimizer.init(params)

    expected = jax.tree.map(np.float64, params)
    first = jax.tree.map(np.zeros_like, expected)
    second = jax.tree.map(np.zeros_like, expected)
    for step in range(4):
        grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), expected)
        updates, state = optimizer.update(jax.tree.map(np.float32, grads), state, params)
        params = optax.apply_updates(params, updates)

        # Loshchilov and Hutter, 2019, algorithm 2, with the weight decay multiplied by the learning rate.
        norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
        scale = max_grad_norm / norm if 0 < max_grad_norm < norm else 1.0
        rate = 0.1 * (step / 2 if step < 2 else 1 - (step - 2) / 8)
        for name, decay in (("kernel", 0.1), ("bias", 0.0)):
            g, m, v, p = (tree["dense"] for tree in (grads, first, second, expected))
            m[name] = 0.9 * m[name] + 0.1 * scale * g[name]
            v[name] = 0.98 * v[name] + 0.02 * (scale * g[name]) ** 2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.98 ** (step + 1))
            p[name] = p[name] - rate * (m_hat / (np.sqrt(v_hat) + 1e-6) + decay * p[name])
        # Float32 rounding of values near 1, after a few operations.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), params, expected)


def test_the_optimizer_state_has_one_structure_for_all_values_of_mutable_keys():
    """A resumed run may change these values (settings.MUTABLE_KEYS), so its checkpoint must fit them."""
    params = {"kernel": jnp.ones((2, 2))}

    def state(**changes):
        settings = optimizer_settings(**changes)
        return jax.eval_shape(create_optimizer(settings, create_schedule(settings, num_train_steps=9)).init, params)

    plain = state(schedule="constant", max_grad_norm=0.0, weight_decay=0.0)
    assert plain == state(schedule="linear", max_grad_norm=1.0, weight_decay=0.1, warmup_steps=3)
    assert plain == state(schedule="cosine", max_grad_norm=0.0, weight_decay=0.1, learning_rate=1.0)
