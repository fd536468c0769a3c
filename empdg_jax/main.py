"""The `empdg` command: the only file with flags; `commands.py` acts on them."""

import dataclasses
import difflib
import os
import pathlib
import platform
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence

from absl import flags, logging
from ml_collections import config_flags

from empdg_jax import commands, storage
from empdg_jax import config as config_lib
from empdg_jax.config import Config, InputError
from empdg_jax.hardware import chips

# Flags of commands that several hosts may run together, and of those that use
# a trained system.
_HOSTS = ("coordinator_address", "num_processes", "process_id")
_SYSTEM = ("workdir", "bundle", "checkpoint", "run_config")
_BOOLEANS = {
  "find_batch": "find the largest batch a chip that fits, instead",
  "help": "explain the command",
}


@dataclasses.dataclass(frozen=True)
class _Command:
  """A sub-command.

  Attributes:
    summary: What it does, in a line.
    example: Command lines that work.
    flags: Names of its flags.
    run: Does it; returns the exit status.
    more: What else its help says, a title and lines.
  """

  summary: str
  example: str
  flags: tuple[str, ...]
  run: Callable[[flags.FlagValues], int]
  more: tuple[str, ...] = ()


def _define(name: str, values: flags.FlagValues, argv: list[str]) -> None:
  """Defines one flag, alike for every sub-command that has it."""
  strings = {
    "workdir": "the run folder, on a disk or in a bucket (gs://...)",
    "split": "train, valid or test",
    "input": "contexts, one JSON object a line; '-' is standard input",
    "predictions": "a predictions.jsonl",
    "output": "where to write the figures; by default benchmark.json",
    "bundle": "an export, instead of a run folder",
    "out": "the folder to write; an export's must not exist",
    "dtype": "of the parameters: float32 or bfloat16",
    "checkpoint": "best, latest or a step; by default the best",
    "format": "terminal or json; compare also has markdown, csv and latex",
    "topology": "a TPU slice, such as v5e:4x4",
    "coordinator_address": (
      "with several hosts: host:port of the first one; 'auto' on TPU slices, "
      "of GKE too, and with Slurm"
    ),
    "image": "where to draw, without the ending; by default in the run folder",
  }
  many = {
    "dir": "a run folder or an export; '--dir=' may be left out",
    "context": "what a turn says; once for each turn, the user's last",
  }
  defaults = {
    "split": "test",
    "input": "-",
    "format": "terminal",
    "dtype": "float32",
  }
  integers = {
    "samples": (6, "how many replies to show, each to another emotion"),
    "num_processes": (None, "with several hosts: how many processes there are"),
    "process_id": (None, "with several hosts: which of them this is, from 0"),
    "average": (0, "take the mean of so many of the latest checkpoints"),
    "cases": (0, "how many examples to show with all systems' replies"),
    "vocab_size": (
      None,
      "words in the vocabulary; by default the run's or the data's",
    ),
  }
  if name == "config" and not _resumes(argv):
    config_flags.DEFINE_config_file(
      "config", None, "a file of configs/", flag_values=values, sys_argv=argv
    )
  elif name in ("config", "run_config"):
    config_flags.DEFINE_config_dataclass(
      "config", _config_of_folder(argv), flag_values=values, sys_argv=argv
    )
  elif name in _BOOLEANS:
    flags.DEFINE_boolean(name, False, _BOOLEANS[name], flag_values=values)
  elif name in many:
    flags.DEFINE_multi_string(name, [], many[name], flag_values=values)
  elif name in integers:
    default, help_text = integers[name]
    flags.DEFINE_integer(
      name, default, help_text, lower_bound=0, flag_values=values
    )
  else:
    flags.DEFINE_string(
      name, defaults.get(name), strings[name], flag_values=values
    )


def _argument(argv: Sequence[str], name: str) -> str | None:
  """Returns a flag's value, None if it is not given."""
  for arg in argv:
    if arg.startswith(f"--{name}="):
      return arg.partition("=")[2]
  return None


def _resumes(argv: Sequence[str]) -> bool:
  """Returns whether the configuration is that of a run that is there."""
  workdir = _argument(argv, "workdir")
  if _argument(argv, "config") or not workdir:
    return False
  return (storage.run_path(workdir, "workdir") / "config.json").exists()


def _config_of_folder(argv: Sequence[str]) -> Config:
  """Returns the configuration of the run or export that is named.

  Raises:
    InputError: It holds none.
  """
  if given := _argument(argv, "config"):
    raise InputError(
      f"--config={given}: a run has its own configuration; change single "
      "fields, as in --config.eval.beam_size=4"
    )
  if folder := _argument(argv, "bundle"):
    from empdg_jax.inference import export_files

    return export_files.read_config(storage.run_path(folder, "bundle"))
  if folder := _argument(argv, "workdir"):
    from empdg_jax.training import run_folder

    return run_folder.read_config(storage.run_path(folder, "workdir"))
  return Config()  # The command says what is missing.


