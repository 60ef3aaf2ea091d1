"""--mode=train_tokenizer: trains the tokenizer of a config and nothing else."""

import os

from absl import logging

from mlm import build
from mlm.data import pipeline
from mlm.errors import UserError
from mlm.settings import RunSettings


def run(settings: RunSettings, workdir: None, *, output: str) -> None:
    """Trains the config's tokenizer on the first documents of its text and writes it to `output`.

    Args:
      settings: those of the run that will use it.
      workdir: unused.
      output: a directory that does not exist or is empty.

    Raises:
      UserError: the text does not allow it, or `output` is not empty.
    """
    if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise UserError(f"--output={output}: is not empty; name another directory")
    copied, _ = build.load_model(settings)
    model_type = copied.model_type if copied is not None else settings.model.model_type
    tokenizer = pipeline.train_tokenizer(settings, pipeline.open_sources(settings), model_type=model_type)
    tokenizer.save(output)
    name = f"--config.tokenizer.tokenizer_name={output}"
    logging.info("wrote a tokenizer with %d entries to %s; use it with %s", tokenizer.num_ids, output, name)
