#!/usr/bin/env bash
# Rehearses a pod on this machine: runs an `empdg` command in several processes,
# each with several CPU devices.
#
# usage: launch/local_pod.sh [FLAG...] -- EMPDG_COMMAND...
#
# flags:
#   --processes=2             number of simulated hosts
#   --devices=4               devices per host
#   --logdir=runs/local_pod   folder for each host's output, host-I.log
#   --grace=130               seconds from SIGTERM to SIGKILL, after Ctrl-C or
#                             once a process has failed
#   --dry_run                 only print the commands
#   --help                    print this text
#
# Ctrl-C and SIGTERM reach the processes as SIGTERM: training saves and stops,
# and the same command resumes it. Processes still running at a second signal,
# or after --grace seconds, are killed. The exit status is that of the first
# process that failed or was killed, otherwise 0. The environment variable EMPDG
# sets the command to run (default: the clone's .venv/bin/empdg, or else empdg).
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
((${#REST[@]})) || refuse "no command given; write it after --"

empdg=$(find_empdg "$root")
python=python3
[[ ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
port=$("$python" -c 'import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
device_flag=--xla_force_host_platform_device_count=$devices

# Sets `command` to the command of one process.
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
# signal_all SIGNAL [-]: signals all running processes; with `-`, their children
# as well.
signal_all() {
  local i
  for ((i = 0; i < ${#pids[@]}; i++)); do
    [[ -z ${running[i]} ]] || kill "-$1" -- "$2${pids[i]}" 2>/dev/null || true
  done
}
# Asks all running processes to save and stop, and sets the time to kill them.
stop_all() {
  signal_all TERM ''
  : "${deadline:=$((SECONDS + grace))}"
}
signals=0
trap 'signals=$((signals + 1))' INT TERM

# Open both ends of the pipe here: opening just one blocks until the other is
# open, which is forever if the first process is killed before it opens its own.
exec 3<>"$folder/pipe"
exec 4<"$folder/pipe"
# Each process gets its own process group, so that Ctrl-C does not reach it
# directly as well: a second signal would end it before it has saved.
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
    echo "$SCRIPT: processes asked to save and stop; a second signal kills" \
      "them" >&2
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
        "$logdir/host-$i.log; stopping the others" >&2
      stop_all
    fi
  done
  if [[ -n $deadline && -z $killed ]] && ((left && SECONDS >= deadline)); then
    echo "$SCRIPT: killing the processes still running" >&2
    signal_all KILL -
    killed=1
  fi
  ((left == 0)) || sleep 0.1 || true  # Ctrl-C interrupts sleep.
done
while kill -0 "$tee" 2>/dev/null; do wait "$tee" || true; done
exit "$first_failure"
