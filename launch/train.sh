#!/usr/bin/env bash
# Runs `empdg train` for a scheduler that must know whether training has
# finished.
#
# usage: launch/train.sh [--dry_run] EMPDG_TRAIN_FLAG...
#
# exit status:
#   0   training has finished
#   75  training was asked to stop (SIGTERM) and has saved: restart it
#   2   bad input: do not restart it
#   *   the status of `empdg train`; 1 or an abort after a lost host: restart it
#
# flags:
#   --dry_run   only print the command
#   --help      print this text; `empdg train --help` explains the other flags
#
# environment:
#   EMPDG           the command to run (default: the clone's .venv/bin/empdg, or
#                   else empdg)
#   EMPDG_MEETINGS  how many times the hosts try to connect to each other, two
#                   minutes each (default: 5)
#
# examples:
#   launch/train.sh --config=configs/quickstart.py --workdir=runs/quickstart
#   launch/train.sh --dry_run --config=configs/pod.py:16 --workdir=gs://b/pod
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
source "$root/launch/common.sh"

dry_run=
arguments=()
for argument; do
  case $argument in
    -h | --help) help_and_exit ;;
    --dry_run | --dry-run) dry_run=1 ;;
    *) arguments+=("$argument") ;;
  esac
done
command=("$(find_empdg "$root")" train ${arguments[@]+"${arguments[@]}"})
if [[ -n $dry_run ]]; then
  show "${command[@]}"
  exit 0
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/pipe"

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
while :; do
  train_once
  if ((status != BAD_INPUT)) || ! printed '.*the hosts have not met'; then
    break
  fi
  status=1
  meetings=$((meetings - 1))
  if ((meetings <= 0)) || [[ -n $stopping ]]; then break; fi
done

if ((status == 0)) && ! printed 'Next: empdg evaluate'; then
  status=$TEMPORARY
elif [[ -n $stopping ]] && ((status == 143)); then
  status=$TEMPORARY  # Stopped before there was anything to save.
fi
exit "$status"
