"""packing="isolate": documents in one row do not see each other, in training and evaluation."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config as tiny_run_config
from tiny import write_corpus

from mlm import build, parallel, steps
from mlm.evaluate import Evaluator
from mlm.masking import MaskingSpec, mask_tokens
from mlm.models.encoder import MaskedLM
from mlm.models.ops.position_ids import segment_ids
from mlm.run.workdir import WorkDir
from tests.tiny import settings_of

BEGIN, PAD, END, UNKNOWN, MASK = range(5)  # conftest's special ids
LENGTH, VOCAB = 16, 50


def text(length, seed):
    return np.random.default_rng(seed).integers(5, VOCAB, length).tolist()


# The tail of a document from an earlier row, a complete document, an empty one, and one that is cut at the row's end.
PARTS = [[*text(3, 0), END], [BEGIN, *text(3, 1), END], [BEGIN, END], [BEGIN, *text(4, 2)]]
ROW = np.array([[*itertools.chain(*PARTS)]], np.int32)
STARTS = np.cumsum([0] + [len(part) for part in PARTS])


@pytest.fixture(scope="module")
def config(tiny_config):
    # Large initial weights, so that attention and positions matter as much as the token itself.
    return tiny_config.replace(num_hidden_layers=2, initializer_range=0.5)


@pytest.fixture(scope="module")
def params(config):
    return jax.jit(MaskedLM(config).init)(jax.random.key(0), ROW)["params"]


@functools.partial(jax.jit, static_argnames=("config", "begin_id"))
def logits_of(params, rows, *, config, begin_id):
    return MaskedLM(config, begin_id=begin_id).apply({"params": params}, rows)


def test_segment_ids_and_counts():
    rows = np.array([ROW[0], [7] * LENGTH, [PAD] * LENGTH, [BEGIN, 7, END] + [PAD] * 13])
    segment_ids_BxL, counts_BxL = segment_ids(rows, pad_id=PAD, begin_id=BEGIN)
    assert segment_ids_BxL.tolist() == [
        [1] * 4 + [2] * 5 + [3] * 2 + [4] * 5,
        [1] * LENGTH,
        [0] * LENGTH,
        [2] * 3 + [0] * 13,
    ]
    assert counts_BxL.tolist() == [
        [1, 2, 3, 4, 1, 2, 3, 4, 5, 1, 2, 1, 2, 3, 4, 5],
        list(range(1, 17)),
        [0] * LENGTH,
        [1, 2, 3] + [0] * 13,
    ]
    segment_ids_BxL, counts_BxL = segment_ids(rows[[0, 3]], pad_id=PAD, begin_id=None)
    assert segment_ids_BxL.tolist() == [[1] * LENGTH, [1] * 3 + [0] * 13]
    assert counts_BxL.tolist() == [list(range(1, 17)), [1, 2, 3] + [0] * 13]


@pytest.mark.slow
def test_isolated_document_has_the_same_logits_as_alone(config, params):
    together = logits_of(params, ROW, config=config, begin_id=BEGIN)[0]
    concatenated = logits_of(params, ROW, config=config, begin_id=None)[0]
    for part, start in zip(PARTS, STARTS[:-1], strict=True):
        alone = np.full((1, LENGTH), PAD, np.int32)
        alone[0, : len(part)] = part
        found = together[start : start + len(part)]
        for begin_id in (None, BEGIN):
            expected = logits_of(params, alone, config=config, begin_id=begin_id)[0, : len(part)]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        # Without isolation documents see each other, so the test can fail.
        assert np.abs(concatenated[start : start + len(part)] - expected).max() > 0.01 * np.abs(expected).max()


@pytest.mark.slow
def test_loss_of_a_document_has_no_gradient_in_other_documents(config, params):
    def logits(delta_BxLxD):
        def add(next_fun, args, kwargs, context):
            out = next_fun(*args, **kwargs)
            is_sum = context.module.name == "embeddings" and context.method_name == "__call__"
            return out + delta_BxLxD if is_sum else out

        with nn.intercept_methods(add):
            return MaskedLM(config, begin_id=BEGIN).apply({"params": params}, ROW)

    @jax.jit
    @jax.grad
    def gradient(delta_BxLxD, inside_L):
        losses_L = -jax.nn.log_softmax(logits(delta_BxLxD))[0, jnp.arange(LENGTH), ROW[0]]
        return (losses_L * inside_L).sum()

    for start, stop in itertools.pairwise(STARTS):
        inside_L = (np.arange(LENGTH) >= start) & (np.arange(LENGTH) < stop)
        gradient_LxD = np.asarray(gradient(jnp.zeros((1, LENGTH, config.hidden_size)), inside_L)[0])
        assert (gradient_LxD[~inside_L] == 0).all()
        assert (gradient_LxD[inside_L] != 0).any(axis=1).all()


@pytest.mark.slow
def test_masking_does_not_change_segment_ids():
    spec = MaskingSpec(
        mlm_probability=1.0,
        mask_replace_prob=0.4,
        random_replace_prob=0.4,
        mask_id=MASK,
        special_ids=(BEGIN, PAD, END, UNKNOWN, MASK),
        num_ids=VOCAB,
    )
    rows = np.random.default_rng(0).integers(0, VOCAB // 4, (500, LENGTH)).astype(np.int32)
    mask = jax.jit(functools.partial(mask_tokens, spec=spec))
    masked = mask(rows, rows_B=np.arange(500), key=jax.random.key(0)).inputs_BxL
    assert (masked != rows).mean() > 0.3
    expected, found = (segment_ids(array, pad_id=PAD, begin_id=BEGIN) for array in (rows, masked))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_parameters_do_not_depend_on_begin_id(config, params):
    ours = jax.jit(MaskedLM(config, begin_id=BEGIN).init)(jax.random.key(0), ROW)["params"]
    jax.tree.map(np.testing.assert_array_equal, ours, params)


@pytest.mark.slow
def test_training_with_isolated_documents_lowers_the_loss(encoder_step_config, encoder_state, train_step):
    """Eight rows of five documents "begin, x, x", in each of which one x predicts the other."""
    step_config = dataclasses.replace(
        encoder_step_config, model=dataclasses.replace(encoder_step_config.model, begin_id=BEGIN)
    )
    words = np.random.default_rng(0).integers(10, 18, (8, 5, 1))
    documents = np.concatenate([np.full_like(words, BEGIN), words, words], axis=2).reshape(8, 15)
    rows = np.concatenate([documents, np.full((8, 1), END)], axis=1).astype(np.int32)
    step, state, losses = train_step(step_config), parallel.replicate(encoder_state), []
    for _ in range(30):
        state, metrics = step(state, parallel.shard(rows, shape=(1,)))
        sums = parallel.first_replica(metrics.sums)
        losses.append(sums.loss / sums.count)
    assert abs(losses[0] - np.log(VOCAB)) < 0.1  # Uniform over the vocabulary.
    assert losses[-1] < np.log(8) + 0.1  # Uniform over the eight words.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """packing -> the components of a run, for one corpus and one tokenizer."""
    folder = tmp_path_factory.mktemp("isolate")
    corpus, workdir = write_corpus(folder), WorkDir(str(folder / "run"))
    components = {}
    for packing in ("concatenate", "isolate", "best_fit"):
        config = tiny_run_config(corpus)
        config.data.packing = packing
        components[packing] = build.build(settings_of(config), workdir)
    return components


def test_isolate_sets_begin_id_and_has_the_rows_of_concatenate(runs):
    isolate, concatenate = runs["isolate"], runs["concatenate"]
    assert concatenate.step_config.model.begin_id is None
    assert isolate.step_config.model.begin_id == isolate.tokenizer.bos_id == 0
    assert runs["best_fit"].step_config.model.begin_id == 0
    np.testing.assert_array_equal(isolate.text.eval_rows_RxL, concatenate.text.eval_rows_RxL)
    for _ in range(9):
        np.testing.assert_array_equal(next(isolate.stream), next(concatenate.stream))


@pytest.mark.slow
def test_evaluation_isolates_documents(runs):
    params = parallel.replicate(runs["isolate"].initial_params())

    eval_steps = {
        packing: parallel.data_parallel(
            functools.partial(steps.eval_step, step_config=run.step_config, axis_name=parallel.AXIS)
        )
        for packing, run in runs.items()
    }
    tokenizer, rows_RxL = runs["isolate"].tokenizer, runs["isolate"].text.eval_rows_RxL

    def loss(packing, rows_RxL):
        evaluator = Evaluator(eval_steps[packing], rows_RxL, per_device_batch_size=8, pad_id=tokenizer.pad_id)
        return evaluator(params, np.zeros(tokenizer.num_ids, np.float32))["eval/loss"]

    assert loss("isolate", rows_RxL) != loss("concatenate", rows_RxL)
    # For both, a row without a begin token is one document.
    tails_RxL = np.where(rows_RxL == tokenizer.bos_id, tokenizer.eos_id, rows_RxL)
    assert loss("isolate", tails_RxL) == pytest.approx(loss("concatenate", tails_RxL), rel=1e-6)
