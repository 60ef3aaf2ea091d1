"""Every optimizer against NumPy, and which parameters have weight decay, Muon and a smaller learning rate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm import parallel
from mlm.optimizer import (
    NEWTON_SCHULZ,
    create_optimizer,
    decay_mask,
    muon_labels,
    newton_schulz,
    orthogonalize,
    scale_by_layer,
    scale_by_muon,
)
from mlm.schedules import create_schedule
from mlm.settings import OPTIMIZERS
from mlm.steps import init_params
from tests.tiny import optimizer_settings

BETAS = {"adam_beta1": None, "adam_beta2": None, "adam_epsilon": None}


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


def make_params():
    """A model of one gated layer of width 4, in the names of `MaskedLM`, with values of different sizes."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "embeddings": {"word": {"embedding": draw(9, 4)}},
        "head": {"bias": 0.1 * draw(9)},
        "layer_0": {
            "attention": {"qkv": {"weight": draw(12, 4)}, "output": {"kernel": draw(4, 4), "bias": draw(4)}},
            "feed_forward": {"inner": {"kernel": draw(4, 12)}, "output": {"kernel": 5 * draw(6, 4)}},
        },
    }


class Reference:
    """Optimizers in float64 NumPy, one parameter at a time. `update` returns the step before the learning rate."""

    def __init__(self, settings):
        self.settings = settings
        self.state = {}

    def update(self, path, grad, param, step):
        decay = self.settings.weight_decay if param.ndim == 2 else 0.0
        m, v = self.state.setdefault(path, (np.zeros_like(grad), np.zeros_like(grad)))
        new = getattr(self, self.settings.name)(path, grad, param, decay, m, v, step)
        update, self.state[path] = new
        return update

    def _adam(self, grad, m, v, step):
        s = self.settings
        m = s.adam_beta1 * m + (1 - s.adam_beta1) * grad
        v = s.adam_beta2 * v + (1 - s.adam_beta2) * grad**2
        m_hat, v_hat = m / (1 - s.adam_beta1 ** (step + 1)), v / (1 - s.adam_beta2 ** (step + 1))
        return m_hat / (np.sqrt(v_hat) + s.adam_epsilon), v_hat, (m, v)

    def adamw(self, path, grad, param, decay, m, v, step):
        update, _, state = self._adam(grad, m, v, step)
        return update + decay * param, state

    def stable_adamw(self, path, grad, param, decay, m, v, step):
        update, v_hat, state = self._adam(grad, m, v, step)
        rms = np.sqrt(np.mean(grad**2 / np.maximum(v_hat, self.settings.adam_epsilon**2)))
        return (update + decay * param) / max(1.0, rms), state

    def lamb(self, path, grad, param, decay, m, v, step):
        update, _, state = self._adam(grad, m, v, step)
        update = update + decay * param
        return update * np.linalg.norm(param) / np.linalg.norm(update), state

    def lion(self, path, grad, param, decay, m, v, step):
        s = self.settings
        update = np.sign(s.lion_beta1 * m + (1 - s.lion_beta1) * grad) + decay * param
        return update, (s.lion_beta2 * m + (1 - s.lion_beta2) * grad, v)

    def adafactor(self, path, grad, param, decay, m, v, step):
        # No parameter here is large enough for factored second moments; the optax version of those is its own.
        beta = 1 - (step + 1) ** -self.settings.adafactor_decay_rate
        v = beta * v + (1 - beta) * (grad**2 + 1e-30)
        update = grad / np.sqrt(v)
        update /= max(1.0, np.sqrt(np.mean(update**2)) / self.settings.adafactor_clipping_threshold)
        return update * max(1e-3, np.sqrt(np.mean(param**2))) + decay * param, (m, v)

    def muon(self, path, grad, param, decay, m, v, step):
        s = self.settings
        if "layer_0" not in path or grad.ndim != 2:
            update, state = self.adamw(path, grad, param, decay, m, v, step)
            return update * s.adam_learning_rate / s.learning_rate, state
        m = s.muon_momentum * m + grad
        direction = grad + s.muon_momentum * m
        if "weight" in path:  # [3D, D]: outputs first.
            parts = [self._orthogonal(part, outputs=4, inputs=4) for part in np.split(direction, 3)]
            update = np.concatenate(parts)
        elif "inner" in path:
            parts = [self._orthogonal(part, outputs=6, inputs=4) for part in np.split(direction, 2, axis=1)]
            update = np.concatenate(parts, axis=1)
        else:
            update = self._orthogonal(direction, outputs=grad.shape[1], inputs=grad.shape[0])
        return update + decay * param, (m, v)

    def _orthogonal(self, matrix, *, outputs, inputs):
        """Newton-Schulz acts on each singular value alone."""
        u, s, vt = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
        for _ in range(self.settings.muon_iterations):
            a, b, c = NEWTON_SCHULZ
            s = a * s + b * s**3 + c * s**5
        scale = math.sqrt(max(1, outputs / inputs))
        if self.settings.muon_scale == "rms":
            scale = 0.2 * math.sqrt(max(outputs, inputs))
        return scale * (u * s) @ vt


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [{"name": name} for name in OPTIMIZERS]
    + [
        {"name": "adamw", "max_grad_norm": 0.5, "adam_beta2": 0.98, "adam_epsilon": 1e-6},
        {"name": "adamw", "max_grad_norm": 1e9},
        {"name": "muon", "muon_scale": "rms", "muon_iterations": 3, "muon_momentum": 0.8, "adam_beta2": 0.98},
        {"name": "lion", "lion_beta1": 0.8, "lion_beta2": 0.9},
        {"name": "adafactor", "adafactor_decay_rate": 0.5, "adafactor_clipping_threshold": 0.7},
    ],
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_three_steps_of_every_optimizer_equal_numpy(keys):
    settings = optimizer_settings(
        **{
            **BETAS,
            "learning_rate": 0.02,
            "schedule": "linear",
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.0,
            **keys,
        }
    )
    optimizer = create_optimizer(settings, create_schedule(settings, num_train_steps=10))
    update = jax.jit(optimizer.update)
    params = make_params()
    state = optimizer.init(params)
    reference, expected = Reference(settings), jax.tree.map(np.float64, params)
    rng = np.random.default_rng(1)
    for step in range(4):  # The first has rate 0: three that move the parameters.
        grads = jax.tree.map(lambda leaf, factor=10 ** (step % 2): factor * rng.normal(size=leaf.shape), expected)
        updates, state = update(jax.tree.map(np.float32, grads), state, params)
        params = optax.apply_updates(params, updates)

        norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
        scale = settings.max_grad_norm / norm if 0 < settings.max_grad_norm < norm else 1.0
        rate = 0.02 * (step / 2 if step < 2 else 1 - (step - 2) / 8)

        def step_of(path, grad, param, rate=rate, scale=scale, step=step):
            names = tuple(key.key for key in path)
            return param - rate * reference.update(names, scale * grad, param, step)

        expected = jax.tree_util.tree_map_with_path(step_of, grads, expected)
        # Float32 rounding of values up to 10, after a few operations.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=4e-6), params, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_state_has_one_structure_for_all_values_of_mutable_keys(name):
    """A resumed run may change these values (settings.MUTABLE_KEYS), so its checkpoint must fit them."""
    params = jax.tree.map(jnp.asarray, make_params())

    def state(**changes):
        settings = optimizer_settings(**{**BETAS, "name": name, **changes})
        return jax.eval_shape(create_optimizer(settings, create_schedule(settings, num_train_steps=9)).init, params)

    plain = state(schedule="constant", max_grad_norm=0.0, weight_decay=0.0)
    assert plain == state(schedule="linear", max_grad_norm=1.0, weight_decay=0.1, warmup_steps=3)
    assert plain == state(schedule="wsd", max_grad_norm=0.0, weight_decay=0.1, learning_rate=1.0)


