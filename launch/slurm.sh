#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster; `launch/slurm.sh` alone says how.
#
# The script has two lives: called by hand it submits itself to sbatch, and the job it becomes calls srun. Every Slurm
# call that it makes is printed first.
#
# A process has one GPU and sees all of its node's: under Slurm jax.distributed takes the one whose number is the
# process's on the node (SLURM_LOCALID), which is wrong where --gpus-per-task hides the others.
set -euo pipefail

usage() {
  cat <<'END'
launch/slurm.sh [OPTION]... -- ARGUMENT OF main.py... (--config=... --workdir=...)

  --nodes=1 --gpus=8      nodes, and GPUs on each
  --time=24:00:00         the job's limit; a run that needs longer queues again by itself
  --sbatch=--partition=x  any other option of sbatch; may come several times
  --python=PATH           .venv/bin/python if there is one, else python
  --dry-run               prints the call and makes none

Ten minutes before its limit, or when Slurm takes the nodes for another job, the run saves a checkpoint and the job goes
back into the queue; it goes on from there. A failed run is not started again, and neither is one that scancel ends. The
work directory must be on a disk that all nodes see. Jobs run at the commit they were submitted at, or not at all.
END
}

die() { # Of a mistake of the user's.
  echo "error: $1" >&2
  exit 2
}

call() { # Printed first.
  echo "+ ${*@Q}" >&2
  [[ $dry_run ]] || "$@"
}

submit() {
  local workdir=
  for word in "${arguments[@]}"; do
    if [[ $word == --workdir=* ]]; then workdir=${word#--workdir=}; fi
  done
  [[ $workdir ]] || die "no arguments of main.py: -- --config=configs/... --workdir=..."
  local commit
  commit=$(git -C "$root" rev-parse HEAD) || die "$root is not a git repository"
  # The signal goes to the processes of main.py, not to this script. Requeueing also covers a node that breaks down.
  call sbatch --job-name="mlm-${workdir##*/}" --chdir="$root" --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" --time="$limit" --signal=TERM@600 --requeue --open-mode=append --output=slurm-%j.log \
    "${options[@]}" --export="ALL,MLM_COMMIT=$commit,MLM_PYTHON=$python" "$root/launch/slurm.sh" -- "${arguments[@]}"
}

run() {
  local commit state process code=0
  commit=$(git rev-parse HEAD)
  [[ $commit == "${MLM_COMMIT:-$commit}" ]] ||
    die "this job was submitted at commit $MLM_COMMIT and $PWD is at $commit; check that out and scontrol requeue it"
  # This shell is told, too, when the job is ended; it stays, for main.py's exit code.
  trap : TERM
  # No process is killed because another one is through: at a preemption they end one after the other, saving. One that
  # fails takes the others down by itself.
  local step=(srun --kill-on-bad-exit=0 --wait=0 "$MLM_PYTHON" main.py "${arguments[@]}" --multihost)
  echo "+ ${step[*]@Q}" >&2
  "${step[@]}" &
  process=$!
  # A trapped signal ends a `wait`, not the process.
  while kill -0 "$process" 2>/dev/null; do
    code=0
    wait "$process" || code=$?
  done
  if [[ $code == 75 ]]; then
    # One that scancel or another job's turn ends is COMPLETING; Slurm knows what to do with it.
    state=$(call squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
    if [[ $state == RUNNING ]]; then
      call scontrol requeue "$SLURM_JOB_ID"
    fi
  fi
  exit "$code"
}

nodes=1 gpus=8 limit=24:00:00 options=() python='' dry_run='' arguments=()
[[ $# -ge 1 ]] || { usage && exit 2; }
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help | help) usage && exit ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=*) limit=${1#*=} ;;
    --sbatch=*) options+=("${1#*=}") ;;
    --python=*) python=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) die "$1 is not an option of launch/slurm.sh; arguments of main.py come after --" ;;
  esac
  shift
done

# In a job Slurm runs a copy of this file, and --chdir has seen to the place.
if [[ ${MLM_COMMIT:-} && ${SLURM_JOB_ID:-} ]]; then
  run
else
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ ! $python ]]; then
    if [[ -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; else python=python; fi
  fi
  submit
fi
