#!/usr/bin/env bash
# The half of tpu_vm.sh that runs on every worker of a TPU VM; tpu_vm.sh copies it there and calls it.
#
# The run is a systemd service rather than a tmux session, for three reasons. When the machine is taken away systemd
# sends SIGTERM to the run and waits for its checkpoint, where a session is torn down at once. After a reboot the
# service starts by itself. And which exit code means "again" is a line of its unit instead of a loop in a terminal.
#
#   ~/mlm        the code, at the commit in ~/mlm/COMMIT
#   ~/mlm-venv   its Python
#   ~/mlm-run    the command, the unit, the log, the last exit: CODE STATUS, as systemd calls them
set -euo pipefail

readonly CODE=$HOME/mlm VENV=$HOME/mlm-venv RUN=$HOME/mlm-run UNIT=mlm.service
# The newest Python that all of requirements.txt has wheels for; TPU images bring 3.10, which is too old.
readonly PYTHON=3.12

# SSH sessions that are not interactive may have neither.
export PATH=$HOME/.local/bin:$PATH
umask 077

state() { # One word or two: none, running, restarting, stopping, finished, stopped, failed CODE.
  case $(systemctl show "$UNIT" --property=ActiveState --value) in
    active | reloading) echo running && return ;;
    activating) echo restarting && return ;;
    deactivating) echo stopping && return ;;
  esac
  if [[ $(systemctl show "$UNIT" --property=Result --value) == start-limit-hit ]]; then
    echo "failed preempted-again-and-again" && return
  fi
  local code='' status=''
  if [[ -f $RUN/exit ]]; then read -r code status <"$RUN/exit"; fi
  case "$code $status" in
    ' ') echo none ;;
    'exited 0') echo finished ;;
    # 75: stopped after saving. 130: stopped at once. The same command goes on from the last checkpoint.
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
# Preempted ten times in half an hour is no preemption.
StartLimitIntervalSec=1800
StartLimitBurst=10

[Service]
User=$(id -un)
WorkingDirectory=$CODE
EnvironmentFile=-$RUN/env
# After a reboot: not what has finished or failed.
ExecCondition=/bin/bash $CODE/launch/tpu_worker.sh may-start
ExecStart=/bin/bash $RUN/command
ExecStopPost=/bin/bash $CODE/launch/tpu_worker.sh ended
# main.py's exit codes: 0 finished, 75 preempted and saved; whatever else is no better the second time.
Restart=no
RestartForceExitStatus=75
SuccessExitStatus=75
RestartSec=10
# main.py alone gets the SIGTERM and has the time for a checkpoint.
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
      echo "$(hostname): a run is under way here; stop it before another setup" >&2
      exit 1
    fi
    ;;
  install)
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    [[ -d $VENV ]] || uv venv --quiet --python "$PYTHON" "$VENV"
    uv pip install --quiet --python "$VENV/bin/python" --requirement "$CODE/requirements.txt" "jax[tpu]"
    echo "$(hostname): commit $(cat "$CODE/COMMIT"), $("$VENV/bin/python" -c 'import jax; print("jax", jax.__version__)')"
    ;;
  start) # ARGUMENTS of main.py
    shift
    mkdir -p "$RUN"
    if is_alive; then
      echo "$(hostname): the run is under way"
      exit 0
    fi
    # Absolute: a service does not start where a user would.
    printf 'cd %q && exec %q main.py %s\n' "$CODE" "$VENV/bin/python" "${*@Q}" >"$RUN/command"
    unit >"$RUN/$UNIT"
    rm -f "$RUN/exit"
    sudo systemctl daemon-reload
    sudo systemctl reset-failed "$UNIT" 2>/dev/null || true # An error where there never was one.
    sudo systemctl enable --quiet --force "$RUN/$UNIT"
    sudo systemctl start --no-block "$UNIT"
    echo "$(hostname): started"
    ;;
  stop)
    if is_alive; then sudo systemctl stop "$UNIT"; fi
    sudo systemctl disable --quiet "$UNIT" 2>/dev/null || true # An error where there is none.
    echo "$(hostname): $(state)"
    ;;
  status) echo "worker $(hostname) $(cat "$CODE/COMMIT" 2>/dev/null || echo no-code) $(state)" ;;
  logs) # LINES [--follow]
    tail --lines="$2" ${3:+-F} "$RUN/log" | sed --unbuffered "s/^/$(hostname): /"
    ;;
  may-start)
    case $(cat "$RUN/exit" 2>/dev/null || true) in '' | 'exited 75' | 'killed '*) ;; *) exit 1 ;; esac
    ;;
  ended) # Called by systemd. An exit before anything ran, of may-start, is none of the run's.
    if [[ ${SERVICE_RESULT:-} != exec-condition ]]; then echo "$EXIT_CODE $EXIT_STATUS" >"$RUN/exit"; fi
    ;;
  *)
    echo "usage: tpu_worker.sh may-install | install | start ... | stop | status | logs LINES [--follow]" >&2
    exit 2
    ;;
esac
