#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster. Without arguments it prints its usage.
#
# When you call it, the script submits itself to sbatch; the job then calls srun. It prints every Slurm call before
# making it.
#
# Each process uses one GPU and sees all GPUs of its node: under Slurm jax.distributed selects the one with the number
# SLURM_LOCALID, which would be wrong if --gpus-per-task hid the others.
set -euo pipefail

usage() {
  cat <<'END'
launch/slurm.sh [OPTION]... -- ARGUMENT OF main.py... (--config=... --workdir=...)

  --nodes=1 --gpus=8      nodes, and GPUs on each
  --time=24:00:00         time limit of the job; a run that needs longer is requeued automatically
  --sbatch=--partition=x  any other option of sbatch; may be given several times
  --python=PATH           default: .venv/bin/python if it exists, else python
  --dry-run               print the sbatch call without making it

Ten minutes before its limit, or when Slurm preempts it, the run saves a checkpoint and the job is requeued; it resumes
from the checkpoint. A run that failed or was cancelled by scancel is not requeued. The work directory must be on a disk
that all nodes see. A job refuses to run at another commit than that at which it was submitted.
END
}

die() { # MESSAGE; for an error of the user.
  echo "error: $1" >&2
  exit 2
}

call() { # Prints a call, then makes it.
  echo "+ ${*@Q}" >&2
  [[ $dry_run ]] || "$@"
}

submit() {
  local workdir=
  for word in "${arguments[@]}"; do
    if [[ $word == --workdir=* ]]; then workdir=${word#--workdir=}; fi
  done
  [[ $workdir ]] || die "--workdir: missing; give the arguments of main.py: -- --config=configs/... --workdir=..."
  local commit
  commit=$(git -C "$root" rev-parse HEAD) || die "$root: is no git repository; clone the repository with git"
  # The signal goes to the processes of main.py, not to this script. --requeue also covers a failing node.
  call sbatch --job-name="mlm-${workdir##*/}" --chdir="$root" --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" --time="$limit" --signal=TERM@600 --requeue --open-mode=append --output=slurm-%j.log \
    "${options[@]}" --export="ALL,MLM_COMMIT=$commit,MLM_PYTHON=$python" "$root/launch/slurm.sh" -- "${arguments[@]}"
}

run() {
  local commit state process code=0
  commit=$(git rev-parse HEAD)
  [[ $commit == "${MLM_COMMIT:-$commit}" ]] ||
    die "$PWD: is at commit $commit, the job was submitted at $MLM_COMMIT; check that out, then requeue the job"
  # The batch shell receives SIGTERM as well when the job ends; it must wait for the exit code of main.py.
  trap : TERM
  # srun must not kill processes when another one exits: at a preemption they save and exit one after the other. A
  # process that fails ends the others itself.
  local step=(srun --kill-on-bad-exit=0 --wait=0 "$MLM_PYTHON" main.py "${arguments[@]}" --multihost)
  echo "+ ${step[*]@Q}" >&2
  "${step[@]}" &
  process=$!
  # A trapped signal ends `wait`, not the process.
  while kill -0 "$process" 2>/dev/null; do
    code=0
    wait "$process" || code=$?
  done
  if [[ $code == 75 ]]; then
    # A job that scancel or a preemption ends is COMPLETING, and Slurm requeues it if need be.
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
    *) die "$1: is no option of launch/slurm.sh; put arguments of main.py after --" ;;
  esac
  shift
done

# A job runs a copy of this file, in the directory that --chdir has set.
if [[ ${MLM_COMMIT:-} && ${SLURM_JOB_ID:-} ]]; then
  run
else
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ ! $python ]]; then
    if [[ -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; else python=python; fi
  fi
  submit
fi
