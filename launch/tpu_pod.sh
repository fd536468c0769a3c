#!/usr/bin/env bash
# Trains on a Cloud TPU slice, which it requests as a queued resource.
#
# usage: launch/tpu_pod.sh COMMAND FLAG... [-- EMPDG_TRAIN_FLAG...]
#
# commands:
#   create   request the slice, --spot or on demand
#   wait     wait until it is ACTIVE, printing its state and the elapsed seconds
#   setup    wait for ssh on all workers (ten tries), then copy HEAD of this
#            clone to them and install it
#   train    start training on all workers; it continues without this terminal
#   status   print the state of the slice, and of training on each worker
#   logs     print the output of a worker: --worker=N, --follow
#   stop     send SIGTERM to training on all workers, which saves and stops (end
#            `run` first, or it will resume training)
#   resume   after a preemption: delete what is left of the slice, then create,
#            wait, setup and train; training resumes from its checkpoint
#   run      create, wait, setup and train; then poll, and resume after each
#            preemption or lost host until training has finished. Retries failed
#            calls; gives up after three failed starts in a row. Ctrl-C only
#            ends the polling; `resume` or `run` picks it up again
#   evaluate run `empdg evaluate` on all workers, as train does
#   export   run `empdg export` on worker 0; give --out after `--`
#   delete   delete the slice; until then you pay for it, training or not
#
# flags:
#   --name=           name of the queued resource and of the slice (required)
#   --zone=           Google Cloud zone in which you have quota (required)
#   --project=        Google Cloud project (default: gcloud's own)
#   --type=           slice type, such as v5litepod-16 (required by create,
#                     train, resume and run)
#   --runtime=        runtime version (default: by type, v2-alpha-tpuv5-lite for
#                     v5litepod, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for
#                     v6e, tpu-ubuntu2204-base for v4)
#   --spot            cheaper, but can be preempted at any time
#   --reserved        use your reservation
#   --slices=1        several slices of the type, which train together
#   --service_account=    service account of the workers (default: the project's
#                     Compute Engine account)
#   --network= --subnetwork=    network of the workers
#   --internal_ips    no external addresses: run this script in that network,
#                     which needs Cloud NAT or another way to the packages
#   --labels=         KEY=VALUE,... for the bill
#   --valid_until=    give the request up if it is not granted within this time,
#                     such as 6h or 90m
#   --workdir=        gs://BUCKET/PATH (required by train, resume and run)
#   --shared_disk     --workdir is a path on a disk that all workers share
#   --config=         configuration (default: configs/pod.py:CHIPS)
#   --poll=30         seconds between polls or retries
#   --max_restarts=20 how many times `run` resumes
#   --max_hours=0     `run` stops training, which saves, after this many hours,
#                     those in the queue included; 0 for no limit
#   --delete_at_end   `run` deletes the slice when training has finished, was
#                     refused or is given up; not after Ctrl-C, `kill` or a
#                     lost terminal, since training goes on
#   --detach          `run` goes on without this terminal, with its output in
#                     NAME.log; prints how to do that on another machine
#   --skip_checks     do not check the ssh key and the bucket before `create`
#   --worker=0 --follow   for logs
#   --dry_run         only print the commands
#   --help            print this text
#
# Requires gcloud, authenticated and with a project; quota for the type in the
# zone; and a bucket that the slice's service account can write to.
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
config='' poll=30 max_restarts=20 worker=0 follow='' dry_run='' slices=1
service_account='' network='' subnetwork='' labels='' valid_until='' max_hours=0
internal_ips='' reserved='' delete_at_end='' detach='' skip_checks=''
parse_flags 'name zone project type runtime workdir config poll max_restarts
 worker slices service_account network subnetwork labels valid_until max_hours' \
  'spot shared_disk follow dry_run internal_ips reserved delete_at_end detach
 skip_checks' "$@"

[[ -n $COMMAND ]] || refuse "no command given; see $SCRIPT --help"
case $COMMAND in
  create) need name zone type ;;
  train | resume | run | evaluate) need name zone type workdir ;;
  export) need name zone workdir ;;
  wait | setup | status | logs | stop | delete) need name zone ;;
  *) refuse "unknown command '$COMMAND'; see $SCRIPT --help" ;;
