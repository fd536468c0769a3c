#!/usr/bin/env bash
# Runs an `empdg` command in several processes of this machine, each with
# several devices (of the processor): the rehearsal of a pod.
#
# usage: launch/local_pod.sh [FLAG...] -- COMMAND_OF_EMPDG...
#
# flags:
#   --processes=2          how many hosts to play
#   --devices=4            devices of each
#   --logdir=runs/local_pod   each host's output, in host-I.log
#   --grace=130            seconds between SIGTERM and SIGKILL: after Ctrl-C,
#                          and for the others when one process fails
#   --dry_run              print the commands alone
#   --help                 this text
#
# Ctrl-C and SIGTERM are handed on as SIGTERM: training saves, and the same
# command goes on from there. A second one kills what still runs, and so does
# --grace. The exit status is that of the first process that failed or was
# killed, or 0. EMPDG is the command (the clone's .venv/bin/empdg, or empdg).
#
# examples:
#   launch/local_pod.sh --processes=2 --devices=4 -- \
#     train --config=configs/quickstart.py --workdir=runs/rehearsal
#   launch/local_pod.sh -- evaluate --workdir=runs/rehearsal
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
source "$root/launch/common.sh"

processes=2 devices=4 logdir=runs/local_pod grace=130 dry_run=
parse_flags 'processes devices logdir grace' dry_run "$@"
[[ -z $COMMAND ]] || refuse "unexpected argument '$COMMAND'; write it after --"
need_number 1 processes devices
need_number 0 grace
((${#REST[@]})) || refuse "no command is given; write it after --"

empdg=$(find_empdg "$root")
python=python3
[[ ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
port=$("$python" -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
device_flag=--xla_force_host_platform_device_count=$devices

# Sets `command` to that of one process.
command_of() {
  command=(
    env JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$device_flag"
    "$empdg" "${REST[@]}"
    "--coordinator_address=127.0.0.1:$port"
    "--num_processes=$processes" "--process_id=$1"
  )
}

if [[ -n $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i"
    show "${command[@]}"
  done
  exit 0
fi

mkdir -p "$logdir"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/pipe"

pids=()
running=()
# signal_all SIGNAL [-]: to all that run; with `-`, to their children as well.
signal_all() {
  local i
  for ((i = 0; i < ${#pids[@]}; i++)); do
    [[ -z ${running[i]} ]] || kill "-$1" -- "$2${pids[i]}" 2>/dev/null || true
  done
}
# Asks all that run to save and stop, and sets when they are killed.
stop_all() {
  signal_all TERM ''
  : "${deadline:=$((SECONDS + grace))}"
}
signals=0
trap 'signals=$((signals + 1))' INT TERM

# Both ends are open first: to open one alone waits for the other, for ever if
# the first process is killed before it has.
exec 3<>"$folder/pipe"
exec 4<"$folder/pipe"
# In a process group of their own, so that Ctrl-C reaches them once: a second
# signal would end them before they have saved.
set -m
(
  trap '' INT TERM
  exec tee "$logdir/host-0.log" <&4 3>&-
) &
tee=$!
for ((i = 0; i < processes; i++)); do
  command_of "$i"
  output=$logdir/host-$i.log
  ((i)) || output=$folder/pipe
  (
    trap - INT TERM
    exec "${command[@]}" 3>&- 4<&-
  ) >"$output" 2>&1 &
  pids[i]=$!
  running[i]=1
done
set +m
exec 3>&- 4<&-

first_failure=0
stopping='' deadline='' killed=''
left=$processes
while ((left)); do
  if ((signals)) && [[ -z $stopping ]]; then
    stopping=1
    echo "$SCRIPT: asked to save and stop; again ends them at once" >&2
    stop_all
  fi
  ((signals < 2)) || deadline=$SECONDS
  for ((i = 0; i < processes; i++)); do
    if [[ -z ${running[i]} ]] || kill -0 "${pids[i]}" 2>/dev/null; then
      continue
    fi
    status=0
    wait "${pids[i]}" 2>/dev/null || status=$?
    running[i]=
    left=$((left - 1))
    if ((status && !first_failure)); then
      first_failure=$status
      echo "$SCRIPT: process $i failed with status $status, see" \
        "$logdir/host-$i.log; the others are ended" >&2
      stop_all
    fi
  done
  if [[ -n $deadline && -z $killed ]] && ((left && SECONDS >= deadline)); then
    echo "$SCRIPT: killing what still runs" >&2
    signal_all KILL -
    killed=1
  fi
  ((left == 0)) || sleep 0.1 || true  # Ctrl-C ends it too.
done
while kill -0 "$tee" 2>/dev/null; do wait "$tee" || true; done
exit "$first_failure"
