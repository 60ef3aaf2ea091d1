"""What the last layer computes at the predicted positions alone is what it computes there beside all others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.config import default_config
from mlm.models.encoder import MaskedLM
from mlm.models.execution import Execution

PAD, BEGIN, L = 1, 0, 12
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "pad_token_id": PAD,
}
# Every way to know a place, a gate, layers that are one, and (ModernBERT's second) a window.
FAMILIES = {
    "roberta": {},
    "albert": {"embedding_size": 8, "inner_group_num": 2},
    "roformer": {"embedding_size": 16, "rotary_value": True},
    "modernbert": {"bos_token_id": BEGIN, "eos_token_id": 2, "local_attention": 4},
}
POSITIONS = np.array([[1, 4, 11], [0, 5, 6]], np.int32)


SCAN = Execution(remat="full", scan_layers=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "begin_id", "execution"),
    [
        ("roberta", None, Execution()),
        ("modernbert", BEGIN, SCAN),
        *((family, BEGIN, Execution()) for family in FAMILIES),
    ],
)
def test_logits_and_gradients_are_those_of_all_positions(family, begin_id, execution):
    config = default_config(family).replace(**SHAPE | FAMILIES[family])
    draw = np.random.default_rng(0)
    inputs = draw.integers(3, 40, (2, L)).astype(np.int32)
    inputs[0, 3] = inputs[1, 5] = BEGIN
    inputs[1, 9:] = PAD
    cotangent = draw.normal(size=(*POSITIONS.shape, 40)).astype(np.float32)
    params = MaskedLM(config).init(jax.random.key(0), inputs)["params"]
    # Larger than they begin, so that attention is not even.
    params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim > 1 else leaf, params)

    @jax.jit
    def both(params):
        def at_positions(params):
            model = MaskedLM(config, begin_id=begin_id, execution=execution)
            logits = model.apply({"params": params}, inputs, positions_BxK=POSITIONS)
            return jnp.sum(logits * cotangent), logits

        def of_all(params):
            logits = MaskedLM(config, begin_id=begin_id).apply({"params": params}, inputs)
            chosen = jnp.take_along_axis(logits, POSITIONS[:, :, None], axis=1)
            return jnp.sum(chosen * cotangent), chosen

        return [jax.value_and_grad(way, has_aux=True)(params) for way in (at_positions, of_all)]

    ((_, logits), gradients), ((_, wanted), wanted_gradients) = jax.device_get(both(params))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        other = wanted_gradients
        for key in path:
            other = other[key.key]
        np.testing.assert_allclose(gradient, other, rtol=0, atol=1e-5 * max(np.abs(other).max(), 1e-3), err_msg=path)
