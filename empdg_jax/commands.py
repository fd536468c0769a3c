"""The sub-commands, a function for each.

`values` has an attribute for every flag that `main.py` defines. Each function
raises InputError for a mistake in what was given. Imports of JAX and TFDS,
which take seconds, are inside the functions, so that `--help` and mistakes in
flags show at once.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import Config, InputError

if TYPE_CHECKING:
  from rich.console import Console


def _config(values: Any) -> Config:
  """Returns the configuration of the flags, validated."""
  file = "give a file such as --config=configs/quickstart.py"
  config = _given(values, "config", file)
  config_lib.validate(config)
  # Before the data are read, which may take minutes.
  from empdg_jax.models import registry

  registry.check_size(config.model, 0)
  _check_batches_fit(config)
  return config


def _check_batches_fit(config: Config) -> None:
  """Checks that the tokens of a batch fit into this machine's memory.

  Raises:
    InputError: They do not.
  """
  tokens = max(map(sum, config.data.shapes)) + config.data.feedback_length
  train, evaluation = config.train, config.eval
  sampled = config.model.max_emotional_words + train.sample_steps
  searched = evaluation.beam_size * evaluation.max_decode_steps
  for name, size, length in (
    ("train", train.batch_size, tokens + sampled),
    ("eval", evaluation.batch_size, tokens + searched),
  ):
    what = f"config.{name}.batch_size={size}: {length:,} tokens an example"
    storage.check_fits(what, size * length)


def _console(**settings: Any) -> "Console":
  """Returns a console; see `rich.console.Console`."""
  from rich.console import Console

  return Console(**settings)


def say_loading() -> None:
  """Prints what to wait for: importing JAX takes seconds, as does compiling."""
  from empdg_jax.training import terminal

  terminal.say("Loading ...", _console(), "dim")


def _given(values: Any, flag: str, advice: str) -> Any:
  """Returns the value of a flag that a command cannot do without."""
  if not (value := getattr(values, flag)):
    raise InputError(f"--{flag} is missing; {advice}")
  return value


def _workdir(values: Any, advice: str = "give the run folder") -> pathlib.Path:
  folder = _given(values, "workdir", advice)
  return storage.run_path(folder, "workdir")


def _start_jax() -> None:
  """Finds the devices, and keeps compiled steps in the user's cache.

  Raises:
    InputError: There is no device of the requested platform.
  """
  import jax

  from empdg_jax.parallel import devices

  devices.set_gpu_flags()
  devices.check_devices()
  if jax.config.values["jax_compilation_cache_dir"] is None:
    folder = storage.cache_dir() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  # By default JAX keeps only what took a second, which most steps of a small
  # model do not.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def prepare(values: Any) -> None:
  r"""Builds and checks the data; prints counts, coverage, cuts and padding.

  Examples:
    empdg prepare --config=configs/quickstart.py
    empdg prepare --config=configs/empdg_wo_d.py \
      --config.data.source=empatheticdialogues.tar.gz
  """
  config = _config(values)
  from empdg_jax.analysis import dataset_report
  from empdg_jax.data import prepare
  from empdg_jax.models import registry
  from empdg_jax.training import train_state

  console = _console()
  dataset = prepare.load_dataset(config.data)
  dataset_report.print_report(dataset, config, console)
  model = registry.create_model(
    config.model, len(dataset.vocabulary), len(dataset.corpus.emotions)
  )
  console.print(
    f"{config.model.name}: {train_state.count_parameters(model):,} parameters"
  )


@contextlib.contextmanager
def _joined_hosts(values: Any, **options: Any) -> Generator[None]:
  """Joins the processes of other hosts, if the flags name any.

  A failure inside ends this process at once; see `hosts.initialize`.
  """
  from empdg_jax.parallel import hosts

  hosts.initialize(
    values.coordinator_address,
    values.num_processes,
    values.process_id,
    **options,
  )
  with hosts.ending_together():
    yield


def train(values: Any) -> None:
  r"""Trains a system; the same command resumes.

  Examples:
    empdg train --config=configs/quickstart.py --workdir=runs/quickstart
    empdg train --config=configs/empdg_wo_d.py --config.train.seed=1 \
      --workdir=runs/empdg_wo_d-1
  """
  config = _config(values)
  workdir = _workdir(values)
  with _joined_hosts(
    values,
    preemptible=True,
    heartbeat_seconds=config.train.heartbeat_seconds,
  ):
    _start_jax()
    from empdg_jax.training import loop

    loop.train(config, workdir)


# The fields that may change after training: none of them changes what the
# parameters mean.
OF_USERS = ("eval.", "data.source", "data.data_dir")


def stored_config(values: Any) -> tuple[pathlib.Path, Config]:
  """Returns the folder of --workdir or --bundle, and its configuration."""
  from empdg_jax.inference import export_files
  from empdg_jax.training import run_folder

  if getattr(values, "bundle", ""):
    folder = storage.run_path(values.bundle, "bundle")
    return folder, export_files.read_config(folder)
  folder = _workdir(values, "give the run folder, or an export as --bundle")
  return folder, run_folder.read_config(folder)


def _system_folder(values: Any) -> pathlib.Path:
  """Returns the folder of --workdir or --bundle.

  Raises:
    InputError: Neither or both are given, or a flag changes a field that is
      fixed by training.
  """
  if values.bundle and values.workdir:
    raise InputError("--workdir and --bundle exclude each other; give one")
  folder, run = stored_config(values)
  ours, theirs = config_lib.flatten(_config(values)), config_lib.flatten(run)
  for name, value in ours.items():
    if value != theirs[name] and not name.startswith(OF_USERS):
      raise InputError(
        f"config.{name}={value!r}: the run has {theirs[name]!r}; only "
        "config.eval, config.data.source and config.data.data_dir can change"
      )
  return folder


def _load_system(values: Any) -> tuple[Any, pathlib.Path]:
  """Loads the system of --workdir or --bundle; also returns its folder."""
  if values.bundle and values.checkpoint:
    raise InputError(
      f"--checkpoint={values.checkpoint}: an export holds a single one"
    )
  _start_jax()
  from empdg_jax.inference.system import load_system
  from empdg_jax.parallel import hosts

  with hosts.refusing_together():
    folder = _system_folder(values)
  system = load_system(folder, values.config, values.checkpoint)
  # Hosts with other flags, or on another checkpoint of a run that still trains,
  # would gather figures of different systems.
  hosts.check_same(lambda: config_lib.to_json(system.config), "configurations")
  hosts.check_same(lambda: str(system.step), "checkpoints")
  return system, folder


def evaluate(values: Any) -> None:
  r"""Scores a split and responds to it; writes predictions and metrics.

  Examples:
    empdg evaluate --workdir=runs/quickstart --split=test
    empdg evaluate --workdir=runs/quickstart --config.eval.beam_size=4 \
      --out=runs/quickstart/eval/beams
    empdg evaluate --bundle=quickstart-export \
      --config.data.source=empatheticdialogues.tar.gz
  """
  with _joined_hosts(values):
    system, folder = _load_system(values)
    from empdg_jax.inference import evaluate, predictions
    from empdg_jax.parallel import hosts
    from empdg_jax.training import terminal

    folder = folder / "eval" / values.split
    if values.out:
      folder = storage.run_path(values.out, "out")
    console = _console(quiet=not hosts.is_main_process())
    metrics = evaluate.evaluate_split(system, values.split, folder, console)
    if hosts.is_main_process():
      predictions.print_metrics(metrics, console)
      predictions.print_samples(
        folder / "predictions.jsonl", values.samples, console
      )
      flag = "bundle" if values.bundle else "workdir"
      source = f"--{flag}={getattr(values, flag)}"
      terminal.say(f"Written to {folder}. Next: empdg chat {source}", console)


def metrics(values: Any) -> None:
  """Recomputes text metrics from a predictions file alone.

  Examples:
    empdg metrics --predictions=runs/quickstart/eval/test/predictions.jsonl
  """
  file = _given(values, "predictions", "give a predictions.jsonl")
  from empdg_jax import metrics
  from empdg_jax.inference import predictions

  path = storage.run_path(file, "predictions")
  lines = predictions.read_predictions(path)
  size = values.vocab_size or predictions.vocab_size_of(path, lines)
  if size < 2:
    raise InputError(f"--vocab_size={size}: expected at least 2")
  print(json.dumps(metrics.text_metrics(lines, size), indent=2))


def generate(values: Any) -> None:
  """Responds to contexts: one JSON object a line in, one out.

  Examples:
    echo '{"context": ["I lost my job today."]}' |
      empdg generate --workdir=runs/quickstart
  """
  source = values.input
  # Lines are bounded: whatever is piped in may have no line ends.
  lines: Iterable[str] = iter(lambda: sys.stdin.readline(2**20), "")
  if source != "-":
    with storage.errors(f"--input={source}: cannot read", InputError):
      lines = storage.read_text(storage.disk_path(source, "--input"))
      lines = lines.splitlines()
  system, _ = _load_system(values)
  from empdg_jax.inference import respond

  failed = total = 0
  batch_size = system.config.eval.batch_size
  responder = respond.Responder(system)
  for response in respond.generate(responder, lines, batch_size):
    print(config_lib.printable_json(response), flush=True)
    total += 1
    failed += "error" in response
  if failed:
    raise InputError(
      f"{failed} of {total} lines of {source!r} have no response; the 'error' "
      "field of each says why"
    )


def chat(values: Any) -> None:
  """Talks with the user and shows the emotion that it predicts.

  Examples:
    empdg chat --workdir=runs/quickstart
    empdg chat --bundle=quickstart-export
  """
  system, _ = _load_system(values)
  from empdg_jax.inference import respond

  respond.chat(respond.Responder(system), _console(), sys.stdin)


def demo(values: Any) -> None:
  """Opens a page in the browser to talk with one system or to compare three.

  Examples:
    empdg demo --workdir=runs/quickstart
    empdg demo --workdir=runs/moel --workdir=runs/empdg --bundle=empdg-export
  """
  given = [("workdir", name) for name in values.workdir]
  given += [("bundle", name) for name in values.bundle]
  if not 0 < len(given) <= 3:
    found = "; give a run folder, or an export as --bundle"
    if given:
      found = f" {len(given)} times, with --bundle; up to 3 fit side by side"
    raise InputError(
      "--workdir is " + ("given" if given else "missing") + found
    )
  from empdg_jax.web import demo_server

  demo_server.require_extra()
  listening = demo_server.open_socket(values.host, values.port)
  with contextlib.closing(listening):
    loopback = demo_server.is_loopback(values.host)
    app = _load_demo(given, loopback)
    from empdg_jax.training import terminal

    terminal.say(f"Open {demo_server.url(listening)} (Ctrl-C ends it)")
    if not loopback:
      terminal.say(
        f"Warning: --host={values.host} lets everyone who reaches this machine "
        "use the page, without a password or encryption"
      )
    demo_server.serve(app, listening)


def _load_demo(given: list[tuple[str, str]], loopback: bool) -> Any:
  """Loads and compiles systems; returns the page that shows them."""
  from empdg_jax.training import terminal

  console = _console()
  say_loading()
  _start_jax()
  from empdg_jax.inference import export_files, respond
  from empdg_jax.inference.system import load_system
  from empdg_jax.web import demo, demo_server
  from empdg_jax.web.demo_replies import DECODINGS, Replies

  responders = []
  for flag, name in given:
    folder = storage.run_path(name, flag)
    if flag == "bundle":
      export_files.require_export(folder)
    responders.append(respond.Responder(load_system(folder)))
  names = [f"--{flag}={name}" for flag, name in given]
  demo.check_systems(responders, names)
  replies = Replies(responders)
  for index, name in enumerate(names):
    for decoding in DECODINGS:
      terminal.say(f"Compiling {decoding} of {name} ...", console, "dim")
      replies.warm_up(index, decoding)
  titles = demo.titles(responders, [name for _, name in given])
  return demo_server.make_app(demo.Demo(replies, titles), loopback=loopback)


def export(values: Any) -> None:
  """Writes a checkpoint as one folder that needs neither run nor data.

  Examples:
    empdg export --workdir=runs/quickstart --out=quickstart-export
    empdg export --workdir=gs://BUCKET/pod --out=pod-export --average=3
  """
  workdir = _workdir(values)
  out = _given(values, "out", "give the folder to write")
  if "://" in out:
    raise InputError(
      f"--out={out}: expected a folder on a disk; copy it to a bucket"
    )
  if values.average and values.checkpoint:
    raise InputError("--checkpoint and --average exclude each other; give one")
  _start_jax()
  from empdg_jax.inference import export

  export.export(
    workdir,
    pathlib.Path(out),
    values.checkpoint,
    values.average,
    values.dtype,
    _console(markup=False),
  )


def checkpoints(values: Any) -> None:
  """Lists a run's checkpoints: phase, size and metrics.

  Examples:
    empdg checkpoints --workdir=runs/quickstart
  """
  workdir = _workdir(values)
  _start_jax()
  from empdg_jax.analysis import checkpoint_list

  listed = checkpoint_list.list_checkpoints(workdir)
  checkpoint_list.print_checkpoints(listed, values.format, _console())


def compare(values: Any) -> None:
  """Prints the paper's Tables 1 and 2 of evaluated run folders, with tests.

  Examples:
    empdg compare runs/transformer runs/moel runs/empdg --cases=2
    empdg compare runs/* --split=valid --format=markdown
    empdg compare runs/moel runs/empdg --study=study
    empdg compare runs/* --results=results/paper
  """
  if not values.dir:
    raise InputError(
      "no run folder is given; write empdg compare runs/empdg runs/moel"
    )
  from empdg_jax.analysis import compare, tables

  folders = [storage.run_path(folder, "dir") for folder in values.dir]
  comparison = compare.compare(folders, values.split, values.cases)
  if values.study:
    from empdg_jax.web import study_report

    human = study_report.report(_study(values))
    comparison = study_report.beside(comparison, human)
  tables.print_comparison(comparison, values.format, _console())
  if values.results:
    stem = storage.disk_path(values.results, "--results")
    tables.write_results(comparison, stem)


# Where the inputs of the paper's tables come from.
_ORIGINS = {
  "data": "the dataset's archive empatheticdialogues.tar.gz, from "
  "https://github.com/facebookresearch/EmpatheticDialogues; or official, which "
  "downloads it",
  "lexicon": "the NRC emotion lexicon, from "
  "https://saifmohammad.com/WebPages/NRC-Emotion-Lexicon.htm, or nrclex for "
  "the copy in the package of that name",
  "vectors": "GloVe's vectors glove.6B.300d.txt, from "
  "https://nlp.stanford.edu/projects/glove",
}


def _inputs(values: Any) -> dict[str, str]:
  """Returns the fields of the data that `reproduce` is given.

  Raises:
    InputError: One is missing, or there is no such file.
  """
  fields = {"data.example_set": values.example_set}
  if values.data == "sample":
    # The embedded corpus needs nothing else.
    fields |= {"data.source": "sample", "data.lexicon": values.lexicon}
    return {name: value for name, value in fields.items() if value}
  for flag in ("data", "lexicon", "vectors"):
    given = _given(values, flag, f"give {_ORIGINS[flag]}")
    for name in [given] if isinstance(given, str) else given:
      # A path in a bucket, or on a disk.
      known = name in ("official", "nrclex") or "://" in name
      if not known and not pathlib.Path(name).exists():
        raise InputError(
          f"--{flag}={name}: no such file; give {_ORIGINS[flag]}"
        )
  fields |= {"data.source": values.data, "data.lexicon": values.lexicon}
  return fields


def _numbers(text: str, flag: str) -> list[int]:
  """Returns the whole numbers of a flag such as --seeds=0,1,2."""
  numbers = [config_lib.parse(part, int) for part in text.split(",")]
  for number in numbers:
    if config_lib.expected(number, int) or int(number) < 0:
      raise InputError(f"--{flag}={text}: expected numbers such as 0,1,2")
  return list(dict.fromkeys(numbers))


def reproduce(values: Any) -> None:
  r"""Reproduces the paper's Tables 1 and 2: trains, evaluates, compares.

  The same command goes on where it was stopped, and does nothing twice.

  Examples:
    empdg reproduce --data=empatheticdialogues.tar.gz \
      --lexicon=nrc_words.txt --vectors=glove.6B.300d.txt --workdir=paper
    empdg reproduce --data=sample --workdir=tiny --systems=empdg --seeds=0 \
      --print_commands
  """
  fields = _inputs(values)
  workdir = _workdir(values, "give the folder for runs and results")
  if storage.in_bucket(workdir):
    raise InputError(f"--workdir={workdir}: expected a folder on a disk")
  if values.jobs < 1:
    raise InputError(f"--jobs={values.jobs}: expected at least 1")
  from empdg_jax.analysis import reproduce

  # Of the settings, and of the results.
  name = "paper" if values.example_set == "empdg" else values.example_set
  if values.vectors:
    from empdg_jax.data import vectors

    fields["data.vectors"] = values.vectors[0]
    if len(values.vectors) > 1:
      joined = workdir / "vectors.txt.gz"
      if not joined.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        vectors.join_vectors(values.vectors, joined)
      fields["data.vectors"] = str(joined)
  plan = reproduce.make_plan(
    values.systems.split(",")
    if values.systems
    else reproduce.default_systems(),
    _numbers(values.seeds, "seeds"),
    values.config or name,
    fields,
    workdir / "runs",
  )
  if values.print_commands:
    for line in reproduce.shell_commands(plan):
      print(line)
    return
  results = workdir / "results"
  if values.results:
    results = storage.disk_path(values.results, "--results")
  _reproduce(plan, workdir, results / name, values.jobs)


def _reproduce(
  plan: list[Any], workdir: pathlib.Path, stem: pathlib.Path, jobs: int
) -> None:
  """Prints a plan with its time, executes it, and exports the best EmpDG."""
  from empdg_jax.analysis import reproduce
  from empdg_jax.training import terminal

  console = _console()
  reproduce.print_plan(plan, console)
  if playing := reproduce.to_time(plan):
    _start_jax()
    from empdg_jax.data import prepare
    from empdg_jax.hardware import benchmark

    dataset = prepare.load_dataset(playing.data)
    seconds = benchmark.step_seconds(dataset, playing, console)
    hours = reproduce.hours_left(plan, seconds)
    terminal.say(
      f"About {hours:.1f} hours of training at {seconds['mle'] * 1e3:.0f} ms a "
      "step of maximum likelihood, evaluation aside; Ctrl-C stops it, and the "
      "same command goes on",
      console,
    )
  reproduce.execute(plan, stem, jobs, console)
  best, out = reproduce.best_run(plan), workdir / "export"
  if best and not out.exists():
    _start_jax()
    from empdg_jax.inference import export

    export.export(best.workdir, out, None, 0, "float32", console)
  terminal.say(f"Results in {stem}.md and {stem}.json", console)


def _study(values: Any) -> pathlib.Path:
  """Returns the folder of --study."""
  advice = "give the folder that 'empdg study create' wrote"
  return storage.disk_path(_given(values, "study", advice), "--study")


def study_create(values: Any) -> None:
  r"""Writes a human evaluation of two or more systems as a folder.

  Annotators rate every system's responses and compare the first system's with
  each other one's, without seeing which is whose. A system is an evaluated run
  or export, or a NAME.jsonl with id, context and response in each line
  (reference and emotion if known).

  Examples:
    empdg study create runs/empdg runs/moel runs/transformer --out=study
    empdg study create runs/empdg theirs.jsonl --out=study --dialogues=50 \
      --annotators=5 --controls=0.2 --seed=1
  """
  if not values.dir:
    raise InputError(
      "no system is given; write empdg study create runs/empdg runs/moel"
    )
  out = storage.disk_path(
    _given(values, "out", "give the folder to write"), "--out"
  )
  from empdg_jax.training import terminal
  from empdg_jax.web import study, study_answers, study_sources

  folders = [storage.run_path(folder, "dir") for folder in values.dir]
  sources = study_sources.read(folders, values.split)
  plan = study.Plan(
    values.dialogues,
    values.annotators,
    values.controls,
    values.seed,
    values.split,
  )
  content = study.build(sources, plan)
  study_answers.write(content, out)
  for part, orders in content.orders.items():
    terminal.say(
      f"{part}: {len(orders[0])} items for each of {len(orders)} annotators"
    )
  terminal.say(f"Written to {out}. Next: empdg study serve --study={out}")


def study_serve(values: Any) -> None:
  """Serves a study with Potato; prints links and progress.

  Examples:
    empdg study serve --study=study
    empdg study serve --study=study --part=pairwise --port=8001
  """
  folder = _study(values)
  from empdg_jax.training import terminal
  from empdg_jax.web import study, study_potato

  content = study.read(folder)
  if values.host not in ("127.0.0.1", "localhost", "::1"):
    terminal.say(
      f"Warning: --host={values.host} lets everyone who reaches this machine "
      "answer, without encryption; put a proxy with HTTPS before it."
    )
  study_potato.serve(
    content, folder, values.part, values.host, values.port, terminal.say
  )


def study_import(values: Any) -> None:
  """Reads answers back, under random tokens, into the study's answers.jsonl.

  Potato's answers, which are in the folder, replace those of an earlier import;
  those of other platforms are added.

  Examples:
    empdg study import --study=study
    empdg study import --study=study --platform=mturk --file=Batch_results.csv
  """
  folder = _study(values)
  from empdg_jax.training import terminal
  from empdg_jax.web import study, study_answers

  content = study.read(folder)
  file = storage.disk_path(values.file, "--file") if values.file else None
  found = study_answers.read_platform(folder, values.platform, file)
  added, partial = study_answers.add(content, folder, found, values.platform)
  left = f"; {partial} incomplete ones left out" if partial else ""
  terminal.say(
    f"{added} answers in {folder / study_answers.ANSWERS}{left}. "
    f"Next: empdg study report --study={folder}"
  )


def study_report(values: Any) -> None:
  """Prints ratings, comparisons, agreement and annotators of a study.

  Examples:
    empdg study report --study=study
    empdg study report --study=study --format=latex
  """
  folder = _study(values)
  from empdg_jax.web import study_report, study_tables

  found = study_report.report(folder)
  study_tables.print_report(found, values.format, _console())


def attention(values: Any) -> None:
  """Draws what each word of a response attends to, and the predicted emotion.

  Examples:
    empdg attention --workdir=runs/quickstart --context="I lost my job."
  """
  advice = 'write what the user says, as in --context="I lost my job."'
  context = _given(values, "context", advice)
  system, folder = _load_system(values)
  from empdg_jax.analysis import attention
  from empdg_jax.inference import respond
  from empdg_jax.training import terminal

  drawn = attention.attend(respond.Responder(system), context)
  stem = folder / "attention"
  if values.image:
    stem = storage.disk_path(values.image, "--image")
  for path in attention.draw(drawn, stem):
    terminal.say(f"Drawn in {path}")


def plot(values: Any) -> None:
  r"""Draws perplexity against Distinct-2 through training, or confusions.

  Examples:
    empdg plot runs/empdg runs/control --image=training
    empdg plot --predictions=runs/empdg/eval/test/predictions.jsonl \
      --image=confusion
  """
  image = _given(values, "image", "give the file to draw, without its ending")
  if bool(values.dir) == bool(values.predictions):
    raise InputError(
      "give either run folders, for their training, or --predictions, for the "
      "confusion of emotions"
    )
  from empdg_jax.analysis import pictures
  from empdg_jax.inference import predictions
  from empdg_jax.training import terminal

  if values.predictions:
    path = storage.run_path(values.predictions, "predictions")
    lines = predictions.read_predictions(path)
    figure = pictures.confusion_of(lines, str(path))
  else:
    folders = [storage.run_path(folder, "dir") for folder in values.dir]
    courses = [pictures.read_course(folder) for folder in folders]
    figure = pictures.training_figure(courses)
  for path in pictures.save(figure, storage.disk_path(image, "--image")):
    terminal.say(f"Drawn in {path}")


def compile_check(values: Any) -> None:
  r"""Compiles every step for a TPU slice, without one; memory and traffic.

  Examples:
    empdg compile-check --config=configs/pod.py:8 --topology=v5e:2x4
    empdg compile-check --config=configs/empdg.py --topology=v5e:4x4 \
      --find_batch
  """
  config = _config(values)
  topology = _given(values, "topology", "give a slice such as v5e:4x4")
  import jax

  # The compiler needs no device, and looking for a TPU takes JAX a while.
  jax.config.update("jax_platforms", "cpu")
  from empdg_jax.data import corpora, prepare
  from empdg_jax.hardware import compile_check, compile_report
  from empdg_jax.training import session

  slice_ = compile_check.describe_topology(topology)
  if not values.find_batch:
    session.check_without_data(config, len(slice_.devices))
  # Off, since JAX warns that its cache cannot hold programs without a device.
  jax.config.update("jax_enable_compilation_cache", False)
  size = values.vocab_size
  if size is None:
    dataset = prepare.load_dataset(config.data)
    size, epoch = len(dataset.vocabulary), len(dataset.examples["train"])
  else:
    published = dict(corpora.find_corpus(config.data).train_examples)
    epoch = published.get(config.data.example_set)
  console = _console()
  arguments = config, size, slice_, _console(stderr=True)
  if values.find_batch:
    fit = compile_check.find_batch(*arguments)
    compile_report.print_fit(fit, slice_, values.format, console)
    return
  reports, too_large = compile_check.check(*arguments)
  compile_report.print_reports(
    reports, too_large, slice_, epoch, values.format, console
  )
  if too_large:
    raise InputError(
      f"--topology={slice_.name}: {', '.join(too_large)}: more than the "
      "memory of a chip; --find_batch finds the largest batch that fits"
    )


def benchmark(values: Any) -> None:
  """Times training steps and decoding on this machine; writes JSON.

  Examples:
    empdg benchmark --config=configs/empdg_wo_d.py --output=benchmark.json
  """
  config = _config(values)
  path = storage.disk_path(values.output or "benchmark.json", "--output")
  _start_jax()
  from empdg_jax.data import prepare
  from empdg_jax.hardware import benchmark
  from empdg_jax.training import terminal

  console = _console()
  dataset = prepare.load_dataset(config.data)
  results = benchmark.benchmark(dataset, config, console)
  benchmark.print_benchmark(results, console)
  benchmark.write_benchmark(results, path)
  terminal.say(f"Written to {path}", console)
