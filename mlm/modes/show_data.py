"""The ledger: what an update of a run was trained on, made again from the data on the host alone.

The stream goes on from the newest checkpoint before the update, or from the beginning, as it went in the run: with its
numbers of processes and of rows, which every stream state remembers. Rows, masks and documents are those of the run,
as long as the data is.
"""

import dataclasses
import functools

import jax
import numpy as np

from mlm import build, steps
from mlm.data import pipeline as text_lib
from mlm.data.mixture import Document, batch_of_update
from mlm.data.pipeline import Text
from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError
from mlm.masking import MaskedBatch, mask_tokens
from mlm.run.checkpoint import Checkpointer
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Update:
    """One process's share of an update.

    Attributes:
      text: what it was made from.
      number: of the batch; it differs from the update's where batches were left out (data.skip_steps).
      epoch: of the last row.
      process_count: processes of the run at that update.
      first_row: the number of the first row among the rows of all processes.
      tokens_RxL: int32, the rows.
      masked: the same as the model saw them.
      documents: those of the rows.
    """

    text: Text
    number: int
    epoch: int
    process_count: int
    first_row: int
    tokens_RxL: np.ndarray
    masked: MaskedBatch
    documents: list[Document]


def run(settings: RunSettings, workdir: str, *, step: int, sequences: int, process: int) -> None:
    """Prints the documents and the masked sequences of a step: the first `sequences` of a process.

    Raises:
      UserError: there is no such run, or its config differs in a key that must not change.
    """
    update = replay(settings, workdir, step=step, process_index=process)
    total = len(update.tokens_RxL)
    print(
        f"step {step}: batch {update.number} of the data, epoch {update.epoch}; "
        f"{min(sequences, total)} of the {total} sequences of process {process} of {update.process_count}\n"
        "[input=label] is a token to predict"
    )
    for row in range(min(sequences, total)):
        print(f"\nsequence {update.first_row + row}")
        for document in update.documents:
            if row in document.batch_rows:
                shard = update.text.shard_name(document.source, document.shard)
                print(f"  from {document.source}, {shard}, row {document.row}, epoch {document.epoch}")
        print(f"  {decode_masked(update.text.tokenizer, update.masked, row)}")


def replay(settings: RunSettings, workdir: str, *, step: int, process_index: int = 0) -> Update:
    """Makes a process's share of update `step` again."""
    place = WorkDir(workdir)
    if place.last_topology() is None:
        raise UserError(f"--workdir={workdir}: there is no run; name the work directory of one")
    if step < 1:
        raise UserError(f"--step={step}: updates are numbered from 1")
    place.check_same_run(settings.to_dict())
    sources = text_lib.open_sources(settings)
    tokenizer = text_lib.open_tokenizer(settings, place, sources, model_type=settings.model.model_type)
    text = text_lib.open_text(settings, sources, tokenizer)

    states, runs = None, [[0, *place.last_topology()]]
    with Checkpointer(place.checkpoints, keep_checkpoints=settings.checkpoint.keep_checkpoints) as checkpointer:
        saved = checkpointer.steps()
        if saved:
            runs = checkpointer.streams(saved[-1])[0]["runs"]
        if before := [other for other in saved if other < step]:
            states = checkpointer.streams(before[-1])

    number = batch_of_update(step, settings.data.skip_steps)
    at = states[0]["batches"] if states else 0
    while True:
        process_count, batch_rows = next(run[1:] for run in reversed(runs) if run[0] <= at)
        # The next batch after which the run went on with other numbers, if that is before the update.
        until = min((run[0] for run in runs if at < run[0] < number), default=number)
        if until == number and not 0 <= process_index < process_count:
            raise UserError(f"--process={process_index}: update {step} had processes 0 to {process_count - 1}")
        indices = range(process_count) if until < number else (process_index,)
        streams = [
            text.batches(process_index=index, process_count=process_count, batch_rows=batch_rows) for index in indices
        ]
        for stream in streams:
            if states is not None:
                stream.restore(states)
            while stream.number < until:
                tokens_RxL = next(stream)
        if until == number:
            break
        at, states = until, [stream.state_dict() for stream in streams]

    first_row = process_index * batch_rows
    key = jax.random.fold_in(steps.random_key(settings.seed, steps.TRAIN_MASKS), step - 1)
    mask = jax.jit(functools.partial(mask_tokens, spec=build.open_masking(settings, tokenizer)))
    masked = mask(tokens_RxL, rows_B=first_row + np.arange(batch_rows, dtype=np.int32), key=key)
    return Update(
        text=text,
        number=number,
        epoch=streams[0].epoch,
        process_count=process_count,
        first_row=first_row,
        tokens_RxL=tokens_RxL,
        masked=jax.device_get(masked),
        documents=streams[0].documents(),
    )


def decode_masked(tokenizer: Tokenizer, masked: MaskedBatch, row: int) -> str:
    """A row as text, every token to predict as [shown=target], padding at its end left out."""
    inputs = masked.inputs_BxL[row].tolist()
    while inputs and inputs[-1] == tokenizer.pad_id:
        inputs.pop()
    chosen = masked.label_weights_BxK[row] > 0
    targets = dict(
        zip(masked.masked_positions_BxK[row][chosen].tolist(), masked.labels_BxK[row][chosen].tolist(), strict=True)
    )
    decode = functools.partial(tokenizer.hf.decode, clean_up_tokenization_spaces=False)
    parts, start = [], 0
    for position in sorted(targets):
        parts.append(decode(inputs[start:position]))
        parts.append(f"[{decode([inputs[position]])}={decode([targets[position]])}]")
        start = position + 1
    return "".join([*parts, decode(inputs[start:])])
