"""Linear probes and minimal pairs at every evaluation of a run.

They are cheaper than --mode=probe and --mode=score: a limited number of examples, one split, the last layer, a ridge
classifier, and PLL-word-l2r only. Examples, split and classifier are the same at every evaluation, and in every run.

Shapes: R rows, B rows of a batch on one device, L tokens per row, D hidden_size, N texts or words.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mlm import parallel
from mlm.data.tokenizer import Tokenizer
from mlm.downstream import tasks, tokens
from mlm.downstream.features import encode_texts, encode_words, last_features
from mlm.downstream.score import copies_as_arrays, first_log_probs, fraction_better, masked_copies
from mlm.downstream.tasks import Task
from mlm.errors import UserError
from mlm.eval_settings import EvalSettings
from mlm.models.config import EncoderConfig
from mlm.models.encoder import MaskedLM

# Maximum numbers of texts or tagged words of a probe, and of minimal pairs: more would cost over 5 % of a short run.
MAX_TEXTS = 1_000
MAX_WORDS = 5_000
MAX_PAIRS = 200


@dataclasses.dataclass(frozen=True)
class EvalTasks:
    """The content of the files that `eval` names.

    Attributes:
      probes: name -> task.
      pairs: name -> sentences, the good ones, then the bad ones.
    """

    probes: Mapping[str, Task]
    pairs: Mapping[str, Sequence[str]]


def read_tasks(settings: EvalSettings) -> EvalTasks:
    """Reads the files.

    Raises:
      UserError: a file cannot be used.
    """
    probes, pairs = {}, {}
    for number, (name, path) in enumerate(settings.probes):
        flag = f"eval.probes[{number}]={path}"
        probes[name] = tasks.open_task(path, flag=flag)
        if probes[name].is_regression:
            raise UserError(f"{flag}: has labels with a decimal point; use classes: text or whole numbers")
    for number, (name, path) in enumerate(settings.pairs):
        columns = tasks.read_pairs(path, flag=f"eval.pairs[{number}]={path}")
        rows = np.random.default_rng(0).permutation(len(columns["good"]))[:MAX_PAIRS]
        pairs[name] = [columns[side][row] for side in ("good", "bad") for row in rows]
    return EvalTasks(probes, pairs)


class TaskEvaluator:
    """Measures the same tasks in the same way at every call.

    The devices of all processes share the rows, and every process gets all results. One program is compiled per task.
    The computation is in float32, as in --mode=probe and --mode=score.

    Attributes:
      descriptions: a line for the log for each task.
    """

    def __init__(
        self,
        eval_tasks: EvalTasks,
        encoder: EncoderConfig,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        tokens_per_device: int,
    ):
        """Tokenizes the tasks.

        Args:
          eval_tasks: the tasks.
          encoder: the model's config.
          tokenizer: its tokenizer.
          max_length: number of tokens that texts are cut to.
          tokens_per_device: about the number of tokens in a batch of a device.
        """
        setup: dict[str, Any] = {
            "model": MaskedLM(encoder),
            "tokenizer": tokenizer,
            "max_length": max_length,
            "tokens_per_device": tokens_per_device,
        }
        self._metrics: dict[str, _Probe | _Pairs] = {}
        self.descriptions: list[str] = []
        for name, task in eval_tasks.probes.items():
            probe = self._metrics[f"probe/{name}/accuracy"] = _Probe(task, **setup)
            self.descriptions.append(f"probe {name}: {probe.description}")
        for name, sentences in eval_tasks.pairs.items():
            pairs = self._metrics[f"pairs/{name}/accuracy"] = _Pairs(sentences, **setup)
            self.descriptions.append(f"pairs {name}: {pairs.description}")

    def __bool__(self) -> bool:
        return bool(self._metrics)

    def __call__(self, params: Any) -> dict[str, float]:
        """Returns the metrics of stacked parameters."""
        return {name: metric(params) for name, metric in self._metrics.items()}


class _Probe:
    """The accuracy of a ridge classifier on the features of the last layer, on held-out examples."""

    def __init__(self, task: Task, *, model: MaskedLM, tokenizer: Tokenizer, max_length: int, tokens_per_device: int):
        limit = MAX_TEXTS if task.train.words is None else MAX_WORDS
        if task.test is None:
            examples = task.train.limited(limit)
            train, test = tasks.split_rows(examples, fraction=tasks.TEST_FRACTION, seed=0)
        else:
            num_test = round(tasks.TEST_FRACTION * limit)
            known, held_out = task.train.limited(limit - num_test), task.test.limited(num_test)
            examples = known.joined(held_out)
            train, test = np.arange(len(known)), np.arange(len(known), len(examples))
        if examples.words is None:
            inputs = encode_texts(tokenizer, examples.texts, examples.pairs, max_length=max_length)
        else:
            inputs = encode_words(tokenizer, examples.words, max_length=max_length)
        self._labels = examples.labels[inputs.keep_mask]
        groups = examples.groups[inputs.keep_mask]
        self._train, self._test = (np.flatnonzero(np.isin(groups, rows)) for rows in (train, test))
        positions = inputs.first_token_positions
        self._num_words = None if positions is None else list(map(len, positions))

        sequences = inputs.sequences
        shape = len(sequences), tokens.padded_length(map(len, sequences.ids), max_length=max_length)
        arrays = [
            tokens.padded(sequences.ids, shape=shape, value=tokenizer.pad_id),
            tokens.padded(sequences.types, shape=shape, value=0),
        ]
        if self._num_words is not None and positions is not None:
            arrays.append(tokens.padded(positions, shape=(len(sequences), max(self._num_words)), value=0))

        def features(params: Any, ids_BxL: jax.Array, types_BxL: jax.Array, *words_BxW: jax.Array) -> jax.Array:
            return last_features(params, ids_BxL, types_BxL, words_BxW[0] if words_BxW else None, model=model)

        self._features = _RowFunction(features, arrays, tokens_per_device=tokens_per_device)
        self.description = (
            f"{len(np.unique(self._labels))} classes, {len(self._train):,} training labels, "
            f"{len(self._test):,} held out; {sequences.num_truncated:,} of {len(sequences):,} texts cut to "
            f"{max_length} tokens"
        )

    def __call__(self, params: Any) -> float:
        """Returns the accuracy; NaN if the features are not finite."""
        # Imported here: scikit-learn takes a second, which runs without a probe need not wait for.
        from mlm.downstream.probe import ridge_accuracy

        features = self._features(params)
        if self._num_words is not None:
            features = np.concatenate([row[:count] for row, count in zip(features, self._num_words, strict=True)])
        if not np.isfinite(features).all():
            return float("nan")
        return ridge_accuracy(features, self._labels, train=self._train, test=self._test)


class _Pairs:
    """How often the good sentence of a pair has the higher PLL-word-l2r."""

    def __init__(
        self,
        sentences: Sequence[str],
        *,
        model: MaskedLM,
        tokenizer: Tokenizer,
        max_length: int,
        tokens_per_device: int,
    ):
        sequences = tokens.encode(tokenizer, sentences, max_length=max_length)
        copies = [copy for copy in masked_copies(sequences) if copy.in_word_l2r]
        self._sentence_R = np.array([copy.sentence for copy in copies], int)
        self._num_sentences = len(sentences)
        shape = len(copies), tokens.padded_length(map(len, sequences.ids), max_length=max_length)
        arrays = copies_as_arrays(sequences.ids, copies, shape=shape, tokenizer=tokenizer)

        def log_probs(params: Any, *arrays: jax.Array) -> jax.Array:
            return first_log_probs(params, *arrays, model=model)

        self._log_probs = _RowFunction(log_probs, arrays, tokens_per_device=tokens_per_device)
        self.description = (
            f"{len(sentences) // 2:,} minimal pairs; {sequences.num_truncated:,} sentences cut to {max_length} tokens"
        )

    def __call__(self, params: Any) -> float:
        scores = np.bincount(self._sentence_R, weights=self._log_probs(params), minlength=self._num_sentences)
        good, bad = np.split(scores, 2)
        return fraction_better(good, bad)


class _RowFunction:
    """Computes a function of parameters and rows, in batches of one shape on the devices of all processes."""

    def __init__(self, function: Callable[..., jax.Array], arrays: Sequence[np.ndarray], *, tokens_per_device: int):
        """Keeps the rows on the host.

        Args:
          function: (parameters, *arrays of B rows) -> array [B, ...].
          arrays: host arrays of R rows, the first of them [R, L].
          tokens_per_device: about the number of tokens in a batch of a device.
        """
        count, length = arrays[0].shape
        self._arrays = arrays
        self._rows_B = max(1, min(tokens_per_device // length, -(-count // jax.device_count())))

        def gathered(params: Any, numbers_B: jax.Array, *own: jax.Array) -> Any:
            return jax.lax.all_gather((numbers_B, function(params, *own)), parallel.AXIS)

        self._step = parallel.data_parallel(gathered)

    def __call__(self, params: Any) -> np.ndarray:
        """Returns [R, ...] for stacked parameters."""
        results = [self._step(params, *map(parallel.shard, batch)) for batch in self._batches()]
        found: Any = None
        for numbers, values in parallel.first_replica(results):
            if found is None:
                found = np.empty((len(self._arrays[0]), *values.shape[2:]), values.dtype)
            found[numbers] = values
        return found

    def _batches(self) -> Iterator[list[np.ndarray]]:
        """Yields this process's part of each batch: row numbers, then the arrays. The last row fills up the end."""
        local, size = self._rows_B * jax.local_device_count(), self._rows_B * jax.device_count()
        count = len(self._arrays[0])
        for start in range(jax.process_index() * local, -(-count // size) * size, size):
            numbers = np.minimum(np.arange(start, start + local, dtype=np.int32), count - 1)
            yield [numbers, *(array[numbers] for array in self._arrays)]
