"""The run: build, restore, then loop over batch, step, log, evaluate, save, export."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from mlm import build, memory, parallel, steps
from mlm.data.packing import CONCATENATING
from mlm.data.prefetch import Prefetcher
from mlm.errors import UserError
from mlm.evaluate import Evaluator, unigram_log_probs
from mlm.export import model_directory
from mlm.export.fill_mask import MaskPrediction, fill_mask, format_predictions
from mlm.export.model_card import build_card
from mlm.models.flops import flops_per_token
from mlm.reporting import reporter
from mlm.reporting.summary import log_run_summary, show, warn_batch_size_changed
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError, DiskFullError, SaveError
from mlm.run.signals import Interrupt, Interrupted
from mlm.run.workdir import WorkDir
from mlm.settings import RunSettings


def train_and_evaluate(
    settings: RunSettings,
    workdir: str,
    *,
    command: str = "python main.py ...",
    interrupt: Interrupt | None = None,
    overwrite: bool = False,
) -> None:
    """Trains up to `num_train_steps`, going on from the newest checkpoint in `workdir` that is whole.

    Args:
      config: all keys of `configs/default.py`.
      workdir: the run's directory.
      command: what started the run, for the hint how to train on.
      interrupt: hears signals; None for a run that cannot be asked to stop.
      overwrite: start anew, after moving what is in `workdir` aside.

    Raises:
      UserError: the run cannot be made from this config, cannot go on, or went wrong in a way its user can mend.
      Interrupted: it was asked to stop, and has saved what it had.
    """
    interrupt = interrupt or Interrupt()
    last = settings.num_train_steps
    place = WorkDir(workdir)
    if overwrite:
        if jax.process_index() == 0 and (old := place.move_aside()):
            logging.info("the run that was in %s is in %s now", place.display_path, old)
        parallel.barrier("work directory moved aside")
        place.pull()
    if settings.per_device_train_batch_size == 0 and place.last_topology() is not None:
        known = place.read_config()["per_device_train_batch_size"]
        settings = settings.replace({"per_device_train_batch_size": known})
    place.check_same_run(settings.to_dict())
    if jax.process_index() == 0:
        model_directory.recover(place.model)
    exported = place.exported_step()
    if exported is not None and exported >= last:
        logging.info("nothing to do: all %d updates are made; the model is in %s/model", exported, place.display_path)
        build.push_what_is_left(settings, place, step=exported)
        return
    build.check_device(settings)

    with contextlib.ExitStack() as stack:
        stack.callback(place.close)
        if jax.process_index() == 0:
            place.lock()
        run = build.build(settings, place)
        if settings.per_device_train_batch_size == 0:
            length, microbatches = settings.data.max_seq_length, settings.gradient_accumulation_steps
            found = memory.find_batch_size(run.step_config, length=length, microbatches=microbatches)
            settings = settings.replace({"per_device_train_batch_size": found})
            run = run.with_batch_size(settings)
        checkpointer = stack.enter_context(
            Checkpointer(
                place.checkpoints,
                keep_checkpoints=settings.checkpoint.keep_checkpoints,
                keep_every_steps=settings.checkpoint.keep_every_steps,
            )
        )
        state, restored = _restore(run, checkpointer)
        start = restored["step"] if restored else 0
        batches = stack.enter_context(
            Prefetcher(run.stream, depth=settings.data.prefetch_batches, interrupted=_raise_if_interrupted(interrupt))
        )
        # Text too short for a batch shows here, before anything is written or compiled.
        stream = itertools.chain([next(batches)], batches)
        hub = build.open_hub(settings, place)
        if jax.process_index() == 0:
            warn_batch_size_changed(place, run)
            changed = place.create(
                settings.to_dict(),
                save_tokenizer=run.tokenizer.save,
                processes=jax.process_count(),
                rows_per_process=run.text.batch_rows,
                step=start,
            )
            for key, (before, now) in changed.items():
                logging.info("changed since the last start: %s from %r to %r", key, before, now)
            place.lock()
            checkpointer.remove_partial()
        parallel.barrier("work directory made")
        reporter = stack.enter_context(_reporter(settings, place, run, start, restored))
        if start == 0:
            reporter.write_hparams(settings.flat())
            lines = "\n".join(f"{key} = {value!r}" for key, value in settings.flat().items())
            reporter.write_texts(0, {"config": f"```\n{lines}\n```"})
        log_run_summary(settings, run, state, start)
        train_step = parallel.data_parallel(
            functools.partial(steps.train_step, step_config=run.step_config, axis_name=parallel.AXIS),
            donate_argnums=(0,),
        )
        evaluator = Evaluator(
            parallel.data_parallel(
                functools.partial(steps.eval_step, step_config=run.step_config, axis_name=parallel.AXIS)
            ),
            run.text.eval_rows_RxL,
            per_device_batch_size=settings.per_device_eval_batch_size,
            pad_id=run.tokenizer.pad_id,
            counts=run.text.eval_counts,
        )

        def evaluate(step: int) -> dict[str, float]:
            with reporter.timed("evaluation"):
                unigram_V = unigram_log_probs(reporter.counts_V, special_ids=run.tokenizer.special_ids)
                metrics = evaluator(state.params, parallel.broadcast_from_first(unigram_V))
                reporter.log_evaluation(step, metrics)
            return metrics

        def save(step: int, stream_state: dict[str, Any], *, evaluated: bool = True, awaited: bool = False) -> None:
            with reporter.timed("save"), _log_and_retry_later(final=awaited, together=True):
                loop = {"step": step, "evaluated": evaluated, **reporter.to_json()}
                saved = parallel.to_global(state)
                _require_room(checkpointer, saved, first=place.push)
                checkpointer.save(step, state=saved, loop=loop, stream=stream_state)
                if awaited:
                    checkpointer.wait()

        predictions: list[MaskPrediction] = []  # Of the newest evaluation.

        def export_model(step: int, metrics: dict[str, float]) -> None:
            with reporter.timed("export"), _log_and_retry_later(final=step >= last):
                if jax.process_index() == 0:
                    params = parallel.first_replica(state.params)
                    predictions[:] = fill_mask(run.step_config.model, params, run.tokenizer, settings.report.sentences)
                    reporter.write_texts(step, {"predictions": f"```\n{format_predictions(predictions)}\n```"})
                    _export(settings, place, run, params, step, metrics, predictions, tokens_seen=reporter.tokens_seen)
                    place.push()
                    if hub is not None and step < last:
                        hub.push(step=step)

        with jax.transfer_guard("disallow"), interrupt.deferred():
            # The run was stopped between an update and its evaluation, or between the last checkpoint and the export.
            if (restored and not restored["evaluated"]) or start >= last:
                export_model(start, evaluate(start))
            asked = StopConsensus(interrupt)
            for step in range(start + 1, last + 1):
                try:
                    batch = next(stream)
                except (UserError, Interrupted):
                    # No more text to be had. Not over several processes: the others do not know, and a save takes all.
                    if start < step - 1 and checkpointer.latest_step() != step - 1 and jax.process_count() == 1:
                        reporter.wait_for_pending_step()
                        save(step - 1, batch.state, awaited=True)
                    raise
                with reporter.transfer():
                    tokens = parallel.shard(batch.tokens, shape=(settings.gradient_accumulation_steps,))
                state, metrics = train_step(state, tokens)
                reporter.update(step, metrics, batch, wait_seconds=batches.wait_seconds)
                with _log_and_retry_later(together=True):
                    checkpointer.check()

                logs, evaluates, saves = (
                    step % every == 0 or step == last
                    for every in (settings.logging_steps, settings.eval_steps, settings.save_steps)
                )
                stops = asked.should_stop(step)
                if logs or evaluates or saves or stops:
                    reporter.wait_for_pending_step()
                if logs:
                    reporter.log_updates(step)
                    if place.is_remote and jax.process_index() == 0:
                        with reporter.timed("upload"), _log_and_retry_later():
                            reporter.flush()
                            place.push()
                if evaluates and not stops:
                    eval_metrics = evaluate(step)
                if saves or stops:
                    # An exported last step says that the run is finished: its checkpoint must be there by then.
                    save(step, batch.state, evaluated=not (evaluates and stops), awaited=stops or step == last)
                if stops:
                    raise Interrupted(f"stopped after update {step}, which is saved", together=True)
                if evaluates:
                    export_model(step, eval_metrics)
        reporter.flush()
        if jax.process_index() == 0:
            show(settings, place, predictions, command)
        if hub is not None:
            hub.finish(step=last)


class StopConsensus:
    """Whether to stop after this update: the same answer on all processes, though signals reach them when they do.

    Over several processes it is the answer to what each asked an update ago, so that nobody waits for it.
    """

    def __init__(self, interrupt: Interrupt):
        self._interrupt = interrupt
        self._asked: jax.Array | None = None

    def should_stop(self, step: int) -> bool:
        """Call once an update, on every process."""
        if jax.process_count() == 1:
            return bool(self._interrupt.requested)
        before, self._asked = self._asked, parallel.any_process(bool(self._interrupt.requested))
        is_near = parallel.maintenance_is_near(step)
        return is_near or (before is not None and bool(parallel.first_replica(before)))


def _raise_if_interrupted(interrupt: Interrupt) -> Callable[[], None]:
    """What to call while no batch comes: raises Interrupted once that is asked for, where nobody else must agree."""

    def check() -> None:
        if jax.process_count() == 1:
            interrupt.check()

    return check


def _require_room(checkpointer: Checkpointer, state: Any, *, first: Callable[[], None] = lambda: None) -> None:
    """Raises NoRoomError on all processes if there is no room for one of them: a save takes all.

    Process 0 carries the metrics up to here to the bucket (`first`): a run that goes on from the save needs them.
    """
    missing = None
    try:
        checkpointer.require_room(state)
        if jax.process_index() == 0:
            first()
    except DiskFullError as error:
        missing = error
    except OSError as error:
        missing = DiskFullError(f"a checkpoint could not be written: {error}")
    if parallel.on_any_process(missing is not None):
        raise missing or DiskFullError("a checkpoint could not be written by another process")


@contextlib.contextmanager
def _log_and_retry_later(*, final: bool = False, together: bool = False) -> Iterator[None]:
    """What cannot be written is told of, and written the next time.

    Raises:
      UserError: there is no next time, for it is `final`; or it was to be written by several processes `together`, and
        this one broke off where others may have gone on.
    """
    try:
        yield
    except (SaveError, OSError) as error:
        if final or (together and jax.process_count() > 1 and not isinstance(error, DiskFullError)):
            raise UserError(f"{error}; make room, or mount it again: the same command goes on") from None
        logging.warning("%s; training goes on, and it is tried again at the next time", error)


def _restore(run: build.Run, checkpointer: Checkpointer) -> tuple[steps.TrainState, dict[str, Any] | None]:
    """The stacked state to begin with, and what the loop saved with it; None for a fresh run.

    Sets the stream to the place that goes with the state. A damaged checkpoint is moved aside, for the one before it.
    """
    newest = checkpointer.latest_step()
    if newest is None:
        return parallel.replicate(steps.init_state(run.step_config, run.initial_params())), None
    like = parallel.global_like(jax.eval_shape(lambda: steps.init_state(run.step_config, run.initial_params())))
    while (step := checkpointer.latest_step()) is not None:
        restored, damage = None, "another process cannot read it"
        try:
            restored = checkpointer.restore(step, like=like)
        except CorruptCheckpointError as error:
            damage = str(error)
        if not parallel.on_any_process(restored is None):
            run.stream.restore(restored.streams)
            return parallel.from_global(restored.state), restored.loop
        if jax.process_index() == 0:
            logging.warning("checkpoint %d is damaged (%s): moved to %s", step, damage, checkpointer.quarantine(step))
        parallel.barrier(f"checkpoint {step} moved aside")
        checkpointer.reload()
    raise UserError(
        f"none of the checkpoints up to {newest} can be read; they are in {checkpointer.damaged}. Put whole ones back, "
        "or start anew with --overwrite"
    )


def _reporter(
    settings: RunSettings, place: WorkDir, run: build.Run, step: int, restored: dict[str, Any] | None
) -> reporter.Reporter:
    length = settings.data.max_seq_length
    flops = flops_per_token(
        run.encoder, length=length, max_predictions_per_seq=run.step_config.masking.max_predictions_per_seq(length)
    )
    return reporter.Reporter(
        place,
        num_train_steps=settings.num_train_steps,
        vocab_size=run.encoder.vocab_size,
        flops_per_token=flops,
        profile=settings.profile,
        max_skipped_steps=settings.optimizer.max_skipped_steps,
        restored=restored,
        step=step,
        pad_id=None if settings.data.packing in CONCATENATING else run.tokenizer.pad_id,
    )


def _export(
    settings: RunSettings,
    place: WorkDir,
    run: build.Run,
    params: Any,
    step: int,
    metrics: dict[str, float],
    predictions: list[MaskPrediction],
    *,
    tokens_seen: int,
) -> None:
    """Writes `model/`."""
    card = build_card(
        settings,
        title=os.path.basename(place.path),
        model_type=run.encoder.model_type,
        step=step,
        sequences_per_step=jax.process_count() * run.text.batch_rows,
        tokens_seen=tokens_seen,
        hardware=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    )
    model_directory.export_model(
        place.model,
        step=step,
        params=params,
        config=run.encoder,
        tokenizer=run.tokenizer,
        card=card,
        metrics=metrics,
        predictions=predictions,
        metrics_path=place.metrics,
        dtype=settings.export.dtype,
    )
