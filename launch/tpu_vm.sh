#!/usr/bin/env bash
# Trains on a Cloud TPU VM, a single host or a pod. `launch/tpu_vm.sh` alone says how.
#
# Every gcloud call is printed before it is made. The flags are those of gcloud 528; what runs on the workers is in
# tpu_worker.sh.
set -euo pipefail

usage() {
  cat <<'END'
launch/tpu_vm.sh COMMAND NAME [OPTION]... [-- ARGUMENT OF main.py...]

  create   makes the TPU VM        --type=v3-8 [--spot] [--queued] [--reserved] [--version=...]
  setup    puts one commit of this repository, and what it needs, on every worker   [--commit=HEAD] [--env=HF_TOKEN]...
           (files that are not committed do not go along)
  train    starts the same command on every worker and watches it                   -- --config=... --workdir=gs://...
  status   the VM's state and every worker's, with the last lines of the log
  logs     the run's log           [--worker=0] [--lines=100] [--follow]
  stop     saves a checkpoint and stops; `train` goes on from there
  delete   gives the TPU VM back, when status says finished; what is on its disks is gone

  --zone=Z --project=P   where gcloud's own settings do not say
  --dry-run              prints the gcloud calls of the command and makes none of them
  --poll=60              seconds between two looks of whoever waits

train ends with 0 when the run is finished or was stopped, with 1 when it failed. Until then it makes a TPU VM that was
preempted (--spot, or in a --queued request) anew and goes on there from the last checkpoint, as often as it takes
(name the variables of --env to train, too, if setup had any). For that the work directory must outlive the VM: a bucket,
gs://BUCKET/PATH, which the VM's service account may read and write, or one mounted under /mnt. Ctrl-C ends the watching alone: the run goes on, and
train, called again, watches on. --no-watch only starts it.

A pod needs your key in the ssh agent: ssh-add ~/.ssh/google_compute_engine
END
}

die() { # MESSAGE, CODE: 2 is a mistake of the user's.
  echo "error: $1" >&2
  exit "${2:-2}"
}

say() { echo "$(date +%H:%M:%S)  $*" >&2; }

quoted() { # Its words as a shell reads them back.
  local word line=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line# }"
}

call() { # As gcloud, with where the TPU is; printed first.
  echo "+ $(quoted gcloud "$@" "${where[@]}")" >&2
  [[ $dry_run ]] || command gcloud "$@" "${where[@]}"
}