def test_muon_updates_the_matrices_of_layers_and_nothing_else(make_step_config):
    params = jax.eval_shape(lambda: init_params(make_step_config(model="encoder"), length=8))
    flat = jax.tree_util.tree_leaves_with_path(muon_labels(params))
    names = {"/".join(key.key for key in path) for path, label in flat if label == "muon"}
    layers = {path[0].key for path, _ in flat if path[0].key.startswith("layer_")}
    assert names == {
        f"{layer}/{name}"
        for layer in layers
        for name in (
            "attention/qkv/weight",
            "attention/output/kernel",
            "feed_forward/inner/kernel",
            "feed_forward/output/kernel",
        )
    }


@pytest.mark.slow
def test_an_ungated_feed_forward_network_has_one_inner_matrix():
    kernels = {"inner": {"kernel": jnp.eye(4, 12)}, "output": {"kernel": jnp.eye(12, 4)}}
    params = {"layer_0": {"feed_forward": kernels}}
    muon = scale_by_muon(momentum=0.0, iterations=5, scale="spectral", axis_name=None)
    updates, _ = muon.update(params, muon.init(params))
    inner = updates["layer_0"]["feed_forward"]["inner"]["kernel"]
    np.testing.assert_allclose(inner, math.sqrt(3) * newton_schulz(jnp.eye(4, 12)[None], 5)[0], rtol=1e-6)


