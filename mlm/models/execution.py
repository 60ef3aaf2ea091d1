"""How the stack of layers is computed: what it costs in memory and compile time. No choice here changes a model.

Layers have their parameters apart, layer_0, layer_1..., whatever is chosen: a checkpoint or an export does not know.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlm.models.config import Layer

# What the backward pass computes anew, to save memory.
REMATS = ("none", "dots", "full")
# What `checkpoint_name` calls the arrays of a layer that "dots" keeps: results of products, and sums before a norm.
REMAT_SAVED = "kept"


@dataclasses.dataclass(frozen=True)
class Execution:
    """The choices.

    Attributes:
      attention: one of `attention.IMPLEMENTATIONS`.
      remat: "none" leaves it to the compiler; "dots" keeps the feed-forward net's first product, and not its
        activation too, so the widest array is in memory once; "full" keeps nothing but the inputs of each layer.
      scan_layers: one layer is compiled for all that are alike, the last one apart, and their parameters are stacked in
        every step.
    """

    attention: str = "plain"
    remat: str = "none"
    scan_layers: bool = False


def run_layers(
    apply: Callable[..., jax.Array],
    params: Mapping[int, Any],
    hidden_BxLxD: jax.Array,
    *,
    layers: tuple[Layer, ...],
    key: jax.Array | None,
    execution: Execution,
) -> jax.Array:
    """Applies layers one after the other.

    Args:
      apply: (layer, its parameters, hidden, its dropout key, is_last=...) -> hidden; of the last one, what it will be.
      params: by `Layer.block`.
      hidden_BxLxD: what the first layer gets.
      layers: the stack.
      key: each layer gets its own, made of this one and its number; None for no dropout.
      execution: `scan_layers`, and whether `remat` is "full".

    Returns:
      What the last layer gives.
    """

    def run(
        number: int | jax.Array, layer: Layer, layer_params: Any, hidden_BxLxD: jax.Array, *, is_last: bool = False
    ) -> jax.Array:
        layer_key = None if key is None else jax.random.fold_in(key, number)
        how = functools.partial(apply, layer, is_last=is_last)
        if execution.remat == "full":
            how = jax.checkpoint(how)
        elif execution.remat == "dots" and execution.scan_layers:
            # Of unrolled layers the compiler finds out what is cheap to compute anew; a scan keeps all it is given.
            how = jax.checkpoint(how, policy=jax.checkpoint_policies.save_only_these_names(REMAT_SAVED))
        return how(layer_params, hidden_BxLxD, layer_key)

    *layers, last = layers
    start, period = _repeats(layers) if execution.scan_layers and layers else (len(layers), 1)
    rounds = (len(layers) - start) // period
    for number in range(start):
        hidden_BxLxD = run(number, layers[number], params[layers[number].block], hidden_BxLxD)
    if rounds:
        repeated = layers[start : start + period]
        stacked, shared = {}, {}
        for place in range(period):
            blocks = [layers[start + turn * period + place].block for turn in range(rounds)]
            if len({*blocks}) == 1:
                shared[place] = params[blocks[0]]
            else:
                stacked[place] = jax.tree.map(_stack(hidden_BxLxD.dtype), *(params[block] for block in blocks))

        def turn(hidden_BxLxD: jax.Array, inputs: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
            number, turn_params = inputs
            for place, layer in enumerate(repeated):
                layer_params = (turn_params | shared)[place]
                hidden_BxLxD = run(start + number * period + place, layer, layer_params, hidden_BxLxD)
            return hidden_BxLxD, None

        hidden_BxLxD, _ = jax.lax.scan(turn, hidden_BxLxD, (jnp.arange(rounds), stacked))
    for number in range(start + rounds * period, len(layers)):
        hidden_BxLxD = run(number, layers[number], params[layers[number].block], hidden_BxLxD)
    return run(len(layers), last, params[last.block], hidden_BxLxD, is_last=True)


def _stack(dtype: Any) -> Callable[..., jax.Array]:
    """Stacks a leaf of several layers. Matrices are rounded first, as they would be in the layer: half the memory."""

    def stack(*leaves: jax.Array) -> jax.Array:
        return jnp.stack([leaf.astype(dtype) if leaf.ndim > 1 else leaf for leaf in leaves])

    return stack


def _repeats(layers: Sequence[Layer]) -> tuple[int, int]:
    """The first layer and the number of layers of what repeats itself to the end, so that the fewest are compiled."""
    alike = [dataclasses.replace(layer, block=0) for layer in layers]
    choices = [
        (start + period + (len(layers) - start) % period, start, period)
        for start in range(len(layers))
        for period in range(1, len(layers) - start + 1)
        if all(alike[i] == alike[i + period] for i in range(start, len(layers) - period))
    ]
    _, start, period = min(choices)
    return start, period
