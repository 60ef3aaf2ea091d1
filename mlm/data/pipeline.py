"""Opens the text of a run: sources, tokenizer, evaluation set, and the batches of any process."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from absl import logging

from mlm.data import synthetic
from mlm.data.held_out import EvalSet, read_eval_set
from mlm.data.mixture import BatchShape, BatchStream
from mlm.data.packing import PackedChunk
from mlm.data.sources.retry import RetryPolicy
from mlm.data.sources.source import Source, open_source
from mlm.data.spread import read_units
from mlm.data.stream import RowStream
from mlm.data.tokenizer import Tokenizer, load_tokenizer, without_word_starts
from mlm.errors import UserError
from mlm.settings import DataSettings, MixtureEntry, RunSettings, TokenizerSettings, resolve_algorithm
from mlm.stages import settings_of_stages, source_weights

# Maximum number of a process's shards that the log lists by name.
_MAX_NAMED_SHARDS = 4
# Fraction of unknown tokens above which a warning is logged, and documents in which examples are looked for.
_MANY_UNKNOWN = 0.05
_MAX_EXAMPLE_DOCUMENTS = 20


@dataclasses.dataclass(frozen=True)
class TextSource:
    """One source of documents: the only one of a run, or an entry of its mixture.

    Attributes:
      name: for metrics and messages.
      weight: relative number of its sequences in the first stage that uses it.
      train: the documents to train on.
      eval: the documents from which the evaluation set is taken; the same object as `train` if there are no separate
        files.
    """

    name: str
    weight: float
    train: Source
    eval: Source


@dataclasses.dataclass(frozen=True)
class ExtraEvalRows:
    """Evaluation sequences for a length or a source that a later stage introduces.

    Attributes:
      name: the metric is eval/<name>/loss.
      rows_RxL: int32, the sequences.
      first_stage: index of the first stage in which they are evaluated.
    """

    name: str
    rows_RxL: np.ndarray
    first_stage: int


@dataclasses.dataclass(frozen=True)
class TextPipeline:
    """The text of a run: what it is trained and evaluated on.

    Attributes:
      sources: one, or the entries of a mixture; those of later stages come last.
      tokenizer: text to ids.
      eval_rows_RxL: int32, the evaluation sequences, source by source, the same on every process and in every stage.
      eval_counts: name of a source -> number of its evaluation sequences.
      extra_eval_rows: further evaluation sequences, for later stages.
      weights: name -> weight of the sources of the first stage.
      held_out: the documents that have tokens in the evaluation set; they are not trained on.
      stream_options: arguments of every RowStream.
      skip_steps: (first, last) numbers of batches to skip.
    """

    sources: tuple[TextSource, ...]
    tokenizer: Tokenizer
    eval_rows_RxL: np.ndarray
    eval_counts: Mapping[str, int]
    extra_eval_rows: tuple[ExtraEvalRows, ...]
    weights: Mapping[str, float]
    held_out: pa.Array
    stream_options: Mapping[str, Any]
    skip_steps: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """The names of the sources, with the fractions of a mixture in the first stage."""
        if len(self.sources) == 1:
            return self.sources[0].train.name
        total, weights = sum(self.weights.values()), self.weights
        return ", ".join(f"{source.name} ({weights.get(source.name, 0) / total:.1%})" for source in self.sources)

    def batches(
        self, *, process_index: int, process_count: int, batch_rows: int, shapes: Sequence[BatchShape] = ()
    ) -> BatchStream:
        """Returns the training batches of a process, from the first one.

        Args:
          process_index, process_count: which of the run's processes.
          batch_rows: rows per batch of this process.
          shapes: batches of the run's stages; none for a single stage of `batch_rows` rows.
        """
        length = self.stream_options["max_seq_length"]
        shapes = shapes or (BatchShape(0, batch_rows, length, self.weights),)
        streams: dict[str, RowStream | synthetic.SyntheticRows] = {}
        for source in self.sources:
            if source.train is synthetic.SOURCE:
                streams[source.name] = synthetic.SyntheticRows(
                    self.tokenizer,
                    seed=self.stream_options["seed"],
                    max_seq_length=length,
                    process_index=process_index,
                )
                continue
            streams[source.name] = RowStream(
                source.train,
                self.tokenizer,
                batch_rows=batch_rows,
                held_out=self.held_out,
                process_index=process_index,
                process_count=process_count,
                **self.stream_options,
            )
        return BatchStream(
            streams,
            shapes=shapes,
            skip_steps=self.skip_steps,
            process_index=process_index,
            process_count=process_count,
        )

    def describe_assignment(self, batches: BatchStream) -> Iterator[str]:
        """Yields for each source which shards a process will read until the end of the epoch, one line each."""
        for source in self.sources:
            slices = batches.streams[source.name].remaining()
            shards = list(dict.fromkeys(part.shard for part in slices))
            names = [source.train.shard_name(shard) for shard in shards[:_MAX_NAMED_SHARDS]]
            if len(shards) > _MAX_NAMED_SHARDS:
                names.append(f"and {len(shards) - _MAX_NAMED_SHARDS} more")
            is_complete = all(part.start == 0 and part.stride == 1 for part in slices)
            rows = "" if is_complete else ", some rows of them"
            yield f"{len(shards)} of {source.train.num_shards} shards of {source.train.name}{rows}: {', '.join(names)}"

    def shard_name(self, source_name: str, shard: int) -> str:
        """Returns the name of a shard of a source."""
        return next(source for source in self.sources if source.name == source_name).train.shard_name(shard)


def open_sources(data: DataSettings, *later_stages: DataSettings) -> tuple[TextSource, ...]:
    """Opens the only source of a run, or those of its mixture, then those that later stages introduce.

    Raises:
      UserError: a source does not exist, cannot be read or is empty.
    """
    if data.is_synthetic:
        return (TextSource("text", 1.0, synthetic.SOURCE, synthetic.SOURCE),)
    entries = data.mixture_entries or (MixtureEntry("text", 1.0, {"dataset_name": data.dataset_name}),)
    sources = {entry.name: _open_entry(data, entry) for entry in entries}
    total = sum(entry.weight for entry in entries)
    for stage in later_stages:
        scale = total / sum(source_weights(stage).values())
        for entry in stage.mixture_entries:
            if entry.name not in sources:
                scaled = dataclasses.replace(entry, weight=entry.weight * scale)
                sources[entry.name] = _open_entry(stage, scaled)
    return tuple(sources.values())


def _open_entry(data: DataSettings, entry: MixtureEntry) -> TextSource:
    options = {
        "dataset_name": entry.name,
        "dataset_config_name": data.dataset_config_name,
        "data_files": data.data_files,
        "eval_data_files": data.eval_data_files,
        "split": data.split,
        "text_column_name": data.text_column_name,
    } | dict(entry.options)
    eval_data_files = options.pop("eval_data_files")
    open_with = functools.partial(
        open_source, cache_dir=data.cache_dir, retry_policy=retry_policy(data), min_shards=data.min_shards
    )
    train = open_with(**options)
    if eval_data_files is None:
        return TextSource(entry.name, entry.weight, train, train)
    try:
        evaluation = open_with(**options | {"data_files": eval_data_files})
    except UserError as error:
        raise UserError(str(error).replace("data.data_files=", "data.eval_data_files=", 1)) from None
    return TextSource(entry.name, entry.weight, train, evaluation)


def retry_policy(data: DataSettings) -> RetryPolicy:
    """Returns how long failing reads over a network are retried."""
    return RetryPolicy(deadline_seconds=data.network_deadline_seconds, timeout_seconds=data.network_timeout_seconds)


def open_tokenizer(
    settings: RunSettings, text_sources: tuple[TextSource, ...], *, saved_tokenizer: str | None, model_type: str
) -> Tokenizer:
    """Loads the tokenizer of a run, or trains one on some documents if the settings name none.

    Args:
      settings: what to load or train.
      text_sources: documents to train a tokenizer on.
      saved_tokenizer: directory of the tokenizer in the work directory; None for a run that has not saved one.
      model_type: the model family to train a tokenizer for.
    """
    options, stages = settings.tokenizer, settings_of_stages(settings)
    marks_words = any(stage.masking.needs_words for stage in stages)
    name = saved_tokenizer or options.tokenizer_name or settings.model.model_name_or_path
    if name:
        return load_tokenizer(
            name,
            cache_dir=settings.data.cache_dir,
            backend=options.backend,
            marks_words=marks_words,
        )
    length = max(stage.data.max_seq_length for stage in stages)
    if text_sources[0].train is synthetic.SOURCE:
        return synthetic.tokenizer(vocab_size=options.vocab_size, max_seq_length=length)
    return train_tokenizer(
        options,
        text_sources,
        eval_rows=settings.data.eval_rows,
        max_seq_length=length,
        model_type=model_type,
        marks_words=marks_words,
    )


def train_tokenizer(
    options: TokenizerSettings,
    text_sources: tuple[TextSource, ...],
    *,
    eval_rows: str,
    max_seq_length: int,
    model_type: str,
    marks_words: bool = False,
) -> Tokenizer:
    """Trains a tokenizer for a model family on documents of the sources, see spread.py."""
    # Imported here: it imports transformers, which takes a second.
    from mlm.data.train_tokenizer import train_tokenizer as train_on_texts

    algorithm = resolve_algorithm(options.algorithm, model_type=model_type)
    names = ", ".join(source.train.name for source in text_sources)
    logging.info(
        "training a %s tokenizer of %d entries on %d documents of %s",
        algorithm,
        options.vocab_size,
        options.train_documents,
        names,
    )
    counts = _proportional_counts(options.train_documents, {source.name: source.weight for source in text_sources})
    documents = functools.partial(_documents_for_tokenizer, eval_rows=eval_rows)
    return train_on_texts(
        (text for source in text_sources for text in documents(source.train, counts[source.name])),
        vocab_size=options.vocab_size,
        max_seq_length=max_seq_length,
        algorithm=algorithm,
        model_type=model_type,
        lowercase=options.lowercase,
        backend=options.backend,
        marks_words=marks_words,
    )


def open_text(
    data: DataSettings,
    text_sources: tuple[TextSource, ...],
    tokenizer: Tokenizer,
    *,
    seed: int,
    later_stages: Sequence[DataSettings] = (),
) -> TextPipeline:
    """Reads the evaluation set, from each source in proportion to its weight, and those of later stages.

    Args:
      data: settings of the first stage.
      text_sources: the sources of all stages.
      tokenizer: text to ids.
      seed: seed for the order of the text.
      later_stages: the settings of the other stages.

    Raises:
      UserError: a source has too little text, or cannot be read.
    """
    sources = {source.name: source for source in text_sources}
    weights = source_weights(data)

    def read(name: str, count: int, length: int) -> EvalSet:
        return _read_eval_set(data, sources[name], tokenizer, count=count, length=length, seed=seed)

    counts = _proportional_counts(data.num_eval_samples, weights)
    eval_sets = {name: read(name, count, data.max_seq_length) for name, count in counts.items()}
    eval_rows_RxL = np.concatenate([part.sequences for part in eval_sets.values()])
    held_out = [part.documents for part in eval_sets.values()]
    _check_unknown_tokens(
        eval_rows_RxL, pa.concat_arrays(held_out).unique(), tokenizer, max_fraction=data.max_unknown_fraction
    )
    extra: list[ExtraEvalRows] = []
    lengths, names = {data.max_seq_length}, set(weights)
    for index, stage in enumerate(later_stages, start=1):
        counts, length = _proportional_counts(data.num_eval_samples, source_weights(stage)), stage.max_seq_length
        parts = {name: [read(name, counts[name], data.max_seq_length)] for name in counts if name not in names}
        first_stages = dict.fromkeys(parts, 0)
        if length not in lengths:
            # As many tokens as of the first length.
            num_sequences = -(-data.num_eval_samples * data.max_seq_length // length)
            counts = _proportional_counts(num_sequences, source_weights(stage))
            parts[f"length_{length}"] = [read(name, count, length) for name, count in counts.items()]
            first_stages[f"length_{length}"] = index
        for name, some in parts.items():
            extra.append(ExtraEvalRows(name, np.concatenate([part.sequences for part in some]), first_stages[name]))
            held_out += [part.documents for part in some]
        lengths.add(length)
        names.update(counts)
    return TextPipeline(
        sources=text_sources,
        tokenizer=tokenizer,
        eval_rows_RxL=eval_rows_RxL,
        eval_counts={name: len(part.sequences) for name, part in eval_sets.items()},
        extra_eval_rows=tuple(extra),
        weights=weights,
        held_out=pa.concat_arrays(held_out).unique(),
        stream_options={
            "seed": seed,
            "max_seq_length": data.max_seq_length,
            "packing": data.packing,
            "shuffle_buffer_size": data.shuffle_buffer_size,
            "first_shuffle_buffer_size": data.first_shuffle_buffer_size,
            "shuffle_buffer_bytes": data.shuffle_buffer_bytes,
            "shuffle_piece_bytes": data.shuffle_piece_bytes,
            "interleave_shards": data.interleave_shards,
            "max_failed_shards": data.max_failed_shards,
            "accept_changed_files": data.accept_changed_files,
        },
        skip_steps=data.skip_steps,
    )


def _read_eval_set(
    data: DataSettings, source: TextSource, tokenizer: Tokenizer, *, count: int, length: int, seed: int
) -> EvalSet:
    """Reads `count` evaluation sequences of a source."""
    if source.train is synthetic.SOURCE:
        rows = synthetic.draw_rows(count, length=length, tokenizer=tokenizer, seed=(seed, 0))
        return EvalSet(rows, pa.array([], pa.large_string()))
    return read_eval_set(
        source.eval,
        tokenizer,
        num_sequences=count,
        max_seq_length=length,
        packing=data.packing,
        eval_rows=data.eval_rows,
        allow_fewer=source.eval is not source.train,
    )


def _check_unknown_tokens(
    eval_rows_RxL: np.ndarray, documents: pa.Array, tokenizer: Tokenizer, *, max_fraction: float
) -> None:
    """Warns if the tokenizer does not know many of the evaluation set's words.

    Raises:
      UserError: it knows too few, or the evaluation set has no token that can be predicted.
    """
    if not np.isin(without_word_starts(eval_rows_RxL), tokenizer.special_ids, invert=True).any():
        raise UserError(
            f"the tokenizer {tokenizer.name!r}: the evaluation sequences have unknown and special tokens only, so "
            "there is nothing to predict; choose a tokenizer for the language of the text, or train one"
        )
    fraction = tokenizer.unknown_fraction(eval_rows_RxL)
    if fraction <= _MANY_UNKNOWN:
        return
    examples = ", ".join(map(repr, tokenizer.unknown_words(documents.slice(0, _MAX_EXAMPLE_DOCUMENTS).to_pylist())))
    if fraction > max_fraction:
        raise UserError(
            f"data.max_unknown_fraction={max_fraction}: {fraction:.1%} of the evaluation sequences' tokens are unknown "
            f"to the tokenizer {tokenizer.name!r}, such as {examples}; choose a tokenizer for the language, or train "
            "one"
        )
    logging.warning(
        "%.1f %% of the evaluation sequences' tokens are unknown to the tokenizer %s, such as %s",
        100 * fraction,
        tokenizer.name,
        examples,
    )


def _proportional_counts(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divides `total` among the sources in proportion to their weights, at least 1 for each."""
    values = np.array(list(weights.values()))
    ends = np.rint(total * np.cumsum(values) / values.sum()).astype(int)
    counts = np.maximum(np.diff(ends, prepend=0), 1)
    return {name: int(count) for name, count in zip(weights, counts, strict=True)}


def _documents_for_tokenizer(source: Source, num_documents: int, *, eval_rows: str) -> Iterator[str]:
    """Yields non-null documents to train a tokenizer on."""
    for texts, _ in read_units(
        source,
        num_documents,
        units_per_row=1,
        eval_rows=eval_rows,
        is_used=lambda texts: np.asarray(texts.is_valid()),
        pack=lambda texts: PackedChunk(np.arange(len(texts)), np.arange(len(texts) + 1)),
    ):
        yield from texts.to_pylist()


def first_documents(source: Source, num_documents: int) -> Iterator[str]:
    """Yields the first non-null documents, in source order."""
    remaining = num_documents
    for shard in range(source.num_shards):
        for column in source.read(shard):
            texts = column.drop_null().slice(0, remaining)
            yield from texts.to_pylist()
            remaining -= len(texts)
            if remaining <= 0:
                return
