"""Writes metrics to `metrics.jsonl` and to TensorBoard."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar_summary
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter

from mlm.errors import one_line
from mlm.reporting.curves import read_metrics
from mlm.reporting.without_keras import metric_writers, tf
from mlm.run.workdir import WorkDir

# Charts of TensorBoard's page "custom scalars": title -> tags, as regular expressions.
_CHARTS = {
    "Loss": ["train/loss", "eval/loss", "eval/unigram_loss", "eval/.+/loss"],  # The last: eval/<source>/loss.
    "Accuracy": ["train/accuracy", "eval/accuracy"],
    "Probes and minimal pairs": ["probe/.+/accuracy", "pairs/.+/accuracy"],
    "Milliseconds per step": [f"perf/{part}_ms" for part in ("step", "device", "input_wait", "transfer", "host")],
    "Pauses in milliseconds": [f"perf/{part}_ms" for part in ("evaluation", "probes", "save", "export")],
}
# Config keys without a column on TensorBoard's page "hparams": they do not affect what the model learns.
_NO_HPARAMS = (
    "checkpoint.", "data.cache_dir", "data.max_failed_shards", "data.network_", "data.num_eval_samples",
    "data.prefetch_batches", "data.split", "data.text_column_name", "eval.", "eval_steps", "export.", "hub.",
    "logging_steps", "max_hours", "per_device_eval_batch_size", "profile.", "report.", "save_steps",
    "tokenizer.backend", "tokenizer.use_fast_tokenizer",
)  # fmt: skip
# Metrics with a column there.
_HPARAMS_METRICS = ("eval/loss", "eval/accuracy", "eval/perplexity", "train/loss", "perf/tokens_per_second")


class JsonLinesWriter(metric_writers.MetricWriter):
    """Appends scalars to a file, one line per step: {"step": 250, "train/loss": 7.31, ...}.

    The scalars of a step may come in several calls. Lines are written by `flush`; the last one is rewritten if more
    scalars of its step come after that.
    """

    def __init__(self, path: str, *, last_step: int):
        """Removes lines after `last_step`: an interrupted run wrote them, and they will be written again."""
        lines = [line for line in read_metrics(path) if line["step"] <= last_step]
        partial = path + ".tmp"
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(map(_json_line, lines))
        os.replace(partial, path)
        self._path = path
        # Lines to write. The last one of the file is among them: an interrupted evaluation may add to it.
        self._lines: list[dict[str, Any]] = lines[-1:]
        # Size of the file without those lines.
        self._start = os.path.getsize(path) - sum(map(len, map(_json_line, self._lines)))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds to the line of `step`."""
        if not self._lines or self._lines[-1]["step"] != step:
            self._lines.append({"step": step})
        self._lines[-1] |= {name: np.asarray(value).item() for name, value in scalars.items()}

    def flush(self) -> None:
        """Writes the lines to the disk. If that fails, the next call writes them."""
        if not self._lines:
            return
        *earlier, last = [_json_line(line).encode() for line in self._lines]
        with open(self._path, "r+b") as file:
            file.seek(self._start)
            file.write(b"".join([*earlier, last]))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._start += sum(map(len, earlier))
        del self._lines[:-1]

    def close(self) -> None:
        """Flushes."""
        self.flush()

    def write_summaries(self, *args: Any, **kwargs: Any) -> None:
        """Ignored: only TensorBoard shows anything but scalars."""

    write_images = write_videos = write_audios = write_texts = write_histograms = write_hparams = write_summaries


def _json_line(line: Mapping[str, Any]) -> str:
    """Returns a line of JSON, which has no NaN and no infinity: null instead."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()
    }
    return json.dumps(values, allow_nan=False) + "\n"


@contextlib.contextmanager
def _log_failure() -> Iterator[None]:
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        logging.warning("metrics could not be written: %s", one_line(error))


class _FailureLoggingWriter(metric_writers.MultiWriter):
    """Logs failures instead of raising them: a full disk must not end the training."""

    write_scalars = _log_failure()(metric_writers.MultiWriter.write_scalars)
    write_texts = _log_failure()(metric_writers.MultiWriter.write_texts)
    write_hparams = _log_failure()(metric_writers.MultiWriter.write_hparams)
    flush = _log_failure()(metric_writers.MultiWriter.flush)
    close = _log_failure()(metric_writers.MultiWriter.close)


def create_writer(workdir: WorkDir, *, last_step: int) -> metric_writers.MetricWriter:
    """Returns a writer that resumes after `last_step`; on other processes than the first it writes nothing."""
    if jax.process_index() > 0:
        return metric_writers.MultiWriter([])
    _hide_steps_after(last_step, workdir.path)
    return _FailureLoggingWriter(
        [JsonLinesWriter(workdir.metrics, last_step=last_step), metric_writers.SummaryWriter(workdir.path)]
    )


def _hide_steps_after(step: int, logdir: str) -> None:
    """Makes TensorBoard forget what an interrupted run wrote after `step`: it will be written again.

    Its Python loader ignores the first such event of a directory, so a new run writes one, too.
    """
    now = time.time()
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    # TensorBoard reads files in the order of their names: this one before the scalars that start in the same second.
    with open(os.path.join(logdir, f"events.out.tfevents.{int(now):010d}.0.start"), "wb") as file:
        writer = RecordWriter(file)
        for event in ({"file_version": "brain.Event:2"}, {"step": step + 1, "session_log": start}):
            writer.write(event_pb2.Event(wall_time=now, **event).SerializeToString())
        writer.flush()


def write_config(writer: metric_writers.MetricWriter, logdir: str, config: Mapping[str, Any]) -> None:
    """Writes the config, with dotted keys, to TensorBoard, and which metrics share a chart."""
    lines = "\n".join(f"{key} = {value!r}" for key, value in config.items())
    writer.write_texts(0, {"config": f"```\n{lines}\n```"})
    hparams = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in config.items()
        if value not in (None, (), []) and not key.startswith(_NO_HPARAMS)
    }
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
        for title, tags in _CHARTS.items()
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title="Training and evaluation", chart=charts)])
    columns = hparams_summary.hparams_config_pb(
        hparams=[hparams_summary.HParam(key) for key in hparams],
        metrics=[hparams_summary.Metric(tag) for tag in _HPARAMS_METRICS],
    )
    layout_writer = EventFileWriter(logdir, filename_suffix=".layout")
    for proto in (custom_scalar_summary.pb(layout), columns):
        summary = summary_pb2.Summary.FromString(proto.SerializeToString())
        layout_writer.add_event(event_pb2.Event(wall_time=time.time(), summary=summary))
    layout_writer.close()
    writer.write_hparams(hparams)
