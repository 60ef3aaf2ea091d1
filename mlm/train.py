"""The training loop: take the batch, step, log, evaluate, save, export."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from mlm import parallel
from mlm.errors import UserError
from mlm.evaluate import unigram_log_probs
from mlm.export.fill_mask import MaskPrediction, fill_mask, format_predictions
from mlm.export.model_card import build_card
from mlm.export.model_directory import export_model
from mlm.reporting.summary import print_next_steps
from mlm.run.checkpoint import Checkpointer, DiskFullError, SaveError
from mlm.run.signals import Interrupt, Interrupted
from mlm.run.time_limit import TimeLimit
from mlm.run.workdir import KeyChanges
from mlm.settings import RunSettings
from mlm.startup import Run, open_run


def train_and_evaluate(
    settings: RunSettings,
    workdir: str,
    *,
    command: str = "python main.py ...",
    interrupt: Interrupt | None = None,
    overwrite: bool = False,
    key_changes: KeyChanges | None = None,
) -> None:
    """Trains up to step `num_train_steps`, from the newest intact checkpoint in `workdir` if there is one.

    Args:
      settings: the run's settings.
      workdir: the run's directory.
      command: the command that started the run, for the printed hint on training for longer.
      interrupt: receives signals; None for a run that signals do not stop.
      overwrite: start a new run after renaming the existing work directory.
      key_changes: how config keys have changed since earlier versions; None for no changes.

    Raises:
      UserError: the run cannot be started or resumed, or training failed in a way the user can fix.
      Interrupted: a signal or `max_hours` asked it to stop, and its state is saved.
    """
    interrupt = interrupt or Interrupt()
    with contextlib.ExitStack() as stack:
        run = open_run(settings, workdir, stack, interrupt=interrupt, overwrite=overwrite, key_changes=key_changes)
        if run is None:
            return
        settings = run.settings  # Completed with what an earlier start has decided.
        reporter, state, last_step = run.reporter, run.state, settings.num_train_steps
        predictions: dict[int, list[MaskPrediction]] = {}  # By the step of the evaluation.

        time_limit = interrupt.time_limit = TimeLimit(settings.max_hours)

        def evaluate(step: int) -> dict[str, float]:
            run_stage, task_metrics = run.stage_at(step), {}
            if run_stage.task_evaluator:
                with reporter.timed("probes"), time_limit.evaluation():
                    task_metrics = run_stage.task_evaluator(state.eval_params)
            with reporter.timed("evaluation"), time_limit.evaluation():
                counts_V = reporter.accumulator.counts_V
                unigram_V = unigram_log_probs(counts_V, special_ids=run_stage.components.tokenizer.special_ids)
                unigram_V = parallel.broadcast_from_first(unigram_V)
                metrics = run_stage.evaluator(state.eval_params, unigram_V)
                for name, evaluator in run_stage.extra_evaluators.items():
                    metrics[f"eval/{name}/loss"] = evaluator(state.eval_params, unigram_V)["eval/loss"]
                if state.ema_params is not None:
                    metrics["eval/raw_loss"] = run_stage.evaluator(state.params, unigram_V)["eval/loss"]
                metrics |= task_metrics
                reporter.log_evaluation(step, metrics)
            return metrics

        def save(step: int, stream_state: dict[str, Any], *, is_evaluated: bool = True, wait: bool = False) -> None:
            with reporter.timed("save"), _log_and_retry_later(is_last_try=wait, on_all_processes=True):
                loop_state = {"step": step, "evaluated": is_evaluated, **reporter.to_json()}
                global_state = parallel.to_global(state)
                # Metrics up to here are uploaded first: a run that resumes from this checkpoint needs them.
                _prepare_save(run.checkpointer, global_state, before_save=run.workdir.push)
                run.checkpointer.save(step, state=global_state, loop=loop_state, stream=stream_state)
                if wait:
                    run.checkpointer.wait()

        def export(step: int, metrics: dict[str, float]) -> None:
            with reporter.timed("export"), time_limit.evaluation(), _log_and_retry_later(is_last_try=step >= last_step):
                if jax.process_index() == 0:
                    predictions[step] = _export(run, parallel.first_replica(state.eval_params), step, metrics)
                    if run.hub is not None and step < last_step:
                        run.hub.push(step=step)

        with jax.transfer_guard("disallow"), interrupt.deferred():
            if run.unsaved_stream is not None:
                # Once this checkpoint is complete, the run does not need its parent.
                save(run.start_step, run.unsaved_stream, is_evaluated=run.is_evaluated)
            # The run was stopped between a step and its evaluation, or between its last checkpoint and the export.
            if not run.is_evaluated or run.start_step >= last_step:
                export(run.start_step, evaluate(run.start_step))
            stop_consensus = StopConsensus(interrupt)
            for step in range(run.start_step + 1, last_step + 1):
                run_stage = run.stage_at(step)
                stage = run_stage.stage
                try:
                    batch = next(run.batches)
                except (UserError, Interrupted):
                    # The text has ended or cannot be read, or a stop was requested while waiting. Several processes
                    # cannot save here: the others do not take part.
                    steps_done = step - 1
                    has_unsaved_steps = steps_done not in (run.start_step, run.checkpointer.latest_step())
                    if has_unsaved_steps and jax.process_count() == 1:
                        reporter.wait_for_pending_step()
                        save(steps_done, batch.state, wait=True)
                    raise
                with reporter.transfer():
                    tokens = parallel.shard(batch.tokens, shape=(stage.settings.gradient_accumulation_steps,))
                with reporter.dispatch(stage=stage.name, flops_per_token=run_stage.flops_per_token):
                    state, metrics = run_stage.train_step(state, tokens)
                reporter.add_step(step, metrics, batch, wait_seconds=run.prefetcher.wait_seconds)
                if step == max(run.start_step, stage.start) + 1:
                    run.after_first_step(step, state, tokens)
                with _log_and_retry_later(on_all_processes=True):
                    run.checkpointer.check()

                intervals = settings.logging_steps, settings.eval_steps, settings.save_steps
                logs, evaluates, saves = (step % interval == 0 or step == stage.end for interval in intervals)
                time_limit.add_step(save_seconds=run.checkpointer.last_save_seconds)
                stops = stop_consensus.should_stop(step)
                if logs or evaluates or saves or stops:
                    reporter.wait_for_pending_step()
                if logs:
                    _log(run, step)
                if evaluates and not stops:
                    eval_metrics = evaluate(step)
                if saves or stops:
                    # An exported last step means that the run is finished: its checkpoint must be complete by then.
                    save(step, batch.state, is_evaluated=not (evaluates and stops), wait=stops or step == last_step)
                if stops:
                    raise stop_consensus.interrupted(step)
                if evaluates:
                    export(step, eval_metrics)
        reporter.writer.flush()
        if jax.process_index() == 0:
            last_stage = run.stages[-1].stage
            decay_start = last_stage.schedule_start + last_stage.boundaries.decay_start
            print_next_steps(
                run.workdir,
                predictions,
                command=command,
                num_train_steps=last_step,
                can_be_extended=not last_stage.settings.optimizer.decay_steps,
                branch_step=max((saved for saved in run.checkpointer.steps() if saved <= decay_start), default=None),
            )
        if run.hub is not None:
            run.hub.finish(step=last_step)


class StopConsensus:
    """Decides whether to stop after a step: the same decision on all processes, whenever a signal reaches them.

    With several processes the decision uses the flags sent at the previous step, so that none waits for it.
    """

    def __init__(self, interrupt: Interrupt):
        self._interrupt = interrupt
        self._pending: jax.Array | None = None

    def should_stop(self, step: int) -> bool:
        """Must be called once per step, on every process."""
        if jax.process_count() == 1:
            return self._interrupt.reason is not None
        previous, self._pending = self._pending, parallel.any_process_async(self._interrupt.reason is not None)
        noticed = parallel.preemption_noticed(step)
        return noticed or (previous is not None and bool(parallel.first_replica(previous)))

    def interrupted(self, step: int) -> Interrupted:
        """Returns what to raise after `step`, on every process."""
        message, limit = f"stopped after step {step}, which is saved", self._interrupt.time_limit
        # A signal to one process is no reason that the others know; the limit may be near on one of them only.
        if limit is not None and parallel.any_process(self._interrupt.requested is None and limit.is_near()):
            message = f"max_hours={limit.hours}: {message}"
        return Interrupted(message, on_all_processes=True)


def _log(run: Run, step: int) -> None:
    run.reporter.log_steps(step)
    if run.workdir.storage.needs_upload and jax.process_index() == 0:
        with run.reporter.timed("upload"), _log_and_retry_later():
            run.reporter.writer.flush()
            run.workdir.push()


def _export(run: Run, params: Any, step: int, metrics: dict[str, float]) -> list[MaskPrediction]:
    """Writes `model/`, on process 0; returns what the model predicts for `report.sentences`."""
    components, stage, workdir = run.stage_at(step).components, run.stage_at(step).stage, run.workdir
    settings = stage.settings
    predictions = fill_mask(components.step_config.model, params, components.tokenizer, settings.report.sentences)
    run.reporter.writer.write_texts(step, {"predictions": f"```\n{format_predictions(predictions)}\n```"})
    card = build_card(
        settings,
        title=os.path.basename(workdir.path),
        model_type=components.encoder.model_type,
        step=step,
        sequences_per_step=jax.device_count() * stage.rows_per_device,
        stages=[other.stage for other in run.stages],
        tokens_seen=run.reporter.accumulator.tokens_seen,
        hardware=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    )
    export_model(
        workdir.model,
        step=step,
        params=params,
        config=components.encoder,
        tokenizer=components.tokenizer,
        card=card,
        metrics=metrics,
        predictions=predictions,
        metrics_path=workdir.metrics,
        dtype=settings.export.dtype,
        for_sentence_transformers=settings.export.sentence_transformers,
    )
    workdir.push()
    return predictions


def _prepare_save(checkpointer: Checkpointer, state: Any, *, before_save: Callable[[], None] = lambda: None) -> None:
    """Raises DiskFullError on all processes if one of them has no room: all take part in a save."""
    problem = None
    try:
        checkpointer.check_space(state)
        if jax.process_index() == 0:
            before_save()
    except DiskFullError as error:
        problem = error
    except OSError as error:
        problem = DiskFullError(f"a checkpoint could not be written: {error}")
    if parallel.any_process(problem is not None):
        raise problem or DiskFullError("a checkpoint could not be written by another process")


@contextlib.contextmanager
def _log_and_retry_later(*, is_last_try: bool = False, on_all_processes: bool = False) -> Iterator[None]:
    """Logs a failed write; the next regular write is the retry.

    Raises:
      UserError: this was the last try; or all processes were writing, and the others may have succeeded.
    """
    try:
        yield
    except (SaveError, OSError) as error:
        is_partial = on_all_processes and jax.process_count() > 1 and not isinstance(error, DiskFullError)
        if is_last_try or is_partial:
            raise UserError(f"{error}; free or mount the disk, then rerun the same command to resume") from None
        logging.warning("%s; training continues; the next save, export or upload tries again", error)
