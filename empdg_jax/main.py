"""The `empdg` command: the only file with flags.

Sub-commands import what they need when they run, so that `--help` and
mistakes in flags answer at once.
"""

import dataclasses
import difflib
import json
import os
import pathlib
import platform
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from empdg_jax import config as config_lib
from empdg_jax import tpu
from empdg_jax.config import Config, InputError

USAGE_ERROR = 2
INTERRUPTED = 130


# Flags of commands that several hosts may run together, and of those that use
# a trained system.
_HOSTS = ("coordinator_address", "num_processes", "process_id")
_SYSTEM = ("workdir", "bundle", "checkpoint", "run_config")


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
    "out": "where to write",
    "dtype": "of the parameters: float32 or bfloat16",
    "checkpoint": "best, latest or a step; by default the best",
    "format": "terminal or json; compare also has markdown, csv and latex",
    "topology": "a TPU slice, such as v5e:4x4",
    "coordinator_address": (
      "with several hosts: host:port of the first one; 'auto' on TPU pods and "
      "with Slurm"
    ),
    "image": "where to draw, without the ending; by default in the run folder",
  }
  booleans = {
    "find_batch": "find the largest batch a chip that fits, instead",
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
  elif name in booleans:
    flags.DEFINE_boolean(name, False, booleans[name], flag_values=values)
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


def _argument(argv: Sequence[str], *names: str) -> str | None:
  """Returns the value of the first of these flags that is given."""
  for name in names:
    for arg in argv:
      if arg.startswith(f"--{name}="):
        return arg.partition("=")[2]
  return None


def _resumes(argv: Sequence[str]) -> bool:
  """Returns whether the configuration is that of a run that is there."""
  workdir = _argument(argv, "workdir")
  if _argument(argv, "config") or not workdir:
    return False
  return (config_lib.run_path(workdir, "workdir") / "config.json").exists()


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
    from empdg_jax import bundle

    return bundle.read_config(config_lib.run_path(folder, "bundle"))
  if folder := _argument(argv, "workdir"):
    from empdg_jax import checkpoint

    return checkpoint.read_config(config_lib.run_path(folder, "workdir"))
  return Config()  # The command says what is missing.


def _config(values: flags.FlagValues) -> Config:
  """Returns the validated configuration that the flags give."""
  if values.config is None:
    raise InputError(
      "--config is missing; give a file such as --config=configs/quickstart.py"
    )
  config = values.config
  if not isinstance(config, Config):
    raise InputError("--config: get_config() must return an empdg_jax Config")
  config_lib.validate(config)
  return config


def _workdir(values: flags.FlagValues) -> pathlib.Path:
  if not values.workdir:
    raise InputError("--workdir is missing; give the run folder")
  return config_lib.run_path(values.workdir, "workdir")


def _start_jax() -> None:
  """Finds the devices; keeps compiled steps in the user's cache.

  Raises:
    InputError: There is no device of the platform asked for.
  """
  import jax

  from empdg_jax import parallel

  parallel.check_devices()
  if jax.config.values["jax_compilation_cache_dir"] is None:
    folder = config_lib.cache_dir() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _prepare(values: flags.FlagValues) -> int:
  config = _config(values)
  from rich.console import Console

  from empdg_jax.data import prepare, report

  console = Console()
  dataset = prepare.load_dataset(config.data)
  report.print_report(dataset, config, console)

  from empdg_jax import train_state
  from empdg_jax.models import registry

  model = registry.create_model(config.model, len(dataset.vocabulary))
  console.print(
    f"{config.model.name}: {train_state.count_parameters(model):,} parameters"
  )
  return 0


def _join_hosts(values: flags.FlagValues) -> None:
  """Joins the other hosts' processes, if the flags tell of any."""
  from empdg_jax import parallel

  parallel.initialize(
    values.coordinator_address or "", values.num_processes, values.process_id
  )


def _train(values: flags.FlagValues) -> int:
  workdir = _workdir(values)
  config = _config(values)
  _join_hosts(values)
  _start_jax()
  from empdg_jax import train

  train.train(config, workdir)
  return 0


# Fields of a run's configuration that those who use it may change.
_OF_USERS = ("eval.", "data.source", "data.data_dir")


def _system_folder(values: flags.FlagValues) -> pathlib.Path:
  """Returns the folder of --workdir or --bundle.

  Raises:
    InputError: Neither or both are given, or a field is changed that is the
      run's own.
  """
  from empdg_jax import bundle, checkpoint

  if values.bundle and values.workdir:
    raise InputError("--workdir and --bundle exclude each other; give one")
  if values.bundle:
    folder = config_lib.run_path(values.bundle, "bundle")
    bundle.require_bundle(folder)
    run = bundle.read_config(folder)
  elif values.workdir:
    folder = _workdir(values)
    run = checkpoint.read_config(folder)
    if bundle.is_bundle(folder):
      raise InputError(
        f"--workdir={folder} is an export; give it as --bundle={folder}"
      )
  else:
    raise InputError(
      "--workdir is missing; give the run folder, or an export as --bundle"
    )
  ours, theirs = config_lib.flatten(_config(values)), config_lib.flatten(run)
  for name, value in ours.items():
    if value != theirs[name] and not name.startswith(_OF_USERS):
      raise InputError(
        f"config.{name}={value!r}: the run has {theirs[name]!r}; only "
        "config.eval, config.data.source and config.data.data_dir can change"
      )
  return folder


def _load_system(values: flags.FlagValues) -> Any:
  """Loads the system of --workdir or --bundle."""
  folder = _system_folder(values)
  if values.bundle and values.checkpoint:
    raise InputError(
      f"--checkpoint={values.checkpoint}: an export holds a single one"
    )
  _start_jax()
  from empdg_jax import evaluate

  return evaluate.load_system(folder, values.config, values.checkpoint)


def _check_split(values: flags.FlagValues) -> None:
  if values.split not in ("train", "valid", "test"):
    raise InputError(
      f"--split={values.split}: expected one of train, valid, test"
    )


def _evaluate(values: flags.FlagValues) -> int:
  _check_split(values)
  _join_hosts(values)
  system = _load_system(values)
  from rich.console import Console

  from empdg_jax import evaluate, parallel

  folder = _system_folder(values) / "eval" / values.split
  if values.out:
    folder = config_lib.run_path(values.out, "out")
  console = Console(quiet=not parallel.is_main_process())
  with parallel.hosts_together():
    metrics = evaluate.evaluate_split(system, values.split, folder, console)
  if not parallel.is_main_process():
    return 0
  evaluate.print_metrics(metrics, console)
  evaluate.print_samples(folder / "predictions.jsonl", values.samples, console)
  flag = "bundle" if values.bundle else "workdir"
  console.print(
    f"Written to {folder}. Next: empdg chat --{flag}={values[flag].value}",
    soft_wrap=True, highlight=False,
  )  # fmt: skip
  return 0


def _metrics(values: flags.FlagValues) -> int:
  if not values.predictions:
    raise InputError("--predictions is missing; give a predictions.jsonl")
  from empdg_jax import evaluate, metrics

  path = config_lib.run_path(values.predictions, "predictions")
  lines = evaluate.read_predictions(path)
  size = values.vocab_size or evaluate.vocab_size_of(path, lines)
  if size < 2:
    raise InputError(f"--vocab_size={size}: expected at least 2")
  print(json.dumps(metrics.text_metrics(lines, size), indent=2))
  return 0


def _generate(values: flags.FlagValues) -> int:
  source = values.input
  try:
    lines = (
      sys.stdin
      if source == "-"
      else pathlib.Path(source).read_text(encoding="utf-8").splitlines()
    )
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"--input={source}: cannot read ({error})") from error
  system = _load_system(values)
  from empdg_jax import respond

  failed = total = 0
  batch_size = system.config.eval.batch_size
  for answer in respond.generate(respond.Responder(system), lines, batch_size):
    print(json.dumps(answer, ensure_ascii=False), flush=True)
    total += 1
    failed += "error" in answer
  if failed:
    raise InputError(
      f"{failed} of {total} lines of {source!r} could not be answered; each "
      "says why in its 'error' field"
    )
  return 0


