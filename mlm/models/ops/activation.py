"""Activations, under the names that `config.json` has for them."""

import functools
from collections.abc import Callable

import jax

from mlm.models.config import ACTIVATIONS


def _gelu_exact(values: jax.Array) -> jax.Array:
    # By erf, as PyTorch has it. JAX's own takes erfc, for the last digits where the result is nearly 0: half again as
    # many operations, on the widest array of a layer.
    return 0.5 * values * (1.0 + jax.lax.erf(values * 0.5**0.5))


_FUNCTIONS = {
    # The exact GELU, x * Phi(x) (Hendrycks and Gimpel, arXiv:1606.08415), and its tanh approximation.
    "gelu_exact": _gelu_exact,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def activation(name: str, *, save_input: bool = False) -> Callable[[jax.Array], jax.Array]:
    """The function of a name in `config.ACTIVATIONS`.

    With `save_input` its gradient shares nothing with another computation of it: what two places read the compiler
    writes to memory, and an exponential costs an accelerator less than that.
    """
    function = _FUNCTIONS[ACTIVATIONS[name]]
    if not save_input:
        return function
    fresh = jax.custom_vjp(function)

    def backward(values: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
        return jax.vjp(function, jax.lax.optimization_barrier(values))[1](gradient)

    fresh.defvjp(lambda values: (function(values), values), backward)
    return fresh
