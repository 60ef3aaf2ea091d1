#!/usr/bin/env bash
# Trains on a Cloud TPU VM, a single host or a pod. Without arguments it prints its usage.
#
# Prints every gcloud call before making it. The flags are those of gcloud 528. tpu_worker.sh runs on the workers.
set -euo pipefail

usage() {
  cat <<'END'
launch/tpu_vm.sh COMMAND NAME [OPTION]... [-- ARGUMENT OF main.py...]

  create   creates the TPU VM                      --type=v3-8 [--spot] [--queued] [--reserved] [--version=...]
  setup    installs one commit of this repository and its requirements on every worker
           (files that are not committed are not copied)                   [--commit=HEAD] [--env=HF_TOKEN]...
  train    starts the same command on every worker and monitors it         -- --config=... --workdir=gs://...
  status   prints the state of the VM and of every worker, with the last lines of the log
  logs     prints the log of the run               [--worker=0] [--lines=100] [--follow]
  stop     saves a checkpoint and stops the run; `train` resumes it
  delete   deletes the TPU VM and its disks; call it when status prints "finished"

  --zone=Z --project=P   default: those of gcloud's configuration
  --dry-run              print the gcloud calls without making them
  --poll=60              seconds between two checks while waiting

train exits with 0 when the run has finished or was stopped, and with 1 when it failed. Until then it re-creates a TPU
VM that was preempted (--spot, or in a --queued request) and resumes the run there from the last checkpoint, any number
of times. It needs the --env options of setup for that. The work directory must outlive the VM: gs://BUCKET/PATH in a
bucket that the VM's service account may read and write, or a disk mounted under /mnt. Ctrl-C ends the monitoring only:
the run continues, and train, called again, monitors it again. --no-watch starts the run without monitoring it.

A pod needs your key in the ssh agent: ssh-add ~/.ssh/google_compute_engine
END
}

die() { # MESSAGE [CODE]; 2, the default, means an error of the user.
  echo "error: $1" >&2
  exit "${2:-2}"
}

log() { echo "$(date +%H:%M:%S)  $*" >&2; }

quoted() { # Prints its arguments so that a shell parses them back.
  local word line=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line# }"
}

call() { # Prints a gcloud call with zone and project, then makes it.
  echo "+ $(quoted gcloud "$@" "${where[@]}")" >&2
  [[ $dry_run ]] || command gcloud "$@" "${where[@]}"
}

ssh_to() { # WORKERS COMMAND; exits with the exit code of the command.
  call compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

on_workers() { # WORKERS ARGUMENT...; calls tpu_worker.sh with the arguments.
  local workers=$1
  shift
  ssh_to "$workers" "bash mlm/launch/tpu_worker.sh $(quoted "$@")"
}

runtime_version() { # TYPE; prints its runtime version, from cloud.google.com/tpu/docs/runtimes.
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "--type=$1: has no known runtime version; set it with --version=..." ;;
  esac
}

create() { # Creates the VM and waits until it exists.
  [[ $type ]] || die "--type: missing; create needs it, such as --type=v3-8 (v5e is called v5litepod-8)"
  local image=${version:-} tier=()
  # Not in the `local` line, which would hide a failure.
  if [[ ! $image ]]; then image=$(runtime_version "$type"); fi
  [[ $spot ]] && tier+=(--spot)
  [[ $reserved ]] && tier+=(--reserved)
  if [[ $queued ]]; then
    call compute tpus queued-resources create "$name" --node-id="$name" \
      --accelerator-type="$type" --runtime-version="$image" "${tier[@]}" || return
    [[ $dry_run ]] || wait_for_queue
  else
    call compute tpus tpu-vm create "$name" --accelerator-type="$type" --version="$image" "${tier[@]}"
  fi
}

queue_state() { # Prints the state of the queued request; nothing if there is none.
  call compute tpus queued-resources describe "$name" --format='value(state.state)' 2> >(grep -v NOT_FOUND >&2) || true
}

wait_for_queue() {
  local state
  while true; do
    state=$(queue_state)
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING) die "$name: the queued request is $state; see the console" 1 ;;
    esac
    log "the queued request $name is ${state:-not visible yet}; waiting"
    sleep "$poll"
  done
}

vm_state() { # Prints the state in the API; GONE if there is no such VM, UNREACHABLE if gcloud fails.
  local answer
  if answer=$(call compute tpus tpu-vm describe "$name" --format='value(state)' 2> >(tee "$scratch/stderr" >&2)); then
    echo "${answer:-UNREACHABLE}"
  elif sleep 0.1 && grep -q 'NOT_FOUND\|was not found' "$scratch/stderr"; then # tee may write a moment later.
    echo GONE
  else
    echo UNREACHABLE
  fi
}