_COMMANDS = {
  "prepare": _Command(
    "build and check the data; print counts, coverage, cuts and padding",
    "empdg prepare --config=configs/quickstart.py\n"
    "empdg prepare --config=configs/empdg_wo_d.py "
    "--config.data.source=empatheticdialogues.tar.gz",
    ("config",),
    commands.prepare,
  ),
  "train": _Command(
    "train a system; the same command resumes",
    "empdg train --config=configs/quickstart.py --workdir=runs/quickstart\n"
    "empdg train --config=configs/empdg_wo_d.py --config.train.seed=1 "
    "--workdir=runs/empdg_wo_d-1",
    ("config", "workdir", *_HOSTS),
    commands.train,
  ),
  "evaluate": _Command(
    "score and answer a split; write predictions and metrics",
    "empdg evaluate --workdir=runs/quickstart --split=test\n"
    "empdg evaluate --workdir=runs/quickstart --config.eval.beam_size=4 "
    "--out=runs/quickstart/eval/beams\n"
    "empdg evaluate --bundle=quickstart-export "
    "--config.data.source=empatheticdialogues.tar.gz",
    (*_SYSTEM, "split", "out", "samples", *_HOSTS),
    commands.evaluate,
  ),
  "metrics": _Command(
    "recompute text metrics from a predictions file alone",
    "empdg metrics --predictions=runs/quickstart/eval/test/predictions.jsonl",
    ("predictions", "vocab_size"),
    commands.metrics,
  ),
  "compare": _Command(
    "the paper's Tables 1 and 2 from evaluated run folders, with tests",
    "empdg compare runs/transformer runs/moel runs/empdg --cases=2\n"
    "empdg compare runs/* --split=valid --format=markdown",
    ("dir", "split", "format", "cases"),
    commands.compare,
  ),
  "generate": _Command(
    "answer contexts: one JSON object a line in, one out",
    """echo '{"context": ["I lost my job today."]}' | """
    "empdg generate --workdir=runs/quickstart",
    (*_SYSTEM, "input"),
    commands.generate,
  ),
  "chat": _Command(
    "talk with a trained system; it shows the emotion it perceives",
    "empdg chat --workdir=runs/quickstart\n"
    "empdg chat --bundle=quickstart-export",
    _SYSTEM,
    commands.chat,
  ),
  "attention": _Command(
    "draw what each word of a reply attends to, and the perceived emotion",
    'empdg attention --workdir=runs/quickstart --context="I lost my job."',
    (*_SYSTEM, "context", "image"),
    commands.attention,
  ),
  "checkpoints": _Command(
    "list a run's checkpoints: phase, size and metrics",
    "empdg checkpoints --workdir=runs/quickstart",
    ("workdir", "format"),
    commands.checkpoints,
  ),
  "export": _Command(
    "write a checkpoint as one folder that needs neither run nor data",
    "empdg export --workdir=runs/quickstart --out=quickstart-export\n"
    "empdg export --workdir=gs://BUCKET/pod --out=pod-export --average=3",
    ("workdir", "out", "checkpoint", "average", "dtype"),
    commands.export,
  ),
  "compile-check": _Command(
    "compile every step for a TPU slice, without one; memory and traffic",
    "empdg compile-check --config=configs/pod.py:8 --topology=v5e:2x4\n"
    "empdg compile-check --config=configs/empdg.py --topology=v5e:4x4 "
    "--find_batch",
    ("config", "topology", "vocab_size", "format", "find_batch"),
    commands.compile_check,
    ("known slices:", *(f"  {line}" for line in chips.known_slices())),
  ),
  "benchmark": _Command(
    "time training steps and decoding on this machine; write JSON",
    "empdg benchmark --config=configs/empdg_wo_d.py --output=benchmark.json",
    ("config", "output"),
    commands.benchmark,
  ),
}


def _usage() -> str:
  lines = ["usage: empdg COMMAND [--flag=value ...]", "", "commands:"]
  lines += [f"  {name:<13} {c.summary}" for name, c in _COMMANDS.items()]
  lines += [
    "",
    "'empdg COMMAND --help' explains a command. Every field of the",
    "configuration is a flag behind --config, such as --config.train.seed=1.",
  ]
  return "\n".join(lines)


def _command_help(name: str, values: flags.FlagValues) -> str:
  command = _COMMANDS[name]
  lines = [f"empdg {name}: {command.summary}", "", "flags:"]
  lines += [
    f"  --{flag:<20} {values[flag].help}"
    for flag in command.flags
    if flag != "run_config"
  ]
  lines += ["", "examples:", textwrap.indent(command.example, "  ")]
  if command.more:
    lines += ["", *command.more]
  if "run_config" in command.flags:
    lines += [
      "",
      "The configuration is the run's own. These fields of it can change:",
      *(
        f"  --config.{field}"
        for field in config_lib.flatten(Config())
        if field.startswith(commands.OF_USERS)
      ),
    ]
  if "config" in command.flags:
    lines += ["", "fields of --config and their defaults:"]
    lines += [
      f"  --config.{field}={value}"
      for field, value in config_lib.flatten(Config()).items()
    ]
  return "\n".join(lines)


