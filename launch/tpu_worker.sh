#!/usr/bin/env bash
# The part of tpu_vm.sh that runs on every worker of a TPU VM; tpu_vm.sh copies it there and calls it.
#
# The run is a systemd service rather than a tmux session, for three reasons. At a preemption systemd sends SIGTERM to
# the run and waits for its checkpoint, where a session is killed at once. After a reboot the service starts
# automatically. And the exit code that means "restart" is a line of the unit instead of a loop in a terminal.
#
#   ~/mlm        the code, at the commit in ~/mlm/COMMIT
#   ~/mlm-venv   its Python
#   ~/mlm-run    the command, the unit, the log, and the last exit: systemd's EXIT_CODE and EXIT_STATUS
set -euo pipefail

readonly CODE=$HOME/mlm VENV=$HOME/mlm-venv RUN=$HOME/mlm-run UNIT=mlm.service
# The newest Python that all requirements have wheels for; TPU images have 3.10, which is too old.
readonly PYTHON=3.12

# Sessions that are not interactive may lack it.
export PATH=$HOME/.local/bin:$PATH
umask 077

state() { # Prints none, running, restarting, stopping, finished, stopped or "failed STATUS".
  case $(systemctl show "$UNIT" --property=ActiveState --value) in
    active | reloading) echo running && return ;;
    activating) echo restarting && return ;;
    deactivating) echo stopping && return ;;
  esac
  if [[ $(systemctl show "$UNIT" --property=Result --value) == start-limit-hit ]]; then
    echo "failed too-many-restarts" && return
  fi
  local code='' status=''
  if [[ -f $RUN/exit ]]; then read -r code status <"$RUN/exit"; fi
  case "$code $status" in
    ' ') echo none ;;
    'exited 0') echo finished ;;
    # 75: stopped after a save. 130: stopped at once. Both resume from the last checkpoint.
    'exited 75' | 'exited 130') echo stopped ;;
    *) echo "failed $status" ;;
  esac
}

is_alive() { case $(state) in running | restarting | stopping) ;; *) return 1 ;; esac }

unit() {
  cat <<END
[Unit]
Description=masked language model training
Wants=network-online.target
After=network-online.target
# Ten restarts in half an hour have another cause than preemptions.
StartLimitIntervalSec=1800
StartLimitBurst=10

[Service]
User=$(id -un)
WorkingDirectory=$CODE
EnvironmentFile=-$RUN/env
# Keeps a finished or failed run from starting after a reboot.
ExecCondition=/bin/bash $CODE/launch/tpu_worker.sh may-start
ExecStart=/bin/bash $RUN/command
ExecStopPost=/bin/bash $CODE/launch/tpu_worker.sh ended
# Exit codes of main.py: 0 finished, 75 stopped by a signal and saved. Others would fail again.
Restart=no
RestartForceExitStatus=75
SuccessExitStatus=75
RestartSec=10
# SIGTERM goes to main.py only, which has the time to save a checkpoint.
KillMode=mixed
TimeoutStopSec=600
StandardOutput=append:$RUN/log
StandardError=append:$RUN/log

[Install]
WantedBy=multi-user.target
END
}

case ${1:-} in
  may-install)
    if is_alive; then
      echo "$(hostname): a run is in progress; stop it before another setup" >&2
      exit 1
    fi
    ;;
  install)
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    [[ -d $VENV ]] || uv venv --quiet --python "$PYTHON" "$VENV"
    uv pip install --quiet --python "$VENV/bin/python" --requirement "$CODE/requirements.txt" "jax[tpu]"
    echo "$(hostname): commit $(cat "$CODE/COMMIT"), $("$VENV/bin/python" -c 'import jax; print("jax", jax.__version__)')"
    ;;
  start) # ARGUMENT of main.py...
    shift
    mkdir -p "$RUN"
    if is_alive; then
      echo "$(hostname): the run is in progress"
      exit 0
    fi
    # Absolute paths: a service has another working directory and PATH.
    printf 'cd %q && exec %q main.py %s\n' "$CODE" "$VENV/bin/python" "${*@Q}" >"$RUN/command"
    unit >"$RUN/$UNIT"
    rm -f "$RUN/exit"
    sudo systemctl daemon-reload
    sudo systemctl reset-failed "$UNIT" 2>/dev/null || true # Fails if it never failed.
    sudo systemctl enable --quiet --force "$RUN/$UNIT"
    sudo systemctl start --no-block "$UNIT"
    echo "$(hostname): started"
    ;;
  stop)
    if is_alive; then sudo systemctl stop "$UNIT"; fi
    sudo systemctl disable --quiet "$UNIT" 2>/dev/null || true # Fails if there is no service.
    echo "$(hostname): $(state)"
    ;;
  status) echo "worker $(hostname) $(cat "$CODE/COMMIT" 2>/dev/null || echo no-code) $(state)" ;;
  logs) # LINES [--follow]
    tail --lines="$2" ${3:+-F} "$RUN/log" | sed --unbuffered "s/^/$(hostname): /"
    ;;
  may-start)
    case $(cat "$RUN/exit" 2>/dev/null || true) in '' | 'exited 75' | 'killed '*) ;; *) exit 1 ;; esac
    ;;
  ended) # Called by systemd, also after may-start has kept the run from starting.
    if [[ ${SERVICE_RESULT:-} != exec-condition ]]; then echo "$EXIT_CODE $EXIT_STATUS" >"$RUN/exit"; fi
    ;;
  *)
    echo "usage: tpu_worker.sh may-install | install | start ... | stop | status | logs LINES [--follow]" >&2
    exit 2
    ;;
esac
