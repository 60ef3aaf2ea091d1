"""Prepares a run for its next step: work directory, restored state, batches, reporter."""

import contextlib
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import logging

from mlm import build, memory, parallel, steps
from mlm.build import Components
from mlm.data.packing import CONCATENATING
from mlm.data.prefetch import Batch, Prefetcher
from mlm.downstream.during_training import EvalTasks, TaskEvaluator, read_tasks
from mlm.errors import UserError, one_line
from mlm.evaluate import Evaluator
from mlm.export import model_directory
from mlm.export.hub import Hub
from mlm.init_from import Parent, check_overwrite, open_parent, restart
from mlm.models.config import EncoderConfig
from mlm.models.flops import flops_per_token
from mlm.reporting.summary import log_run_summary, warn_batch_size_changed
from mlm.run.checkpoint import Checkpointer, CorruptCheckpointError
from mlm.run.signals import Interrupt
from mlm.run.workdir import KeyChanges, WorkDir
from mlm.schedules import keep_passed_boundaries
from mlm.settings import Boundaries, RunSettings
from mlm.stages import Stage, resolve, started_stages
from mlm.steps import TrainState

# Imported in open_run.
if TYPE_CHECKING:
    from mlm.reporting.reporter import Reporter


# Backends on which compiling does not slow down steps. A GPU's compiler times kernels on it, a CPU's uses its cores.
_HOST_COMPILED_BACKENDS = ("tpu",)
# How long a process waits for the others to read a checkpoint.
_RESTORE_MINUTES = 30


