"""Run summaries: logged at the start, printed at the end."""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from clu import parameter_overview

from mlm.export.fill_mask import MaskPrediction, compare_predictions
from mlm.run.workdir import WorkDir
from mlm.stages import Stage


def log_run_summary(
    *,
    model_type: str,
    params: Any,
    text_name: str,
    tokenizer_name: str,
    shards: Iterable[str],
    stages: Sequence[Stage],
    start_step: int,
) -> None:
    """Logs model, text and devices on process 0, and on each process the shards it reads.

    Args:
      model_type: the model family.
      params: parameters, stacked over local devices.
      text_name, tokenizer_name: names in messages.
      shards: descriptions of the shards of this process.
      stages: the run's stages.
      start_step: steps done.
    """
    for line in shards:
        logging.info("process %d of %d reads %s", jax.process_index(), jax.process_count(), line)
    if jax.process_index() > 0:
        return
    # The overview needs shapes only, so the parameters stay on the devices.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    overview = parameter_overview.get_parameter_overview(shapes, include_stats=False)
    logging.info("parameters of the %s encoder:\n%s", model_type, overview)
    logging.info("text: %s, tokenized by %s", text_name, tokenizer_name)
    for stage in stages:
        logging.info(
            "each step%s: %s sequences of %d tokens; devices: %d x %s, processes: %d",
            f" of {stage.name}, {stage.start + 1:,} to {stage.end:,}" if stage.name else "",
            f"{stage.rows_per_device * jax.device_count():,}",
            stage.settings.data.max_seq_length,
            jax.device_count(),
            jax.devices()[0].device_kind,
            jax.process_count(),
        )
    if start_step:
        logging.info("resuming after step %d", start_step)


def warn_batch_size_changed(workdir: WorkDir, *, sequences_per_step: int) -> None:
    """Logs a warning if the steps so far had another number of sequences: it depends on the number of devices."""
    topology = workdir.last_topology()
    if topology is not None and topology[0] * topology[1] != sequences_per_step:
        logging.warning(
            "steps had %d sequences so far and now have %d, because the number of devices has changed; to keep "
            "the batch size in a new run, change per_device_train_batch_size or gradient_accumulation_steps",
            topology[0] * topology[1],
            sequences_per_step,
        )


def print_next_steps(
    workdir: WorkDir,
    predictions: Mapping[int, Sequence[MaskPrediction]],
    *,
    command: str,
    num_train_steps: int,
    can_be_extended: bool,
    branch_step: int | None = None,
) -> None:
    """Prints what the finished model predicts, and commands to use it and to train for longer.

    Args:
      workdir: of the run.
      predictions: step -> what the model predicted after it; the first and the last are printed.
      command: the command that started the run.
      num_train_steps: steps of the run.
      can_be_extended: whether the schedule allows more steps.
      branch_step: if not, the newest checkpoint before the decay of the learning rate; None without one.
    """
    if predictions:
        print("\nThe model's five best predictions for each mask:\n")
        first_and_last = sorted({min(predictions), max(predictions)})
        print(compare_predictions({f"step {step:,}": predictions[step] for step in first_and_last}))
    path = workdir.raw_path
    command = _without_flag(command, "config.num_train_steps")
    more_steps = f"--config.num_train_steps={2 * num_train_steps}"
    extend = "Longer     branch from a checkpoint before the learning rate decays: docs/resume.md"
    if can_be_extended:
        extend = f"Resume     {command} {more_steps}"
    elif branch_step is not None:
        new = (
            f"--workdir={shlex.quote(f'{path}_longer')} --config.checkpoint.init_from={shlex.quote(path)}@{branch_step}"
        )
        extend = f"Longer     {_without_flag(command, 'workdir')} {new} {more_steps}"
    model = os.path.join(path, "model")
    download = workdir.storage.download_command("model")
    copied = f"; after: {download}" if download else ""
    print(f"""
Model      {model}
Curves     {os.path.join(model, "curves.png")}
Look at    tensorboard --logdir {shlex.quote(path)}
{extend}
Use        from transformers import pipeline  # needs PyTorch: pip install torch{copied}
           pipeline("fill-mask", model={"model" if download else model!r})
Or         python main.py --mode=fill_mask --workdir={shlex.quote(path)}
""")


def _without_flag(command: str, flag: str) -> str:
    """Returns a command of the shell without `--flag=VALUE` and `--flag VALUE`."""
    words, skip = [], False
    for word in shlex.split(command):
        if not (skip or word == f"--{flag}" or word.startswith(f"--{flag}=")):
            words.append(word)
        skip = word == f"--{flag}"
    return shlex.join(words)
