"""From a config to text: sources, tokenizer, evaluation rows, and any process's batches."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from absl import logging

from mlm.data import synthetic
from mlm.data import tokenizer as tokenizers
from mlm.data.held_out import EvalSet, read_eval_set
from mlm.data.mixture import BatchStream
from mlm.data.sources import source as sources
from mlm.data.sources.retry import RetryPolicy
from mlm.data.stream import RowStream
from mlm.data.tokenizer import Tokenizer
from mlm.data.train_tokenizer import chosen_algorithm
from mlm.data.train_tokenizer import train_tokenizer as train_on_texts
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings

# Of a process's share, in the log.
_SHARDS_NAMED = 4


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Where documents come from.

    Attributes:
      name: for metrics and messages.
      weight: its share of the rows, before all weights are divided by their sum.
      train: the documents to train on.
      evaluation: the documents whose head is evaluated on.
    """

    name: str
    weight: float
    train: sources.Source
    evaluation: sources.Source


@dataclasses.dataclass(frozen=True)
class Text:
    """What is trained and evaluated on.

    Attributes:
      sources: one, or those of a mixture.
      tokenizer: text to ids.
      eval_rows_RxL: int32, the evaluation set, the same on every process; the sources' rows one after the other.
      eval_counts: name -> its rows.
      held_out: the texts any part of which is in the evaluation set.
      stream_options: of every RowStream.
      skip_steps: batches to leave out.
      batch_rows: rows of an update on this process.
    """

    sources: tuple[TextSource, ...]
    tokenizer: Tokenizer
    eval_rows_RxL: np.ndarray
    eval_counts: Mapping[str, int]
    held_out: pa.Array
    stream_options: Mapping[str, Any]
    skip_steps: tuple[tuple[int, int], ...]
    batch_rows: int

    @property
    def name(self) -> str:
        """What the text is, for people."""
        if len(self.sources) == 1:
            return self.sources[0].train.name
        total = sum(source.weight for source in self.sources)
        return ", ".join(f"{source.name} ({source.weight / total:.1%})" for source in self.sources)

    def batches(
        self, *, process_index: int | None = None, process_count: int | None = None, batch_rows: int | None = None
    ) -> BatchStream:
        """The training rows of a process, from their beginning; this process's where none is named."""
        process_index = jax.process_index() if process_index is None else process_index
        process_count = process_count or jax.process_count()
        batch_rows = batch_rows or self.batch_rows
        if self.sources[0].train is synthetic.SOURCE:
            rows = synthetic.SyntheticRows(
                self.tokenizer,
                seed=self.stream_options["seed"],
                max_seq_length=self.stream_options["max_seq_length"],
                process_index=process_index,
            )
            weight = {self.sources[0].name: 1.0}
            return BatchStream({self.sources[0].name: rows}, weights=weight, batch_rows=batch_rows)
        streams = {
            source.name: RowStream(
                source.train,
                self.tokenizer,
                # A source's share of a batch may be small: it must have a row.
                batch_rows=batch_rows if len(self.sources) == 1 else 1,
                held_out=self.held_out,
                process_index=process_index,
                process_count=process_count,
                **self.stream_options,
            )
            for source in self.sources
        }
        return BatchStream(
            streams,
            weights={source.name: source.weight for source in self.sources},
            batch_rows=batch_rows,
            skip_steps=self.skip_steps,
            process_index=process_index,
            process_count=process_count,
        )

    def describe_shares(self, batches: BatchStream) -> Iterator[str]:
        """What a process reads of each source before its next epoch, a line each."""
        for source in self.sources:
            pieces = batches.streams[source.name].remaining()
            shards = list(dict.fromkeys(piece.shard for piece in pieces))
            names = [source.train.shard_name(shard) for shard in shards[:_SHARDS_NAMED]]
            if len(shards) > _SHARDS_NAMED:
                names.append(f"and {len(shards) - _SHARDS_NAMED} more")
            part = "" if all(piece.start == 0 and piece.stride == 1 for piece in pieces) else ", some rows of them"
            yield f"{len(shards)} of {source.train.num_shards} shards of {source.train.name}{part}: {', '.join(names)}"

    def shard_name(self, source: str, shard: int) -> str:
        """The name of a shard of the source of this name."""
        return next(s for s in self.sources if s.name == source).train.shard_name(shard)


def open_sources(settings: RunSettings) -> tuple[TextSource, ...]:
    """Opens what `data` names.

    Raises:
      UserError: it is not there, cannot be read, or `data.mixture` is not well formed.
    """
    own = {
        "dataset_name": settings.data.dataset_name,
        "dataset_config_name": settings.data.dataset_config_name,
        "data_files": settings.data.data_files,
        "eval_data_files": settings.data.eval_data_files,
        "split": settings.data.split,
        "text_column_name": settings.data.text_column_name,
    }
    if not settings.data.mixture:
        if settings.data.is_synthetic:
            return (TextSource("text", 1.0, synthetic.SOURCE, synthetic.SOURCE),)
        train = _open(settings, own)
        evaluation = train
        if own["eval_data_files"] is not None:
            evaluation = _open(settings, own | {"data_files": own["eval_data_files"]})
        return (TextSource("text", 1.0, train, evaluation),)
    found = []
    for entry in settings.data.mixture_entries:
        options = own | {"dataset_name": entry.name} | dict(entry.options)
        train = evaluation = _open(settings, options)
        if options["eval_data_files"] is not None:
            evaluation = _open(settings, options | {"data_files": options["eval_data_files"]})
        found.append(TextSource(entry.name, entry.weight, train, evaluation))
    return tuple(found)


