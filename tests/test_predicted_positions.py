"""`MaskedLM.encode`: hidden states at K positions equal those at all positions; `__call__` applies the head to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.block import Execution
from mlm.models.config import default_config
from mlm.models.encoder import MaskedLM

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
# Every kind of position embedding, a gate, shared layers, and a window (in ModernBERT's second layer).
FAMILIES = {
    "roberta": {},
    "albert": {"embedding_size": 8, "inner_group_num": 2},
    "roformer": {"embedding_size": 16, "rotary_value": True},
    "modernbert": {"bos_token_id": BEGIN, "eos_token_id": 2, "local_attention": 4},
}
POSITIONS = np.array([[1, 4, 11], [0, 5, 6]], np.int32)


def make_case(family, *, begin_id, remat="none"):
    """Returns a model, its parameters, and input rows with documents and padding."""
    config = default_config(family).replace(**SHAPE | FAMILIES[family])
    inputs = np.random.default_rng(0).integers(3, 40, (2, L)).astype(np.int32)
    inputs[0, 3] = inputs[1, 5] = BEGIN
    inputs[1, 9:] = PAD
    params = jax.jit(MaskedLM(config).init)(jax.random.key(0, impl="rbg"), inputs)["params"]  # rbg compiles fast.
    # Larger than initialized, so that attention is not uniform.
    params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim > 1 else leaf, params)
    return MaskedLM(config, begin_id=begin_id, execution=Execution(remat=remat)), params, inputs


def gather(values_BxLxX):
    return jnp.take_along_axis(values_BxLxX, POSITIONS[:, :, None], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["modernbert", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "modernbert")]
)
def test_encode_at_positions_matches_encode_of_all_tokens(family):
    model, params, inputs = make_case(family, begin_id=BEGIN)
    encode = jax.jit(lambda params, positions: model.apply({"params": params}, inputs, positions, method="encode"))
    hidden_BxLxD, hidden_BxKxD = encode(params, None), encode(params, POSITIONS)
    assert hidden_BxLxD.shape == (2, L, 16)
    assert hidden_BxKxD.shape == (2, 3, 16)
    np.testing.assert_allclose(hidden_BxKxD, gather(hidden_BxLxD), rtol=0, atol=2e-6 * np.abs(hidden_BxLxD).max())


@pytest.mark.slow
@pytest.mark.parametrize("positions", [None, POSITIONS])
def test_call_is_the_head_applied_to_encode(positions):
    model, params, inputs = make_case("roberta", begin_id=None)

    def head_of_encode(model):
        hidden = model.encode(inputs, positions)
        return model.head(hidden, model.embeddings.word.embedding, logits_dtype=jnp.float32)

    logits = model.apply({"params": params}, inputs, positions)
    np.testing.assert_array_equal(model.apply({"params": params}, method=head_of_encode), logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "begin_id", "remat"),
    [
        ("roberta", None, "none"),
        ("modernbert", BEGIN, "full"),
        *((family, BEGIN, "none") for family in FAMILIES),
    ],
)
def test_logits_and_gradients_at_positions_match_those_of_all_tokens(family, begin_id, remat):
    model, params, inputs = make_case(family, begin_id=begin_id, remat=remat)
    cotangent = np.random.default_rng(1).normal(size=(*POSITIONS.shape, 40)).astype(np.float32)

    @jax.jit
    def both(params):
        def at_positions(params):
            logits = model.apply({"params": params}, inputs, POSITIONS)
            return jnp.sum(logits * cotangent), logits

        def of_all_tokens(params):
            logits = gather(model.clone(execution=Execution()).apply({"params": params}, inputs))
            return jnp.sum(logits * cotangent), logits

        return [jax.value_and_grad(f, has_aux=True)(params) for f in (at_positions, of_all_tokens)]

    ((_, logits), gradients), ((_, expected), expected_gradients) = jax.device_get(both(params))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * np.abs(expected).max())

    def assert_close(path, gradient, exact):
        atol = 1e-5 * max(np.abs(exact).max(), 1e-3)
        np.testing.assert_allclose(gradient, exact, rtol=0, atol=atol, err_msg=str(path))

    jax.tree_util.tree_map_with_path(assert_close, gradients, expected_gradients)
