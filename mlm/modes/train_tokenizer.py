"""--mode=train_tokenizer: trains the tokenizer of a config and nothing else."""

import os

from absl import logging

from mlm import build
from mlm.data import pipeline
from mlm.errors import UserError
from mlm.settings import RunSettings
from mlm.stages import settings_of_stages


def run(settings: RunSettings, workdir: None, *, output: str) -> None:
    """Trains the tokenizer of the settings on documents of their text and writes it to `output`.

    Args:
      settings: the settings of the run that will use the tokenizer.
      workdir: unused.
      output: a directory that does not exist or is empty.

    Raises:
      UserError: a source cannot be read, the options do not suit the text, or `output` is not empty.
    """
    output = os.path.expanduser(output)
    if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise UserError(f"--output={output}: exists and is not an empty directory; name another directory")
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be created ({error.strerror}); name another directory") from None
    stages = settings_of_stages(settings)
    copied, _ = build.load_pretrained(settings)
    tokenizer = pipeline.train_tokenizer(
        settings.tokenizer,
        pipeline.open_sources(*(stage.data for stage in stages)),
        eval_rows=settings.data.eval_rows,
        max_seq_length=max(stage.data.max_seq_length for stage in stages),
        model_type=copied.model_type if copied is not None else settings.model.model_type,
    )
    tokenizer.save(output)
    flag = f"--config.tokenizer.tokenizer_name={output}"
    logging.info("a tokenizer of %d entries is in %s; use it with %s", tokenizer.num_ids, output, flag)
