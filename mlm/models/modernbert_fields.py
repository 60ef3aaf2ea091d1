"""ModernBERT's layer pattern and rotary bases: one number each with us, as before transformers 5, lists and groups
of their own in a `config.json` since."""

from collections.abc import Mapping
from typing import Any

from mlm.errors import UserError

_KINDS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` of either form -> the older one.

    Raises:
      UserError: layers that are not global at every n-th, from the first on, or rotary positions of another kind.
    """
    flat = dict(config)
    if (kinds := flat.pop("layer_types", None)) is not None:
        flat["global_attn_every_n_layers"] = _period(kinds)
    for kind, parameters in (flat.pop("rope_parameters", None) or {}).items():
        if kind not in _KINDS or not isinstance(parameters, dict | None):
            raise _refusal(
                "rope_parameters", {kind: parameters}, f"a group each for {' and '.join(_KINDS)} is supported"
            )
        parameters = dict(parameters or {})
        if parameters.pop("rope_type", "default") != "default":
            raise _refusal(f"rope_parameters.{kind}", parameters, 'only the rope_type "default" is supported')
        if "rope_theta" in parameters:
            flat[_KINDS[kind]] = parameters.pop("rope_theta")
        if parameters:
            raise _refusal(f"rope_parameters.{kind}", parameters, "only rope_type and rope_theta are supported")
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The older form -> the one that transformers 5 writes."""
    config = dict(flat)
    period = config.pop("global_attn_every_n_layers")
    config["layer_types"] = _layer_types(config["num_hidden_layers"], period)
    config["rope_parameters"] = {
        kind: {"rope_theta": config.pop(name), "rope_type": "default"} for kind, name in _KINDS.items()
    }
    return config


def _layer_types(layers: int, period: int) -> list[str]:
    return ["sliding_attention" if layer % period else "full_attention" for layer in range(layers)]


def _period(kinds: Any) -> int:
    if isinstance(kinds, list):
        for period in range(1, len(kinds) + 1):
            if kinds == _layer_types(len(kinds), period):
                return period
    raise _refusal("layer_types", kinds, "full_attention is supported at every n-th layer from the first on only")


def _refusal(name: str, value: Any, reason: str) -> UserError:
    return UserError(f"model config: {name}={value!r} will not do; {reason}")
