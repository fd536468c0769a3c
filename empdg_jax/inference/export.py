"""Writing an export, and loading one in Python."""

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import shutil
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
from empdg_jax.inference.system import load_system, params_like
from empdg_jax.models import registry
from empdg_jax.models.encoder_decoder import EncoderDecoder
from empdg_jax.training import checkpoint, run_folder, steps
from empdg_jax.training.checkpoint import Checkpoints
from empdg_jax.training.run_folder import Run

DTYPES = ("float32", "bfloat16")
_PLATFORMS = ("cpu", "cuda", "tpu")


def load(folder: str | os.PathLike[str]) -> Responder:
  """Loads an export.

  Args:
    folder: What `empdg export` wrote.

  Returns:
    Who replies: `load("my-export").respond(["i lost my job today"])` has
    `text`, `emotion` and `emotions`.

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
  """Is the function that `respond.jax` holds.

  Args:
    params: By the names of `params.safetensors`.
    context: Ids, `[batch, context_length]` int32.
    state: Dialogue-state ids, `[batch, context_length]` int32.
    emotion_context: Ids, `[batch, emotional_length]` int32.
    model: The system.
    config: The limits of decoding.

  Returns:
    `tokens` and `copied_from`, `[batch, max_decode_steps]` int32, and, if the
    system perceives emotions, `emotion_probs` `[batch, emotions]`; see
    `steps.Prediction`.
  """
  params = {name: array.astype(jnp.float32) for name, array in params.items()}
  prediction = steps.predict_step(
    export_files.nested(params),
    Batch(
      context=context,
      state=state,
      emotion_context=emotion_context,
      target=None,
      feedback=None,
      emotion=None,
      mask=None,
      position=None,
      index=None,
    ),
    model=model,
    config=config,
  )
  return {n: x for n, x in prediction._asdict().items() if x is not None}


def lower_respond_step(
  config: Config,
  vocab_size: int,
  num_emotions: int,
  params: dict[str, np.ndarray],
) -> bytes:
  """Lowers `respond_step` for all platforms and any batch size.

  Args:
    config: Of the run; contexts have its longest lengths.
    vocab_size: V.
    num_emotions: How many emotions the run's dataset labels.
    params: The parameters, of which only shapes and types matter.

  Returns:
    The content of `respond.jax`.
  """
  longest = pipeline.padded_shapes(config.data)[-1]
  (batch,) = jax_export.symbolic_shape("batch")
  context = jax.ShapeDtypeStruct((batch, longest.context), jnp.int32)
  emotional = jax.ShapeDtypeStruct((batch, longest.emotion), jnp.int32)
  step = functools.partial(
    respond_step,
    model=registry.create_model(config.model, vocab_size, num_emotions),
    config=dataclasses.replace(config.eval, beam_size=1),
  )
  shapes = {
    name: jax.ShapeDtypeStruct(array.shape, array.dtype)
    for name, array in params.items()
  }
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
    average: If not 0, take the mean of so many of the latest checkpoints.
    dtype: Of the parameters, one of `DTYPES`.
    console: Says what is done.

  Raises:
    InputError: There is no such run or checkpoint, or the folder exists or
      cannot be written.
  """
  if out.exists():
    raise InputError(f"--out={out} exists; give another folder, or delete it")
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"--out={out}: cannot write ({error})") from error
  run = run_folder.open_run(workdir)
  lexicon = lexicon_lib.load_lexicon(run.config.data.lexicon)
  checkpoints = Checkpoints(workdir)
  if average:
    params, taken = _average(checkpoints, run, average)
  else:
    selected = checkpoints.select(which)
    taken = [selected.step]
    params = checkpoints.restore_params(
      selected.kind, params_like(run), selected.step
    )
  checkpoints.close()
  named = {
    name: array.astype(jnp.dtype(dtype))
    for name, array in export_files.named(params).items()
  }
  # Those of the very parameters that are written, or none.
  metrics = {}
  if not average and dtype == "float32":
    metrics = _metrics_of(workdir, evaluate.origin(run.config, taken[0]))
  longest = pipeline.padded_shapes(run.config.data)[-1]
  about = {
    "format_version": export_files.FORMAT_VERSION,
    "system": run.config.model.name,
    "step": None if average else taken[0],
    "averaged_steps": taken if average else [],
    "dtype": dtype,
    "context_length": longest.context,
    "emotional_length": longest.emotion,
    "max_decode_steps": run.config.eval.max_decode_steps,
    "platforms": list(_PLATFORMS),
    "empdg_jax": importlib.metadata.version("empdg-jax"),
    "jax": jax.__version__,
  }
  console.print("Lowering the reply for " + ", ".join(_PLATFORMS), style="dim")
  files = {
    export_files.ABOUT: (json.dumps(about, indent=2) + "\n").encode(),
    export_files.CONFIG: config_lib.to_json(run.config).encode(),
    export_files.VOCABULARY: run.vocabulary.to_text().encode(),
    export_files.EMOTION_NAMES: corpora.to_text(run.emotions).encode(),
    export_files.EMOTIONAL: export_files.bytes_of(
      prepare.emotional_table(run.vocabulary, lexicon)
    ),
    export_files.LEXICON_HASHES: export_files.bytes_of(
      lexicon_lib.hashes_of(lexicon)
    ),
    export_files.PARAMS: safetensors.numpy.save(
      named, metadata={"format_version": str(export_files.FORMAT_VERSION)}
    ),
    export_files.RESPOND: lower_respond_step(
      run.config, len(run.vocabulary), len(run.emotions), named
    ),
    export_files.CARD: model_card.write_card(
      run, lexicon, about, named, metrics
    ).encode(),
  }
  if metrics:
    files[export_files.METRICS] = (
      json.dumps(metrics, indent=2) + "\n"
    ).encode()
  else:
    console.print(
      "No evaluation of these parameters goes with it; to make one of the "
      f"export: empdg evaluate --bundle={out}",
      soft_wrap=True,
      highlight=False,
    )
  files[export_files.SUMS] = export_files.sums_text(files).encode()
  _write(out, files)
  size = sum(map(len, files.values())) / 2**20
  console.print(
    f"Exported {model_card.checkpoint_text(about)} to {out}: {len(files)} "
    f"files, {size:.1f} MiB. Next: empdg chat --bundle={out}",
    soft_wrap=True, highlight=False,
  )  # fmt: skip


