#!/usr/bin/env bash
# Runs `empdg train` for a scheduler that must know whether training has
# finished, or another command of `empdg` on all hosts.
#
# usage: launch/train.sh [--dry_run] [COMMAND] FLAG...
#
# COMMAND is train (the default), evaluate, export or any other of `empdg`.
#
# exit status:
#   0   training has finished
#   75  training was asked to stop (SIGTERM) and has saved: restart it
#   2   bad input: do not restart it
#   1   a disk, a bucket or a host has failed: restart it. With several hosts,
#       the last line names the lost one and the step that training resumes from
#   *   the status of the command
#
# flags:
#   --dry_run   only print the command
#   --help      print this text; `empdg train --help` explains the other flags
#
# environment:
#   EMPDG           the command to run (default: the clone's .venv/bin/empdg, or
#                   else empdg)
#   EMPDG_MEETINGS  how many times the hosts try to connect to each other, two
#                   minutes each (default: 5; two tries, and status 2, if a
#                   firewall closes the first host's port)
#   EMPDG_LOG_COPY  file or gs:// object to which the output is copied, every
#                   five minutes and when the command ends (default:
#                   train-N-TIME.log in the run folder, N being the host and
#                   TIME the start in UTC, if that is in a bucket or of several
#                   hosts; "none" for no copy)
#   EMPDG_LOG_COPY_SECONDS  time between copies (default: 300)
#
# examples:
#   launch/train.sh --config=configs/quickstart.py --workdir=runs/quickstart
#   launch/train.sh --dry_run --config=configs/pod.py:16 --workdir=gs://b/pod
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
source "$root/launch/common.sh"

dry_run=
subcommand=train
arguments=()
if (($#)) && [[ $1 == --dry?run ]]; then
  dry_run=1
  shift
fi
if (($#)) && [[ $1 != -* ]]; then
  subcommand=$1
  shift
fi
workdir='' several_hosts=
for argument; do
  case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    --coordinator_address=?*) several_hosts=1 ;;
  esac
  case $argument in
    -h | --help) help_and_exit ;;
    --dry_run | --dry-run) dry_run=1 ;;
    *) arguments+=("$argument") ;;
  esac
done
empdg=$(find_empdg "$root")
command=("$empdg" "$subcommand" ${arguments[@]+"${arguments[@]}"})
if [[ -n $dry_run ]]; then
  show "${command[@]}"
  exit 0
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/pipe" "$folder/end"

number=$(sed -n 's/^--process_id=//p' \
  <<<"$(printf '%s\n' ${arguments[@]+"${arguments[@]}"})")
: "${number:=${TPU_WORKER_ID:-${JOB_COMPLETION_INDEX:-${SLURM_PROCID:-0}}}}"

