"""The paper's tables from the data alone: a plan of runs, and its execution."""

import collections
import dataclasses
import itertools
import pathlib
import shlex
import signal
import subprocess  # nosec B404
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.analysis import compare, pictures, tables
from empdg_jax.config import Config, InputError, SaveError
from empdg_jax.inference import predictions
from empdg_jax.models import registry
from empdg_jax.training import record, terminal
from empdg_jax.training.validation import selection_score

# After a system's name: the same training, in which the discriminators play but
# do not move the generator.
CONTROL = "_control"
_SPLITS = "valid", "test"


@dataclasses.dataclass(frozen=True)
class Planned:
  """A run of the plan.

  Attributes:
    system: The system's name, with `CONTROL` for its control.
    config: Its whole configuration.
    workdir: Its folder.
    train: The arguments of `empdg train`.
    needs: The folder of the run whose generator it takes; None for none.
  """

  system: str
  config: Config
  workdir: pathlib.Path
  train: tuple[str, ...]
  needs: pathlib.Path | None

  @property
  def name(self) -> str:
    """The name of the run and of its folder."""
    return self.workdir.name

  @property
  def trained(self) -> bool:
    """Whether its training is finished."""
    return bool(self.record.get("finished"))

  @property
  def record(self) -> dict[str, Any]:
    """What its training took so far; see `record.Recorder`."""
    return storage.read_object(self.workdir / record.RECORD)

  @property
  def unevaluated(self) -> list[str]:
    """The splits without an evaluation of its finished training."""
    return [
      split
      for split in _SPLITS
      if not (self.workdir / "eval" / split / "metrics.json").exists()
    ]

  @property
  def commands(self) -> list[tuple[str, ...]]:
    """The arguments of every `empdg` that it still needs, in order."""
    training: list[tuple[str, ...]] = [("train", *self.train)]
    return training * (not self.trained) + [
      ("evaluate", f"--workdir={self.workdir}", f"--split={split}")
      for split in self.unevaluated
    ]


def default_systems() -> list[str]:
  """Returns the paper's six systems, and the control of EmpDG."""
  return [*registry.SYSTEMS, registry.PROPOSED + CONTROL]


def make_plan(
  systems: Sequence[str],
  seeds: Sequence[int],
  config: str,
  fields: Mapping[str, str],
  folder: pathlib.Path,
) -> list[Planned]:
  """Plans the runs, each after the one whose generator it takes.

  Args:
    systems: The systems' names; those whose generators they take are added.
    seeds: The seeds of each.
    config: The configuration's file, whose `get_config` takes a system's name.
    fields: Other values of the configuration's fields, by dotted name.
    folder: The folder of the run folders.

  Raises:
    InputError: There is no such system, or no such configuration.
  """
  known = list(registry.SYSTEMS)
  known += [n + CONTROL for n, s in registry.SYSTEMS.items() if s.start]
  wanted: dict[str, None] = {}
  for name in systems:
    if name not in known:
      raise InputError(
        f"--systems={name}: expected some of " + ", ".join(known)
      )
    start = _start(name)
    # A start that is planned already keeps its place.
    wanted |= dict.fromkeys([start, name] if start else [name])
  # Starts first, so that what needs them can begin as soon as they end.
  order = sorted(wanted, key=lambda n: bool(_start(n)))
  plan = []
  for seed, name in itertools.product(seeds, order):
    given = dict(fields)
    # The pictures show how the first seed's responses change through training,
    # and the effect of the discriminators is followed for every seed.
    if seed == seeds[0] or _start(name):
      given["train.validation_responses"] = "true"
    plan.append(_planned(name, seed, config, given, folder))
  return plan


def _start(system: str) -> str:
  """Returns the system whose generator a system takes, "" for none."""
  return registry.SYSTEMS[system.removesuffix(CONTROL)].start