ssh_to() { # WORKERS COMMAND: gcloud's exit code is the command's.
  call compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

on_workers() { # WORKERS WORD...: a command of tpu_worker.sh.
  local workers=$1
  shift
  ssh_to "$workers" "bash mlm/launch/tpu_worker.sh $(quoted "$@")"
}

software() { # The image for a type, from cloud.google.com/tpu/docs/runtimes.
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "--type=$1: no software version is known for it; name one with --version=..." ;;
  esac
}

create() { # Makes the VM and waits until it is there.
  [[ $type ]] || die "create needs the TPU's type, such as --type=v3-8 (v5e is called v5litepod-8)"
  local image=${version:-} tier=()
  # Not in the line above: a failure there would pass unseen.
  if [[ ! $image ]]; then image=$(software "$type"); fi
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

queue_state() { # Empty where there is no such request.
  call compute tpus queued-resources describe "$name" --format='value(state.state)' 2> >(grep -v NOT_FOUND >&2) || true
}

wait_for_queue() {
  local state
  while true; do
    state=$(queue_state)
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING) die "the queued request $name is $state" 1 ;;
    esac
    say "the queued request $name is ${state:-not to be seen}; waiting"
    sleep "$poll"
  done
}

vm_state() { # As the API calls it; GONE where there is none, UNREACHABLE where gcloud cannot tell.
  local answer
  if answer=$(call compute tpus tpu-vm describe "$name" --format='value(state)' 2> >(tee "$scratch/stderr" >&2)); then
    echo "${answer:-UNREACHABLE}"
  elif sleep 0.1 && grep -q 'NOT_FOUND\|was not found' "$scratch/stderr"; then # The pipe's end may be a moment late.
    echo GONE
  else
    echo UNREACHABLE
  fi
}

learn_what_it_is() { # The type, the version, and whether it may be preempted, of the VM that is there.
  local answer is_type is_version is_spot is_preemptible is_queued format
  format='csv[no-heading](acceleratorType.basename(),runtimeVersion,schedulingConfig.spot,schedulingConfig.preemptible'
  format+=',queuedResource.basename())'
  answer=$(call compute tpus tpu-vm describe "$name" --format="$format") || return 0
  IFS=, read -r is_type is_version is_spot is_preemptible is_queued <<<"$answer"
  type=${type:-$is_type} version=${version:-$is_version}
  [[ ${is_spot,,} == true || ${is_preemptible,,} == true ]] && spot=yes
  [[ $is_queued ]] && queued=yes
  return 0
}

setup() {
  local sha
  sha=$(git -C "$root" rev-parse --verify --quiet "$commit^{commit}") ||
    die "--commit=$commit: there is no such commit in $root"
  if [[ $commit == HEAD && -n $(git -C "$root" status --porcelain --untracked-files=no) ]]; then
    say "warning: changes in $root that are not committed do not go along"
  fi
  # An archive rather than a clone: no credentials on the workers, and commits that were never pushed.
  git -C "$root" archive --format=tar.gz --prefix=mlm.new/ --output="$scratch/mlm.tar.gz" "$sha"
  : >"$scratch/mlm.env"
  local variable
  for variable in "${variables[@]}"; do
    [[ -n ${!variable:-} ]] || die "--env=$variable: there is no such variable in your environment"
    printf '%s="%s"\n' "$variable" "${!variable}" >>"$scratch/mlm.env"
  done
  ssh_to all '! test -e mlm/launch/tpu_worker.sh || bash mlm/launch/tpu_worker.sh may-install' || return
  # Values go by file: a command line shows in process lists and in what is printed here.
  call compute tpus tpu-vm scp "$scratch/mlm.tar.gz" "$scratch/mlm.env" "$name:" --worker=all || return
  ssh_to all "set -e; rm -rf mlm.new; tar -xzf mlm.tar.gz; echo $sha >mlm.new/COMMIT; rm -rf mlm; mv mlm.new mlm
mkdir -p mlm-run; chmod 700 mlm-run; mv mlm.env mlm-run/env; chmod 600 mlm-run/env; rm mlm.tar.gz
bash mlm/launch/tpu_worker.sh install"
}

ask_workers() { # Sets `reports`: one "HOST COMMIT STATE" a worker. Fails where ssh does.
  local script=mlm/launch/tpu_worker.sh
  reports=$(ssh_to all "test ! -e $script && echo worker \$(hostname) no-code none || bash $script status") || return
  reports=$(grep '^worker ' <<<"$reports" | cut -d' ' -f2-)
}

check_train() {
  local workdir=
  for word in "${arguments[@]}"; do
    if [[ $word == --workdir=* ]]; then workdir=${word#--workdir=}; fi
  done
  [[ $workdir ]] || die "train needs the arguments of main.py: -- --config=configs/... --workdir=gs://..."
  case $workdir in
    gs://?*/?* | /mnt/*) ;;
    *://*) die "--workdir=$workdir: of URLs only gs://BUCKET/PATH can be a work directory; use one" ;;
    *)
      if [[ $spot || $queued ]]; then
        die "--workdir=$workdir is on the VM's own disk, which goes when the VM is preempted; use gs://BUCKET/PATH"
      fi
      ;;
  esac
}

start() { # On every worker, if all are at one commit; what is under way stays.
  if [[ ! $dry_run ]]; then
    ask_workers || return
    local commits
    commits=$(cut -d' ' -f2 <<<"$reports" | sort -u)
    case $commits in
      *no-code*) die "$name is not set up yet: launch/tpu_vm.sh setup $name" ;;
      *$'\n'*) die "the workers of $name are at different commits: launch/tpu_vm.sh setup $name" ;;
    esac
    commit=$commits # Also on a VM made anew, whatever is committed here until then.
  fi
  on_workers all start "${arguments[@]}"
}