def _chat(values: flags.FlagValues) -> int:
  system = _load_system(values)
  from rich.console import Console

  from empdg_jax import respond

  respond.chat(respond.Responder(system), Console(), sys.stdin)
  return 0


def _export(values: flags.FlagValues) -> int:
  workdir = _workdir(values)
  if not values.out:
    raise InputError("--out is missing; give the folder to write")
  if values.average and values.checkpoint:
    raise InputError("--checkpoint and --average exclude each other; give one")
  from rich.console import Console

  from empdg_jax import export

  if values.dtype not in export.DTYPES:
    raise InputError(
      f"--dtype={values.dtype}: expected one of " + ", ".join(export.DTYPES)
    )
  export.export(
    workdir,
    pathlib.Path(values.out),
    values.checkpoint,
    values.average,
    values.dtype,
    Console(),
  )
  return 0


def _checkpoints(values: flags.FlagValues) -> int:
  workdir = _workdir(values)
  if values.format not in ("terminal", "json"):
    raise InputError(f"--format={values.format}: expected terminal or json")
  from rich.console import Console

  from empdg_jax import checkpoint_list

  listed = checkpoint_list.list_checkpoints(workdir)
  checkpoint_list.print_checkpoints(listed, values.format, Console())
  return 0


def _compare(values: flags.FlagValues) -> int:
  if not values.dir:
    raise InputError(
      "no run folder is given; write empdg compare runs/empdg runs/moel"
    )
  _check_split(values)
  from rich.console import Console

  from empdg_jax import compare

  if values.format not in compare.FORMATS:
    raise InputError(
      f"--format={values.format}: expected one of " + ", ".join(compare.FORMATS)
    )
  folders = [config_lib.run_path(folder, "dir") for folder in values.dir]
  comparison = compare.compare(folders, values.split, values.cases)
  compare.print_comparison(comparison, values.format, Console())
  return 0