def _planned(
  system: str,
  seed: int,
  config: str,
  fields: Mapping[str, str],
  folder: pathlib.Path,
) -> Planned:
  """Returns the run of a system with a seed."""
  given = dict(fields) | {"train.seed": str(seed)}
  needs = None
  if start := _start(system):
    needs = folder / f"{start}-{seed}"
    given["train.mle_checkpoint"] = str(needs)
  if system.endswith(CONTROL):
    given["train.generator_signal"] = "constant"
  file = f"{config}:{system.removesuffix(CONTROL)}"
  workdir = folder / f"{system}-{seed}"
  whole = config_lib.with_fields(config_lib.from_file(file), given)
  config_lib.validate(whole)
  options = [f"--config.{name}={value}" for name, value in given.items()]
  train = (f"--config={file}", f"--workdir={workdir}", *options)
  return Planned(system, whole, workdir, train, needs)


def updates(config: Config) -> dict[str, int]:
  """Returns the most updates of each step in a run of a configuration."""
  train = config.train
  phases = bool(registry.find_system(config.model).discriminators)
  rounds = train.adversarial_rounds * phases
  return {
    "mle": 0 if train.mle_checkpoint else train.mle_steps,
    "discriminator": train.discriminator_steps * phases
    + rounds * train.d_steps,
    "generator": rounds * train.g_steps,
  }


def hours_left(plan: Sequence[Planned], seconds: Mapping[str, float]) -> float:
  """Estimates how long the trainings of a plan still take, one at a time.

  Args:
    plan: The runs.
    seconds: The time of each step in `updates`.
  """
  total = 0.0
  for run in plan:
    if not run.trained:
      steps = updates(run.config)
      done = int(run.record.get("updates") or 0)
      share = max(0.0, 1 - done / max(1, sum(steps.values())))
      total += share * sum(
        n * seconds.get(name, 0.0) for name, n in steps.items()
      )
  return total / 3600


def to_time(plan: Sequence[Planned]) -> Config | None:
  """Returns the configuration whose steps say how long a plan takes.

  It is that of a run with all three phases, or else the first; None if nothing
  is left to train.
  """
  left = [run for run in plan if not run.trained]
  playing = [run for run in left if run.needs]
  return playing[0].config if playing else left[0].config if left else None


def print_plan(plan: Sequence[Planned], console: Console) -> None:
  """Prints the runs and how far each one is."""
  console.print(_table(plan, {}), highlight=False)


def shell_commands(plan: Sequence[Planned]) -> Iterator[str]:
  """Yields a line for a shell for every run that is not complete."""
  for run in plan:
    commands = [shlex.join(("empdg", *command)) for command in run.commands]
    if commands:
      yield " && ".join(commands)


def _table(plan: Sequence[Planned], running: Mapping[str, str]) -> Any:
  """Returns the table of a plan; `running` has the latest line of each run."""
  rows = []
  for run in plan:
    trained, missing = run.trained, run.unevaluated
    hours = run.record.get("hours")
    rows.append(
      (
        run.name,
        "done" if trained else f"{run.record.get('updates', 0):,} updates",
        *("-" if split in missing else "done" for split in _SPLITS),
        "-" if hours is None else f"{hours:.2f}",
        running.get(run.name, ""),
      )
    )
  header = ("run", "training", *_SPLITS, "hours", "now")
  return terminal.table(header, rows, left=["run", "now"])


class _Job:
  """The commands of a run, one after the other, with their log."""

  def __init__(self, run: Planned, log: pathlib.Path) -> None:
    """Starts the first command."""
    self.run, self.log = run, log
    self._left = collections.deque(run.commands)
    self._advance()

  def _advance(self) -> None:
    command = self._left.popleft()
    self.doing = command[0]
    with self.log.open("ab") as file:
      # Our own program with checked arguments, and no shell.
      self.process = subprocess.Popen(  # nosec B603
        [sys.executable, "-m", "empdg_jax.main", *command],
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
      )

  def ended(self) -> bool:
    """Goes on to the next command; returns whether there is none.

    Raises:
      SaveError: A command has failed.
    """
    status = self.process.poll()
    if status is None:
      return False
    # Training that was asked to stop has saved, and ends with 0 as well.
    if status or not self.run.trained:
      raise SaveError(
        f"{self.run.name}: 'empdg {self.doing}' ended with status {status}: "
        f"{self.last_line()} ({self.log} has more); the same command goes on "
        "from there"
      )
    if not self._left:
      return True
    self._advance()
    return False

  def last_line(self) -> str:
    """Returns the latest line of its log."""
    with self.log.open("rb") as file:
      file.seek(max(0, self.log.stat().st_size - 2_000))
      lines = file.read().decode(errors="replace").split("\n")
    return next((x.strip() for x in reversed(lines) if x.strip()), "")

  def stop(self) -> None:
    """Asks it to save and end, and waits for it."""
    if self.process.poll() is None:
      self.process.terminate()
    self.process.wait()