esac
need_number 0 poll max_restarts max_hours
need_number 1 slices
[[ -z $spot || -z $reserved ]] ||
  refuse "--spot and --reserved exclude each other"
[[ $valid_until =~ ^([1-9][0-9]*[smhd])?$ ]] ||
  refuse "--valid_until=$valid_until: expected a time such as 6h or 90m"
[[ $labels =~ ^([a-z][-_a-z0-9]*=[-_a-z0-9]*(,|$))*$ ]] ||
  refuse "--labels=$labels: expected KEY=VALUE,... in lowercase"
[[ $worker == all ]] || need_number 0 worker

# gcloud's own status after Ctrl-C varies, and without a trap the status of a
# script that a lost terminal or `kill` ends would be 0.
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

several_hosts=
if [[ -n $type ]]; then
  if ! [[ $type =~ ^(v[0-9]+[a-z]*|tpu7x)-([0-9]+)$ ]]; then
    refuse "--type=$type: expected a type such as v5litepod-16"
  fi
  generation=${BASH_REMATCH[1]}
  chips=$((10#${BASH_REMATCH[2]}))
  # In all generations, types up to 8 (chips or cores) have a single host.
  ((chips <= 8 && slices == 1)) || several_hosts=1
  # The v4 and v5p types count cores, two per chip.
  case $generation in
    v4 | v5p) chips=$((chips / 2)) ;;
  esac
  # Those of tpu7x are devices of their own to JAX.
  : "${config:=configs/pod.py:$((chips * slices))}"
  if [[ -z $runtime ]]; then
    case $generation in
      v5litepod) runtime=v2-alpha-tpuv5-lite ;;
      v5p) runtime=v2-alpha-tpuv5 ;;
      v6e) runtime=v2-alpha-tpuv6e ;;
      v4) runtime=tpu-ubuntu2204-base ;;
      tpu7x)
        refuse "--type=$type: these slices come through Kubernetes; use" \
          "launch/gke.sh with --accelerator=tpu7x, or give --runtime if your" \
          "project has them as queued resources"
        ;;
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
# A request for several slices has nodes, which only this command knows.
workers=(gcloud compute tpus tpu-vm) ssh_flags=("${place[@]}")
if ((slices > 1)); then
  workers=("${queued[@]}") ssh_flags+=(--node=all)
fi
[[ -z $internal_ips ]] || ssh_flags+=(--internal-ip)

# on_workers WORKER COMMAND: runs a command on one worker, or on `all`.
on_workers() {
  run "${workers[@]}" ssh "$name" "${ssh_flags[@]}" "--worker=$1" \
    "--command=$2"
}

# get_state DRY_RUN_STATE: sets `state` to the state of the queued resource, or
# to NONE if it does not exist. Fails if gcloud fails.
get_state() {
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

# Tries up to three times to get the state.
get_state_or_retry() {
  local tries=1
  until get_state "$1"; do
    ((tries < 3)) || return 1
    tries=$((tries + 1))
    sleep "$poll"
  done
}

# Prints the name of the quota that the slice needs, as the API's errors give
# it; fails where no error has shown it to us.
quota() {
  local preemptible=${spot:+Preemptible} small='' quota
  # Slices of v5e for serving, with up to 8 chips, have a quota of their own.
  ((chips > 8)) || small=Serving
  case $generation$reserved in
    v5litepod) quota=TPUV5s${preemptible}Litepod$small ;;
    v5p) quota=TPUV5P$preemptible ;;
    v6e) quota=TPUV6E$preemptible ;;
    *) return 1 ;;
  esac
  echo "${quota}PerProjectPerZoneForTPUAPI"
}

