"""--mode=embed: vectors of texts, as a NumPy or a parquet file."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from absl import logging

from mlm.downstream.features import encode_texts, extract
from mlm.downstream.tasks import check_texts, read_columns
from mlm.errors import UserError
from mlm.load import load_any
from mlm.modes.score import check_output, one_file
from mlm.settings import RunSettings


def run(
    settings: RunSettings | None,
    workdir_path: str | None,
    *,
    arguments: Sequence[str],
    output: str,
    model: str | None = None,
    step: int | None = None,
    layer: int | None = None,
) -> None:
    """Writes the mean of the hidden states of each text, in the order of the file.

    Args:
      settings: the run's settings; None with `model`.
      workdir_path: the run's work directory; None with `model`.
      arguments: one file, with the column text (or lines of text).
      output: a file that ends in .npy, float32 [texts, hidden_size], or .parquet, with the columns text and embedding.
      model: a model directory or a name on the hub, instead of a run.
      step: the run's checkpoint; None for the model in `model/`.
      layer: 0 for the embeddings, N for the states after layer N; None for the last.

    Raises:
      UserError: the file or the model cannot be used.
    """
    path = one_file(arguments, mode="embed")
    columns = read_columns(path, flag=path)
    if "text" not in columns:
        raise UserError(f"{path}: has no column text, only {', '.join(sorted(columns))}; name the column text")
    check_texts(columns["text"], "text", flag=path)
    check_output(output, path, formats=(".npy", ".parquet"))
    loaded = load_any(settings, workdir_path, model=model, step=step, needs_head=False)
    layers = len(loaded.encoder.layers)
    if layer is not None and not 0 <= layer <= layers:
        raise UserError(f"--layer={layer}: the model has layers 1 to {layers}, and 0 for the embeddings; choose one")
    inputs = encode_texts(loaded.tokenizer, columns["text"], max_length=loaded.max_tokens)
    vectors_NxD = extract(loaded, inputs, label="texts")[layers if layer is None else layer]
    if output.endswith(".npy"):
        np.save(output, vectors_NxD)
    else:
        flat = pa.array(vectors_NxD.ravel())
        table = {"text": columns["text"], "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors_NxD.shape[1])}
        pyarrow.parquet.write_table(pa.table(table), output)
    logging.info("wrote %d vectors of %d numbers to %s", *vectors_NxD.shape, output)
    if inputs.sequences.num_truncated:
        logging.info("%d texts were cut to %d tokens", inputs.sequences.num_truncated, loaded.max_tokens)
