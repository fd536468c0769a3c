"""The writing of an export, and its use in Python."""

import contextlib
import dataclasses
import fcntl
import functools
import glob
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export
from rich.console import Console

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import Config, EvalConfig, InputError
from empdg_jax.data import corpora, pipeline, prepare
from empdg_jax.data import lexicon as lexicon_lib
from empdg_jax.data.corpora import SPLITS
from empdg_jax.data.pipeline import Batch
from empdg_jax.inference import evaluate, export_files, model_card
from empdg_jax.inference.respond import Responder
from empdg_jax.inference.system import create_model, load_system, params_like
from empdg_jax.models.encoder_decoder import EncoderDecoder
from empdg_jax.training import checkpoint, run_folder, steps, terminal
from empdg_jax.training.checkpoint import Checkpoints
from empdg_jax.training.run_folder import Run

_PLATFORMS = ("cpu", "cuda", "tpu")


def load(folder: str | os.PathLike[str]) -> Responder:
  """Loads an export.

  Args:
    folder: A folder written by `empdg export`.

  Returns:
    The responder: `load("my-export").respond(["i lost my job today"])` returns
    a response with `text`, `emotion` and `emotions`.

  Raises:
    InputError: A file is missing, damaged or of a newer format.
  """
  path = storage.run_path(os.fspath(folder), "bundle")
  export_files.require_export(path)
  return Responder(load_system(path))


def respond_step(
  params: dict[str, jax.Array],
  context: jax.Array,
  state: jax.Array,
  emotion_context: jax.Array,
  *,
  model: EncoderDecoder,
  config: EvalConfig,
) -> dict[str, jax.Array]:
  """Generates responses; this is the function in `respond.jax`.

  Args:
    params: The parameters, by their names in `params.safetensors`.
    context: Ids, `[batch, context_length]` int32.
    state: Dialogue-state ids, `[batch, context_length]` int32.
    emotion_context: Ids, `[batch, emotional_length]` int32.
    model: The generator.
    config: The limits of decoding.

  Returns:
    `tokens` and `copied_from`, `[batch, max_decode_steps]` int32, and, if the
    system perceives emotions, `emotion_probs` `[batch, emotions]`; see
    `steps.Prediction`.
  """
  # As the package: it computes in float32 whatever the export's type.
  params = {name: array.astype(jnp.float32) for name, array in params.items()}
  prediction = steps.predict_step(
    export_files.nested(params),
    # Prediction reads the contexts alone.
    Batch._make([context, state, emotion_context, *[None] * 6]),
    model=model,
    config=config,
  )
  return {n: x for n, x in prediction._asdict().items() if x is not None}


def lower_respond_step(run: Run, params: dict[str, np.ndarray]) -> bytes:
  """Lowers `respond_step` for all platforms and any batch size.

  Args:
    run: The run; contexts have its longest lengths.
    params: The parameters by name, of which only shapes and types matter.

  Returns:
    The content of `respond.jax`.
  """
  longest = pipeline.padded_shapes(run.config.data)[-1]
  # A symbol: one file then serves every batch size, and each is specialised
  # when it is first called.
  (batch,) = jax_export.symbolic_shape("batch")
  context = jax.ShapeDtypeStruct((batch, longest.context), jnp.int32)
  emotional = jax.ShapeDtypeStruct((batch, longest.emotion), jnp.int32)
  step = functools.partial(
    respond_step,
    model=create_model(run),
    # Always greedy: beam search and sampling stay with the package.
    config=dataclasses.replace(run.config.eval, beam_size=1, temperature=0.0),
  )
  shapes = jax.eval_shape(lambda arrays: arrays, params)
  exported = jax_export.export(jax.jit(step), platforms=_PLATFORMS)(
    shapes, context, context, emotional
  )
  return bytes(exported.serialize())