describe_vm() { # Sets type, version, spot and queued to those of the existing VM.
  local answer vm_type vm_version vm_spot vm_preemptible vm_queued format
  format='csv[no-heading](acceleratorType.basename(),runtimeVersion,schedulingConfig.spot,schedulingConfig.preemptible'
  format+=',queuedResource.basename())'
  answer=$(call compute tpus tpu-vm describe "$name" --format="$format") || return 0
  IFS=, read -r vm_type vm_version vm_spot vm_preemptible vm_queued <<<"$answer"
  type=${type:-$vm_type} version=${version:-$vm_version}
  [[ ${vm_spot,,} == true || ${vm_preemptible,,} == true ]] && spot=yes
  [[ $vm_queued ]] && queued=yes
  return 0
}

setup() {
  local sha
  sha=$(git -C "$root" rev-parse --verify --quiet "$commit^{commit}") ||
    die "--commit=$commit: no such commit in $root; name another"
  if [[ $commit == HEAD && -n $(git -C "$root" status --porcelain --untracked-files=no) ]]; then
    log "warning: uncommitted changes in $root are not copied"
  fi
  # An archive rather than a clone: workers need no credentials, and the commit need not be pushed.
  git -C "$root" archive --format=tar.gz --prefix=mlm.new/ --output="$scratch/mlm.tar.gz" "$sha"
  : >"$scratch/mlm.env"
  local variable
  for variable in "${variables[@]}"; do
    [[ -n ${!variable:-} ]] || die "--env=$variable: not set in your environment; export it first"
    printf '%s="%s"\n' "$variable" "${!variable}" >>"$scratch/mlm.env"
  done
  ssh_to all '! test -e mlm/launch/tpu_worker.sh || bash mlm/launch/tpu_worker.sh may-install' || return
  # Values are copied in a file: command lines are visible in process lists and in the output of this script.
  call compute tpus tpu-vm scp "$scratch/mlm.tar.gz" "$scratch/mlm.env" "$name:" --worker=all || return
  ssh_to all "set -e; rm -rf mlm.new; tar -xzf mlm.tar.gz; echo $sha >mlm.new/COMMIT; rm -rf mlm; mv mlm.new mlm
mkdir -p mlm-run; chmod 700 mlm-run; mv mlm.env mlm-run/env; chmod 600 mlm-run/env; rm mlm.tar.gz
bash mlm/launch/tpu_worker.sh install"
}

ask_workers() { # Sets `reports` to a line "HOST COMMIT STATE" for each worker. Fails if ssh fails.
  local script=mlm/launch/tpu_worker.sh
  reports=$(ssh_to all "test ! -e $script && echo worker \$(hostname) no-code none || bash $script status") || return
  reports=$(grep '^worker ' <<<"$reports" | cut -d' ' -f2-)
}

check_train() {
  local workdir=
  for word in "${arguments[@]}"; do
    if [[ $word == --workdir=* ]]; then workdir=${word#--workdir=}; fi
  done
  [[ $workdir ]] || die "--workdir: missing; give the arguments of main.py: -- --config=configs/... --workdir=gs://..."
  case $workdir in
    gs://?*/?* | /mnt/*) ;;
    *://*) die "--workdir=$workdir: is not a supported URL; use gs://BUCKET/PATH" ;;
    *)
      if [[ $spot || $queued ]]; then
        die "--workdir=$workdir: is on the disk of the VM, which is deleted at a preemption; use gs://BUCKET/PATH"
      fi
      ;;
  esac
}

start() { # Starts the run on every worker if all are at one commit; a run in progress continues.
  if [[ ! $dry_run ]]; then
    ask_workers || return
    local commits
    commits=$(cut -d' ' -f2 <<<"$reports" | sort -u)
    case $commits in
      *no-code*) die "$name: is not set up yet; run launch/tpu_vm.sh setup $name" ;;
      *$'\n'*) die "$name: the workers are at different commits; run launch/tpu_vm.sh setup $name" ;;
    esac
    commit=$commits # A re-created VM gets the same one, whatever is committed here until then.
  fi
  on_workers all start "${arguments[@]}"
}

