"""Optimizers: gradient clipping, then AdamW, Muon, StableAdamW, LAMB, Lion or Adafactor, then the decay by layer.

Legend: N matrices, R rows, C columns with R <= C.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlm.settings import OptimizerSettings

# Coefficients of one iteration X -> a X + (b A + c A^2) X with A = X X^T (Jordan et al., 2024, "Muon: An optimizer for
# hidden layers in neural networks"). They make small singular values grow as fast as possible.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def create_optimizer(
    settings: OptimizerSettings, schedule: optax.Schedule, *, axis_name: str | None = None
) -> optax.GradientTransformation:
    """Returns clipping by global norm (none if `max_grad_norm` is 0), the optimizer, and `scale_by_layer`.

    Weight decay is decoupled and multiplied by the learning rate in all of them (Loshchilov and Hutter, 2019).

    Args:
      settings: `settings.name` and its keys.
      schedule: learning rate by the number of applied steps.
      axis_name: mapped axis of the devices that share Muon's work; None if each does all of it.
    """
    # max_grad_norm may change during a run, so the state must have the same structure with and without clipping.
    clip = optax.clip_by_global_norm(settings.max_grad_norm) if settings.max_grad_norm else optax.identity()
    creators: dict[str, Callable[..., optax.GradientTransformation]] = {
        "adamw": _adamw,
        "stable_adamw": _stable_adamw,
        "lamb": _lamb,
        "lion": _lion,
        "adafactor": _adafactor,
        "muon": functools.partial(_muon, axis_name=axis_name),
    }
    parts = [clip, creators[settings.name](settings, schedule)]
    if settings.layer_decay != 1:
        parts.append(scale_by_layer(settings.layer_decay))
    return optax.chain(*parts)


def _adamw(settings: OptimizerSettings, schedule: optax.Schedule):
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""
    return optax.adamw(schedule, **_adam_keys(settings), weight_decay=settings.weight_decay, mask=decay_mask)


def _stable_adamw(settings: OptimizerSettings, schedule: optax.Schedule):
    """StableAdamW (Wortsman et al., 2023, arXiv:2304.13013, algorithm 2)."""
    return optax.chain(
        scale_by_stable_adam(**_adam_keys(settings), weight_decay=settings.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _lamb(settings: OptimizerSettings, schedule: optax.Schedule):
    """LAMB (You et al., 2020, arXiv:1904.00962)."""
    return optax.lamb(schedule, **_adam_keys(settings), weight_decay=settings.weight_decay, mask=decay_mask)


def _lion(settings: OptimizerSettings, schedule: optax.Schedule):
    """Lion (Chen et al., 2023, arXiv:2302.06675)."""
    return optax.lion(
        schedule,
        b1=settings.lion_beta1,
        b2=settings.lion_beta2,
        weight_decay=settings.weight_decay,
        mask=decay_mask,
    )


def _adafactor(settings: OptimizerSettings, schedule: optax.Schedule):
    """Adafactor without momentum (Shazeer and Stern, 2018, arXiv:1804.04235, algorithms 4 and 5).

    The update of a parameter is multiplied by its RMS, so the learning rate is relative. `optax.adafactor` does not
    multiply the weight decay by the learning rate.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=settings.adafactor_decay_rate),
        optax.clip_by_block_rms(settings.adafactor_clipping_threshold),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(settings.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(settings: OptimizerSettings, schedule: optax.Schedule, *, axis_name: str | None):
    """Muon for the matrices inside layers, AdamW for everything else (Jordan et al., 2024)."""
    keys: Any = settings  # For muon, `OptimizerSettings` has replaced None by the defaults.
    ratio = keys.adam_learning_rate / settings.learning_rate
    muon = optax.chain(
        scale_by_muon(
            momentum=keys.muon_momentum, iterations=keys.muon_iterations, scale=keys.muon_scale, axis_name=axis_name
        ),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    adamw = _adamw(settings, lambda count: ratio * schedule(count))
    return optax.partition({"muon": muon, "adamw": adamw}, muon_labels)


def _adam_keys(settings: OptimizerSettings) -> dict[str, Any]:
    return {"b1": settings.adam_beta1, "b2": settings.adam_beta2, "eps": settings.adam_epsilon}


def decay_mask(params: Any) -> Any:
    """Returns a tree of booleans: True for parameters with weight decay, which are the matrices and embeddings.

    Names count as well as ranks: in a model that stacks its layers, as `nn.scan` does, a bias has two axes.
    """

    def has_decay(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        return path[-1].key not in ("bias", "scale") and jnp.ndim(leaf) >= 2

    return jax.tree_util.tree_map_with_path(has_decay, params)


def muon_labels(params: Any) -> Any:
    """Returns a tree of "muon" for the matrices inside layers and "adamw" for all other parameters."""

    def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
        return "muon" if path[0].key.startswith("layer_") and jnp.ndim(leaf) == 2 else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


class MuonState(NamedTuple):
    """The sum of gradients, each multiplied by `momentum` at every later step."""

    momentum: optax.Updates


def scale_by_muon(
    *, momentum: float, iterations: int, scale: str, axis_name: str | None
) -> optax.GradientTransformation:
    """Nesterov momentum, then approximate orthogonalization: the singular values of each update become nearly 1.

    With gradient g: m <- g + momentum * m, and the update is orthogonalized(g + momentum * m). The weights of queries,
    keys and values count as three matrices, the halves of a gated feed-forward network as two. The devices along
    `axis_name` orthogonalize equal numbers of matrices of each shape and share the results.

    Args:
      momentum: decay rate.
      iterations: number of Newton-Schulz iterations.
      scale: "spectral" multiplies by sqrt(max(1, outputs / inputs)); "rms" by 0.2 sqrt(max(outputs, inputs)), which
        makes the RMS that of AdamW's updates (Liu et al., 2025, arXiv:2502.16982).
      axis_name: mapped axis of the devices; None if each orthogonalizes all matrices.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads: optax.Updates, state: MuonState, params: optax.Params | None = None):
        sums = jax.tree.map(lambda grad, total: grad + momentum * total, grads, state.momentum)
        nesterov = jax.tree.map(lambda grad, total: grad + momentum * total, grads, sums)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(nesterov)
        named = {tuple(key.key for key in path): leaf for path, leaf in leaves}
        matrices = {names: _split_matrices(names, named) for names in named}
        results = iter(orthogonalize([part for parts in matrices.values() for part in parts], iterations, axis_name))
        updates = [
            _join_matrices(names, [next(results) * _scale(part, scale) for part in parts])
            for names, parts in matrices.items()
        ]
        return jax.tree.unflatten(treedef, updates), MuonState(sums)

    return optax.GradientTransformation(init, update)


def _split_matrices(names: tuple[str, ...], params: Mapping[tuple[str, ...], jax.Array]) -> list[jax.Array]:
    """Splits the parameter of that path into matrices [inputs, outputs]."""
    param = params[names]
    if names[-1] == "weight":  # Queries, keys and values: [3D, D], outputs first.
        return [matrix.T for matrix in jnp.split(param, 3)]
    if names[-2:] == ("inner", "kernel"):
        # A gated network has two inner matrices: [D, 2F] beside the output's [F, D].
        width = params[(*names[:-2], "output", "kernel")].shape[0]
        return jnp.split(param, param.shape[1] // width, axis=1)
    return [param]


def _join_matrices(names: tuple[str, ...], matrices: list[jax.Array]) -> jax.Array:
    """Inverse of `_split_matrices`."""
    if names[-1] == "weight":
        return jnp.concatenate([matrix.T for matrix in matrices])
    return jnp.concatenate(matrices, axis=1)


def _scale(matrix_IxO: jax.Array, scale: str) -> float:
    inputs, outputs = matrix_IxO.shape
    return max(1.0, outputs / inputs) ** 0.5 if scale == "spectral" else 0.2 * max(inputs, outputs) ** 0.5


def orthogonalize(matrices: list[jax.Array], iterations: int, axis_name: str | None) -> list[jax.Array]:
    """Returns U V^T of each matrix U S V^T, approximately; on several devices each computes an equal part of them."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        groups.setdefault(tuple(sorted(matrix.shape)), []).append(number)

    def is_tall(number: int) -> bool:
        return matrices[number].shape[0] > matrices[number].shape[1]

    results = list(matrices)
    for numbers in groups.values():
        stacked_NxRxC = jnp.stack([matrices[n].T if is_tall(n) else matrices[n] for n in numbers])
        for n, matrix_RxC in zip(numbers, _on_all_devices(stacked_NxRxC, iterations, axis_name), strict=False):
            results[n] = matrix_RxC.T if is_tall(n) else matrix_RxC
    return results


def _on_all_devices(matrices_NxRxC: jax.Array, iterations: int, axis_name: str | None) -> jax.Array:
    """`newton_schulz` with the matrices split over the devices, padded to a multiple of their number."""

    def compute(matrices_NxRxC: jax.Array, *, dtype: Any) -> jax.Array:
        if axis_name is None:
            return newton_schulz(matrices_NxRxC, iterations, dtype=dtype).astype(jnp.float32)
        per_device = -(-len(matrices_NxRxC) // jax.lax.axis_size(axis_name))
        padding = per_device * jax.lax.axis_size(axis_name) - len(matrices_NxRxC)
        padded_NxRxC = jnp.pad(matrices_NxRxC, ((0, padding), (0, 0), (0, 0)))
        first = jax.lax.axis_index(axis_name) * per_device
        own_NxRxC = jax.lax.dynamic_slice_in_dim(padded_NxRxC, first, per_device)
        own_NxRxC = newton_schulz(own_NxRxC, iterations, dtype=dtype)
        return jax.lax.all_gather(own_NxRxC, axis_name, tiled=True).astype(jnp.float32)

    # Five iterations are not precise enough for bfloat16 to matter, and only accelerators compute faster with it.
    in_float32 = functools.partial(compute, dtype=jnp.float32)
    in_bfloat16 = functools.partial(compute, dtype=jnp.bfloat16)
    return jax.lax.platform_dependent(matrices_NxRxC, cpu=in_float32, default=in_bfloat16)


def newton_schulz(matrices_NxRxC: jax.Array, iterations: int, *, dtype: Any = jnp.float32) -> jax.Array:
    """Brings all singular values near 1 (Jordan et al., 2024), in products of `dtype`."""
    norm_Nx1x1 = jnp.linalg.norm(matrices_NxRxC, axis=(1, 2), keepdims=True)
    x_NxRxC = (matrices_NxRxC / (norm_Nx1x1 + 1e-7)).astype(dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram_NxRxR = x_NxRxC @ x_NxRxC.mT
        x_NxRxC = a * x_NxRxC + (b * gram_NxRxR + c * gram_NxRxR @ gram_NxRxR) @ x_NxRxC
    return x_NxRxC


class StableAdamState(NamedTuple):
    """The number of steps and the running means of gradients and of their squares."""

    num_steps: jax.Array
    mean: optax.Updates
    mean_square: optax.Updates


def scale_by_stable_adam(*, b1: float, b2: float, eps: float, weight_decay: float) -> optax.GradientTransformation:
    """AdamW's update, weight decay included, divided by max(1, RMS of g / sqrt(v)) of each parameter.

    v is the running mean of g^2: the update shrinks where the gradient has grown faster than v.
    """

    def init(params: optax.Params) -> StableAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return StableAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: optax.Updates, state: StableAdamState, params: optax.Params | None = None):
        assert params is not None
        num_steps = state.num_steps + 1
        mean = optax.tree.update_moment(grads, state.mean, b1, 1)
        mean_square = optax.tree.update_moment(grads, state.mean_square, b2, 2)

        def direction(grad, mean, square, param, has_decay):
            step = mean / (jnp.sqrt(square) + eps) + (weight_decay * param if has_decay else 0.0)
            rms = jnp.sqrt(jnp.mean(grad**2 / jnp.maximum(square, eps**2)))
            return step / jnp.maximum(1.0, rms)

        updates = jax.tree.map(
            direction,
            grads,
            optax.tree.bias_correction(mean, b1, num_steps),
            optax.tree.bias_correction(mean_square, b2, num_steps),
            params,
            decay_mask(params),
        )
        return updates, StableAdamState(num_steps, mean, mean_square)

    return optax.GradientTransformation(init, update)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies updates by decay^(distance from the head) (Clark et al., 2020, arXiv:2003.10555).

    1 for the head, `decay` for the last of n layers, decay^n for the first and decay^(n + 1) for the embeddings.
    """

    def factor(path: tuple[Any, ...], num_layers: int) -> float:
        name = path[0].key
        if name.startswith("layer_"):
            return decay ** (num_layers - int(name.removeprefix("layer_")))
        return decay ** (num_layers + 1) if name == "embeddings" else 1.0

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None):
        num_layers = sum(name.startswith("layer_") for name in updates)
        scaled = jax.tree_util.tree_map_with_path(lambda path, leaf: factor(path, num_layers) * leaf, updates)
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
