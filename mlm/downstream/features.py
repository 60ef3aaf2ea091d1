"""Features of a frozen encoder: hidden states of every layer.

Shapes: B rows, L tokens per row, W words per row, D hidden_size, N texts or words, S = layers + 1 states.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm import parallel
from mlm.data.tokenizer import Tokenizer
from mlm.downstream import tokens
from mlm.load import LoadedModel
from mlm.models.encoder import MaskedLM


@dataclasses.dataclass(frozen=True)
class Inputs:
    """N texts, or sentences of words, as token ids.

    Attributes:
      sequences: their tokens.
      first_token_positions: for sentences, the position of the first token of each word, up to the model's length.
      keep_mask: bool, True for each text or word that has features. Words past the model's length have none.
    """

    sequences: tokens.Sequences
    first_token_positions: Sequence[Sequence[int]] | None
    keep_mask: np.ndarray


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int
) -> Inputs:
    """Encodes texts, or pairs of texts, cut to `max_length` tokens."""
    inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    return Inputs(tokens.encode(tokenizer, inputs, max_length=max_length), None, np.ones(len(texts), bool))


def encode_words(tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], *, max_length: int) -> Inputs:
    """Encodes sentences of words, joined by blanks, cut to `max_length` tokens."""
    sequences = tokens.encode(tokenizer, [" ".join(words) for words in sentences], max_length=max_length)
    positions, keep_mask = [], []
    for words, encoding in zip(sentences, sequences.encodings, strict=True):
        positions.append(_first_tokens(words, encoding.offsets))
        keep_mask += [True] * len(positions[-1]) + [False] * (len(words) - len(positions[-1]))
    return Inputs(sequences, positions, np.array(keep_mask))


def extract(loaded: LoadedModel, inputs: Inputs, *, label: str = "features") -> np.ndarray:
    """Returns the hidden states of all layers, float32 [S, N, D]; the first are the embeddings.

    A text has the mean over its tokens, begin and end tokens included: the mean pooling of sentence-transformers. A
    word that is kept has the state of its first token (Devlin et al. 2019, "BERT", section 5.3).

    Args:
      loaded: the model.
      inputs: texts or words.
      label: name of the progress bar.
    """
    states = _all_states(loaded, inputs.sequences, inputs.first_token_positions, label=label)
    return np.stack(states, axis=1) if inputs.first_token_positions is None else np.concatenate(states, axis=1)


def _first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the position of the first token of each word of " ".join(words), as far as the tokens reach."""
    ends = np.array([end for _, end in offsets])
    found, start = [], 0
    for word in words:
        # A token may begin with the blank before the word, or contain several words.
        after = np.flatnonzero(ends > start)
        if not len(after):
            break
        found.append(int(after[0]))
        start += len(word) + 1
    return found


def _all_states(
    loaded: LoadedModel, sequences: tokens.Sequences, positions: Sequence[Sequence[int]] | None, *, label: str
) -> list[np.ndarray]:
    """Returns for each sequence its means [S, D], or with `positions` its states at these positions [S, words, D]."""
    model, pad_id = MaskedLM(loaded.encoder), loaded.tokenizer.pad_id
    params = parallel.copy_to_devices(loaded.params)
    found: list[Any] = [None] * len(sequences)
    lengths = [len(ids) for ids in sequences.ids]
    max_words = max(map(len, positions)) if positions else 0
    with tokens.progress_bar(len(sequences), label) as bar:
        for numbers, rows, length in tokens.batches(
            lengths, max_length=loaded.max_tokens, rows_multiple=jax.local_device_count()
        ):
            ids_BxL = tokens.padded((sequences.ids[n] for n in numbers), shape=(rows, length), value=pad_id)
            types_BxL = tokens.padded((sequences.types[n] for n in numbers), shape=(rows, length), value=0)
            words_BxW = None
            if positions is not None:
                shape = (rows, min(max_words, length))
                words_BxW = tokens.padded((positions[n] for n in numbers), shape=shape, value=0)
            batch = parallel.split_rows((ids_BxL, types_BxL, words_BxW))
            states = np.asarray(_states(params, *batch, model=model), np.float32)
            for row, number in enumerate(numbers):
                found[number] = states[:, row] if positions is None else states[:, row, : len(positions[number])]
            bar.update(len(numbers))
    return found


@functools.partial(jax.jit, static_argnames="model")
def _states(
    params: Any, ids_BxL: jax.Array, types_BxL: jax.Array, words_BxW: jax.Array | None, *, model: MaskedLM
) -> jax.Array:
    """Returns [S, B, D], or [S, B, W, D] with `words_BxW`."""
    states = _encode(params, ids_BxL, types_BxL, model=model, return_layers=True)
    return jnp.stack([_pool(state, ids_BxL, words_BxW, pad_id=model.config.pad_token_id) for state in states])


def last_features(
    params: Any, ids_BxL: jax.Array, types_BxL: jax.Array, words_BxW: jax.Array | None, *, model: MaskedLM
) -> jax.Array:
    """Returns the features of the last layer of texts [B, D], or with `words_BxW` of words [B, W, D]."""
    state_BxLxD = _encode(params, ids_BxL, types_BxL, model=model)
    return _pool(state_BxLxD, ids_BxL, words_BxW, pad_id=model.config.pad_token_id)


def _encode(params: Any, ids_BxL: jax.Array, types_BxL: jax.Array, *, model: MaskedLM, **options: Any) -> Any:
    # Token types of models that have none, or one, are ignored.
    types = types_BxL if model.config.type_vocab_size > 1 else None
    return model.apply({"params": params}, ids_BxL, token_types_BxL=types, method="encode", **options)


def _pool(state_BxLxD: jax.Array, ids_BxL: jax.Array, words_BxW: jax.Array | None, *, pad_id: int) -> jax.Array:
    """Returns the means over tokens [B, D], or with `words_BxW` the states at these positions [B, W, D]."""
    if words_BxW is not None:
        return jnp.take_along_axis(state_BxLxD, words_BxW[..., None], axis=1)
    is_token = (ids_BxL != pad_id)[..., None]
    return jnp.where(is_token, state_BxLxD, 0).sum(axis=1) / jnp.maximum(1, is_token.sum(axis=1))
