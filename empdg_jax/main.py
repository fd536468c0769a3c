"""The `empdg` command: the only file with flags; `commands.py` acts on them."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import logging
import os
import platform
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from empdg_jax import __version__, commands, storage
from empdg_jax import config as config_lib
from empdg_jax.config import Config, EvalConfig, InputError, SourceConfig
from empdg_jax.hardware import chips


@dataclasses.dataclass
class _RunConfig:
  """The fields of a run's configuration that can change after training."""

  data: SourceConfig = dataclasses.field(default_factory=SourceConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


_TableFormat = Literal["terminal", "markdown", "csv", "json", "latex"]
# The type, default and help of each flag, the same in all commands except where
# COMMAND.FLAG says otherwise. "fields" and "run_fields" are the flags behind
# --config.
_FLAGS: dict[str, tuple[Any, Any, str]] = {
  "config": (str, "", "File of configs/; FILE:X calls its get_config('X')."),
  "fields": (Config, Config(), ""),
  "run_fields": (_RunConfig, _RunConfig(), ""),
  "workdir": (str, "", "Run folder, on a disk or in a bucket (gs://...)."),
  "bundle": (str, "", "Export to use instead of a run folder."),
  "demo.workdir": (list[str], [], "Run folder; repeat to compare up to 3."),
  "demo.bundle": (list[str], [], "Export; repeat to compare up to 3."),
  "host": (str, "127.0.0.1", "Address to serve at; 0.0.0.0 for everyone."),
  "port": (int, 7860, "Port to serve at; 0 for any that is free."),
  "checkpoint": (str | None, None, "best (the default), latest or a step."),
  "split": (Literal["train", "valid", "test"], "test", "Split of the data."),
  "input": (str, "-", "Contexts, one JSON object a line; - is standard input."),
  "predictions": (str, "", "A predictions.jsonl."),
  "out": (str, "", "Folder to write; that of an export must not exist."),
  "output": (str, "benchmark.json", "File to write the figures to."),
  "results": (str, "", "Files to write, without .json and .md."),
  "image": (str, "", "File to draw, without its ending."),
  "dtype": (Literal["float32", "bfloat16"], "float32", "Type of parameters."),
  "format": (Literal["terminal", "json"], "terminal", "Format to print."),
  "compare.format": (_TableFormat, "terminal", "Format to print."),
  "data": (str, "", "The dataset's archive, or official to download it."),
  "lexicon": (str, "", "Emotion lexicon: a file, or nrclex."),
  "vectors": (
    list[str], [], "Word vectors; repeat to put two files side by side.",
  ),
  "systems": (str, "", "Systems, with commas; all by default."),
  "seeds": (str, "0,1,2", "Seeds, with commas."),
  "example_set": (
    Literal["empdg", "all_turns"], "empdg", "The paper's examples, or all.",
  ),
  "jobs": (int, 1, "Runs at the same time."),
  "print_commands": (bool, False, "Print the commands instead, a line a run."),
  "reproduce.config": (
    str, "", "File of configs/ whose get_config takes a system's name; paper "
    "or all_turns by default.",
  ),
  "reproduce.workdir": (str, "", "Folder for runs, results and the export."),
  "reproduce.results": (str, "", "Folder for results; else WORKDIR/results."),
  "study": (str, "", "Folder of a human evaluation."),
  "study create.dir": (
    list[str], [], "Run, export or NAME.jsonl; --dir= may be left out.",
  ),
  "dialogues": (int, 100, "Dialogues to sample, by their share of emotions."),
  "annotators": (int, 3, "Annotators; each sees every dialogue."),
  "controls": (float, 0.1, "Share of items with a known answer, 0 to 0.5."),
  "seed": (int, 0, "Seed of the sample and of all orders."),
  "part": (Literal["rating", "pairwise"], "rating", "What to serve."),
  "study serve.host": (str, "127.0.0.1", "Address to listen on."),
  "study serve.port": (int, 8000, "Port to listen on; 0: any that is free."),
  "platform": (
    Literal["potato", "mturk", "label_studio"], "potato",
    "Where the answers come from.",
  ),
  "file": (str, "", "Answers as the platform exported them; none for Potato."),
  "study report.format": (
    Literal["terminal", "markdown", "latex", "json"], "terminal",
    "Format to print.",
  ),
  "topology": (str, "", "TPU slice, such as v5e:4x4 or v5litepod-16."),
  "dir": (list[str], [], "Run folder or export; --dir= may be left out."),
  "context": (list[str], [], "A turn; repeat for each turn, the user's last."),
  "samples": (int, 6, "Responses to show, each to a different emotion."),
  "average": (int, 0, "Latest checkpoints to average; 0 for none."),
  "cases": (int, 0, "Examples to show with all systems' responses."),
  "vocab_size": (int | None, None, "Vocabulary size, if not the data's."),
  "find_batch": (bool, False, "Find the largest batch that fits a chip."),
  "coordinator_address": (
    str, "", "Several hosts: host:port of the first one, or auto on TPU "
    "slices, on GKE and with Slurm.",
  ),
  "num_processes": (int | None, None, "Several hosts: number of processes."),
  "process_id": (int | None, None, "Several hosts: this process, from 0."),
}  # fmt: skip
_CONFIG = ("config", "fields")
_SYSTEM = ("workdir", "bundle", "checkpoint", "run_fields")
_HOSTS = ("coordinator_address", "num_processes", "process_id")
# The flags of each command; the docstring of its function is its help.
_COMMANDS = {
  "prepare": _CONFIG,
  "train": ("workdir", *_HOSTS, *_CONFIG),
  "evaluate": ("split", "out", "samples", *_HOSTS, *_SYSTEM),
  "metrics": ("predictions", "vocab_size"),
  "compare": ("dir", "split", "format", "cases", "study", "results"),
  "reproduce": (
    "data", "lexicon", "vectors", "workdir", "systems", "seeds", "example_set",
    "jobs", "print_commands", "results", "config",
  ),
  "generate": ("input", *_SYSTEM),
  "chat": _SYSTEM,
  "demo": ("workdir", "bundle", "host", "port"),
  "study create": (
    "dir", "out", "split", "dialogues", "annotators", "controls", "seed",
  ),
  "study serve": ("study", "part", "host", "port"),
  "study import": ("study", "platform", "file"),
  "study report": ("study", "format"),
  "attention": ("context", "image", *_SYSTEM),
  "plot": ("dir", "predictions", "image"),
  "checkpoints": ("workdir", "format"),
  "export": ("workdir", "out", "checkpoint", "average", "dtype"),
  "compile-check": ("topology", "vocab_size", "format", "find_batch", *_CONFIG),
  "benchmark": ("output", *_CONFIG),
}  # fmt: skip
# Commands of commands; the text is the help of each.
_GROUPS = {
  "study": "Runs the paper's human evaluation: create, serve, import, report.",
}
_RULES = tyro.constructors.ConstructorRegistry()


@_RULES.primitive_rule
def _leniently(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
  """Parses without errors, so that `config.expected` words every refusal."""
  metavars: dict[Any, str] = {
    **{int: "INT", float: "FLOAT", str: "TEXT", bool: "{true,false}"},
    **{int | None: "INT", str | None: "TEXT", tuple: "(INT,...)"},
    Literal: "{" + ",".join(map(str, typing.get_args(info.type))) + "}",
  }
  metavar = metavars.get(info.type) or metavars.get(info.type_origin)
  if not metavar:
    return None
  return PrimitiveConstructorSpec(
    nargs=1,
    metavar=metavar,
    instance_from_str=lambda texts: config_lib.parse(texts[0], info.type),
    is_instance=lambda value: True,
    str_from_instance=lambda value: [config_lib.unparse(value)],
  )


_SETTINGS: dict[str, Any] = {
  "use_underscores": True,
  "config": (tyro.conf.FlagConversionOff, tyro.conf.UseAppendAction),
  "registry": _RULES,
}


def _flags(name: str) -> dict[str, tuple[Any, Any, str]]:
  """Returns the type, default and help of each flag of a command."""
  return {
    flag: _FLAGS.get(f"{name}.{flag}") or _FLAGS[flag]
    for flag in _COMMANDS[name]
  }


def _function(name: str) -> Callable[[Any], None]:
  """Returns the function that runs a command."""
  return getattr(commands, re.sub(r"\W", "_", name))


def _options(name: str) -> Callable[..., Any]:
  """Returns a dataclass whose fields are the flags of a command."""
  fields = []
  for flag, (kind, default, text) in _flags(name).items():
    if isinstance(kind, types.UnionType):
      # Tyro checks these by itself, but `int | None` with a slow package.
      union: Any = typing.Union
      kind = union[typing.get_args(kind)]
    settings = tyro.conf.arg(
      name="config" if dataclasses.is_dataclass(kind) else None,
      help=text or None,
      help_behavior_hint=None if default else "",
    )
    field = dataclasses.field(default_factory=lambda default=default: default)
    fields.append((flag, Annotated[kind, settings], field))
  about = {"__doc__": inspect.getdoc(_function(name))}
  return dataclasses.make_dataclass(
    re.sub(r"\W", "_", name), fields, namespace=about
  )


def _any_of(kinds: Mapping[str, Any], about: str = "") -> Any:
  """Returns a dataclass whose one field is any of several commands.

  Args:
    kinds: The dataclass of each command.
    about: The docstring of the result.
  """
  named = []
  for name, kind in kinds.items():
    text, *_ = (inspect.getdoc(kind) or "").splitlines()
    called = tyro.conf.subcommand(name, description=text, prefix_name=False)
    named.append(Annotated[kind, called])
  # With a text of its own: Tyro would look for one in the source of modules.
  setting = tyro.conf.arg(name="", help="What to run")
  union: Any = typing.Union
  return dataclasses.make_dataclass(
    "Commands",
    [("command", Annotated[union[tuple(named)], setting])],
    namespace={"__doc__": about},
  )


def _group(name: str) -> Any:
  """Returns a dataclass of a group of commands, such as `empdg study`."""
  names = [command for command in _COMMANDS if command.startswith(f"{name} ")]
  kinds = {command.partition(" ")[2]: _options(command) for command in names}
  return _any_of(kinds, _GROUPS[name])


def _spelled_out(name: str, argv: Sequence[str]) -> list[str]:
  """Returns every option as --flag=value, its name with underscores.

  Raises:
    InputError: A flag is unknown or has no value, or a value has no flag.
  """
  flags = _flags(name)
  kinds = {f: kind for f, (kind, *_) in flags.items() if "fields" not in f}
  if "fields" in flags or "run_fields" in flags:
    fields = config_lib.field_types()
    kinds |= {"config": str, **{f"config.{f}": k for f, k in fields.items()}}
  rest, options = list(argv), []
  while rest:
    arg = rest.pop(0)
    if "\0" in arg:
      raise InputError(f"{arg!r}: holds a NUL character")
    if "dir" in flags and not arg.startswith("-"):
      arg = f"--dir={arg}"
    if not arg.startswith("--") or arg == "--":
      raise InputError(
        f"unexpected argument {arg!r}; flags are written --name=value"
      )
    flag, equals, value = arg[2:].partition("=")
    flag = flag.replace("-", "_")
    if flag not in kinds:
      alike = [kind for kind in kinds if ("." in kind) == ("." in flag)]
      near = difflib.get_close_matches(flag, alike, n=1)
      hint = f"; did you mean --{near[0]}?" if near else ""
      see = f"; see 'empdg {name} --help'"
      if flag.startswith("config."):
        raise InputError(f"--{flag}: no such field{hint or see}")
      raise InputError(f"unknown flag --{flag}{see}{hint}")
    if not equals:
      value = rest[0] if rest and not rest[0].startswith("--") else None
      if kinds[flag] is bool and str(value).lower() not in ("true", "false"):
        value = "true"
      elif value is None:
        raise InputError(f"--{flag} has no value; write --{flag}=VALUE")
      else:
        rest.pop(0)
    if flag == "config" and "run_fields" in flags:
      raise InputError(
        f"--config={value}: a run has its own configuration; change single "
        "fields, as in --config.eval.beam_size=4"
      )
    options.append(f"--{flag}={value}")
  return options


def _base_config(values: Any) -> Config | None:
  """Returns the configuration of the given file, run or export, if any."""
  if file := getattr(values, "config", ""):
    return config_lib.from_file(file)
  workdir = getattr(values, "workdir", "")
  if not workdir and not getattr(values, "bundle", ""):
    return None  # The command says what is missing.
  if hasattr(values, "config"):
    folder = storage.run_path(workdir, "workdir")
    if not (folder / "config.json").exists():
      return None  # A new run needs a file.
  return commands.stored_config(values)[1]


def _parse(name: str, argv: Sequence[str]) -> Any:
  """Returns a command's flags as attributes.

  Raises:
    InputError: A flag or the configuration's file is wrong.
  """
  flags, options = _flags(name), _options(name)
  if {"-h", "--help"} & set(argv):
    about = options.__doc__ or ""
    if "run_fields" in flags:
      about += "\n\nThe configuration is the run's own; of it, only the fields "
      about += "below can change."
    if name == "compile-check":
      about += f"\n\nChips of --topology: {', '.join(chips.CHIPS)}."
    tyro.cli(
      options,
      prog=f"empdg {name}",
      description=about,
      args=["--help"],
      **_SETTINGS,
    )
  given = _spelled_out(name, argv)
  fields = [arg for arg in given if arg.startswith("--config.")]
  own = [arg for arg in given if arg not in fields]
  values: Any = tyro.cli(options, args=own, **_SETTINGS)
  for flag, (kind, *_) in flags.items():
    value = getattr(values, flag)
    wanted = config_lib.expected(value, kind)
    if not wanted and isinstance(value, int) and value < 0:
      wanted = "at least 0"
    if wanted:
      raise InputError(f"--{flag}={value}: expected {wanted}")
  if name == "chat" and (values.workdir or values.bundle):
    commands.say_loading()
  if "fields" in flags or "run_fields" in flags:
    values.config = _base_config(values)
  if fields and values.config:
    args = [arg.replace("config.", "", 1) for arg in fields]
    values.config = tyro.cli(
      Config, args=args, default=values.config, **_SETTINGS
    )
  return values


def _print_overview(*argv: str) -> None:
  """Prints the help of all commands, or a script that completes them."""
  kinds = {name: _options(name) for name in _COMMANDS if " " not in name}
  kinds |= {name: _group(name) for name in _GROUPS}
  about = (
    "'empdg COMMAND --help' explains a command; --version prints the version,\n"
    "--completion=SHELL a script for bash, fish or zsh."
  )
  with contextlib.suppress(SystemExit):
    tyro.cli(
      _any_of(kinds), prog="empdg", description=about, args=argv, **_SETTINGS
    )


# The allocator's settings of `_use_large_pages`, as glibc reads them.
ALLOCATOR = (
  "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1:"
  "glibc.malloc.mmap_threshold=4294967296:"
  "glibc.malloc.trim_threshold=17179869184"
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
  os.environ["GLIBC_TUNABLES"] = ALLOCATOR
  # The same program with the same arguments, and no shell.
  os.execv(  # nosec B606
    sys.executable, [sys.executable, "-m", "empdg_jax.main", *sys.argv[1:]]
  )


def _unknown_command(
  word: str, known: Sequence[str], before: str = ""
) -> InputError:
  """Returns the refusal of a command, with the nearest one or all of them."""
  near = difflib.get_close_matches(word, known, n=1)
  hint = (
    f"did you mean {before + near[0]!r}?"
    if near
    else "expected one of " + ", ".join(known)
  )
  return InputError(f"unknown command {before + word!r}; {hint}")


def _in_group(name: str, rest: Sequence[str]) -> list[str]:
  """Returns the command of a group, its name in one piece, and its flags.

  Raises:
    InputError: There is no such command in the group.
  """
  word, *flags = rest or ["--help"]
  if word in ("-h", "--help", "help"):
    tyro.cli(_group(name), prog=f"empdg {name}", args=["--help"], **_SETTINGS)
  if f"{name} {word}" not in _COMMANDS:
    known = [c.partition(" ")[2] for c in _COMMANDS if c.startswith(f"{name} ")]
    raise _unknown_command(word, known, f"empdg {name} ")
  return [f"{name} {word}", *flags]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: The arguments; by default the process's.

  Returns:
    The exit status: 0; 1 if a disk, a bucket or another host failed in the
    middle of work, 2 for a mistake in what was given, 130 after Ctrl-C.
  """
  name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
  try:
    if name in _GROUPS:
      name, *rest = _in_group(name, rest)
    if name in _COMMANDS:
      _function(name)(_parse(name, rest))
    elif name == "--version":
      print(f"empdg-jax {__version__}")
    elif name in ("-h", "--help", "help"):
      _print_overview("--help")
    elif name.startswith("--completion"):
      shell = name.partition("=")[2] or " ".join(rest)
      if wanted := config_lib.expected(shell, Literal["bash", "fish", "zsh"]):
        raise InputError(f"--completion={shell}: expected {wanted}")
      _print_overview("--tyro-write-completion", shell, "-")
    else:
      known = [*(c for c in _COMMANDS if " " not in c), *_GROUPS]
      raise _unknown_command(name, known)
    return 0
  except (InputError, OSError) as error:
    line = config_lib.printable(" ".join(str(error).splitlines()))
    # An OSError is a full disk, most likely.
    mistake = isinstance(error, InputError)
    if storage.is_bad_name(error):
      line, mistake = f"{line[:100]}...: give a shorter path", True
    print(f"empdg: {line}", file=sys.stderr)
    return config_lib.BAD_INPUT if mistake else config_lib.FAILED
  except KeyboardInterrupt:
    return config_lib.INTERRUPTED


def run() -> None:
  """Runs the `empdg` command and exits."""
  if {"-h", "--help"} & set(sys.argv):  # As in `empdg train --help | head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  else:
    # Errors are raised, and told once.
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    for client in ("gcsfs", "google.auth", "s3fs", "adlfs"):
      logging.getLogger(client).setLevel(logging.CRITICAL + 1)
  if len(sys.argv) > 1 and sys.argv[1] in ("train", "evaluate", "benchmark"):
    _use_large_pages()
  for stream in (sys.stdin, sys.stdout):
    if isinstance(stream, io.TextIOWrapper):
      # Output is valid UTF-8 whatever the locale; a line of input that is not
      # gets an error of its own.
      escape = "surrogateescape" if stream is sys.stdin else "backslashreplace"
      stream.reconfigure(encoding="utf-8", errors=escape)
  status = main()
  if status == config_lib.FAILED:
    # Orbax's threads may wait for minutes for what will not come.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


if __name__ == "__main__":
  run()
