"""The files that metrics go to: `metrics.jsonl`, and tensorboard's."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from absl import logging
from clu import metric_writers
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar_summary
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from mlm.errors import one_line
from mlm.reporting.curves import read_metrics
from mlm.run.workdir import WorkDir


class JsonLinesWriter(metric_writers.MetricWriter):
    """Appends scalars to a file, one line a step: {"step": 250, "train/loss": 7.31, ...}.

    Scalars of one step may come in several calls; lines are written at `flush`, and the last one is written over when
    more come after that.
    """

    def __init__(self, path: str, *, last_step: int):
        """Goes on after `last_step`: later lines, of an interrupted run, are dropped, for they will come again."""
        lines = [line for line in read_metrics(path) if line["step"] <= last_step]
        partial = path + ".tmp"
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        os.replace(partial, path)
        self._path = path
        # Not yet written, but for the last: it may be added to, also by an evaluation that was cut off.
        self._lines: list[dict[str, Any]] = lines[-1:]
        # The file's bytes before those lines.
        self._start = os.path.getsize(path) - sum(len(json.dumps(line)) + 1 for line in self._lines)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds to the line of `step`."""
        if not self._lines or self._lines[-1]["step"] != step:
            self._lines.append({"step": step})
        self._lines[-1] |= {name: np.asarray(value).item() for name, value in scalars.items()}

    def flush(self) -> None:
        """Writes the lines, to the disk. They are kept if that fails, for the next time."""
        if not self._lines:
            return
        *earlier, last = [json.dumps(line).encode() + b"\n" for line in self._lines]
        with open(self._path, "r+b") as file:
            file.seek(self._start)
            file.write(b"".join([*earlier, last]))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._start += sum(map(len, earlier))
        del self._lines[:-1]

    def close(self) -> None:
        """Writes what is left."""
        self.flush()

    def write_summaries(self, *args: Any, **kwargs: Any) -> None:
        """Scalars only; tensorboard has the rest."""

    write_images = write_videos = write_audios = write_texts = write_histograms = write_hparams = write_summaries


def create_writer(workdir: WorkDir, *, last_step: int) -> metric_writers.MetricWriter:
    """Tensorboard, log and `metrics.jsonl` on process 0, the log alone on others."""
    if jax.process_index() > 0:
        return metric_writers.create_default_writer(just_logging=True)
    if last_step > 0:
        _forget_after(last_step, workdir.path)
    return metric_writers.MultiWriter(
        [
            JsonLinesWriter(workdir.metrics, last_step=last_step),
            # Not from a thread: what goes wrong there is logged at length, and raised somewhere else.
            metric_writers.create_default_writer(workdir.path, asynchronous=False),
        ]
    )


def _forget_after(step: int, logdir: str) -> None:
    """Tells tensorboard that the run starts again after `step`: what it was shown of later ones will come again."""
    writer = EventFileWriter(logdir, filename_suffix=".restart")
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))
    writer.close()


# What tensorboard's page "custom scalars" puts in one chart: title -> tags, as regular expressions.
_CHARTS = {
    # eval/<source>/loss of a mixture, too.
    "Loss": ["train/loss", "eval/loss", "eval/unigram_loss", "eval/.+/loss"],
    "Accuracy": ["train/accuracy", "eval/accuracy"],
    "Milliseconds of an update": [f"perf/{part}_ms" for part in ("step", "device", "input_wait", "transfer", "host")],
    "Pauses, milliseconds": [f"perf/{part}_ms" for part in ("evaluation", "save", "export")],
}


# What its page "hparams" has no columns for: how a run is kept and told, not what it learns.
NO_HPARAMS = (
    "checkpoint.", "data.cache_dir", "data.max_failed_shards", "data.network_", "data.num_eval_samples",
    "data.prefetch_batches", "data.split", "data.text_column_name", "eval_steps", "export.", "hub.", "logging_steps",
    "per_device_eval_batch_size", "profile.", "report.", "save_steps", "tokenizer.backend",
    "tokenizer.use_fast_tokenizer",
)  # fmt: skip
# And the figures that it has.
_FIGURES = ("eval/loss", "eval/accuracy", "eval/perplexity", "train/loss", "perf/tokens_per_second")


def lay_out(logdir: str, keys: Iterable[str]) -> None:
    """Tells tensorboard which curves belong together, such as those of training and evaluation, and what runs are told
    apart by."""
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
        for title, tags in _CHARTS.items()
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title="Training and evaluation", chart=charts)])
    columns = hparams_summary.hparams_config_pb(
        hparams=[hparams_summary.HParam(key) for key in keys],
        metrics=[hparams_summary.Metric(tag) for tag in _FIGURES],
    )
    writer = EventFileWriter(logdir, filename_suffix=".layout")
    for told in (custom_scalar_summary.pb(layout), columns):
        summary = summary_pb2.Summary.FromString(told.SerializeToString())
        writer.add_event(event_pb2.Event(wall_time=time.time(), summary=summary))
    writer.close()


@contextlib.contextmanager
def tolerant() -> Iterator[None]:
    """A disk that is full must not end the training: metrics that cannot be written are told of, and tried again."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        logging.warning("metrics could not be written: %s", one_line(error))
