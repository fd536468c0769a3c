#!/usr/bin/env bash
# Runs `empdg train` for a scheduler that must know whether training is over.
#
# usage: launch/train.sh [--dry_run] FLAG_OF_EMPDG_TRAIN...
#
# exit status:
#   0   training has come to its end
#   75  it was asked to stop (SIGTERM) and has saved: start it again
#   2   something given is wrong: do not start it again
#   *   that of `empdg train`; 1 or an abort after a lost host: start it again
#
# flags:
#   --dry_run   print the command alone
#   --help      this text; `empdg train --help` explains the other flags
#
# environment:
#   EMPDG           the command (the clone's .venv/bin/empdg, or empdg)
#   EMPDG_MEETINGS  how often hosts try to meet, two minutes each (5)
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

# A scheduler's SIGTERM may reach this process alone; it is handed on. (Where it
# reaches all processes, `empdg` takes the second one calmly.) Ctrl-C reaches
# both.
child=
stopping=
hand_on() {
  stopping=1 interrupted=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap hand_on TERM
trap 'interrupted=1' INT

# Sets `status` to that of a process. A signal interrupts `wait` alone.
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
  # `tee` must outlive the signals, to write what is said after them.
  (
    trap '' INT TERM
    exec tee "$folder/log" <"$folder/pipe"
  ) &
  local tee=$!
  # bash would have background processes ignore Ctrl-C.
  (
    trap - INT TERM
    exec env PYTHONUNBUFFERED=1 "${command[@]}"
  ) >"$folder/pipe" 2>&1 &
  child=$!
  [[ -z $stopping ]] || hand_on  # The signal came before there was a child.
  wait_for "$child"
  child=
  local of_empdg=$status
  wait_for "$tee"
  status=$of_empdg
}

said() { grep -q "^$1" "$folder/log"; }

# Hosts of a pod do not start at the same time: nobody there yet is no mistake.
meetings=$((10#${EMPDG_MEETINGS:-5}))
while :; do
  train_once
  if ((status != BAD_INPUT)) || ! said '.*the hosts have not met'; then
    break
  fi
  status=1
  meetings=$((meetings - 1))
  if ((meetings <= 0)) || [[ -n $stopping ]]; then break; fi
done

if ((status == 0)) && ! said 'Next: empdg evaluate'; then
  status=$TEMPORARY
elif [[ -n $stopping ]] && ((status == 143)); then
  status=$TEMPORARY  # It was stopped before there was anything to save.
fi
exit "$status"
