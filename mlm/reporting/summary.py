"""What a run says of itself: in the log when it begins, on the terminal when it is finished."""

import os
import re
import shlex

import jax
from absl import logging
from clu import parameter_overview

from mlm import build, steps
from mlm.export.fill_mask import MaskPrediction, format_predictions
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings


def log_run_summary(settings: RunSettings, run: build.Components, state: steps.TrainState, start: int) -> None:
    """Logs the model, the data and the devices; each process, which text it reads."""
    for line in run.text.describe_shares(run.stream):
        logging.info("process %d of %d reads %s", jax.process_index(), jax.process_count(), line)
    if jax.process_index() > 0:
        return
    # Shapes tell all there is to print: the parameters themselves can stay where they are.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.params)
    overview = parameter_overview.get_parameter_overview(shapes, include_stats=False)
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * jax.device_count()
    device = jax.devices()[0]
    logging.info("parameters of the %s encoder:\n%s", run.encoder.model_type, overview)
    logging.info("text: %s, tokenized by %s", run.text.name, run.tokenizer.name)
    logging.info(
        "an update: %s rows of %d tokens on %d %s device%s of %d process%s",
        f"{rows:,}",
        settings.data.max_seq_length,
        jax.device_count(),
        device.device_kind,
        "s" * (jax.device_count() > 1),
        jax.process_count(),
        "es" * (jax.process_count() > 1),
    )
    if start:
        logging.info("going on after update %d", start)


def warn_batch_size_changed(place: WorkDir, run: build.Components) -> None:
    """An update's rows follow the number of devices: a run that goes on with others is not what it was."""
    layout = place.last_topology()
    rows = jax.process_count() * run.text.batch_rows
    if layout is not None and layout[0] * layout[1] != rows:
        logging.warning(
            "an update had %d rows in this run so far and has %d from now on, for the devices are not as many; "
            "per_device_train_batch_size or gradient_accumulation_steps can make up for it in a new run",
            layout[0] * layout[1],
            rows,
        )


def show(settings: RunSettings, place: WorkDir, predictions: list[MaskPrediction], command: str) -> None:
    """Prints what the finished model says, and what to do next."""
    if predictions:
        print("\nThe model's five best fillings:\n")
        print(format_predictions(predictions))
    longer = re.sub(r" --config\.num_train_steps[= ]\S+", "", command)
    path = place.raw_path
    model = os.path.join(path, "model")
    download = place.storage.download_command("model")
    copied = f"; after: {download}" if download else ""
    print(f"""
Model      {model}
Curves     {os.path.join(model, "curves.png")}
Look at    tensorboard --logdir {shlex.quote(path)}
Resume     {longer} --config.num_train_steps={2 * settings.num_train_steps}
Use        from transformers import pipeline  # needs PyTorch: pip install torch{copied}
           pipeline("fill-mask", model={"model" if download else model!r})
Or         python main.py --mode=fill_mask --workdir={shlex.quote(path)}
""")