def _attention(values: flags.FlagValues) -> int:
  if not values.context:
    raise InputError(
      '--context is missing; write what the user says, as in --context="I lost '
      'my job."'
    )
  system = _load_system(values)
  from empdg_jax import attention, respond

  drawn = attention.attend(respond.Responder(system), values.context)
  stem = pathlib.Path(values.image or _system_folder(values) / "attention")
  for path in attention.draw(drawn, stem):
    print(f"Drawn in {path}")
  return 0


def _compile_check(values: flags.FlagValues) -> int:
  config = _config(values)
  if not values.topology:
    raise InputError("--topology is missing; give a slice such as v5e:4x4")
  import jax

  # The compiler needs no device; JAX would look for a TPU at length.
  jax.config.update("jax_platforms", "cpu")
  from rich.console import Console

  from empdg_jax import compile_check
  from empdg_jax.data import prepare

  if values.format not in compile_check.FORMATS:
    raise InputError(f"--format={values.format}: expected terminal or json")
  slice_ = compile_check.describe_topology(values.topology)
  size = values.vocab_size
  if size is None:
    size = len(prepare.load_dataset(config.data).vocabulary)
  console = Console()
  arguments = config, size, slice_, Console(stderr=True)
  if values.find_batch:
    rows = compile_check.find_batch(*arguments)
    console.print(
      f"The largest batch that fits: {rows} examples a device, "
      f"--config.train.batch_size={rows * len(slice_.devices)}"
    )
    return 0
  reports = compile_check.check(*arguments)
  compile_check.print_reports(reports, values.topology, values.format, console)
  if too_large := [r.step for r in reports if r.memory_share > 1.0]:
    raise InputError(
      f"--topology={values.topology}: {', '.join(too_large)} do not fit the "
      "memory of a chip; --find_batch finds the largest batch that does"
    )
  return 0


def _benchmark(values: flags.FlagValues) -> int:
  config = _config(values)
  _start_jax()
  from rich.console import Console

  from empdg_jax import benchmark
  from empdg_jax.data import prepare

  console = Console()
  dataset = prepare.load_dataset(config.data)
  results = benchmark.benchmark(dataset, config, console)
  benchmark.print_benchmark(results, console)
  path = pathlib.Path(values.output or "benchmark.json")
  benchmark.write_benchmark(results, path)
  console.print(f"Written to {path}")
  return 0


