#!/usr/bin/env bash
# Trains on a Cloud TPU slice, held as a queued resource.
#
# usage: launch/tpu_pod.sh COMMAND FLAG... [-- FLAG_OF_EMPDG_TRAIN...]
#
# commands:
#   create   queue for the slice: --spot or on demand
#   wait     until it is ACTIVE; shows its state and the seconds
#   setup    when ssh answers on all workers (ten tries), send HEAD of this
#            clone to them and install it
#   train    start on all workers; goes on without this terminal
#   status   the slice's state, and that of training on every worker
#   logs     a worker's output: --worker=N, --follow
#   stop     SIGTERM to training on all workers, which saves (end `run` before:
#            it would resume)
#   resume   after a preemption: delete what is left of the slice, then create,
#            wait, setup, train; the run goes on from its checkpoint
#   run      create, wait, setup, train; then poll, and resume after every
#            preemption or lost host until training is over. It bears calls
#            that fail, but not three starts in a row. Ctrl-C ends the polling
#            alone; `resume` or `run` takes it up again
#   delete   give the slice back. Until then it costs, training or not
#
# flags:
#   --name=           of the queued resource and of the slice (required)
#   --zone=           of Google Cloud, where there is quota (required)
#   --project=        (gcloud's own)
#   --type=           such as v5litepod-16 (for create, train, resume, run)
#   --runtime=        (by type: v2-alpha-tpuv5-lite for v5litepod,
#                     v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e,
#                     tpu-ubuntu2204-base for v4)
#   --spot            cheaper, and preempted at any time
#   --workdir=        gs://BUCKET/PATH (for train, resume, run)
#   --shared_disk     --workdir is a path that all workers share
#   --config=         (configs/pod.py:CHIPS)
#   --poll=30         seconds between two looks or tries
#   --max_restarts=20 how often run resumes
#   --worker=0 --follow   for logs
#   --dry_run         print the commands alone
#   --help            this text
#
# It needs gcloud, authenticated and with a project; quota for the type in the
# zone; and a bucket to which the service account of the slice may write.
#
# examples:
#   launch/tpu_pod.sh run --name=empdg --zone=us-west4-a --type=v5litepod-16 \
#     --spot --workdir=gs://BUCKET/pod -- --config.train.seed=1
#   launch/tpu_pod.sh logs --name=empdg --zone=us-west4-a --follow
#   launch/tpu_pod.sh delete --name=empdg --zone=us-west4-a
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
source "$root/launch/common.sh"

name='' zone='' project='' type='' runtime='' spot='' workdir='' shared_disk=''
config='' poll=30 max_restarts=20 worker=0 follow='' dry_run=''
parse_flags 'name zone project type runtime workdir config poll max_restarts
 worker' 'spot shared_disk follow dry_run' "$@"

[[ -n $COMMAND ]] || refuse "no command is given; see $SCRIPT --help"
case $COMMAND in
  create) need name zone type ;;
  train | resume | run) need name zone type workdir ;;
  wait | setup | status | logs | stop | delete) need name zone ;;
  *) refuse "unknown command '$COMMAND'; see $SCRIPT --help" ;;
esac
need_number 0 poll max_restarts
[[ $worker == all ]] || need_number 0 worker

trap 'exit 130' INT  # Whatever status gcloud ends with after Ctrl-C.

several_hosts=
if [[ -n $type ]]; then
  if ! [[ $type =~ ^(v[0-9]+[a-z]*)-([0-9]+)$ ]]; then
    refuse "--type=$type: expected one such as v5litepod-16"
  fi
  generation=${BASH_REMATCH[1]}
  chips=$((10#${BASH_REMATCH[2]}))
  # All generations have up to 8 of what the type counts on one host.
  ((chips <= 8)) || several_hosts=1
  # The types of v4 and v5p count cores, of which a chip has two.
  case $generation in
    v4 | v5p) chips=$((chips / 2)) ;;
  esac
  : "${config:=configs/pod.py:$chips}"
  if [[ -z $runtime ]]; then
    case $generation in
      v5litepod) runtime=v2-alpha-tpuv5-lite ;;
      v5p) runtime=v2-alpha-tpuv5 ;;
      v6e) runtime=v2-alpha-tpuv6e ;;
      v4) runtime=tpu-ubuntu2204-base ;;
      *) refuse "--runtime is missing: no default for --type=$type" ;;
    esac
  fi