# The output must outlive the machine, which may be lost at any time.
copy=${EMPDG_LOG_COPY:-}
if [[ -z $copy && -n $workdir ]] &&
  [[ $workdir == gs://* || -n $several_hosts ]]; then
  copy=$workdir/$subcommand-$number-$(date -u +%Y%m%dT%H%M%SZ).log
fi
if [[ $copy == none ]]; then copy=; fi
if [[ $copy == gs://* ]] && ! command -v gcloud >/dev/null; then
  echo "$SCRIPT: the output is not copied to $copy: no gcloud here" >&2
  copy=
fi

copy_log() {
  case $copy in
    gs://*) timeout 60 gcloud storage cp --quiet "$folder/log" "$copy" ;;
    # A run that was refused has no folder.
    *) [[ ! -d $(dirname "$copy") ]] || cp "$folder/log" "$copy" ;;
  esac
}

# Copies until a line in this pipe tells it to end, or this script is killed; a
# `sleep` would go on. It must not hold the lock of tpu_pod.sh, which is open
# as 3: that tells whether training runs.
exec 9<>"$folder/end"
copier=
if [[ -n $copy ]]; then
  while ! read -r -t "${EMPDG_LOG_COPY_SECONDS:-300}" -u 9 _ &&
    kill -0 $$ 2>/dev/null; do
    copy_log || :
  done >/dev/null 2>&1 3>&- &
  copier=$!
fi

# A scheduler may send SIGTERM to this process only, so forward it. (If the
# signal reaches all processes, `empdg` ignores the second one.) Ctrl-C reaches
# both.
child=
stopping=
forward_sigterm() {
  stopping=1 interrupted=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap forward_sigterm TERM
trap 'interrupted=1' INT

# Waits for a process and sets `status`. Loops because signals interrupt `wait`.
wait_for() {
  local found
  status=127
  while :; do
    interrupted='' found=0
    wait "$1" || found=$?
    ((found == 127)) || status=$found
    [[ -n $interrupted ]] || return 0
  done
}

train_once() {
  # `tee` ignores signals, so that it copies the output that follows them.
  (
    trap '' INT TERM
    exec tee "$folder/log" <"$folder/pipe"
  ) &
  local tee=$!
  # By default, background processes of bash ignore Ctrl-C.
  (
    trap - INT TERM
    exec env PYTHONUNBUFFERED=1 "${command[@]}"
  ) >"$folder/pipe" 2>&1 &
  child=$!
  [[ -z $stopping ]] || forward_sigterm  # Signalled before the child started.
  wait_for "$child"
  child=
  local empdg_status=$status
  wait_for "$tee"
  status=$empdg_status
}

printed() { grep -q "^$1" "$folder/log"; }

# The hosts of a pod do not start at the same time: waiting for the others is
# not bad input.
meetings=$((10#${EMPDG_MEETINGS:-5}))
unreachable=0
while :; do
  train_once
  if ((status == BAD_INPUT)) && printed '.*: process 0 cannot be reached'; then
    unreachable=$((unreachable + 1))
    # More tries would bill for a slice on which a closed port stays closed.
    ((unreachable < 2)) || break
  elif ((status != BAD_INPUT)) || ! printed '.*the hosts have not met'; then
    break
  fi
  status=1
  meetings=$((meetings - 1))
  if ((meetings <= 0)) || [[ -n $stopping ]]; then break; fi
done

# Prints the step that training resumes from, in words.
resumed_step() {
  local steps=
  if [[ -n $workdir ]]; then
    steps=$(JAX_PLATFORMS=cpu timeout 60 "$empdg" checkpoints \
      "--workdir=$workdir" --format=json 2>/dev/null </dev/null |
      grep -oE '"step": *[0-9]+' | grep -oE '[0-9]+' | sed -n 1p) || :
  fi
  if [[ -n $steps ]]; then
    echo "step $steps"
  else
    echo 'its latest checkpoint'
  fi
}

# Prints which host is lost, as far as the output tells.
lost_host() {
  local log=$folder/log found
  local joined='([0-9]+) unexpectedly tried to connect with a different'
  local early='connect attempt as there is a request from a newer incarnation'
  local silent='stopped sending heartbeats[^0-9]*([^ ]*task:)?([0-9]+)'
  if [[ $(grep -m 1 -E "$joined" "$log") =~ $joined ]]; then
    found=${BASH_REMATCH[1]}
    echo "id $found is taken: host $found was restarted alone, or two" \
      "processes have --process_id=$found"
  elif grep -q "$early" "$log"; then
    echo "id $number is taken: another process with it has joined after this" \
      "one; give each process its own"
  elif [[ $(tr '\n' ' ' <"$log") =~ $silent ]]; then
    echo "host ${BASH_REMATCH[2]} is lost"
  elif grep -qE 'Failed to send RPC to coord|UNAVAILABLE' "$log"; then
    echo 'host 0 is lost, or the network to it'
  else
    echo 'this host failed, or another is lost'
  fi
}

if ((status == 0)) && [[ $subcommand == train ]] &&
  ! printed 'Next: empdg evaluate'; then
  status=$TEMPORARY
elif [[ -n $stopping ]] && ((status == 143)); then
  status=$TEMPORARY  # Stopped before there was anything to save.
elif [[ -n $several_hosts && $subcommand == train ]] &&
  ((status == 1 || status > 130)); then
  # JAX ends the others with an abort, below forty lines of stack.
  echo "$SCRIPT: $(lost_host); training resumes from $(resumed_step) as soon" \
    "as all hosts are started again: status 1 asks the scheduler to do so" |
    tee -a "$folder/log" >&2
  status=1
fi

if [[ -n $copier ]]; then
  echo >&9
  wait "$copier" || :
  copy_log >/dev/null 2>&1 ||
    echo "$SCRIPT: cannot copy the log to $copy" >&2
fi
exit "$status"
