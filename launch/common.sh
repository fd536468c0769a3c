# shellcheck shell=bash
# What the scripts of launch/ share: flags, --dry_run and messages. It is
# sourced, and runs in the bash 3.2 of macOS as well.

SCRIPT=${SCRIPT:-$(basename "$0")}
# Exit statuses. EX_TEMPFAIL: saved and stopped, the same command goes on.
# shellcheck disable=SC2034
TEMPORARY=75
BAD_INPUT=2

# Ends the script: a mistake in what was given, in one line.
refuse() {
  echo "$SCRIPT: $*" >&2
  exit "$BAD_INPUT"
}

# parse_flags "NAMES" "SWITCHES" ARGUMENT...
#
# Sets a variable for every --name=value (or --name value) and a 1 for every
# switch, COMMAND to the first word that is no flag, and the array REST to what
# follows `--`. Hyphens and underscores in a flag's name are the same. (A local
# `name` would hide the variable that a flag --name is to set.)
parse_flags() {
  local _names=" ${1//$'\n'/ } " _switches=" $2 " _argument _flag
  shift 2
  COMMAND=
  REST=()
  while (($#)); do
    _argument=$1
    shift
    case $_argument in
      --)
        REST=(${1+"$@"})
        return
        ;;
      -h | --help) help_and_exit ;;
      --*)
        _flag=${_argument%%=*}
        _flag=${_flag#--}
        _flag=${_flag//-/_}
        if [[ $_switches == *" $_flag "* && $_argument != *=* ]]; then
          printf -v "$_flag" 1
        elif [[ $_names != *" $_flag "* ]]; then
          refuse "unknown flag ${_argument%%=*}; see $SCRIPT --help"
        elif [[ $_argument == *=* ]]; then
          printf -v "$_flag" %s "${_argument#*=}"
        elif (($#)) && [[ $1 != --* ]]; then
          printf -v "$_flag" %s "$1"
          shift
        else
          refuse "--$_flag needs a value, --$_flag=VALUE"
        fi
        ;;
      *)
        [[ -z $COMMAND ]] || refuse "unexpected argument '$_argument'"
        COMMAND=$_argument
        ;;
    esac
  done
}

# Refuses unless every one of these flags has a value.
need() {
  local _flag
  for _flag; do
    [[ -n ${!_flag} ]] || refuse "--$_flag is missing; see $SCRIPT --help"
  done
}

# need_number LEAST NAME...: refuses unless they are whole numbers, and takes
# the zeros off their heads, which would make them octal.
need_number() {
  local _flag least=$1
  shift
  for _flag; do
    if ! [[ ${!_flag} =~ ^[0-9]{1,9}$ ]] || ((10#${!_flag} < least)); then
      refuse "--$_flag=${!_flag}: expected a whole number, $least or more"
    fi
    printf -v "$_flag" %d "$((10#${!_flag}))"
  done
}

# Prints the comment at the head of the script, which is its help.
help_and_exit() {
  awk 'NR > 1 && !/^#/ { exit }
    NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0"
  exit 0
}

# Prints a command so that it can be pasted into a shell.
show() {
  printf '%q' "$1"
  shift
  (($# == 0)) || printf ' %q' "$@"
  echo
}

# Runs a command, or shows it with --dry_run. One that fails ends the script,
# with 1: a status of its own, such as 2, would say something of training.
run() {
  local status=0
  if [[ -n ${dry_run:-} ]]; then
    show "$@"
    return
  fi
  "$@" || status=$?
  if ((status)); then
    echo "$SCRIPT: failed with status $status: $(show "$@")" >&2
    exit 1
  fi
}

# Prints the `empdg` to run: $EMPDG, the clone's own, or the one on the PATH.
find_empdg() {
  local own="$1/.venv/bin/empdg"
  if [[ -n ${EMPDG:-} ]]; then
    echo "$EMPDG"
  elif [[ -x $own ]]; then
    echo "$own"
  else
    echo empdg
  fi
}