def _parse(name: str, argv: list[str]) -> flags.FlagValues:
  """Returns the sub-command's flags.

  Raises:
    InputError: A flag or a field of the configuration is wrong.
  """
  values = flags.FlagValues()
  argv = _joined(_with_underscores(arg) for arg in argv)
  # The configuration's file must be known before its fields.
  argv = sorted(argv, key=lambda arg: not arg.startswith("--config="))
  if "dir" in _COMMANDS[name].flags:
    argv = [a if a.startswith("-") else f"--dir={a}" for a in argv]
  for flag in _COMMANDS[name].flags:
    _define(flag, values, argv)
  if {"--help", "-h", "-help"} & set(argv):
    print(_command_help(name, values))
    raise SystemExit(0)
  for arg in argv:
    _check_config_argument(arg)
  try:
    rest = values([name, *argv])[1:]
  except (flags.Error, ValueError, TypeError) as error:
    # The first line says which flag, the last one what a file's code raised.
    first, *more = str(error).strip().splitlines()
    reason = f"{first} {more[-1]}" if more else first
    raise InputError(f"{reason}; see 'empdg {name} --help'") from error
  except Exception as error:  # Whatever the configuration file raises.
    raise InputError(f"--config: {error!r}") from error
  if rest:
    raise InputError(
      f"unexpected argument {rest[0]!r}; flags are written --name=value"
    )
  return values


def _with_underscores(arg: str) -> str:
  """Returns an argument whose flag may be written with hyphens."""
  if not arg.startswith("--"):
    return arg
  name, equals, value = arg[2:].partition("=")
  return f"--{name.replace('-', '_')}{equals}{value}"


def _joined(argv: Iterable[str]) -> list[str]:
  """Returns `--flag value` as `--flag=value`."""
  joined: list[str] = []
  for arg in argv:
    last = joined[-1] if joined else ""
    waits = last.startswith("--") and "=" not in last
    if waits and last[2:] not in _BOOLEANS and not arg.startswith("-"):
      joined[-1] = f"{last}={arg}"
    else:
      joined.append(arg)
  return joined


def _check_config_argument(arg: str) -> None:
  """Raises InputError for a missing file or an unknown field."""
  name, _, value = arg.partition("=")
  if name == "--config" and not pathlib.Path(value.split(":")[0]).is_file():
    raise InputError(f"--config={value}: no such file; see configs/")
  if name.startswith("--config."):
    field = name.removeprefix("--config.")
    fields = list(config_lib.flatten(Config()))
    if field not in fields:
      near = difflib.get_close_matches(field, fields, n=1, cutoff=0.0)[0]
      raise InputError(
        f"config.{field}: no such field; did you mean config.{near}?"
      )


def _use_large_pages() -> None:
  """Restarts the process once with an allocator that suits large arrays.

  On Linux, glibc's malloc gives large blocks back to the system as soon as
  they are free, and threads' arenas hold none, so that every training step
  would fault in its working memory anew, page by small page; these settings
  are read only when a process starts.
  """
  if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
    return
  os.environ["GLIBC_TUNABLES"] = (
    "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1:"
    "glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=17179869184"
  )
  os.execv(
    sys.executable, [sys.executable, "-m", "empdg_jax.main", *sys.argv[1:]]
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: The arguments; by default the process's.

  Returns:
    The exit status: 0; 1 if a disk, a bucket or another host failed in the
    middle of work, 2 for a mistake in what was given, 130 after Ctrl-C.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  if not arguments or arguments[0] in ("--help", "-h", "help"):
    print(_usage())
    return 0
  name, *rest = arguments
  try:
    if name not in _COMMANDS:
      raise InputError(
        f"unknown command {name!r}; expected one of " + ", ".join(_COMMANDS)
      )
    return _COMMANDS[name].run(_parse(name, rest))
  except InputError as error:
    print(f"empdg: {error}", file=sys.stderr)
    return config_lib.BAD_INPUT
  except OSError as error:  # A full disk, most likely.
    print(f"empdg: {error}", file=sys.stderr)
    return config_lib.FAILED
  except KeyboardInterrupt:
    return config_lib.INTERRUPTED


def run() -> None:
  """Is the `empdg` command."""
  logging.set_verbosity(logging.FATAL)  # Errors are raised, and told once.
  if len(sys.argv) > 1 and sys.argv[1] in ("train", "evaluate", "benchmark"):
    _use_large_pages()
  status = main()
  if status == config_lib.FAILED:
    # Orbax's threads may wait for minutes for what will not come.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


if __name__ == "__main__":
  run()
