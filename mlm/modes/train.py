"""--mode=train: trains, alone or as one of several processes."""

from mlm.run import multihost as multihost_lib
from mlm.run import signals
from mlm.run.workdir import KeyChanges
from mlm.settings import RunSettings


def run(
    settings: RunSettings,
    workdir: str,
    *,
    command: str,
    overwrite: bool,
    multihost: bool | None,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    key_changes: KeyChanges,
) -> None:
    """Trains a run, or resumes it.

    Args:
      settings: the run's settings.
      workdir: the run's directory.
      command: the command that started this process, for the printed hint on training for longer.
      overwrite: start a new run after renaming the existing work directory.
      multihost: run as one of several processes; None for automatic detection of a TPU pod.
      coordinator_address, num_processes, process_id: arguments of `jax.distributed.initialize`.
      key_changes: how config keys have changed since earlier versions.

    Raises:
      UserError: the run cannot be started or resumed, or training failed in a way the user can fix.
      Interrupted: a signal asked it to stop, and its state is saved.
    """
    signals.exit_on_signal()
    if multihost or (multihost is None and multihost_lib.on_tpu_pod()):
        multihost_lib.start(coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id)
    # Imported after jax.distributed is set up, and after exit_on_signal: it takes seconds.
    from mlm.train import train_and_evaluate

    # Interrupt: after jax.distributed, which installs a signal handler of its own.
    with multihost_lib.propagate_failures(), signals.Interrupt() as interrupt:
        train_and_evaluate(
            settings, workdir, command=command, interrupt=interrupt, overwrite=overwrite, key_changes=key_changes
        )