def execute(
  plan: Sequence[Planned],
  stem: pathlib.Path,
  jobs: int,
  console: Console,
) -> None:
  """Trains and evaluates what is missing, and writes the results.

  Args:
    plan: The runs.
    stem: The results' path without ending, written after every system.
    jobs: The number of runs at the same time.
    console: The console for the table of progress.

  Raises:
    SaveError: A command failed; the others were stopped, and have saved.
    KeyboardInterrupt: Ctrl-C or SIGTERM; all have saved.
  """
  waiting = [run for run in plan if run.commands]
  logs = plan[0].workdir.parent / "logs"
  with storage.errors(f"{logs}: cannot write", InputError):
    logs.mkdir(parents=True, exist_ok=True)
  running: list[_Job] = []
  caught = signal.SIGINT, signal.SIGTERM
  # Without a terminal a line for each run says enough.
  live = Live(console=console, auto_refresh=False, transient=True)
  with terminal.catch_interrupts(*caught) as interrupt, live:
    try:
      while waiting or running:
        ready = [r for r in waiting if r.needs is None or _done(r.needs, plan)]
        for run in ready[: jobs - len(running)]:
          waiting.remove(run)
          running.append(_Job(run, logs / f"{run.name}.log"))
          terminal.say(f"{run.name}: {running[-1].doing}", console)
        if console.is_terminal:
          now = {job.run.name: job.last_line()[:60] for job in running}
          live.update(_table(plan, now), refresh=True)
        time.sleep(0.5)
        if interrupt.number:
          raise KeyboardInterrupt
        for job in [job for job in running if job.ended()]:
          running.remove(job)
          left = len(waiting) + len(running)
          terminal.say(f"{job.run.name}: done; {left} runs to go", console)
          # All seeds of a system: a machine may be lost before the last one.
          seeds = [run for run in plan if run.system == job.run.system]
          if left and not any(run.commands for run in seeds):
            write_results(plan, stem)
    finally:
      for job in running:
        job.stop()
  write_results(plan, stem)


def _done(workdir: pathlib.Path, plan: Sequence[Planned]) -> bool:
  """Returns whether the run of a folder is trained."""
  return any(run.trained for run in plan if run.workdir == workdir)


def write_results(plan: Sequence[Planned], stem: pathlib.Path) -> None:
  """Writes the tables and pictures of the complete runs."""
  complete = [run for run in plan if not run.commands]
  if not complete:
    return
  comparison = compare.compare([run.workdir for run in complete], "test")
  tables.write_results(comparison, stem)
  seed = plan[0].config.train.seed
  first = [run for run in complete if run.config.train.seed == seed]
  courses = [pictures.read_course(run.workdir) for run in first]
  figure = pictures.training_figure(courses)
  pictures.save(figure, stem.with_name(f"{stem.name}_training"))
  if best := best_run(complete):
    path = best.workdir / "eval" / "test" / "predictions.jsonl"
    lines = predictions.read_predictions(path)
    figure = pictures.confusion_of(lines, str(path))
    pictures.save(figure, stem.with_name(f"{stem.name}_confusion"))


def best_run(plan: Sequence[Planned]) -> Planned | None:
  """Returns the best complete run of EmpDG, on valid by the metric "joint"."""

  def score(run: Planned) -> float:
    path = run.workdir / "eval" / "valid" / "metrics.json"
    return selection_score(storage.read_object(path), "joint", 0)[0]

  ours = [run for run in plan if run.system == registry.PROPOSED]
  return min([run for run in ours if not run.commands], key=score, default=None)