fi
if [[ -n $workdir && $workdir != gs://* && -z $shared_disk ]]; then
  if [[ -n $several_hosts || $COMMAND == run || $COMMAND == resume ]]; then
    refuse "--workdir=$workdir: the hosts of $type do not share it, and it is" \
      "lost with them; give gs://BUCKET/PATH, or --shared_disk if it is mounted"
  fi
fi

place=("--zone=$zone" ${project:+"--project=$project"})
queued=(gcloud compute tpus queued-resources)

# on_workers WORKER COMMAND: runs a command on one worker, or on `all`.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" \
    "--command=$2"
}

# look STATE_OF_DRY_RUN: sets `state`, the queued resource's, or NONE if there
# is none. Fails if gcloud does.
look() {
  local errors status=0
  local describe=(
    "${queued[@]}" describe "$name" "${place[@]}" '--format=value(state.state)'
  )
  if [[ -n $dry_run ]]; then
    show "${describe[@]}"
    state=$1
    return
  fi
  errors=$(mktemp)
  state=$("${describe[@]}" 2>"$errors") || status=$?
  if ((status)) && grep -qi 'not.found' "$errors"; then
    state=NONE status=0
  fi
  ((status == 0)) || cat "$errors" >&2
  rm -f "$errors"
  if ((status)); then
    echo "$SCRIPT: failed with status $status: $(show "${describe[@]}")" >&2
    return 1
  fi
}

# Looks again where that fails, up to three times.
look_thrice() {
  local tries=1
  until look "$1"; do
    ((tries < 3)) || return 1
    tries=$((tries + 1))
    sleep "$poll"
  done
}

create() {
  run "${queued[@]}" create "$name" "--node-id=$name" "${place[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot}
}

# Waits for the slice. Fails if it will never come.
wait_until_active() {
  local began=$SECONDS
  while :; do
    look_thrice ACTIVE
    [[ -n $dry_run ]] || echo "$name: $state, $((SECONDS - began)) s"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | NONE)
        echo "$SCRIPT: $name will not become ACTIVE: it is $state" >&2
        return 1
        ;;
    esac
    sleep "$poll"
  done
}

# A slice is ACTIVE some time before its workers let anybody in.
wait_for_ssh() {
  local tries=1
  until (on_workers all true); do
    ((tries < 10)) || return 1
    tries=$((tries + 1))
    echo "$name: waiting until ssh answers on all workers, try $tries of 10"
    sleep "$poll"
  done
}

setup() {
  local folder=/tmp archive
  wait_for_ssh
  [[ -n $dry_run ]] || folder=$(mktemp -d)
  archive=$folder/empdg.tar.gz
  if [[ -z $dry_run && -n $(git -C "$root" status --porcelain 2>&1) ]]; then
    echo "$SCRIPT: HEAD is sent, without changes that are not committed" >&2
  fi
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" \
    --worker=all
  [[ -n $dry_run ]] || rm -r "$folder"
  # The images have Python 3.10; `uv` brings its own.
  on_workers all "set -e
mkdir -p empdg
tar -xzf empdg.tar.gz -C empdg
cd empdg
python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python \
-c constraints.txt -e '.[tpu,gcs]'"
}

# On a worker: prints `training=`: running, none, or the status it ended with.
# A process that runs holds the lock, whatever became of its parents.
# shellcheck disable=SC2016
probe='cd empdg 2>/dev/null || { echo "training=none $(hostname)"; exit 0; }
if ! flock -n train.lock true; then echo "training=running $(hostname)"
elif [ -s train.status ]; then echo "training=$(cat train.status) $(hostname)"
else echo "training=none $(hostname)"; fi'

# Sets `training` to what the workers print.
look_at_training() {
  if [[ -n $dry_run ]]; then
    on_workers all "$probe"
    training=$1
    return
  fi
  training=$(on_workers all "$probe" 2>/dev/null) || return 1
  training=$(grep '^training=' <<<"$training")  # Fails if nobody said any.
}

some_run() { [[ $training == *training=running* ]]; }

train() {
  look_at_training 'training=none' ||
    on_workers all "$probe"  # Again, to say what is wrong.
  if some_run; then
    echo "$SCRIPT: training runs on $name already; see status, logs, stop" >&2
    exit 1
  fi
  local command=(
    launch/train.sh "--config=$config" "--workdir=$workdir"
    ${several_hosts:+--coordinator_address=auto}
    ${REST[@]+"${REST[@]}"}
  )
  # Away from the terminal's session, so that a lost connection does not end
  # it. What holds the lock is outside of what `stop` signals.
  local detached
  detached="$(show "${command[@]}") & echo \$! > train.pid; wait \$!"
  detached+='; echo $? > train.status'
  on_workers all "set -e
cd empdg
flock -n train.lock true || { echo 'training runs already' >&2; exit 1; }
rm -f train.status train.pid
nohup setsid flock -n train.lock bash -c $(printf %q "$detached") \
> train.log 2>&1 < /dev/null &
sleep 1
[ -s train.pid ]"
  [[ -n $dry_run ]] || echo "Training runs on $name; see status and logs"
}

