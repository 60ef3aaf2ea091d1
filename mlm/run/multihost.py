"""Several processes as one run: how they find each other, and that they end together."""

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

import jax
from absl import logging

# The client of the coordination service; jax has no public name for it.
from jax._src import distributed

from mlm.errors import UserError, one_line
from mlm.run.signals import EXIT_INTERRUPTED, Interrupted, signal_listener

# A process that has not been heard of for so long is given up, and so is the run.
HEARTBEAT_TIMEOUT_SECONDS = 30
# The first process may still be uploading when the others are done.
SHUTDOWN_TIMEOUT_SECONDS = 24 * 3600
_FAILURE = "mlm/failure"
# How the coordination service says it.
_PEER_LOST = re.compile(r"heartbeat timeout|Barrier failed|coordination service", re.IGNORECASE)


def start(
    *, coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Starts `jax.distributed`, before any other use of jax. What is None is found by itself on a TPU pod, under
    Slurm, Open MPI or Kubernetes.

    Raises:
      UserError: the others cannot be found.
    """
    # jax ends a process whose run has lost another one by itself, and says which: where every thread of this one was
    # standing then would be the last hundred lines of the log.
    faulthandler.disable()
    # The only one that CPU processes have; others do not look at it.
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
            f"--multihost: the processes do not find each other ({one_line(error)}); give each "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I, or leave --multihost out"
        ) from None


def _leave(number: int) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name} before all processes were there\n".encode())
    os._exit(EXIT_INTERRUPTED)


def on_tpu_pod() -> bool:
    """Whether this is one of several hosts of a TPU slice, as its environment or its metadata server says."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    workers = os.environ.get("TPU_WORKER_HOSTNAMES")
    if workers is None and (os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio")):
        # The same variable as in jax, and the same entry that it reads.
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
    """Inside, what ends one process ends all: each prints the first cause as its last line.

    A process that fails does not clean up: others may be waiting for it in what it would wait for, and all that is
    written to the work directory is whole at any moment anyway. Nothing is done where there is only one process.
    """
    if jax.process_count() == 1:
        yield
        return
    client = distributed.global_state.client
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, done), name="mlm-hosts", daemon=True)
    watcher.start()
    try:
        yield
    except Interrupted as interrupted:
        if not interrupted.together:
            _end(client, str(interrupted), EXIT_INTERRUPTED)
        raise
    except UserError as error:
        _end(client, str(error), 2)
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and _PEER_LOST.search(str(error)):
            print(
                f"error: another process of the run has not been heard of for {HEARTBEAT_TIMEOUT_SECONDS} s, or is "
                "gone; its log may say why. The same command on all goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        traceback.print_exc()
        _end(client, f"{type(error).__name__}: {one_line(error)}", 1)
    finally:
        done.set()
        watcher.join()


def _end(client: "jax._src.lib._jax.DistributedRuntimeClient", cause: str, code: int) -> None:
    """Tells the other processes, and ends this one; what another has told before is the first cause."""
    try:
        client.key_value_set(_FAILURE, f"{code} {jax.process_index()} {cause}")
    except jax.errors.JaxRuntimeError:
        # There is one already, which the watcher is printing; or nobody is left to tell.
        time.sleep(5)
    print(f"error: {cause}", file=sys.stderr, flush=True)
    # The first process keeps what the others are about to read.
    time.sleep(2)
    os._exit(code)


def _watch(client: "jax._src.lib._jax.DistributedRuntimeClient", done: threading.Event) -> None:
    while not done.is_set():
        try:
            told = client.blocking_key_value_get(_FAILURE, 1000)
        except jax.errors.JaxRuntimeError:
            # Nobody has failed in the last second.
            time.sleep(0.1)
            continue
        code, process, cause = told.split(" ", 2)
        if int(process) == jax.process_index():
            return
        print(f"error: process {process} failed first: {cause}", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED if int(code) == EXIT_INTERRUPTED else 1)
