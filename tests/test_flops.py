"""flops_per_token against the matrix products in the traced model."""

import json
import math
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.config import EncoderConfig, default_config
from mlm.models.encoder import MaskedLM
from mlm.models.families import FAMILIES
from mlm.models.flops import flops_per_token

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def products(jaxpr):
    """Multiply-adds of every dot_general, including those of inner functions."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        total += sum(products(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_flops_match_all_matrix_products(case):
    with np.load(GOLDEN / f"{case}.npz") as file:
        config = EncoderConfig.from_hf(json.loads(str(file["config"])))
    if config.local_attention:
        config = config.replace(
            local_attention=100
        )  # Longer than the row: products outside a window are computed, but not counted.
    length, max_predictions_per_seq = 12, 5

    def forward(inputs_BxL, positions_BxK):
        return MaskedLM(config).init_with_output(jax.random.key(0), inputs_BxL, positions_BxK=positions_BxK)[0]

    jaxpr = jax.make_jaxpr(forward)(
        jnp.zeros((1, length), jnp.int32), jnp.zeros((1, max_predictions_per_seq), jnp.int32)
    )
    counted = flops_per_token(config, length=length, max_predictions_per_seq=max_predictions_per_seq) * length
    assert counted == pytest.approx(3 * 2 * products(jaxpr.jaxpr), rel=1e-12)


def test_window_limits_the_counted_keys():
    config = default_config("modernbert")
    # 14 of 22 layers see 64 tokens to each side, at 2 x 768 multiply-adds per token seen.
    difference = flops_per_token(
        config.replace(local_attention=10_000), length=512, max_predictions_per_seq=77
    ) - flops_per_token(config, length=512, max_predictions_per_seq=77)
    assert difference == 6 * 14 * 2 * 768 * (512 - 129)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_larger_vocabularies_and_more_layers_cost_more(model_type):
    config = default_config(model_type)
    cost = flops_per_token(config, length=128, max_predictions_per_seq=20)
    assert flops_per_token(config.replace(vocab_size=60_000), length=128, max_predictions_per_seq=20) > cost
    assert flops_per_token(config.replace(num_hidden_layers=30), length=128, max_predictions_per_seq=20) > cost