def _open(settings: RunSettings, options: Mapping[str, Any]) -> sources.Source:
    return sources.open_source(
        dataset_name=options["dataset_name"],
        dataset_config_name=options["dataset_config_name"],
        data_files=options["data_files"],
        split=options["split"],
        text_column_name=options["text_column_name"],
        cache_dir=settings.data.cache_dir or "",
        retry_policy=retry_policy(settings),
    )


def retry_policy(settings: RunSettings) -> RetryPolicy:
    """What `data` says of the network."""
    return RetryPolicy(
        deadline_seconds=settings.data.network_deadline_seconds, timeout_seconds=settings.data.network_timeout_seconds
    )


def open_tokenizer(
    settings: RunSettings, workdir: WorkDir, text_sources: tuple[TextSource, ...], *, model_type: str
) -> Tokenizer:
    """The run's own once it has one, else the named one, else one trained on the head of the text for `model_type`."""
    options = settings.tokenizer
    name = workdir.tokenizer if workdir.has_tokenizer() else options.tokenizer_name
    name = name or settings.model.model_name_or_path
    if name:
        return tokenizers.load_tokenizer(
            name,
            cache_dir=settings.data.cache_dir or "",
            use_fast_tokenizer=options.use_fast_tokenizer,
            backend=options.backend,
        )
    if text_sources[0].train is synthetic.SOURCE:
        return synthetic.tokenizer(vocab_size=options.vocab_size, max_seq_length=settings.data.max_seq_length)
    return train_tokenizer(settings, text_sources, model_type=model_type)


def train_tokenizer(settings: RunSettings, text_sources: tuple[TextSource, ...], *, model_type: str) -> Tokenizer:
    """Trains a tokenizer for models of a family on the head of the text."""
    options = settings.tokenizer
    algorithm = chosen_algorithm(options.algorithm, model_type=model_type)
    names = ", ".join(source.train.name for source in text_sources)
    logging.info("training a %s tokenizer of %d entries on the head of %s", algorithm, options.vocab_size, names)
    shares = _shares(options.train_documents, text_sources)
    return train_on_texts(
        (text for source in text_sources for text in head(source.train, shares[source.name])),
        vocab_size=options.vocab_size,
        max_seq_length=settings.data.max_seq_length,
        algorithm=algorithm,
        model_type=model_type,
        lowercase=options.lowercase,
        backend=options.backend,
    )


def open_text(settings: RunSettings, text_sources: tuple[TextSource, ...], tokenizer: Tokenizer) -> Text:
    """Reads the evaluation rows: of a mixture each source's share of them, and keeps their documents out of all."""
    shares = _shares(settings.data.num_eval_samples, text_sources)
    rows: list[EvalSet] = []
    for source in text_sources:
        if source.train is synthetic.SOURCE:
            drawn = synthetic.draw_rows(
                shares[source.name], length=settings.data.max_seq_length, tokenizer=tokenizer, seed=(settings.seed, 0)
            )
            rows.append(EvalSet(drawn, pa.array([], pa.large_string())))
            continue
        rows.append(
            read_eval_set(
                source.evaluation,
                tokenizer,
                num_sequences=shares[source.name],
                max_seq_length=settings.data.max_seq_length,
                packing=settings.data.packing,
                allow_fewer=source.evaluation is not source.train,
            )
        )
    return Text(
        sources=text_sources,
        tokenizer=tokenizer,
        eval_rows_RxL=np.concatenate([part.sequences for part in rows]),
        eval_counts={source.name: len(part.sequences) for source, part in zip(text_sources, rows, strict=True)},
        held_out=pa.concat_arrays([part.documents for part in rows]).unique(),
        stream_options={
            "seed": settings.seed,
            "max_seq_length": settings.data.max_seq_length,
            "packing": settings.data.packing,
            "shuffle_buffer_size": settings.data.shuffle_buffer_size,
            "max_failed_shards": settings.data.max_failed_shards,
        },
        skip_steps=settings.data.skip_steps,
        batch_rows=batch_rows(settings),
    )


def batch_rows(settings: RunSettings) -> int:
    """Rows of an update on this process; of the smallest batch while it is to be found which fits."""
    rows = max(1, settings.per_device_train_batch_size)
    return rows * settings.gradient_accumulation_steps * jax.local_device_count()


def _shares(total: int, text_sources: tuple[TextSource, ...]) -> dict[str, int]:
    """How many of `total` each source gets by its weight: all in all `total`, but one each at least."""
    weights = np.array([source.weight for source in text_sources])
    ends = np.rint(total * np.cumsum(weights) / weights.sum()).astype(int)
    counts = np.maximum(np.diff(ends, prepend=0), 1)
    return {source.name: int(count) for source, count in zip(text_sources, counts, strict=True)}


def head(source: sources.Source, documents: int) -> Iterator[str]:
    """The first documents in source order, nulls left out."""
    left = documents
    for shard in range(source.num_shards):
        for column in source.read(shard):
            texts = column.drop_null().slice(0, left)
            yield from texts.to_pylist()
            left -= len(texts)
            if left <= 0:
                return