make_anew() { # After a preemption: away with what is left, then create, setup and start until all three work.
  if [[ $queued ]]; then
    call compute tpus queued-resources delete "$name" --force --quiet || true # It may be gone already.
  elif [[ $1 != GONE ]]; then
    call compute tpus tpu-vm delete "$name" --quiet || true
  fi
  until (create) 2> >(tee "$scratch/create" >&2); do
    # What waiting mends; a quota, a right or a typing mistake it does not.
    sleep 0.1
    grep -qi 'no more capacity\|insufficient.*capacity\|"code": 8\|code 8\|unavailable\|already exists\|is SUSPENDED' \
      "$scratch/create" || die "$name cannot be made anew; see above" 1
    if [[ $queued ]]; then call compute tpus queued-resources delete "$name" --force --quiet || true; fi
    say "no TPU to be had now; trying again"
    sleep "$poll"
  done
  until setup && start; do
    case $(vm_state) in
      PREEMPTED | TERMINATED | GONE) return ;; # The watching sees to it.
    esac
    say "the setup failed; trying again"
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
          say "$name is READY but a worker does not answer; looking again"
        elif grep -q ' failed ' <<<"$reports"; then
          # A preempted pod's last hosts see the others go, and fail, before the API knows.
          if [[ $failed_before ]]; then
            say "the run failed:"$'\n'"$reports"
            on_workers all logs 20 || true
            return 1
          fi
          failed_before=yes
          say "a worker failed; looking once more whether the machine is being taken away"
        elif ! grep -qv ' none$' <<<"$reports"; then
          start || say "the run could not be started; trying again"
        elif ! grep -qv ' finished$' <<<"$reports"; then
          say "the run is finished"
          return 0
        elif ! grep -qv ' stopped$\| finished$' <<<"$reports"; then
          say "the run was stopped; train goes on with it"
          return 0
        else
          failed_before=
          say "$(cut -d' ' -f3- <<<"$reports" | sort | uniq -c | xargs)"
        fi
        ;;
      PREEMPTED | TERMINATED | GONE)
        [[ $spot || $queued ]] || die "$name is $state; make it again with create, setup and train" 1
        say "$name is $state: making it anew"
        make_anew "$state"
        failed_before=
        ;;
      STOPPED | STOPPING | DELETING | HIDDEN | HIDING) die "$name is $state, by somebody's hand" 1 ;;
      *) say "$name is $state; waiting" ;;
    esac
    sleep "$poll"
  done
}

train() {
  [[ $dry_run ]] || learn_what_it_is
  check_train
  if [[ ! $dry_run ]]; then
    [[ $type ]] || die "there is no TPU VM $name; create it first"
    # One that was preempted while nobody watched is seen to by the watching.
    if [[ $watching && $(vm_state) != READY ]]; then watch && return; fi
  fi
  start || die "the run could not be started" 1
  [[ $dry_run || ! $watching ]] || watch
}

status() {
  call compute tpus tpu-vm describe "$name" --format='value(state,health,acceleratorType.basename())'
  on_workers all status
  on_workers "$worker" logs 3
}

delete() {
  if [[ ! $queued && ! $dry_run ]]; then learn_what_it_is; fi
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
  *) die "$command is none of create, setup, train, status, logs, stop, delete" ;;
esac
name=${2:-}
[[ $name && $name != -* ]] || die "$command needs the TPU VM's name: launch/tpu_vm.sh $command NAME"
shift 2

type='' version='' spot='' queued='' reserved='' commit=HEAD worker=0 lines=100 follow='' watching=yes dry_run='' poll=60
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
    --no-watch) watching='' ;;
    --poll=*) poll=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) die "$1 is not an option of launch/tpu_vm.sh; arguments of main.py come after --" ;;
  esac
  shift
done
[[ $command == train || ${#arguments[@]} -eq 0 ]] || die "only train takes arguments of main.py"

case $command in
  create | setup | train | status | delete) "$command" ;;
  logs) on_workers "$worker" logs "$lines" $follow ;;
  stop) on_workers all stop ;;
esac