# Checks before the slice is queued what would otherwise fail once it bills.
check() {
  [[ -z $skip_checks ]] || return 0
  local object=$workdir/.write-check quota tier=on-demand
  if [[ -n $several_hosts ]]; then
    if [[ -n $dry_run ]]; then
      show ssh-add -l
    elif ! ssh-add -l >/dev/null 2>&1; then
      refuse "ssh-agent holds no key, which gcloud needs for several workers:" \
        "eval \"\$(ssh-agent)\"; ssh-add ~/.ssh/google_compute_engine"
    fi
  fi
  if [[ $workdir == gs://* ]]; then
    # Of this account; the slice's own cannot be tried before it exists.
    if [[ -n $dry_run ]]; then
      show gcloud storage cp --quiet /dev/null "$object"
    elif ! gcloud storage cp --quiet /dev/null "$object" >/dev/null 2>&1; then
      refuse "--workdir=$workdir: cannot write to the bucket; give" \
        "yourself${service_account:+ and $service_account} the role" \
        "roles/storage.objectAdmin, or --skip_checks"
    fi
  fi
  [[ -z $spot ]] || tier='preemptible (spot)'
  [[ -z $reserved ]] || tier=reserved
  quota=$(quota) ||
    quota="that of $generation, $tier: https://cloud.google.com/tpu/docs/quota"
  echo "# Quota of tpu.googleapis.com in $zone for $slices x $type: $quota"
}

create() {
  local nodes=("--node-id=$name")
  ((slices == 1)) || nodes=("--node-count=$slices")
  run "${queued[@]}" create "$name" "${nodes[@]}" "${place[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot} \
    ${reserved:+--reserved} ${internal_ips:+--internal-ips} \
    ${service_account:+"--service-account=$service_account"} \
    ${network:+"--network=$network"} ${subnetwork:+"--subnetwork=$subnetwork"} \
    ${labels:+"--labels=$labels"} \
    ${valid_until:+"--valid-until-duration=$valid_until"}
}

hours_are_over() { ((max_hours && SECONDS >= max_hours * 3600)); }

# Waits for the slice. Fails if it can no longer become ACTIVE.
wait_until_active() {
  local began=$SECONDS
  while :; do
    get_state_or_retry ACTIVE
    [[ -n $dry_run ]] || echo "$name: $state, $((SECONDS - began)) s"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | NONE)
        echo "$SCRIPT: $name will not become ACTIVE: it is $state" >&2
        return 1
        ;;
    esac
    if [[ $COMMAND == run ]] && hours_are_over; then
      echo "$SCRIPT: reached --max_hours=$max_hours before $name was ACTIVE" >&2
      exit 3
    fi
    sleep "$poll"
  done
}

# A slice becomes ACTIVE some time before its workers accept connections.
wait_for_ssh() {
  local tries=1
  until (on_workers all true); do
    ((tries < 10)) || return 1
    tries=$((tries + 1))
    echo "$name: waiting for ssh on all workers, try $tries of 10"
    sleep "$poll"
  done
}

setup() {
  local folder=/tmp archive
  wait_for_ssh
  [[ -n $dry_run ]] || folder=$(mktemp -d)
  archive=$folder/empdg.tar.gz
  if [[ -z $dry_run && -n $(git -C "$root" status --porcelain 2>&1) ]]; then
    echo "$SCRIPT: sending HEAD, without the uncommitted changes" >&2
  fi
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  run "${workers[@]}" scp "$archive" "$name:" "${ssh_flags[@]}" --worker=all
  [[ -n $dry_run ]] || rm -r "$folder"
  # The images have Python 3.10; `uv` installs 3.12.
  on_workers all "set -e
mkdir -p empdg
tar -xzf empdg.tar.gz -C empdg
cd empdg
python3 -m pip install --quiet --user uv 2> pip.log ||
python3 -m pip install --quiet --user --break-system-packages uv ||
{ cat pip.log >&2; exit 1; }
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python \
-c constraints/python3.12.txt -e '.[tpu,gcs]'"
}

# Runs on a worker; prints `training=` with running, none, or the exit status. A
# running process holds the lock, even if its parents are gone.
# shellcheck disable=SC2016
probe='cd empdg 2>/dev/null || { echo "training=none $(hostname)"; exit 0; }
if ! flock -n train.lock true; then echo "training=running $(hostname)"
elif [ -s train.status ]; then echo "training=$(cat train.status) $(hostname)"
else echo "training=none $(hostname)"; fi'

# Sets `training` to what the workers print.
probe_training() {
  if [[ -n $dry_run ]]; then
    on_workers all "$probe"
    training=$1
    return
  fi
  training=$(on_workers all "$probe" 2>/dev/null) || return 1
  training=$(grep '^training=' <<<"$training")  # Fails if no worker printed it.
}

any_running() { [[ $training == *training=running* ]]; }

train() {
  probe_training 'training=none' ||
    on_workers all "$probe"  # Again, to show the error.
  if any_running; then
    echo "$SCRIPT: training is already running on $name; see status, logs," \
      "stop" >&2
    exit 1
  fi
  local command=(
    launch/train.sh
    "${1:---config=$config}" "--workdir=$workdir"
    ${several_hosts:+--coordinator_address=auto}
    ${REST[@]+"${REST[@]}"}
  )
  # In a session of its own, so that a lost connection does not end it. The
  # process that holds the lock is not the one that `stop` signals.
  local detached
  detached="$(show "${command[@]}") & echo \$! > train.pid; wait \$!"
  detached+='; echo $? > train.status'
  on_workers all "set -e
cd empdg
flock -n train.lock true || { echo 'training is already running' >&2; exit 1; }
rm -f train.status train.pid
nohup setsid flock -n train.lock bash -c $(printf %q "$detached") \
> train.log 2>&1 < /dev/null &
sleep 1
[ -s train.pid ]"
  [[ -n $dry_run ]] || echo "Training has started on $name; see status and logs"
}

delete() {
  run "${queued[@]}" delete "$name" "${place[@]}" --force --quiet
}

# resume DRY_RUN_STATE: starts training, whatever state the slice is in.
resume() {
  get_state_or_retry "$1"
  while [[ $state == SUSPENDING || $state == DELETING ]]; do
    echo "$name: $state"
    sleep "$poll"
    get_state_or_retry "$1"
  done
  case $state in
    NONE) create ;;
    FAILED | SUSPENDED)
      delete
      create
      ;;
    ACTIVE)
      wait_for_ssh  # Do not run setup under a running process.
      if ! probe_training 'training=none'; then
        echo "$SCRIPT: workers of $name do not respond" >&2
        return 1
      fi
      if any_running; then
        echo "Training is already running on $name"
        return
      fi
      ;;
  esac
  wait_until_active
  setup
  train
}