def export(
  workdir: pathlib.Path,
  out: pathlib.Path,
  which: str | None,
  average: int,
  dtype: str,
  console: Console,
) -> None:
  """Writes a run's checkpoint as one folder that needs nothing else.

  Args:
    workdir: The run folder.
    out: The folder to write; it must not exist.
    which: The checkpoint; see `Checkpoints.select`.
    average: If not 0, the number of latest checkpoints to average.
    dtype: The type of the parameters, `float32` or `bfloat16`.
    console: The terminal.

  Raises:
    InputError: There is no such run or checkpoint, or the folder exists or
      cannot be written.
  """
  if out.exists():
    raise InputError(f"--out={out} exists; give another folder, or delete it")
  with storage.errors(f"--out={out}: cannot write", InputError):
    out.parent.mkdir(parents=True, exist_ok=True)
  run = run_folder.open_run(workdir)
  export_files.check_config(run.config, f"--workdir={workdir}")
  params, taken = _read_params(run, which, average)
  params = {name: a.astype(jnp.dtype(dtype)) for name, a in params.items()}
  # An evaluation goes along only if it is of the very parameters in the export.
  metrics = {}
  if not average and dtype == "float32":
    metrics = _metrics_of(workdir, evaluate.origin(run.config, taken[0]))
  about = _about(run.config, taken, average, dtype)
  console.print(
    "Lowering the response step for " + ", ".join(_PLATFORMS), style="dim"
  )
  files = _gather_files(run, about, params, metrics)
  _write(out, files)
  if not metrics:
    terminal.say(
      "No evaluation of these parameters goes with it; to make one of the "
      f"export: empdg evaluate --bundle={out}",
      console,
    )
  size = sum(map(len, files.values())) / 2**20
  terminal.say(
    f"Exported {model_card.checkpoint_text(about)} to {out}: {len(files)} "
    f"files, {size:.1f} MiB. Next: empdg chat --bundle={out}",
    console,
  )


def _about(
  config: Config, taken: list[int], average: int, dtype: str
) -> dict[str, Any]:
  """Returns the content of `export.json`."""
  return {
    "format_version": export_files.FORMAT_VERSION,
    **export_files.repeated(config),
    "step": None if average else taken[0],
    "averaged_steps": taken if average else [],
    "dtype": dtype,
    "platforms": list(_PLATFORMS),
    "empdg_jax": importlib.metadata.version("empdg-jax"),
    "jax": jax.__version__,
  }


def _gather_files(
  run: Run,
  about: dict[str, Any],
  params: dict[str, np.ndarray],
  metrics: dict[str, Any],
) -> dict[str, bytes]:
  """Returns the content of every file of an export by its name.

  Args:
    run: The run.
    about: The content of `export.json`.
    params: The parameters by name, in the export's type.
    metrics: The metrics of these parameters by split; empty if there are none.
  """
  lexicon = lexicon_lib.load_lexicon(run.config.data.lexicon)
  rules = config_lib.text_rules(run.config.data)
  emotional = prepare.emotional_table(run.vocabulary, lexicon, rules)
  hashes = lexicon_lib.hashes_of(lexicon)
  version = {"format_version": str(export_files.FORMAT_VERSION)}
  card = model_card.write_card(run, lexicon, about, params, metrics)
  files = {
    export_files.ABOUT: _json_bytes(about),
    export_files.CONFIG: config_lib.to_json(run.config).encode(),
    export_files.VOCABULARY: run.vocabulary.to_text().encode(),
    export_files.EMOTION_NAMES: corpora.to_text(run.emotions).encode(),
    export_files.EMOTIONAL: export_files.bytes_of(emotional),
    export_files.LEXICON_HASHES: export_files.bytes_of(hashes),
    export_files.PARAMS: safetensors.numpy.save(params, metadata=version),
    export_files.RESPOND: lower_respond_step(run, params),
    export_files.CARD: card.encode(),
  }
  if metrics:
    files[export_files.METRICS] = _json_bytes(metrics)
  # Last, since it lists the sums of all the others.
  files[export_files.SUMS] = export_files.sums_text(files).encode()
  return files


def _json_bytes(values: Any) -> bytes:
  return (json.dumps(values, indent=2) + "\n").encode()