@pytest.mark.slow
def test_newton_schulz_brings_all_singular_values_near_one():
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=(8, 24)), full_matrices=False)
    matrices_NxRxC = np.stack([(u * np.geomspace(1, 0.02, 8)) @ vt, 1e-4 * u @ vt]).astype(np.float32)
    for matrix_RxC in np.asarray(newton_schulz(matrices_NxRxC, 5)):
        values = np.linalg.svd(matrix_RxC, compute_uv=False)
        assert 0.6 < values.min() <= values.max() < 1.25
    assert not np.any(newton_schulz(jnp.zeros((1, 3, 5)), 5))


@pytest.mark.slow
def test_devices_share_the_matrices_and_get_the_same_results():
    """Five matrices of one shape and one of another, on two devices: neither number is a multiple of two."""
    rng = np.random.default_rng(0)
    shapes = [(4, 8), (8, 4), (4, 8), (4, 8), (8, 4), (6, 6)]
    matrices = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    alone = orthogonalize(matrices, 5, None)
    devices = jax.local_device_count()
    assert devices > 1
    shared = jax.pmap(lambda *parts: orthogonalize(list(parts), 5, parallel.AXIS), axis_name=parallel.AXIS)(
        *[jnp.stack([matrix] * devices) for matrix in matrices]
    )
    for expected, found in zip(alone, shared, strict=True):
        for device in range(devices):
            np.testing.assert_allclose(found[device], expected, rtol=0, atol=1e-5)


def test_each_device_orthogonalizes_only_its_part_of_the_matrices():
    matrices = [jax.ShapeDtypeStruct((jax.local_device_count(), 64, 64), jnp.float32)] * 8

    def flops(axis_name):
        step = jax.pmap(lambda *parts: orthogonalize(list(parts), 5, axis_name), axis_name=parallel.AXIS)
        return step.lower(*matrices).compile().cost_analysis()["flops"]

    ratio = flops(parallel.AXIS) / flops(None)
    assert ratio < 1.1 / min(8, jax.local_device_count())


@pytest.mark.slow
def test_layer_decay_lowers_the_rate_from_the_head_down():
    params = {name: {"kernel": np.ones((2, 2))} for name in ("embeddings", "layer_0", "layer_1", "final_norm", "head")}
    transform = scale_by_layer(0.5)
    updates, _ = transform.update(params, transform.init(params))
    factors = {name: float(update["kernel"][0, 0]) for name, update in updates.items()}
    assert factors == {"embeddings": 0.125, "layer_0": 0.25, "layer_1": 0.5, "final_norm": 1.0, "head": 1.0}
    settings = optimizer_settings(layer_decay=0.5)
    grads = jax.tree.map(lambda leaf: leaf * 3.0, make_params())
    plain = create_optimizer(optimizer_settings(), lambda count: 0.1)
    decayed = create_optimizer(settings, lambda count: 0.1)

    def first_update(optimizer):
        return jax.jit(lambda: optimizer.update(grads, optimizer.init(grads), grads)[0])()

    expected, found = first_update(plain), first_update(decayed)
    ratios = jax.tree.map(lambda a, b: np.unique(np.asarray(a) / np.asarray(b)).tolist(), found, expected)
    assert ratios["layer_0"]["attention"]["output"]["kernel"] == [0.5]
    assert ratios["embeddings"]["word"]["embedding"] == [0.25]