delete() {
  run "${queued[@]}" delete "$name" "${place[@]}" --force --quiet
}

# resume STATE_OF_DRY_RUN: from whatever state the slice is in to training.
resume() {
  look_thrice "$1"
  while [[ $state == SUSPENDING || $state == DELETING ]]; do
    echo "$name: $state"
    sleep "$poll"
    look_thrice "$1"
  done
  case $state in
    NONE) create ;;
    FAILED | SUSPENDED)
      delete
      create
      ;;
    ACTIVE)
      wait_for_ssh  # What runs there must not be set up again.
      if ! look_at_training 'training=none'; then
        echo "$SCRIPT: workers of $name do not answer" >&2
        return 1
      fi
      if some_run; then
        echo "Training runs on $name already"
        return
      fi
      ;;
  esac
  wait_until_active
  setup
  train
}

# Runs a function until it ends or fails; sets `status`.
attempt() {
  set +e
  (
    trap 'exit 130' INT
    set -e
    "$@"
  )
  status=$?
  set -e
}

# Polls until training is over (0), something given is wrong (2), or it must be
# started again (75).
watch() {
  local unreachable=0 shown='' now
  while :; do
    look_thrice ACTIVE || return "$TEMPORARY"
    if [[ $state != ACTIVE ]]; then
      echo "$SCRIPT: $name is $state" >&2
      return "$TEMPORARY"
    fi
    if look_at_training 'training=0'; then
      unreachable=0
      now=$(sed -n 's/^training=\([^ ]*\).*/\1/p' <<<"$training" |
        sort | uniq -c | tr -s ' \n' ' ')
      [[ -n $dry_run || $now == "$shown" ]] || echo "$name: training:$now"
      shown=$now
      if grep -q "^training=$BAD_INPUT " <<<"$training"; then
        return "$BAD_INPUT"
      elif ! some_run; then
        if grep -qv '^training=0\b' <<<"$training"; then
          return "$TEMPORARY"
        fi
        return 0
      fi
    else
      # A preemption takes the workers first, the state follows.
      unreachable=$((unreachable + 1))
      echo "$SCRIPT: workers of $name do not answer" >&2
      ((unreachable < 3)) || return "$TEMPORARY"
    fi
    sleep "$poll"
  done
}

# Creates, trains and resumes until training is over.
run_to_the_end() {
  local restarts=0 failures=0 trained=''
  while :; do
    attempt resume NONE
    if ((status == 0)); then
      failures=0 trained=1
      attempt watch
      case $status in
        0)
          [[ -n $dry_run ]] ||
            echo "Training is over. Now: $SCRIPT delete --name=$name" \
              "--zone=$zone"
          return
          ;;
        "$BAD_INPUT")
          echo "$SCRIPT: training ended with $BAD_INPUT; see $SCRIPT logs" >&2
          return "$BAD_INPUT"
          ;;
        "$TEMPORARY") ;;
        *) return "$status" ;;
      esac
    else
      look ACTIVE || state=UNKNOWN
      case $state in
        # Before anything has trained there, it was refused.
        NONE | FAILED) [[ -n $trained ]] || return 1 ;;
      esac
      case $state in
        SUSPENDED | SUSPENDING | DELETING) ;;
        *)
          failures=$((failures + 1))
          if ((failures == 3)); then
            echo "$SCRIPT: three starts in a row failed; mend what is said" \
              "above, then run it again" >&2
            return 1
          fi
          ;;
      esac
      sleep "$poll"
    fi
    if ((restarts >= max_restarts)); then
      echo "$SCRIPT: --max_restarts=$max_restarts is reached; resume goes on" \
        >&2
      return 1
    fi
    restarts=$((restarts + 1))
    echo "$SCRIPT: restart $restarts of $max_restarts" >&2
  done
}

case $COMMAND in
  wait) wait_until_active ;;
  resume) resume SUSPENDED ;;
  run) run_to_the_end ;;
  status)
    look ACTIVE
    [[ -n $dry_run ]] || echo "$name: $state"
    [[ $state != ACTIVE ]] || on_workers all "$probe"
    ;;
  logs)
    on_workers "$worker" "tail -n 100${follow:+ -F} empdg/train.log"
    ;;
  stop)
    # shellcheck disable=SC2016
    on_workers all 'cd empdg
if flock -n train.lock true; then echo "no training runs"
else kill -TERM "$(cat train.pid)" && echo "asked to save and stop"; fi'
    ;;
  *) "$COMMAND" ;;
esac