def _average(
  checkpoints: Checkpoints, run: Run, count: int
) -> tuple[Any, list[int]]:
  """Returns the mean of the latest checkpoints' parameters, and their steps."""
  latest = [c for c in checkpoints.all() if c.kind == checkpoint.LATEST]
  if count > len(latest):
    raise InputError(
      f"--average={count}: the run keeps {len(latest)} of its latest "
      "checkpoints; config.train.keep_checkpoints says how many"
    )
  taken = latest[:count]
  phases = {
    checkpoints.restore_progress(one.kind, one.step)["phase"] for one in taken
  }
  if len(phases) > 1:
    raise InputError(
      f"--average={count}: the latest checkpoints are of several phases, "
      + ", ".join(sorted(phases))
      + "; 'empdg checkpoints' lists them"
    )
  like = params_like(run)
  total = None
  for one in taken:  # One at a time in memory, summed in float64.
    params = checkpoints.restore_params(one.kind, like, one.step)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    total = wide if total is None else jax.tree.map(np.add, total, wide)
  mean = jax.tree.map(lambda x: (x / count).astype(np.float32), total)
  return mean, sorted(one.step for one in taken)


def _metrics_of(
  workdir: pathlib.Path, origin: dict[str, Any]
) -> dict[str, Any]:
  """Returns each split's metrics that have this origin, where present."""
  found = {}
  for split in SPLITS:
    path = workdir / "eval" / split / "metrics.json"
    if path.exists():
      try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if origin.items() <= values.items():
          found[split] = values
      except (ValueError, AttributeError) as error:
        raise InputError(
          f"{path}: damaged ({error}); run empdg evaluate again"
        ) from error
  return found


def _write(out: pathlib.Path, files: dict[str, bytes]) -> None:
  """Writes a folder under a temporary name, then renames it."""
  temporary = out.with_name(f".{out.name}.{os.getpid()}")
  shutil.rmtree(temporary, ignore_errors=True)  # A killed process's.
  try:
    for name, data in files.items():
      path = temporary / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
    temporary.rename(out)
  except OSError as error:
    raise InputError(f"--out={out}: cannot write ({error})") from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