@dataclasses.dataclass(frozen=True)
class RunStage:
    """A stage of a run.

    Attributes:
      stage: its steps and settings.
      components: what the settings determine.
      train_step: the step, (state, tokens) -> (state, metrics); the first call compiles it, unless that has been done
        in the background.
      evaluator: evaluates the model as the stage computes it, on the sequences of every stage.
      extra_evaluators: name -> evaluator of further sequences, for the metric eval/<name>/loss.
      task_evaluator: measures `eval.probes` and `eval.pairs`.
      flops_per_token: operations of a training step per token.
    """

    stage: Stage
    components: Components
    train_step: parallel.DataParallel
    evaluator: Evaluator
    extra_evaluators: Mapping[str, Evaluator]
    task_evaluator: TaskEvaluator
    flops_per_token: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready for step `start_step` + 1.

    Attributes:
      settings: the run's settings, with the batch size that was found if it was 0.
      state: parameters and optimizer state, stacked over local devices.
      start_step: the number of steps done.
      is_evaluated: whether the state has been evaluated, if its step is one to evaluate.
      stages: one for a run without `config.stages`.
      unsaved_stream: the data position at the start, if the run starts from another run's checkpoint and has none of
        its own; otherwise None.
      batches: the prefetched batches; `prefetcher` is the thread behind them.
      hub: the repository to push to; None on other processes than the first, or if nothing is to be pushed.
    """

    settings: RunSettings
    workdir: WorkDir
    state: TrainState
    start_step: int
    is_evaluated: bool
    stages: tuple[RunStage, ...]
    unsaved_stream: dict[str, Any] | None
    batches: Iterator[Batch]
    prefetcher: Prefetcher
    checkpointer: Checkpointer
    reporter: "Reporter"
    hub: Hub | None

    def stage_at(self, step: int) -> RunStage:
        """Returns the stage that a step belongs to; for step 0 the first one."""
        return next(other for other in self.stages if step <= other.stage.end)

    def after_first_step(self, step: int, state: TrainState, tokens: jax.Array) -> None:
        """Records the memory of a stage's step, and starts to compile the next one if this costs the loop nothing.

        Args:
          step: the step that was dispatched, the first one of its stage here.
          state: after the step; only its shapes are used.
          tokens: the sequences of the step.
        """
        run_stage = self.stage_at(step)
        self.reporter.step_memory_bytes = memory.compiled_bytes(run_stage.train_step.compiled(state, tokens))
        following = self.stage_at(min(run_stage.stage.end + 1, self.settings.num_train_steps))
        if following is run_stage or jax.default_backend() not in _HOST_COMPILED_BACKENDS:
            return
        settings = following.stage.settings
        rows = following.stage.rows_per_device * jax.local_device_count()
        shape = (settings.gradient_accumulation_steps,)
        tokens = parallel.shard(np.zeros((rows, settings.data.max_seq_length), np.int32), shape=shape)
        with self.reporter.timed("compilation"):
            following.train_step.compile_in_background(state, tokens)


def open_run(
    settings: RunSettings,
    workdir_path: str,
    stack: contextlib.ExitStack,
    *,
    interrupt: Interrupt,
    overwrite: bool,
    key_changes: KeyChanges | None,
) -> Run | None:
    """Builds a run and restores its newest intact checkpoint; None if the run is finished.

    Args:
      settings: the run's settings.
      workdir_path: the run's directory.
      stack: closes what is opened here.
      interrupt: is checked while a batch is awaited.
      overwrite: start a new run after renaming the existing work directory.
      key_changes: how config keys have changed since earlier versions; None for no changes.

    Raises:
      UserError: the run cannot be built from these settings, or cannot be resumed.
    """
    workdir = WorkDir(workdir_path, key_changes=key_changes)
    if overwrite:
        check_overwrite(settings, workdir, key_changes=key_changes)
        if jax.process_index() == 0 and (renamed := workdir.move_aside()):
            logging.info("renamed the existing work directory %s to %s", workdir.display_path, renamed)
        parallel.barrier("work directory renamed")
        workdir.pull()
    settings = workdir.resume(settings)
    if _is_finished(settings, workdir):
        return None
    build.check_device(settings)
    eval_tasks = read_tasks(settings.eval)
    if jax.default_backend() == "cpu":
        memory.keep_freed_memory()

    stack.callback(workdir.close)
    if jax.process_index() == 0:
        workdir.lock()
    settings, parent = open_parent(settings, workdir, key_changes=key_changes)
    keep = settings.checkpoint
    checkpointer = stack.enter_context(
        Checkpointer(workdir.storage, keep_checkpoints=keep.keep_checkpoints, keep_every_steps=keep.keep_every_steps)
    )
    step = checkpointer.latest_step() or 0
    last_stages: Sequence[Mapping[str, Any]] = workdir.last_stages()
    if parent is not None:
        step = parent.step if parent.mode == "branch" else 0
        last_stages = started_stages(parent.workdir.last_stages(), step=step)
    components = build.build(
        settings,
        workdir,
        stages=_resolve(settings, last_stages, step=step),
        parent_tokenizer=parent.workdir.tokenizer if parent else None,
    )
    if settings.per_device_train_batch_size == 0:
        length, microbatches = settings.data.max_seq_length, settings.gradient_accumulation_steps
        found = memory.find_batch_size(components.step_config, length=length, microbatches=microbatches)
        found = int(parallel.broadcast_from_first(np.array(found)))  # The memory of hosts may differ a little.
        settings = settings.replace({"per_device_train_batch_size": found})
        components = components.with_stages(resolve(settings, num_devices=jax.device_count()))
    state, loop_state, stream_states = _restore(components, checkpointer, parent)
    start_step = loop_state["step"] if loop_state else 0
    if start_step > settings.num_train_steps:
        raise UserError(
            f"num_train_steps={settings.num_train_steps}: {start_step} steps are done; set it to at least {start_step}"
        )
    if loop_state:
        applied = int(parallel.first_replica(state.update_stats.num_applied))
        stages = _resume_stages(settings, last_stages, step=start_step, applied=applied)
        components = components.with_stages(stages)
        components.stream.restore(stream_states)
    checkpointer.keep_steps = [stage.end for stage in components.stages[:-1]]
    unsaved_stream = components.stream.state_dict() if parent else None
    # Other processes would not know that one has stopped waiting for a batch.
    check_interrupt = interrupt.check if jax.process_count() == 1 else lambda: None
    prefetcher = stack.enter_context(
        Prefetcher(components.stream, depth=settings.data.prefetch_batches, on_wait=check_interrupt)
    )
    # CLU's writer imports TensorFlow, which takes seconds: after the checks, while the first shuffle window is read.
    from mlm.reporting.reporter import Reporter

    # Text that is too short for a batch is reported here, before anything is written or compiled.
    batches = itertools.chain([next(prefetcher)], prefetcher)
    hub = build.open_hub(settings, workdir)
    with _disk_errors(workdir):
        if jax.process_index() == 0:
            _write_workdir(settings, workdir, components, start_step, parent)
            checkpointer.remove_partial()
        parallel.barrier("work directory written")
        reporter = stack.enter_context(
            Reporter(
                workdir,
                num_train_steps=settings.num_train_steps,
                vocab_size=components.encoder.vocab_size,
                profile=settings.profile,
                max_skipped_steps=settings.optimizer.max_skipped_steps,
                restored=loop_state,
                step=start_step,
                pad_id=None if settings.data.packing in CONCATENATING else components.tokenizer.pad_id,
                unknown_id=components.tokenizer.unknown_id,
            )
        )
    if start_step == 0 or parent:
        reporter.write_config(settings.flat())
    log_run_summary(
        model_type=components.encoder.model_type,
        params=state.params,
        text_name=components.text.name,
        tokenizer_name=components.tokenizer.name,
        shards=components.text.describe_assignment(components.stream),
        stages=components.stages,
        start_step=start_step,
    )
    run_stages = _run_stages(components, eval_tasks)
    if jax.process_index() == 0:
        for line in run_stages[0].task_evaluator.descriptions:
            logging.info("%s", line)
    return Run(
        settings=settings,
        workdir=workdir,
        state=state,
        start_step=start_step,
        is_evaluated=loop_state is None or loop_state["evaluated"],
        stages=run_stages,
        unsaved_stream=unsaved_stream,
        batches=batches,
        prefetcher=prefetcher,
        checkpointer=checkpointer,
        reporter=reporter,
        hub=hub,
    )


def _resolve(settings: RunSettings, last_stages: Sequence[Mapping[str, Any]], *, step: int) -> tuple[Stage, ...]:
    """Returns the stages after `step` steps; ends of `last_stages`, the stages at the last start, stay if passed."""
    ends = [stage["end"] for stage in last_stages]
    return resolve(settings, num_devices=jax.device_count(), earlier=ends, step=step)


def _resume_stages(
    settings: RunSettings, last_stages: Sequence[Mapping[str, Any]], *, step: int, applied: int
) -> tuple[Stage, ...]:
    """Returns the stages of a resumed run: only boundaries ahead move, those of stages and of their schedules.

    Args:
      settings: the run's current settings.
      last_stages: the stages at the last start, for a branch those of its parent that have begun; empty for a run of an
        earlier version.
      step: steps done.
      applied: number of steps that were not skipped.
    """
    stages, ends = _resolve(settings, last_stages, step=step), [stage["end"] for stage in last_stages]
    if not last_stages:
        return stages

    def boundaries(index: int, stage: Stage) -> Boundaries:
        if step > 0 and stage.schedule_start >= step:  # It begins later.
            return stage.boundaries
        last = last_stages[min(index, len(last_stages) - 1)]["borders"]
        if stage.schedule_end <= step:
            return last
        return keep_passed_boundaries(
            stage.boundaries,
            last,
            stage.settings.optimizer,
            step=applied - stage.schedule_start,
            ends_as_before=stage.schedule_end in ends,
        )

    return tuple(dataclasses.replace(stage, boundaries=boundaries(index, stage)) for index, stage in enumerate(stages))


def _run_stages(components: Components, eval_tasks: EvalTasks) -> tuple[RunStage, ...]:
    text, eval_steps = components.text, {}

    @functools.cache
    def task_evaluator(encoder: EncoderConfig) -> TaskEvaluator:
        # As long as the sequences of eval/loss, in all stages.
        first = components.stages[0].settings
        length = first.data.max_seq_length
        return TaskEvaluator(
            eval_tasks,
            encoder,
            components.tokenizer,
            max_length=length,
            tokens_per_device=first.per_device_eval_batch_size * length,
        )

    def evaluator(own: Components, settings: RunSettings, rows_RxL: np.ndarray, **options: Any) -> Evaluator:
        length = rows_RxL.shape[1]
        # Stages with the same model share the programs.
        if (own.encoder, length) not in eval_steps:
            with_length = settings.replace({"data.max_seq_length": length})
            execution = build.resolve_execution(with_length, backend=jax.default_backend())
            step_config = dataclasses.replace(own.step_config, model=own.step_config.model.clone(execution=execution))
            eval_steps[own.encoder, length] = parallel.data_parallel(
                functools.partial(steps.eval_step, step_config=step_config, axis_name=parallel.AXIS)
            )
        # Batches have about as many tokens at every length.
        batch = max(1, settings.per_device_eval_batch_size * text.eval_rows_RxL.shape[1] // length)
        return Evaluator(
            eval_steps[own.encoder, length],
            rows_RxL,
            per_device_batch_size=batch,
            pad_id=components.tokenizer.pad_id,
            **options,
        )

    run_stages = []
    for index, stage in enumerate(components.stages):
        own, settings = components.for_stage(stage), stage.settings
        extra = {
            rows.name: evaluator(own, settings, rows.rows_RxL)
            for rows in text.extra_eval_rows
            if rows.first_stage <= index
        }
        length = settings.data.max_seq_length
        predictions = own.step_config.masking.max_predictions_per_seq(length)
        train_step = functools.partial(steps.train_step, step_config=own.step_config, axis_name=parallel.AXIS)
        run_stages.append(
            RunStage(
                stage=stage,
                components=own,
                train_step=parallel.data_parallel(train_step, donate_argnums=(0,)),
                evaluator=evaluator(own, settings, text.eval_rows_RxL, counts=text.eval_counts),
                extra_evaluators=extra,
                task_evaluator=task_evaluator(own.encoder),
                flops_per_token=flops_per_token(own.encoder, length=length, max_predictions_per_seq=predictions),
            )
        )
    return tuple(run_stages)


def _is_finished(settings: RunSettings, workdir: WorkDir) -> bool:
    """Returns whether the last step is exported; pushes it to the hub if that has not happened."""
    if jax.process_index() == 0:
        model_directory.recover(workdir.model)
    parallel.barrier("model recovered")  # The other processes must not look for the model between its renames.
    exported = workdir.exported_step()
    if exported is None or exported < settings.num_train_steps:
        return False
    logging.info("nothing to do: all %d steps are done; the model is in %s/model", exported, workdir.display_path)
    build.push_finished_model(settings, workdir, step=exported)
    return True


def _write_workdir(
    settings: RunSettings,
    workdir: WorkDir,
    components: Components,
    start_step: int,
    parent: Parent | None,
) -> None:
    branches_off = parent.workdir if parent and parent.mode == "branch" else None
    # Of the first stage, as recorded by earlier starts.
    rows_per_process = components.stages[0].rows_per_device * jax.local_device_count()
    warn_batch_size_changed(branches_off or workdir, sequences_per_step=jax.process_count() * rows_per_process)
    changed = workdir.create(
        settings,
        save_tokenizer=parent.copy_tokenizer if parent else components.tokenizer.save,
        processes=jax.process_count(),
        rows_per_process=rows_per_process,
        stages=components.stages,
        eval_checksum=f"{zlib.crc32(components.text.eval_rows_RxL.tobytes()):08x}",
        step=start_step,
        parent=parent.to_json() if parent else None,
        resumes=branches_off,
    )
    for key, (before, now) in changed.items():
        logging.info("changed since the last start: %s from %r to %r", key, before, now)
    workdir.lock()


def _restore(
    components: Components, checkpointer: Checkpointer, parent: Parent | None
) -> tuple[TrainState, dict[str, Any] | None, list[dict[str, Any]]]:
    """Returns the stacked state to start with, and the loop state and stream states that were saved with it.

    For a run at step 0 the loop state is None. A corrupt checkpoint is quarantined, and the one before it is restored.
    """
    newest = checkpointer.latest_step()
    if newest is None and parent is None:
        return parallel.replicate(components.initial_state()), None, []
    like = parallel.global_like(jax.eval_shape(components.initial_state))
    if parent is not None:
        of_parent = parent.restore(like)
        if parent.mode == "restart":
            return parallel.from_global(restart(of_parent.state)), None, []
        return parallel.from_global(of_parent.state), of_parent.loop, of_parent.streams
    while (step := checkpointer.latest_step()) is not None:
        restored, problem = None, "another process cannot read it"
        try:
            restored = checkpointer.restore(step, like=like)
        except CorruptCheckpointError as error:
            problem = str(error)
        try:
            # Orbax lets the processes that have read it wait for the others, which may have failed.
            parallel.barrier("checkpoint read", timeout_minutes=_RESTORE_MINUTES)
        except TimeoutError:
            raise UserError(
                f"--workdir: another process did not finish reading checkpoint {step} within {_RESTORE_MINUTES} "
                f"minutes, this one: {problem if restored is None else 'read it'}; rerun the command on all hosts"
            ) from None
        failed = parallel.any_process(restored is None)
        if restored is not None and not failed:
            return parallel.from_global(restored.state), restored.loop, restored.streams
        if jax.process_index() == 0:
            logging.warning("checkpoint %d is corrupt (%s): moved to %s", step, problem, checkpointer.quarantine(step))
        parallel.barrier(f"checkpoint {step} quarantined")
        checkpointer.reload()
    raise UserError(
        f"--workdir: none of the checkpoints up to {newest} can be read; they are in {checkpointer.damaged}; restore "
        "intact ones, or start a new run with --overwrite"
    )


@contextlib.contextmanager
def _disk_errors(workdir: WorkDir) -> Iterator[None]:
    """Turns an OSError in the work directory, such as a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--workdir={workdir.display_path}: cannot be written ({one_line(error)}); free or mount the disk, then "
            "rerun the same command"
        ) from None
