"""ModernBERT's attention pattern and rotary bases, which a `config.json` has in one of two forms.

Up to transformers 4: one number each (global_attn_every_n_layers, global_rope_theta, local_rope_theta), which is what
`EncoderConfig` has. Since transformers 5: a list layer_types and a group rope_parameters.
"""

from collections.abc import Mapping
from typing import Any

from mlm.errors import UserError

_THETA_FIELDS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
# The fields of the older form.
OLDER_FIELDS = ("global_attn_every_n_layers", *_THETA_FIELDS.values())


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a `config.json` of either form to the older one.

    Raises:
      UserError: global attention is not at every n-th layer from the first on, or rope_parameters are not the default.
    """
    flat = dict(config)
    if (layer_types := flat.pop("layer_types", None)) is not None:
        flat["global_attn_every_n_layers"] = _period(layer_types)
    for kind, parameters in (flat.pop("rope_parameters", None) or {}).items():
        if kind not in _THETA_FIELDS or not isinstance(parameters, dict | None):
            raise _error(
                "rope_parameters", {kind: parameters}, f"must have the groups {' and '.join(_THETA_FIELDS)} only"
            )
        parameters = dict(parameters or {})
        if (rope_type := parameters.pop("rope_type", "default")) != "default":
            raise _error(f"rope_parameters.{kind}.rope_type", rope_type, 'only "default" is supported')
        if "rope_theta" in parameters:
            flat[_THETA_FIELDS[kind]] = parameters.pop("rope_theta")
        if parameters:
            raise _error(f"rope_parameters.{kind}", parameters, "only rope_type and rope_theta are supported")
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the older form to the one that transformers 5 writes."""
    config = dict(flat)
    period = config.pop("global_attn_every_n_layers")
    config["layer_types"] = _layer_types(config["num_hidden_layers"], period)
    config["rope_parameters"] = {
        kind: {"rope_theta": config.pop(name), "rope_type": "default"} for kind, name in _THETA_FIELDS.items()
    }
    return config


def _layer_types(num_layers: int, period: int) -> list[str]:
    return ["sliding_attention" if layer % period else "full_attention" for layer in range(num_layers)]


def _period(layer_types: Any) -> int:
    if isinstance(layer_types, list):
        for period in range(1, len(layer_types) + 1):
            if layer_types == _layer_types(len(layer_types), period):
                return period
    raise _error("layer_types", layer_types, "full_attention must be at every n-th layer, from the first on")


def _error(name: str, value: Any, problem: str) -> UserError:
    return UserError(f"model config {name}={value!r}: {problem}; choose another model")
