# shellcheck shell=bash
# Shared by the scripts in launch/, which source it: flags, --dry_run and
# messages. It must also work in bash 3.2, the version on macOS.

SCRIPT=${SCRIPT:-$(basename "$0")}
# Exit statuses. 75 is EX_TEMPFAIL: training has saved and stopped, and the same
# command resumes it.
# shellcheck disable=SC2034
TEMPORARY=75
BAD_INPUT=2

# Exits with a one-line error message about bad input.
refuse() {
  echo "$SCRIPT: $*" >&2
  exit "$BAD_INPUT"
}

# parse_flags "NAMES" "SWITCHES" ARGUMENT...
#
# Sets one variable for each --name=value (or --name value), 1 for each switch,
# COMMAND to the first word that is not a flag, and the array REST to everything
# after `--`. Flag names may use hyphens or underscores. (The locals start with
# an underscore, because a local `name` would hide the variable of --name.)
parse_flags() {
  local _names=" ${1//$'\n'/ } " _switches=" ${2//$'\n'/ } " _argument _flag
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

# Exits unless all of these flags have a value.
need() {
  local _flag
  for _flag; do
    [[ -n ${!_flag} ]] || refuse "--$_flag is missing; see $SCRIPT --help"
  done
}

# need_number LEAST NAME...: exits unless these flags are whole numbers, LEAST
# or more. Strips leading zeros, which bash would read as octal.
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

# Prints the comment at the top of the script, which is its help text.
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

# Runs a command, or prints it if --dry_run is set. If the command fails, the
# script exits with 1 rather than the command's own status: 2, for example,
# would mean bad input to training.
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

# Prints the `empdg` to run: $EMPDG, the one in the clone's .venv, or the one on
# the PATH.
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