def _read_params(
  run: Run, which: str | None, average: int
) -> tuple[dict[str, np.ndarray], list[int]]:
  """Returns the parameters by name, and the steps of their checkpoints."""
  checkpoints = Checkpoints(run.workdir)
  if average:
    wanted = [[one] for one in _latest_of_one_phase(checkpoints, average)]
  else:
    wanted = [checkpoints.select(which)]
  like = params_like(run)
  params: Any = None
  taken = []
  # One checkpoint at a time in memory. Summed in float64, whose rounding
  # vanishes in float32; for a single checkpoint both conversions are exact.
  for chosen in wanted:
    one, read = checkpoints.first_whole(
      chosen, lambda one: checkpoints.restore_params(one.kind, like, one.step)
    )
    taken.append(one)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), read)
    params = wide if params is None else jax.tree.map(np.add, params, wide)
  checkpoints.close()
  params = jax.tree.map(lambda x: (x / len(taken)).astype(np.float32), params)
  return export_files.named(params), sorted(one.step for one in taken)


def _latest_of_one_phase(
  checkpoints: Checkpoints, count: int
) -> list[checkpoint.Selected]:
  """Returns the latest checkpoints, which must be of one phase."""
  latest = [c for c in checkpoints.all() if c.kind == checkpoint.LATEST]
  if count > len(latest):
    raise InputError(
      f"--average={count}: the run keeps {len(latest)} of its latest "
      "checkpoints; config.train.keep_checkpoints says how many"
    )
  # A mean over the border of two phases would mix two objectives.
  phases = {
    checkpoints.restore_progress(one.kind, one.step)["phase"]
    for one in latest[:count]
  }
  if len(phases) > 1:
    raise InputError(
      f"--average={count}: the latest checkpoints are of several phases, "
      + ", ".join(sorted(phases))
      + "; 'empdg checkpoints' lists them"
    )
  return latest[:count]


def _metrics_of(
  workdir: pathlib.Path, origin: dict[str, Any]
) -> dict[str, Any]:
  """Returns the metrics that have this origin, by split."""
  found = {}
  for split in SPLITS:
    path = workdir / "eval" / split / "metrics.json"
    if path.exists():
      try:
        values = json.loads(storage.read_text(path))
        # Only of sampled responses do metrics name a temperature.
        sampled = "temperature" in values
        if origin.items() <= values.items() and (
          sampled == ("temperature" in origin)
        ):
          found[split] = values
      except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(
          f"{path}: damaged ({error}); run empdg evaluate again"
        ) from error
  return found


def _write(out: pathlib.Path, files: dict[str, bytes]) -> None:
  """Writes a folder under a temporary name, then renames it."""
  for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
    if left.suffix[1:].isdecimal() and left.is_dir():
      with contextlib.suppress(OSError), _try_lock(left) as locked:
        if locked:
          shutil.rmtree(left)
  temporary = out.with_name(f".{out.name}.{os.getpid()}")
  with storage.errors(f"--out={out}: cannot write", InputError):
    temporary.mkdir()
    try:
      with _try_lock(temporary):
        for name, data in files.items():
          path = temporary / name
          path.parent.mkdir(exist_ok=True)
          path.write_bytes(data)
        _check_loads(temporary, out)
        temporary.rename(out)
    finally:
      shutil.rmtree(temporary, ignore_errors=True)


def _check_loads(temporary: pathlib.Path, out: pathlib.Path) -> None:
  """Raises InputError if an export that is about to be named cannot load."""
  try:
    export_files.read_export(temporary)
  except InputError as error:
    reason = str(error).removeprefix(f"--bundle={temporary}: ")
    raise InputError(
      f"--out={out}: not written, as it could not be loaded: "
      + reason.removesuffix("; export again")
    ) from error


@contextlib.contextmanager
def _try_lock(folder: pathlib.Path) -> Generator[bool]:
  """Locks a folder if nobody has; yields whether it did."""
  # The process number in the name would not do: it may be of another container
  # or host, or of a new process by now. A killed process's lock is gone.
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    locked = True
  except OSError:  # It is in use, or the disk knows no such locks.
    locked = False
  try:
    yield locked
  finally:
    os.close(descriptor)