# Runs a function until it ends or fails; sets `status`. In the background,
# since a signal ends this shell only once its foreground command has ended.
attempt() {
  set +e
  (
    trap 'exit 130' INT
    set -e
    "$@"
  ) <&0 &
  attempted=$!
  wait "$attempted"
  status=$?
  attempted=
  set -e
}

stop() {
  # shellcheck disable=SC2016
  on_workers all 'cd empdg
if flock -n train.lock true; then echo "training is not running"
else kill -TERM "$(cat train.pid)" && echo "asked to save and stop"; fi'
}

# Stops training, and waits until no worker runs it: half an hour at most with
# the usual --poll, longer than `empdg` itself waits for a checkpoint.
stop_and_wait() {
  local polls=0 asked=''
  while ((polls < 60)); do
    [[ -n $asked ]] || ! (stop) || asked=1
    sleep "$poll"
    if probe_training 'training=75' && ! any_running; then return; fi
    polls=$((polls + 1))
  done
  echo "$SCRIPT: training has not stopped; it resumes from its latest" \
    "checkpoint" >&2
}

# Polls until training has finished (0), its input was bad (2), it must be
# restarted (75), or --max_hours are over (3).
watch() {
  local unreachable=0 shown='' now
  while :; do
    if hours_are_over; then
      echo "$SCRIPT: reached --max_hours=$max_hours; training saves and stops" >&2
      stop_and_wait
      return 3
    fi
    get_state_or_retry ACTIVE || return "$TEMPORARY"
    if [[ $state != ACTIVE ]]; then
      echo "$SCRIPT: $name is $state" >&2
      return "$TEMPORARY"
    fi
    if probe_training 'training=0'; then
      unreachable=0
      now=$(sed -n 's/^training=\([^ ]*\).*/\1/p' <<<"$training" |
        sort | uniq -c | tr -s ' \n' ' ')
      [[ -n $dry_run || $now == "$shown" ]] || echo "$name: training:$now"
      shown=$now
      if grep -q "^training=$BAD_INPUT " <<<"$training"; then
        return "$BAD_INPUT"
      elif ! any_running; then
        if grep -qv '^training=0\b' <<<"$training"; then
          return "$TEMPORARY"
        fi
        return 0
      fi
    else
      # In a preemption, the workers go first and the state changes later.
      unreachable=$((unreachable + 1))
      echo "$SCRIPT: workers of $name do not respond" >&2
      ((unreachable < 3)) || return "$TEMPORARY"
    fi
    sleep "$poll"
  done
}

