"""--mode=show_data: prints the masked sequences and the documents of any step of a run, recomputed from the data.

The data stream resumes from the newest checkpoint before the step, or from the beginning, with the numbers of processes
and rows that the run had; every stream state records them. Sequences, masks and documents are identical to those of
the run if the data has not changed.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlm import build, steps
from mlm.data import pipeline as text_lib
from mlm.data.mixture import Document, batch_of_step, upgrade_state
from mlm.data.pipeline import TextPipeline
from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError
from mlm.masking import MaskedBatch, mask_tokens
from mlm.run.workdir import KeyChanges, WorkDir
from mlm.settings import RunSettings
from mlm.stages import stage_at, stages_at_last_start


@dataclasses.dataclass(frozen=True)
class StepData:
    """The batch of one process in a step.

    Attributes:
      text: the data sources and the tokenizer.
      batch_number: number of the batch in the data; data.skip_steps makes it larger than the step.
      epoch: epoch of the last row.
      process_count: number of processes at that step.
      first_row: number of the first row in the global batch.
      tokens_BxL: int32, the rows.
      masked: the masked rows.
      documents: the documents in the rows.
    """

    text: TextPipeline
    batch_number: int
    epoch: int
    process_count: int
    first_row: int
    tokens_BxL: np.ndarray
    masked: MaskedBatch
    documents: list[Document]


def run(
    settings: RunSettings,
    workdir_path: str,
    *,
    step: int,
    sequences: int,
    process: int,
    key_changes: KeyChanges | None = None,
) -> None:
    """Prints masked sequences of a step and the documents that they come from.

    Args:
      settings: the run's settings.
      workdir_path: the run's work directory.
      step: the step, from 1 on.
      sequences: number of sequences to print.
      process: index of the process whose sequences are printed.
      key_changes: how config keys have changed since earlier versions; None for no changes.

    Raises:
      UserError: the run does not exist, or its config differs in a key that must not change.
    """
    data = replay(settings, workdir_path, step=step, process_index=process, key_changes=key_changes)
    total = len(data.tokens_BxL)
    print(
        f"step {step}: batch {data.batch_number} of the data, epoch {data.epoch}; "
        f"{min(sequences, total)} of the {total} sequences of process {process} of {data.process_count}\n"
        "[input=label] is a token to predict"
    )
    for row in range(min(sequences, total)):
        print(f"\nsequence {data.first_row + row}")
        for document in data.documents:
            if row in document.batch_rows:
                shard = data.text.shard_name(document.source, document.shard)
                print(f"  from {document.source}, {shard}, document {document.row}, epoch {document.epoch}")
        print(f"  {decode_masked(data.text.tokenizer, data.masked, row)}")


def replay(
    settings: RunSettings,
    workdir_path: str,
    *,
    step: int,
    process_index: int = 0,
    key_changes: KeyChanges | None = None,
) -> StepData:
    """Recomputes the batch of a process in a step; arguments and errors as in `run`."""
    # Imported here: it imports Orbax, which takes half a second, and --mode=check uses decode_masked alone.
    from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError

    workdir = WorkDir(workdir_path, key_changes=key_changes)
    last_topology = workdir.last_topology()
    if last_topology is None:
        raise UserError(f"--workdir={workdir_path}: contains no run; choose a run's work directory")
    if step < 1:
        raise UserError(f"--step={step}: must be at least 1, the first step")
    settings = workdir.resume(settings)
    stages = stages_at_last_start(settings, workdir.last_stages())
    first, later = stages[0].settings.data, [stage.settings.data for stage in stages[1:]]
    sources = text_lib.open_sources(first, *later)
    tokenizer = text_lib.open_tokenizer(
        settings, sources, saved_tokenizer=workdir.tokenizer, model_type=settings.model.model_type
    )
    text = text_lib.open_text(first, sources, tokenizer, seed=settings.seed, later_stages=later)

    process_count, batch_rows = last_topology
    history = [{"after_batch": 0, "process_count": process_count, "batch_rows": batch_rows}]
    states = None
    with Checkpointer(workdir.storage, keep_checkpoints=settings.checkpoint.keep_checkpoints) as checkpointer:
        saved = checkpointer.steps()
        before = [other for other in saved if other < step]

        def stream_states(checkpoint: int) -> list[Mapping[str, Any]]:
            try:
                return [upgrade_state(state) for state in checkpointer.streams(checkpoint)]
            except CorruptCheckpointError as error:
                raise UserError(
                    f"--workdir={workdir.display_path}: cannot read checkpoint {checkpoint} ({error}); rerun the run's "
                    "command, which moves it to damaged/"
                ) from None

        if saved:
            history = stream_states(saved[-1])[0]["topology_history"]
        if before:
            states = stream_states(before[-1])

    batch_number = batch_of_step(step, settings.data.skip_steps)
    batches_done = states[0]["batches"] if states else 0
    while True:
        topology = next(entry for entry in reversed(history) if entry["after_batch"] <= batches_done)
        process_count, batch_rows = topology["process_count"], topology["batch_rows"]
        # The last batch before the number of processes or rows changes, or the batch of the step.
        changes = [entry["after_batch"] for entry in history]
        last_batch = min((change for change in changes if batches_done < change < batch_number), default=batch_number)
        if last_batch == batch_number and not 0 <= process_index < process_count:
            raise UserError(
                f"--process={process_index}: step {step} had processes 0 to {process_count - 1}; choose one of them"
            )
        indices = range(process_count) if last_batch < batch_number else (process_index,)
        streams = [
            text.batches(
                process_index=index,
                process_count=process_count,
                batch_rows=batch_rows,
                # Where the number of rows changes, the history has another entry.
                shapes=[build.batch_shape(stage, batch_rows=batch_rows) for stage in stages],
            )
            for index in indices
        ]
        for stream in streams:
            if states is not None:
                stream.restore(states)
            while stream.batch_number < last_batch:
                tokens_BxL = next(stream)
        if last_batch == batch_number:
            break
        batches_done, states = last_batch, [stream.state_dict() for stream in streams]

    stage = stage_at(stages, step)
    first_row = process_index * batch_rows
    key = jax.random.fold_in(steps.random_key(settings.seed, steps.TRAIN_MASKS), step - 1)
    mask = jax.jit(functools.partial(mask_tokens, spec=build.create_masking_spec(stage.settings, tokenizer)))
    rate = build.create_mask_rate_schedule(stage)
    masked = mask(
        tokens_BxL,
        rows_B=first_row + np.arange(batch_rows, dtype=np.int32),
        key=key,
        mlm_probability=rate(step - 1) if rate else None,
    )
    return StepData(
        text=text,
        batch_number=batch_number,
        epoch=streams[0].epoch,
        process_count=process_count,
        first_row=first_row,
        tokens_BxL=tokens_BxL,
        masked=jax.device_get(masked),
        documents=streams[0].documents(),
    )


def decode_masked(tokenizer: Tokenizer, masked: MaskedBatch, row: int) -> str:
    """Returns a row as text without trailing padding; every token to predict is "[input=label]"."""
    inputs = masked.inputs_BxL[row].tolist()
    while inputs and inputs[-1] == tokenizer.pad_id:
        inputs.pop()
    chosen = masked.label_weights_BxK[row] > 0
    labels = dict(
        zip(masked.masked_positions_BxK[row][chosen].tolist(), masked.labels_BxK[row][chosen].tolist(), strict=True)
    )
    parts, start = [], 0
    for position in sorted(labels):
        parts.append(tokenizer.decode(inputs[start:position]))
        parts.append(f"[{tokenizer.decode([inputs[position]])}={tokenizer.decode([labels[position]])}]")
        start = position + 1
    return "".join([*parts, tokenizer.decode(inputs[start:])])
