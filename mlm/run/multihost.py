"""Several processes as one run: how they find each other, and how one failure ends them all."""

import contextlib
import faulthandler
import importlib.util
import os
import re
import signal
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from mlm import parallel
from mlm.errors import UserError, one_line
from mlm.run.signals import EXIT_INTERRUPTED, Interrupted, signal_listener

# A process without a heartbeat for this long counts as lost, which ends the run.
HEARTBEAT_TIMEOUT_SECONDS = 30
# Process 0 may still be uploading when the others have finished.
SHUTDOWN_TIMEOUT_SECONDS = 24 * 3600
# Key in the coordination service for the first failure: "<exit code> <process> <cause>".
_FAILURE_KEY = "mlm/failure"
# Messages of the coordination service when another process is gone.
_PEER_LOST = re.compile(r"heartbeat timeout|Barrier failed|coordination service", re.IGNORECASE)


def start(
    *, coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Starts `jax.distributed`, before any other use of jax.

    An argument that is None is detected on a TPU pod and under Slurm, Open MPI or Kubernetes.

    Raises:
      UserError: the processes cannot find each other.
    """
    # jax aborts a process whose run has lost another one, and logs which one. faulthandler would add a hundred lines of
    # stack traces below that message.
    faulthandler.disable()
    # The only collectives between CPU processes; ignored on other devices.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    at = f" at {coordinator_address}" if coordinator_address else ""
    logging.info("waiting for the other processes%s; start the same command on every host", at)
    try:
        with signal_listener(_leave):
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--multihost: the processes cannot find each other ({one_line(error)}); give each "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I, or omit --multihost"
        ) from None


def _leave(number: int) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name} while waiting for the other processes\n".encode())
    os._exit(EXIT_INTERRUPTED)


def on_tpu_pod() -> bool:
    """Returns whether this is one of several hosts of a TPU slice, from the environment or the metadata server."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    workers = os.environ.get("TPU_WORKER_HOSTNAMES")
    if workers is None and (os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio")):
        # The variable and the metadata entry that jax reads.
        host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with urllib.request.urlopen(request, timeout=2) as answer:
                workers = answer.read().decode()
        except (urllib.error.URLError, TimeoutError):
            return False
    return "," in (workers or "")


@contextlib.contextmanager
def propagate_failures() -> Iterator[None]:
    """Ends all processes if one raises inside this context; each prints the first cause as its last line.

    The failed process skips its clean-up: the other processes may be waiting for it in a collective, and files in the
    work directory are complete at every moment. Does nothing where there is only one process.
    """
    if jax.process_count() == 1:
        yield
        return
    # A key-value store that needs no device: in a failed run processes may wait for each other on the devices.
    client = parallel.distributed_state().client
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, done), name="mlm-multihost", daemon=True)
    watcher.start()
    try:
        yield
    except Interrupted as interrupted:
        if not interrupted.on_all_processes:
            _end_all(client, str(interrupted), EXIT_INTERRUPTED)
        raise
    except UserError as error:
        _end_all(client, str(error), 2)
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and _PEER_LOST.search(str(error)):
            print(
                f"error: another process has ended or has sent no heartbeat for {HEARTBEAT_TIMEOUT_SECONDS} s; see its "
                "log, then rerun the same command on all hosts to resume from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        traceback.print_exc()
        _end_all(client, f"{type(error).__name__}: {one_line(error)}", 1)
    finally:
        done.set()
        watcher.join()


def _end_all(client: Any, cause: str, code: int) -> None:
    """Publishes the cause for the other processes and ends this one. The first published cause stays."""
    try:
        client.key_value_set(_FAILURE_KEY, f"{code} {jax.process_index()} {cause}")
    except jax.errors.JaxRuntimeError:
        # Another process has failed before, and the watcher is printing its cause; or process 0 is gone.
        time.sleep(5)
    print(f"error: {cause}", file=sys.stderr, flush=True)
    # Process 0 serves the key, which the others are about to read.
    time.sleep(2)
    os._exit(code)


def _watch(client: Any, done: threading.Event) -> None:
    while not done.is_set():
        try:
            message = client.blocking_key_value_get(_FAILURE_KEY, 1000)
        except jax.errors.JaxRuntimeError:
            # No process has failed within the last second.
            time.sleep(0.1)
            continue
        code, process, cause = message.split(" ", 2)
        if int(process) == jax.process_index():
            return
        print(f"error: process {process} failed first: {cause}", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED if int(code) == EXIT_INTERRUPTED else 1)
