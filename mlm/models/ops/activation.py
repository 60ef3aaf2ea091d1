"""Activation functions, by their names in `config.json`."""

import functools
from collections.abc import Callable

import jax

from mlm.settings import ACTIVATIONS


def _gelu_exact(values: jax.Array) -> jax.Array:
    # With erf, as in PyTorch. jax.nn.gelu uses erfc, which is exact to the last digits where the result is nearly 0, at
    # one and a half times the operations, on the largest array of a layer.
    return 0.5 * values * (1.0 + jax.lax.erf(values * 0.5**0.5))


_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # GELU, x * Phi(x) (Hendrycks and Gimpel, arXiv:1606.08415), and its tanh approximation.
    "gelu_exact": _gelu_exact,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def activation(name: str, *, save_input: bool = False) -> Callable[[jax.Array], jax.Array]:
    """Returns the function for a name in `settings.ACTIVATIONS`.

    With `save_input` the backward pass recomputes everything from the input. Otherwise the compiler stores what forward
    and backward pass have in common, such as the exponential, and reading that costs an accelerator more.
    """
    function = _FUNCTIONS[ACTIVATIONS[name]]
    if not save_input:
        return function
    recomputed: jax.custom_vjp[jax.Array] = jax.custom_vjp(function)

    def backward(values: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
        return jax.vjp(function, jax.lax.optimization_barrier(values))[1](gradient)

    recomputed.defvjp(lambda values: (function(values), values), backward)
    return recomputed