_COMMANDS = {
  "prepare": _Command(
    "build and check the data; print counts, coverage, cuts and padding",
    "empdg prepare --config=configs/quickstart.py\n"
    "empdg prepare --config=configs/empdg_wo_d.py "
    "--config.data.source=empatheticdialogues.tar.gz",
    ("config",),
    _prepare,
  ),
  "train": _Command(
    "train a system; the same command resumes",
    "empdg train --config=configs/quickstart.py --workdir=runs/quickstart\n"
    "empdg train --config=configs/empdg_wo_d.py --config.train.seed=1 "
    "--workdir=runs/empdg_wo_d-1",
    ("config", "workdir", *_HOSTS),
    _train,
  ),
  "evaluate": _Command(
    "score and answer a split; write predictions and metrics",
    "empdg evaluate --workdir=runs/quickstart --split=test\n"
    "empdg evaluate --workdir=runs/quickstart --config.eval.beam_size=4 "
    "--out=runs/quickstart/eval/beams\n"
    "empdg evaluate --bundle=quickstart-export "
    "--config.data.source=empatheticdialogues.tar.gz",
    (*_SYSTEM, "split", "out", "samples", *_HOSTS),
    _evaluate,
  ),
  "metrics": _Command(
    "recompute text metrics from a predictions file alone",
    "empdg metrics --predictions=runs/quickstart/eval/test/predictions.jsonl",
    ("predictions", "vocab_size"),
    _metrics,
  ),
  "compare": _Command(
    "the paper's Tables 1 and 2 from evaluated run folders, with tests",
    "empdg compare runs/transformer runs/moel runs/empdg --cases=2\n"
    "empdg compare runs/* --split=valid --format=markdown",
    ("dir", "split", "format", "cases"),
    _compare,
  ),
  "generate": _Command(
    "answer contexts: one JSON object a line in, one out",
    """echo '{"context": ["I lost my job today."]}' | """
    "empdg generate --workdir=runs/quickstart",
    (*_SYSTEM, "input"),
    _generate,
  ),
  "chat": _Command(
    "talk with a trained system; it shows the emotion it perceives",
    "empdg chat --workdir=runs/quickstart\n"
    "empdg chat --bundle=quickstart-export",
    _SYSTEM,
    _chat,
  ),
  "attention": _Command(
    "draw what each word of a reply attends to, and the perceived emotion",
    'empdg attention --workdir=runs/quickstart --context="I lost my job."',
    (*_SYSTEM, "context", "image"),
    _attention,
  ),
  "checkpoints": _Command(
    "list a run's checkpoints: phase, size and metrics",
    "empdg checkpoints --workdir=runs/quickstart",
    ("workdir", "format"),
    _checkpoints,
  ),
  "export": _Command(
    "write a checkpoint as one folder that needs neither run nor data",
    "empdg export --workdir=runs/quickstart --out=quickstart-export\n"
    "empdg export --workdir=gs://BUCKET/pod --out=pod-export --average=3",
    ("workdir", "out", "checkpoint", "average", "dtype"),
    _export,
  ),
  "compile-check": _Command(
    "compile every step for a TPU slice, without one; memory and traffic",
    "empdg compile-check --config=configs/pod.py:8 --topology=v5e:2x4\n"
    "empdg compile-check --config=configs/empdg.py --topology=v5e:4x4 "
    "--find_batch",
    ("config", "topology", "vocab_size", "format", "find_batch"),
    _compile_check,
    ("known slices:", *(f"  {line}" for line in tpu.known_slices())),
  ),
  "benchmark": _Command(
    "time training steps and decoding on this machine; write JSON",
    "empdg benchmark --config=configs/empdg_wo_d.py --output=benchmark.json",
    ("config", "output"),
    _benchmark,
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
        if field.startswith(_OF_USERS)
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
  argv = [_with_underscores(arg) for arg in argv]
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
    The exit status: 0, 2 for a mistake in what was given, 130 after an
    interruption that saved its work.
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
    return USAGE_ERROR
  except OSError as error:  # A full disk, most likely.
    print(f"empdg: {error}", file=sys.stderr)
    return USAGE_ERROR
  except KeyboardInterrupt:
    return INTERRUPTED


def run() -> None:
  """Is the `empdg` command."""
  logging.set_verbosity(logging.FATAL)  # Errors are raised, and told once.
  if len(sys.argv) > 1 and sys.argv[1] in ("train", "evaluate", "benchmark"):
    _use_large_pages()
  sys.exit(main())


if __name__ == "__main__":
  run()