# Creates, trains and resumes until training has finished.
run_until_finished() {
  local restarts=0 failures=0 trained=''
  while :; do
    attempt resume NONE
    if ((status == 0)); then
      failures=0 trained=1
      attempt watch
      case $status in
        0)
          [[ -n $dry_run ]] ||
            echo "Training has finished"
          return
          ;;
        "$BAD_INPUT")
          echo "$SCRIPT: training exited with $BAD_INPUT; see $SCRIPT logs" >&2
          return "$BAD_INPUT"
          ;;
        "$TEMPORARY") ;;
        3) return 1 ;;
        *) return "$status" ;;
      esac
    elif ((status == 3)); then
      return 1
    else
      get_state ACTIVE || state=UNKNOWN
      case $state in
        # Nothing has trained yet, so the request itself was refused.
        NONE | FAILED) [[ -n $trained ]] || return 1 ;;
      esac
      case $state in
        SUSPENDED | SUSPENDING | DELETING) ;;
        *)
          failures=$((failures + 1))
          if ((failures == 3)); then
            echo "$SCRIPT: three starts in a row failed; fix the error" \
              "above, then run this again" >&2
            return 1
          fi
          ;;
      esac
      sleep "$poll"
    fi
    if ((restarts >= max_restarts)); then
      echo "$SCRIPT: reached --max_restarts=$max_restarts; use resume to" \
        "continue" >&2
      return 1
    fi
    restarts=$((restarts + 1))
    echo "$SCRIPT: restart $restarts of $max_restarts" >&2
  done
}

# Runs this command in a session of its own, and exits.
detach() {
  local argument again=()
  for argument; do
    [[ $argument == --detach ]] || again+=("$argument")
  done
  local log=$name.log
  if [[ -z $dry_run ]]; then
    nohup setsid "$0" "${again[@]}" >"$log" 2>&1 </dev/null &
    echo "Goes on without this terminal, as process $!, until this machine is" \
      "switched off; its output is in $log"
  fi
  echo "On another machine, in a clone of this commit:"
  echo "  nohup setsid $(show launch/tpu_pod.sh "${again[@]}") > $log 2>&1 &"
  echo "  tail -F $log"
  exit 0
}

# Deletes the slice if that was asked for, or says that it bills.
at_end() {
  local ended=$?
  trap - EXIT
  [[ -z ${attempted:-} ]] || kill "$attempted" 2>/dev/null || :
  [[ -z $dry_run ]] || return 0
  # After a signal, training goes on.
  if [[ -n $delete_at_end && $COMMAND == run ]] && ((ended < 128)); then
    if (delete); then
      echo "Deleted $name: nothing is billed any more"
      exit "$ended"
    fi
  fi
  if [[ ${state:-} != NONE || $ended == 0 ]]; then
    echo "Billed from its grant until it is deleted: $slices x $type" \
      "${spot:+(spot) }as $name in $zone: $SCRIPT delete --name=$name" \
      "${place[*]}"
  fi
  exit "$ended"
}

case $COMMAND in
  wait) wait_until_active ;;
  evaluate) train evaluate ;;
  export)
    ssh_flags=("${ssh_flags[@]/--node=all/--node=0}")
    on_workers 0 "cd empdg && JAX_PLATFORMS=cpu $(show launch/train.sh export \
      "--workdir=$workdir" ${REST[@]+"${REST[@]}"})"
    ;;
  create | resume | run)
    check
    [[ -z $detach || $COMMAND != run ]] || detach "$@"
    trap at_end EXIT
    case $COMMAND in
      create) create ;;
      resume) resume SUSPENDED ;;
      run) run_until_finished ;;
    esac
    ;;
  status)
    get_state ACTIVE
    [[ -n $dry_run ]] || echo "$name: $state"
    [[ $state != ACTIVE ]] || on_workers all "$probe"
    ;;
  logs)
    on_workers "$worker" "tail -n 100${follow:+ -F} empdg/train.log"
    ;;
  stop) stop ;;
  *) "$COMMAND" ;;
esac