recreate() { # STATE; after a preemption deletes what is left, then creates, sets up and starts until all succeed.
  if [[ $queued ]]; then
    call compute tpus queued-resources delete "$name" --force --quiet || true # It may not exist any more.
  elif [[ $1 != GONE ]]; then
    call compute tpus tpu-vm delete "$name" --quiet || true
  fi
  until (create) 2> >(tee "$scratch/create" >&2); do
    # Waiting helps against these errors, and not against a missing quota, missing permissions or a typing error.
    sleep 0.1
    grep -qi 'no more capacity\|insufficient.*capacity\|"code": 8\|code 8\|unavailable\|already exists\|is SUSPENDED' \
      "$scratch/create" || die "$name: cannot be re-created; see the error above" 1
    if [[ $queued ]]; then call compute tpus queued-resources delete "$name" --force --quiet || true; fi
    log "no TPU is available now; trying again"
    sleep "$poll"
  done
  until setup && start; do
    case $(vm_state) in
      PREEMPTED | TERMINATED | GONE) return ;; # `watch` re-creates it again.
    esac
    log "the setup failed; trying again"
    sleep "$poll"
  done
}

watch() {
  local state failed_before=
  while true; do
    state=$(vm_state)
    case $state in
      READY)
        if ! ask_workers; then
          log "$name is READY but a worker does not answer; checking again"
        elif grep -q ' failed ' <<<"$reports"; then
          # On a preempted pod the last hosts lose the others, and fail, before the API reports the preemption.
          if [[ $failed_before ]]; then
            log "the run failed:"$'\n'"$reports"
            on_workers all logs 20 || true
            return 1
          fi
          failed_before=yes
          log "a worker failed; checking once more whether the VM is being preempted"
        elif ! grep -qv ' none$' <<<"$reports"; then
          start || log "the run could not be started; trying again"
        elif ! grep -qv ' finished$' <<<"$reports"; then
          log "the run is finished"
          return 0
        elif ! grep -qv ' stopped$\| finished$' <<<"$reports"; then
          log "the run was stopped; train resumes it"
          return 0
        else
          failed_before=
          log "$(cut -d' ' -f3- <<<"$reports" | sort | uniq -c | xargs)"
        fi
        ;;
      PREEMPTED | TERMINATED | GONE)
        [[ $spot || $queued ]] || die "$name: is $state; re-create it with create, setup and train" 1
        log "$name is $state; re-creating it"
        recreate "$state"
        failed_before=
        ;;
      STOPPED | STOPPING | DELETING | HIDDEN | HIDING)
        die "$name: is $state at a person's request; start or re-create it, then train again" 1
        ;;
      *) log "$name is $state; waiting" ;;
    esac
    sleep "$poll"
  done
}

train() {
  [[ $dry_run ]] || describe_vm
  check_train
  if [[ ! $dry_run ]]; then
    [[ $type ]] || die "$name: there is no such TPU VM; create it first"
    # `watch` re-creates a VM that was preempted while it was not monitored.
    if [[ $monitor && $(vm_state) != READY ]]; then watch && return; fi
  fi
  start || die "$name: the run could not be started; see above" 1
  [[ $dry_run || ! $monitor ]] || watch
}

status() {
  call compute tpus tpu-vm describe "$name" --format='value(state,health,acceleratorType.basename())'
  on_workers all status
  on_workers "$worker" logs 3
}

delete() {
  if [[ ! $queued && ! $dry_run ]]; then describe_vm; fi
  if [[ $queued ]]; then
    call compute tpus queued-resources delete "$name" --force --quiet
  else
    call compute tpus tpu-vm delete "$name" --quiet
  fi
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
umask 077

[[ $# -ge 1 ]] || { usage && exit 2; }
command=$1
case $command in
  create | setup | train | status | logs | stop | delete) ;;
  -h | --help | help) usage && exit ;;
  *) die "$command: must be one of create, setup, train, status, logs, stop, delete" ;;
esac
name=${2:-}
[[ $name && $name != -* ]] || die "$command: needs the name of the TPU VM: launch/tpu_vm.sh $command NAME"
shift 2

type='' version='' spot='' queued='' reserved='' commit=HEAD worker=0 lines=100 follow='' monitor=yes dry_run=''
poll=60
where=() variables=() arguments=() reports=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    --reserved) reserved=yes ;;
    --zone=* | --project=*) where+=("$1") ;;
    --commit=*) commit=${1#*=} ;;
    --env=*) variables+=("${1#*=}") ;;
    --worker=*) worker=${1#*=} ;;
    --lines=*) lines=${1#*=} ;;
    --follow) follow=--follow ;;
    --no-watch) monitor='' ;;
    --poll=*) poll=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) die "$1: is no option of launch/tpu_vm.sh; put arguments of main.py after --" ;;
  esac
  shift
done
[[ $command == train || ${#arguments[@]} -eq 0 ]] || die "$command: takes no arguments of main.py; only train does"

case $command in
  create | setup | train | status | delete) "$command" ;;
  logs) on_workers "$worker" logs "$lines" $follow ;;
  stop) on_workers all stop ;;
esac
